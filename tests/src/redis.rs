//! A real Redis, which can be killed, paused and started again.

use std::process::Stdio;

use tokio::{
    net::TcpStream,
    process::{Child, Command},
};

use crate::until;

/// A running `redis-server`.
pub struct Redis {
    /// Its port on loopback.
    pub port: u16,
    process: Option<Child>,
}

impl Redis {
    /// Starts one that keeps nothing on disk.
    pub async fn start() -> Self {
        loop {
            // It cannot be told to choose: whoever takes the port in between makes it fail, and another is tried.
            let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let mut this = Self { port, process: None };
            if this.run().await {
                return this;
            }
        }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Starts it again on its port; whether it answers.
    pub async fn run(&mut self) -> bool {
        let port = self.port.to_string();
        let arguments = ["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
        let mut process = Command::new("redis-server")
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("redis-server is installed");
        let mut up = false;
        until("Redis is there, or has given up", async || {
            up = TcpStream::connect(("127.0.0.1", self.port)).await.is_ok();
            up || process.try_wait().unwrap().is_some()
        })
        .await;
        self.process = Some(process);
        up
    }

    /// Kills it.
    pub async fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().await.unwrap();
        }
    }

    /// Stops it in its tracks, or lets it go on: it takes connections, and says nothing.
    pub fn pause(&self, paused: bool) {
        let id = self.process.as_ref().and_then(Child::id).unwrap().to_string();
        let signal = if paused { "-STOP" } else { "-CONT" };
        assert!(std::process::Command::new("kill").args([signal, &id]).status().unwrap().success());
    }
}
