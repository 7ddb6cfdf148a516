//! Writes: once one may have happened, what is kept of its URL is used no more.

use std::sync::Arc;

use http::{HeaderValue, Uri, header};
use tower::Service;

use super::{pass, target};
use crate::{
    cache::{Cache, marks::without_port},
    context::{Context, Request, Response, Served},
    error::Error,
};

/// Lets a write pass. Once it may have happened, what is kept of its URL is used no more (RFC 9111 §4.4).
pub(super) async fn write<S>(inner: S, request: Request, cache: Arc<Cache>, kept: bool) -> Result<Response, Error>
where
    S: Service<Request, Response = Response, Error = Error>,
{
    let context = request.context.clone();
    let mut ended = Ended { context: context.clone(), cache, armed: true };
    let result = if kept {
        context.cache.set(Some(Served::Bypass));
        pass(inner, request, "gw; fwd=method").await
    } else {
        let mut inner = inner;
        inner.call(request).await
    };
    match &result {
        Ok(response) => {
            let status = response.status();
            ended.armed = status.is_success() || status.is_redirection();
            if ended.armed {
                for name in [header::LOCATION, header::CONTENT_LOCATION] {
                    ended.also(response.headers().get(name));
                }
            }
        }
        // It may have been done all the same.
        Err(error) => ended.armed = error.sent,
    }
    result
}

/// Ends what is kept of a URL when it goes: also where the client has left, and nobody knows what came of its write.
struct Ended {
    context: Context,
    cache: Arc<Cache>,
    armed: bool,
}

impl Ended {
    fn host(&self) -> &[u8] {
        self.context.host.get().map_or(&b""[..], HeaderValue::as_bytes)
    }

    /// The same for a URL that the answer names, on this host.
    fn also(&self, value: Option<&HeaderValue>) {
        let Some(uri) = value.and_then(|value| value.to_str().ok()?.parse::<Uri>().ok()) else { return };
        let asked = self.context.asked.get().map_or(&b""[..], HeaderValue::as_bytes);
        // With its scheme's own port or without it is the same host.
        let is = |authority: &str| {
            let named = without_port(authority.as_bytes());
            [self.host(), asked].iter().any(|host| named.eq_ignore_ascii_case(without_port(host)))
        };
        let here = uri.authority().is_none_or(|authority| is(authority.as_str()));
        if here && let Some(target) = uri.path_and_query().filter(|target| target.as_str().starts_with('/')) {
            self.cache.invalidate(self.host(), target.as_str().as_bytes());
        }
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        if self.armed {
            self.cache.invalidate(self.host(), target(&self.context).as_bytes());
        }
    }
}
