//! `gateway check`

use std::process::ExitCode;

use super::{BAD_FILE, File};
use crate::{
    config::{self, Severity},
    snapshot::{Registry, compile},
};

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
        let checked = config::load_with_env(path);
        if self.json {
            let report = match &checked {
                Ok(config) => &config.warnings,
                Err(report) => report,
            };
            let told = serde_json::json!({"ok": checked.is_ok(), "diagnostics": report.diagnostics});
            println!("{told:#}");
            return Ok(if checked.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(BAD_FILE) });
        }
        let config = checked?;
        // What compiles now runs later: nothing is left to find out at reload.
        compile(&config, &mut Registry::new(1), 1).map_err(anyhow::Error::msg)?;
        if !config.warnings.diagnostics.is_empty() {
            eprintln!("{}\n", config.warnings);
        }
        let warnings = config.warnings.diagnostics.iter().filter(|d| d.severity == Severity::Warning).count();
        let number = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        println!(
            "{}: good: {}, {}, {}",
            path.display(),
            number(config.routes.len(), "route"),
            number(config.upstreams.len(), "upstream"),
            number(warnings, "warning")
        );
        Ok(ExitCode::SUCCESS)
    }
}
