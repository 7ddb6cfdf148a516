//! `gateway check`

use std::{io::Write as _, process::ExitCode};

use super::{BAD_FILE, File, offline, print};
use crate::config::{Report, Severity, open_routes};

#[derive(clap::Args)]
pub(super) struct Check {
    #[command(flatten)]
    file: File,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

impl Check {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let path = &self.file.file;
        // What compiles now runs later: nothing is left to find out at reload.
        let checked = offline(path).map(|(config, _)| config);
        if self.json {
            let report = match &checked {
                Ok(config) => Some(&config.warnings),
                Err(error) => error.downcast_ref::<Report>(),
            };
            let open = checked.as_ref().ok().and_then(open_routes);
            let told = serde_json::json!({
                "ok": checked.is_ok(),
                "diagnostics": report.map(|report| &report.diagnostics),
                "without_auth": open,
            });
            print(&format!("{told:#}\n"));
            return Ok(if checked.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(BAD_FILE) });
        }
        let config = checked?;
        if !config.warnings.diagnostics.is_empty() {
            let _ = writeln!(std::io::stderr(), "{}\n", config.warnings);
        }
        let warnings = config.warnings.diagnostics.iter().filter(|d| d.severity == Severity::Warning).count();
        let number = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        print(&format!(
            "{}: good: {}, {}, {}\n",
            path.display(),
            number(config.routes.len(), "route"),
            number(config.upstreams.len(), "upstream"),
            number(warnings, "warning")
        ));
        if let Some(open) = open_routes(&config) {
            let names = open.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            let names = if open.is_empty() { "nothing".to_owned() } else { names };
            print(&format!("reachable without auth: {names}\n"));
        }
        Ok(ExitCode::SUCCESS)
    }
}
