//! The gateway, nginx, HAProxy and Pingora at the same work, in turns.
//!
//! Each peer is one worker on one core; the origin (nginx) and the load share another.
//! What is counted is the CPU time of the peer's process over the requests that it
//! completed, not time on the wall. Peers take turns within each round, rounds in
//! which the machine was taken away are left out, and the lower quartile of the rest is told:
//! only ratios within one run mean anything. See docs/performance.md.
#![allow(clippy::doc_markdown, reason = "names of peers")]
#![allow(clippy::cast_precision_loss, reason = "counts of seconds")]

mod counts;
mod load;
mod peers;
mod report;
mod rollouts;

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail, ensure};
use clap::{Parser, Subcommand};

use crate::{
    load::{Plan, Shape},
    peers::{Peer, Peers},
    report::{Round, Table},
};

/// The gateway, nginx, HAProxy and Pingora at the same work.
#[derive(Parser)]
#[command(after_help = "Example:\n  cargo build --profile dist && cargo run --release -p bench -- compare --rounds 7")]
struct Arguments {
    /// The gateway's executable.
    #[arg(long, default_value = "target/dist/gateway", global = true)]
    gateway: PathBuf,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// CPU time a request, in turns with the peers that are installed.
    Compare {
        /// How often each peer has its turn at each case.
        #[arg(long, default_value_t = 7)]
        rounds: usize,
        /// How long a turn lasts, in seconds.
        #[arg(long, default_value_t = 1.0)]
        seconds: f64,
        /// Only cases with this in their name.
        #[arg(long, default_value = "")]
        only: String,
        /// Another build of the gateway to compare with.
        #[arg(long)]
        before: Option<PathBuf>,
        /// The built Pingora program.
        #[arg(long, default_value = "bench/pingora/target/release/bench-pingora")]
        pingora: PathBuf,
    },
    /// Instructions and system calls a request (valgrind and strace), which repeat exactly.
    Counts {
        /// What the gateway does for each request.
        #[arg(long, value_enum, default_value = "default")]
        layers: peers::Layers,
        /// Fails where there are more instructions than this.
        #[arg(long)]
        max_instructions: Option<u64>,
        /// Fails where there are more system calls than this.
        #[arg(long)]
        max_calls: Option<f64>,
    },
    /// Rollouts by the thousand, simulated: how many healthy ones are taken back, how soon bad ones are.
    Rollouts {
        /// How many healthy ones.
        #[arg(long, default_value_t = 10_000)]
        count: u64,
        /// The seed.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Memory of an idle keep-alive connection.
    Idle {
        /// How many connections.
        #[arg(long, default_value_t = 9_000)]
        clients: usize,
    },
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    raise_open_files()?;
    match arguments.what {
        What::Compare { rounds, seconds, only, before, pingora } => {
            let peers = Peers::start(&arguments.gateway, before.as_deref(), &pingora)?;
            compare(&peers, rounds, Duration::from_secs_f64(seconds), &only)
        }
        What::Counts { layers, max_instructions, max_calls } => {
            counts::run(&arguments.gateway, layers, max_instructions, max_calls)
        }
        What::Rollouts { count, seed } => {
            rollouts::run(&mut std::io::stdout(), count, seed)?;
            Ok(())
        }
        What::Idle { clients } => {
            let peers = Peers::start(&arguments.gateway, None, &PathBuf::new())?;
            idle(&peers, clients)
        }
    }
}

/// One line of the table.
struct Case {
    name: &'static str,
    plan: Plan,
    /// Peers that take part; all where it is empty.
    only: &'static [&'static str],
}

fn cases(turn: Duration) -> Vec<Case> {
    let get = |connections| Plan {
        connections,
        shape: Shape::Get("/a/1k"),
        rate: None,
        idle: 0,
        heavy: 0,
        turn,
        requests: None,
    };
    let all: &[&str] = &[];
    // HAProxy counts how many it can serve by its limit of files, and has no room for so many.
    let roomy: &[&str] = &["gateway", "gateway, before", "nginx, same work", "nginx, bare", "Pingora, bare"];
    let tables: &[&str] = &["gateway", "gateway, 10,000 routes"];
    let layers: &[&str] = &["gateway", "gateway, before", "gateway, resilience off", "gateway, resilience on"];
    vec![
        Case { name: "GET 1 KiB, 64 connections", plan: get(64), only: all },
        Case { name: "GET 1 KiB, 512 connections", plan: get(512), only: all },
        Case {
            name: "POST 10 KiB, 64 connections",
            plan: Plan { shape: Shape::Post("/a/1k", 10 * 1024), ..get(64) },
            only: all,
        },
        Case { name: "GET 100 KiB, 64 connections", plan: Plan { shape: Shape::Get("/a/100k"), ..get(64) }, only: all },
        Case { name: "GET 1 KiB, 64 connections, 10 and 10,000 routes", plan: get(64), only: tables },
        Case { name: "GET 1 KiB, 64 connections, resilience off and on", plan: get(64), only: layers },
        Case {
            name: "GET 1 KiB, 64 connections, telemetry",
            plan: get(64),
            only: &["gateway", "gateway, before", "gateway, telemetry off", "gateway, telemetry and 1 % traced"],
        },
        Case {
            name: "GET 1 KiB, 4,000 a second over 64 connections, scraped twice a second",
            plan: Plan { rate: Some(4000), ..get(64) },
            only: &["gateway, telemetry of 500 routes", "gateway, telemetry of 500 routes, scraped"],
        },
        Case {
            name: "GET 1 KiB that is kept, 64 connections",
            plan: Plan { shape: Shape::Kept("/a/1k"), ..get(64) },
            only: &["gateway, cache", "nginx, cache, same work", "nginx, cache, bare", "Varnish"],
        },
        Case {
            name: "GET 1 KiB with a token, 64 connections",
            plan: Plan { shape: Shape::Token("/a/1k"), ..get(64) },
            only: &["gateway", "gateway, JWT"],
        },
        Case {
            name: "GET that is refused, 64 connections",
            plan: Plan { shape: Shape::Refused("/a/1k"), ..get(64) },
            only: &["gateway, full"],
        },
        Case {
            name: "GET 1 KiB, 64 beside 10,000 idle connections",
            plan: Plan { idle: 10_000, ..get(64) },
            only: roomy,
        },
        Case { name: "GET 1 KiB, 2,000 connections", plan: get(2_000), only: all },
        Case {
            name: "GET 1 KiB, 4,000 a second over 64 connections",
            plan: Plan { rate: Some(4000), ..get(64) },
            only: all,
        },
        Case {
            name: "GET 1 KiB, 1,000 a second beside 8 endless downloads",
            plan: Plan { rate: Some(1000), heavy: 8, ..get(64) },
            only: all,
        },
    ]
}

fn compare(peers: &Peers, rounds: usize, turn: Duration, only: &str) -> anyhow::Result<()> {
    for case in cases(turn) {
        if !case.name.contains(only) {
            continue;
        }
        let taking: Vec<&Peer> = peers.all.iter().filter(|peer| takes_part(peer, case.only)).collect();
        let mut table = Table::new(case.name);
        for round in 0..rounds {
            for n in 0..taking.len() {
                // Nobody always comes after the same other.
                let peer = taking[(n + round) % taking.len()];
                let mut marks = Vec::new();
                let mut mark = || marks.push((peer.cpu().unwrap_or_default(), stolen().unwrap_or_default()));
                let scraping = peer.scraped.filter(|_| peer.name.ends_with("scraped")).map(Scraping::start);
                let told = load::run(peer.address, &case.plan, &mut mark)
                    .with_context(|| format!("{} at {}", peer.name, case.name))?;
                if let Some(scraping) = scraping {
                    scraping.stop()?;
                }
                let [(cpu, stolen), (cpu_then, stolen_then)] = marks[..] else { bail!("a turn without an end") };
                let (cpu, stolen) = (cpu_then.saturating_sub(cpu), stolen_then - stolen);
                ensure!(told.failures == 0, "{} at {}: {} failures", peer.name, case.name, told.failures);
                table.add(&peer.name, Round { cpu, told, stolen });
            }
        }
        table.print();
    }
    Ok(())
}

/// Reads the metrics of a gateway twice a second, as long as a turn lasts.
struct Scraping {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<(usize, usize)>>,
}

impl Scraping {
    fn start(address: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut scrapes, mut bytes) = (0, 0);
            while !stopped.load(Relaxed) {
                bytes = load::once(address, "/metrics")?;
                scrapes += 1;
                std::thread::sleep(Duration::from_millis(500));
            }
            Ok((scrapes, bytes))
        });
        Self { stop, thread }
    }

    fn stop(self) -> anyhow::Result<()> {
        self.stop.store(true, Relaxed);
        let (scrapes, bytes) = self.thread.join().map_err(|_| anyhow!("scraping panicked"))??;
        ensure!(scrapes > 0 && bytes > 100_000, "{scrapes} scrapes of {bytes} bytes");
        Ok(())
    }
}

fn takes_part(peer: &Peer, only: &[&str]) -> bool {
    // Some are for cases of their own.
    let own = ["routes", "resilience", "full", "cache", "JWT", "Varnish", "telemetry"]
        .iter()
        .any(|word| peer.name.contains(word));
    if only.is_empty() { !own } else { only.contains(&peer.name.as_str()) }
}

fn idle(peers: &Peers, clients: usize) -> anyhow::Result<()> {
    for peer in peers.all.iter().filter(|peer| takes_part(peer, &[])) {
        // The first are for what is made once.
        let first = load::idle(peer.address, 200)?;
        let before = peer.memory()?;
        let held = load::idle(peer.address, clients)?;
        let each = (peer.memory()?.saturating_sub(before)) / clients as u64;
        println!("{:24} {each:6} bytes a connection", peer.name);
        drop((first, held));
    }
    Ok(())
}

/// Ticks in which the machine was taken away from us.
fn stolen() -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let steal = stat.lines().next().and_then(|line| line.split_whitespace().nth(8));
    Ok(steal.and_then(|steal| steal.parse().ok()).unwrap_or(0))
}

/// Ten thousand clients are ten thousand files.
fn raise_open_files() -> anyhow::Result<()> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    Ok(())
}
