//! routes.yaml: text → tree → types → checked, every error with its line.
//!
//! [`load`] is all or nothing: a [`Config`] has passed every check, so what comes
//! after need not doubt it. Knows nothing of tokio, sockets or the running gateway.

pub mod auth;
pub mod cache;
mod check;
mod diagnostic;
pub mod document;
mod env;
pub mod file;
pub mod policy;
pub mod rollout;
mod source;
pub mod telemetry;
mod tree;
pub mod upstream;
pub mod values;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
};

pub use check::{
    UNROUTED, Url, is_same_listener, open_routes, parse_date, parse_jwks, parse_name, parse_url, prefix_segments,
    read_ca, split_url,
};
pub use diagnostic::{Diagnostic, Report, Severity};
pub use file::{FileConfig, RouteConfig, Stage};
pub use source::GLOB;
use source::Sources;
pub use upstream::UpstreamConfig;

use crate::routing::{path::PathPolicy, table::Rule};

/// A file, with its includes, that passed every check.
#[derive(Clone, Debug)]
pub struct Config {
    /// The main file's own keys; its `upstreams` and `routes` are below, joined with the includes'.
    pub file: FileConfig,
    /// Every upstream, `legacy` among them.
    pub upstreams: BTreeMap<String, UpstreamConfig>,
    /// Every route.
    pub routes: Vec<RouteConfig>,
    /// The rule of each route, in the same order.
    pub rules: Vec<Rule>,
    /// What is allowed but looks wrong, and which files were read: the main one first.
    pub warnings: Report,
    /// A hash over the text of all files.
    pub hash: u64,
    /// Where clients connect.
    pub listen: SocketAddr,
    /// The admin listener.
    pub admin: SocketAddr,
    /// The probes' listener.
    pub health: Option<SocketAddr>,
    /// How paths are read.
    pub paths: PathPolicy,
    /// Whose forwarding headers are believed.
    pub trusted_proxies: Vec<ipnet::IpNet>,
    /// The name servers asked for `dns:` and `srv:`; the system's where there are none.
    pub resolver: Vec<SocketAddr>,
}

impl Config {
    /// A path in the file, relative to the main file's folder.
    pub fn resolve(&self, path: &str) -> PathBuf {
        self.warnings.files.first().and_then(|main| main.parent()).unwrap_or(Path::new("")).join(path)
    }

    /// The name under which a route runs.
    pub fn route_name(route: &RouteConfig) -> &str {
        route.name.as_deref().unwrap_or(&route.matching.path)
    }
}

/// Reads, checks and joins a file and its includes.
///
/// `variable` looks up environment variables.
pub fn load(path: &Path, variable: &dyn Fn(&str) -> Option<String>) -> Result<Config, Report> {
    check::check(Sources::open_all(path, variable))
}

/// [`load`] with the process's own environment.
pub fn load_with_env(path: &Path) -> Result<Config, Report> {
    load(path, &|name| std::env::var(name).ok())
}

/// The admin listener that a file names, whatever else is wrong with the file: at three in the morning it may be half edited.
pub fn admin_of(path: &Path) -> Option<(String, String)> {
    let text = std::fs::read_to_string(path).ok()?;
    let document: serde_yaml::Value = serde_yaml::from_str(&text).ok()?;
    let default = file::AdminConfig::default();
    let read = |value: Option<&serde_yaml::Value>| {
        let text = value?.as_str()?;
        env::substitute(text, &|name| std::env::var(name).ok()).ok()?.or_else(|| Some(text.to_owned()))
    };
    let admin = document.get("admin");
    let listen = read(admin.filter(|admin| admin.is_string())).or_else(|| read(admin?.get("listen")));
    let token = admin.and_then(|admin| read(admin.get("token"))).unwrap_or(default.token);
    Some((listen.unwrap_or(default.listen), token))
}
