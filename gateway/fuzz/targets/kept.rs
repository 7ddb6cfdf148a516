//! `Range`, conditions, `Vary`, and what comes out of Redis: parts lie within the whole, a request is like itself, garbage is nothing.
#![no_main]

use gateway::cache::{
    lying,
    range::{self, Part},
    vary,
};
use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;

const ASKS: [&str; 7] =
    ["range", "if-range", "if-none-match", "if-modified-since", "accept", "accept-language", "x-a"];

fn map(fields: Vec<(u8, Vec<u8>)>, names: &[&'static str]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in fields.into_iter().take(20) {
        if let Ok(value) = HeaderValue::from_bytes(&value) {
            map.append(HeaderName::from_static(names[usize::from(name) % names.len()]), value);
        }
    }
    map
}

fuzz_target!(|input: (Vec<(u8, Vec<u8>)>, Vec<(u8, Vec<u8>)>, u32, Vec<u8>)| {
    let (request, stored, length, value) = input;
    let (request, stored) = (map(request, &ASKS), map(stored, &["etag", "last-modified", "date", "vary"]));
    if let Some(asked) = request.get("range")
        && let Part::Bytes(first, last) = range::part(asked.as_bytes(), u64::from(length))
    {
        assert!(first <= last && last < u64::from(length), "{asked:?} {length}");
    }
    let _ = range::holds(&request, &stored);
    let _ = range::is_current(&request, &stored, 1_000);
    if let Some(names) = vary::names(&stored) {
        let selection = vary::select(&names, &request);
        assert!(vary::matches(&selection, &request));
        // What tells answers apart in Redis tells requests apart.
        let other = vary::select(&names, &stored);
        assert_eq!(vary::tag(&selection) == vary::tag(&other), selection == other);
    }
    let _ = lying::decode(&value, b"key");
});
