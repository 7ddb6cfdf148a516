//! What can go wrong with a request, and the one table that turns it into a response.
//!
//! The client learns which system failed and how, never an address: details go to
//! the log (RFC 9209 §4).

use std::{fmt, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use serde::Serialize;

use crate::{fields, routing::path::Oddity};

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The path can be read in two ways.
    Path(Oddity),
    /// The request is malformed; the text says how.
    BadRequest(&'static str),
    /// The request's target is too long.
    UriTooLong,
    /// The request's fields are too large or too many.
    HeaderTooLarge,
    /// The request's head takes too long to come.
    HeaderTimeout,
    /// A version of HTTP that is not spoken here.
    Version,
    /// The request has been here before.
    Loop,
    /// The client paused its body for too long.
    ClientStalled,
    /// The client's body broke off.
    ClientAborted,
    /// The body is larger than the route allows.
    BodyTooLarge,
    /// A retired or gone route does not take this request.
    NotAllowed,
    /// The name of the upstream did not resolve.
    Dns,
    /// It refused the connection.
    ConnectionRefused,
    /// It cannot be reached.
    Unreachable,
    /// It resolved to a listener of the gateway.
    IpProhibited,
    /// Connecting took too long.
    ConnectTimeout,
    /// As many requests are on their way to it as may be, and enough wait.
    ConnectionLimit,
    /// Its turn did not come in time.
    PendingTimeout,
    /// None of its endpoints is healthy.
    NoEndpoint,
    /// It has failed so often that it is left alone.
    CircuitOpen,
    /// The gateway itself has as many requests as it may.
    Overloaded,
    /// No token, or none that is taken.
    Unauthorized,
    /// More than one place for a token.
    AmbiguousToken,
    /// A token that may not do this.
    Forbidden,
    /// The keys that tokens are checked with cannot be had.
    NoKeys,
    /// A page's origin, or what it wants to do, is not allowed.
    OriginRefused,
    /// Asked for what is kept, and nothing is.
    NotCached,
    /// The client has sent more than the route's limit.
    RateLimited,
    /// The TLS handshake failed.
    Tls,
    /// Its certificate is not valid for its name.
    Certificate,
    /// The connection broke before the response began.
    Terminated,
    /// It does not take the request's body.
    WriteTimeout,
    /// No response within the time limit of a try.
    AttemptTimeout,
    /// No response within the time limit of the request.
    RequestTimeout,
    /// Its response's body paused for too long.
    IdleTimeout,
    /// Its response is not HTTP.
    Protocol,
    /// Its 101 is not what was asked for.
    Upgrade,
    /// A bug in the gateway.
    Internal,
}

/// A time limit, in the words of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeLimit {
    /// Of a connection.
    Connect,
    /// Of the wait for a place.
    Pending,
    /// Of one try.
    Attempt,
    /// Of the request.
    Request,
    /// Of a pause.
    Idle,
}

impl TimeLimit {
    /// All, in the order of their counters.
    pub const ALL: [Self; 5] = [Self::Connect, Self::Pending, Self::Attempt, Self::Request, Self::Idle];

    /// The word in the file, in logs and labels.
    pub fn word(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Pending => "pending",
            Self::Attempt => "attempt",
            Self::Request => "request",
            Self::Idle => "idle",
        }
    }
}

/// A failed try before the one that decided.
#[derive(Clone, Debug)]
pub struct Earlier {
    /// With whom.
    pub upstream: Arc<str>,
    /// What went wrong.
    pub kind: Kind,
}

/// A failed request.
#[derive(Clone, Debug)]
pub struct Error {
    /// What went wrong.
    pub kind: Kind,
    /// The upstream that it went wrong with.
    pub upstream: Option<Arc<str>>,
    /// Whether the upstream may have seen the request: only what it never saw may be sent elsewhere whatever its method.
    pub sent: bool,
    /// For the log.
    pub detail: String,
    /// More fields of the response.
    pub fields: Vec<(HeaderName, HeaderValue)>,
    /// When to come back, in seconds, where that is known.
    pub retry_after: Option<u64>,
    /// The service that failed before the monolith did.
    pub earlier: Option<Earlier>,
}

/// One row of the table.
struct Row {
    status: StatusCode,
    title: &'static str,
    /// The error type of `Proxy-Status` (RFC 9209 §2.3); none where the client is at fault and no proxy.
    proxy_status: Option<&'static str>,
}

impl Kind {
    fn row(self) -> Row {
        let row = |status, title, proxy_status| Row { status, title, proxy_status };
        match self {
            Self::Path(_) | Self::BadRequest(_) => {
                row(StatusCode::BAD_REQUEST, "Bad request", Some("http_request_error"))
            }
            Self::UriTooLong => {
                row(StatusCode::URI_TOO_LONG, "The request's target is too long", Some("http_request_error"))
            }
            Self::HeaderTooLarge => row(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "The request's fields are too large or too many",
                Some("http_request_error"),
            ),
            Self::HeaderTimeout => {
                row(StatusCode::REQUEST_TIMEOUT, "The request's head took too long", Some("http_request_error"))
            }
            Self::Version => row(
                StatusCode::HTTP_VERSION_NOT_SUPPORTED,
                "Only HTTP/1.0, HTTP/1.1 and HTTP/2 are spoken here",
                Some("http_request_error"),
            ),
            Self::Loop => row(
                StatusCode::BAD_GATEWAY,
                "The request came back to this gateway; an upstream sends it here again",
                Some("proxy_loop_detected"),
            ),
            Self::ClientAborted => {
                row(StatusCode::BAD_REQUEST, "The request's body broke off", Some("http_request_error"))
            }
            Self::ClientStalled => {
                row(StatusCode::REQUEST_TIMEOUT, "The request's body paused for too long", Some("http_request_error"))
            }
            Self::BodyTooLarge => {
                row(StatusCode::PAYLOAD_TOO_LARGE, "The request's body is too large", Some("http_request_error"))
            }
            Self::NotAllowed => {
                row(StatusCode::METHOD_NOT_ALLOWED, "The route does not take this request", Some("http_request_denied"))
            }
            Self::Dns => row(StatusCode::BAD_GATEWAY, "The upstream's name did not resolve", Some("dns_error")),
            Self::ConnectionRefused => {
                row(StatusCode::BAD_GATEWAY, "The upstream refused the connection", Some("connection_refused"))
            }
            Self::Unreachable => {
                row(StatusCode::BAD_GATEWAY, "The upstream cannot be reached", Some("destination_ip_unroutable"))
            }
            Self::IpProhibited => {
                row(StatusCode::BAD_GATEWAY, "The upstream is the gateway itself", Some("destination_ip_prohibited"))
            }
            Self::ConnectTimeout => {
                row(StatusCode::GATEWAY_TIMEOUT, "Connecting to the upstream took too long", Some("connection_timeout"))
            }
            Self::ConnectionLimit => row(
                StatusCode::SERVICE_UNAVAILABLE,
                "Too many requests wait for the upstream",
                Some("connection_limit_reached"),
            ),
            Self::PendingTimeout => row(
                StatusCode::SERVICE_UNAVAILABLE,
                "The upstream had no place for the request in time",
                Some("connection_limit_reached"),
            ),
            Self::NoEndpoint => row(
                StatusCode::SERVICE_UNAVAILABLE,
                "No endpoint of the upstream is healthy",
                Some("destination_unavailable"),
            ),
            Self::CircuitOpen => row(
                StatusCode::SERVICE_UNAVAILABLE,
                "The upstream has failed so often that it is left alone for a while",
                Some("destination_unavailable"),
            ),
            Self::Overloaded => row(
                StatusCode::SERVICE_UNAVAILABLE,
                "The gateway has as many requests as it may",
                Some("proxy_internal_response"),
            ),
            Self::Unauthorized => row(StatusCode::UNAUTHORIZED, "A valid token is needed", Some("http_request_denied")),
            Self::AmbiguousToken => {
                row(StatusCode::BAD_REQUEST, "The request has several tokens", Some("http_request_denied"))
            }
            Self::Forbidden => row(StatusCode::FORBIDDEN, "The token may not do this", Some("http_request_denied")),
            Self::NoKeys => row(
                StatusCode::SERVICE_UNAVAILABLE,
                "Tokens cannot be checked at the moment",
                Some("proxy_internal_response"),
            ),
            Self::OriginRefused => {
                row(StatusCode::FORBIDDEN, "Pages of this origin may not do this", Some("http_request_denied"))
            }
            // RFC 9111 §5.2.1.7
            Self::NotCached => {
                row(StatusCode::GATEWAY_TIMEOUT, "Nothing is kept that answers this", Some("http_request_denied"))
            }
            Self::RateLimited => row(StatusCode::TOO_MANY_REQUESTS, "Too many requests", Some("http_request_denied")),
            Self::Tls => {
                row(StatusCode::BAD_GATEWAY, "The upstream's TLS handshake failed", Some("tls_protocol_error"))
            }
            Self::Certificate => {
                row(StatusCode::BAD_GATEWAY, "The upstream's certificate is not valid", Some("tls_certificate_error"))
            }
            Self::Terminated => {
                row(StatusCode::BAD_GATEWAY, "The upstream closed the connection", Some("connection_terminated"))
            }
            Self::WriteTimeout => row(
                StatusCode::GATEWAY_TIMEOUT,
                "The upstream does not take the request",
                Some("connection_write_timeout"),
            ),
            Self::AttemptTimeout | Self::RequestTimeout | Self::IdleTimeout => {
                row(StatusCode::GATEWAY_TIMEOUT, "The upstream did not answer in time", Some("http_response_timeout"))
            }
            Self::Protocol => {
                row(StatusCode::BAD_GATEWAY, "The upstream's answer is not valid HTTP", Some("http_protocol_error"))
            }
            Self::Upgrade => {
                row(StatusCode::BAD_GATEWAY, "The upstream switched protocols unasked", Some("http_upgrade_failed"))
            }
            Self::Internal => row(StatusCode::INTERNAL_SERVER_ERROR, "Internal error", Some("proxy_internal_error")),
        }
    }

    /// Whether the request itself is no good, so that nothing more is read from where it came.
    pub fn is_malformed(self) -> bool {
        matches!(
            self,
            Self::Path(_)
                | Self::BadRequest(_)
                | Self::UriTooLong
                | Self::HeaderTooLarge
                | Self::HeaderTimeout
                | Self::Version
        )
    }

    /// The status that the client gets for it.
    pub fn status(self) -> StatusCode {
        self.row().status
    }

    /// When to come back, in seconds, where nothing says better.
    fn retry_after(self) -> Option<u64> {
        let temporary = self.is_upstreams() || self.row().status == StatusCode::SERVICE_UNAVAILABLE;
        temporary.then_some(1)
    }

    /// The time limit that fired, in the words of the file.
    pub fn limit(self) -> Option<TimeLimit> {
        match self {
            Self::ConnectTimeout => Some(TimeLimit::Connect),
            Self::PendingTimeout => Some(TimeLimit::Pending),
            Self::AttemptTimeout => Some(TimeLimit::Attempt),
            Self::RequestTimeout => Some(TimeLimit::Request),
            Self::WriteTimeout | Self::ClientStalled | Self::IdleTimeout => Some(TimeLimit::Idle),
            _ => None,
        }
    }

    /// Whether there was no connection to send on.
    pub fn is_connect(self) -> bool {
        matches!(
            self,
            Self::Dns
                | Self::ConnectionRefused
                | Self::Unreachable
                | Self::IpProhibited
                | Self::ConnectTimeout
                | Self::Tls
                | Self::Certificate
        )
    }

    /// Whether the upstream, and not the client or the gateway, is to blame.
    pub fn is_upstreams(self) -> bool {
        self.is_connect()
            || matches!(
                self,
                Self::Terminated
                    | Self::WriteTimeout
                    | Self::AttemptTimeout
                    | Self::RequestTimeout
                    | Self::IdleTimeout
                    | Self::Protocol
                    | Self::Upgrade
            )
    }

    /// Whether it had no place for the request, or is left alone: another system may have.
    pub fn is_unavailable(self) -> bool {
        self.is_connect()
            || matches!(
                self,
                Self::ConnectionLimit | Self::PendingTimeout | Self::NoEndpoint | Self::CircuitOpen | Self::Terminated
            )
    }

    /// The error type of `Proxy-Status`, for logs and metrics.
    pub fn word(self) -> &'static str {
        self.row().proxy_status.unwrap_or("none")
    }
}

impl Error {
    /// An error before any upstream was involved.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            upstream: None,
            sent: false,
            detail: String::new(),
            fields: Vec::new(),
            retry_after: None,
            earlier: None,
        }
    }

    /// An error with an upstream.
    pub fn upstream(kind: Kind, upstream: &Arc<str>, sent: bool, detail: impl fmt::Display) -> Self {
        Self {
            kind,
            upstream: Some(upstream.clone()),
            sent,
            detail: detail.to_string(),
            fields: Vec::new(),
            retry_after: None,
            earlier: None,
        }
    }

    /// When to come back, in seconds, where that makes sense.
    pub fn retry_after(&self) -> Option<u64> {
        self.retry_after.or_else(|| self.kind.retry_after())
    }

    /// The response that the client gets; its fields go into an empty map.
    pub fn response(&self, fields: HeaderMap) -> Response<Bytes> {
        let row = self.kind.row();
        let detail = match self.kind {
            Kind::Path(oddity) => oddity.to_string(),
            Kind::BadRequest(why) => why.to_owned(),
            // Nothing else is for the client: it may name addresses.
            Kind::NotAllowed | Kind::Unauthorized | Kind::AmbiguousToken | Kind::Forbidden | Kind::OriginRefused => {
                self.detail.clone()
            }
            _ => String::new(),
        };
        let retry_after = self.retry_after();
        let problem = Problem {
            kind: "about:blank",
            title: row.title,
            status: row.status.as_u16(),
            error: row.proxy_status,
            detail: &detail,
            upstream: self.upstream.as_deref(),
            limit: self.kind.limit().map(TimeLimit::word),
            retry_after,
            fallback_from: self.earlier.as_ref().map(|Earlier { upstream, kind }| From {
                upstream,
                title: kind.row().title,
                error: kind.word(),
            }),
        };
        let mut response = problem_with(row.status, &problem, fields);
        if let Some(error) = row.proxy_status {
            let mut status = String::with_capacity(96);
            let limit = self.kind.limit().map(TimeLimit::word);
            let next = self.upstream.as_deref().into_iter().flat_map(|upstream| ["; next-hop=", upstream]);
            let details = limit.into_iter().flat_map(|limit| ["; details=\"the limit `", limit, "` fired\""]);
            ["gw; error=", error].into_iter().chain(next).chain(details).for_each(|word| status.push_str(word));
            if let Ok(value) = HeaderValue::try_from(status) {
                response.headers_mut().insert(fields::PROXY_STATUS, value);
            }
        }
        if let Some(seconds) = retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response.headers_mut().extend(self.fields.iter().map(|(name, value)| (name.clone(), value.clone())));
        response
    }
}

/// A problem (RFC 9457), with what this gateway adds to it.
#[derive(Serialize)]
struct Problem<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    title: &'static str,
    status: u16,
    /// The error type of `Proxy-Status`.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fallback_from: Option<From<'a>>,
}

/// The service that failed before the monolith did.
#[derive(Serialize)]
struct From<'a> {
    upstream: &'a str,
    title: &'static str,
    error: &'static str,
}

/// A response with a problem (RFC 9457) as its body.
pub fn problem_response(status: StatusCode, problem: &impl Serialize) -> Response<Bytes> {
    problem_with(status, problem, HeaderMap::new())
}

fn problem_with(status: StatusCode, problem: &impl Serialize, fields: HeaderMap) -> Response<Bytes> {
    // Texts and numbers always have a JSON.
    let mut response = Response::new(Bytes::from(serde_json::to_vec(problem).unwrap_or_default()));
    *response.status_mut() = status;
    *response.headers_mut() = fields;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    response
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.word())?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_learns_who_failed_and_how_but_no_address() {
        let error = Error::upstream(Kind::ConnectionRefused, &"orders".into(), false, "127.0.0.1:9001: refused");
        let response = error.response(HeaderMap::new());
        assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
        assert_eq!(response.headers()[fields::PROXY_STATUS], "gw; error=connection_refused; next-hop=orders");
        let body: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        let expected = serde_json::json!({
            "type": "about:blank", "title": "The upstream refused the connection", "status": 502, "upstream": "orders",
            "error": "connection_refused", "retry_after": 1,
        });
        assert_eq!(body, expected);
    }
}
