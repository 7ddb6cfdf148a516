use std::time::Duration;

use super::{
    Judgement::{Fresh, Stale, Validate, WhileRevalidate},
    *,
};

const NOW: u64 = 1_800_000_000;
const KEEP: Keep =
    Keep { ttl: Duration::ZERO, while_revalidate: Duration::ZERO, if_error: Duration::ZERO, collapse: Duration::ZERO };

fn map(pairs: &[(&'static str, &str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in pairs {
        map.append(HeaderName::from_static(name), value.parse().unwrap());
    }
    map
}

fn at(seconds: u64) -> String {
    httpdate::fmt_http_date(std::time::UNIX_EPOCH + Duration::from_secs(seconds))
}

fn plain(headers: &[(&'static str, &str)]) -> Result<Terms, &'static str> {
    terms(StatusCode::OK, &map(headers), &Asks::default(), &KEEP, Times { asked: NOW - 2, came: NOW })
}

/// RFC 9111 §4.2.3: the larger of what the clocks say and what was told on the way.
#[test]
fn an_age_is_never_taken_for_less() {
    let age = |headers: &[(&'static str, &str)]| plain(headers).unwrap().age;
    let control = ("cache-control", "max-age=1000");
    assert_eq!(age(&[control]), 2);
    assert_eq!(age(&[control, ("date", &at(NOW - 50))]), 50);
    assert_eq!(age(&[control, ("date", &at(NOW + 50))]), 2);
    assert_eq!(age(&[control, ("age", "100"), ("date", &at(NOW - 50))]), 102);
    assert_eq!(age(&[control, ("age", "100, 5")]), 102);
    assert_eq!(age(&[control, ("age", "-5")]), 2);
    // More than can be counted is stale, and nothing overflows.
    assert!(age(&[control, ("age", "99999999999999999999999"), ("etag", "\"a\"")]) > 1 << 30);
}

/// RFC 9111 §4.2.1, §4.2.2, §5.3.
#[test]
fn how_long_an_answer_is_fresh() {
    let lifetime = |headers: &[(&'static str, &str)]| plain(headers).map(|terms| terms.lifetime);
    let date = at(NOW);
    let when = |seconds: u64| at(seconds);
    assert_eq!(lifetime(&[("expires", &when(NOW + 90)), ("date", &date)]), Ok(90));
    assert_eq!(lifetime(&[("expires", &when(NOW + 90))]), Ok(90));
    // Of two the first; what is no date is the past.
    assert_eq!(lifetime(&[("expires", "0"), ("expires", &when(NOW + 90)), ("etag", "\"a\"")]), Ok(0));
    let long = NOW - 10_000_000;
    assert_eq!(lifetime(&[("last-modified", &when(long)), ("date", &date)]), Ok(HEURISTIC_MOST));
    assert_eq!(lifetime(&[("last-modified", &when(NOW - 1000)), ("date", &date)]), Ok(100));
    assert_eq!(lifetime(&[("last-modified", &when(NOW + 1000)), ("date", &date)]), Ok(0));
    // Three forms of a date (RFC 9110 §5.6.7).
    assert_eq!(lifetime(&[("expires", "Friday, 15-Jan-27 08:01:30 GMT"), ("date", &at(1_800_000_000))]), Ok(90));
    assert_eq!(lifetime(&[("expires", "Fri Jan 15 08:01:30 2027"), ("date", &at(1_800_000_000))]), Ok(90));
    assert_eq!(lifetime(&[]), Err("stale at once"));
    let route = Keep { ttl: Duration::from_secs(30), ..KEEP };
    let with = |status: u16, headers: &[(&'static str, &str)]| {
        let status = StatusCode::from_u16(status).unwrap();
        terms(status, &map(headers), &Asks::default(), &route, Times { asked: NOW, came: NOW }).map(|t| t.lifetime)
    };
    assert_eq!(with(200, &[]), Ok(30));
    assert_eq!(with(404, &[]), Ok(30));
    assert_eq!(with(200, &[("cache-control", "max-age=5")]), Ok(5));
    assert_eq!(with(302, &[]), Err("no freshness"));
    assert_eq!(with(500, &[]), Err("no freshness"));
}

/// RFC 9111 §4.2.4, §5.2.1; RFC 5861.
#[test]
fn what_a_request_may_have_at_which_age() {
    let judge = |asked: &str, said: &str, age: u64| {
        let asks = Asks::new(&map(&[("cache-control", asked)]), false, false);
        let keep = Keep { while_revalidate: Duration::from_secs(5), ..KEEP };
        let headers = map(&[("cache-control", said), ("etag", "\"a\"")]);
        let terms = terms(StatusCode::OK, &headers, &asks, &keep, Times { asked: NOW, came: NOW }).unwrap();
        asks.judge(&terms, age)
    };
    for (asked, said, age, expected) in [
        ("", "max-age=60", 59, Fresh),
        ("", "max-age=60", 60, WhileRevalidate),
        ("", "max-age=60", 64, WhileRevalidate),
        ("", "max-age=60", 65, Validate),
        ("", "max-age=60, stale-while-revalidate=100", 159, WhileRevalidate),
        ("", "max-age=60, stale-while-revalidate=0", 60, Validate),
        ("", "max-age=60, must-revalidate", 60, Validate),
        ("", "max-age=60, proxy-revalidate", 60, Validate),
        ("", "s-maxage=60, stale-while-revalidate=100", 60, Validate),
        ("", "no-cache, max-age=60", 0, Validate),
        ("no-cache", "max-age=60", 0, Validate),
        ("max-age=10", "max-age=60", 10, Fresh),
        ("max-age=10", "max-age=60", 11, Validate),
        ("max-age=0", "max-age=60", 0, Validate),
        ("max-stale=2", "max-age=60", 63, Validate),
        ("min-fresh=10", "max-age=60", 50, Fresh),
        ("min-fresh=10", "max-age=60", 51, Validate),
        ("max-stale=10", "max-age=60", 70, Stale),
        ("max-stale=10", "max-age=60", 71, Validate),
        ("max-stale", "max-age=60", 100_000, Stale),
        ("max-stale", "max-age=60, must-revalidate", 61, Validate),
        ("max-stale, max-age=10", "max-age=60", 30, Validate),
    ] {
        assert_eq!(judge(asked, said, age), expected, "{asked} / {said} at {age}");
    }
}

/// RFC 9111 §3.2.
#[test]
fn a_304_says_nothing_of_the_body() {
    let mut stored = map(&[("content-type", "a"), ("content-length", "9"), ("x-a", "1"), ("x-a", "2"), ("x-b", "1")]);
    update(&mut stored, &map(&[("content-type", "b"), ("content-length", "0"), ("x-a", "3"), ("etag", "\"n\"")]));
    let expected =
        map(&[("content-type", "a"), ("content-length", "9"), ("x-a", "3"), ("x-b", "1"), ("etag", "\"n\"")]);
    assert_eq!(stored, expected);
}
