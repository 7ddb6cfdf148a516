//! A name server that answers what it is told (RFC 1035), for names of which only a test knows.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use tokio::net::UdpSocket;

/// What a name has.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Addresses.
    A(Vec<Ipv4Addr>),
    /// Services: priority, port, target.
    Srv(Vec<(u16, u16, String)>),
    /// The server fails.
    Failure,
}

/// A running name server.
pub struct Dns {
    /// Where it listens.
    pub address: SocketAddr,
    answers: Arc<Mutex<HashMap<String, Answer>>>,
    /// Queries that it got.
    pub queries: Arc<AtomicUsize>,
}

impl Dns {
    /// A server whose answers are good for so many seconds.
    pub async fn start(ttl: u32) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let this = Self { address: socket.local_addr().unwrap(), answers: Arc::default(), queries: Arc::default() };
        let (answers, queries) = (this.answers.clone(), this.queries.clone());
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            while let Ok((count, from)) = socket.recv_from(&mut buffer).await {
                queries.fetch_add(1, SeqCst);
                let reply = answer(&buffer[..count], &answers.lock().unwrap(), ttl);
                let _ = socket.send_to(&reply, from).await;
            }
        });
        this
    }

    /// What a name has from now on.
    pub fn set(&self, name: &str, answer: Answer) {
        self.answers.lock().unwrap().insert(name.to_owned(), answer);
    }
}

fn encode(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for label in name.trim_end_matches('.').split('.') {
        out.push(u8::try_from(label.len()).unwrap());
        out.extend_from_slice(label.as_bytes());
    }
    out.push(0);
    out
}

fn answer(query: &[u8], answers: &HashMap<String, Answer>, ttl: u32) -> Vec<u8> {
    let mut at = 12;
    let mut labels = Vec::new();
    while query[at] != 0 {
        let length = usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..=at + length]).to_lowercase());
        at += length + 1;
    }
    let kind = u16::from_be_bytes([query[at + 1], query[at + 2]]);
    let question = &query[12..at + 5];
    let known = answers.get(&labels.join("."));
    let records: Vec<(u16, Vec<u8>)> = match known {
        Some(Answer::A(addresses)) if kind == 1 => {
            addresses.iter().map(|address| (1, address.octets().to_vec())).collect()
        }
        Some(Answer::Srv(services)) if kind == 33 => services
            .iter()
            .map(|(priority, port, target)| {
                let numbers = [*priority, 1, *port].map(u16::to_be_bytes).concat();
                (33, [numbers, encode(target)].concat())
            })
            .collect(),
        _ => Vec::new(),
    };
    let code = match known {
        None => 3,
        Some(Answer::Failure) => 2,
        Some(_) => 0,
    };
    let count = u16::try_from(records.len()).unwrap().to_be_bytes();
    let mut out = [&query[..2], &[0x84, code, 0, 1], &count, &[0, 0, 0, 0], question].concat();
    for (kind, data) in records {
        out.extend_from_slice(&[0xc0, 12]);
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&[0, 1]);
        out.extend_from_slice(&ttl.to_be_bytes());
        out.extend_from_slice(&u16::try_from(data.len()).unwrap().to_be_bytes());
        out.extend_from_slice(&data);
    }
    out
}
