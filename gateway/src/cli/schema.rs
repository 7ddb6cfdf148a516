//! `gateway schema`

use std::process::ExitCode;

use super::print;
use crate::config::document;

#[derive(clap::Args)]
pub(super) struct Schema {
    /// Prints the reference for people instead, as Markdown.
    #[arg(long)]
    markdown: bool,
}

impl Schema {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        if self.markdown {
            print(&document::markdown());
        } else {
            print(&format!("{:#}\n", document::schema()));
        }
        Ok(ExitCode::SUCCESS)
    }
}
