//! The commands. Exit codes: 0, 78 where a file is bad (`EX_CONFIG`), 1 for anything else, 2 for wrong arguments.

mod changes;
mod check;
#[cfg(feature = "demo")]
mod demo;
mod diff;
mod explain;
mod inventory;
mod record;
mod remote;
mod run;
mod schema;

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

use crate::{
    config::{self, Config, Report},
    snapshot::{Registry, Snapshot, compile},
};

/// The exit code for a file that is refused: `EX_CONFIG` of sysexits.h.
const BAD_FILE: u8 = 78;

/// The gateway in front of a monolith while it is being replaced.
#[derive(Parser)]
#[command(name = "gateway", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves.
    #[command(after_help = "Example: gateway run routes.yaml")]
    Run(run::Run),
    /// Validates a file: prints every error with its line, and warns.
    #[command(after_help = "Example: gateway check routes.yaml && git push")]
    Check(check::Check),
    /// Prints the JSON Schema of routes.yaml, for editors.
    #[command(after_help = "Example: gateway schema > routes.schema.json")]
    Schema(schema::Schema),
    /// Says which route a request takes, why the others lost, and who answers.
    #[command(
        after_help = "Example: gateway explain GET 'http://shop.example.com/api/orders/42' -H 'cookie: session=abc'"
    )]
    Explain(explain::Explain),
    /// Says which requests would go elsewhere under another file.
    #[command(after_help = "Example: gateway diff routes.yaml routes.new.yaml --inventory state/inventory.json")]
    Diff(diff::Diff),
    /// The routes as they run: stage, share, errors and p99 of both arms, parity, and how that differs from the file.
    #[command(after_help = "Example: gateway status")]
    Status(changes::Status),
    /// Who changed what, when and why.
    #[command(after_help = "Example: gateway history orders --limit 5")]
    History(changes::History),
    /// Puts a route back to the monolith, now; it stays there until `resume`.
    #[command(after_help = "Example: gateway rollback orders --why 'totals are wrong'")]
    Rollback(changes::Rollback),
    /// Takes a rollout to its next step, now.
    #[command(after_help = "Example: gateway promote orders --why 'approved by ann'")]
    Promote(changes::Change),
    /// Has a route follow the file again; a rollout that was taken back starts afresh.
    #[command(after_help = "Example: gateway resume orders")]
    Resume(changes::Change),
    /// Writes a sample of requests with their answers to a file.
    #[command(after_help = "Example: gateway record orders.jsonl --route orders --percent 10%")]
    Record(record::Record),
    /// Asks what was recorded again, elsewhere, and compares the answers.
    #[command(after_help = "Example: gateway replay orders.jsonl --to http://127.0.0.1:9001 --ignore /generated_at")]
    Replay(record::Replay),
    /// What clients ask for, endpoint by endpoint: still on the monolith, never called, moved, claimed by no route.
    #[command(
        after_help = "Examples:\n  gateway inventory\n  gateway inventory --import openapi.yaml\n  gateway inventory --from access.log --json > inventory.json"
    )]
    Inventory(inventory::Inventory),
    /// Drafts a first routes.yaml for a monolith that was watched, from its inventory or its logs.
    #[command(after_help = "Example: gateway suggest --from access.log > routes.new.yaml")]
    Suggest(inventory::Suggest),
    /// Brings up a monolith, two services, the gateway and traffic, and tells the migration of one route.
    #[cfg(feature = "demo")]
    #[command(after_help = "Example: gateway demo --once")]
    Demo(demo::Demo),
    /// The demo's monolith and services.
    #[cfg(feature = "demo")]
    #[command(hide = true)]
    Stub(legacy_stub::Options),
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(run) => run.run(),
        Command::Check(check) => check.run(),
        Command::Schema(schema) => schema.run(),
        Command::Explain(explain) => explain.run(),
        Command::Diff(diff) => diff.run(),
        Command::Status(status) => status.run(),
        Command::History(history) => history.run(),
        Command::Rollback(rollback) => rollback.run(),
        Command::Promote(change) => change.make("promote", false),
        Command::Resume(change) => change.make("resume", false),
        Command::Record(record) => record.run(),
        Command::Replay(replay) => replay.run(),
        Command::Inventory(inventory) => inventory.run(),
        Command::Suggest(suggest) => suggest.run(),
        #[cfg(feature = "demo")]
        Command::Demo(demo) => demo.run(),
        #[cfg(feature = "demo")]
        Command::Stub(options) => legacy_stub::main(&options).map(|()| ExitCode::SUCCESS).map_err(Into::into),
    };
    let error = match result {
        Ok(code) => return code,
        Err(error) => error,
    };
    if let Some(report) = error.downcast_ref::<Report>() {
        let _ = writeln!(std::io::stderr(), "{report}\n\n{}", count(report));
        return ExitCode::from(BAD_FILE);
    }
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

fn count(report: &Report) -> String {
    match report.errors() {
        1 => "1 error; the file is refused".to_owned(),
        n => format!("{n} errors; the file is refused"),
    }
}

/// Loads and compiles a file, for a command that does not serve.
fn offline(path: &Path) -> anyhow::Result<(Config, Snapshot)> {
    let config = config::load_with_env(path)?;
    let snapshot = compile(&config, &mut Registry::new(1), 1).map_err(|why| Report::of(path, why, "mend that"))?;
    Ok((config, snapshot))
}

/// Prints, unless nobody reads any more.
fn print(text: &str) {
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

/// A number with its thousands apart: `12,431`.
fn grouped(number: f64) -> String {
    let digits = format!("{:.0}", number.max(0.0));
    let mut out = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Rows of cells below each other: the first two columns from the left, numbers from the right.
fn columns(rows: &[Vec<String>], left: usize) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate();
        let cells: Vec<String> = cells
            .map(|(n, (cell, width))| if n < left { format!("{cell:<width$}") } else { format!("{cell:>width$}") })
            .collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// The file that most commands take.
#[derive(clap::Args)]
struct File {
    /// The file.
    #[arg(default_value = "routes.yaml")]
    file: PathBuf,
}
