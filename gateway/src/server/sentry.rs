//! What watches over upstreams beside the workers: health checks, name lookups and keys, as the snapshot that runs wants them.
//!
//! A task lives as long as what it is about: an upstream that a reload leaves alone
//! keeps its own, an endpoint that is gone takes its own along.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::task::AbortHandle;

use crate::{
    auth::{Verifier, jwks},
    snapshot::Store,
    upstream::{
        Upstream,
        discovery::{Resolver, follow},
        endpoint::Endpoint,
        health,
    },
};

/// How often endpoints are looked at for new ones.
const LOOK: Duration = Duration::from_millis(100);

/// A task, and what it is about.
struct Watched {
    upstream: Arc<Upstream>,
    /// The endpoint that is checked; nothing where the upstream's name is followed.
    endpoint: Option<Arc<Endpoint>>,
    task: AbortHandle,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A verifier's keeper.
struct Keeper(Arc<Verifier>, AbortHandle);

impl Drop for Keeper {
    fn drop(&mut self) {
        self.1.abort();
        // Requests of an older snapshot may wait for it.
        self.0.close();
    }
}

/// Watches for ever.
pub(super) async fn watch(store: Arc<Store>) {
    let mut watched: Vec<Watched> = Vec::new();
    let mut resolver: Option<(Vec<SocketAddr>, Resolver)> = None;
    // Servers without which nothing can be looked up: said once.
    let mut without: Option<Vec<SocketAddr>> = None;
    let mut generation = 0;
    let mut keepers: Vec<Keeper> = Vec::new();
    loop {
        let snapshot = store.current();
        keepers.retain(|Keeper(known, _)| snapshot.verifiers.iter().any(|used| Arc::ptr_eq(used, known)));
        for verifier in &snapshot.verifiers {
            if !keepers.iter().any(|Keeper(known, _)| Arc::ptr_eq(known, verifier)) {
                let task = tokio::task::spawn_local(jwks::keep(verifier.clone())).abort_handle();
                keepers.push(Keeper(verifier.clone(), task));
            }
        }
        if generation != snapshot.generation {
            (generation, without) = (snapshot.generation, None);
        }
        watched.retain(|watched| {
            let upstream = &watched.upstream;
            snapshot.upstreams.iter().any(|known| Arc::ptr_eq(known, upstream))
                && watched
                    .endpoint
                    .as_ref()
                    .is_none_or(|endpoint| upstream.endpoints.load().iter().any(|known| Arc::ptr_eq(known, endpoint)))
        });
        if resolver.as_ref().is_some_and(|(servers, _)| *servers != snapshot.resolver) {
            resolver = None;
            watched.retain(|watched| watched.endpoint.is_some());
        }
        for upstream in &snapshot.upstreams {
            if upstream.discovery.is_some() && !watched.iter().any(|watched| is_about(watched, upstream, None)) {
                if without.as_ref() == Some(&snapshot.resolver) {
                    upstream.give_up_finding();
                } else if resolver.is_none() {
                    match Resolver::new(&snapshot.resolver) {
                        Ok(new) => resolver = Some((snapshot.resolver.clone(), new)),
                        Err(why) => {
                            tracing::error!(why, "cannot look up names; name a server with `resolver:`");
                            upstream.give_up_finding();
                            without = Some(snapshot.resolver.clone());
                        }
                    }
                }
                if let Some((_, resolver)) = &resolver {
                    let task = tokio::task::spawn_local(follow(upstream.clone(), resolver.clone())).abort_handle();
                    watched.push(Watched { upstream: upstream.clone(), endpoint: None, task });
                }
            }
            let Some(config) = &upstream.health else {
                // A check of before may have had its say since the new file was read.
                upstream.endpoints.load().iter().for_each(|endpoint| endpoint.vitals.absolve(false, true));
                continue;
            };
            for endpoint in upstream.endpoints.load().iter() {
                if !watched.iter().any(|watched| is_about(watched, upstream, Some(endpoint))) {
                    let check = health::check(upstream.clone(), endpoint.clone(), config.clone());
                    let task = tokio::task::spawn_local(check).abort_handle();
                    watched.push(Watched { upstream: upstream.clone(), endpoint: Some(endpoint.clone()), task });
                }
            }
        }
        let discovers = snapshot.upstreams.iter().any(|upstream| upstream.discovery.is_some());
        drop(snapshot);
        if discovers {
            let _ = tokio::time::timeout(LOOK, store.changed.notified()).await;
        } else {
            store.changed.notified().await;
        }
    }
}

fn is_about(watched: &Watched, upstream: &Arc<Upstream>, endpoint: Option<&Arc<Endpoint>>) -> bool {
    Arc::ptr_eq(&watched.upstream, upstream)
        && match (&watched.endpoint, endpoint) {
            (None, None) => true,
            (Some(known), Some(endpoint)) => Arc::ptr_eq(known, endpoint),
            _ => false,
        }
}
