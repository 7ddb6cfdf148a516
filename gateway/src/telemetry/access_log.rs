//! One JSON line a request, on standard output or in a file.
//!
//! A worker formats into a buffer of its own and hands whole blocks to one writer
//! thread. A reader that does not keep up costs lines, which are counted, never
//! requests. Never a credential, never a query.

use std::{
    cell::RefCell,
    fs::File,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::Ordering::Relaxed,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::metrics::ProcessStats;
use crate::{fields::hex, snapshot::LogTo};

/// A block that is handed over at once.
const BLOCK: usize = 64 * 1024;
/// How long the end waits for a reader.
const LAST: Duration = Duration::from_secs(2);
/// Blocks that may wait for the writer.
const WAITING: usize = 64;

/// One line.
#[derive(Debug)]
pub struct Line<'a> {
    /// When the request came: the second as RFC 3339 has it, and the milliseconds.
    pub time: (&'a str, u32),
    /// The id that the upstream got too.
    pub request_id: &'a [u8],
    /// The trace that it is part of, where there are any.
    pub trace: Option<u128>,
    /// The client's address, as far as it can be believed.
    pub client: &'a [u8],
    /// The method.
    pub method: &'a str,
    /// The host asked for.
    pub host: &'a [u8],
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
    pub bucket: Option<u16>,
    /// The upstream asked.
    pub upstream: Option<&'a str>,
    /// To the end of the response's body.
    pub duration: Duration,
    /// To the response's head.
    pub head: Option<Duration>,
    /// Of the request's body.
    pub bytes_in: u64,
    /// Of the response's body, or of the tunnel to the client.
    pub bytes_out: u64,
    /// Whether the client had all of it.
    pub complete: bool,
    /// Tries at upstreams.
    pub attempts: u32,
    /// The service in whose place the monolith answered, and why.
    pub fallback: Option<(&'a str, &'static str)>,
    /// What the cache did.
    pub cache: Option<&'static str>,
    /// The time limit that fired.
    pub limit: Option<&'static str>,
    /// What went wrong, in words of RFC 9209.
    pub error: Option<&'static str>,
    /// More about that.
    pub detail: &'a str,
}

impl Line<'_> {
    /// Written by hand: this is done for every request, and costs a quarter of what a serialiser does.
    fn write(&self, out: &mut Vec<u8>) {
        out.reserve(640);
        out.extend_from_slice(b"{\"time\":\"");
        out.extend_from_slice(self.time.0.as_bytes());
        out.push(b'.');
        digits3(out, self.time.1);
        text(out, b"Z\",\"request_id\":", self.request_id);
        if let Some(trace) = self.trace {
            out.extend_from_slice(b",\"trace_id\":\"");
            out.extend_from_slice(&hex(trace));
            out.push(b'"');
        }
        text(out, b",\"client\":", self.client);
        // Tokens stand for themselves.
        word(out, b",\"method\":\"", self.method);
        text(out, b"\",\"host\":", self.host);
        text(out, b",\"path\":", self.path.as_bytes());
        word(out, b",\"protocol\":\"", self.protocol);
        number(out, b"\",\"status\":", self.status.into());
        text(out, b",\"route\":", self.route.as_bytes());
        word(out, b",\"stage\":\"", self.stage);
        word(out, b"\",\"arm\":\"", self.arm);
        word(out, b"\",\"why\":\"", self.why);
        out.push(b'"');
        if let Some(bucket) = self.bucket {
            number(out, b",\"bucket\":", bucket.into());
        }
        if let Some(upstream) = self.upstream {
            text(out, b",\"upstream\":", upstream.as_bytes());
        }
        millis(out, b",\"duration_ms\":", self.duration);
        if let Some(head) = self.head {
            millis(out, b",\"head_ms\":", head);
        }
        number(out, b",\"bytes_in\":", self.bytes_in);
        number(out, b",\"bytes_out\":", self.bytes_out);
        out.extend_from_slice(if self.complete { b",\"complete\":true" } else { b",\"complete\":false" });
        if self.attempts > 1 {
            number(out, b",\"attempts\":", self.attempts.into());
        }
        if let Some((service, reason)) = self.fallback {
            text(out, b",\"fallback_from\":", service.as_bytes());
            word(out, b",\"fallback\":\"", reason);
            out.push(b'"');
        }
        if let Some(cache) = self.cache {
            word(out, b",\"cache\":\"", cache);
            out.push(b'"');
        }
        if let Some(limit) = self.limit {
            word(out, b",\"limit\":\"", limit);
            out.push(b'"');
        }
        if let Some(error) = self.error {
            text(out, b",\"error\":", error.as_bytes());
        }
        if !self.detail.is_empty() {
            text(out, b",\"detail\":", self.detail.as_bytes());
        }
        out.extend_from_slice(b"}\n");
    }
}

/// A string of JSON (RFC 8259 §7). What is not UTF-8 is written as its replacement character.
fn text(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    out.extend_from_slice(key);
    out.push(b'"');
    // Without a branch, so that it is done many bytes at a time.
    let odd = |byte: u8| u8::from(!(0x20..0x7f).contains(&byte)) | u8::from(byte == b'"') | u8::from(byte == b'\\');
    if value.iter().fold(0, |found, byte| found | odd(*byte)) == 0 {
        out.extend_from_slice(value);
    } else {
        escape(out, &String::from_utf8_lossy(value));
    }
    out.push(b'"');
}

fn word(out: &mut Vec<u8>, key: &[u8], value: &str) {
    out.extend_from_slice(key);
    out.extend_from_slice(value.as_bytes());
}

fn escape(out: &mut Vec<u8>, value: &str) {
    for character in value.chars() {
        match character {
            '"' | '\\' => out.extend_from_slice(&[b'\\', character as u8]),
            '\0'..='\x1f' | '\x7f' => {
                let _ = write!(out, "\\u{:04x}", u32::from(character));
            }
            _ => out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

fn number(out: &mut Vec<u8>, key: &[u8], value: u64) {
    out.extend_from_slice(key);
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

fn millis(out: &mut Vec<u8>, key: &[u8], value: Duration) {
    number(out, key, u64::try_from(value.as_millis()).unwrap_or(u64::MAX));
    out.push(b'.');
    digits3(out, value.subsec_micros() % 1000);
}

fn digits3(out: &mut Vec<u8>, value: u32) {
    let digit = |value: u32| b'0' + u8::try_from(value % 10).unwrap_or(0);
    out.extend_from_slice(&[digit(value / 100), digit(value / 10), digit(value)]);
}

/// What the writer thread is sent.
enum Message {
    /// Lines.
    Block(Vec<u8>),
    /// There is another place for them.
    Open,
    /// That was all.
    Stop,
}

/// Where lines are to go from now on, until the writer has seen it.
type Next = Arc<Mutex<Option<Sink>>>;

/// Where lines go.
pub type Sink = Box<dyn Write + Send>;

/// Opens the place where lines go.
pub fn open(to: &LogTo) -> io::Result<Sink> {
    Ok(match to {
        LogTo::Nowhere => Box::new(io::sink()),
        LogTo::Stdout => Box::new(io::stdout()),
        LogTo::File(path) => Box::new(File::options().create(true).append(true).mode(0o640).open(path)?),
    })
}

/// The writer thread, and where blocks go.
pub struct Writer {
    sender: SyncSender<Message>,
    next: Next,
    thread: JoinHandle<()>,
}

/// Has the writer thread write elsewhere.
#[derive(Clone)]
pub struct Redirect(Next, SyncSender<Message>);

impl Redirect {
    /// What is written from now on goes there. Never waits for a reader that has stopped reading.
    pub fn to(&self, sink: Sink) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(sink);
        // Where there is no room, the next block brings it there.
        let _ = self.1.try_send(Message::Open);
    }
}

impl Writer {
    /// Starts the thread.
    pub fn start(sink: Sink, stats: Arc<ProcessStats>) -> io::Result<Self> {
        let (sender, receiver) = sync_channel(WAITING);
        let next = Next::default();
        let seen = next.clone();
        let thread = std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write(sink, &receiver, &seen, &stats))?;
        Ok(Self { sender, next, thread })
    }

    /// A worker's end.
    pub fn log(&self, stats: Arc<ProcessStats>) -> AccessLog {
        AccessLog { buffer: RefCell::default(), sender: self.sender.clone(), stats }
    }

    /// For whoever says where lines go.
    pub fn redirect(&self) -> Redirect {
        Redirect(self.next.clone(), self.sender.clone())
    }

    /// Waits until everything is written, but not for a reader that has stopped reading. The workers' ends must be gone.
    pub fn finish(self) {
        let until = Instant::now() + LAST;
        while let Err(TrySendError::Full(_)) = self.sender.try_send(Message::Stop) {
            if Instant::now() >= until {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        while !self.thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn write(mut sink: Sink, receiver: &Receiver<Message>, next: &Next, stats: &ProcessStats) {
    // Whether lines are lost at the moment, and whether the last one there is only half of one.
    let (mut failing, mut torn) = (false, false);
    while let Ok(message) = receiver.recv() {
        if let Some(new) = next.lock().unwrap_or_else(PoisonError::into_inner).take() {
            (sink, failing, torn) = (new, false, false);
        }
        let block = match message {
            Message::Block(block) => block,
            Message::Open => continue,
            Message::Stop => return,
        };
        let mut rest = &block[..];
        let result = if torn { sink.write_all(b"\n").map(|()| torn = false) } else { Ok(()) };
        let result = result.and_then(|()| write_some(&mut sink, &mut rest)).and_then(|()| sink.flush());
        match result {
            Ok(()) => failing = false,
            Err(error) => {
                stats.log_dropped.fetch_add(lines(rest), Relaxed);
                torn |= rest.len() < block.len() && block.get(block.len() - rest.len() - 1) != Some(&b'\n');
                // A closed pipe is the reader's wish; a full disk is news, once.
                if !failing && error.kind() != io::ErrorKind::BrokenPipe {
                    tracing::error!(%error, "the access log cannot be written; lines are lost, and counted");
                    failing = true;
                }
            }
        }
    }
}

/// Writes, and says what is left of it where it cannot go on.
fn write_some(sink: &mut Sink, rest: &mut &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        match sink.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => *rest = &rest[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn lines(block: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', block).count() as u64
}

/// A worker's end of the access log.
pub struct AccessLog {
    buffer: RefCell<Vec<u8>>,
    sender: SyncSender<Message>,
    stats: Arc<ProcessStats>,
}

impl AccessLog {
    /// Adds a line.
    pub fn write(&self, line: &Line<'_>) {
        let mut buffer = self.buffer.borrow_mut();
        line.write(&mut buffer);
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
        if let Err(TrySendError::Full(Message::Block(block))) = self.sender.try_send(Message::Block(block)) {
            self.stats.log_dropped.fetch_add(lines(&block), Relaxed);
        }
    }
}

impl Drop for AccessLog {
    /// At the end of a drain nothing else is left to do, so the last block may wait a little for room.
    fn drop(&mut self) {
        let mut block = std::mem::take(&mut *self.buffer.borrow_mut());
        let until = Instant::now() + LAST;
        while !block.is_empty() && Instant::now() < until {
            match self.sender.try_send(Message::Block(block)) {
                Err(TrySendError::Full(Message::Block(back))) => block = back,
                _ => return,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.stats.log_dropped.fetch_add(lines(&block), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that takes so many bytes at a time, or is full, and then takes all.
    #[derive(Clone)]
    struct Disk(Arc<Mutex<Written>>);

    /// What is on it, and what it does next, the last first.
    type Written = (Vec<u8>, Vec<Option<usize>>);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let (written, moods) = &mut *self.0.lock().unwrap();
            let Some(taken) = moods.pop().unwrap_or(Some(usize::MAX)) else {
                return Err(io::ErrorKind::StorageFull.into());
            };
            let taken = taken.min(bytes.len());
            written.extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_costs_lines_which_are_counted_and_tears_none_of_those_that_follow() {
        let disk = Disk(Arc::new(Mutex::new((Vec::new(), vec![None, None, Some(10)]))));
        let stats = ProcessStats::default();
        let (sender, receiver) = sync_channel(8);
        for block in ["one\ntwo\nthree\nfour\n", "five\n", "six\nseven\n"] {
            sender.send(Message::Block(block.as_bytes().to_vec())).unwrap();
        }
        drop(sender);
        write(Box::new(disk.clone()), &receiver, &Next::default(), &stats);
        assert_eq!(String::from_utf8_lossy(&disk.0.lock().unwrap().0), "one\ntwo\nth\nsix\nseven\n");
        assert_eq!(stats.log_dropped.load(Relaxed), 3);
    }

    #[test]
    fn a_line_is_json_whatever_a_client_sends() {
        let line = Line {
            time: ("2026-11-22T17:00:00", 7),
            request_id: b"id",
            trace: Some(0xabc),
            client: b"192.0.2.1",
            method: "GET",
            host: b"a\"\xff\x01",
            path: "/\u{e9}\\\u{7f}",
            protocol: "HTTP/1.1",
            status: 200,
            route: "orders",
            stage: "canary",
            arm: "service",
            why: "hash",
            bucket: Some(17),
            upstream: Some("orders"),
            duration: Duration::from_nanos(1_234_567_890),
            head: Some(Duration::from_micros(42)),
            bytes_in: 0,
            bytes_out: u64::MAX,
            complete: true,
            attempts: 2,
            fallback: Some(("orders", "unavailable")),
            cache: None,
            limit: Some("attempt"),
            error: None,
            detail: "",
        };
        let mut out = Vec::new();
        line.write(&mut out);
        let read: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let expected = serde_json::json!({
            "time": "2026-11-22T17:00:00.007Z", "request_id": "id", "trace_id": "00000000000000000000000000000abc", "client": "192.0.2.1", "method": "GET",
            "host": "a\"\u{fffd}\u{1}", "path": "/\u{e9}\\\u{7f}", "protocol": "HTTP/1.1", "status": 200,
            "route": "orders", "stage": "canary", "arm": "service", "why": "hash", "bucket": 17,
            "upstream": "orders", "duration_ms": 1234.567, "head_ms": 0.042, "bytes_in": 0,
            "bytes_out": u64::MAX, "complete": true,
            "attempts": 2, "fallback_from": "orders", "fallback": "unavailable", "limit": "attempt",
        });
        assert_eq!(read, expected);
        assert_eq!(out.last(), Some(&b'\n'));
    }
}
