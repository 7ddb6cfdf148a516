//! The table that is printed.

use std::time::Duration;

use crate::load::Told;

/// One turn of one peer.
pub(crate) struct Round {
    /// CPU time of its process.
    pub(crate) cpu: Duration,
    /// What its clients saw.
    pub(crate) told: Told,
    /// Ticks that the machine was taken away for.
    pub(crate) stolen: u64,
}

impl Round {
    /// CPU microseconds a request.
    fn each(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.told.completed.max(1) as f64
    }
}

/// The turns of one case.
pub(crate) struct Table {
    name: &'static str,
    rows: Vec<(String, Vec<Round>)>,
}

/// A value near the better end: noise only ever adds.
fn lower_quartile(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 4).copied().unwrap_or(f64::NAN)
}

impl Table {
    /// Without turns yet.
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, rows: Vec::new() }
    }

    /// Adds a turn.
    pub(crate) fn add(&mut self, peer: &str, round: Round) {
        match self.rows.iter_mut().find(|(name, _)| name == peer) {
            Some((_, rounds)) => rounds.push(round),
            None => self.rows.push((peer.to_owned(), vec![round])),
        }
    }

    /// Prints it as Markdown.
    pub(crate) fn print(&self) {
        println!("\n### {}\n", self.name);
        println!(
            "| peer | CPU µs/request | × nginx, same work | × nginx, bare | requests a turn | p50 ms | p99 ms | turns left out |"
        );
        println!("|---|---|---|---|---|---|---|---|");
        let each = |name: &str| {
            let rounds = self.rows.iter().find(|(peer, _)| peer == name).map(|(_, rounds)| rounds);
            rounds.map(|rounds| lower_quartile(sound(rounds).map(Round::each).collect()))
        };
        let or = |name: &str, other: &str| each(name).or_else(|| each(other));
        let full = or("nginx, same work", "nginx, cache, same work");
        let bare = or("nginx, bare", "nginx, cache, bare");
        for (name, rounds) in &self.rows {
            let of = |value: &dyn Fn(&Round) -> f64| lower_quartile(sound(rounds).map(value).collect());
            let cpu = of(&Round::each);
            let ratio = |other: Option<f64>| other.map_or("–".to_owned(), |other| format!("{:.2}", cpu / other));
            let millis = |per_mille| of(&move |round: &Round| round.told.quantile(per_mille).as_secs_f64() * 1e3);
            let left_out = rounds.len() - sound(rounds).count();
            let completed = -of(&|round: &Round| -(round.told.completed as f64));
            println!(
                "| {name} | {cpu:.2} | {} | {} | {completed:.0} | {:.2} | {:.2} | {left_out} |",
                ratio(full),
                ratio(bare),
                millis(500),
                millis(990),
            );
        }
    }
}

/// Turns in which nobody took the machine away, unless that is all of them.
fn sound(rounds: &[Round]) -> impl Iterator<Item = &Round> {
    let any = rounds.iter().any(|round| round.stolen <= 1);
    rounds.iter().filter(move |round| !any || round.stolen <= 1)
}
