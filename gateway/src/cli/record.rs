//! `gateway record` and `gateway replay`: proof before the first shadowed request.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request};
use http_body_util::{BodyExt as _, Collected, Full};
use serde_json::json;

use super::{
    offline, print,
    remote::{Remote, block, encode},
};
use crate::{
    config::values::{Share, Span},
    outbound::Outbound,
    shadow::{
        compare::{Answer, Body, Compared, Difference, Rules, compare},
        ledger::{FAILED, Ledger},
        pointer::Pattern,
        record::Recorded,
    },
};

#[derive(clap::Args)]
pub(super) struct Record {
    /// The file to write; it must not exist. Only its owner can read it.
    file: PathBuf,
    #[command(flatten)]
    remote: Remote,
    /// Only requests of this route.
    #[arg(long)]
    route: Option<String>,
    /// The share of requests.
    #[arg(long, default_value = "1%")]
    percent: Share,
    /// Ends after so many requests.
    #[arg(long, default_value_t = 1_000)]
    requests: usize,
    /// Ends after this time.
    #[arg(long = "for", default_value = "10m", value_name = "TIME")]
    time: Span,
    /// Ends before the file is larger than so many MiB.
    #[arg(long, default_value_t = 64)]
    max_size: u64,
    /// A request field that may be kept beside `accept`, `accept-language` and `host`. Requests with credentials or cookies are left out unless those are named.
    #[arg(long = "header", value_name = "NAME")]
    headers: Vec<HeaderName>,
    /// A query parameter that may be kept; `*` for all. Requests with others are left out.
    #[arg(long = "query", value_name = "NAME")]
    query: Vec<String>,
}

impl Record {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let mut path = format!("/api/record?percent={}", encode(&self.percent.to_string()));
        let parameters = self.route.iter().map(|route| ("route", route.as_str()));
        let parameters = parameters.chain(self.headers.iter().map(|name| ("header", name.as_str())));
        for (name, value) in parameters.chain(self.query.iter().map(|name| ("query", name.as_str()))) {
            path.push_str(&format!("&{name}={}", encode(value)));
        }
        let (most, limit) = (self.max_size * 1024 * 1024, self.time.0);
        let written = block(async {
            let mut open = self.remote.open(&path).await?;
            if !open.response.status().is_success() {
                let body = open.response.into_body().collect().await.map(Collected::to_bytes).unwrap_or_default();
                let read: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
                bail!("{}", read["detail"].as_str().unwrap_or("the gateway refused it"));
            }
            let file = File::options().write(true).create_new(true).mode(0o600).open(&self.file);
            let mut file = file.with_context(|| format!("cannot write `{}`", self.file.display()))?;
            let (mut written, mut size, mut line) = (0, 0, Vec::new());
            let end = tokio::time::Instant::now() + limit;
            while written < self.requests {
                let Ok(Some(frame)) = tokio::time::timeout_at(end, open.response.frame()).await else { break };
                line.extend_from_slice(&frame?.into_data().unwrap_or_default());
                // A line may come in pieces, and several at a time.
                while let Some(length) = line.iter().position(|byte| *byte == b'\n').filter(|_| written < self.requests)
                {
                    size += length as u64 + 1;
                    if size > most {
                        return Ok(written);
                    }
                    let rest = line.split_off(length + 1);
                    file.write_all(&std::mem::replace(&mut line, rest))?;
                    written += 1;
                }
            }
            Ok(written)
        })?;
        print(&format!("{}: {written} requests with their answers\n", self.file.display()));
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(clap::Args)]
pub(super) struct Replay {
    /// A file that `gateway record` wrote.
    file: PathBuf,
    /// Who is to answer, as `http://HOST:PORT`.
    #[arg(long, value_name = "URL")]
    to: String,
    /// A field that each request gets, as `name: value`.
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// A route whose `shadow:` says what may differ, in the file of `--config`.
    #[arg(long)]
    route: Option<String>,
    /// The file.
    #[arg(long, default_value = "routes.yaml", value_name = "FILE")]
    config: PathBuf,
    /// A field of JSON that may differ.
    #[arg(long, value_name = "POINTER")]
    ignore: Vec<String>,
    /// An array whose order does not matter.
    #[arg(long, value_name = "POINTER")]
    unordered: Vec<String>,
    /// How far apart numbers may be.
    #[arg(long, default_value_t = 0.0)]
    tolerance: f64,
    /// How long an answer may take.
    #[arg(long, default_value = "30s")]
    timeout: Span,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// What is read of an answer.
const ANSWER: usize = 16 * 1024 * 1024;
/// The longest line of a recording.
const LINE: usize = 4 * 1024 * 1024;

impl Replay {
    /// Exits 0 where all answers are the same, 1 where one differs.
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let rules = self.rules()?;
        let base = self.to.trim_end_matches('/');
        Outbound::new(base).map_err(|why| anyhow!("`{base}`: {why}"))?;
        let mut fields = Vec::new();
        for text in &self.headers {
            let (name, value) =
                text.split_once(':').ok_or_else(|| anyhow!("not a header: `{text}`; write `name: value`"))?;
            fields.push((name.trim().parse::<HeaderName>()?, value.trim().parse::<HeaderValue>()?));
        }
        let file = File::open(&self.file).with_context(|| format!("cannot read `{}`", self.file.display()))?;
        let mut ledger = Ledger::new(false);
        let mut skipped = 0_u64;
        block(async {
            for (n, line) in BufReader::new(file).split(b'\n').enumerate() {
                let line = line?;
                if line.len() > LINE {
                    bail!("{}:{}: longer than any line that is recorded", self.file.display(), n + 1);
                }
                let wrong = |why: String| anyhow!("{}:{}: {why}", self.file.display(), n + 1);
                let recorded: Recorded = serde_json::from_slice(&line).map_err(|error| wrong(error.to_string()))?;
                let method: Method =
                    recorded.method.parse().map_err(|_| wrong(format!("not a method: `{}`", recorded.method)))?;
                // Whatever a file says: nothing is ever done twice.
                if !method.is_safe() {
                    skipped += 1;
                    continue;
                }
                let control = recorded.answer().map_err(wrong)?;
                let found = match self.ask(base, &method, &recorded, &fields).await {
                    Ok(candidate) => compare(&rules, &control, &candidate),
                    Err(candidate) => {
                        let control = control.status.to_string();
                        let difference = Difference { control, candidate, order: false };
                        Compared { found: BTreeMap::from([(FAILED.to_owned(), difference)]), partial: false }
                    }
                };
                let path = recorded.target.split('?').next().unwrap_or_default();
                ledger.take(&format!("{method} {path}"), found, None);
            }
            Ok(())
        })?;
        let mut told = ledger.describe();
        told["skipped"] = skipped.into();
        if self.json {
            print(&format!("{told:#}\n"));
        } else {
            print(&describe(&told));
        }
        Ok(if ledger.mismatched == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn rules(&self) -> anyhow::Result<Rules> {
        let read = |list: &[String]| {
            list.iter()
                .map(|text| Pattern::parse(text).map_err(|help| anyhow!("not a JSON Pointer: `{text}`; {help}")))
                .collect::<anyhow::Result<Vec<_>>>()
        };
        let mut rules = match &self.route {
            None => Rules { headers: vec![http::header::CONTENT_TYPE, http::header::LOCATION], ..Rules::default() },
            Some(name) => {
                let (_, snapshot) = offline(&self.config)?;
                let route = snapshot.routes.iter().find(|route| *route.name == **name);
                let route = route.ok_or_else(|| anyhow!("no route is called `{name}`"))?;
                let shadow = route.shadow.as_ref().ok_or_else(|| anyhow!("route `{name}` has no `shadow:`"))?;
                shadow.rules.clone()
            }
        };
        rules.ignore.extend(read(&self.ignore)?);
        rules.unordered.extend(read(&self.unordered)?);
        if self.tolerance > 0.0 {
            rules.tolerance = self.tolerance;
        }
        Ok(rules)
    }

    async fn ask(
        &self,
        base: &str,
        method: &Method,
        recorded: &Recorded,
        fields: &[(HeaderName, HeaderValue)],
    ) -> Result<Answer, String> {
        let (server, target) = Outbound::new(&format!("{base}{}", recorded.target))?;
        let mut request = Request::builder().method(method).uri(target).header("x-gateway-shadow", "1");
        for (name, value) in &recorded.headers {
            request = request.header(name, value);
        }
        let mut request = request.body(Full::new(Bytes::new())).map_err(|error| error.to_string())?;
        for (name, value) in fields {
            request.headers_mut().insert(name, value.clone());
        }
        let (parts, body) =
            server.send(request, self.timeout.0.max(Duration::from_millis(1)), ANSWER).await?.into_parts();
        Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, body: Body::Whole(body) })
    }
}

fn describe(told: &serde_json::Value) -> String {
    let mut out = format!(
        "{} answers compared, {} differ; {} requests that are not safe were left out\n",
        told["compared"], told["mismatched"], told["skipped"]
    );
    for field in told["fields"].as_array().into_iter().flatten() {
        let example = field["examples"].get(0).cloned().unwrap_or(json!({}));
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        out.push_str(&format!(
            "  {}  {} times ({}%)  {}: recorded {}, now {}\n",
            text(&field["field"]),
            field["differs"],
            field["percent"],
            text(&example["request"]),
            text(&example["control"]),
            text(&example["candidate"])
        ));
    }
    out
}
