//! `gateway status`, `history`, `rollback`, `promote`, `resume`: how routes run, and what a person does about it.

use std::process::ExitCode;

use http::Method;
use serde_json::{Value, json};

use super::{
    columns, print,
    remote::{Remote, block, encode},
};

#[derive(clap::Args)]
pub(super) struct Status {
    #[command(flatten)]
    remote: Remote,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let status = block(self.remote.call(Method::GET, "/api/status", &Value::Null))?;
        if self.json {
            print(&format!("{status:#}\n"));
            return Ok(ExitCode::SUCCESS);
        }
        print(&describe(&status));
        // At three in the morning the rest is worth more than this.
        match block(self.remote.call(Method::GET, "/api/progress", &Value::Null)) {
            Ok(progress) => print(&progress_of(&progress)),
            Err(why) => eprintln!("how much of the monolith is gone cannot be told now: {why:#}"),
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("–")
}

/// How much of the monolith is gone, and which routes it has no part in any more.
fn progress_of(progress: &Value) -> String {
    let mut out = String::new();
    let now = &progress["now"][""];
    let part = |what: &str| {
        let percent = now[what]["percent"].as_f64()?;
        Some(format!("{percent} % of the {what} ({} of {})", now[what]["off"], now[what]["all"]))
    };
    let parts: Vec<String> = ["requests", "writes", "endpoints"].into_iter().filter_map(part).collect();
    if !parts.is_empty() {
        out.push_str(&format!("off the monolith, of late: {}\n", parts.join(", ")));
    }
    for forecast in progress["forecasts"].as_array().into_iter().flatten() {
        out.push_str(&format!("{}\n", text(&forecast["told"])));
    }
    for silent in progress["silence"].as_array().into_iter().flatten().filter(|silent| !silent["propose"].is_null()) {
        out.push_str(&format!("{}: {}\n", text(&silent["route"]), text(&silent["told"])));
    }
    out
}

/// The routes as they run.
fn describe(status: &Value) -> String {
    let mut out = String::new();
    let config = &status["config"];
    let current = if config["current"] == true { "" } else { "; the newest file was refused" };
    out.push_str(&format!(
        "gateway {}, {} connections, file {} as of {}{current}\n",
        text(&status["version"]),
        status["connections"],
        text(&config["file"]),
        text(&config["loaded"])
    ));
    if let Some(trouble) = status["state"]["error"].as_str() {
        out.push_str(&format!("the journal cannot be written: {trouble}\n"));
    }
    let header = ["route", "stage", "share", "requests", "5xx", "p99 ms", "requests", "5xx", "p99 ms", "parity"]
        .map(str::to_owned);
    let arms = ["", "", "", "legacy", "", "", "service", "", "", ""].map(str::to_owned);
    let mut rows = vec![arms.to_vec(), header.to_vec()];
    let mut notes = Vec::new();
    for route in status["routes"].as_array().into_iter().flatten() {
        let arm = |name: &str| {
            let arm = &route["requests"][name];
            let count = |class: &str| arm[class].as_u64().unwrap_or(0);
            let all: u64 = ["2xx", "3xx", "4xx", "5xx", "aborted"].into_iter().map(count).sum();
            if all == 0 {
                return ["–".to_owned(), "–".to_owned(), "–".to_owned()];
            }
            #[allow(clippy::cast_precision_loss, reason = "counts")]
            let failed = count("5xx") as f64 * 100.0 / all as f64;
            let p99 = arm["p99_ms"].as_f64().map_or("–".to_owned(), |p99| format!("{p99:.1}"));
            [all.to_string(), format!("{failed:.2}%"), p99]
        };
        let [legacy, service] = [arm("legacy"), arm("service")];
        let parity = route["shadow"]["parity_percent"].as_f64().map_or("–".to_owned(), |parity| format!("{parity}%"));
        let name = text(&route["name"]).to_owned();
        let mut row = vec![name.clone(), text(&route["stage"]).to_owned(), text(&route["share"]).to_owned()];
        row.extend(legacy.into_iter().chain(service).chain([parity]));
        rows.push(row);
        if let Some(overlay) = route["overlay"].as_str() {
            notes.push(format!("{name}: {overlay}"));
        }
        let lists = ["gates", "lacks"].map(|list| route["rollout"][list].as_array().cloned().unwrap_or_default());
        notes.extend(lists.iter().flatten().filter_map(Value::as_str).map(|lack| format!("{name}: waits for: {lack}")));
    }
    out.push_str(&columns(&rows, 2));
    for note in notes {
        out.push_str(&note);
        out.push('\n');
    }
    out
}

#[derive(clap::Args)]
pub(super) struct History {
    /// Only of this route.
    route: Option<String>,
    #[command(flatten)]
    remote: Remote,
    /// How many changes, the newest first.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    limit: u16,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

impl History {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let route = self.route.as_deref().map(|route| format!("&route={}", encode(route))).unwrap_or_default();
        let path = format!("/api/history?limit={}{route}", self.limit);
        let history = block(self.remote.call(Method::GET, &path, &Value::Null))?;
        if self.json {
            print(&format!("{history:#}\n"));
            return Ok(ExitCode::SUCCESS);
        }
        for change in history["changes"].as_array().into_iter().flatten() {
            print(&format!("{}\n", line(change)));
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn line(change: &Value) -> String {
    let word = |name: &str| text(&change[name]);
    let (from, to) = (word("from"), word("to"));
    format!("{}  {}  {}  {from} → {to}  by {}: {}", word("at"), word("route"), word("action"), word("who"), word("why"))
}

/// What a person says when they change something.
#[derive(clap::Args)]
pub(super) struct Change {
    /// The route's name.
    route: String,
    #[command(flatten)]
    remote: Remote,
    /// Why, for the history.
    #[arg(long, default_value = "")]
    why: String,
    /// Who, for the history. Default: the user that runs this.
    #[arg(long)]
    who: Option<String>,
}

#[derive(clap::Args)]
pub(super) struct Rollback {
    #[command(flatten)]
    change: Change,
    /// Also where the route is retired or gone, so that the monolith may not have it any more.
    #[arg(long)]
    force: bool,
}

impl Rollback {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        self.change.make("rollback", self.force)
    }
}

impl Change {
    /// Has the gateway do it.
    pub(super) fn make(self, word: &str, force: bool) -> anyhow::Result<ExitCode> {
        let user = || std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_default();
        let mut body = json!({"who": self.who.unwrap_or_else(user), "why": self.why});
        if force {
            body["force"] = true.into();
        }
        let route = format!("/api/routes/{}", encode(&self.route));
        let path = format!("{route}/{word}");
        let done = block(async {
            if word == "promote" {
                // From where it is now: should a step be taken meanwhile, this is not the one after it.
                let now = self.remote.call(Method::GET, &route, &Value::Null).await?;
                if let Some(share) = now["rollout"]["share"].as_str() {
                    body["from"] = share.into();
                }
            }
            self.remote.call(Method::POST, &path, &body).await
        })?;
        let told = match done["result"].as_str() {
            Some("done") => line(&done["change"]),
            _ => format!("{}: nothing to do, it is so already", self.route),
        };
        print(&format!("{told}\n"));
        if let Some(warning) = done["warning"].as_str() {
            eprintln!("warning: {warning}");
        }
        Ok(ExitCode::SUCCESS)
    }
}
