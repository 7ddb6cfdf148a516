//! Traces: W3C context in and out, a span a request and one for each try, to a collector by OTLP.
//!
//! Who is traced is decided before anything is made; the others cost an id and one header field. The SDK's batches have a thread
//! of their own, and a queue that is bounded: what finds no room is dropped, and counted.

use std::{
    borrow::Cow,
    fmt,
    panic::AssertUnwindSafe,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderValue};
use http_body_util::Full;
use opentelemetry::{
    InstrumentationScope, KeyValue, SpanId, TraceFlags, TraceId,
    trace::{SpanContext, SpanKind, Status, TraceState},
};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, RetryPolicy, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor as _},
};

use super::metrics::ProcessStats;
use crate::{
    config::{split_url, telemetry::TracingConfig},
    fields::{TRACEPARENT, TRACESTATE, hex},
    outbound::Outbound,
};

/// Spans that wait for the collector, at most.
const QUEUE: usize = 8_192;
/// Spans of one call.
const BATCH: usize = 512;
/// How long they wait for company.
const DELAY: Duration = Duration::from_secs(1);
/// How long the collector may take.
const LIMIT: Duration = Duration::from_secs(10);
/// What is read of its answer.
const ANSWER: usize = 64 * 1024;
/// Tries of one request that have a span each.
pub const TRIES: usize = 16;

/// The context in which a request came (W3C Trace Context).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parent {
    /// The trace.
    pub trace: u128,
    /// The span of who sent it.
    pub span: u64,
    /// Whether that was recorded.
    pub sampled: bool,
}

/// Reads `traceparent`. Nothing where it is malformed, where an id is zero, or where it is of version `ff`; of a higher
/// version than `00` the first 55 characters count (§4.3).
pub fn parse(value: &[u8]) -> Option<Parent> {
    let hex = |part: &[u8]| -> Option<u128> {
        let lower = part.iter().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte));
        if lower { u128::from_str_radix(std::str::from_utf8(part).ok()?, 16).ok() } else { None }
    };
    let known = value.get(..55)?;
    let [version, trace, span, flags] = [&known[..2], &known[3..35], &known[36..52], &known[53..55]];
    if [2, 35, 52].iter().any(|at| known[*at] != b'-') {
        return None;
    }
    let version = hex(version)?;
    let whole = value.len() == 55 || (version > 0 && value[55] == b'-');
    let (trace, span, flags) = (hex(trace)?, u64::try_from(hex(span)?).ok()?, hex(flags)?);
    let good = whole && version != 0xff && trace != 0 && span != 0;
    good.then_some(Parent { trace, span, sampled: flags & 1 == 1 })
}

/// A request's part in a trace.
#[derive(Clone, Copy, Debug)]
pub struct Trace {
    /// The trace.
    pub trace: u128,
    /// The span of who sent the request.
    pub parent: Option<u64>,
    /// The request's own.
    pub span: u64,
    /// Whether it is recorded.
    pub sampled: bool,
}

/// A try, as a span.
#[derive(Debug)]
pub struct Try {
    /// The span.
    pub span: u64,
    /// The upstream.
    pub upstream: Arc<str>,
    /// When it began and ended, from the request's beginning.
    pub at: (Duration, Duration),
    /// What came of it: a status, or what went wrong.
    pub result: Result<u16, &'static str>,
}

/// `traceparent` for whoever is asked by this span.
pub fn traceparent(trace: u128, span: u64, sampled: bool) -> HeaderValue {
    let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
    text[3..35].copy_from_slice(&hex(trace));
    text[36..52].copy_from_slice(&hex(u128::from(span))[16..]);
    text[54] = b'0' + u8::from(sampled);
    HeaderValue::from_maybe_shared(Bytes::copy_from_slice(&text)).unwrap_or(HeaderValue::from_static("00-0"))
}

/// Settles a request's part in a trace, and what upstreams are told. `given` is the only `traceparent` that came, `vendors` whether a
/// `tracestate` did, `trusted` whether the sender may say who is traced; `random` draws.
pub fn begin(
    headers: &mut HeaderMap,
    given: Option<&HeaderValue>,
    vendors: bool,
    trusted: bool,
    sample: u16,
    random: &impl Fn() -> u64,
) -> Trace {
    let parent = given.and_then(|value| parse(value.as_bytes()));
    if vendors && parent.is_none() {
        // What cannot be read is no context, and what vendors added to it neither.
        headers.remove(TRACESTATE);
    }
    let sampled = match parent {
        Some(parent) if trusted => parent.sampled,
        // Anybody can say anything: who is traced is the gateway's to decide.
        _ => sample > 0 && random() % 10_000 < u64::from(sample),
    };
    let nonzero = |id: u64| if id == 0 { 1 } else { id };
    let span = nonzero(random());
    let trace = parent.map_or_else(|| (u128::from(nonzero(random())) << 64) | u128::from(random()), |p| p.trace);
    headers.insert(TRACEPARENT, traceparent(trace, span, sampled));
    Trace { trace, parent: parent.map(|parent| parent.span), span, sampled }
}

/// What a span says of a request.
#[derive(Debug)]
pub struct Told {
    /// When it began.
    pub started: SystemTime,
    /// How long it took.
    pub duration: Duration,
    /// The method, as it may be told.
    pub method: &'static str,
    /// The name: the method and the route's pattern.
    pub name: String,
    /// All else.
    pub attributes: Vec<KeyValue>,
    /// What went wrong, if it was a server's fault.
    pub error: Option<String>,
}

/// Takes spans, and sends them to a collector.
pub struct Tracer {
    /// The share of requests that are traced, of 10,000.
    pub sample: u16,
    config: TracingConfig,
    stats: Arc<ProcessStats>,
    /// Made when it takes effect: a file that is only checked sends nothing.
    processor: OnceLock<BatchSpanProcessor>,
    waiting: Arc<AtomicUsize>,
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracer").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Tracer {
    /// As the file says.
    pub fn new(config: &TracingConfig, stats: Arc<ProcessStats>) -> Result<Self, String> {
        split_url(&config.otlp)?;
        Ok(Self {
            sample: config.sample.0,
            config: config.clone(),
            stats,
            processor: OnceLock::new(),
            waiting: Arc::default(),
        })
    }

    /// Starts the thread that sends spans, before any request has some.
    pub fn start(&self) -> Result<(), String> {
        if self.processor.get().is_some() {
            return Ok(());
        }
        // It panics where there can be no thread.
        let built = std::panic::catch_unwind(AssertUnwindSafe(|| self.build()));
        let processor = built.unwrap_or_else(|_| Err("no thread can be started".to_owned()));
        let processor = processor.map_err(|why| format!("`tracing`: {why}"))?;
        let _ = self.processor.set(processor);
        Ok(())
    }

    fn build(&self) -> Result<BatchSpanProcessor, String> {
        let TracingConfig { otlp, service, headers, .. } = &self.config;
        let (_, target) = split_url(otlp)?;
        let url = if target == "/" { format!("{}/v1/traces", otlp.trim_end_matches('/')) } else { otlp.clone() };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Collector { url: url.clone() })
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(url)
            .with_headers(headers.clone().into_iter().collect())
            .with_timeout(LIMIT)
            // What is late is lost: what waits behind it would be, too.
            .with_retry_policy(RetryPolicy::disabled())
            .build()
            .map_err(|error| error.to_string())?;
        let exporter = Counting { inner: exporter, stats: self.stats.clone(), waiting: self.waiting.clone() };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE)
            .with_max_export_batch_size(BATCH)
            .with_scheduled_delay(DELAY);
        let mut processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches.build()).build();
        let resource = Resource::builder_empty().with_attributes([
            KeyValue::new("service.name", service.clone()),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", format!("{:08x}", self.stats.id)),
        ]);
        processor.set_resource(&resource.build());
        Ok(processor)
    }

    /// Takes room for so many spans, if there is some: then they must come.
    pub fn reserve(&self, spans: usize) -> bool {
        if self.processor.get().is_some() && self.waiting.fetch_add(spans, Relaxed) + spans <= QUEUE {
            return true;
        }
        if self.processor.get().is_some() {
            self.waiting.fetch_sub(spans, Relaxed);
        }
        self.stats.spans[2].fetch_add(spans as u64, Relaxed);
        false
    }

    /// Takes a request that is over, with its tries: as many spans as room was taken for.
    pub fn take(&self, trace: Trace, tries: &[Try], told: Told) {
        let Some(processor) = self.processor.get() else { return };
        let context = |span: u64| {
            let ids = (TraceId::from(trace.trace), SpanId::from(span));
            SpanContext::new(ids.0, ids.1, TraceFlags::SAMPLED, false, TraceState::NONE)
        };
        let scope = InstrumentationScope::builder("gateway").with_version(env!("CARGO_PKG_VERSION")).build();
        let span = |id: u64, parent: Option<u64>, kind: SpanKind, name: String, at: (Duration, Duration)| SpanData {
            span_context: context(id),
            parent_span_id: parent.map_or(SpanId::INVALID, SpanId::from),
            parent_span_is_remote: kind == SpanKind::Server && parent.is_some(),
            span_kind: kind,
            name: Cow::Owned(name),
            start_time: told.started + at.0,
            end_time: told.started + at.1,
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: scope.clone(),
        };
        for (n, one) in tries.iter().enumerate() {
            let mut data =
                span(one.span, Some(trace.span), SpanKind::Client, format!("{} {}", told.method, one.upstream), one.at);
            data.attributes = vec![
                KeyValue::new("http.request.method", if told.method == "HTTP" { "_OTHER" } else { told.method }),
                KeyValue::new("gateway.upstream", one.upstream.to_string()),
                KeyValue::new("server.address", one.upstream.to_string()),
            ];
            if n > 0 {
                data.attributes.push(KeyValue::new("http.request.resend_count", i64::try_from(n).unwrap_or(0)));
            }
            match one.result {
                Ok(status) => {
                    data.attributes.push(KeyValue::new("http.response.status_code", i64::from(status)));
                    if status >= 400 {
                        data.attributes.push(KeyValue::new("error.type", status.to_string()));
                        data.status = Status::error("");
                    }
                }
                Err(word) => {
                    data.attributes.push(KeyValue::new("error.type", word));
                    data.status = Status::error("");
                }
            }
            processor.on_end(data);
        }
        let mut data =
            span(trace.span, trace.parent, SpanKind::Server, told.name.clone(), (Duration::ZERO, told.duration));
        if let Some(error) = told.error {
            data.status = Status::error("");
            data.attributes.push(KeyValue::new("error.type", error));
        }
        data.attributes.extend(told.attributes);
        processor.on_end(data);
    }

    /// Sends what there is, for a process that ends.
    pub fn finish(&self, limit: Duration) {
        if let Some(processor) = self.processor.get() {
            let _ = processor.shutdown_with_timeout(limit);
        }
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // Whoever drops the last of a file that was replaced must not wait for a collector.
        if let Some(processor) = self.processor.take() {
            let _ = std::thread::Builder::new().name("traces".to_owned()).spawn(move || processor.shutdown());
        }
    }
}

/// Counts what the collector took.
#[derive(Debug)]
struct Counting {
    inner: SpanExporter,
    stats: Arc<ProcessStats>,
    waiting: Arc<AtomicUsize>,
}

impl opentelemetry_sdk::trace::SpanExporter for Counting {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        // A bug in it must not be the end of all tracing.
        let sent = AssertUnwindSafe(self.inner.export(batch)).catch_unwind().await;
        let result = sent.unwrap_or_else(|_| Err(OTelSdkError::InternalFailure("sending spans panicked".to_owned())));
        self.waiting.fetch_sub(spans, Relaxed);
        let counter: &AtomicU64 = &self.stats.spans[usize::from(result.is_err())];
        if let Err(error) = &result
            && counter.load(Relaxed) == 0
        {
            tracing::warn!(%error, "the collector does not take spans; later failures are counted only");
        }
        counter.fetch_add(spans as u64, Relaxed);
        result
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// The collector, as the exporter calls it: on the thread of the batches, which has nothing else to do.
#[derive(Debug)]
struct Collector {
    url: String,
}

#[async_trait::async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: http::Request<Bytes>) -> Result<http::Response<Bytes>, HttpError> {
        use tokio::runtime::{Builder, LocalOptions};
        let (server, target) = Outbound::new(&self.url)?;
        let (mut parts, body) = request.into_parts();
        parts.uri = target.parse()?;
        let request = http::Request::from_parts(parts, Full::new(body));
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
        let answer = runtime.block_on(server.send(request, LIMIT, ANSWER));
        runtime.shutdown_background();
        Ok(answer?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_traceparent_is_read_as_the_specification_has_it() {
        let parent = parse(GOOD.as_bytes()).unwrap();
        assert_eq!(parent.trace, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!((parent.span, parent.sampled), (0x00f0_67aa_0ba9_02b7, true));
        let with = |from: &str, to: &str| GOOD.replacen(from, to, 1);
        for bad in [
            String::new(),
            with("00-4", "ff-4"),
            with("00-4", "0-4"),
            with("4bf9", "4BF9"),
            with("4bf92f3577b34da6a3ce929d0e0e4736", "00000000000000000000000000000000"),
            with("00f067aa0ba902b7", "0000000000000000"),
            format!("{GOOD}-extra"),
            format!("{GOOD} "),
            GOOD[..54].to_owned(),
            with("-01", "_01"),
            with("-01", "-0g"),
            with("00-4", "cc-4") + "x",
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
        // A version of the future may say more.
        assert_eq!(parse((with("00-4", "cc-4") + "-what-the-future-brings").as_bytes()), Some(parent));
        assert_eq!(parse(with("00-4", "cc-4").as_bytes()), Some(parent));
        assert!(!parse(with("-01", "-02").as_bytes()).unwrap().sampled);
    }

    #[test]
    fn who_is_traced_is_not_for_strangers_to_say() {
        let try_one = |given: Option<&str>, trusted, sample, draw: u64| {
            let given = given.map(|text| HeaderValue::from_str(text).unwrap());
            let mut headers = HeaderMap::new();
            headers.insert(TRACESTATE, HeaderValue::from_static("vendor=1"));
            let trace = begin(&mut headers, given.as_ref(), true, trusted, sample, &|| draw);
            (trace, headers)
        };
        let (trace, headers) = try_one(Some(GOOD), false, 0, 7);
        assert!(!trace.sampled && trace.trace == parse(GOOD.as_bytes()).unwrap().trace);
        assert_eq!(headers[TRACEPARENT], "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000007-00");
        assert_eq!(headers[TRACESTATE], "vendor=1");
        assert!(try_one(Some(GOOD), true, 0, 7).0.sampled);
        assert!(!try_one(Some(&GOOD.replace("-01", "-00")), true, 10_000, 7).0.sampled);
        assert!(try_one(None, true, 100, 99).0.sampled && !try_one(None, true, 100, 100).0.sampled);
        // What is no context takes its vendors' words with it.
        let (trace, headers) = try_one(Some("00-nonsense"), true, 10_000, 7);
        assert!(trace.sampled && trace.parent.is_none() && !headers.contains_key(TRACESTATE));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(trace in 1..=u128::MAX, span in 1..=u64::MAX, sampled: bool) {
            let text = traceparent(trace, span, sampled);
            prop_assert_eq!(parse(text.as_bytes()), Some(Parent { trace, span, sampled }));
        }

        #[test]
        fn nothing_that_is_sent_panics(value in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = parse(&value);
        }
    }
}
