//! One JSON line a request, on standard output.
//!
//! A worker formats into a buffer of its own and hands whole blocks to one writer
//! thread. A reader that does not keep up costs lines, which are counted, never
//! requests. Never a credential, never a query.

use std::{
    cell::RefCell,
    io::Write,
    sync::{
        Arc,
        atomic::Ordering::Relaxed,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::metrics::ProcessStats;

/// A block that is handed over at once.
const BLOCK: usize = 64 * 1024;
/// How long the end waits for a reader.
const LAST: Duration = Duration::from_secs(2);
/// Blocks that may wait for the writer.
const WAITING: usize = 64;

/// One line.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    /// When the request came, RFC 3339.
    pub time: &'a str,
    /// The id that the upstream got too.
    pub request_id: &'a str,
    /// The client's address, as far as it can be believed.
    pub client: std::net::IpAddr,
    /// The method.
    pub method: &'a str,
    /// The host asked for.
    pub host: &'a str,
    /// The path asked for, without its query.
    pub path: &'a str,
    /// `HTTP/1.1` or `HTTP/2.0`.
    pub protocol: &'static str,
    /// The status; 0 where the client left before there was one.
    pub status: u16,
    /// The route's name.
    pub route: &'a str,
    /// Its stage.
    pub stage: &'static str,
    /// Who answered.
    pub arm: &'static str,
    /// Why that one.
    pub why: &'static str,
    /// The cohort bucket, where a key had one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bucket: Option<u16>,
    /// The upstream asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<&'a str>,
    /// To the end of the response's body.
    pub duration_ms: f64,
    /// To the response's head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_ms: Option<f64>,
    /// Of the request's body.
    pub bytes_in: u64,
    /// Of the response's body, or of the tunnel to the client.
    pub bytes_out: u64,
    /// Whether the client had all of it.
    pub complete: bool,
    /// What went wrong, in words of RFC 9209.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<&'static str>,
    /// More about that.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub detail: &'a str,
}

/// The writer thread, and where blocks go.
pub struct Writer {
    sender: SyncSender<Vec<u8>>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Starts the thread.
    pub fn start(sink: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (sender, receiver) = sync_channel(WAITING);
        let thread = std::thread::Builder::new().name("access-log".to_owned()).spawn(move || write(sink, &receiver))?;
        Ok(Self { sender, thread })
    }

    /// A worker's end.
    pub fn log(&self, stats: Arc<ProcessStats>) -> AccessLog {
        AccessLog { buffer: RefCell::default(), sender: self.sender.clone(), stats }
    }

    /// Waits until everything is written, but not for a reader that has stopped reading. The workers' ends must be gone.
    pub fn finish(self) {
        drop(self.sender);
        let until = Instant::now() + LAST;
        while !self.thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn write(mut sink: impl Write, receiver: &Receiver<Vec<u8>>) {
    while let Ok(block) = receiver.recv() {
        // A closed pipe is the reader's wish; the gateway goes on.
        let _ = sink.write_all(&block).and_then(|()| sink.flush());
    }
}

/// A worker's end of the access log.
pub struct AccessLog {
    buffer: RefCell<Vec<u8>>,
    sender: SyncSender<Vec<u8>>,
    stats: Arc<ProcessStats>,
}

impl AccessLog {
    /// Adds a line.
    pub fn write(&self, line: &Line<'_>) {
        let mut buffer = self.buffer.borrow_mut();
        if serde_json::to_writer(&mut *buffer, line).is_ok() {
            buffer.push(b'\n');
        }
        if buffer.len() >= BLOCK {
            drop(buffer);
            self.flush();
        }
    }

    /// Hands over what there is.
    pub fn flush(&self) {
        let mut buffer = self.buffer.borrow_mut();
        if buffer.is_empty() {
            return;
        }
        let block = std::mem::replace(&mut *buffer, Vec::with_capacity(BLOCK + 1024));
        if let Err(TrySendError::Full(block)) = self.sender.try_send(block) {
            let lines = block.split(|byte| *byte == b'\n').count() - 1;
            self.stats.log_dropped.fetch_add(lines as u64, Relaxed);
        }
    }
}

impl Drop for AccessLog {
    /// At the end of a drain nothing else is left to do, so the last block may wait a little for room.
    fn drop(&mut self) {
        let mut block = std::mem::take(&mut *self.buffer.borrow_mut());
        let until = Instant::now() + LAST;
        while !block.is_empty() && Instant::now() < until {
            match self.sender.try_send(block) {
                Err(TrySendError::Full(back)) => block = back,
                _ => return,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
