//! `Cache-Control`, its targeted kind, and the terms that come of them: nothing forbidden is kept, nothing lasts for ever.
#![no_main]

use std::time::Duration;

use gateway::{
    cache::{
        directives::CacheControl,
        policy::{self, Asks, Times},
    },
    snapshot::Keep,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 8] =
    ["cache-control", "cdn-cache-control", "expires", "age", "date", "last-modified", "vary", "pragma"];

fuzz_target!(|input: (u16, Vec<(u8, Vec<u8>)>, bool, bool)| {
    let (status, fields, authorized, cookies) = input;
    let mut headers = HeaderMap::new();
    for (name, value) in fields.into_iter().take(20) {
        let name = HeaderName::from_static(NAMES[usize::from(name) % NAMES.len()]);
        if let Ok(value) = HeaderValue::from_bytes(&value) {
            headers.append(name, value);
        }
    }
    let lines: Vec<&HeaderValue> = headers.get_all("cache-control").iter().collect();
    let control = CacheControl::of(lines.iter().copied());
    // Lines are as good as one (RFC 9110 §5.3), unless a quoted text goes on over their end.
    let quotes = |line: &&HeaderValue| line.as_bytes().iter().filter(|byte| **byte == b'"').count() % 2 == 0;
    let escapes = |line: &&HeaderValue| line.as_bytes().contains(&b'\\');
    if lines.iter().all(quotes) && !lines.iter().any(escapes) {
        let joined = lines.iter().map(|line| line.as_bytes()).collect::<Vec<_>>().join(&b", "[..]);
        if let Ok(joined) = HeaderValue::from_bytes(&joined) {
            assert_eq!(CacheControl::of([&joined]), control);
        }
    }
    let targeted = CacheControl::targeted(headers.get_all("cdn-cache-control"));
    let effective = targeted.unwrap_or(control);
    for number in [effective.max_age, effective.s_maxage, effective.stale_if_error, effective.stale_while_revalidate] {
        assert!(number.is_none_or(|number| number <= 1 << 31));
    }
    let Ok(status) = StatusCode::from_u16(status) else { return };
    let keep = Keep {
        ttl: Duration::from_secs(60),
        while_revalidate: Duration::from_secs(60),
        if_error: Duration::from_secs(60),
        collapse: Duration::ZERO,
    };
    let asks = Asks::new(&headers, authorized, cookies);
    let times = Times { asked: 1_000_000, came: 1_000_001 };
    if let Ok(terms) = policy::terms(status, &headers, &asks, &keep, times) {
        assert!(!effective.private && (!effective.no_store || effective.must_understand));
        assert!(!authorized || terms.for_authorized);
        assert!(!cookies || terms.for_cookies);
        assert!(terms.lifetime <= u64::from(u32::MAX) * 100);
        let _ = asks.judge(&terms, terms.age);
    }
});
