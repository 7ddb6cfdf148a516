//! A running gateway, as commands talk to it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::Full;
use serde_json::Value;

use crate::{
    config,
    outbound::{Open, Outbound},
};

/// Which gateway.
#[derive(clap::Args)]
pub(super) struct Remote {
    /// The file that it runs: its `admin:` says where it listens, and its token.
    #[arg(long, default_value = "routes.yaml", value_name = "FILE")]
    config: PathBuf,
    /// The admin listener, in place of what the file says: an address or a URL. The token is in `GATEWAY_ADMIN_TOKEN`.
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<String>,
}

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(30);
/// What is read of it.
const ANSWER: usize = 64 * 1024 * 1024;

impl Remote {
    /// The file that it runs.
    pub(super) fn config(&self) -> &Path {
        &self.config
    }

    fn place(&self) -> anyhow::Result<(String, String)> {
        let token = std::env::var("GATEWAY_ADMIN_TOKEN").ok();
        let (address, known) = match &self.admin {
            Some(address) => (address.clone(), String::new()),
            None => config::admin_of(&self.config).with_context(|| {
                format!("cannot read `admin:` in `{}`; name the listener with `--admin ADDRESS`", self.config.display())
            })?,
        };
        // Whoever listens everywhere listens here.
        let address = address.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:");
        let base = if address.contains("://") { address } else { format!("http://{address}") };
        Ok((base.trim_end_matches('/').to_owned(), token.unwrap_or(known)))
    }

    fn request(&self, method: Method, path: &str, body: &Value) -> anyhow::Result<(Outbound, Request<Full<Bytes>>)> {
        let (base, token) = self.place()?;
        let (server, target) = Outbound::new(&format!("{base}{path}")).map_err(|why| anyhow!("`{base}`: {why}"))?;
        let mut request = Request::builder().method(method).uri(target).header("x-gateway-admin", "1");
        if !token.is_empty() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
        Ok((server, request.body(Full::new(body))?))
    }

    /// Calls, and reads the answer.
    pub(super) async fn call(&self, method: Method, path: &str, body: &Value) -> anyhow::Result<Value> {
        let (server, request) = self.request(method, path, body)?;
        let answer = server.send(request, LIMIT, ANSWER).await;
        let answer = answer.map_err(|why| anyhow!("the gateway does not answer: {why}"))?;
        let read: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
        if !answer.status().is_success() {
            bail!("{}", read["detail"].as_str().unwrap_or("the gateway refused it"));
        }
        Ok(read)
    }

    /// Calls, and gives back the answer while it comes.
    pub(super) async fn open(&self, path: &str) -> anyhow::Result<Open> {
        let (server, request) = self.request(Method::GET, path, &Value::Null)?;
        server.open(request).await.map_err(|why| anyhow!("the gateway does not answer: {why}"))
    }
}

/// Runs something to its end on a runtime of its own.
pub(super) fn block<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    use tokio::runtime::{Builder, LocalOptions};
    Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?.block_on(future)
}

/// A text as a part of a path or a query.
pub(super) fn encode(text: &str) -> String {
    let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if safe(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
