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

fn lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup");
    let headers = HeaderMap::new();
    for routes in [10, 100, 1_000, 10_000] {
        let table = table(routes);
        // Every route in turn, so that no cache line stays warm for one of them alone.
        let keys: Vec<String> = (0..routes)
            .map(|n| if n % 3 == 2 { format!("v{}/resource{n}", n % 7) } else { format!("api/resource{n}/42") })
            .collect();
        let mut next = 0;
        group.bench_function(BenchmarkId::from_parameter(routes), |bencher| {
            bencher.iter(|| {
                next = (next + 7) % keys.len();
                let key = keys[next].as_bytes();
                let head = Head { host: b"shop.example.com", key, method: &Method::GET, headers: &headers, query: "" };
                black_box(table.find(black_box(&head)).found)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, lookup);
criterion_main!(benches);
