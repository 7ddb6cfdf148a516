//! A sample of requests with their answers, as lines of JSON: what `gateway record` writes and `gateway replay` asks again.
//!
//! Redacted by allow-list, on the way out: fields that are not named are left out, and requests whose answer may hang on what is left out
//! (credentials, cookies, query parameters that are not named) are not recorded at all, since nobody could ask them again.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::compare::{Answer, Body};

/// The request fields that are kept in any case.
const REQUEST: [HeaderName; 3] = [header::ACCEPT, header::ACCEPT_LANGUAGE, header::HOST];
/// The response fields that are kept.
const RESPONSE: [HeaderName; 7] = [
    header::CONTENT_TYPE,
    header::CONTENT_ENCODING,
    header::LOCATION,
    header::CACHE_CONTROL,
    header::ETAG,
    header::LAST_MODIFIED,
    header::VARY,
];
/// `x-api-key`
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// What is kept of a body.
pub const BODY: usize = 256 * 1024;

/// What is recorded, and where it goes.
#[derive(Debug)]
pub struct Recorder {
    /// The share of requests, of 10,000.
    pub share: u16,
    /// Only of this route.
    pub route: Option<String>,
    /// Request fields that may be kept beside the usual.
    pub headers: Vec<HeaderName>,
    /// Query parameters that may be kept; `*` for all.
    pub query: Vec<String>,
    /// Until when.
    pub until: tokio::time::Instant,
    /// Where lines go; what finds no room is left out.
    pub lines: mpsc::Sender<Bytes>,
}

/// One request with its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recorded {
    /// When.
    pub at: jiff::Timestamp,
    /// The route that it took.
    pub route: String,
    /// Who answered.
    pub arm: String,
    /// The method.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Request fields.
    pub headers: BTreeMap<String, String>,
    /// The answer's status.
    pub status: u16,
    /// The answer's fields.
    pub answer_headers: BTreeMap<String, String>,
    /// The answer's body, where it is a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The same in base64, where it is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
}

impl Recorder {
    /// The fields of a request that may be kept; nothing where it could not be asked again with those.
    pub fn admit(&self, method: &Method, query: Option<&str>, headers: &HeaderMap) -> Option<BTreeMap<String, String>> {
        if !method.is_safe() {
            return None;
        }
        let all = self.query.iter().any(|name| name == "*");
        let named = |pair: &str| {
            let name = pair.split('=').next().unwrap_or_default();
            name.is_empty() || self.query.iter().any(|known| known == name)
        };
        if !all && !query.unwrap_or_default().split('&').all(named) {
            return None;
        }
        let secret = [header::AUTHORIZATION, header::COOKIE, header::PROXY_AUTHORIZATION, API_KEY];
        if secret.iter().any(|name| headers.contains_key(name) && !self.headers.contains(name)) {
            return None;
        }
        Some(keep(headers, |name| REQUEST.contains(name) || self.headers.contains(name)))
    }
}

fn keep(headers: &HeaderMap, wanted: impl Fn(&HeaderName) -> bool) -> BTreeMap<String, String> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    headers.iter().filter(|(name, _)| wanted(name)).map(|(name, value)| (name.to_string(), text(value))).collect()
}

impl Recorded {
    /// Adds the answer.
    pub fn answered(&mut self, headers: &HeaderMap, body: &Bytes) {
        self.answer_headers = keep(headers, |name| RESPONSE.contains(name));
        match std::str::from_utf8(body) {
            Ok(text) => self.text = Some(text.to_owned()),
            Err(_) => self.base64 = Some(STANDARD.encode(body)),
        }
    }

    /// The answer, to be compared with another.
    pub fn answer(&self) -> Result<Answer, String> {
        let mut headers = HeaderMap::new();
        for (name, value) in &self.answer_headers {
            let pair = (HeaderName::try_from(name), HeaderValue::try_from(value));
            let (Ok(name), Ok(value)) = pair else { return Err(format!("not a header: `{name}`")) };
            headers.insert(name, value);
        }
        let body = match (&self.text, &self.base64) {
            (Some(text), _) => Body::Whole(Bytes::copy_from_slice(text.as_bytes())),
            (None, Some(encoded)) => Body::Whole(STANDARD.decode(encoded).map_err(|error| error.to_string())?.into()),
            (None, None) => Body::Unknown,
        };
        Ok(Answer { status: self.status, headers, body })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorder(headers: &[HeaderName], query: &[&str]) -> Recorder {
        Recorder {
            share: 10_000,
            route: None,
            headers: headers.to_vec(),
            query: query.iter().map(|name| (*name).to_owned()).collect(),
            until: tokio::time::Instant::now(),
            lines: mpsc::channel(1).0,
        }
    }

    #[test]
    fn what_is_not_allowed_is_not_there() {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static("text/html"));
        headers.insert("x-secret", HeaderValue::from_static("42"));
        let strict = recorder(&[], &["page"]);
        let kept = strict.admit(&Method::GET, Some("page=2&page=3"), &headers).unwrap();
        assert_eq!(kept, BTreeMap::from([("accept".to_owned(), "text/html".to_owned())]));
        assert_eq!(strict.admit(&Method::GET, Some("page=2&token=1"), &headers), None);
        assert_eq!(strict.admit(&Method::POST, None, &headers), None);
        assert!(recorder(&[], &["*"]).admit(&Method::HEAD, Some("token=1"), &headers).is_some());
        headers.insert(header::COOKIE, HeaderValue::from_static("session=1"));
        assert_eq!(strict.admit(&Method::GET, None, &headers), None);
        let kept = recorder(&[header::COOKIE], &[]).admit(&Method::GET, None, &headers).unwrap();
        assert_eq!(kept["cookie"], "session=1");
    }
}
