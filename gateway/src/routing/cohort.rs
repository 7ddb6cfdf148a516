//! Who is in a canary's cohort.
//!
//! hash(group, key) gives one of 10,000 buckets; in the cohort where the bucket is below
//! the share. So raising the share never moves anybody back, and every gateway agrees
//! without shared state. The hash is XXH3-64 of the key, seeded by XXH3-64 of the
//! group: part of the contract, since a change would move everybody.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName};
use twox_hash::XxHash3_64;

use super::{key::cookies, predicate::has_header};
use crate::claims::Claims;

/// How many buckets there are: a share has steps of 0.01 %.
pub const BUCKETS: u16 = 10_000;

/// Where a key comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// A cookie.
    Cookie(Box<str>),
    /// A field.
    Header(HeaderName),
    /// A claim of a verified token.
    Claim(Box<str>),
    /// The client's address, IPv6 by /64.
    Ip,
    /// The gateway's own cookie.
    Sticky,
}

/// Requests by what they carry; all must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traits {
    /// Fields with exactly this value.
    pub headers: Vec<(HeaderName, Box<[u8]>)>,
    /// Cookies with exactly this value.
    pub cookies: Vec<(Box<str>, Box<str>)>,
    /// Claims with exactly this value, or with it in their list.
    pub claims: Vec<(Box<str>, Box<str>)>,
}

impl Traits {
    fn hold(&self, headers: &HeaderMap, claims: Option<&Claims>) -> bool {
        self.headers.iter().all(|(name, value)| has_header(headers, name, value))
            && self.cookies.iter().all(|(name, value)| cookies(headers, name).any(|found| found == value.as_bytes()))
            && self.claims.iter().all(|(name, value)| claims.is_some_and(|claims| claims.says(name, value)))
    }
}

fn bucket(hash: u64) -> u16 {
    u16::try_from(hash % u64::from(BUCKETS)).unwrap_or(0)
}

/// A canary's cohort, compiled.
#[derive(Clone, Debug)]
pub struct Cohort {
    /// Routes of one group share cohorts.
    pub group: Box<str>,
    /// The buckets below this are in.
    pub share: u16,
    /// Where the key comes from; the first that the request has counts.
    pub by: Vec<KeySource>,
    /// In, whatever the key.
    pub always: Vec<Traits>,
    /// Out, whatever else.
    pub never: Vec<Traits>,
    seed: u64,
    /// The name of the gateway's own cookie.
    pub cookie: Box<str>,
}

/// What decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The stage alone.
    Stage,
    /// A predicate in `never`.
    Never,
    /// A predicate in `always`.
    Always,
    /// A cookie's bucket.
    Cookie,
    /// A field's bucket.
    Header,
    /// A claim's bucket.
    Claim,
    /// The address's bucket.
    Ip,
    /// The gateway's cookie's bucket.
    Sticky,
    /// No key: the monolith's.
    NoKey,
}

impl Why {
    /// The word in logs and explanations.
    pub fn word(self) -> &'static str {
        match self {
            Self::Stage => "stage",
            Self::Never => "never",
            Self::Always => "always",
            Self::Cookie => "cookie",
            Self::Header => "header",
            Self::Claim => "claim",
            Self::Ip => "ip",
            Self::Sticky => "sticky",
            Self::NoKey => "no_key",
        }
    }
}

/// A request's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether the service answers.
    pub service: bool,
    /// The bucket, where a key had one.
    pub bucket: Option<u16>,
    /// Tells the key from others of its bucket.
    pub key: Option<u64>,
    /// The share that counts for this key: a session's is bounded by the one that it began with.
    pub share: u16,
    /// What decided.
    pub why: Why,
    /// A session that the response's cookie begins.
    pub begin: Option<Session>,
}

/// What the gateway's own cookie says: who, and the share when the session began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    id: u64,
    share: u16,
}

impl Session {
    /// The cookie's value.
    pub fn value(self) -> String {
        format!("{:016x}.{}", self.id, self.share)
    }

    fn parse(value: &[u8]) -> Option<Self> {
        let value = std::str::from_utf8(value).ok()?;
        let (id, share) = value.split_once('.')?;
        let canonical = Self { id: u64::from_str_radix(id, 16).ok()?, share: share.parse().ok()? };
        (canonical.share <= BUCKETS && canonical.value() == value).then_some(canonical)
    }
}

impl Cohort {
    /// A cohort without exceptions.
    pub fn new(group: &str, share: u16, by: Vec<KeySource>) -> Self {
        Self {
            group: group.into(),
            share,
            by,
            always: Vec::new(),
            never: Vec::new(),
            seed: XxHash3_64::oneshot(group.as_bytes()),
            cookie: format!("gateway-{group}").into(),
        }
    }

    /// The bucket of a key.
    pub fn bucket(&self, key: &[u8]) -> u16 {
        bucket(self.hash(key))
    }

    fn hash(&self, key: &[u8]) -> u64 {
        XxHash3_64::oneshot_with_seed(self.seed, key)
    }

    /// Decides for one request, at a share. `claims` are those of a verified token; `random` is asked only when a new session begins.
    pub fn decide(
        &self,
        share: u16,
        headers: &HeaderMap,
        claims: Option<&Claims>,
        client: IpAddr,
        random: impl FnOnce() -> u64,
    ) -> Decision {
        let fixed = |service, why| Decision { service, bucket: None, key: None, share, why, begin: None };
        if self.never.iter().any(|traits| traits.hold(headers, claims)) {
            return fixed(false, Why::Never);
        }
        if self.always.iter().any(|traits| traits.hold(headers, claims)) {
            return fixed(true, Why::Always);
        }
        let decided = |key: &[u8], share: u16, why| {
            let hash = self.hash(key);
            let bucket = bucket(hash);
            let key = Some(hash / u64::from(BUCKETS));
            Decision { service: bucket < share, bucket: Some(bucket), key, share, why, begin: None }
        };
        for source in &self.by {
            match source {
                KeySource::Cookie(name) => {
                    if let Some(value) = cookies(headers, name).next().filter(|value| !value.is_empty()) {
                        return decided(value, share, Why::Cookie);
                    }
                }
                KeySource::Header(name) => {
                    if let Some(value) = headers.get(name).filter(|value| !value.is_empty()) {
                        return decided(value.as_bytes(), share, Why::Header);
                    }
                }
                KeySource::Claim(name) => {
                    if let Some(text) = claims.and_then(|claims| claims.text(name)) {
                        return decided(text.as_bytes(), share, Why::Claim);
                    }
                }
                KeySource::Ip => {
                    return match client.to_canonical() {
                        IpAddr::V4(address) => decided(&address.octets(), share, Why::Ip),
                        IpAddr::V6(address) => decided(&address.octets()[..8], share, Why::Ip),
                    };
                }
                KeySource::Sticky => {
                    let known = cookies(headers, &self.cookie).find_map(Session::parse);
                    let session = known.unwrap_or_else(|| Session { id: random(), share });
                    // The share when the session began bounds it: raising the share moves only new sessions.
                    let bounded = session.share.min(share);
                    let mut decision = decided(&session.id.to_be_bytes(), bounded, Why::Sticky);
                    // Who was drawn at another share is not comparable with those of this one.
                    decision.key = decision.key.filter(|_| bounded == share);
                    // At 0 % nobody is pinned, or the first step would find nobody to move.
                    decision.begin = (known.is_none() && share > 0).then_some(session);
                    return decision;
                }
            }
        }
        fixed(false, Why::NoKey)
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    fn by_header(share: u16) -> Cohort {
        Cohort::new("checkout", share, vec![KeySource::Header(HeaderName::from_static("x-user"))])
    }

    fn decide(cohort: &Cohort, pairs: &[(&'static str, &str)]) -> Decision {
        cohort.decide(cohort.share, &headers(pairs), None, CLIENT, || 7)
    }

    /// Every gateway, of every version, must agree. If this fails, everybody changes cohort.
    #[test]
    fn buckets_are_part_of_the_contract() {
        let cohort = by_header(0);
        let buckets = ["", "a", "42", "user@example.com"].map(|key| cohort.bucket(key.as_bytes()));
        assert_eq!(buckets, [4120, 6718, 6711, 9031]);
    }

    #[test]
    fn shares_come_out_within_statistical_bounds() {
        // 100,000 keys: five standard deviations of a share of 10 % are 0.47 %.
        let cohort = by_header(1000);
        let inside = (0..100_000).filter(|n| cohort.bucket(format!("user-{n}").as_bytes()) < 1000).count();
        assert!((9_526..=10_474).contains(&inside), "{inside}");
    }

    #[test]
    fn groups_are_independent() {
        let (a, b) = (Cohort::new("a", 5000, Vec::new()), Cohort::new("b", 5000, Vec::new()));
        let both =
            (0..10_000_u32).filter(|n| a.bucket(&n.to_be_bytes()) < 5000 && b.bucket(&n.to_be_bytes()) < 5000).count();
        assert!((2_284..=2_716).contains(&both), "{both}");
    }

    #[test]
    fn never_beats_always_beats_the_key() {
        let mut cohort = by_header(10_000);
        let beta = |value: &str| Traits {
            claims: Vec::new(),
            headers: vec![(HeaderName::from_static("x-beta"), value.as_bytes().into())],
            cookies: Vec::new(),
        };
        cohort.never.push(beta("0"));
        assert_eq!(decide(&cohort, &[("x-user", "a"), ("x-beta", "0")]).why, Why::Never);
        cohort.share = 0;
        cohort.always.push(beta("1"));
        assert!(decide(&cohort, &[("x-user", "a"), ("x-beta", "1")]).service);
        cohort.always.push(beta("0"));
        assert!(!decide(&cohort, &[("x-beta", "0")]).service);
    }

    #[test]
    fn the_first_key_counts_and_none_is_the_monoliths() {
        let cohort = Cohort::new(
            "g",
            10_000,
            vec![KeySource::Cookie("session".into()), KeySource::Header(HeaderName::from_static("x-user"))],
        );
        assert_eq!(decide(&cohort, &[("cookie", "a=1; session=x"), ("x-user", "u")]).why, Why::Cookie);
        assert_eq!(decide(&cohort, &[("cookie", "xsession=x; session="), ("x-user", "u")]).why, Why::Header);
        let nothing = decide(&cohort, &[]);
        assert_eq!((nothing.service, nothing.why), (false, Why::NoKey));
    }

    #[test]
    fn a_cookie_that_is_no_ascii_hides_no_other() {
        let mut headers = HeaderMap::new();
        headers.insert("cookie", HeaderValue::from_bytes("city=Köln; session=x".as_bytes()).unwrap());
        let cohort = Cohort::new("g", 10_000, vec![KeySource::Cookie("session".into()), KeySource::Sticky]);
        assert_eq!(cohort.decide(cohort.share, &headers, None, CLIENT, || 0).why, Why::Cookie);
    }

    #[test]
    fn addresses_count_by_64_bits() {
        let cohort = Cohort::new("g", 5000, vec![KeySource::Ip]);
        let bucket = |ip: &str| cohort.decide(cohort.share, &HeaderMap::new(), None, ip.parse().unwrap(), || 0).bucket;
        assert_eq!(bucket("2001:db8:1:2::1"), bucket("2001:db8:1:2:ffff::9"));
        assert_ne!(bucket("2001:db8:1:2::1"), bucket("2001:db8:1:3::1"));
        assert_eq!(bucket("192.0.2.1"), bucket("::ffff:192.0.2.1"));
    }

    #[test]
    fn raising_the_share_moves_only_new_sessions() {
        let mut cohort = Cohort::new("g", 1000, vec![KeySource::Sticky]);
        let fresh: Vec<Decision> = (0..1000_u64)
            .map(|n| {
                cohort.decide(cohort.share, &HeaderMap::new(), None, CLIENT, || n.wrapping_mul(0x9E37_79B9_7F4A_7C15))
            })
            .collect();
        let again = |cohort: &Cohort, first: &Decision| {
            let cookie = format!("{}={}", cohort.cookie, first.begin.unwrap().value());
            decide(cohort, &[("cookie", &cookie)])
        };
        for share in [1000, 5000, 10_000] {
            cohort.share = share;
            for first in &fresh {
                let decision = again(&cohort, first);
                assert_eq!((decision.service, decision.begin), (first.service, None));
            }
        }
        cohort.share = 0;
        assert!(fresh.iter().all(|first| !again(&cohort, first).service));
        assert_eq!(cohort.decide(cohort.share, &HeaderMap::new(), None, CLIENT, || 1).begin, None);
        let forged = format!("{}=zz.1", cohort.cookie);
        cohort.share = 10;
        assert!(decide(&cohort, &[("cookie", &forged)]).begin.is_some());
    }

    proptest! {
        /// Growing the share never moves anybody back.
        #[test]
        fn monotone(key in ".*", low in 0..=BUCKETS, more in 0..=BUCKETS) {
            let high = low.saturating_add(more).min(BUCKETS);
            prop_assume!(key.parse::<HeaderValue>().is_ok());
            let [before, after] = [low, high].map(|share| decide(&by_header(share), &[("x-user", &key)]));
            prop_assert!(!before.service || after.service);
            prop_assert_eq!(before.bucket, after.bucket);
        }
    }
}
