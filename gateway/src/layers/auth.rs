//! Checks who asks, before anything that is theirs is touched (RFC 6750).
//!
//! The route's verifier and those of its guards: a request that falls to a less specific rule meets the same
//! door. A preflight brings no token by design, and goes on without.

use std::{
    borrow::Cow,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use futures_util::future::Either;
use http::{HeaderMap, HeaderValue, header};
use tower::Service;

use super::{Later, always_ready};
use crate::{
    auth::{Refusal, Verifier, Waited, cors, memo::Memo},
    claims::Claims,
    context::{Exchange, Request, Response},
    error::{Error, Kind},
    snapshot::Auth,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Authenticate<S> {
    inner: S,
}

impl<S> Authenticate<S> {
    /// Around all that depends on who asks.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for Authenticate<S>
where
    S: Service<Request, Response = Response, Error = Error> + Clone + 'static,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Later>;

    always_ready!();

    fn call(&mut self, mut request: Request) -> Self::Future {
        let context = request.context.clone();
        let none =
            context.route().auth.is_none() && !context.guards.borrow().iter().any(|index| is_closed(&context, *index));
        // A method override makes it another request than a preflight is.
        let preflight = !context.overridden.get() && cors::preflight(&context.method, request.http.headers()).is_some();
        if none || preflight {
            // What it brings all the same was not looked at, and goes no further than what was.
            if context.route().auth.as_ref().is_some_and(|auth| !auth.forward_token) {
                request.http.headers_mut().remove(header::AUTHORIZATION);
            }
            return Either::Left(self.inner.call(request));
        }
        // With keys at hand nothing waits.
        match admit(&context, request.http.headers()) {
            Ok(claims) => {
                enter(&mut request, claims);
                Either::Left(self.inner.call(request))
            }
            Err((auth, refusal)) if matches!(refusal, Refusal::Invalid(_)) => {
                request.discard();
                Either::Right(Box::pin(std::future::ready(Err(refused(&context, auth, &refusal)))))
            }
            Err(first) => {
                let mut inner = self.inner.clone();
                Either::Right(Box::pin(async move {
                    let mut missing = first;
                    loop {
                        let (index, refusal) = missing;
                        let waited = match auth_of(&context, index) {
                            Some(auth) => auth.verifier.wait(&refusal).await,
                            None => Waited::Absent,
                        };
                        let refusal = if waited == Waited::Unavailable { Refusal::NoKeys } else { refusal };
                        if waited != Waited::Again {
                            request.discard();
                            return Err(refused(&context, index, &refusal));
                        }
                        match admit(&context, request.http.headers()) {
                            Ok(claims) => break enter(&mut request, claims),
                            Err((at, why)) if at == index && why == refusal => {
                                request.discard();
                                return Err(refused(&context, at, &why));
                            }
                            Err(next) => missing = next,
                        }
                    }
                    inner.call(request).await
                }))
            }
        }
    }
}

fn is_closed(context: &Exchange, route: usize) -> bool {
    context.snapshot().routes[route].auth.is_some()
}

fn auth_of(context: &Exchange, route: usize) -> Option<&Auth> {
    context.snapshot().routes[route].auth.as_ref()
}

/// Asks every verifier that has a say. What the route's own found, or else a guard's; or which route's refused, and why.
fn admit(context: &Exchange, headers: &HeaderMap) -> Result<Option<Rc<Claims>>, (usize, Refusal)> {
    let own = context.route.get();
    let guards = context.guards.borrow();
    let mut found = None;
    for index in guards.iter().copied().chain([own]) {
        let Some(auth) = auth_of(context, index) else { continue };
        let claims = verify(context, auth, headers).map_err(|refusal| (index, refusal))?;
        if auth.scopes.iter().any(|scope| !claims.has_scope(scope)) {
            return Err((index, Refusal::Invalid(SCOPE)));
        }
        if index == own || found.is_none() {
            found = Some(claims);
        }
    }
    Ok(found)
}

/// Not a word for clients: they are told the scopes.
const SCOPE: &str = "the token lacks a scope that is required here";
const NONE: &str = "send a token: `Authorization: Bearer …`";
const SEVERAL: &str = "several `Authorization` fields; send one";

fn verify(context: &Exchange, auth: &Auth, headers: &HeaderMap) -> Result<Rc<Claims>, Refusal> {
    let token = bearer(headers).map_err(Refusal::Invalid)?;
    let now = context.worker.unix_time();
    let key = Memo::key(&auth.verifier, token);
    if let Some(claims) = context.worker.memo.borrow_mut().get(&auth.verifier, &key, now) {
        return Ok(claims);
    }
    let verified = auth.verifier.verify(token, now)?;
    Ok(context.worker.memo.borrow_mut().put(key, verified, now))
}

/// The token (RFC 6750 §2.1). In a query or a form it is not looked for (RFC 6750 §5.3).
fn bearer(headers: &HeaderMap) -> Result<&[u8], &'static str> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter().map(HeaderValue::as_bytes);
    let (first, second) = (values.next(), values.next());
    if second.is_some() {
        return Err(SEVERAL);
    }
    let (scheme, token) = first.unwrap_or_default().split_at_checked(7).ok_or(NONE)?;
    if scheme.eq_ignore_ascii_case(b"bearer ") { Ok(token.trim_ascii()) } else { Err(NONE) }
}

/// Lets a request in: upstreams are told who asks, and not how that was found out.
fn enter(request: &mut Request, claims: Option<Rc<Claims>>) {
    let context = &request.context;
    let Some(claims) = claims else { return };
    if let Some(auth) = &context.route().auth {
        let headers = request.http.headers_mut();
        if !auth.forward_token {
            headers.remove(header::AUTHORIZATION);
        }
        for (claim, name) in &auth.forward {
            if let Some(value) = claims.field(claim) {
                headers.insert(name, value);
            }
        }
    }
    let _ = context.claims.set(claims);
}

/// The answer to whoever is not let in (RFC 6750 §3).
fn refused(context: &Exchange, route: usize, refusal: &Refusal) -> Error {
    let Some(auth) = auth_of(context, route) else { return Error::new(Kind::Internal) };
    context.route().stats.rare.unauthorized.fetch_add(1, Relaxed);
    let verifier: &Arc<Verifier> = &auth.verifier;
    let (kind, code, why): (_, _, Cow<'static, str>) = match refusal {
        Refusal::NoKeys => {
            let detail = format!("the keys of verifier `{}` cannot be had", verifier.name);
            return Error { detail, ..Error::new(Kind::NoKeys) };
        }
        Refusal::Invalid(NONE) => (Kind::Unauthorized, None, NONE.into()),
        Refusal::Invalid(SEVERAL) => (Kind::AmbiguousToken, Some("invalid_request"), SEVERAL.into()),
        Refusal::Invalid(SCOPE) => {
            let why = format!("the token needs the scope `{}`", auth.scopes.join(" "));
            (Kind::Forbidden, Some("insufficient_scope"), why.into())
        }
        Refusal::Invalid(why) => (Kind::Unauthorized, Some("invalid_token"), (*why).into()),
        Refusal::UnknownKey(id) if id.is_empty() => {
            (Kind::Unauthorized, Some("invalid_token"), "the token's signature does not fit".into())
        }
        Refusal::UnknownKey(_) => {
            (Kind::Unauthorized, Some("invalid_token"), "the token names a key that its issuer does not have".into())
        }
    };
    let mut challenge = format!("Bearer realm=\"{}\"", verifier.name);
    if let Some(code) = code {
        // Neither quotes nor backslashes are in these texts.
        challenge.push_str(&format!(", error=\"{code}\", error_description=\"{why}\""));
        if kind == Kind::Forbidden {
            challenge.push_str(&format!(", scope=\"{}\"", auth.scopes.join(" ")));
        }
    }
    let fields = HeaderValue::try_from(challenge).ok().map(|value| (header::WWW_AUTHENTICATE, value));
    Error { detail: why.into_owned(), fields: fields.into_iter().collect(), ..Error::new(kind) }
}
