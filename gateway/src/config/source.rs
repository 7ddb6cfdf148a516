//! Reading the files and turning each map into its type; what fails to fit is told with its place.
//!
//! Each upstream and each route is read on its own, so that one report shows all
//! errors. Nothing here knows what a valid route means: that is `check`.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;

use super::{
    diagnostic::{Diagnostic, MOST, Report, Severity},
    env,
    file::{FileConfig, IncludedConfig, RouteConfig, UpstreamConfig},
    tree::{Place, Step, Tree, locate},
};

/// A step by name, from the root of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seg {
    /// A map's key.
    Key(String),
    /// A list's index.
    Index(usize),
}

impl From<&str> for Seg {
    fn from(key: &str) -> Self {
        Self::Key(key.to_owned())
    }
}

impl From<usize> for Seg {
    fn from(index: usize) -> Self {
        Self::Index(index)
    }
}

/// Where something stands: a file and a path in it.
#[derive(Clone, Debug)]
pub(super) struct At {
    pub(super) source: usize,
    pub(super) path: Vec<Seg>,
    /// Points at the last step's key instead of its value.
    pub(super) key: bool,
}

impl At {
    pub(super) fn root(source: usize) -> Self {
        Self { source, path: Vec::new(), key: false }
    }

    /// One step further down.
    pub(super) fn down(&self, seg: impl Into<Seg>) -> Self {
        let mut at = self.clone();
        at.path.push(seg.into());
        at.key = false;
        at
    }

    /// The same step's key.
    pub(super) fn at_key(mut self) -> Self {
        self.key = true;
        self
    }
}

/// A value and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Item<T> {
    pub(super) at: At,
    pub(super) value: T,
}

struct Source {
    name: String,
    text: String,
    tree: Tree,
    /// Texts that had variables in them, as written.
    raw: HashMap<Vec<Step>, String>,
}

/// All that was read, and all that was wrong with it so far.
pub(super) struct Sources {
    read: Vec<Source>,
    pub(super) report: Report,
    pub(super) file: FileConfig,
    pub(super) upstreams: Vec<Item<(String, UpstreamConfig)>>,
    pub(super) routes: Vec<Item<RouteConfig>>,
    /// Names of all upstreams, also of those that failed to fit.
    pub(super) upstream_names: Vec<String>,
    pub(super) files: Vec<PathBuf>,
    pub(super) include_patterns: Vec<String>,
    pub(super) hash: u64,
}

impl Sources {
    /// Reads the main file and what it includes.
    pub(super) fn open_all(path: &Path, variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let mut this = Self {
            read: Vec::new(),
            report: Report::default(),
            file: FileConfig::default(),
            upstreams: Vec::new(),
            routes: Vec::new(),
            upstream_names: Vec::new(),
            files: Vec::new(),
            include_patterns: Vec::new(),
            hash: 0,
        };
        let Some(main) = this.open(path, variable) else {
            return this;
        };
        let tree = this.read[main].tree.clone();
        let own = without_lists(&tree);
        if let Some(file) = this.typed::<FileConfig>(&At::root(main), &own) {
            this.file = file;
        }
        this.lists(main, &tree);
        this.includes(path, variable);
        this.hash = {
            let mut hasher = DefaultHasher::new();
            for source in &this.read {
                (&source.name, &source.text).hash(&mut hasher);
            }
            hasher.finish()
        };
        this
    }

    fn includes(&mut self, main: &Path, variable: &dyn Fn(&str) -> Option<String>) {
        let folder = main.parent().unwrap_or(Path::new(""));
        for (n, pattern) in self.file.include.clone().into_iter().enumerate() {
            let at = At::root(0).down("include").down(n);
            let full = folder.join(&pattern).to_string_lossy().into_owned();
            let paths = match glob::glob(&full) {
                Ok(paths) => paths,
                Err(error) => {
                    self.error(
                        &at,
                        format!("not a pattern: `{pattern}`: {}", error.msg),
                        "write it like `routes.d/*.yaml`",
                    );
                    continue;
                }
            };
            self.include_patterns.push(full.clone());
            let mut paths: Vec<PathBuf> = paths.filter_map(Result::ok).collect();
            paths.sort();
            if paths.is_empty() && !pattern.contains(['*', '?', '[']) {
                self.error(
                    &at,
                    format!("included file not found: `{pattern}`"),
                    "create it, or remove it from `include`",
                );
            }
            for path in paths {
                if self.files.contains(&path) {
                    continue;
                }
                let Some(source) = self.open(&path, variable) else { continue };
                let tree = self.read[source].tree.clone();
                self.typed::<IncludedConfig>(&At::root(source), &without_lists(&tree));
                self.lists(source, &tree);
            }
        }
    }

    /// Reads one file into a tree, checks keys for duplicates and substitutes variables.
    fn open(&mut self, path: &Path, variable: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
        let name = path.display().to_string();
        self.files.push(path.to_owned());
        let bytes = std::fs::read(path).map_err(|error| (error.to_string(), "check the name and its permissions"));
        let text = bytes.and_then(|bytes| {
            String::from_utf8(bytes).map_err(|error| (format!("not UTF-8: {}", error.utf8_error()), "save it as UTF-8"))
        });
        let text = match text {
            Ok(text) => text,
            Err((message, help)) => {
                self.push(Severity::Error, &name, (1, 1), "", format!("cannot read `{name}`: {message}"), help);
                return None;
            }
        };
        let mut tree = match Tree::parse(&text) {
            Ok(tree) => tree,
            Err(error) => {
                self.syntax(&name, &text, &error);
                return None;
            }
        };
        let duplicates = tree.duplicates();
        let mut raw = HashMap::new();
        let mut failed = Vec::new();
        tree.each_text(&mut Vec::new(), &mut |text, steps| match env::substitute(text, variable) {
            Ok(None) => {}
            Ok(Some(new)) => {
                raw.insert(steps.to_vec(), std::mem::replace(text, new));
            }
            Err(told) => failed.push((steps.to_vec(), told)),
        });
        let is_map = matches!(tree, Tree::Map(_));
        self.read.push(Source { name, text, tree, raw });
        let source = self.read.len() - 1;
        for (place, key) in duplicates {
            let help = format!("`{key}` stands here already; keep one of the two");
            self.error_at(source, &place, format!("duplicate key: `{key}`"), &help);
        }
        for (steps, (message, help)) in failed {
            self.error_at(source, &Place { steps, key: false }, message, &help);
        }
        if !is_map {
            self.error(&At::root(source), "not a map of keys".to_owned(), "start with `version: 1`");
            return None;
        }
        Some(source)
    }

    /// An error of the YAML parser itself.
    fn syntax(&mut self, name: &str, text: &str, error: &serde_yaml::Error) {
        let (line, column) = error.location().map_or((1, 1), |location| (location.line(), location.column()));
        let message = error.to_string();
        let message = message.split(" at line ").next().unwrap_or(&message);
        let lines: Vec<&str> = text.lines().collect();
        let near = |n: usize| lines.get(n.wrapping_sub(1)).copied().unwrap_or("");
        let flow = |line: &str| {
            line.find('{').is_some_and(|open| {
                let inside = &line[open + 1..];
                !inside.contains(['"', '\'']) && inside.find('/').is_some_and(|slash| inside[slash..].contains('{'))
            })
        };
        let help = if let Some(n) = [line, line.saturating_sub(1)].into_iter().find(|&n| flow(near(n))) {
            let column = near(n).find('{').map_or(1, |open| open + 1);
            let help = "in flow style a value with braces must be quoted: `path: \"/orders/{id}\"`";
            self.push(Severity::Error, name, (n, column), near(n), "not valid YAML: unquoted braces".to_owned(), help);
            return;
        } else if near(line).starts_with('\t') || near(line).trim_start_matches(' ').starts_with('\t') {
            "indent with spaces; YAML takes no tabs"
        } else {
            "look at the indentation, the quotes and the `:` of this line and of the one before"
        };
        self.push(Severity::Error, name, (line, column), near(line), format!("not valid YAML: {message}"), help);
    }

    /// Reads each upstream and each route of one file.
    fn lists(&mut self, source: usize, tree: &Tree) {
        let root = At::root(source);
        match tree.get("upstreams").map(|(_, node)| node) {
            None | Some(Tree::Null) => {}
            Some(Tree::Map(entries)) => {
                for (name, node) in entries {
                    let at = root.down("upstreams").down(name.as_str());
                    self.upstream_names.push(name.clone());
                    if let Some(value) = self.typed(&at, node) {
                        self.upstreams.push(Item { at, value: (name.clone(), value) });
                    }
                }
            }
            Some(_) => self.error(
                &root.down("upstreams"),
                "wrong type: `upstreams` is a map".to_owned(),
                "write `upstreams:`, then each name with its `url:` below it",
            ),
        }
        match tree.get("routes").map(|(_, node)| node) {
            None | Some(Tree::Null) => {}
            Some(Tree::Seq(items)) => {
                for (n, node) in items.iter().enumerate() {
                    let at = root.down("routes").down(n);
                    if let Some(value) = self.typed(&at, node) {
                        self.routes.push(Item { at, value });
                    }
                }
            }
            Some(_) => self.error(
                &root.down("routes"),
                "wrong type: `routes` is a list".to_owned(),
                "write `routes:`, then each route after a `- `",
            ),
        }
    }

    /// Reads a node as a type, or says why it does not fit.
    fn typed<T: DeserializeOwned>(&mut self, at: &At, node: &Tree) -> Option<T> {
        let error = match serde_path_to_error::deserialize(node) {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        let mut at = at.clone();
        for segment in error.path() {
            match segment {
                Segment::Seq { index } => at.path.push(Seg::Index(*index)),
                Segment::Map { key } => at.path.push(Seg::Key(key.clone())),
                Segment::Enum { .. } | Segment::Unknown => {}
            }
        }
        let mut message = error.into_inner().to_string();
        let source = &self.read[at.source];
        // A value from the environment may be a secret: show what the file says instead.
        if let Some(raw) = source.raw.get(&source.place(&at).steps)
            && let Some(Tree::Text(value)) = source.node(&source.place(&at).steps)
            && !value.is_empty()
        {
            message = message.replace(value.as_str(), raw);
        }
        let (message, help, key) = reword(&message);
        if let Some(key) = key {
            if at.path.last() != Some(&Seg::Key(key.clone())) {
                at.path.push(Seg::Key(key));
            }
            at = at.at_key();
        }
        self.error(&at, message, &help);
        None
    }

    /// Whether not even the main file could be read.
    pub(super) fn is_empty(&self) -> bool {
        self.read.is_empty()
    }

    /// Something that makes the file be refused.
    pub(super) fn error(&mut self, at: &At, message: String, help: &str) {
        let place = self.read[at.source].place(at);
        self.error_at(at.source, &place, message, help);
    }

    /// Something allowed that looks wrong.
    pub(super) fn warn(&mut self, at: &At, message: String, help: &str) {
        let place = self.read[at.source].place(at);
        self.tell(Severity::Warning, at.source, &place, message, help);
    }

    /// Line of a place, to name it in another place's error.
    pub(super) fn line(&self, at: &At) -> String {
        let source = &self.read[at.source];
        let (line, _) = locate(&source.text, &source.place(at));
        format!("{}:{line}", source.name)
    }

    fn error_at(&mut self, source: usize, place: &Place, message: String, help: &str) {
        self.tell(Severity::Error, source, place, message, help);
    }

    fn tell(&mut self, severity: Severity, source: usize, place: &Place, message: String, help: &str) {
        let source = &self.read[source];
        // Finding a place reads the file again; past the most that is shown nobody looks.
        let (line, column) =
            if self.report.diagnostics.len() < 2 * MOST { locate(&source.text, place) } else { (1, 1) };
        let name = source.name.clone();
        let text = source.text.lines().nth(line - 1).unwrap_or("").to_owned();
        self.push(severity, &name, (line, column), &text, message, help);
    }

    fn push(
        &mut self,
        severity: Severity,
        file: &str,
        (line, column): (usize, usize),
        text: &str,
        message: String,
        help: &str,
    ) {
        self.report.diagnostics.push(Diagnostic {
            severity,
            file: file.to_owned(),
            line,
            column,
            message,
            help: help.to_owned(),
            source_line: text.to_owned(),
        });
    }
}

impl Source {
    /// The place of a path, or of as much of it as the file has.
    fn place(&self, at: &At) -> Place {
        let mut steps = Vec::new();
        let mut node = &self.tree;
        for seg in &at.path {
            let next = match (seg, node) {
                (Seg::Key(key), _) => node.get(key),
                (Seg::Index(index), Tree::Seq(items)) => items.get(*index).map(|item| (*index, item)),
                (Seg::Index(_), _) => None,
            };
            let Some((step, child)) = next else {
                return Place { steps, key: false };
            };
            steps.push(step);
            node = child;
        }
        Place { steps, key: at.key }
    }

    fn node(&self, steps: &[Step]) -> Option<&Tree> {
        steps.iter().try_fold(&self.tree, |node, &step| match node {
            Tree::Seq(items) => items.get(step),
            Tree::Map(entries) => entries.get(step).map(|(_, value)| value),
            _ => None,
        })
    }
}

/// The main map with its two lists emptied: they are read entry by entry.
fn without_lists(tree: &Tree) -> Tree {
    match tree {
        Tree::Map(entries) => Tree::Map(
            entries
                .iter()
                .map(|(key, value)| {
                    let value = match key.as_str() {
                        "upstreams" => Tree::Map(Vec::new()),
                        "routes" => Tree::Seq(Vec::new()),
                        _ => value.clone(),
                    };
                    (key.clone(), value)
                })
                // Duplicates were told already; the types would tell them again.
                .fold(Vec::new(), |mut kept: Vec<(String, Tree)>, entry| {
                    if !kept.iter().any(|(key, _)| *key == entry.0) {
                        kept.push(entry);
                    }
                    kept
                }),
        ),
        other => other.clone(),
    }
}

/// Turns serde's words into the project's: the message, the next step, and the key at fault if it is one.
fn reword(message: &str) -> (String, String, Option<String>) {
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let known =
        |names: &[&str]| format!("known: {}", names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", "));
    let suggest = |wrong: &str, names: &[&str]| match did_you_mean(wrong, names.iter().copied()) {
        Some(name) => format!("did you mean `{name}`? {}", known(names)),
        None => known(names),
    };
    match (message, quoted.as_slice()) {
        (m, [wrong, names @ ..]) if m.starts_with("unknown field") => {
            (format!("unknown key: `{wrong}`"), suggest(wrong, names), Some((*wrong).to_owned()))
        }
        (m, [wrong, names @ ..]) if m.starts_with("unknown variant") => {
            (format!("unknown word: `{wrong}`"), suggest(wrong, names), None)
        }
        (m, [name, ..]) if m.starts_with("missing field") => {
            (format!("missing key: `{name}`"), format!("add `{name}:` here"), None)
        }
        (m, [name, ..]) if m.starts_with("duplicate field") => {
            (format!("duplicate key: `{name}`"), "keep one of the two".to_owned(), Some((*name).to_owned()))
        }
        (m, _) if m.starts_with("invalid type: ") => {
            let told = m["invalid type: ".len()..].replace("unit value", "an empty value");
            let told = match told.split_once("expected struct ") {
                Some((found, _)) => format!("{found}expected a map of keys"),
                None => told,
            };
            let help = if told.ends_with("expected a string") {
                "put the value in quotes"
            } else {
                "the reference of every key is docs/configuration.md; `gateway schema` prints it for editors"
            };
            (format!("wrong type: {told}"), help.to_owned(), None)
        }
        (m, _) => match m.split_once("; ") {
            Some((message, help)) => (message.to_owned(), help.to_owned(), None),
            None => (m.to_owned(), "the reference of every key is docs/configuration.md".to_owned(), None),
        },
    }
}

/// The known name that a wrong one is closest to, if it is close.
pub(super) fn did_you_mean<'a>(wrong: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names
        .map(|name| (strsim::jaro_winkler(&wrong.to_lowercase(), &name.to_lowercase()), name))
        .filter(|(score, _)| *score > 0.75)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::reword;

    #[test]
    fn serde_words_become_ours() {
        let (message, help, key) = reword("unknown field `percnt`, expected one of `percent`, `by`");
        assert_eq!(message, "unknown key: `percnt`");
        assert_eq!(help, "did you mean `percent`? known: `percent`, `by`");
        assert_eq!(key.as_deref(), Some("percnt"));
        let (message, help, _) = reword("missing field `url`");
        assert_eq!((message.as_str(), help.as_str()), ("missing key: `url`", "add `url:` here"));
        let (message, help, _) = reword("invalid type: integer `1`, expected a string");
        assert_eq!(message, "wrong type: integer `1`, expected a string");
        assert_eq!(help, "put the value in quotes");
    }
}
