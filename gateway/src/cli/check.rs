//! `gateway check`

use std::{io::Write as _, process::ExitCode};

use super::{BAD_FILE, File, offline, print};
use crate::config::{Report, Severity};

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
            let told =
                serde_json::json!({"ok": checked.is_ok(), "diagnostics": report.map(|report| &report.diagnostics)});
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
        Ok(ExitCode::SUCCESS)
    }
}
