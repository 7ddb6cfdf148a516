//! Tells others what happens, and asks them whether it may: signed `POST`s of JSON, as Standard Webhooks has them.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{Request, header};
use http_body_util::Full;
use jiff::Timestamp;
use tokio::sync::{Semaphore, mpsc};

use super::controller::Rollouts;
use crate::{config::rollout::WebhookConfig, outbound::Outbound, snapshot::Store};

/// Something to tell or to ask.
#[derive(Debug)]
pub enum Message {
    /// A change that has taken effect, for all.
    Event {
        /// Its number in the history.
        id: u64,
        /// When it happened.
        at: Timestamp,
        /// The JSON.
        body: String,
    },
    /// Whether a rollout may go on.
    Question {
        /// Who is asked.
        webhook: WebhookConfig,
        /// The route.
        route: String,
        /// The question's number.
        number: u64,
        /// The JSON.
        body: String,
    },
}

/// Messages on their way at a time.
const FLYING: usize = 32;
/// Tries of one message; the pauses between them double from a second.
const TRIES: u32 = 6;
/// What is read of an answer.
const ANSWER: usize = 64 * 1024;

/// Delivers what there is to tell, for ever.
pub async fn deliver(store: Arc<Store>, rollouts: Arc<Rollouts>, mut messages: mpsc::Receiver<Message>) {
    let places = Arc::new(Semaphore::new(FLYING));
    while let Some(message) = messages.recv().await {
        match message {
            Message::Event { id, at, body } => {
                for webhook in store.current().webhooks.clone() {
                    let Ok(place) = places.clone().acquire_owned().await else { return };
                    let body = body.clone();
                    let name = format!("{:08x}-{id}-{}", store.process.id, at.as_millisecond());
                    tokio::task::spawn_local(async move {
                        tell(&webhook, &name, &body).await;
                        drop(place);
                    });
                }
            }
            Message::Question { webhook, route, number, body } => {
                let Ok(place) = places.clone().acquire_owned().await else { return };
                let rollouts = rollouts.clone();
                tokio::task::spawn_local(async move {
                    let name = format!("gate-{number}-{}", Timestamp::now().as_millisecond());
                    rollouts.answer(route, number, post(&webhook, &name, &body).await);
                    drop(place);
                });
            }
        }
    }
}

/// Tells one, again where it fails: each time with the same id.
async fn tell(webhook: &WebhookConfig, id: &str, body: &str) {
    for n in 0..TRIES {
        match post(webhook, id, body).await {
            Ok(()) => return,
            Err(why) if n + 1 < TRIES => {
                tracing::warn!(url = webhook.url, why, "a webhook was not told; trying again");
                tokio::time::sleep(Duration::from_secs(1 << n)).await;
            }
            Err(why) => tracing::error!(url = webhook.url, why, id, "a webhook was not told; giving up"),
        }
    }
}

async fn post(webhook: &WebhookConfig, id: &str, body: &str) -> Result<(), String> {
    let (server, target) = Outbound::new(&webhook.url)?;
    let timestamp = Timestamp::now().as_second();
    let mut request = Request::post(target)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::USER_AGENT, "gateway-webhook")
        .header("webhook-id", id)
        .header("webhook-timestamp", timestamp.to_string());
    if let Some(key) = webhook.secret.as_deref().and_then(key) {
        request = request.header("webhook-signature", sign(&key, id, timestamp, body));
    }
    let request =
        request.body(Full::new(Bytes::copy_from_slice(body.as_bytes()))).map_err(|error| error.to_string())?;
    let answer = server.send(request, webhook.timeout.0, ANSWER).await?;
    let status = answer.status();
    if status.is_success() { Ok(()) } else { Err(format!("status {}", status.as_u16())) }
}

/// The key that a secret stands for: itself, or what follows `whsec_` in base64.
pub fn key(secret: &str) -> Option<Vec<u8>> {
    match secret.strip_prefix("whsec_") {
        Some(encoded) => STANDARD.decode(encoded).ok().filter(|key| !key.is_empty()),
        None => (!secret.is_empty()).then(|| secret.as_bytes().to_vec()),
    }
}

/// `webhook-signature` of a message.
pub fn sign(key: &[u8], id: &str, timestamp: i64, body: &str) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let tag = hmac::sign(&key, format!("{id}.{timestamp}.{body}").as_bytes());
    format!("v1,{}", STANDARD.encode(tag.as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification (standard-webhooks, spec/standard-webhooks.md).
    #[test]
    fn a_signature_is_as_the_specification_has_it() {
        let key = key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let body = r#"{"test": 2432232314}"#;
        let signature = sign(&key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, body);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        assert_eq!(super::key("whsec_!"), None);
        assert_eq!(super::key(""), None);
    }
}
