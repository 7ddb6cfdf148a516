//! What telemetry costs of a request, apart from its log line: counters, and the inventory's thread.
#![allow(missing_docs, reason = "criterion's macros")]

use std::{hint::black_box, time::Duration};

use criterion::{Criterion, criterion_group, criterion_main};
use gateway::{
    inventory::{
        Inventory,
        counts::Seen,
        tree::{Request, steps},
    },
    telemetry::metrics::{Arm, RouteStats, class_of},
};

fn telemetry(c: &mut Criterion) {
    let stats = RouteStats::new(1);
    let class = class_of(http::StatusCode::OK);
    c.bench_function("counters of a request", |b| {
        b.iter(|| {
            stats.begin(0, Arm::Service);
            stats.record(0, Arm::Service, class, black_box(false), black_box(Duration::from_micros(1_234)));
            stats.end(0, Arm::Service);
        });
    });
    let mut inventory = Inventory::new(1_800_000_000);
    for n in 0..500 {
        inventory.pin(&steps(&format!("/part/{n}/things/{{id}}"), false));
    }
    let seen = Seen { status: 200, aborted: false, micros: Some(1_234), at: 1_800_000_000 };
    let request = Request { method: 0, route: 0, arm: Arm::Service, seen };
    c.bench_function("inventory, a known endpoint of four segments", |b| {
        b.iter(|| inventory.take(black_box("part/77/things/4711"), request));
    });
    let mut n = 0_u64;
    c.bench_function("inventory, a path that nobody has asked for before", |b| {
        b.iter(|| {
            n += 1;
            inventory.take(&format!("x{n:x}/y{n:x}"), request);
        });
    });
}

criterion_group!(benches, telemetry);
criterion_main!(benches);
