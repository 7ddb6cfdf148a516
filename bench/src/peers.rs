//! The processes: an origin, the gateway, and those that it is measured against.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use tempfile::TempDir;

/// The core of the peers, and that of origin and load.
const CORES: (&str, &str) = ("0", "1");

/// A reverse proxy in front of the origin.
pub(crate) struct Peer {
    /// What it is called in the tables.
    pub(crate) name: String,
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// Where it is scraped during its turns, if it is.
    pub(crate) scraped: Option<SocketAddr>,
    process: Child,
    /// Processes whose time counts: itself, or its only worker.
    ids: Vec<u32>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

/// Ends a process that we began, and its workers with it.
fn end(process: &mut Child) {
    let _ = Command::new("kill").arg(process.id().to_string()).status();
    let until = Instant::now() + Duration::from_secs(5);
    // Some take minutes to say goodbye.
    while Instant::now() < until {
        if matches!(process.try_wait(), Ok(Some(_)) | Err(_)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = process.kill();
    let _ = process.wait();
}

impl Peer {
    /// CPU time so far: of all threads, user and system.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        let mut nanos = 0;
        for id in &self.ids {
            for task in std::fs::read_dir(format!("/proc/{id}/task"))? {
                let text = std::fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
                nanos += text.split_whitespace().next().and_then(|nanos| nanos.parse::<u64>().ok()).unwrap_or(0);
            }
        }
        Ok(Duration::from_nanos(nanos))
    }

    /// Memory that is its own, in bytes.
    pub(crate) fn memory(&self) -> anyhow::Result<u64> {
        let mut kilobytes = 0;
        for id in &self.ids {
            let text = std::fs::read_to_string(format!("/proc/{id}/smaps_rollup"))?;
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
            kilobytes += line.trim().trim_end_matches(" kB").parse::<u64>()?;
        }
        Ok(kilobytes * 1024)
    }
}

/// All of them, on files of their own.
pub(crate) struct Peers {
    /// In the order of the tables.
    pub(crate) all: Vec<Peer>,
    origin: Child,
    _folder: TempDir,
    /// Takes the place for which others are refused.
    _occupied: TcpStream,
}

impl Drop for Peers {
    fn drop(&mut self) {
        end(&mut self.origin);
    }
}

/// An origin alone.
pub(crate) struct Origin {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// Where its files are.
    pub(crate) folder: TempDir,
    process: Option<Child>,
}

impl Drop for Origin {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            end(process);
        }
    }
}

impl Origin {
    /// nginx with answers of 1 KiB from memory, and files of 100 KiB and 1 MiB.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        for (name, size) in [("100k", 100 * 1024), ("1m", 1 << 20)] {
            std::fs::write(folder.path().join(name), vec![b'x'; size])?;
        }
        let address = free()?;
        let config = format!(
            "worker_processes 1; daemon off; pid {dir}/origin.pid; error_log /dev/null; worker_rlimit_nofile 65536;\n\
             events {{ worker_connections 40000; }}\n\
             http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 1h; client_max_body_size 0;\n\
             client_body_temp_path {dir}; proxy_temp_path {dir}; fastcgi_temp_path {dir}; uwsgi_temp_path {dir}; scgi_temp_path {dir};\n\
             open_file_cache max=10; server {{ listen {address}; listen 127.0.0.2:{port}; location /a/1k {{ return 200 {body}; }}\n\
             location /a/ {{ alias {dir}/; }} }} }}\n",
            dir = folder.path().display(),
            port = address.port(),
            body = "x".repeat(1024),
        );
        let file = folder.path().join("origin.conf");
        std::fs::write(&file, config)?;
        let process = spawn(CORES.1, "nginx", &["-c", &file.display().to_string()])?;
        let this = Self { address, folder, process: Some(process) };
        wait(address)?;
        Ok(this)
    }
}

impl Peers {
    /// Starts what is there.
    pub(crate) fn start(gateway: &Path, before: Option<&Path>, pingora: &Path) -> anyhow::Result<Self> {
        ensure!(gateway.exists(), "{} is not there; `cargo build --profile dist`", gateway.display());
        let mut origin = Origin::start()?;
        let dir = origin.folder.path().to_owned();
        let upstream = origin.address;
        let mut all = vec![self::gateway("gateway", gateway, &dir, upstream, 10, Layers::Default)?];
        if let Some(before) = before {
            all.push(self::gateway("gateway, before", before, &dir, upstream, 10, Layers::Default)?);
        }
        all.push(self::gateway("gateway, 10,000 routes", gateway, &dir, upstream, 10_000, Layers::Default)?);
        all.push(self::gateway("gateway, resilience off", gateway, &dir, upstream, 10, Layers::Off)?);
        all.push(self::gateway("gateway, resilience on", gateway, &dir, upstream, 10, Layers::On)?);
        all.push(self::gateway("gateway, cache", gateway, &dir, upstream, 10, Layers::Cache)?);
        all.push(self::gateway("gateway, JWT", gateway, &dir, upstream, 10, Layers::Jwt)?);
        all.push(self::gateway("gateway, telemetry off", gateway, &dir, upstream, 10, Layers::Untold)?);
        all.push(self::gateway("gateway, telemetry and 1 % traced", gateway, &dir, upstream, 10, Layers::Traced)?);
        for (name, scraped) in
            [("gateway, telemetry of 500 routes", false), ("gateway, telemetry of 500 routes, scraped", true)]
        {
            let mut peer = self::gateway(name, gateway, &dir, upstream, 500, Layers::Default)?;
            // Each has something to tell.
            for n in 1..500 {
                crate::load::once(peer.address, &format!("/r{}/p{n}/x", n % 100))?;
            }
            peer.scraped = peer.scraped.filter(|_| scraped);
            all.push(peer);
        }
        all.push(self::gateway("gateway, full", gateway, &dir, silent()?, 10, Layers::Shed)?);
        let full = all.last().context("it was just put there")?.address;
        let occupied = occupy(full)?;
        for (name, full, cache) in [
            ("nginx, same work", true, false),
            ("nginx, bare", false, false),
            ("nginx, cache, same work", true, true),
            ("nginx, cache, bare", false, true),
        ] {
            all.push(nginx(name, &dir, upstream, full, cache)?);
        }
        match varnish(&dir, upstream) {
            Ok(peer) => all.push(peer),
            Err(error) => eprintln!("without Varnish: {error:#}"),
        }
        match haproxy(&dir, upstream) {
            Ok(peer) => all.push(peer),
            Err(error) => eprintln!("without HAProxy: {error:#}"),
        }
        if pingora.exists() {
            let address = free()?;
            let process =
                spawn(CORES.0, &pingora.display().to_string(), &[&address.to_string(), &upstream.to_string()])?;
            all.push(peer("Pingora, bare", address, process)?);
        } else {
            eprintln!("without Pingora: `cargo build --release --manifest-path bench/pingora/Cargo.toml`");
        }
        let process = origin.process.take().context("the origin is gone")?;
        let folder = std::mem::replace(&mut origin.folder, tempfile::tempdir()?);
        Ok(Self { all, origin: process, _folder: folder, _occupied: occupied })
    }
}

/// What the gateway does for each request beside passing it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Layers {
    /// What it does where the file says nothing.
    Default,
    /// Neither retries nor fallback nor breaker.
    Off,
    /// All of that with every reason, two endpoints, checks, ejection, places, rate limit, limits of tries.
    On,
    /// Refused: the upstream has one place, which is taken.
    Shed,
    /// What was asked for once is kept.
    Cache,
    /// Nobody comes in without a token.
    Jwt,
    /// Neither inventory nor access log.
    Untold,
    /// Beside all else, one request of a hundred is traced.
    Traced,
}

/// The secret of the token that the load brings.
const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// A token of that secret, as large as providers make them, good until 2100.
pub(crate) fn token() -> String {
    use aws_lc_rs::hmac;
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
    let roles: Vec<String> = (0..20).map(|n| format!("\"department-{n}:reader\"")).collect();
    let claims = format!(
        "{{\"iss\":\"https://id.example.com/\",\"aud\":\"shop\",\"sub\":\"user-1\",\"exp\":4102444800,\"scope\":\"read\",\"roles\":[{}]}}",
        roles.join(",")
    );
    let message = format!("{}.{}", BASE64.encode("{\"alg\":\"HS256\",\"typ\":\"JWT\"}"), BASE64.encode(claims));
    let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET.as_bytes());
    format!("{message}.{}", BASE64.encode(hmac::sign(&key, message.as_bytes())))
}

/// The gateway's file for this many routes.
pub(crate) fn routes(
    listen: SocketAddr,
    admin: SocketAddr,
    upstream: SocketAddr,
    count: usize,
    layers: Layers,
) -> String {
    let plain = format!("url: \"http://{upstream}\"");
    let (service, policies) = match layers {
        Layers::Default | Layers::Untold | Layers::Traced => (plain, "stage: migrated"),
        Layers::Off => (plain + ", breaker: none", "stage: migrated, retry: none, fallback: none"),
        Layers::On => (
            format!(
                "urls: [\"http://{upstream}\", \"http://127.0.0.2:{}\"], health: {{path: /a/1k, every: 1s}}, outlier: {{}}, \
                 breaker: {{slow_call: 2s}}, max_requests: 20000",
                upstream.port()
            ),
            "stage: migrated, retry: {}, fallback: {when: [unavailable, 5xx, 404, 501]}, \
             rate_limit: {limit: 1000000/s}, timeout: {attempt: 10s}",
        ),
        Layers::Cache => (plain, "stage: migrated, cache: {default_ttl: 10m}"),
        Layers::Jwt => (
            plain,
            "stage: migrated, auth: {jwt: main, scopes: [read], forward: {sub: x-user-id}, forward_token: true}",
        ),
        Layers::Shed => (plain + ", breaker: none, max_requests: 1, max_pending: 0", "stage: retired, retry: none"),
    };
    let telemetry = match layers {
        Layers::Untold => "access_log: none\ninventory: none\n".to_owned(),
        // The origin takes anything.
        Layers::Traced => format!("tracing: {{otlp: \"http://{upstream}/a/1k\", sample: 1%}}\n"),
        _ => String::new(),
    };
    let mut text = format!(
        "{telemetry}listen: {listen}\nadmin: {admin}\nauth:\n  main: {{issuer: \"https://id.example.com/\", audience: [shop], secret: {SECRET}}}\nupstreams:\n  legacy: {{url: \"http://{upstream}\", connections: {{max: 20000}}}}\n  \
         service: {{{service}, connections: {{max: 20000}}}}\nroutes:\n  \
         - {{name: a, match: /a/**, upstream: service, {policies}}}\n"
    );
    for n in 1..count {
        text.push_str(&format!(
            "  - {{name: r{n}, match: /r{}/p{n}/**, upstream: service, stage: migrated}}\n",
            n % 100
        ));
    }
    text
}

fn gateway(
    name: &str,
    executable: &Path,
    dir: &Path,
    upstream: SocketAddr,
    count: usize,
    layers: Layers,
) -> anyhow::Result<Peer> {
    let (listen, admin) = (free()?, free()?);
    let file = dir.join(format!("{}.yaml", name.replace([' ', ','], "")));
    std::fs::write(&file, routes(listen, admin, upstream, count, layers))?;
    let executable = executable.display().to_string();
    let process = spawn(CORES.0, &executable, &["run", "--workers", "1", &file.display().to_string()])?;
    let mut peer = peer(name, listen, process)?;
    peer.scraped = Some(admin);
    Ok(peer)
}

/// A request that takes the only place of an upstream that never answers; kept as long as the result.
pub(crate) fn occupy(gateway: SocketAddr) -> anyhow::Result<TcpStream> {
    use std::io::Write as _;
    let mut tcp = TcpStream::connect(gateway)?;
    tcp.write_all(b"GET /a/1k HTTP/1.1\r\nhost: a\r\n\r\n")?;
    Ok(tcp)
}

/// An origin that takes requests and never answers.
pub(crate) fn silent() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        let held: Vec<_> = listener.incoming().flatten().collect();
        drop(held);
    });
    Ok(address)
}

fn nginx(name: &str, dir: &Path, upstream: SocketAddr, full: bool, cache: bool) -> anyhow::Result<Peer> {
    let address = free()?;
    let dir = dir.display();
    let (log, fields) = if full {
        (
            format!(
                "log_format all escape=json '{{\"time\":\"$time_iso8601\",\"request_id\":\"$request_id\",\"client\":\"$remote_addr\",\
                 \"method\":\"$request_method\",\"host\":\"$host\",\"path\":\"$uri\",\"protocol\":\"$server_protocol\",\"status\":$status,\
                 \"upstream\":\"$upstream_addr\",\"duration\":$request_time,\"head\":\"$upstream_header_time\",\"bytes_in\":$request_length,\
                 \"bytes_out\":$body_bytes_sent}}'; access_log {dir}/access.log all buffer=64k;"
            ),
            "proxy_set_header Host $host; proxy_set_header X-Request-Id $request_id; proxy_set_header X-Forwarded-For $remote_addr;\
             proxy_set_header X-Forwarded-Proto http; proxy_set_header X-Forwarded-Host $host;\
             proxy_set_header Forwarded \"for=$remote_addr;proto=http;host=\\\"$host\\\"\"; proxy_set_header Via \"1.1 nginx\";",
        )
    } else {
        ("access_log off;".to_owned(), "")
    };
    let short = format!("{}{}", if full { "full" } else { "bare" }, if cache { "-cache" } else { "" });
    // Without its manager and loader, so that the worker is the only child.
    let (store, keep) = if cache {
        (
            format!("proxy_cache_path {dir}/{short} keys_zone=kept:10m max_size=100m use_temp_path=off;"),
            "proxy_cache kept; proxy_cache_valid 200 10m; add_header X-Cache-Status $upstream_cache_status;",
        )
    } else {
        (String::new(), "")
    };
    let config = format!(
        "worker_processes 1; daemon off; pid {dir}/{short}.pid; error_log /dev/null; worker_rlimit_nofile 65536;\n\
         events {{ worker_connections 40000; }}\n\
         http {{ {log} {store} sendfile on; keepalive_requests 1000000000; keepalive_timeout 1h; client_max_body_size 0;\n\
         client_body_temp_path {dir}; proxy_temp_path {dir}; fastcgi_temp_path {dir}; uwsgi_temp_path {dir}; scgi_temp_path {dir};\n\
         client_body_buffer_size 64k; proxy_buffer_size 16k; proxy_buffers 8 64k; proxy_busy_buffers_size 128k;\n\
         upstream origin {{ server {upstream}; keepalive 20000; keepalive_requests 1000000000; }}\n\
         server {{ listen {address} backlog=4096; location / {{ proxy_pass http://origin; proxy_http_version 1.1;\n\
         proxy_set_header Connection \"\"; {fields} {keep} }} }} }}\n"
    );
    let file = format!("{dir}/{short}.conf");
    std::fs::write(&file, config)?;
    peer(name, address, spawn(CORES.0, "nginx", &["-c", &file])?)
}

/// Varnish with two pools' least of threads; it logs to memory that nobody reads.
fn varnish(dir: &Path, upstream: SocketAddr) -> anyhow::Result<Peer> {
    let address = free()?;
    let folder = dir.join("varnish").display().to_string();
    let (listen, origin) = (address.to_string(), upstream.to_string());
    let arguments =
        ["-F", "-n", &folder, "-a", &listen, "-b", &origin, "-s", "malloc,64m", "-t", "600", "-p", "thread_pools=1"];
    peer("Varnish", address, spawn(CORES.0, "varnishd", &arguments)?)
}

fn haproxy(dir: &Path, upstream: SocketAddr) -> anyhow::Result<Peer> {
    let address = free()?;
    let config = format!(
        "global\n  nbthread 1\n\
         defaults\n  mode http\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n  http-reuse always\n\
         frontend f\n  bind {address} backlog 4096\n  default_backend b\n\
         backend b\n  server o {upstream} pool-max-conn 20000\n"
    );
    let file = dir.join("haproxy.cfg");
    std::fs::write(&file, config)?;
    peer("HAProxy, bare", address, spawn(CORES.0, "haproxy", &["-db", "-f", &file.display().to_string()])?)
}

/// Starts a process on a core of its own.
fn spawn(core: &str, program: &str, arguments: &[&str]) -> anyhow::Result<Child> {
    Command::new("taskset")
        .args(["-c", core, program])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {program}"))
}

fn peer(name: &str, address: SocketAddr, process: Child) -> anyhow::Result<Peer> {
    let mut this = Peer { name: name.to_owned(), address, scraped: None, ids: vec![process.id()], process };
    wait(address).with_context(|| name.to_owned())?;
    let id = this.process.id();
    // nginx has a master and a worker, which may come after the listener.
    let until = Instant::now() + Duration::from_secs(20);
    while name.starts_with("nginx") || name == "Varnish" {
        let workers = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
        this.ids = workers.split_whitespace().filter_map(|id| id.parse().ok()).collect();
        if !this.ids.is_empty() {
            break;
        }
        ensure!(Instant::now() < until, "{name} has no worker");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(this)
}

/// Waits until somebody listens.
pub(crate) fn wait(address: SocketAddr) -> anyhow::Result<()> {
    let until = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(address).is_err() {
        ensure!(Instant::now() < until, "nobody listens on {address}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// An address that nobody has. The gap until it is bound is ours to lose.
pub(crate) fn free() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// The path of an executable that the tables tell of.
pub(crate) fn shown(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}
