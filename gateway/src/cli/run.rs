//! `gateway run`

use std::process::ExitCode;

use tokio::runtime::{Builder, LocalOptions};

use super::File;
use crate::{
    server::{self, Options},
    snapshot::{OpenError, Store},
    telemetry,
};

#[derive(clap::Args)]
pub(super) struct Run {
    #[command(flatten)]
    file: File,
    /// How many threads serve. Default: one a core.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// Ends with its standard input, so that it never outlives who started it.
    #[arg(long, hide = true)]
    follow_stdin: bool,
}

impl Run {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        telemetry::log::start();
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let workers = self.workers.map_or(cores, usize::from);
        let store = Store::open(&self.file.file, workers).map_err(|error| match error {
            OpenError::Refused(report) => anyhow::Error::new(report),
            OpenError::State(failure) => failure.into(),
        })?;
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
        let options = Options { workers, follow_stdin: self.follow_stdin };
        runtime.block_on(server::run(store, options))?;
        runtime.shutdown_background();
        Ok(ExitCode::SUCCESS)
    }
}
