//! Rollouts by the thousand, simulated: how many healthy ones are taken back, and how soon bad ones are.
//!
//! The gateway's own code decides (`gateway::rollout`), on requests that are drawn here, seeded. Beside it, on the same
//! requests, the rule of Flagger: every interval the service's success rate and p99 are held against fixed thresholds, and so many
//! failed checks roll back (docs.flagger.app: interval 1 m, threshold 5, success ≥ 99 %, p99 ≤ 500 ms).

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "draws below a known number")]

use std::{
    io::{self, Write},
    time::Duration,
};

use gateway::{
    config::rollout::OnFailure,
    rollout::{
        evidence::{Outcome, Recorder},
        latency::{self, Histogram},
        steps::{Phase, Position},
        verdict::{Compared, Terms, Trial, Verdict},
    },
};

/// The shares, of 10,000.
const STEPS: [u16; 4] = [500, 2_500, 5_000, 10_000];
/// How often the gateway looks.
const TICK: Duration = Duration::from_millis(250);
/// A simulation ends then at the latest.
const LONGEST: Duration = Duration::from_hours(1);

/// Clients that send most requests, in `Traffic::Heavy`.
const HEAVY: u64 = 12;
/// The share of 4xx.
const REFUSED: f64 = 0.03;

fn part(share: u16) -> f64 {
    f64::from(share) / 10_000.0
}

/// `SplitMix64`.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    fn chance(&mut self, share: f64) -> bool {
        self.unit() < share
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Marsaglia and Tsang, 2000.
    fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            return self.gamma(shape + 1.0) * self.unit().powf(1.0 / shape);
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.unit().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }

    fn beta(&mut self, a: f64, b: f64) -> f64 {
        let (x, y) = (self.gamma(a), self.gamma(b));
        x / (x + y)
    }
}

/// How requests hang together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Traffic {
    /// Not at all.
    Independent,
    /// 2,000 users, of whom some fail far more often than others: beta-binomial, with a correlation of 1/11.
    Users,
    /// Both arms fail more for seconds at a time; single requests begin runs of failures; users repeat what failed a hundred times.
    Bursts,
    /// The rate of failures and the load go up and down.
    Drift,
    /// Twelve clients send nine tenths of the requests; each has a share of failures and of 4xx of its own, and one is slow.
    Heavy,
}

/// What is wrong with the service.
#[derive(Clone, Copy, Debug)]
struct Fault {
    errors: f64,
    client_errors: f64,
    slower: f64,
}

const HEALTHY: Fault = Fault { errors: 0.0, client_errors: 0.0, slower: 1.0 };

/// How a rollout ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    RolledBack,
    Complete,
    Neither,
}

struct Run {
    end: End,
    /// Requests that the service had until then, and when that was.
    requests: u64,
    time: Duration,
    /// Requests that the service's fault has cost.
    failed: u64,
    flagger: End,
}

struct Flagger {
    requests: u64,
    failures: u64,
    latencies: Histogram,
    failed: u32,
    step: usize,
    end: End,
}

impl Flagger {
    fn check(&mut self) {
        if self.end != End::Neither || self.requests == 0 {
            return;
        }
        let success = 1.0 - self.failures as f64 / self.requests as f64;
        let p99 = self.latencies.quantile(0.99).unwrap_or_default();
        if success < 0.99 || p99 > Duration::from_millis(500) {
            self.failed += 1;
            if self.failed >= 5 {
                self.end = End::RolledBack;
            }
        } else if self.step + 1 < STEPS.len() {
            self.step += 1;
        } else {
            self.end = End::Complete;
        }
        (self.requests, self.failures, self.latencies) = (0, 0, Histogram::default());
    }
}

struct World {
    traffic: Traffic,
    base: f64,
    /// What each user's requests fail of.
    users: Vec<f64>,
    /// What they are answered 4xx of.
    refused: Vec<f64>,
    random: Random,
    /// Until when both arms fail more.
    storm: Duration,
    /// Failures that are still to come of a run, by arm.
    run: [u32; 2],
    /// A user that repeats, and how often yet.
    repeats: (u64, u32),
}

impl World {
    fn new(traffic: Traffic, base: f64, seed: u64) -> Self {
        let mut random = Random(seed);
        let (count, scale) = match traffic {
            Traffic::Users => (2_000, 10.0),
            Traffic::Heavy => (HEAVY, 3.0),
            _ => (0, 1.0),
        };
        let mut shares = |base: f64| (0..count).map(|_| random.beta(base * scale, (1.0 - base) * scale)).collect();
        let users = shares(base);
        let refused = if traffic == Traffic::Heavy { shares(REFUSED) } else { Vec::new() };
        Self { traffic, base, users, refused, random, storm: Duration::ZERO, run: [0; 2], repeats: (0, 0) }
    }

    fn user(&mut self) -> u64 {
        if self.repeats.1 > 0 && self.random.chance(0.5) {
            self.repeats.1 -= 1;
            return self.repeats.0;
        }
        match self.traffic {
            // Some ask far more than others.
            Traffic::Users => (self.random.unit().powi(2) * self.users.len() as f64) as u64,
            Traffic::Heavy if self.random.chance(0.9) => self.random.next() % HEAVY,
            _ => self.random.next() % 1_000_000,
        }
    }

    fn failing(&mut self, user: u64, arm: usize, now: Duration) -> f64 {
        match self.traffic {
            Traffic::Independent => self.base,
            Traffic::Users => self.users[user as usize],
            Traffic::Heavy => self.users.get(user as usize).copied().unwrap_or(self.base),
            Traffic::Bursts => {
                if now < self.storm {
                    return (self.base * 20.0).min(0.5);
                }
                if self.random.chance(1.0 / 20_000.0) {
                    self.storm = now + Duration::from_secs(2);
                }
                if self.run[arm] > 0 {
                    self.run[arm] -= 1;
                    return 1.0;
                }
                if self.random.chance(self.base / 10.0) {
                    self.run[arm] = 4;
                }
                // Whoever repeats what failed fails again.
                if self.repeats.1 > 0 && user == self.repeats.0 { 1.0 } else { self.base / 2.0 }
            }
            Traffic::Drift => self.base * (1.0 + 0.8 * (now.as_secs_f64() / 60.0).sin()),
        }
    }
}

fn simulate(traffic: Traffic, base: f64, rate: f64, fault: Fault, seed: u64) -> Run {
    let mut world = World::new(traffic, base, seed);
    let terms = Terms {
        alpha: 0.01,
        steps: STEPS.len(),
        errors: 0.005,
        client_errors: 0.01,
        p99: 0.5,
        mismatches: None,
        every: Duration::from_mins(1),
        min_requests: 500,
    };
    let recorder = Recorder::default();
    let mut position = Position { phase: Phase::Running, step: Some(0) };
    let mut trial = Trial::begin(Duration::ZERO, None, part(STEPS[0]));
    let mut flagger =
        Flagger { requests: 0, failures: 0, latencies: Histogram::default(), failed: 0, step: 0, end: End::Neither };
    let mut run = Run { end: End::Neither, requests: 0, time: LONGEST, failed: 0, flagger: End::Neither };
    let mut now = Duration::ZERO;
    while now < LONGEST && (run.end == End::Neither || flagger.end == End::Neither) {
        now += TICK;
        let load = if traffic == Traffic::Drift { 1.0 + 0.5 * (now.as_secs_f64() / 97.0).sin() } else { 1.0 };
        let mut left = rate * load * TICK.as_secs_f64();
        while left >= 1.0 || world.random.chance(left) {
            left -= 1.0;
            let user = world.user();
            let key = user.wrapping_mul(0xD6E8_FEB8_6659_FD93) ^ seed;
            let bucket = u16::try_from(Random(key).next() % 10_000).unwrap_or(0);
            // Who draws this number is the service's in both worlds, as far as the share of each goes.
            let share = position.share(&STEPS);
            let ours = usize::from(bucket < share && run.end == End::Neither);
            let theirs = bucket < STEPS[flagger.step];
            let failing = world.failing(user, ours, now);
            let refused = world.refused.get(user as usize).copied().unwrap_or(REFUSED);
            let (draw, client_draw) = (world.random.unit(), world.random.unit());
            let slow = traffic == Traffic::Heavy && user == 0;
            let base = (if slow { 2.0 } else { 0.02 } * world.random.normal().mul_add(0.8, 0.0).exp()).min(30.0);
            let outcome = |bad: bool| {
                let (errors, client) = if bad { (fault.errors, fault.client_errors) } else { (0.0, 0.0) };
                if draw < failing + errors {
                    Outcome::Failed
                } else if client_draw < refused + client {
                    Outcome::ClientError
                } else {
                    Outcome::Good
                }
            };
            let took = |bad: bool| Duration::from_secs_f64(if bad { base * fault.slower } else { base });
            if run.end == End::Neither {
                let how = outcome(ours == 1);
                recorder.record(ours, key, now, how, Some(took(ours == 1)));
                if traffic == Traffic::Bursts
                    && how == Outcome::Failed
                    && world.repeats.1 == 0
                    && world.random.chance(0.02)
                {
                    world.repeats = (user, 100);
                }
                run.requests += ours as u64;
                run.failed += u64::from(ours == 1 && how != Outcome::Good && draw >= failing);
            }
            if theirs && flagger.end == End::Neither {
                flagger.requests += 1;
                flagger.failures += u64::from(outcome(true) == Outcome::Failed);
                flagger.latencies.add(latency::bucket(took(true)), 1);
            }
        }
        if now.as_millis().is_multiple_of(60_000) {
            flagger.check();
        }
        if run.end != End::Neither {
            continue;
        }
        trial.take(now, &recorder.drain());
        let verdict = trial.verdict(&terms, Compared::default(), now);
        if !matches!(verdict, Verdict::Fail(_)) {
            recorder.renew(trial.renew(now, terms.every));
        }
        if let Some(next) = position.after(&verdict, &STEPS, true, OnFailure::Rollback) {
            debug_assert!(!matches!(verdict, Verdict::Hold(_)), "nothing moves without proof");
            position = next;
            trial = Trial::begin(now, Some(&trial), part(position.share(&STEPS)));
            recorder.restart();
            run.end = match position.phase {
                Phase::RolledBack => End::RolledBack,
                Phase::Complete => End::Complete,
                Phase::Running | Phase::Frozen => End::Neither,
            };
            run.time = now;
        }
    }
    run.flagger = flagger.end;
    run
}

fn all(count: u64, threads: u64, one: impl Fn(u64) -> Run + Sync) -> Vec<Run> {
    std::thread::scope(|scope| {
        let one = &one;
        let parts: Vec<_> = (0..threads)
            .map(|part| scope.spawn(move || (0..count).filter(|n| n % threads == part).map(one).collect::<Vec<_>>()))
            .collect();
        parts.into_iter().flat_map(|part| part.join().unwrap_or_default()).collect()
    })
}

fn share(runs: &[Run], of: impl Fn(&Run) -> bool) -> String {
    let count = runs.iter().filter(|run| of(run)).count();
    format!("{:.2} %", count as f64 * 100.0 / runs.len().max(1) as f64)
}

fn median(mut values: Vec<u64>, at: f64) -> String {
    values.sort_unstable();
    let place = ((values.len() as f64 * at) as usize).min(values.len().saturating_sub(1));
    values.get(place).map_or("–".to_owned(), ToString::to_string)
}

/// Simulates, and writes the tables of docs/evidence.md, each row as soon as it is known.
///
/// # Errors
///
/// When `out` takes no more.
pub(crate) fn run(out: &mut dyn Write, count: u64, seed: u64) -> io::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    writeln!(
        out,
        "| {count} healthy rollouts | rolled back | complete | still held after an hour | Flagger's rule rolls back |\n|---|---|---|---|---|"
    )?;
    let mut total = Vec::new();
    for traffic in [Traffic::Independent, Traffic::Users, Traffic::Bursts, Traffic::Drift, Traffic::Heavy] {
        let runs = all(count / 5, threads, |n| {
            let seed = seed ^ (n + 1) << 20 ^ traffic as u64;
            // From 0.1 to 2 %, evenly in the logarithm.
            let base = 0.001 * 20.0_f64.powf(Random(seed).unit());
            simulate(traffic, base, 200.0, HEALTHY, seed)
        });
        writeln!(
            out,
            "| {traffic:?} | {} | {} | {} | {} |",
            share(&runs, |run| run.end == End::RolledBack),
            share(&runs, |run| run.end == End::Complete),
            share(&runs, |run| run.end == End::Neither),
            share(&runs, |run| run.flagger == End::RolledBack)
        )?;
        total.extend(runs);
    }
    writeln!(
        out,
        "| all | {} | {} | {} | {} |\n",
        share(&total, |run| run.end == End::RolledBack),
        share(&total, |run| run.end == End::Complete),
        share(&total, |run| run.end == End::Neither),
        share(&total, |run| run.flagger == End::RolledBack)
    )?;
    writeln!(
        out,
        "| the service is worse by | rolled back | complete | its requests until then: median, 95 % | seconds: median | Flagger's rule: rolled back | complete |\n|---|---|---|---|---|---|---|"
    )?;
    let points = |points: f64| Fault { errors: points / 100.0, ..HEALTHY };
    let client = |points: f64| Fault { client_errors: points / 100.0, ..HEALTHY };
    let slower = |slower: f64| Fault { slower, ..HEALTHY };
    let faults = [
        ("+0.5 points of failures", points(0.5)),
        ("+1 point", points(1.0)),
        ("+5 points", points(5.0)),
        ("+50 points", points(50.0)),
        ("every request fails", points(100.0)),
        ("every request is answered 4xx", client(100.0)),
        ("p99 × 1.2", slower(1.2)),
        ("p99 × 1.5", slower(1.5)),
        ("p99 × 2", slower(2.0)),
    ];
    for (name, fault) in faults {
        let runs =
            all(count / 50, threads, |n| simulate(Traffic::Independent, 0.005, 200.0, fault, seed ^ (n + 7) << 21));
        let back = |run: &&Run| run.end == End::RolledBack;
        let requests = || runs.iter().filter(back).map(|run| run.requests).collect::<Vec<_>>();
        let times = runs.iter().filter(back).map(|run| run.time.as_secs()).collect::<Vec<_>>();
        writeln!(
            out,
            "| {name} | {} | {} | {}, {} | {} | {} | {} |",
            share(&runs, |run| run.end == End::RolledBack),
            share(&runs, |run| run.end == End::Complete),
            median(requests(), 0.5),
            median(requests(), 0.95),
            median(times, 0.5),
            share(&runs, |run| run.flagger == End::RolledBack),
            share(&runs, |run| run.flagger == End::Complete),
        )?;
    }
    for (rate, word) in [(1.0, "1 request"), (5_000.0, "5,000 requests")] {
        let runs =
            all(count / 50, threads, |n| simulate(Traffic::Independent, 0.005, rate, HEALTHY, seed ^ (n + 3) << 22));
        writeln!(
            out,
            "\nAt {word} a second, healthy, for an hour: {} rolled back, {} complete, {} held.",
            share(&runs, |run| run.end == End::RolledBack),
            share(&runs, |run| run.end == End::Complete),
            share(&runs, |run| run.end == End::Neither)
        )?;
    }
    Ok(())
}
