//! The processes of the demo and the file that they read.

use std::{net::SocketAddr, path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::TcpStream,
    process::{Child, Command},
    time::{Instant, sleep},
};

/// The runnable example: the demo reads the same file as a newcomer.
const EXAMPLE: &str = include_str!("../../../../routes.yaml");
/// How long any wait of the demo may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long evidence may take, on a slow machine.
const EVIDENCE: Duration = Duration::from_mins(3);
/// How often it looks.
const LOOK: Duration = Duration::from_millis(5);

/// A monolith or a service.
pub(super) struct Origin {
    pub(super) address: SocketAddr,
    /// Its standard input is ours: it ends with us.
    _process: Child,
}

/// Everything that the demo brought up.
pub(super) struct Stage {
    pub(super) public: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) file: PathBuf,
    pub(super) origins: Vec<(&'static str, Origin)>,
    gateway: Child,
    _folder: tempfile::TempDir,
}

impl Stage {
    /// Starts all on free ports.
    pub(super) async fn set() -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("gateway-demo-").tempdir()?;
        let file = folder.path().join("routes.yaml");
        std::fs::write(&file, EXAMPLE)?;
        let mut origins = Vec::new();
        for (name, part) in [("legacy", "monolith"), ("products", "products"), ("orders", "orders")] {
            let mut process = this_program()?
                .args(["stub", "--follow-stdin", "--listen", "127.0.0.1:0", "--play", part])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .kill_on_drop(true)
                .spawn()?;
            let stdout = process.stdout.take().context("no standard output")?;
            let mut first = String::new();
            BufReader::new(stdout).read_line(&mut first).await?;
            let address = first.trim().rsplit(' ').next().unwrap_or_default().parse();
            let address = address.with_context(|| format!("the {part} did not start: {first:?}"))?;
            origins.push((name, Origin { address, _process: process }));
        }
        let mut command = this_program()?;
        command.arg("run").arg("--follow-stdin").arg(&file).env("LISTEN", "127.0.0.1:0").env("ADMIN", "127.0.0.1:0");
        for (name, origin) in &origins {
            command.env(format!("{}_URL", name.to_uppercase()), format!("http://{}", origin.address));
        }
        let mut gateway = command
            .env_remove("RUST_LOG")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut log = BufReader::new(gateway.stderr.take().context("no standard error")?).lines();
        let mut said = String::new();
        let (public, admin) = loop {
            let Some(line) = log.next_line().await? else { bail!("the gateway did not start:\n{said}") };
            let field = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name)?.parse().ok());
            if let (Some(public), Some(admin)) = (field("public="), field("admin=")) {
                break (public, admin);
            }
            said.push_str(&line);
            said.push('\n');
        };
        // What it says from now on is told from its status.
        tokio::task::spawn_local(async move { while let Ok(Some(_)) = log.next_line().await {} });
        Ok(Self { public, admin, file, origins, gateway, _folder: folder })
    }

    /// Saves the file with another stage for `orders`, and what is said of it beside that; waits until it runs.
    pub(super) async fn write(&self, stage: &str, more: &str) -> anyhow::Result<()> {
        let before = self.config().await?["generation"].as_u64();
        let now = std::fs::read_to_string(&self.file)?;
        let end = EXAMPLE.find("    canary:\n").context("the example has no canary")?;
        let example = EXAMPLE[..end].replace("stage: legacy", &format!("stage: {stage}"));
        let more: String = more.lines().map(|line| format!("    {line}\n")).collect();
        let text = format!("{example}{more}");
        self.save(&text)?;
        if text == now {
            return Ok(());
        }
        self.until(|config| config["current"] == true && config["generation"].as_u64() != before).await.map(drop)
    }

    /// Saves a file with a mistake and waits for the refusal.
    pub(super) async fn write_bad(&self) -> anyhow::Result<String> {
        let text = std::fs::read_to_string(&self.file)?;
        self.save(&text.replace("percent:", "percnt:"))?;
        let config = self.until(|config| config["current"] == false).await?;
        self.save(&text)?;
        self.until(|config| config["current"] == true).await?;
        Ok(config["error"].as_str().unwrap_or_default().to_owned())
    }

    /// As editors do: a new file takes the old one's name.
    fn save(&self, text: &str) -> anyhow::Result<()> {
        let new = self.file.with_extension("new");
        std::fs::write(&new, text)?;
        std::fs::rename(new, &self.file)?;
        Ok(())
    }

    async fn config(&self) -> anyhow::Result<serde_json::Value> {
        Ok(get(self.admin, "/api/status").await?["config"].take())
    }

    async fn until(&self, holds: impl Fn(&serde_json::Value) -> bool) -> anyhow::Result<serde_json::Value> {
        let start = Instant::now();
        loop {
            let config = self.config().await?;
            if holds(&config) {
                return Ok(config);
            }
            if start.elapsed() > PATIENCE {
                bail!("the gateway did not take up the file: {config:#}");
            }
            sleep(LOOK).await;
        }
    }

    /// What an admin call answers.
    pub(super) async fn api(&self, path: &str) -> anyhow::Result<serde_json::Value> {
        get(self.admin, path).await
    }

    /// Says something about a route by hand.
    pub(super) async fn wish(&self, route: &str, word: &str, why: &str) -> anyhow::Result<()> {
        let body = serde_json::json!({"who": "the demo", "why": why}).to_string();
        let path = format!("/api/routes/{route}/{word}");
        let told = ask(self.admin, http::Method::POST, &path, body).await?;
        anyhow::ensure!(told["result"].is_string(), "the gateway refused `{word}`: {told}");
        Ok(())
    }

    /// Gives the orders service a defect, or takes it away.
    pub(super) async fn spoil(&self, defects: &str) -> anyhow::Result<()> {
        let found = self.origins.iter().find(|(name, _)| *name == "orders").context("unknown origin")?;
        ask(found.1.address, http::Method::PUT, "/_stub/defects", defects.to_owned()).await.map(drop)
    }

    /// Waits until something holds of what a route is told to do.
    pub(super) async fn route(
        &self,
        what: &str,
        holds: impl Fn(&serde_json::Value) -> bool,
    ) -> anyhow::Result<serde_json::Value> {
        let start = Instant::now();
        loop {
            let route = self.api("/api/routes/orders").await?;
            if holds(&route) {
                return Ok(route);
            }
            if start.elapsed() > EVIDENCE {
                bail!("waited in vain until {what}: {route:#}");
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Requests that an origin got for an endpoint.
    pub(super) async fn count(&self, origin: &str, endpoint: &str) -> anyhow::Result<u64> {
        let counts = self.counts(origin).await?;
        let of = |method: &str| counts[format!("{method} {endpoint}")].as_u64().unwrap_or(0);
        Ok(of("GET") + of("POST"))
    }

    /// Orders that an origin was asked to place.
    pub(super) async fn posts(&self, origin: &str) -> anyhow::Result<u64> {
        Ok(self.counts(origin).await?["POST orders"].as_u64().unwrap_or(0))
    }

    async fn counts(&self, origin: &str) -> anyhow::Result<serde_json::Value> {
        let found = self.origins.iter().find(|(name, _)| *name == origin).context("unknown origin")?;
        get(found.1.address, "/_stub/counts").await
    }

    /// Ends the gateway as an operator would; the origins end with their standard input.
    pub(super) async fn strike(mut self) {
        drop(self.gateway.stdin.take());
        let _ = tokio::time::timeout(PATIENCE, self.gateway.wait()).await;
    }
}

fn this_program() -> anyhow::Result<Command> {
    Ok(Command::new(std::env::current_exe()?))
}

async fn get(address: SocketAddr, path: &str) -> anyhow::Result<serde_json::Value> {
    ask(address, http::Method::GET, path, String::new()).await
}

/// Asks once, over a connection of its own.
async fn ask(address: SocketAddr, method: http::Method, path: &str, body: String) -> anyhow::Result<serde_json::Value> {
    let tcp = TcpStream::connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(tcp)).await?;
    let driver = tokio::task::spawn_local(connection);
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header("host", address.to_string())
        .header("x-gateway-admin", "1")
        .body(Full::new(bytes::Bytes::from(body)))?;
    let body = sender.send_request(request).await?.into_body().collect().await?.to_bytes();
    driver.abort();
    Ok(serde_json::from_slice(&body)?)
}
