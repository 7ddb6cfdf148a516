//! `gateway diff`

use std::{path::PathBuf, process::ExitCode};

use super::{BAD_FILE, grouped, offline, print};
use crate::{
    inventory::{Document, import},
    snapshot::{
        diff::diff,
        traffic::{Shift, shifts},
    },
};

#[derive(clap::Args)]
pub(super) struct Diff {
    /// The file that runs.
    old: PathBuf,
    /// The file that shall.
    new: PathBuf,
    /// What clients ask for, as `gateway inventory --json` prints it and `state:` keeps it: says how many requests would go elsewhere.
    #[arg(long, value_name = "FILE")]
    inventory: Option<PathBuf>,
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
        let inventory = self.inventory.as_deref().map(|file| {
            std::fs::read_to_string(file).map_err(|error| error.to_string()).and_then(|text| import::document(&text))
        });
        let inventory = match inventory.transpose() {
            Ok(inventory) => inventory,
            Err(why) => {
                let file = self.inventory.unwrap_or_default();
                eprintln!(
                    "error: `{}`: {why}\nA gateway writes its `state/inventory.json` once a minute; `gateway inventory --json` prints it now.",
                    file.display()
                );
                return Ok(ExitCode::from(BAD_FILE));
            }
        };
        let traffic = inventory.as_ref().map(|inventory| shifts(&old, &new, inventory));
        if self.json {
            let mut told = serde_json::to_value(&difference)?;
            if let Some(traffic) = &traffic {
                told["traffic"] = serde_json::to_value(traffic)?;
            }
            print(&format!("{told:#}\n"));
        } else {
            if let (Some(shifts), Some(inventory)) = (&traffic, &inventory) {
                print(&tell(shifts, inventory));
            }
            print(&difference.to_string());
        }
        let same = difference.is_empty() && traffic.is_none_or(|traffic| traffic.is_empty());
        Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn tell(shifts: &[Shift], inventory: &Document) -> String {
    let all: f64 = inventory.endpoints.iter().map(|endpoint| endpoint.per_hour).sum();
    let moved: f64 = shifts.iter().map(|shift| shift.per_hour).sum();
    let mut out = String::new();
    for Shift { requests, per_hour, from, to } in shifts {
        out.push_str(&format!("{requests}: {} requests an hour, {from} → {to}\n", grouped(*per_hour)));
    }
    let percent = if all > 0.0 { moved * 100.0 / all } else { 0.0 };
    out.push_str(&format!(
        "{} of {} known endpoints and {percent:.1} % of {} requests an hour go elsewhere\n\nby rules, whoever asks:\n",
        shifts.len(),
        inventory.endpoints.len(),
        grouped(all)
    ));
    out
}
