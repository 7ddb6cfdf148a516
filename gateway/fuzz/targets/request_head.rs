//! A request's head: what is accepted has one reading, the same however it is cut, and the same after it was written anew.
#![no_main]

use gateway::http1::{
    head::{Framing, Limits, is_whole, parse_request},
    write,
};
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits { head: 2048, target: 512 };

fuzz_target!(|bytes: &[u8]| {
    let parsed = parse_request(bytes, LIMITS);
    // Looked at in pieces, the head is whole where it is read, and not before.
    let mut seen = 0;
    for length in 1..=bytes.len().min(300) {
        let whole = is_whole(&bytes[..length], seen);
        if matches!(whole, Ok(false)) {
            assert!(!matches!(parse_request(&bytes[..length], LIMITS), Ok(Some(_))));
        }
        if !matches!(whole, Ok(false)) {
            break;
        }
        seen = length;
    }
    let Ok(Some((head, length))) = parsed else { return };
    let text = &bytes[..length];
    assert!(length <= LIMITS.head && text.ends_with(b"\r\n\r\n"));
    // What strict recipients refuse, said in another way than the parser does.
    let mut lines = text.split(|byte| *byte == b'\n');
    assert!(lines.by_ref().take(text.iter().filter(|byte| **byte == b'\n').count()).all(|line| line.ends_with(b"\r")));
    assert_eq!(text.iter().filter(|byte| **byte == b'\r').count(), text.iter().filter(|byte| **byte == b'\n').count());
    assert!(text.iter().all(|byte| matches!(byte, b'\r' | b'\n' | b'\t' | 0x20..=0x7e | 0x80..)));
    let lower = text.to_ascii_lowercase();
    let names = |name: &[u8]| lower.split(|byte| *byte == b'\n').skip(1).filter(|line| line.starts_with(name)).count();
    let (lengths, codings) = (names(b"content-length:"), names(b"transfer-encoding:"));
    assert!(lengths + codings <= 1, "two framings");
    match head.framing {
        Framing::Chunked => assert_eq!(codings, 1),
        Framing::Length(_) => assert_eq!(lengths, 1),
        Framing::None => assert_eq!(codings, 0),
        Framing::Close => panic!("a request that ends with its connection"),
    }
    // Its bytes do not depend on what follows.
    let again = parse_request(text, LIMITS).unwrap().unwrap();
    assert_eq!(again.1, length);
    // Written anew it is read as the same.
    let (parts, ()) = head.request.into_parts();
    if parts.uri.authority().is_some() || !parts.uri.path_and_query().is_some_and(|target| target.as_str().starts_with('/')) {
        return;
    }
    let mut out = Vec::new();
    write::request_head(&mut out, &parts, &write::Overrides::default());
    let limits = Limits { head: 2 * LIMITS.head, target: LIMITS.target };
    let (anew, _) = parse_request(&out, limits).unwrap().unwrap();
    let (anew, ()) = anew.request.into_parts();
    assert_eq!((&parts.method, &parts.uri, &parts.headers), (&anew.method, &anew.uri, &anew.headers));
});
