//! Clients that ask without a pause, while something happens to the gateway.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
};

use tokio::task::JoinHandle;

use crate::{
    client::{Client, request},
    until,
};

/// A running load.
pub struct Load {
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    clients: Vec<JoinHandle<()>>,
}

/// What the clients saw.
#[derive(Debug, Default)]
pub struct Counts {
    /// Answers below 400.
    pub good: AtomicUsize,
    /// `POST`s that were sent.
    pub posts: AtomicUsize,
    /// Everything else.
    pub failures: Mutex<Vec<String>>,
}

impl Load {
    /// Clients that ask for `target` on keep-alive connections; every fourth request is a `POST`.
    pub async fn start(address: SocketAddr, clients: usize, target: &'static str) -> Self {
        let this = Self { stop: Arc::default(), counts: Arc::default(), clients: Vec::new() };
        let run = |client: usize| {
            let (stop, counts) = (this.stop.clone(), this.counts.clone());
            tokio::spawn(async move {
                let mut connection = Client::new(address);
                for n in 0.. {
                    if stop.load(SeqCst) {
                        return;
                    }
                    let session = format!("session=s-{client}-{n}");
                    let (method, body) = if n % 4 == 0 { ("POST", "{}") } else { ("GET", "") };
                    if method == "POST" {
                        counts.posts.fetch_add(1, SeqCst);
                    }
                    match connection.send(request(method, target, &[("cookie", &session)], body)).await {
                        Ok(answer) if answer.status < 400 => {
                            counts.good.fetch_add(1, SeqCst);
                        }
                        Ok(answer) => {
                            counts.failures.lock().unwrap().push(format!(
                                "{method} {} {}",
                                answer.status,
                                answer.text()
                            ));
                        }
                        Err(error) => {
                            counts.failures.lock().unwrap().push(format!("{method} {error}"));
                            // Refused: the listener is closed. Once told is enough.
                            if stop.load(SeqCst) || address.port() == 0 {
                                return;
                            }
                        }
                    }
                }
            })
        };
        let clients = (0..clients).map(run).collect();
        let this = Self { clients, ..this };
        this.grow(50).await;
        this
    }

    /// Waits for so many more good answers.
    pub async fn grow(&self, more: usize) {
        let goal = self.counts.good.load(SeqCst) + more;
        until("the load goes on", || {
            let failed = !self.counts.failures.lock().unwrap().is_empty();
            std::future::ready(failed || self.counts.good.load(SeqCst) >= goal)
        })
        .await;
    }

    /// Asks the clients to stop after their present request.
    pub fn ask_to_stop(&self) {
        self.stop.store(true, SeqCst);
    }

    /// Stops the clients and shows what they saw.
    pub async fn stop(self) -> Arc<Counts> {
        self.ask_to_stop();
        for client in self.clients {
            client.await.unwrap();
        }
        self.counts
    }

    /// Stops the clients; none may have seen a failure.
    pub async fn stop_without_failures(self) -> Arc<Counts> {
        let counts = self.stop().await;
        let failures = counts.failures.lock().unwrap().clone();
        assert!(
            failures.is_empty(),
            "{} of {}: {:?}",
            failures.len(),
            counts.good.load(SeqCst),
            &failures[..failures.len().min(5)]
        );
        counts
    }
}
