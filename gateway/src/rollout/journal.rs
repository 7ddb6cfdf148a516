//! What must outlive the process: which routes were put back, where rollouts are, and who changed what, when and why.
//!
//! A change is here, on disk, before it takes effect. Each is one transaction of an embedded store (redb), which is there as a whole
//! after a crash or not at all. It belongs to one process: whoever opens it keeps others out.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use redb::{
    Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata as _, StorageError,
    TableDefinition,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::steps::Position;

/// The file in the folder of `state:`.
const FILE: &str = "journal.redb";
const ROUTES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("routes");
const HISTORY: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("history");
/// Entries that are kept.
const ENTRIES: u64 = 10_000;
/// How long an older process of the same gateway may take to let go of it.
const PATIENCE: Duration = Duration::from_secs(5);
/// Memory of the store's own cache.
const CACHE: usize = 1 << 20;

/// Why there is no journal.
#[derive(Debug, Error)]
pub enum Failure {
    /// Another process has it.
    #[error("`{0}` belongs to another running gateway; give each a `state:` of its own, or stop the other")]
    InUse(PathBuf),
    /// It cannot be read or written.
    #[error("`{0}`: {1}")]
    Unusable(PathBuf, String),
    /// What is in it makes no sense.
    #[error("`{0}` is damaged: {1}")]
    Damaged(PathBuf, String),
}

/// What is known of each route, by name.
pub type Records = HashMap<String, Record>;

/// What is known of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// That a person has put it back.
    pub hold: Option<Held>,
    /// Where its rollout is.
    pub rollout: Option<Recorded>,
}

/// Who put a route back, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// When.
    pub at: jiff::Timestamp,
    /// Who.
    pub who: String,
    /// Why.
    pub why: String,
}

/// Where a rollout is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// What the file says of it, in one number.
    pub fingerprint: u64,
    /// Where it is.
    pub position: Position,
    /// The share, of 10,000.
    pub share: u16,
    /// Since when.
    pub since: jiff::Timestamp,
    /// Why.
    pub why: String,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Counts up.
    #[serde(default)]
    pub id: u64,
    /// When.
    pub at: jiff::Timestamp,
    /// The route.
    pub route: String,
    /// What: `start`, `step`, `complete`, `rollback`, `freeze`, `promote`, `resume`, `end`.
    pub action: String,
    /// Who: the gateway itself, or a person.
    pub who: String,
    /// Why.
    pub why: String,
    /// The share before, in percent.
    pub from: Option<String>,
    /// The share after.
    pub to: Option<String>,
    /// What was known.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub evidence: Value,
}

/// The journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    database: Database,
}

impl Journal {
    /// Opens the journal in a folder, or begins one.
    pub fn open(folder: &Path) -> Result<Self, Failure> {
        let path = folder.join(FILE);
        std::fs::create_dir_all(folder).map_err(|error| Failure::Unusable(path.clone(), error.to_string()))?;
        let opened = Database::builder().set_cache_size(CACHE).set_check_integrity_on_open(true).create(&path);
        match opened {
            Ok(database) => Ok(Self { path, database }),
            Err(DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch) => Err(Failure::InUse(path)),
            Err(DatabaseError::Storage(error)) if is_damage(&error) => Err(Failure::Damaged(path, error.to_string())),
            Err(error) => Err(Failure::Unusable(path, error.to_string())),
        }
    }

    /// Opens the journal that is there, if one is; waits for an older process to let go of it. One that cannot be read is put aside.
    pub fn resume(folder: &Path) -> Result<Option<(Self, Records)>, Failure> {
        let path = folder.join(FILE);
        // Where that cannot be told, opening it says why.
        if let Ok(false) = path.try_exists() {
            return Ok(None);
        }
        let begun = Instant::now();
        let read = loop {
            match Self::open(folder).and_then(|journal| Ok((journal.records()?, journal))) {
                Err(Failure::InUse(_)) if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(50)),
                read => break read,
            }
        };
        match read {
            Ok((records, journal)) => Ok(Some((journal, records))),
            Err(failure @ (Failure::InUse(_) | Failure::Unusable(..))) => Err(failure),
            Err(failure @ Failure::Damaged(..)) => {
                let aside = path.with_extension(format!("broken-{}", jiff::Timestamp::now().as_second()));
                let moved = std::fs::rename(&path, &aside)
                    .map_or_else(|error| error.to_string(), |()| aside.display().to_string());
                tracing::error!(%failure, %moved, "the journal cannot be read: rollouts start at 0 %, routes put back by hand run as the file says");
                Ok(None)
            }
        }
    }

    fn broken(&self, error: &dyn std::fmt::Display) -> Failure {
        Failure::Unusable(self.path.clone(), error.to_string())
    }

    /// What is known of each route.
    fn records(&self) -> Result<Records, Failure> {
        let read = || -> Result<_, redb::Error> {
            let transaction = self.database.begin_read()?;
            let table = match transaction.open_table(ROUTES) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(HashMap::new()),
                table => table?,
            };
            let mut records = HashMap::new();
            for row in table.iter()? {
                let (name, record) = row?;
                let record = serde_json::from_slice(record.value()).unwrap_or_else(|error| {
                    tracing::error!(route = name.value(), %error, "what the journal says of a route cannot be read: it is held at the monolith");
                    let (who, why) = ("gateway".to_owned(), format!("its record in the journal cannot be read: {error}"));
                    Record { hold: Some(Held { at: jiff::Timestamp::now(), who, why }), rollout: None }
                });
                records.insert(name.value().to_owned(), record);
            }
            Ok(records)
        };
        read().map_err(|error| match error {
            redb::Error::Corrupted(why) => Failure::Damaged(self.path.clone(), why),
            error => self.broken(&error),
        })
    }

    /// Writes down a change and what is known of its route from then on; on disk when it is back.
    pub fn write(&self, record: &Record, mut entry: Entry) -> Result<Entry, Failure> {
        let mut write = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            {
                let mut routes = transaction.open_table(ROUTES)?;
                if *record == Record::default() {
                    routes.remove(&*entry.route)?;
                } else {
                    routes.insert(&*entry.route, &*serde_json::to_vec(record).unwrap_or_default())?;
                }
                let mut history = transaction.open_table(HISTORY)?;
                entry.id = history.last()?.map_or(1, |(id, _)| id.value() + 1);
                history.insert(entry.id, &*serde_json::to_vec(&entry).unwrap_or_default())?;
                if history.len()? > ENTRIES {
                    history.pop_first()?;
                }
            }
            transaction.commit()?;
            Ok(())
        };
        write().map_err(|error| self.broken(&error))?;
        Ok(entry)
    }

    /// Makes it say of each route what is known, where it does not.
    pub fn restore(&self, records: &Records) -> Result<(), Failure> {
        let known = self.records()?;
        if records.iter().all(|(name, record)| known.get(name) == Some(record) || *record == Record::default()) {
            return Ok(());
        }
        let write = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            {
                let mut routes = transaction.open_table(ROUTES)?;
                for (name, record) in records.iter().filter(|(_, record)| **record != Record::default()) {
                    routes.insert(&**name, &*serde_json::to_vec(record).unwrap_or_default())?;
                }
            }
            transaction.commit()?;
            Ok(())
        };
        write().map_err(|error| self.broken(&error))
    }

    /// The newest changes, newest first.
    pub fn history(&self, route: Option<&str>, limit: usize) -> Result<Vec<Entry>, Failure> {
        let read = || -> Result<_, redb::Error> {
            let transaction = self.database.begin_read()?;
            let table = match transaction.open_table(HISTORY) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                table => table?,
            };
            let mut entries = Vec::new();
            for row in table.iter()?.rev() {
                let (_, entry) = row?;
                if let Ok(entry) = serde_json::from_slice::<Entry>(entry.value())
                    && route.is_none_or(|route| entry.route == route)
                {
                    entries.push(entry);
                }
                if entries.len() >= limit {
                    break;
                }
            }
            Ok(entries)
        };
        read().map_err(|error| self.broken(&error))
    }
}

/// Whether no reading will ever make sense of it.
fn is_damage(error: &StorageError) -> bool {
    match error {
        StorageError::Corrupted(_) => true,
        StorageError::Io(error) => error.kind() == std::io::ErrorKind::InvalidData,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(route: &str) -> Entry {
        Entry {
            id: 0,
            at: jiff::Timestamp::UNIX_EPOCH,
            route: route.to_owned(),
            action: "step".to_owned(),
            who: "gateway".to_owned(),
            why: "because".to_owned(),
            from: None,
            to: Some("1%".to_owned()),
            evidence: Value::Null,
        }
    }

    #[test]
    fn what_is_written_is_there_again() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Journal::resume(folder.path()).unwrap().is_none());
        let journal = Journal::open(folder.path()).unwrap();
        let hold = Some(Held { at: jiff::Timestamp::UNIX_EPOCH, who: "ann".to_owned(), why: "5xx".to_owned() });
        let record = Record { hold, rollout: None };
        assert_eq!(journal.write(&record, entry("a")).unwrap().id, 1);
        assert_eq!(journal.write(&Record::default(), entry("b")).unwrap().id, 2);
        assert!(matches!(Journal::open(folder.path()), Err(Failure::InUse(_))));
        drop(journal);
        let (journal, records) = Journal::resume(folder.path()).unwrap().unwrap();
        assert_eq!(records, HashMap::from([("a".to_owned(), record.clone())]));
        let ids = |route| journal.history(route, 10).unwrap().iter().map(|entry| entry.id).collect::<Vec<_>>();
        assert_eq!((ids(None), ids(Some("a"))), (vec![2, 1], vec![1]));
        // Another file in its place is told what was known.
        let other = tempfile::tempdir().unwrap();
        Journal::open(other.path()).unwrap().restore(&records).unwrap();
        assert_eq!(Journal::resume(other.path()).unwrap().unwrap().1, records);
    }

    #[test]
    fn what_cannot_be_read_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), vec![7; 10_000]).unwrap();
        assert!(Journal::resume(folder.path()).unwrap().is_none());
        let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
        assert!(names.len() == 1 && names[0].to_string_lossy().contains("broken"), "{names:?}");
    }
}
