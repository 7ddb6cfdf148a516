//! What comparisons came to, field by field: counts, rates, and what of it is noise. Bounded, and pure.
//!
//! A field is noise where the monolith's own two answers to one request differ in it as well. The rule is Diffy's, by
//! rates: reported where `raw > noise`, `|raw − noise| / (raw + noise) > 20 %` and `|raw − noise| > 0.03 %`; what Diffy
//! lacks is added: a least count, and a confidence interval of the difference that lies above zero (Newcombe, "Interval
//! estimation for the difference between independent proportions", Statist. Med. 17, 1998, method 10, one-sided 99 %).

use std::collections::HashMap;

use serde::Serialize;
use serde_json::{Value, json};

use super::compare::{Compared, Difference};

/// Fields of one route that are told apart.
const FIELDS: usize = 200;
/// Examples of each.
const EXAMPLES: usize = 3;
/// A field has differed so often before it is reported.
const LEAST: u64 = 3;
/// So many requests were asked twice before anything is taken for noise or for none.
const TWICE: u64 = 50;
/// Diffy's thresholds.
const RELATIVE: f64 = 0.20;
const ABSOLUTE: f64 = 0.0003;
/// One-sided 99 %.
const Z: f64 = 2.326;

/// What is counted of one route's comparisons.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// Whether the monolith is asked twice now and then.
    pub learns: bool,
    /// Pairs that were compared.
    pub compared: u64,
    /// Pairs without a difference that is not noise.
    pub matched: u64,
    /// Pairs with one.
    pub mismatched: u64,
    /// Requests for which the monolith was asked a second time.
    pub twice: u64,
    /// Copies that the service did not answer.
    pub failed: u64,
    fields: HashMap<String, Field>,
    /// Differences in fields beyond those.
    more: u64,
}

#[derive(Clone, Debug, Default)]
struct Field {
    raw: u64,
    noise: u64,
    order: u64,
    examples: Vec<Example>,
}

#[derive(Clone, Debug, Serialize)]
struct Example {
    request: String,
    control: String,
    candidate: String,
}

/// What a field's differences are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Judgement {
    /// The service's.
    Reported,
    /// The monolith's own.
    Noise,
    /// Not known yet.
    Undecided,
}

/// The field of an answer that never came.
pub const FAILED: &str = "answer";

impl Ledger {
    /// An empty one; `learns` where the monolith is asked twice now and then.
    pub fn new(learns: bool) -> Self {
        Self { learns, ..Self::default() }
    }

    /// Takes in a pair: what differs, and what differed between the monolith's own answers if it was asked twice.
    pub fn take(&mut self, request: &str, Compared { found, partial }: Compared, noise: Option<Compared>) {
        self.compared += 1;
        if let Some(noise) = noise {
            self.twice += 1;
            for field in noise.found.into_keys() {
                if let Some(field) = self.field(field) {
                    field.noise += 1;
                }
            }
        }
        // What was not looked at as a whole is not known to match.
        let mut judged = if partial { Judgement::Undecided } else { Judgement::Noise };
        for (name, Difference { control, candidate, order }) in found {
            if name == FAILED {
                self.failed += 1;
            }
            let Some(field) = self.field(name.clone()) else {
                (self.more, judged) = (self.more + 1, Judgement::Reported);
                continue;
            };
            field.raw += 1;
            field.order += u64::from(order);
            if field.examples.len() < EXAMPLES {
                field.examples.push(Example { request: request.to_owned(), control, candidate });
            }
            // One that counts is enough; one that may is enough for not knowing.
            judged = match (judged, self.counts(&name)) {
                (Judgement::Reported, _) | (_, Judgement::Reported) => Judgement::Reported,
                (Judgement::Undecided, _) | (_, Judgement::Undecided) => Judgement::Undecided,
                (Judgement::Noise, Judgement::Noise) => Judgement::Noise,
            };
        }
        match judged {
            Judgement::Noise => self.matched += 1,
            Judgement::Reported => self.mismatched += 1,
            Judgement::Undecided => {}
        }
    }

    fn field(&mut self, name: String) -> Option<&mut Field> {
        if self.fields.len() >= FIELDS && !self.fields.contains_key(&name) {
            return None;
        }
        Some(self.fields.entry(name).or_default())
    }

    /// Whether a difference in a field counts against the service.
    fn counts(&self, name: &str) -> Judgement {
        match self.fields.get(name) {
            Some(field) if self.learns && name != FAILED => match self.judge(field) {
                // Never seen to differ by itself.
                Judgement::Undecided if self.twice >= TWICE && field.noise == 0 => Judgement::Reported,
                judgement => judgement,
            },
            _ => Judgement::Reported,
        }
    }

    #[allow(clippy::cast_precision_loss, reason = "counts")]
    fn judge(&self, field: &Field) -> Judgement {
        let raw = field.raw as f64 / self.compared.max(1) as f64;
        if !self.learns {
            let reported = field.raw >= LEAST && raw > ABSOLUTE;
            return if reported { Judgement::Reported } else { Judgement::Undecided };
        }
        if self.twice < TWICE {
            return Judgement::Undecided;
        }
        let noise = field.noise as f64 / self.twice as f64;
        let (difference, sum) = ((raw - noise).abs(), raw + noise);
        let candidate = raw > noise && difference / sum > RELATIVE && difference > ABSOLUTE;
        let (low, _) = wilson(field.raw, self.compared);
        let (_, high) = wilson(field.noise, self.twice);
        let least = (raw - noise) - ((raw - low).powi(2) + (high - noise).powi(2)).sqrt();
        if candidate && field.raw >= LEAST && least > 0.0 {
            Judgement::Reported
        } else if field.noise > 0 {
            Judgement::Noise
        } else {
            Judgement::Undecided
        }
    }

    /// The share of compared answers that match, in percent, of those of which it is known.
    #[allow(clippy::cast_precision_loss, reason = "counts")]
    pub fn parity(&self) -> Option<f64> {
        let known = self.matched + self.mismatched;
        (known > 0).then(|| (self.matched as f64 / known as f64 * 1e5).round() / 1e3)
    }

    /// All of it, for people: fields that are reported first, then by how often they differ.
    pub fn describe(&self) -> Value {
        let mut fields: Vec<(&String, &Field, Judgement)> =
            self.fields.iter().map(|(name, field)| (name, field, self.judge(field))).collect();
        fields.sort_by(|a, b| {
            let rank = |judgement| judgement != Judgement::Reported;
            rank(a.2).cmp(&rank(b.2)).then(b.1.raw.cmp(&a.1.raw)).then(a.0.cmp(b.0))
        });
        #[allow(clippy::cast_precision_loss, reason = "counts")]
        let percent = |part: u64, whole: u64| (part as f64 / whole.max(1) as f64 * 1e5).round() / 1e3;
        let shown = fields.iter().map(|(name, field, judgement)| {
            json!({
                "field": name,
                "judgement": judgement,
                "differs": field.raw,
                "percent": percent(field.raw, self.compared),
                "noise_percent": self.learns.then(|| percent(field.noise, self.twice)),
                "order": field.order > 0 && field.order == field.raw,
                "examples": field.examples,
            })
        });
        let is_pointer = |name: &str| name.starts_with('/');
        let ignore: Vec<&String> = fields
            .iter()
            .filter(|(name, field, judgement)| is_pointer(name) && *judgement == Judgement::Noise && field.order == 0)
            .map(|(name, ..)| *name)
            .collect();
        let unordered: Vec<&String> = fields
            .iter()
            .filter(|(name, field, _)| is_pointer(name) && field.order > 0 && field.order == field.raw)
            .map(|(name, ..)| *name)
            .collect();
        // What differs nearly always is an id or a time more often than a mistake.
        let always: Vec<&String> = fields
            .iter()
            .filter(|(name, field, _)| {
                !self.learns
                    && is_pointer(name)
                    && field.order == 0
                    && self.compared >= 20
                    && field.raw * 10 >= self.compared * 9
            })
            .map(|(name, ..)| *name)
            .collect();
        json!({
            "compared": self.compared,
            "matched": self.matched,
            "mismatched": self.mismatched,
            "undecided": self.compared - self.matched - self.mismatched,
            "asked_twice": self.twice,
            "failed": self.failed,
            "parity_percent": self.parity(),
            "fields": shown.collect::<Vec<_>>(),
            "differences_in_more_fields": self.more,
            "suggest": {
                "ignore": ignore,
                "unordered": unordered,
                "differs_nearly_always": always,
            },
        })
    }
}

/// Wilson's interval of a share.
#[allow(clippy::cast_precision_loss, reason = "counts")]
fn wilson(hits: u64, count: u64) -> (f64, f64) {
    let n = count.max(1) as f64;
    let p = hits as f64 / n;
    let z2 = Z * Z;
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    (centre - half, centre + half)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(fields: &[&str]) -> Compared {
        let one = || Difference { control: "9".to_owned(), candidate: "x".to_owned(), order: false };
        Compared { found: fields.iter().map(|field| ((*field).to_owned(), one())).collect(), partial: false }
    }

    fn judgement(ledger: &Ledger, field: &str) -> Judgement {
        ledger.judge(&ledger.fields[field])
    }

    /// A share of requests is asked twice: by counts every timestamp would be reported, by rates none is.
    #[test]
    fn what_differs_by_itself_is_noise_and_a_defect_is_not() {
        let mut ledger = Ledger { learns: true, ..Ledger::default() };
        for n in 0..2_000 {
            let defect = n % 50 == 7;
            let fields: &[&str] = if defect { &["/at", "/price"] } else { &["/at"] };
            ledger.take("GET /", found(fields), (n % 5 == 0).then(|| found(&["/at"])));
        }
        assert_eq!(judgement(&ledger, "/at"), Judgement::Noise);
        assert_eq!(judgement(&ledger, "/price"), Judgement::Reported);
        let told = ledger.describe();
        assert_eq!(told["suggest"]["ignore"], json!(["/at"]));
        assert_eq!(told["fields"][0]["field"], "/price");
        // As long as it was not known whether the time is noise, nothing was said of those pairs.
        let parity = ledger.parity().unwrap();
        assert!((97.5..98.5).contains(&parity), "{parity}");
    }

    #[test]
    fn without_noise_every_difference_counts() {
        let mut ledger = Ledger::default();
        for n in 0..100 {
            ledger.take("GET /", found(if n < 2 { &["/a"] } else { &[] }), None);
        }
        assert_eq!(judgement(&ledger, "/a"), Judgement::Undecided);
        assert_eq!(ledger.parity(), Some(98.0));
        ledger.take("GET /", found(&["/a"]), None);
        assert_eq!(judgement(&ledger, "/a"), Judgement::Reported);
    }

    #[test]
    fn hostile_fields_are_bounded() {
        let mut ledger = Ledger::default();
        for n in 0..1_000 {
            ledger.take("GET /", found(&[&format!("/{n}")]), None);
        }
        assert_eq!(ledger.fields.len(), FIELDS);
        assert_eq!((ledger.more, ledger.mismatched), (800, 1_000));
    }
}
