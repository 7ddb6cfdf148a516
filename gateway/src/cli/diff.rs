//! `gateway diff`

use std::{path::PathBuf, process::ExitCode};

use super::{offline, print};
use crate::snapshot::diff::diff;

#[derive(clap::Args)]
pub(super) struct Diff {
    /// The file that runs.
    old: PathBuf,
    /// The file that shall.
    new: PathBuf,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

impl Diff {
    /// Exits 0 where nothing goes elsewhere, 1 where something does.
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let (_, old) = offline(&self.old)?;
        let (_, new) = offline(&self.new)?;
        let difference = diff(&old, &new);
        if self.json {
            print(&format!("{:#}\n", serde_json::to_value(&difference)?));
        } else {
            print(&difference.to_string());
        }
        Ok(if difference.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
