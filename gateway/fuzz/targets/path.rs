//! Paths: what is read once is read the same again, and no key hides a segment.
#![no_main]

use gateway::routing::path::{Oddity, PathPolicy, read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let path = format!("/{text}");
    if !path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return;
    }
    let lenient = [
        Oddity::EncodedSlash,
        Oddity::Backslash,
        Oddity::EncodedBackslash,
        Oddity::EncodedControl,
        Oddity::DotParams,
        Oddity::BadEscape,
    ];
    let mut all = PathPolicy::default();
    for oddity in lenient {
        all = all.allowing(oddity);
    }
    for policy in [PathPolicy::default(), all] {
        let Ok(once) = read(&path, policy) else { continue };
        for segment in once.key.split(|byte| *byte == b'/') {
            assert!(once.key.is_empty() || !matches!(segment, b"" | b"." | b".."), "{path}: {once:?}");
        }
        assert!(once.forward.starts_with('/'), "{path}: {once:?}");
        // What goes on is read by the gateway behind as it was here.
        let forward = once.forward.clone().into_owned();
        let twice = read(&forward, policy).unwrap_or_else(|oddity| panic!("{path} → {forward}: {oddity}"));
        assert_eq!((&*twice.forward, &twice.key), (&*forward, &once.key), "{path}");
    }
});
