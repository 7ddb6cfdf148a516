//! What repeats exactly: instructions in user space, and system calls, of one request.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};

use crate::{
    load::{self, Plan, Shape},
    peers::{self, Layers, Origin, free, silent, wait},
};

/// Requests of the shorter and the longer run; the difference is what requests cost, without what starting does.
const RUNS: (u64, u64) = (2_000, 10_000);

/// Counts both, and fails where there are more than allowed.
pub(crate) fn run(
    gateway: &Path,
    layers: Layers,
    max_instructions: Option<u64>,
    max_calls: Option<f64>,
) -> anyhow::Result<()> {
    ensure!(gateway.exists(), "{} is not there; `cargo build --profile dist`", gateway.display());
    println!("{}", peers::shown(gateway).display());
    let origin = Origin::start()?;
    let instructions = instructions(gateway, &origin, layers)?;
    println!("instructions a request, in user space: {instructions}");
    let calls = calls(gateway, &origin, layers)?;
    println!("system calls a request: {calls:.2}");
    if let Some(max) = max_instructions {
        ensure!(instructions <= max, "more than {max} instructions a request: {instructions}");
    }
    if let Some(max) = max_calls {
        ensure!(calls <= max, "more than {max} system calls a request: {calls:.2}");
    }
    Ok(())
}

fn instructions(gateway: &Path, origin: &Origin, layers: Layers) -> anyhow::Result<u64> {
    let count = |requests: u64| -> anyhow::Result<u64> {
        let out = origin.folder.path().join(format!("callgrind.{requests}"));
        let tool =
            ["valgrind".to_owned(), "--tool=callgrind".to_owned(), format!("--callgrind-out-file={}", out.display())];
        under(&tool, gateway, origin, layers, requests, 8)?;
        let text = std::fs::read_to_string(&out).context("valgrind wrote nothing")?;
        let line = text.lines().find_map(|line| line.strip_prefix("summary: ").or(line.strip_prefix("totals: ")));
        Ok(line.context("no summary")?.trim().parse()?)
    };
    Ok((count(RUNS.1)? - count(RUNS.0)?) / (RUNS.1 - RUNS.0))
}

fn calls(gateway: &Path, origin: &Origin, layers: Layers) -> anyhow::Result<f64> {
    let count = |requests: u64| -> anyhow::Result<u64> {
        let out = origin.folder.path().join(format!("strace.{requests}"));
        let tool = ["strace", "-f", "-c", "-o", &out.display().to_string()].map(str::to_owned);
        under(&tool, gateway, origin, layers, requests, 64)?;
        let text = std::fs::read_to_string(&out).context("strace wrote nothing")?;
        let total = text.lines().find(|line| line.trim_end().ends_with("total")).context("no total")?;
        // `100.00    0.956381          66     14374         1 total`; errors may be missing.
        Ok(total.split_whitespace().nth(3).context("no calls")?.parse()?)
    };
    #[allow(clippy::cast_precision_loss, reason = "a few thousand")]
    Ok((count(RUNS.1)? - count(RUNS.0)?) as f64 / (RUNS.1 - RUNS.0) as f64)
}

/// Runs the gateway under a tool while so many requests are sent over so many connections.
fn under(
    tool: &[String],
    gateway: &Path,
    origin: &Origin,
    layers: Layers,
    requests: u64,
    connections: usize,
) -> anyhow::Result<()> {
    let (listen, admin): (SocketAddr, SocketAddr) = (free()?, free()?);
    let file = origin.folder.path().join("counts.yaml");
    let upstream = if layers == Layers::Shed { silent()? } else { origin.address };
    std::fs::write(&file, peers::routes(listen, admin, upstream, 10, layers))?;
    let mut process = Command::new(&tool[0])
        .args(&tool[1..])
        .arg(gateway)
        .args(["run", "--workers", "1", "--follow-stdin"])
        .arg(&file)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}; install it with apt", tool[0]))?;
    wait(listen)?;
    let occupied = if layers == Layers::Shed { Some(peers::occupy(listen)?) } else { None };
    let shape = if occupied.is_some() { Shape::Refused("/a/1k") } else { Shape::Get("/a/1k") };
    let plan = Plan {
        connections,
        shape,
        rate: None,
        idle: 0,
        heavy: 0,
        turn: Duration::from_mins(10),
        requests: Some(requests),
    };
    let told = load::run(listen, &plan, &mut || {})?;
    ensure!(told.failures == 0 && told.completed == requests, "{} of {requests} answered", told.completed);
    // The end of its standard input is its end.
    drop(occupied);
    drop(process.stdin.take());
    process.wait()?;
    Ok(())
}
