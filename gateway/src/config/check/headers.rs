//! Header edits: names and values that a message can carry, and fields that belong to the gateway.

use http::HeaderName;

use super::matching::{header_name, header_value};
use crate::{
    config::{
        file::{EditConfig, HeadersConfig},
        source::{At, Sources},
    },
    fields,
};

pub(super) fn check_headers(sources: &mut Sources, at: &At, headers: &HeadersConfig) {
    for (side, edit) in [("request", &headers.request), ("response", &headers.response)] {
        check_edit(sources, &at.down(side), edit);
    }
}

fn check_edit(sources: &mut Sources, at: &At, edit: &EditConfig) {
    for (key, map) in [("set", &edit.set), ("add", &edit.add)] {
        for (name, value) in map {
            let at = at.down(key).down(name.as_str());
            if let Some(name) = header_name(sources, &at, name) {
                editable(sources, &at.clone().at_key(), &name);
                header_value(sources, &at, value);
            }
        }
    }
    for (n, name) in edit.remove.iter().enumerate() {
        let at = at.down("remove").down(n);
        if let Some(name) = header_name(sources, &at, name) {
            editable(sources, &at, &name);
        }
    }
}

fn editable(sources: &mut Sources, at: &At, name: &HeaderName) {
    let framing = matches!(name.as_str(), "host" | "content-length" | "trailer" | "via");
    if framing || fields::is_hop_by_hop(name.as_str()) || name.as_str().starts_with("x-gateway-") {
        let help = if name == http::header::HOST {
            "set it with `rewrite: {host: upstream}`"
        } else {
            "it belongs to the gateway; remove this line"
        };
        sources.error(at, format!("header that cannot be edited: `{name}`"), help);
    }
}
