//! Where logs and traces go, and what routes are counted under.

use std::time::Duration;

use http::{HeaderName, HeaderValue};

use super::rollout::split_url;
use crate::config::{
    RouteConfig,
    source::{At, Sources},
    values::OrNone,
};

/// Tags of one route.
const TAGS: usize = 10;

pub(super) fn check_telemetry(sources: &mut Sources) {
    let root = At::root(0);
    if sources.file.access_log.to.is_empty() {
        let help = "write `stdout`, `none`, or a file like `access.log`";
        sources.error(&root.down("access_log"), "nowhere to log to: ``".to_owned(), help);
    }
    if let OrNone::Some(inventory) = sources.file.inventory.clone()
        && inventory.retire_after.0 < Duration::from_secs(1)
    {
        let at = root.down("inventory").down("retire_after");
        sources.error(
            &at,
            format!("limit out of bounds: `{}`", inventory.retire_after),
            "`1s` or more; days are what it is for: `168h`",
        );
    }
    let Some(tracing) = sources.file.tracing.clone() else { return };
    let at = root.down("tracing");
    if let Err(help) = split_url(&tracing.otlp) {
        let help = format!("{help}; a collector is like `http://127.0.0.1:4318`");
        sources.error(&at.down("otlp"), format!("not a URL: `{}`", tracing.otlp), &help);
    }
    if tracing.service.is_empty() {
        sources.error(&at.down("service"), "no name: ``".to_owned(), "write a name like `gateway`");
    }
    for (name, value) in &tracing.headers {
        if HeaderName::try_from(name.as_str()).is_err() || HeaderValue::try_from(value.as_str()).is_err() {
            let message = format!("not a header field: `{}`", name.escape_debug());
            sources.error(&at.down("headers"), message, "write `name: value`");
        }
    }
}

pub(super) fn check_tags(sources: &mut Sources, at: &At, route: &RouteConfig) {
    let good = |tag: &String| {
        (1..=40).contains(&tag.len()) && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte))
    };
    for (n, tag) in route.tags.iter().enumerate() {
        if !good(tag) {
            let help = "use up to 40 letters, digits, `-`, `_`, `.` and `/`";
            sources.error(&at.down("tags").down(n), format!("not a tag: `{}`", tag.escape_debug()), help);
        }
    }
    if route.tags.len() > TAGS {
        sources.error(&at.down("tags"), format!("too many tags: {}", route.tags.len()), &format!("{TAGS} at most"));
    }
}
