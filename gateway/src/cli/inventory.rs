//! `gateway inventory` and `gateway suggest`: what clients ask for, and a first file from it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, anyhow, bail};
use http::Method;
use serde_json::Value;

use super::{
    columns, grouped, offline, print,
    remote::{Remote, block},
};
use crate::{
    config::{self, UNROUTED},
    inventory::{self, Document, Endpoint, Place, Standing, counts::seconds, import, tree::Step},
    routing::{path::PathPolicy, pattern::Pattern},
    snapshot::{Snapshot, traffic::Locator},
};

#[derive(clap::Args)]
pub(super) struct Inventory {
    #[command(flatten)]
    remote: Remote,
    /// Adds a file to what the running gateway knows: an OpenAPI document, an access log in the combined format or of a gateway, another inventory.
    #[arg(long, value_name = "FILE", conflicts_with = "from")]
    import: Vec<PathBuf>,
    /// Reads these files, and asks no gateway. Routes are those of `--config`, where that is there.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    from: Vec<PathBuf>,
    /// Endpoints of each list, at most.
    #[arg(long, default_value_t = 50)]
    limit: usize,
    /// Prints JSON, whole.
    #[arg(long)]
    json: bool,
}

impl Inventory {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        if !self.import.is_empty() {
            return self.send();
        }
        let document = known(&self.remote, &self.from)?;
        if self.json {
            print(&format!("{}\n", serde_json::to_string_pretty(&document)?));
        } else {
            print(&describe(&document, self.limit));
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Reads files here, and sends what they come to: a log may be larger than anybody wants to send.
    fn send(self) -> anyhow::Result<ExitCode> {
        let patterns = block(self.remote.call(Method::GET, "/api/routes", &Value::Null))?;
        for file in &self.import {
            let mut read = inventory::Inventory::new(now());
            // What the routes leave open is no name here either.
            for path in patterns.as_array().into_iter().flatten().filter_map(|route| route["match"].as_str()) {
                read.pin(&inventory::tree::steps(path, false));
            }
            let told = read_into(file, &mut read, PathPolicy::default())?;
            let nowhere = |_: &str, _: &[Step], _: Option<&str>| Place {
                route: None,
                standing: Standing::Legacy,
                tags: Vec::new(),
            };
            let document = read.document(now(), &nowhere);
            let done = block(self.remote.call(Method::POST, "/api/inventory", &serde_json::to_value(&document)?))?;
            print(&format!("{}: {told}; {} endpoints sent\n", file.display(), done["endpoints"]));
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn now() -> u32 {
    seconds(jiff::Timestamp::now())
}

/// Reads one file; what it came to, in words.
fn read_into(file: &Path, into: &mut inventory::Inventory, paths: PathPolicy) -> anyhow::Result<String> {
    let read = import::read(file, into, paths).map_err(|why| anyhow!("`{}`: {why}", file.display()))?;
    if read.lines > 0 && read.unreadable == read.lines {
        bail!("`{}`: none of its {} lines is one of a log in the combined format", file.display(), read.lines);
    }
    Ok(if read.lines > 0 {
        format!("{} lines, {} of them not readable", grouped_count(read.lines), grouped_count(read.unreadable))
    } else {
        format!("{} endpoints of a document", read.endpoints)
    })
}

fn grouped_count(number: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "a count that is shown")]
    grouped(number as f64)
}

/// What a running gateway knows, or what is in these files.
fn known(remote: &Remote, from: &[PathBuf]) -> anyhow::Result<Document> {
    if from.is_empty() {
        let told = block(remote.call(Method::GET, "/api/inventory", &Value::Null))?;
        return serde_json::from_value(told).context("the gateway's answer is no inventory");
    }
    let file = remote.config();
    // What a shell has just emptied, to write into it what this prints, is no file either.
    let written = std::fs::metadata(file).is_ok_and(|file| file.len() > 0);
    let snapshot: Option<Snapshot> = if written { Some(offline(file)?.1) } else { None };
    let paths = snapshot.as_ref().map(|snapshot| snapshot.paths).unwrap_or_default();
    let mut read = inventory::Inventory::new(now());
    for route in snapshot.iter().flat_map(|snapshot| &snapshot.routes) {
        read.pin(&inventory::tree::steps(&route.path, paths.case_insensitive));
    }
    for file in from {
        eprintln!("{}: {}", file.display(), read_into(file, &mut read, paths)?);
    }
    let locator = snapshot.as_ref().map(Locator::new);
    let locate = |method: &str, steps: &[Step], counted: Option<&str>| match &locator {
        Some(locator) => locator.locate(method, steps, counted),
        None => Place { route: None, standing: Standing::Legacy, tags: Vec::new() },
    };
    Ok(read.document(now(), &locate))
}

/// Whether an endpoint is in a list.
type Holds = fn(&Endpoint) -> bool;

fn describe(document: &Document, limit: usize) -> String {
    let summary = document.summary;
    let mut out = format!(
        "{} endpoints: {} on the monolith, {} under way, {} moved; {} claimed by no route, {} documented and never called\n",
        summary.endpoints, summary.legacy, summary.canary, summary.moved, summary.unrouted, summary.never_called
    );
    if document.dropped + document.beyond > 0 {
        let lost = grouped_count(document.dropped + document.beyond);
        out.push_str(&format!(
            "{lost} requests are not in it: more endpoints, or more requests, than there was room for\n"
        ));
    }
    let lists: [(&str, Holds); 5] = [
        ("still on the monolith, by traffic", |e| matches!(e.state, Standing::Legacy | Standing::Shadow)),
        ("never called: delete, do not migrate", |e| e.state == Standing::NeverCalled),
        ("under way", |e| e.state == Standing::Canary),
        ("moved", |e| e.state.is_moved()),
        ("claimed by no route", |e| e.route.is_none() && e.state != Standing::NeverCalled),
    ];
    for (title, is_in) in lists {
        let list: Vec<&Endpoint> = document.endpoints.iter().filter(|endpoint| is_in(endpoint)).collect();
        if list.is_empty() {
            continue;
        }
        out.push_str(&format!("\n{title} ({})\n", list.len()));
        let head =
            ["endpoint", "route", "an hour", "monolith", "service", "in all", "5xx", "p99 ms", "p99 ms", "last seen"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        rows.extend(list.iter().take(limit).map(|endpoint| row(endpoint)));
        out.push_str(&columns(&rows, 2));
        if list.len() > limit {
            out.push_str(&format!("… and {} more; `--limit` shows them\n", list.len() - limit));
        }
    }
    out
}

fn row(endpoint: &Endpoint) -> Vec<String> {
    let dash = || "–".to_owned();
    let arm = |name: &str| endpoint.arms.get(name);
    let rate = |name: &str| arm(name).map_or_else(dash, |arm| grouped(arm.per_hour));
    let p99 = |name: &str| arm(name).and_then(|arm| arm.p99_ms).map_or_else(dash, |p99| format!("{p99:.1}"));
    let sum =
        |get: fn(&inventory::counts::Counts) -> u64| endpoint.arms.values().map(|arm| get(&arm.counts)).sum::<u64>();
    let (all, errors) = (sum(|counts| counts.requests), sum(|counts| counts.errors));
    #[allow(clippy::cast_precision_loss, reason = "counts")]
    let share = if all == 0 { dash() } else { format!("{:.2}%", errors as f64 * 100.0 / all as f64) };
    vec![
        format!("{} {}", endpoint.method, endpoint.path),
        endpoint.route.clone().unwrap_or_else(dash),
        grouped(endpoint.per_hour),
        rate("legacy"),
        rate("service"),
        grouped_count(all),
        share,
        p99("legacy"),
        p99("service"),
        endpoint.last_seen.map_or_else(|| "never".to_owned(), |last| last.strftime("%Y-%m-%d %H:%M").to_string()),
    ]
}

#[derive(clap::Args)]
pub(super) struct Suggest {
    #[command(flatten)]
    remote: Remote,
    /// Reads these files, and asks no gateway: access logs, OpenAPI documents, inventories.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    from: Vec<PathBuf>,
    /// The monolith's URL. Default: that of `legacy` in `--config`.
    #[arg(long, value_name = "URL")]
    legacy: Option<String>,
}

/// Routes that are drafted, at most.
const ROUTES: usize = 200;

impl Suggest {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let document = known(&self.remote, &self.from)?;
        let known = self.legacy.or_else(|| legacy_of(self.remote.config()));
        let note = if known.is_some() { "" } else { "   # a guess: `--legacy URL`" };
        let url = known.unwrap_or_else(|| "http://127.0.0.1:9000".to_owned());
        print(&suggest(&document, &format!("{}{note}", quoted(&url)), routes_of(self.remote.config())));
        Ok(ExitCode::SUCCESS)
    }
}

fn legacy_of(file: &Path) -> Option<String> {
    let config = config::load_with_env(file).ok()?;
    config.upstreams.get("legacy")?.url.clone()
}

/// What is drafted of one part of the monolith.
#[derive(Default)]
struct Part<'d> {
    endpoints: Vec<&'d Endpoint>,
    per_hour: f64,
    requests: u64,
    writes: u64,
}

/// The routes that a file has.
fn routes_of(file: &Path) -> usize {
    config::load_with_env(file).map_or(0, |config| config.routes.len())
}

/// A first file: a route for each part of the monolith that no route claims yet, those with most traffic first.
fn suggest(document: &Document, legacy: &str, others: usize) -> String {
    let open: Vec<&Endpoint> = document
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.route.is_none() && endpoint.state != Standing::NeverCalled)
        .collect();
    let mut parts: BTreeMap<String, Part<'_>> = BTreeMap::new();
    let mut nameless = Vec::new();
    for endpoint in open {
        let prefix = prefix(&endpoint.path);
        // What begins with an open segment cannot be told from anything else, and what no pattern can be written for neither.
        if (prefix == "/" && endpoint.path != "/") || Pattern::parse(&prefix, false).is_err() {
            nameless.push(endpoint);
            continue;
        }
        let part = parts.entry(prefix).or_default();
        let requests: u64 = endpoint.arms.values().map(|arm| arm.counts.requests).sum();
        part.endpoints.push(endpoint);
        part.per_hour += endpoint.per_hour;
        part.requests += requests;
        if !matches!(endpoint.method.as_str(), "GET" | "HEAD" | "OPTIONS") {
            part.writes += requests;
        }
    }
    let mut parts: Vec<(String, Part<'_>)> = parts.into_iter().collect();
    parts.sort_by(|a, b| b.1.requests.cmp(&a.1.requests).then_with(|| a.0.cmp(&b.0)));
    let all: f64 = document.endpoints.iter().map(|endpoint| endpoint.per_hour).sum();
    let mut out = format!(
        "# Drafted by `gateway suggest` from {} endpoints and {} requests an hour. Every route is the monolith's: nothing changes until\n\
         # you name a service and flip its `stage`. Read it, join what belongs together, and `gateway check` it.\n\
         version: 1\n\nupstreams:\n  legacy:\n    url: {}\n",
        document.endpoints.len(),
        grouped(all),
        legacy
    );
    if others > 0 {
        out.push_str(&format!("\n# The {others} routes that the file has are not repeated here: add these to them.\n"));
    }
    if parts.is_empty() {
        out.push_str("\n# Every endpoint that was seen has a route already.\nroutes: []\n");
    } else {
        out.push_str("\nroutes:\n");
    }
    let mut names = BTreeSet::from([UNROUTED.to_owned()]);
    for (prefix, part) in parts.iter().take(ROUTES) {
        let mut name = name_of(prefix);
        while !names.insert(name.clone()) {
            name.push('-');
        }
        #[allow(clippy::cast_precision_loss, reason = "counts")]
        let writes = if part.requests == 0 { 0.0 } else { part.writes as f64 * 100.0 / part.requests as f64 };
        out.push_str(&format!("  # {} requests an hour, {writes:.0} % of them writes:\n", grouped(part.per_hour)));
        for endpoint in part.endpoints.iter().take(8) {
            let p99 = endpoint.arms.get("legacy").and_then(|arm| arm.p99_ms);
            let p99 = p99.map_or_else(String::new, |p99| format!(", p99 {p99:.0} ms"));
            let rate = grouped(endpoint.per_hour);
            out.push_str(&format!("  #   {} {}  {rate} an hour{p99}\n", endpoint.method, endpoint.path));
        }
        if part.endpoints.len() > 8 {
            out.push_str(&format!("  #   and {} more\n", part.endpoints.len() - 8));
        }
        out.push_str(&format!(
            "  - name: {}\n    match: {}\n    stage: legacy\n",
            quoted(&name),
            quoted(&pattern(prefix, part))
        ));
    }
    if parts.len() > ROUTES {
        out.push_str(&format!("\n# … and {} more parts, with less traffic each.\n", parts.len() - ROUTES));
    }
    let never: Vec<&Endpoint> =
        document.endpoints.iter().filter(|endpoint| endpoint.state == Standing::NeverCalled).collect();
    for (list, told) in [
        (nameless, "No route can tell these from the rest by their path: they stay the monolith's."),
        (never, "Documented, and nobody calls them: delete them, do not migrate them."),
    ] {
        if !list.is_empty() {
            out.push_str(&format!("\n# {told}\n"));
        }
        for endpoint in list.iter().take(ROUTES) {
            out.push_str(&format!("#   {} {}\n", endpoint.method, endpoint.path));
        }
        if list.len() > ROUTES {
            out.push_str(&format!("#   … and {} more\n", list.len() - ROUTES));
        }
    }
    out
}

/// The part of the monolith that an endpoint belongs to: its first segment that says something. What all have in common
/// (`/api/v1`) says nothing.
fn prefix(path: &str) -> String {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let mut depth = 0;
    for segment in segments.iter().take_while(|segment| !segment.starts_with('{')) {
        depth += 1;
        let is_version =
            segment.strip_prefix('v').is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()));
        if !is_version && !matches!(*segment, "api" | "rest" | "services" | "rpc" | "public" | "internal") {
            break;
        }
    }
    format!("/{}", segments[..depth].join("/"))
}

/// What a route of that part matches.
fn pattern(prefix: &str, part: &Part<'_>) -> String {
    let alone = part.endpoints.iter().all(|endpoint| endpoint.path == prefix);
    if alone { prefix.to_owned() } else { format!("{prefix}/**") }
}

fn name_of(prefix: &str) -> String {
    let name: String = prefix
        .split('/')
        .filter(|segment| !segment.is_empty() && *segment != "api")
        .collect::<Vec<_>>()
        .join("-")
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c))
        .take(100)
        .collect();
    if name.is_empty() { "home".to_owned() } else { name }
}

/// A text as YAML takes it for one.
fn quoted(text: &str) -> String {
    let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/-_.:*".contains(&byte))
        && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && !text.ends_with(':')
        && !matches!(
            text.to_ascii_lowercase().as_str(),
            "true" | "false" | "null" | "yes" | "no" | "on" | "off" | "y" | "n"
        );
    if plain { text.to_owned() } else { Value::from(text).to_string() }
}
