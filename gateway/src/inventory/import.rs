//! What others know of a monolith's endpoints: OpenAPI documents, access logs, and inventories of another gateway.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read as _},
    path::Path,
};

use jiff::{Timestamp, fmt::strtime};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Document, Endpoint, Inventory,
    counts::{Seconds, Seen, seconds},
    tree::{METHODS, Request, method_number},
};
use crate::{
    routing::path::{self, PathPolicy},
    telemetry::metrics::Arm,
};

/// The longest line of a log that is read.
const LINE: u64 = 64 * 1024;
/// The largest document.
const DOCUMENT: u64 = 64 * 1024 * 1024;

/// What a file came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// Endpoints of a document.
    pub endpoints: usize,
    /// Lines of a log.
    pub lines: u64,
    /// Those of them that could not be read.
    pub unreadable: u64,
}

/// Reads a file, whatever it is, into an inventory.
pub fn read(file: &Path, into: &mut Inventory, paths: PathPolicy) -> Result<Read, String> {
    let open = || File::open(file).map_err(|error| error.to_string());
    let mut reader = BufReader::new(open()?);
    let start = reader.fill_buf().map_err(|error| error.to_string())?;
    if start.starts_with(&[0x1f, 0x8b]) {
        return Err("it is compressed; write `zcat FILE | gateway inventory --from /dev/stdin`".to_owned());
    }
    // A log may begin with lines that are none: what came before a request was whole. A log of this gateway has an object a
    // line; a document is one object, of many lines or of one.
    let mut lines = start.split(|byte| *byte == b'\n').take(100);
    if lines.any(|line| own(line).or_else(|| combined(&String::from_utf8_lossy(line))).is_some()) {
        return log(&mut reader, into, paths);
    }
    let mut text = String::new();
    let size = reader.take(DOCUMENT + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if size as u64 > DOCUMENT {
        return Err(format!("larger than {} MiB", DOCUMENT >> 20));
    }
    let document = document(&text)?;
    let endpoints = into.merge(&document, paths.case_insensitive, seconds(Timestamp::now()))?;
    if let (Some(since), Some(until)) = (document.since, document.until) {
        into.spans(seconds(since), seconds(until));
    }
    Ok(Read { endpoints, ..Read::default() })
}

/// A document: an inventory, or an OpenAPI document in JSON or YAML.
pub fn document(text: &str) -> Result<Document, String> {
    let help = "an OpenAPI document, an access log in the combined format, or an inventory as `gateway inventory --json` prints it";
    // JSON is YAML, too, but its own reader is faster.
    let value: Value = match serde_json::from_str(text) {
        Ok(value) => value,
        Err(_) => {
            serde_yaml::from_str(text).map_err(|error| format!("neither JSON nor YAML ({error}); wanted: {help}"))?
        }
    };
    if value["endpoints"].is_array() {
        return Document::deserialize(value).map_err(|error| error.to_string());
    }
    let Some(paths) = value["paths"].as_object() else {
        return Err(format!("it has no `paths`; wanted: {help}"));
    };
    Ok(openapi(&value, paths))
}

/// The endpoints of an OpenAPI document (2.0, 3.0, 3.1): its paths and methods, below the path of its first server.
fn openapi(document: &Value, paths: &Map<String, Value>) -> Document {
    let base = match document["servers"][0]["url"].as_str() {
        // The path of the URL, which may be one itself.
        Some(url) => {
            let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
            rest.find('/').map_or("", |at| &rest[at..])
        }
        None => document["basePath"].as_str().unwrap_or_default(),
    };
    let base = base.trim_end_matches('/');
    let mut endpoints = Vec::new();
    for (path, operations) in paths {
        // What else stands beside the methods of a path is none.
        for method in operations.as_object().into_iter().flatten().map(|(word, _)| word.to_ascii_uppercase()) {
            let known = METHODS.contains(&method.as_str()) && method != "OTHER";
            if known || method == "TRACE" {
                let method = if known { method } else { "OTHER".to_owned() };
                let path = format!("{base}{path}");
                endpoints.push(Endpoint { method, path, documented: true, ..Endpoint::default() });
            }
        }
    }
    Document { endpoints, ..Document::default() }
}

/// A line of this gateway's own access log, as far as it is read.
#[derive(Deserialize)]
struct Line {
    time: Timestamp,
    method: String,
    path: String,
    status: u16,
    #[serde(default)]
    route: String,
    arm: String,
    duration_ms: f64,
    complete: bool,
}

/// What a line of a log says.
struct Logged {
    method: u8,
    path: String,
    route: String,
    arm: Arm,
    seen: Seen,
}

fn log(reader: &mut impl BufRead, into: &mut Inventory, paths: PathPolicy) -> Result<Read, String> {
    let mut read = Read::default();
    let mut span: Option<(Seconds, Seconds)> = None;
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = reader.by_ref().take(LINE).read_until(b'\n', &mut line).map_err(|error| error.to_string())?;
        if length == 0 {
            if let Some((from, to)) = span {
                into.spans(from, to);
            }
            return Ok(read);
        }
        let whole = line.ends_with(b"\n") || (length as u64) < LINE;
        read.lines += 1;
        let logged =
            if line.starts_with(b"{") { own(&line) } else { combined(String::from_utf8_lossy(&line).trim_end()) };
        let taken = logged.filter(|_| whole).is_some_and(|logged| {
            let (from, to) = span.unwrap_or((logged.seen.at, logged.seen.at));
            span = Some((from.min(logged.seen.at), to.max(logged.seen.at)));
            take(&logged, into, paths)
        });
        read.unreadable += u64::from(!taken);
        while !line.ends_with(b"\n") && length as u64 == LINE {
            line.clear();
            if reader.by_ref().take(LINE).read_until(b'\n', &mut line).map_err(|error| error.to_string())? == 0 {
                break;
            }
        }
    }
}

fn take(logged: &Logged, into: &mut Inventory, paths: PathPolicy) -> bool {
    let path = logged.path.split(['?', '#']).next().unwrap_or_default();
    let Ok(read) = path::read(path, paths) else { return false };
    let route = into.number(&logged.route);
    let request = Request { method: logged.method, route, arm: logged.arm, seen: logged.seen };
    into.take(&String::from_utf8_lossy(&read.key), request);
    true
}

fn own(line: &[u8]) -> Option<Logged> {
    let line: Line = serde_json::from_slice(line).ok()?;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a duration in a log")]
    let micros = (line.duration_ms * 1000.0).clamp(0.0, f64::from(u32::MAX)) as u32;
    let route = if line.route == crate::config::UNROUTED { String::new() } else { line.route };
    Some(Logged {
        method: method_number(&line.method.parse().ok()?),
        path: line.path,
        route,
        arm: Arm::ALL.into_iter().find(|arm| arm.word() == line.arm)?,
        seen: Seen { status: line.status, aborted: !line.complete, micros: Some(micros), at: seconds(line.time) },
    })
}

/// A line of the combined format, or of the common one: what comes after the size is not looked at.
fn combined(line: &str) -> Option<Logged> {
    let (_, rest) = line.split_once('[')?;
    let (time, rest) = rest.split_once(']')?;
    let time = strtime::parse("%d/%b/%Y:%H:%M:%S %z", time).ok()?.to_timestamp().ok()?;
    let rest = rest.trim_start().strip_prefix('"')?;
    let mut end = None;
    let mut escaped = false;
    for (at, byte) in rest.bytes().enumerate() {
        match byte {
            b'"' if !escaped => {
                end = Some(at);
                break;
            }
            b'\\' if !escaped => escaped = true,
            _ => escaped = false,
        }
    }
    let end = end?;
    let mut words = rest[..end].split(' ');
    let (method, target) = (words.next()?, words.next()?);
    let status: u16 = rest[end + 1..].split_whitespace().next()?.parse().ok()?;
    // What is no request line was answered 400, and is nobody's endpoint.
    let method: http::Method = method.parse().ok()?;
    // A whole URL, as clients of proxies send it; one in a query is none.
    let target = match target.split_once("://") {
        Some((scheme, rest)) if !scheme.starts_with('/') => rest.find('/').map_or("/", |at| &rest[at..]),
        _ => target,
    };
    Some(Logged {
        method: method_number(&method),
        path: target.to_owned(),
        route: String::new(),
        arm: Arm::Legacy,
        // nginx's word for a client that has left.
        seen: Seen { status, aborted: status == 499, micros: None, at: seconds(time) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_combined_and_the_common_format_are_read() {
        let line = r#"192.0.2.1 - frank [28/Nov/2026:13:55:36 +0100] "GET /api/orders/42?x=1 HTTP/1.1" 200 2326 "-" "Mozilla/5.0 \"odd\"""#;
        let read = combined(line).unwrap();
        assert_eq!((read.method, read.path.as_str(), read.seen.status), (0, "/api/orders/42?x=1", 200));
        assert_eq!(i64::from(read.seen.at), "2026-11-28T12:55:36Z".parse::<Timestamp>().unwrap().as_second());
        assert!(combined(r#"h - - [28/Nov/2026:13:55:36 +0000] "POST /a\"b HTTP/1.1" 500 -"#).is_some());
        // What a query says is nobody's path.
        let path = |target: &str| {
            combined(&format!("h - - [28/Nov/2026:13:55:36 +0000] \"GET {target} HTTP/1.1\" 200 1")).unwrap().path
        };
        assert_eq!(path("/login?next=http://shop.example/admin"), "/login?next=http://shop.example/admin");
        assert_eq!(path("http://shop.example/orders/1"), "/orders/1");
        for bad in [
            "",
            "GET / HTTP/1.1",
            r#"h - - [28/Nov/2026:13:55:36 +0000] "\x16\x03" 400 0"#,
            r#"h - - [soon] "GET / HTTP/1.1" 200 1"#,
        ] {
            assert!(combined(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn endpoints_of_openapi_documents_of_all_versions() {
        let two = r#"{"swagger": "2.0", "basePath": "/v2/", "paths": {"/pets/{petId}": {"get": {}, "parameters": [], "delete": {}}}}"#;
        let three = "openapi: 3.1.0\nservers: [{url: 'https://api.example.com/v3'}]\npaths:\n  /pets:\n    post: {operationId: add}\n    summary: pets\n";
        let told = |text| -> Vec<String> {
            document(text).unwrap().endpoints.iter().map(|e| format!("{} {}", e.method, e.path)).collect()
        };
        assert_eq!(told(two), ["DELETE /v2/pets/{petId}", "GET /v2/pets/{petId}"]);
        assert_eq!(told(three), ["POST /v3/pets"]);
        assert!(document("{\"a\": 1}").unwrap_err().contains("no `paths`"));
        assert!(document("a: [").is_err());
    }
}
