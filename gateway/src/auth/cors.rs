//! What pages of other origins may do (the Fetch standard's CORS protocol), and the answers to their preflights.
//!
//! Knows nothing of routes: a policy and a request's fields in, fields out.

use http::{HeaderMap, HeaderName, HeaderValue, Method, header};

/// A policy, compiled.
#[derive(Debug)]
pub struct Cors {
    /// Which origins.
    pub origins: Origins,
    /// `Access-Control-Allow-Methods`; nothing where the asked one is allowed.
    pub methods: Option<(Vec<Method>, HeaderValue)>,
    /// The fields that a page may send; nothing where it may send any.
    pub headers: Option<(Vec<HeaderName>, HeaderValue)>,
    /// `Access-Control-Expose-Headers`, if anything is.
    pub expose: Option<HeaderValue>,
    /// Whether cookies go along.
    pub credentials: bool,
    /// `Access-Control-Max-Age`
    pub max_age: HeaderValue,
}

/// The origins of a policy.
#[derive(Debug)]
pub enum Origins {
    /// All.
    Any,
    /// These.
    Some(Vec<Origin>),
}

/// An origin of a policy.
#[derive(Debug, PartialEq, Eq)]
pub enum Origin {
    /// This one.
    Exact(Box<str>),
    /// All below a host: the scheme with `://`, and the rest from its dot.
    Below(Box<str>, Box<str>),
}

impl Origin {
    /// Reads an origin of the file.
    pub fn parse(text: &str) -> Option<Self> {
        let (scheme, host) = text.split_once("://")?;
        let lower = |text: &str| -> Box<str> { text.to_ascii_lowercase().into() };
        let name = host.strip_prefix("*.").unwrap_or(host);
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
        let scheme_is = !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
        if !scheme_is || name.is_empty() || !name.bytes().all(valid) {
            return None;
        }
        Some(match host.strip_prefix('*') {
            Some(rest) => Self::Below(lower(&format!("{scheme}://")), lower(rest)),
            None => Self::Exact(lower(text)),
        })
    }

    fn is(&self, asked: &str) -> bool {
        match self {
            Self::Exact(origin) => asked.eq_ignore_ascii_case(origin),
            Self::Below(scheme, rest) => {
                let asked = asked.to_ascii_lowercase();
                let label = asked.strip_prefix(&**scheme).and_then(|host| host.strip_suffix(&**rest));
                label.is_some_and(|label| !label.is_empty() && !label.contains(['/', '@', ':']))
            }
        }
    }
}

/// The fields in which an upstream would answer for itself.
const THEIRS: [HeaderName; 6] = [
    header::ACCESS_CONTROL_ALLOW_ORIGIN,
    header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
    header::ACCESS_CONTROL_ALLOW_METHODS,
    header::ACCESS_CONTROL_ALLOW_HEADERS,
    header::ACCESS_CONTROL_EXPOSE_HEADERS,
    header::ACCESS_CONTROL_MAX_AGE,
];

/// Methods that every page may use.
const SIMPLE: [Method; 3] = [Method::GET, Method::HEAD, Method::POST];

/// Whether a request asks what another would be allowed to do: for what method.
pub fn preflight(method: &Method, headers: &HeaderMap) -> Option<Method> {
    if *method != Method::OPTIONS || !headers.contains_key(header::ORIGIN) {
        return None;
    }
    Method::from_bytes(headers.get(header::ACCESS_CONTROL_REQUEST_METHOD)?.as_bytes()).ok()
}

impl Cors {
    /// `Access-Control-Allow-Origin` for an origin, if it is allowed.
    fn allows(&self, origin: &HeaderValue) -> Option<HeaderValue> {
        match &self.origins {
            // A browser takes no `*` where cookies go along.
            Origins::Any if !self.credentials => Some(HeaderValue::from_static("*")),
            Origins::Any => Some(origin.clone()),
            Origins::Some(known) => {
                let asked = origin.to_str().ok()?;
                known.iter().any(|known| known.is(asked)).then(|| origin.clone())
            }
        }
    }

    /// The fields of the answer to a preflight; what it must not do where it is refused.
    pub fn answer(&self, asked: &Method, headers: &HeaderMap) -> Result<HeaderMap, &'static str> {
        let mut told = HeaderMap::new();
        let origin = headers.get(header::ORIGIN).and_then(|origin| self.allows(origin));
        told.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.ok_or("the origin is not one of the route's `cors:`")?);
        let method = |text: &str| HeaderValue::try_from(text).ok();
        let methods = match &self.methods {
            None => method(asked.as_str()),
            Some((known, value)) => (SIMPLE.contains(asked) || known.contains(asked)).then(|| value.clone()),
        };
        told.insert(
            header::ACCESS_CONTROL_ALLOW_METHODS,
            methods.ok_or("the method is not one of the route's `cors:`")?,
        );
        let wanted = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS);
        match (&self.headers, wanted) {
            (None, Some(wanted)) => told.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone()),
            (Some((known, value)), Some(wanted)) => {
                let names = wanted.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
                let mut names = names.filter(|name| !name.is_empty());
                let is = |name: &[u8]| known.iter().any(|known| name.eq_ignore_ascii_case(known.as_str().as_bytes()));
                if !names.all(is) {
                    return Err("a field is not one of the route's `cors:`");
                }
                told.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, value.clone())
            }
            (_, None) => None,
        };
        if self.credentials {
            told.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        told.insert(header::ACCESS_CONTROL_MAX_AGE, self.max_age.clone());
        Ok(told)
    }

    /// What is said with every other answer.
    pub fn told(&self, origin: Option<&HeaderValue>) -> Vec<(HeaderName, HeaderValue)> {
        let mut told = Vec::new();
        // One answer for all is said to all: a browser may have kept it from when nobody asked.
        let all = HeaderValue::from_static("*");
        let open = matches!(self.origins, Origins::Any) && !self.credentials;
        let origin = if open { Some(&all) } else { origin };
        if let Some(allowed) = origin.and_then(|origin| self.allows(origin)) {
            told.push((header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed));
            if self.credentials {
                told.push((header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true")));
            }
            told.extend(self.expose.clone().map(|expose| (header::ACCESS_CONTROL_EXPOSE_HEADERS, expose)));
        }
        // What another origin is told is another answer.
        if !open {
            told.push((header::VARY, HeaderValue::from_static("Origin")));
        }
        told
    }

    /// Takes away what an upstream says in the gateway's place.
    pub fn clear(headers: &mut HeaderMap) {
        for name in THEIRS {
            headers.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_whole() {
        let is = |pattern: &str, origin: &str| Origin::parse(pattern).unwrap().is(origin);
        assert!(is("https://app.example.com", "https://APP.example.com"));
        assert!(is("https://*.example.com", "https://a.b.example.com"));
        assert!(is("http://localhost:3000", "http://localhost:3000"));
        for (pattern, origin) in [
            ("https://app.example.com", "https://app.example.com.evil.example"),
            ("https://app.example.com", "http://app.example.com"),
            ("https://*.example.com", "https://example.com"),
            ("https://*.example.com", "https://.example.com"),
            ("https://*.example.com", "https://evilexample.com"),
            ("https://*.example.com", "https://evil.example:1/.example.com"),
            ("https://*.example.com", "http://a.example.com"),
            ("https://*.example.com", "https://a.example.com:8443"),
            ("https://*.example.com", "null"),
        ] {
            assert!(!is(pattern, origin), "{pattern} {origin}");
        }
        for wrong in ["", "null", "*", "https://", "https://*.", "app.example.com", "https://a b", "https://a/b"] {
            assert_eq!(Origin::parse(wrong), None, "{wrong}");
        }
    }
}
