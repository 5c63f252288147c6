//! The order journal: one ordered stream of records, made durable in groups.
//!
//! Workers append to a buffer in memory, under the lock of the book concerned where the order of events matters, and get
//! back a position. One thread takes what has gathered, commits it as one entry of a redb table with an fsync, and
//! publishes the position that is durable now; while it waits for the disk, the next group gathers (group commit).
//!
//! *Invariant:* the stream's order is the order in which things happened, and a group ends only between two appends, so
//! what one append wrote is read back whole or not at all.
//!
//! **Durability, honestly.** With `--acknowledge durable`, the default, no byte that depends on a record leaves the gateway
//! before redb has committed it with `Durability::Immediate`: it survives a crash of the process and, as far as the disk
//! honours fsync, of the machine. With `--acknowledge received` messages leave at once and the commit follows within
//! milliseconds: a crash loses what was acknowledged in that time. There is one disk and no replica in either case. The
//! log is compacted when the gateway starts, not while it runs.

use super::record::Record;
use parking_lot::{Condvar, Mutex};
use redb::{Database, Durability, ReadableTable, TableDefinition};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");

/// Largest entry that is written in one piece when a snapshot replaces the log.
const SNAPSHOT_ENTRY_BYTES: usize = 1 << 20;

/// The store can't be used.
#[derive(Debug)]
pub struct StoreError {
    path: PathBuf,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "order journal {}: {}", self.path.display(), self.source)
    }
}

impl std::error::Error for StoreError {}

/// The log on disk.
#[derive(Debug)]
pub struct Store {
    database: Database,
    path: PathBuf,
    next_key: u64,
}

impl Store {
    /// Opens or creates `journal.redb` in a folder.
    ///
    /// # Errors
    /// [`StoreError`] with the path, when it can't be opened, is held by another process or is damaged.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let path = folder.join("journal.redb");
        let fail = |source| StoreError { path: path.clone(), source };
        std::fs::create_dir_all(folder).map_err(|e| fail(e.into()))?;
        let database = Database::create(&path).map_err(|e| fail(e.into()))?;
        Ok(Self { database, path, next_key: 0 })
    }

    fn fail(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
        StoreError { path: self.path.clone(), source: source.into() }
    }

    /// Hands every entry to `each`, oldest first.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be read, or `each` can't make sense of it.
    pub fn replay<E>(&mut self, mut each: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), StoreError>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let transaction = self.database.begin_read().map_err(|e| self.fail(e))?;
        let table = match transaction.open_table(LOG) {
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(()),
            other => other.map_err(|e| self.fail(e))?,
        };
        for entry in table.iter().map_err(|e| self.fail(e))? {
            let (key, bytes) = entry.map_err(|e| self.fail(e))?;
            each(bytes.value()).map_err(|e| self.fail(e))?;
            self.next_key = key.value() + 1;
        }
        Ok(())
    }

    /// Replaces the whole log by a snapshot, in one transaction.
    ///
    /// # Errors
    /// [`StoreError`]; the old log is untouched then.
    pub fn replace(&mut self, snapshot: &[Record]) -> Result<(), StoreError> {
        let transaction = self.database.begin_write().map_err(|e| self.fail(e))?;
        {
            let mut table = transaction.open_table(LOG).map_err(|e| self.fail(e))?;
            table.retain(|_, _| false).map_err(|e| self.fail(e))?;
            let mut bytes = Vec::new();
            let mut records = snapshot.iter().peekable();
            while let Some(record) = records.next() {
                record.encode(&mut bytes);
                if bytes.len() >= SNAPSHOT_ENTRY_BYTES || records.peek().is_none() {
                    table.insert(self.next_key, bytes.as_slice()).map_err(|e| self.fail(e))?;
                    self.next_key += 1;
                    bytes.clear();
                }
            }
        }
        transaction.commit().map_err(|e| self.fail(e))?;
        self.database.compact().map_err(|e| self.fail(e))?;
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let mut transaction = self.database.begin_write().map_err(|e| self.fail(e))?;
        transaction.set_durability(Durability::Immediate);
        {
            let mut table = transaction.open_table(LOG).map_err(|e| self.fail(e))?;
            table.insert(self.next_key, bytes).map_err(|e| self.fail(e))?;
        }
        transaction.commit().map_err(|e| self.fail(e))?;
        self.next_key += 1;
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Gathering {
    bytes: Vec<u8>,
    closed: bool,
}

/// The stream that workers append to.
#[derive(Debug, Default)]
pub struct Journal {
    gathering: Mutex<Gathering>,
    arrived: Condvar,
    /// Bytes ever appended.
    position: AtomicU64,
    /// Bytes that are on disk.
    durable: AtomicU64,
}

/// How a group went.
#[derive(Clone, Copy, Debug)]
pub struct Commit {
    /// Bytes in the group.
    pub bytes: usize,
    /// How long the disk took.
    pub took: Duration,
}

impl Journal {
    /// Appends bytes that belong together.
    pub fn append(&self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let mut gathering = self.gathering.lock();
        let was_empty = gathering.bytes.is_empty();
        gathering.bytes.extend_from_slice(bytes);
        self.position.fetch_add(bytes.len() as u64, Ordering::Release);
        drop(gathering);
        if was_empty {
            self.arrived.notify_one();
        }
    }

    /// Where the stream ends now.
    pub fn position(&self) -> u64 {
        self.position.load(Ordering::Acquire)
    }

    /// Up to where the stream is on disk.
    pub fn durable(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// No more appends will come; [`Journal::persist`] returns when all is on disk.
    pub fn close(&self) {
        self.gathering.lock().closed = true;
        self.arrived.notify_one();
    }

    /// The persistence thread: commits groups until the journal is closed. `linger` is a pause between two groups that
    /// saves work when nobody waits for the disk.
    ///
    /// # Errors
    /// The [`StoreError`] of the group that could not be committed.
    pub fn persist(&self, store: &mut Store, linger: Duration, mut done: impl FnMut(Commit)) -> Result<(), StoreError> {
        let mut group = Vec::new();
        loop {
            let mut gathering = self.gathering.lock();
            while gathering.bytes.is_empty() && !gathering.closed {
                self.arrived.wait(&mut gathering);
            }
            if gathering.bytes.is_empty() {
                return Ok(());
            }
            group.clear();
            std::mem::swap(&mut group, &mut gathering.bytes);
            let closed = gathering.closed;
            drop(gathering);
            let start = Instant::now();
            store.append(&group)?;
            self.durable.fetch_add(group.len() as u64, Ordering::Release);
            done(Commit { bytes: group.len(), took: start.elapsed() });
            if !closed && !linger.is_zero() {
                std::thread::sleep(linger);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gateway_interface::SessionId;

    #[test]
    fn what_is_durable_is_read_back_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::default();
        let mut store = Store::open(folder.path()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| journal.persist(&mut store, Duration::ZERO, |_| {}).unwrap());
            for n in 0..1_000u32 {
                journal.append(&n.to_le_bytes());
            }
            journal.close();
        });
        assert_eq!(journal.durable(), 4_000);
        drop(store);
        let mut seen = Vec::new();
        let mut store = Store::open(folder.path()).unwrap();
        let each = |bytes: &[u8]| {
            seen.extend_from_slice(bytes);
            Ok::<(), std::fmt::Error>(())
        };
        store.replay(each).unwrap();
        let numbers: Vec<u32> = seen.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect();
        assert_eq!(numbers, (0..1_000).collect::<Vec<_>>());
    }

    #[test]
    fn a_snapshot_replaces_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path()).unwrap();
        store.append(b"old").unwrap();
        let snapshot = [Record::Reset { id: SessionId(3) }];
        store.replace(&snapshot).unwrap();
        let mut seen = Vec::new();
        store.replay(|bytes| super::super::record::decode_all(bytes, |r| seen.push(r))).unwrap();
        assert_eq!(seen, snapshot);
    }

    #[test]
    fn a_second_process_is_told_whose_the_store_is() {
        let folder = tempfile::tempdir().unwrap();
        let _first = Store::open(folder.path()).unwrap();
        let error = Store::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("journal.redb"), "{error}");
    }
}
