//! Route lookup: 10,000 routes must cost at most 1.5 times what 10 cost.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use gateway::routing::{
    pattern::Pattern,
    predicate::{Head, Predicates},
    table::{Rule, Table},
};
use http::{HeaderMap, Method};

fn table(routes: usize) -> Table {
    let rules = (0..routes).map(|n| {
        let path = match n % 3 {
            0 => format!("/api/resource{n}/**"),
            1 => format!("/api/resource{n}/{{id}}"),
            _ => format!("/v{}/resource{n}", n % 7),
        };
        Rule {
            hosts: Vec::new(),
            pattern: Pattern::parse(&path, false).unwrap_or_else(|(why, _)| panic!("{why}")),
            predicates: Predicates::default(),
            priority: 0,
            terminal: false,
        }
    });
    Table::new(rules.collect())
}

/// A request that route `n` takes.
fn key(n: usize) -> String {
    if n % 3 == 2 { format!("v{}/resource{n}", n % 7) } else { format!("api/resource{n}/42") }
}

fn measure(criterion: &mut Criterion, name: &str, requests: impl Fn(usize) -> Vec<usize>) {
    let mut group = criterion.benchmark_group(name);
    let headers = HeaderMap::new();
    for routes in [10, 100, 1_000, 10_000] {
        let table = table(routes);
        let keys: Vec<String> = requests(routes).into_iter().map(key).collect();
        let mut next = 0;
        group.bench_function(BenchmarkId::from_parameter(routes), |bencher| {
            bencher.iter(|| {
                next = if next + 1 == keys.len() { 0 } else { next + 1 };
                let key = keys[next].as_bytes();
                let head = Head { host: b"shop.example.com", key, method: &Method::GET, headers: &headers, query: "" };
                black_box(table.find(black_box(&head)).found)
            });
        });
    }
    group.finish();
}

fn lookup(criterion: &mut Criterion) {
    // The same ten requests, whatever else the table holds.
    measure(criterion, "lookup", |_| (0..10).collect());
    // Each route in turn, in no order that memory could foresee: the price of a table that no cache holds.
    measure(criterion, "lookup of every route", |routes| (0..routes).map(|n| n * 7_919 % routes).collect());
}

criterion_group!(benches, lookup);
criterion_main!(benches);
