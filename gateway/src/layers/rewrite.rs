//! Translates between what the client sees and what the upstream sees, both ways.
//!
//! Only services are rewritten for: the monolith always gets the request as it came. So
//! what differs is said beside the request, not in it: a fallback sends the original.

use http::{HeaderMap, HeaderValue, header, uri::PathAndQuery};
use tower::Service;

use super::{Later, always_ready};
use crate::{
    config::file::HostRewrite,
    context::{Exchange, Leg, Response},
    error::{Error, Kind},
    routing::path,
    snapshot::Rewrite,
    upstream::rewrite::View,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Translate<S> {
    inner: S,
}

impl<S> Translate<S> {
    /// Around what sends to one upstream.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Leg> for Translate<S>
where
    S: Service<std::rc::Rc<Leg>, Response = Response, Error = Error>,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Later;

    always_ready!();

    fn call(&mut self, mut leg: Leg) -> Later {
        let context = leg.context.clone();
        let translated = translate_request(&mut leg);
        let future = translated.map(|()| self.inner.call(std::rc::Rc::new(leg)));
        Box::pin(async move {
            let mut response = future?.await?;
            disguise(response.headers_mut(), &context);
            Ok(response)
        })
    }
}

/// The route's rewrite, unless the monolith is asked.
fn rewrite(context: &Exchange) -> Option<&Rewrite> {
    let is_monolith = context.upstream().is_none_or(|upstream| &*upstream.name == "legacy");
    context.route().rewrite.as_ref().filter(|_| !is_monolith)
}

fn translate_request(leg: &mut Leg) -> Result<(), Error> {
    let Leg { context, way, .. } = leg;
    if let Some(rewrite) = rewrite(context) {
        if rewrite.prefix_text.is_some() {
            way.overrides.target = Some(strip_prefix(rewrite, context).map_err(Error::new)?);
            way.overrides.prefix.clone_from(&rewrite.prefix_header);
        }
        way.own_host = rewrite.host == HostRewrite::Upstream;
    }
    // An HTTP/1.0 client need not name a host; HTTP/1.1 must (RFC 9112 §3.2).
    if context.host.get().is_some_and(HeaderValue::is_empty) {
        way.own_host = true;
    }
    Ok(())
}

fn strip_prefix(rewrite: &Rewrite, context: &Exchange) -> Result<PathAndQuery, Kind> {
    let uri = &context.parts.get().ok_or(Kind::Internal)?.uri;
    let Some(rest) = path::strip_prefix(uri.path(), &rewrite.prefix, context.snapshot().paths) else {
        // The route matched, so only an encoded separator can hide the prefix.
        return Err(Kind::BadRequest(
            "an encoded separator in the part of the path that the route strips; send it as `/`",
        ));
    };
    let target = match uri.query() {
        Some(query) => PathAndQuery::try_from(format!("{rest}?{query}")),
        None => PathAndQuery::try_from(rest),
    };
    target.map_err(|_| Kind::BadRequest("malformed request target"))
}

fn view(context: &Exchange) -> Option<View<'_>> {
    Some(View {
        upstream: context.upstream()?,
        addresses: &context.snapshot().addresses,
        scheme: if context.https.get() { "https" } else { "http" },
        host: context.asked.get()?.to_str().ok()?,
        prefix: rewrite(context).and_then(|rewrite| rewrite.prefix_text.as_deref()),
    })
}

/// Takes the upstream's own address out of the fields that clients follow.
fn disguise(headers: &mut HeaderMap, context: &Exchange) {
    // One pass finds out that there is nothing to do, as in nearly every answer.
    let mut cookies = false;
    for (name, value) in headers.iter_mut() {
        if *name == header::LOCATION || *name == header::CONTENT_LOCATION {
            let text = value.to_str().ok();
            let changed = text.and_then(|text| view(context)?.location(text)).map(HeaderValue::try_from);
            if let Some(Ok(changed)) = changed {
                *value = changed;
            }
        } else if *name == header::SET_COOKIE {
            cookies = true;
        }
    }
    let (true, Some(view)) = (cookies, view(context)) else { return };
    if let header::Entry::Occupied(mut entry) = headers.entry(header::SET_COOKIE) {
        for value in entry.iter_mut() {
            let changed = value.to_str().ok().and_then(|text| view.set_cookie(text)).map(HeaderValue::try_from);
            if let Some(Ok(changed)) = changed {
                *value = changed;
            }
        }
    }
}
