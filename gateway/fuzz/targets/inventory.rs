//! What becomes of paths, of documents and of the context of a trace: bounded, and read again as it was written.
#![no_main]

use gateway::{
    inventory::{
        Inventory, Place, Standing,
        counts::Seen,
        import,
        tree::{Request, Step, steps, template},
    },
    telemetry::{metrics::Arm, trace},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Some(parent) = trace::parse(data) {
        let text = trace::traceparent(parent.trace, parent.span, parent.sampled);
        assert_eq!(trace::parse(text.as_bytes()), Some(parent));
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    let now = 1_800_000_000;
    let mut inventory = Inventory::new(now);
    let nowhere = |_: &str, _: &[Step], _: Option<&str>| Place { route: None, standing: Standing::Legacy, tags: vec![] };
    if let Ok(document) = import::document(text) {
        let _ = inventory.merge(&document, false, now);
    }
    for (n, path) in text.split('\n').enumerate() {
        let status = if n % 3 == 0 { 404 } else { 200 };
        let seen = Seen { status, aborted: false, micros: Some(5), at: now };
        inventory.take(path, Request { method: (n % 8) as u8, route: 0, arm: Arm::Legacy, seen });
        let known = template(&steps(path, false));
        assert_eq!(template(&steps(&known, false)), known, "{path:?}");
    }
    // What is kept is what was known.
    let told = inventory.document(now, &nowhere);
    assert!(told.endpoints.iter().all(|endpoint| endpoint.path.is_ascii()));
    let mut again = Inventory::new(now);
    again.merge(&told, false, now).expect("its own document");
    let count = |inventory: &Inventory| -> u64 {
        inventory.endpoints(&nowhere).iter().map(|(_, _, claimed)| claimed.row.requests()).sum()
    };
    assert_eq!(count(&again), count(&inventory));
});
