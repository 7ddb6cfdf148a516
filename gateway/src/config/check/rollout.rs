//! Copies and rollouts: pointers that can be read, steps that grow, nothing that writes twice without saying so.

use std::time::Duration;

use http::{Method, Uri, uri::PathAndQuery};

use super::{matching::header_name, upstreams::parse_url};
use crate::{
    config::{
        file::{RouteConfig, Stage},
        rollout::{RolloutConfig, ShadowConfig, WebhookConfig},
        source::{At, Sources},
        values::{OrNone, Share, Size},
    },
    routing::{path::PathPolicy, pattern::Pattern},
    shadow::pointer,
};

/// What may be kept of a body.
const BODY: u64 = 16 * 1024 * 1024;
/// Steps of a rollout.
const STEPS: usize = 20;

pub(super) fn check_webhooks(sources: &mut Sources) {
    let at = At::root(0).down("webhooks");
    for (n, webhook) in sources.file.webhooks.clone().iter().enumerate() {
        check_webhook(sources, &at.down(n), webhook);
    }
    if sources.file.state.is_empty() {
        sources.error(&At::root(0).down("state"), "not a folder: ``".to_owned(), "write a path like `./state`");
    }
}

fn check_webhook(sources: &mut Sources, at: &At, webhook: &WebhookConfig) {
    if let Err(help) = split_url(&webhook.url) {
        sources.error(&at.down("url"), format!("not a URL: `{}`", webhook.url), &help);
    }
    if webhook.secret.as_deref().is_some_and(|secret| crate::rollout::webhook::key(secret).is_none()) {
        let help = "write a text, or `whsec_` and base64";
        sources.error(&at.down("secret"), "not a key".to_owned(), help);
    }
    if !(Duration::from_millis(100)..=Duration::from_mins(1)).contains(&webhook.timeout.0) {
        let help = "from `100ms` to `1m`";
        sources.error(&at.down("timeout"), format!("limit out of bounds: `{}`", webhook.timeout), help);
    }
}

pub(super) fn check_evidence(sources: &mut Sources, at: &At, route: &RouteConfig, paths: PathPolicy) {
    match &route.shadow {
        Some(OrNone::Some(shadow)) => check_shadow(sources, &at.down("shadow"), shadow, paths),
        Some(OrNone::None) if route.stage == Stage::Shadow => sources.error(
            &at.down("shadow"),
            "stage `shadow` without copies".to_owned(),
            "remove `shadow: none`, or write `stage: legacy`",
        ),
        _ => {}
    }
    if let Some(rollout) = &route.rollout {
        check_rollout(sources, &at.down("rollout"), route, rollout);
    }
    if let Some(canary) = &route.canary {
        let at = at.down("canary");
        match (&canary.percent, &route.rollout) {
            (None, None) => sources.error(
                &at.clone().at_key(),
                "canary without a share".to_owned(),
                "add `percent: 1%`, or `rollout: {steps: [1%, 5%, 25%, 50%, 100%]}` beside it",
            ),
            (Some(_), Some(_)) => sources.error(
                &at.down("percent").at_key(),
                "share beside a `rollout:`".to_owned(),
                "the rollout's steps say it; remove one of the two",
            ),
            _ => {}
        }
    }
}

fn check_shadow(sources: &mut Sources, at: &At, shadow: &ShadowConfig, paths: PathPolicy) {
    if shadow.methods.is_empty() {
        sources.error(&at.down("methods"), "no method".to_owned(), "name one, or write `shadow: none`");
    }
    for (n, text) in shadow.methods.iter().enumerate() {
        let at = at.down("methods").down(n);
        match Method::from_bytes(text.as_bytes()) {
            Ok(method) if method == Method::CONNECT => {
                sources.error(&at, format!("method that cannot be copied: `{text}`"), "remove it");
            }
            Ok(method) if !method.is_safe() && shadow.side_effects.is_none() => sources.error(
                &at,
                format!("method with side effects: `{text}`"),
                "the service would do it, too: where that is harmless say `side_effects: accepted`; else remove it",
            ),
            Ok(_) if text.bytes().any(|byte| byte.is_ascii_lowercase()) => {
                let help = format!("methods are case-sensitive; write `{}`", text.to_ascii_uppercase());
                sources.error(&at, format!("not a method: `{text}`"), &help);
            }
            Ok(_) => {}
            Err(_) => sources.error(&at, format!("not a method: `{text}`"), "write one like `GET`"),
        }
    }
    for (n, text) in shadow.exclude.iter().enumerate() {
        if let Err((message, help)) = Pattern::parse(text, paths.case_insensitive) {
            sources.error(&at.down("exclude").down(n), message, &help);
        }
    }
    for (key, list) in [("ignore", &shadow.ignore), ("unordered", &shadow.unordered)] {
        for (n, text) in list.iter().enumerate() {
            if let Err(help) = pointer::Pattern::parse(text) {
                sources.error(&at.down(key).down(n), format!("not a JSON Pointer: `{text}`"), help);
            }
        }
    }
    for (n, text) in shadow.headers.iter().enumerate() {
        header_name(sources, &at.down("headers").down(n), text);
    }
    if !(shadow.tolerance.is_finite() && shadow.tolerance >= 0.0) {
        let help = "write how far apart two numbers may be, like `0.01`";
        sources.error(&at.down("tolerance"), format!("not a tolerance: `{}`", shadow.tolerance), help);
    }
    if shadow.max_body.0 == 0 || shadow.max_body.0 > BODY {
        let help = format!("from `1B` to `{}`: it is kept in memory for each copy", Size(BODY));
        sources.error(&at.down("max_body"), format!("size out of bounds: `{}`", shadow.max_body), &help);
    }
    for (key, number) in [("max_requests", shadow.max_requests), ("max_pending", shadow.max_pending)] {
        if !(1..=10_000).contains(&number) {
            sources.error(&at.down(key), format!("number out of bounds: `{number}`"), "from 1 to 10000");
        }
    }
}

fn check_rollout(sources: &mut Sources, at: &At, route: &RouteConfig, rollout: &RolloutConfig) {
    if rollout.steps.is_empty() || rollout.steps.len() > STEPS {
        let help = format!("write 1 to {STEPS} shares like `[1%, 5%, 25%, 50%, 100%]`");
        sources.error(&at.down("steps"), "not the steps of a rollout".to_owned(), &help);
    }
    let mut before = Share(0);
    for (n, step) in rollout.steps.iter().enumerate() {
        if step.0 <= before.0 {
            let help = format!("each is larger than the one before it, `{before}`");
            sources.error(&at.down("steps").down(n), format!("step that does not grow: `{step}`"), &help);
        }
        before = *step;
    }
    if !(1..=5_000).contains(&rollout.alpha.0) {
        let help = "from `0.01%` to `50%`";
        sources.error(&at.down("alpha"), format!("chance out of bounds: `{}`", rollout.alpha), help);
    }
    let margins = [
        ("errors", rollout.margin.errors),
        ("client_errors", rollout.margin.client_errors),
        ("p99", rollout.margin.p99),
    ];
    for (key, margin) in margins {
        if margin.0 == 0 {
            let help = "nothing can be shown to be no worse at all; write `0.1%` or more";
            sources.error(&at.down("margin").down(key), "no margin".to_owned(), help);
        }
    }
    if rollout.mismatches.0 == 0 {
        let help = "write `0.1%` or more: no finite number of answers shows that none will differ";
        sources.error(&at.down("mismatches"), "no mismatch allowed".to_owned(), help);
    }
    let compares = matches!(route.shadow, Some(OrNone::Some(_)));
    if let Some(parity) = rollout.gates.parity {
        let at = at.down("gates").down("parity");
        if !compares {
            let help = "add `shadow: {percent: 10%}` to the route";
            sources.error(&at.clone().at_key(), "parity of answers that nobody compares".to_owned(), help);
        }
        if parity.0 == 10_000 {
            let help = "write `99.9%`: no finite number of answers shows that none will differ";
            sources.error(&at, "parity that can never be shown: `100%`".to_owned(), help);
        }
    }
    for (n, share) in rollout.gates.manual.iter().enumerate() {
        if !rollout.steps.contains(share) {
            let help = "name shares of `steps:`";
            sources.error(&at.down("gates").down("manual").down(n), format!("not a step: `{share}`"), help);
        }
    }
    if let Some(webhook) = &rollout.gates.webhook {
        check_webhook(sources, &at.down("gates").down("webhook"), webhook);
    }
    if route.stage == Stage::Canary {
        sources.warn(
            &at.clone().at_key(),
            "rollout that one gateway decides".to_owned(),
            "`state:` belongs to one gateway: where several serve this route, each decides for itself; use `canary.percent` there",
        );
    }
}

/// The server and the target of a URL, or what to write.
pub fn split_url(url: &str) -> Result<(String, String), String> {
    let wrong = || "write it like `https://hooks.example.com/gateway`".to_owned();
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(wrong()) };
    let base = format!("{scheme}://{authority}");
    parse_url(&base)?;
    Ok((base, uri.path_and_query().map_or("/", PathAndQuery::as_str).to_owned()))
}
