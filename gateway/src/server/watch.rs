//! Notices that the file, or one that it includes, may have changed.
//!
//! The folders are watched, not the files: editors rename, a `ConfigMap` swaps a link
//! beside the file. Every event is only a "maybe": the text is read, and read again
//! until it stands still, so that a file that is being written is not taken half.

use std::{
    collections::BTreeSet,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;

use crate::config::GLOB;

/// How long the text must stand still.
const STILL: Duration = Duration::from_millis(100);
/// How often to look without an event: some file systems have none.
const POLL: Duration = Duration::from_secs(10);

/// Watches a file and its includes.
pub(super) struct Watch {
    main: PathBuf,
    patterns: Vec<String>,
    watcher: Option<RecommendedWatcher>,
    folders: BTreeSet<PathBuf>,
    events: mpsc::Receiver<()>,
    /// Keeps the channel open where the system gives no watcher.
    _sender: mpsc::Sender<()>,
    /// Nothing at first: the file may have changed since it was loaded, before the watch began.
    seen: Option<u64>,
}

impl Watch {
    /// Starts watching. Without the system's help it still polls.
    pub(super) fn start(main: &Path, patterns: Vec<String>) -> Self {
        let (sender, events) = mpsc::channel(1);
        let kept = sender.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading is an event too, ours included: to look because of it would be to look for ever.
            if event.is_ok_and(|event| event.kind.is_access()) {
                return;
            }
            // One waiting event is as good as many.
            let _ = sender.try_send(());
        });
        let watcher = watcher
            .inspect_err(|error| tracing::warn!(%error, "cannot watch files; looking every {POLL:?} instead"))
            .ok();
        let mut this = Self {
            main: main.to_owned(),
            patterns,
            watcher,
            folders: BTreeSet::new(),
            events,
            _sender: kept,
            seen: None,
        };
        this.follow(None);
        this
    }

    /// Watches what a new file includes too.
    pub(super) fn follow(&mut self, patterns: Option<Vec<String>>) {
        if let Some(patterns) = patterns {
            self.patterns = patterns;
        }
        let mut folders: BTreeSet<PathBuf> = BTreeSet::new();
        for file in self.files() {
            folders.extend(folder(&file));
            // A link into another folder: that one's changes count too.
            folders.extend(std::fs::canonicalize(&file).ok().and_then(|target| folder(&target)));
        }
        for pattern in &self.patterns {
            folders.extend(fixed_folder(pattern));
        }
        if let Some(watcher) = &mut self.watcher {
            for old in self.folders.difference(&folders) {
                let _ = watcher.unwatch(old);
            }
            for new in folders.difference(&self.folders) {
                if let Err(error) = watcher.watch(new, RecursiveMode::NonRecursive) {
                    tracing::warn!(folder = %new.display(), %error, "cannot watch a folder");
                }
            }
        }
        self.folders = folders;
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files = vec![self.main.clone()];
        for pattern in &self.patterns {
            files.extend(glob::glob_with(pattern, GLOB).into_iter().flatten().filter_map(Result::ok));
        }
        files
    }

    /// Of the names and texts as they are now.
    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for file in self.files() {
            (&file, std::fs::read(&file).ok()).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Waits until the text is another than the last time, and stands still.
    pub(super) async fn changed(&mut self) {
        loop {
            if self.seen.is_some() {
                let _ = tokio::time::timeout(POLL, self.events.recv()).await;
            }
            // However busy the folder is, as when a log is written into it, we look no oftener than this.
            tokio::time::sleep(STILL).await;
            let mut before = self.fingerprint();
            if self.seen == Some(before) {
                continue;
            }
            loop {
                tokio::time::sleep(STILL).await;
                let after = self.fingerprint();
                if after == before {
                    break;
                }
                before = after;
            }
            if self.seen != Some(before) {
                self.seen = Some(before);
                return;
            }
        }
    }
}

/// The folder of a pattern before its first wildcard; `[*]` and the like are escapes, not wildcards.
fn fixed_folder(pattern: &str) -> Option<PathBuf> {
    let plain = pattern.replace("[*]", "\u{1}").replace("[?]", "\u{2}").replace("[[]", "\u{3}").replace("[]]", "\u{4}");
    let fixed = plain.split(['*', '?', '[']).next().unwrap_or_default();
    let folder = &fixed[..=fixed.rfind('/')?];
    Some(folder.replace('\u{1}', "*").replace('\u{2}', "?").replace('\u{3}', "[").replace('\u{4}', "]").into())
}

fn folder(file: &Path) -> Option<PathBuf> {
    let parent = file.parent()?;
    Some(if parent.as_os_str().is_empty() { PathBuf::from(".") } else { parent.to_owned() })
}
