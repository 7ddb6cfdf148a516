//! The language for editors and for people: its JSON Schema, and the reference made from that.

use std::fmt::Write as _;

use serde_json::Value;

use super::file::FileConfig;

/// The JSON Schema of routes.yaml.
pub fn schema() -> Value {
    schemars::schema_for!(FileConfig).to_value()
}

/// `docs/configuration.md`.
pub fn markdown() -> String {
    let schema = schema();
    let mut page = String::from(
        "# routes.yaml: every key\n\n\
         Made from the schema by `gateway schema --markdown`; a test compares the two. `gateway schema` prints the schema itself, for editors:\n\
         put `# yaml-language-server: $schema=routes.schema.json` on the first line of the file.\n\n\
         Durations are written `250ms`, `5s`, `10m`, `1h`; sizes `512B`, `64KiB`, `10MiB`, `1GiB`; shares `10%`, `0.5%`. In any string value\n\
         `${NAME}` and `${NAME:-default}` take environment variables. An unknown key is an error.\n",
    );
    section(&mut page, "The file", &schema);
    if let Some(definitions) = schema["$defs"].as_object() {
        for (name, definition) in definitions {
            if definition["properties"].is_object() || definition["oneOf"].is_array() {
                section(&mut page, name, definition);
            }
        }
    }
    page
}

fn section(page: &mut String, title: &str, node: &Value) {
    let _ = write!(page, "\n## {}\n\n", heading(title));
    if let Some(text) = node["description"].as_str() {
        let _ = writeln!(page, "{text}\n");
    }
    if let Some(words) = node["oneOf"].as_array() {
        page.push_str("| word | meaning |\n|---|---|\n");
        for word in words {
            let text = word["description"].as_str().unwrap_or_default();
            let _ = writeln!(page, "| `{}` | {} |", word["const"].as_str().unwrap_or_default(), cell(text));
        }
        return;
    }
    let required: Vec<&str> = node["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    page.push_str("| key | value | default | meaning |\n|---|---|---|---|\n");
    for (key, value) in node["properties"].as_object().into_iter().flatten() {
        let default = if required.contains(&key.as_str()) { "*required*".to_owned() } else { default(value) };
        let text = value["description"].as_str().unwrap_or_default();
        let _ = writeln!(page, "| `{key}` | {} | {default} | {} |", kind(value), cell(text));
    }
}

/// `TimeoutConfig` as a heading: `timeout`.
fn heading(name: &str) -> String {
    let bare = name.strip_suffix("Config").unwrap_or(name);
    let mut out = String::new();
    for (n, c) in bare.chars().enumerate() {
        if c.is_uppercase() && n > 0 && bare != "The file" {
            out.push('_');
        }
        out.push(if bare == "The file" { c } else { c.to_ascii_lowercase() });
    }
    out
}

fn kind(node: &Value) -> String {
    if let Some(reference) = node["$ref"].as_str() {
        let name = heading(reference.rsplit('/').next().unwrap_or_default());
        return format!("[{name}](#{name})");
    }
    if let Some(word) = node["const"].as_str() {
        return format!("`{word}`");
    }
    if let Some(choices) = node["anyOf"].as_array() {
        let kinds: Vec<String> = choices.iter().filter(|choice| choice["type"] != "null").map(kind).collect();
        return kinds.join(" or ");
    }
    if let Some(title) = node["title"].as_str() {
        return title.to_owned();
    }
    let plain = match &node["type"] {
        Value::String(name) => name.clone(),
        Value::Array(names) => {
            names.iter().filter_map(Value::as_str).find(|name| *name != "null").unwrap_or_default().to_owned()
        }
        _ => String::new(),
    };
    match plain.as_str() {
        "array" => format!("list of {}", kind(&node["items"])),
        "object" => format!("map to {}", kind(&node["additionalProperties"])),
        "integer" => "number".to_owned(),
        _ => plain,
    }
}

fn default(node: &Value) -> String {
    match &node["default"] {
        Value::String(text) if text.is_empty() => "empty".to_owned(),
        Value::String(text) => format!("`{text}`"),
        Value::Array(items) if items.is_empty() => "empty".to_owned(),
        Value::Array(items) if items.iter().all(|item| item.is_string() || item.is_number()) => {
            let words = items.iter().map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned));
            format!("`[{}]`", words.collect::<Vec<_>>().join(", "))
        }
        Value::Null | Value::Object(_) | Value::Array(_) => "–".to_owned(),
        other => format!("`{other}`"),
    }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}
