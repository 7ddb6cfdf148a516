//! Active health checks: each endpoint is asked for a path, again and again.
//!
//! They run beside the workers, on the control thread, one task an endpoint. Their
//! connections are their own: what is checked is that a new one gets an answer.

use std::{cell::RefCell, future::poll_fn, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, Method, Request, header};
use tokio::time::timeout;

use super::{
    Upstream,
    call::{Call, Wire},
    connect,
    endpoint::Endpoint,
};
use crate::{
    config::upstream::HealthConfig,
    http1::{
        outbox::Outbox,
        write::{self, Overrides},
    },
    resilience::millis,
};

/// Checks an endpoint for ever.
pub async fn check(upstream: Arc<Upstream>, endpoint: Arc<Endpoint>, config: HealthConfig) {
    let (mut good, mut bad) = (0, 0);
    // Not all of them at the same moment.
    let spread = endpoint.id.wrapping_mul(0x9E37_79B9_7F4A_7C15) % 1_000;
    let first =
        config.every.0.min(Duration::from_secs(1)).mul_f64(f64::from(u32::try_from(spread).unwrap_or(0)) / 1_000.0);
    tokio::time::sleep(first).await;
    loop {
        let told = match timeout(config.timeout.0, ask(&upstream, &endpoint, &config.path)).await {
            Ok(told) => told,
            Err(_) => Err(format!("no answer within {}", config.timeout)),
        };
        (good, bad) = if told.is_ok() { (good + 1, 0) } else { (0, bad + 1) };
        let now = millis(tokio::time::Instant::now());
        let (name, address) = (&*upstream.name, &*endpoint.name);
        if told.is_ok() && good >= config.healthy_after {
            // Envoy's `successful_active_health_check_uneject_host`.
            endpoint.vitals.pardon(now);
        }
        match told {
            Ok(()) if good >= config.healthy_after && endpoint.vitals.set_down(false, now) => {
                tracing::info!(upstream = name, endpoint = address, "an endpoint is healthy again");
            }
            Err(why) if bad >= config.unhealthy_after && endpoint.vitals.set_down(true, now) => {
                tracing::warn!(upstream = name, endpoint = address, why, "an endpoint is unhealthy");
            }
            Ok(()) | Err(_) => {}
        }
        tokio::time::sleep(config.every.0).await;
    }
}

async fn ask(upstream: &Upstream, endpoint: &Arc<Endpoint>, path: &str) -> Result<(), String> {
    let io = connect::connect(upstream, endpoint).await.map_err(|error| error.to_string())?;
    let mut request = Request::new(());
    *request.uri_mut() = path.parse().map_err(|_| "not a path".to_owned())?;
    let headers = request.headers_mut();
    headers.insert(header::HOST, endpoint.authority.clone());
    headers.insert(header::USER_AGENT, HeaderValue::from_static("gateway-health-check"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    let mut outbox = Outbox::default();
    write::request_head(outbox.flat(), &request.into_parts().0, &Overrides::default());
    let wire = Wire::new(io, endpoint.clone(), upstream.stats.clone());
    let call = RefCell::new(Call::new(wire, outbox, None, false, None));
    let nobody = |_, _: &HeaderMap| {};
    let head = poll_fn(|cx| call.borrow_mut().poll_head(cx, &Method::GET, &nobody)).await;
    match head {
        Ok(head) if head.status.is_success() || head.status.is_redirection() => Ok(()),
        Ok(head) => Err(format!("status {}", head.status.as_u16())),
        Err(failed) => Err(format!("{failed:?}")),
    }
}
