//! Names of header fields that the gateway treats in its own way, each list in one place.

use http::{HeaderMap, HeaderName, HeaderValue, header};

/// Fields of one connection only (RFC 9110 §7.6.1), beside those that `Connection` names.
pub fn is_hop_by_hop(name: &str) -> bool {
    // Told apart by length first: this runs for every field of every message.
    match name.len() {
        2 => name == "te",
        7 => name == "upgrade",
        10 => name == "connection" || name == "keep-alive",
        16 => name == "proxy-connection",
        17 => name == "transfer-encoding",
        19 => name == "proxy-authorization",
        _ => false,
    }
}

/// Fields in which only the gateway speaks, or only a trusted proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Voice {
    /// Nobody but the gateway: stripped from every request.
    Gateway,
    /// A trusted proxy: stripped from everybody else's requests.
    Proxy,
}

/// Whose field this is, in any spelling that a server may take for it (`_` for `-`).
pub fn voice(name: &str) -> Option<Voice> {
    // Usual requests have few fields that start like these.
    let first = name.as_bytes().first();
    if !matches!(first, Some(b'x' | b'f' | b'c' | b't' | b'k' | b'p')) {
        return None;
    }
    let underscored = name.contains('_');
    let dashed;
    let plain = if underscored {
        dashed = name.replace('_', "-");
        dashed.as_str()
    } else {
        name
    };
    match plain {
        "x-original-url" | "x-rewrite-url" => Some(Voice::Gateway),
        // Framing, connection and id, as CGI and its heirs would read them.
        "content-length" | "x-request-id" if underscored => Some(Voice::Gateway),
        _ if underscored && is_hop_by_hop(plain) => Some(Voice::Gateway),
        _ if plain.starts_with("x-gateway-") => Some(Voice::Gateway),
        // An underscored spelling is no proxy's honest field: servers that fold it would see two.
        "x-real-ip" | "forwarded" if underscored => Some(Voice::Gateway),
        _ if underscored && plain.starts_with("x-forwarded-") => Some(Voice::Gateway),
        "x-real-ip" | "forwarded" => Some(Voice::Proxy),
        _ if plain.starts_with("x-forwarded-") => Some(Voice::Proxy),
        _ => None,
    }
}

/// The fields in which the gateway tells upstreams what a token claims: nobody else says them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClaimFields(Vec<HeaderName>);

impl ClaimFields {
    /// These.
    pub fn new(names: impl IntoIterator<Item = HeaderName>) -> Self {
        let mut names: Vec<_> = names.into_iter().collect();
        names.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
        names.dedup();
        Self(names)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes them away.
    pub fn strip(&self, headers: &mut HeaderMap) {
        let doomed: Vec<HeaderName> = headers.keys().filter(|name| self.have(name.as_str())).cloned().collect();
        for name in doomed {
            headers.remove(name);
        }
    }

    /// Whether a field is one of them, in any spelling that a server may take for it (`_` for `-`).
    pub fn have(&self, name: &str) -> bool {
        let plain = |byte: u8| if byte == b'_' { b'-' } else { byte };
        let same = |known: &HeaderName| {
            let known = known.as_str();
            known.len() == name.len() && known.bytes().map(plain).eq(name.bytes().map(plain))
        };
        !self.0.is_empty() && self.0.iter().any(same)
    }
}

/// Fields with which a client asks a server to take the request for another method.
pub fn is_method_override(name: &str) -> bool {
    let known = ["x-http-method-override", "x-http-method", "x-method-override"];
    // `_` is `-` to many a server.
    let same = |known: &str| known.bytes().zip(name.bytes()).all(|(k, n)| k == n || (k == b'-' && n == b'_'));
    name.starts_with('x') && known.iter().any(|known| known.len() == name.len() && same(known))
}

/// Fields that mean nothing after a body, or too much: framing, routing, credentials, and what only the gateway says
/// (RFC 9110 §6.5.1).
pub fn is_forbidden_in_trailers(name: &HeaderName) -> bool {
    const FORBIDDEN: [HeaderName; 21] = [
        TRACEPARENT,
        TRACESTATE,
        BAGGAGE,
        X_REQUEST_ID,
        header::CONTENT_LENGTH,
        header::HOST,
        header::TRAILER,
        header::CONTENT_ENCODING,
        header::CONTENT_TYPE,
        header::CONTENT_RANGE,
        header::AUTHORIZATION,
        header::COOKIE,
        header::SET_COOKIE,
        header::CACHE_CONTROL,
        header::EXPECT,
        header::MAX_FORWARDS,
        header::RANGE,
        header::LOCATION,
        header::VARY,
        header::VIA,
        header::AGE,
    ];
    is_hop_by_hop(name.as_str())
        || voice(name.as_str()).is_some()
        || is_method_override(name.as_str())
        || FORBIDDEN.contains(name)
}

/// The fields that a `Connection` field names (RFC 9110 §7.6.1), but for those that no sender may name there.
pub fn named_by(value: &HeaderValue, doomed: &mut Vec<HeaderName>) {
    for token in tokens(value) {
        let known = [&b"close"[..], b"keep-alive", b"upgrade", b"host", b"content-length"];
        if !known.iter().any(|name| token.eq_ignore_ascii_case(name))
            && let Ok(name) = HeaderName::from_bytes(token)
        {
            doomed.push(name);
        }
    }
}

/// The tokens of a comma-separated field.
pub fn tokens(value: &HeaderValue) -> impl Iterator<Item = &[u8]> {
    value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|token| !token.is_empty())
}

/// `x-gateway-cohort`: the group and the arm, for the services behind.
pub const COHORT: HeaderName = HeaderName::from_static("x-gateway-cohort");
/// `x-gateway-shadow`: on copies, of which nobody sees the answer.
pub const SHADOW: HeaderName = HeaderName::from_static("x-gateway-shadow");
/// `baggage` (W3C), in which the same decision travels on to other services.
pub const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
/// The member of `baggage` that is ours.
pub const BAGGAGE_MEMBER: &str = "gateway-cohort";
/// `proxy-status` (RFC 9209).
pub const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");
/// `x-forwarded-for`
pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// `x-forwarded-proto`
pub const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// `x-forwarded-host`
pub const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
/// An id in hexadecimal.
pub fn hex(id: u128) -> [u8; 32] {
    let mut text = [0; 32];
    for (pair, byte) in text.chunks_exact_mut(2).zip(id.to_be_bytes()) {
        pair[0] = b"0123456789abcdef"[usize::from(byte >> 4)];
        pair[1] = b"0123456789abcdef"[usize::from(byte & 15)];
    }
    text
}

/// The context of a trace.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// What vendors add to it.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// `x-forwarded-prefix`
pub const X_FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");
/// `ratelimit`
pub const RATELIMIT: HeaderName = HeaderName::from_static("ratelimit");
/// `ratelimit-policy`
pub const RATELIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
/// `idempotency-key`
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// `x-request-id`
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// `proxy-connection`, which no standard knows and old clients send.
pub const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
/// `keep-alive`
pub const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_forged_field_is_known() {
        for name in [
            "x-gateway-cohort",
            "x_gateway_cohort",
            "x-gateway_shadow",
            "x-original-url",
            "x_rewrite-url",
            "x_forwarded_for",
            "x_real_ip",
            "content_length",
            "transfer_encoding",
            "x_request_id",
        ] {
            assert_eq!(voice(name), Some(Voice::Gateway), "{name}");
        }
        for name in ["x-forwarded-for", "x-forwarded-port", "forwarded", "x-real-ip"] {
            assert_eq!(voice(name), Some(Voice::Proxy), "{name}");
        }
        for name in ["content-length", "x-request-id", "from", "x-user", "accept", "x_user"] {
            assert_eq!(voice(name), None, "{name}");
        }
    }

    #[test]
    fn connection_cannot_name_what_frames_or_routes_a_request() {
        let mut doomed = Vec::new();
        named_by(&HeaderValue::from_static("close, Host, content-length, X-Secret,keep-alive,, te"), &mut doomed);
        assert_eq!(doomed, ["x-secret", "te"]);
    }
}
