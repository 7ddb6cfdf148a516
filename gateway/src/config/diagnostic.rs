//! What is wrong with a file, where, and what to do: one shape for errors and warnings.
//!
//! A diagnostic shows the line as it is written, never with a substituted
//! environment variable.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};
use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The file is refused.
    Error,
    /// The file is taken.
    Warning,
}

/// One thing to say about a file.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// The file, as it was named.
    pub file: String,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// The next step.
    pub help: String,
    /// The line itself.
    pub source_line: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = byte_offset(&self.source_line, self.column);
        let end = start + word_length(&self.source_line[start..]);
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let help = Level::HELP.message(self.help.as_str());
        let snippet = Snippet::source(self.source_line.as_str())
            .line_start(self.line)
            .path(self.file.as_str())
            .annotation(AnnotationKind::Primary.span(start..end));
        let report = [level.primary_title(self.message.as_str()).element(snippet).element(help)];
        f.write_str(&Renderer::plain().render(&report))
    }
}

/// The most errors that one report shows.
pub(super) const MOST: usize = 50;

/// Everything that is to be said about a file and its includes.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// In order of file and line.
    pub diagnostics: Vec<Diagnostic>,
    /// The files that were read.
    #[serde(skip)]
    pub files: Vec<PathBuf>,
    /// The include patterns, resolved: what makes the report obsolete may be a file that is not there yet.
    #[serde(skip)]
    pub include_patterns: Vec<String>,
}

impl Report {
    /// A refusal that no line of the file is to blame for.
    pub fn of(file: &Path, message: String, help: &str) -> Self {
        let diagnostic = Diagnostic {
            severity: Severity::Error,
            file: file.display().to_string(),
            line: 1,
            column: 1,
            message,
            help: help.to_owned(),
            source_line: String::new(),
        };
        Self { diagnostics: vec![diagnostic], ..Self::default() }
    }

    /// Whether the file is refused.
    pub fn has_errors(&self) -> bool {
        self.errors() > 0
    }

    /// How many errors there are.
    pub fn errors(&self) -> usize {
        self.diagnostics.iter().filter(|d| d.severity == Severity::Error).count()
    }

    /// Sorts by file and line and drops repetitions.
    pub fn sort(&mut self) {
        self.diagnostics.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
        self.diagnostics
            .dedup_by(|a, b| (&a.file, a.line, a.column, &a.message) == (&b.file, b.line, b.column, &b.message));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, diagnostic) in self.diagnostics.iter().take(MOST).enumerate() {
            if n > 0 {
                f.write_str("\n\n")?;
            }
            diagnostic.fmt(f)?;
        }
        if let Some(more @ 1..) = self.diagnostics.len().checked_sub(MOST) {
            write!(f, "\n\nand {more} more")?;
        }
        Ok(())
    }
}

impl std::error::Error for Report {}

fn byte_offset(line: &str, column: usize) -> usize {
    line.char_indices().nth(column.saturating_sub(1)).map_or(line.len(), |(offset, _)| offset)
}

/// How much to underline: a quoted text whole, else up to what ends a plain value.
fn word_length(rest: &str) -> usize {
    if let Some(quote @ ('"' | '\'')) = rest.chars().next()
        && let Some(end) = rest[1..].find(quote)
    {
        return end + 2;
    }
    let end = rest.find([',', ']', '}']).unwrap_or(rest.len());
    let end = rest[..end].find(": ").unwrap_or(end);
    let end = rest[..end].find(" #").unwrap_or(end);
    rest[..end].trim_end().trim_end_matches(':').len().max(rest.chars().next().map_or(0, char::len_utf8))
}
