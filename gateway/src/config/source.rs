//! Reading the files and turning each map into its type; what fails to fit is told with its place.
//!
//! Each upstream and each route is read on its own, so that one report shows all
//! errors. Nothing here knows what a valid route means: that is `check`.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
};

use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;

use super::{
    auth::VerifierConfig,
    diagnostic::{Diagnostic, MOST, Report, Severity},
    env,
    file::{FileConfig, IncludedConfig, RouteConfig},
    tree::{Place, Step, Tree, locate},
    upstream::UpstreamConfig,
};

/// Shorter values of variables, such as `1`, are no secrets, and would be found in any text.
const SHORTEST_SECRET: usize = 4;

/// Hidden files are no part of a pattern: editors leave locks, a `ConfigMap` its versions.
pub const GLOB: glob::MatchOptions =
    glob::MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// An include pattern below a folder, whatever letters the folder's own name has.
fn resolve(folder: &Path, pattern: &str) -> String {
    if Path::new(pattern).is_absolute() || folder.as_os_str().is_empty() {
        return pattern.to_owned();
    }
    format!("{}/{pattern}", glob::Pattern::escape(&folder.to_string_lossy()))
}

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
    /// The same of verifiers.
    pub(super) verifier_names: Vec<String>,
    /// Whether a file or the list of includes could not be read: what seems to be missing may be there.
    pub(super) incomplete: bool,
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
            verifier_names: Vec::new(),
            incomplete: false,
            hash: 0,
        };
        let Some(main) = this.open(path, variable) else {
            return this;
        };
        let tree = this.read[main].tree.clone();
        this.file = this.top_level(main, &tree);
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

    /// The main file's own keys. Each is tried on its own, so that one that does not fit hides no other.
    fn top_level(&mut self, main: usize, tree: &Tree) -> FileConfig {
        let Tree::Map(mut entries) = without_lists(tree) else { return FileConfig::default() };
        self.verifiers(main, &mut entries);
        let fits = |entry: &(String, Tree)| {
            let fits = self.typed::<FileConfig>(&At::root(main), &Tree::Map(vec![entry.clone()])).is_some();
            self.incomplete |= !fits && entry.0 == "include";
            fits
        };
        let good = entries.into_iter().filter(fits).collect();
        self.typed(&At::root(main), &Tree::Map(good)).unwrap_or_default()
    }

    /// Each verifier on its own, too: one that does not fit is told, and taken out.
    fn verifiers(&mut self, main: usize, entries: &mut [(String, Tree)]) {
        for (key, node) in entries.iter_mut().filter(|(key, _)| key == "auth") {
            let Tree::Map(verifiers) = node else { continue };
            let at = At::root(main).down(key.as_str());
            self.verifier_names.extend(verifiers.iter().map(|(name, _)| name.clone()));
            verifiers.retain(|(name, node)| self.typed::<VerifierConfig>(&at.down(name.as_str()), node).is_some());
        }
    }

    fn includes(&mut self, main: &Path, variable: &dyn Fn(&str) -> Option<String>) {
        let folder = main.parent().unwrap_or(Path::new(""));
        for (n, pattern) in self.file.include.clone().into_iter().enumerate() {
            let at = At::root(0).down("include").down(n);
            let full = resolve(folder, &pattern);
            let found = match glob::glob_with(&full, GLOB) {
                Ok(found) => found,
                Err(error) => {
                    let message = format!("not a pattern: `{pattern}`: {}", error.msg);
                    self.error(&at, message, "write it like `routes.d/*.yaml`");
                    continue;
                }
            };
            self.report.include_patterns.push(full.clone());
            let mut paths = Vec::new();
            for path in found {
                match path {
                    Ok(path) => paths.push(path),
                    Err(error) => {
                        self.incomplete = true;
                        self.error(
                            &at,
                            format!("cannot look for included files: {error}"),
                            "check the folder and its permissions",
                        );
                    }
                }
            }
            paths.sort();
            if paths.is_empty() && pattern.contains(['*', '?', '[']) {
                self.warn(
                    &at,
                    format!("no file matches: `{pattern}`"),
                    "check the folder's name, or remove it from `include`",
                );
            } else if paths.is_empty() {
                let message = format!("included file not found: `{pattern}`");
                self.incomplete = true;
                self.error(&at, message, "create it, or remove it from `include`");
            }
            for path in paths {
                if self.report.files.contains(&path) {
                    continue;
                }
                let Some(source) = self.open(&path, variable) else {
                    self.incomplete = true;
                    continue;
                };
                let tree = self.read[source].tree.clone();
                self.typed::<IncludedConfig>(&At::root(source), &without_lists(&tree));
                self.lists(source, &tree);
            }
        }
    }

    /// Reads one file into a tree, checks keys for duplicates and substitutes variables.
    fn open(&mut self, path: &Path, variable: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
        let name = path.display().to_string();
        self.report.files.push(path.to_owned());
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
        let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
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
        // A `{` that begins a flow map, and another one inside it that is part of a path.
        let flow = |line: &str| {
            let open = line.match_indices('{').map(|(at, _)| at).find(|&at| {
                let before = line[..at].trim_end();
                before.is_empty() || before.ends_with([':', '-', ',', '[', '{'])
            })?;
            let inside = &line[open + 1..];
            let bare = inside.find(": /").map(|at| inside[at..].split([',', '}']).next().unwrap_or_default())?;
            (bare.contains('{') && !bare.contains(['"', '\''])).then_some(open + 1)
        };
        let found = [line, line.saturating_sub(1)].into_iter().find_map(|n| Some((n, flow(near(n))?)));
        let help = if let Some((n, column)) = found {
            let help = "in flow style a value with braces must be quoted: `path: \"/orders/{id}\"`";
            let message = format!("not valid YAML: {message}");
            self.push(Severity::Error, name, (n, column), near(n), message, help);
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
        let message = error.into_inner().to_string();
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

    /// A path that the file names, relative to it.
    pub(super) fn beside(&self, path: &str) -> std::path::PathBuf {
        self.report.files.first().and_then(|main| main.parent()).unwrap_or(Path::new("")).join(path)
    }

    /// Whether the file says anything there.
    pub(super) fn has(&self, at: &At) -> bool {
        self.read.get(at.source).is_some_and(|source| source.place(at).steps.len() == at.path.len())
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
        if self.is_full() {
            return String::new();
        }
        let source = &self.read[at.source];
        let (line, _) = locate(&source.text, &source.place(at));
        format!("{}:{line}", source.name)
    }

    fn error_at(&mut self, source: usize, place: &Place, message: String, help: &str) {
        self.tell(Severity::Error, source, place, message, help);
    }

    /// Whether nobody would see another error: finding its place reads the file again.
    fn is_full(&self) -> bool {
        self.report.diagnostics.len() > 2 * MOST
    }

    fn tell(&mut self, severity: Severity, source: usize, place: &Place, message: String, help: &str) {
        if self.is_full() {
            return;
        }
        let source = &self.read[source];
        let (line, column) = locate(&source.text, place);
        let name = source.name.clone();
        let text = source.text.lines().nth(line - 1).unwrap_or("").to_owned();
        self.push(severity, &name, (line, column), &text, message, help);
    }

    /// What the file says in place of what variables made of it: the value may be a secret.
    fn unsubstituted(&self, mut text: String) -> String {
        for source in &self.read {
            for (steps, raw) in &source.raw {
                if let Some(Tree::Text(value)) = source.node(steps)
                    && value.len() >= SHORTEST_SECRET
                {
                    text = text.replace(value.as_str(), raw).replace(&value.escape_debug().to_string(), raw);
                }
            }
        }
        text
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
            message: self.unsubstituted(message),
            help: self.unsubstituted(help.to_owned()),
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
