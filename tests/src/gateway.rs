//! The real executable on a file of its own.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, OnceLock},
};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, Command},
};

use crate::{PATIENCE, client, until};

/// The executable, as `cargo test --workspace` built it; built here where it is missing. `GATEWAY` names another.
pub fn executable() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        // Another build of it, where a test is to see what that one does.
        if let Some(path) = std::env::var_os("GATEWAY") {
            return path.into();
        }
        // target/PROFILE/deps/it-HASH
        let profile = std::env::current_exe().unwrap().parent().and_then(Path::parent).unwrap().to_owned();
        let path = profile.join("gateway");
        if !path.exists() {
            let built = std::process::Command::new("cargo").args(["build", "--workspace", "--bins"]).status();
            assert!(built.is_ok_and(|status| status.success()), "cannot build the gateway");
        }
        path
    })
}

/// Runs a command of the executable to its end.
pub async fn run(arguments: &[&str]) -> (i32, String, String) {
    let output =
        Command::new(executable()).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output().await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// A running gateway.
pub struct Gateway {
    /// Where clients connect.
    pub address: SocketAddr,
    /// The admin listener.
    pub admin: SocketAddr,
    /// The probes' listener.
    pub health: Option<SocketAddr>,
    /// The file that it reads.
    pub file: PathBuf,
    /// Its process.
    pub process: Child,
    log: Arc<Mutex<String>>,
    access: Arc<Mutex<String>>,
    /// Deleted with the gateway.
    folder: Option<tempfile::TempDir>,
}

impl Gateway {
    /// Starts on a file with this text; `listen` and `admin` are put before it.
    pub async fn start(yaml: &str) -> Self {
        let folder = crate::folder();
        let file = folder.path().join("routes.yaml");
        std::fs::write(&file, Self::whole(yaml)).unwrap();
        let mut this = Self::start_on(&file, &[]).await;
        this.folder = Some(folder);
        this
    }

    /// A text with listeners on free ports, unless it has its own.
    pub fn whole(yaml: &str) -> String {
        let own = |key: &str| yaml.lines().any(|line| line.starts_with(key));
        let listen = if own("listen:") { "" } else { "listen: 127.0.0.1:0\n" };
        let admin = if own("admin:") { "" } else { "admin: 127.0.0.1:0\n" };
        format!("{listen}{admin}{yaml}")
    }

    /// Starts on a file that is there.
    pub async fn start_on(file: &Path, arguments: &[&str]) -> Self {
        Self::start_under(&[], file, arguments).await
    }

    /// The same by way of another command, which runs it in its own place.
    pub async fn start_under(command: &[&str], file: &Path, arguments: &[&str]) -> Self {
        let mut words: Vec<std::ffi::OsString> = command.iter().map(Into::into).collect();
        words.push(executable().into());
        let mut process = Command::new(&words[0])
            .args(&words[1..])
            .arg("run")
            .arg(file)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let log = collect(process.stderr.take().unwrap());
        let access = collect(process.stdout.take().unwrap());
        let mut this = Self {
            address: ([0, 0, 0, 0], 0).into(),
            admin: ([0, 0, 0, 0], 0).into(),
            health: None,
            file: file.to_owned(),
            process,
            log,
            access,
            folder: None,
        };
        let line = this.log_line("listening public=").await;
        let field = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name)?.parse().ok());
        this.address = field("public=").unwrap();
        this.admin = field("admin=").unwrap();
        this.health = field("health=");
        this
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits for a line of the log.
    pub async fn log_line(&self, with: &str) -> String {
        let find = || self.log().lines().find(|line| line.contains(with)).map(str::to_owned);
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                if let Some(line) = find() {
                    return line;
                }
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        });
        found.await.unwrap_or_else(|_| panic!("no line with {with:?} in\n{}", self.log()))
    }

    /// The lines of the access log so far.
    pub fn access(&self) -> Vec<Value> {
        let text = self.access.lock().unwrap().clone();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}"))).collect()
    }

    /// Waits until the access log has a line that holds.
    pub async fn access_line(&self, holds: impl Fn(&Value) -> bool) -> Value {
        let mut found = Value::Null;
        until("the access log has the line", || {
            found = self.access().into_iter().find(|line| holds(line)).unwrap_or_default();
            std::future::ready(!found.is_null())
        })
        .await;
        found
    }

    /// `GET` of an admin path, as JSON.
    pub async fn api(&self, path: &str) -> Value {
        let answer = client::get(self.admin, path).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        serde_json::from_slice(&answer.body).unwrap()
    }

    /// What `/api/status` says of the file.
    pub async fn config(&self) -> Value {
        self.api("/api/status").await["config"].take()
    }

    /// The generation that runs.
    pub async fn generation(&self) -> u64 {
        self.config().await["generation"].as_u64().unwrap()
    }

    /// Writes the file as editors do: a new file takes the old one's name. Waits for nothing.
    pub fn save(&self, yaml: &str) {
        self.put(&Self::whole(yaml));
    }

    /// The same for a text as it is. In place, the gateway might read it half written, and say so.
    pub fn put(&self, text: &str) {
        let new = self.file.with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, &self.file).unwrap();
    }

    /// Saves a good file and waits until it runs.
    pub async fn flip(&self, yaml: &str) {
        let before = self.generation().await;
        self.save(yaml);
        until("the new file runs", async || {
            let config = self.config().await;
            assert!(config["current"] == true, "{}", config["error"].as_str().unwrap_or_default());
            config["generation"].as_u64() > Some(before)
        })
        .await;
    }

    /// Saves a bad file and waits for the refusal.
    pub async fn refuse(&self, text: &str) -> String {
        self.put(text);
        let mut told = Value::Null;
        until("the file is refused", async || {
            told = self.config().await;
            told["current"] == false
        })
        .await;
        told["error"].as_str().unwrap().to_owned()
    }

    /// A number of the metrics page.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let page = client::get(self.admin, "/metrics").await.text();
        page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    /// Sends a signal.
    pub fn signal(&self, name: &str) {
        let id = self.process.id().expect("it runs").to_string();
        let sent = std::process::Command::new("kill").args([&format!("-{name}"), &id]).status();
        assert!(sent.is_ok_and(|status| status.success()));
    }

    /// Waits for its end.
    pub async fn end(&mut self) -> ExitStatus {
        tokio::time::timeout(PATIENCE, self.process.wait()).await.expect("it ends").unwrap()
    }
}

fn collect(pipe: impl AsyncRead + Unpin + Send + 'static) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let collected = text.clone();
    tokio::spawn(async move {
        let mut lines = BufReader::new(pipe).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let mut text = collected.lock().unwrap();
            text.push_str(&line);
            text.push('\n');
        }
    });
    text
}
