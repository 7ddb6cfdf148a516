//! Answers that are compared, pointers, and lines of a recording: an answer is like itself, what is reported can be ignored, nothing panics.
#![no_main]

use bytes::Bytes;
use gateway::shadow::{
    compare::{Answer, Body, Rules, compare},
    pointer::Pattern,
    record::Recorded,
};
use http::{HeaderMap, HeaderValue, header};
use libfuzzer_sys::fuzz_target;

const KINDS: [&str; 4] = ["application/json", "text/html", "", "application/problem+json; charset=utf-8"];
const CODINGS: [&str; 6] = ["", "gzip", "deflate", "br", "zstd", "gzip, identity"];

fn answer(kind: u8, coding: u8, body: &[u8]) -> Answer {
    let mut headers = HeaderMap::new();
    let mut set = |name, value: &'static str| {
        if !value.is_empty() {
            headers.insert(name, HeaderValue::from_static(value));
        }
    };
    set(header::CONTENT_TYPE, KINDS[usize::from(kind) % KINDS.len()]);
    set(header::CONTENT_ENCODING, CODINGS[usize::from(coding) % CODINGS.len()]);
    Answer { status: 200, headers, body: Body::Whole(Bytes::copy_from_slice(body)) }
}

fuzz_target!(|input: (u8, u8, u8, Vec<u8>, Vec<u8>, Vec<String>)| {
    let (kind, coding, other_coding, control, candidate, pointers) = input;
    let _ = serde_json::from_slice::<Recorded>(&control).map(|recorded| recorded.answer());
    let mut rules = Rules {
        ignore: pointers.iter().take(8).filter_map(|text| Pattern::parse(text).ok()).collect(),
        headers: vec![header::CONTENT_TYPE],
        ..Rules::default()
    };
    rules.unordered.clone_from(&rules.ignore);
    let (a, b) = (answer(kind, coding, &control), answer(kind, other_coding, &candidate));
    let same = compare(&rules, &a, &a);
    assert!(same.found.is_empty(), "{same:?}");
    let found = compare(&rules, &a, &b).found;
    if found.keys().all(|field| field.starts_with('/')) && found.len() < 50 {
        let reported = found.keys().map(|field| Pattern::parse(field).expect("what is reported can be written into the file"));
        rules.ignore.extend(reported);
        let left = compare(&rules, &a, &b);
        assert!(left.partial || left.found.is_empty(), "{left:?}");
    }
});
