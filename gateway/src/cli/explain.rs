//! `gateway explain`

use std::{net::IpAddr, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, anyhow};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};

use super::{offline, print};
use crate::{claims::Claims, snapshot::explain::explain};

#[derive(clap::Args)]
pub(super) struct Explain {
    /// The request's method.
    method: Method,
    /// Its URL, or its path alone.
    url: Uri,
    /// A field of its head.
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// The file.
    #[arg(long, default_value = "routes.yaml", value_name = "FILE")]
    config: PathBuf,
    /// The address that it comes from, for cohorts by `ip`.
    #[arg(long, default_value = "127.0.0.1", value_name = "IP")]
    client: IpAddr,
    /// A claim of its token, taken for verified: for cohorts by claim.
    #[arg(long = "claim", value_name = "NAME=VALUE")]
    claims: Vec<String>,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

impl Explain {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let mut headers = HeaderMap::new();
        for text in &self.headers {
            let (name, value) =
                text.split_once(':').ok_or_else(|| anyhow!("not a header: `{text}`; write `name: value`"))?;
            let name: HeaderName = name.trim().parse().with_context(|| format!("not a header's name: `{name}`"))?;
            let value: HeaderValue =
                value.trim().parse().with_context(|| format!("not a header's value: `{value}`"))?;
            headers.append(name, value);
        }
        let mut claims = Vec::new();
        for text in &self.claims {
            let (name, value) =
                text.split_once('=').ok_or_else(|| anyhow!("not a claim: `{text}`; write `NAME=VALUE`"))?;
            claims.push((name.into(), value.into()));
        }
        let (_, snapshot) = offline(&self.config)?;
        let mut told = explain(&snapshot, &self.method, &self.url, headers, &Claims::new(claims), self.client);
        let route = snapshot.routes.iter().find(|route| *route.name == *told.route);
        if route.is_some_and(|route| route.rollout.is_some()) {
            let note = "asked of the file alone: the share of a rollout is known to the running gateway (`gateway status`, `POST /api/explain`)";
            told.policies.push(note.to_owned());
        }
        if self.json {
            print(&format!("{:#}\n", serde_json::to_value(&told)?));
        } else {
            print(&told.to_string());
        }
        Ok(ExitCode::SUCCESS)
    }
}
