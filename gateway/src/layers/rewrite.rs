//! Translates between what the client sees and what the upstream sees, both ways.
//!
//! Only services are rewritten for: the monolith always gets the request as it came.
//! Header edits are the route's, whoever answers.

use http::{HeaderMap, HeaderValue, Uri, header, uri::PathAndQuery};
use tower::Service;

use super::{Later, always_ready};
use crate::{
    config::file::HostRewrite,
    context::{Exchange, Request, Response},
    error::{Error, Kind},
    fields,
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
    /// Around what sends.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for Translate<S>
where
    S: Service<Request, Response = Response, Error = Error>,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Later;

    always_ready!();

    fn call(&mut self, mut request: Request) -> Later {
        let context = request.context.clone();
        let translated = translate_request(&mut request);
        let future = translated.map(|()| self.inner.call(request));
        Box::pin(async move {
            let mut response = future?.await?;
            translate_response(response.headers_mut(), &context);
            Ok(response)
        })
    }
}

/// The route's rewrite, unless the monolith is asked.
fn rewrite(context: &Exchange) -> Option<&Rewrite> {
    let is_monolith = context.upstream().is_none_or(|upstream| &*upstream.name == "legacy");
    context.route().rewrite.as_ref().filter(|_| !is_monolith)
}

fn translate_request(request: &mut Request) -> Result<(), Error> {
    let Request { http, context } = request;
    if let Some(rewrite) = rewrite(context) {
        if let Some(prefix) = &rewrite.prefix_header {
            strip_prefix(http, rewrite, context).map_err(Error::new)?;
            http.headers_mut().insert(fields::X_FORWARDED_PREFIX, prefix.clone());
        }
        if let (HostRewrite::Upstream, Some(upstream)) = (rewrite.host, context.upstream()) {
            http.headers_mut().insert(header::HOST, upstream.authority.clone());
        }
    }
    // An HTTP/1.0 client need not name a host; HTTP/1.1 must (RFC 9112 §3.2).
    if context.host.get().is_some_and(HeaderValue::is_empty)
        && let Some(upstream) = context.upstream()
    {
        http.headers_mut().insert(header::HOST, upstream.authority.clone());
    }
    context.route().edit_request.apply(http.headers_mut());
    Ok(())
}

fn strip_prefix<B>(request: &mut http::Request<B>, rewrite: &Rewrite, context: &Exchange) -> Result<(), Kind> {
    let uri = request.uri();
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
    *request.uri_mut() = Uri::from(target.map_err(|_| Kind::BadRequest("malformed request target"))?);
    Ok(())
}

fn translate_response(headers: &mut HeaderMap, context: &Exchange) {
    disguise(headers, context);
    context.route().edit_response.apply(headers);
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
