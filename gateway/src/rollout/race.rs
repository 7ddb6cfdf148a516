//! Which arm has more of something than its share of requests: an e-process.
//!
//! Keys were drawn into the arms by their hash, a share `π` of them into the service's. So under the null hypothesis (the service has no more of
//! it than the monolith) what happens to a key is the service's with a probability of at most `π`, whatever its requests are and whatever the
//! rate is at the time: load, bursts that hit both arms and drift cancel. A bet of odds `ψ > 1` on the service
//! multiplies the capital by `ψ / (1 + π(ψ − 1))` when it was the service's and by `1 / (1 + π(ψ − 1))` when it was
//! the monolith's: under the null its expectation is at most one, so the capital is an e-process, and the chance that it ever
//! reaches `1/alpha` is at most `alpha` (Ville 1939; Ramdas, Grünwald, Vovk and Shafer, "Game-theoretic
//! statistics and safe anytime-valid inference", Statist. Sci. 38, 2023; conditioning on the sum as Lindon and Malek, "Anytime-valid inference for multinomial count data", 2022).
//!
//! Several bets run beside each other, one of them to keep the money, and a small part of the capital moves between them all the time (Herbster and
//! Warmuth, "Tracking the best expert", 1998): what was learned in good times is not held against a service that
//! goes bad later. Requests are not independent, so what one key (a user, a session) can win is bounded: its
//! later events bet with little (`WEIGHTS`); and one moment can win only so much: the rest is paid out in the moments that follow for as long
//! as the service goes on to be worse, and is lost otherwise. Both only take away from gains, so the expectation stays at most one. Pure.

/// Classes of weight: the n-th event of one key bets with the n-th of them, and later ones with nothing.
pub const CLASSES: usize = 4;

/// Together they are one: so the bet stays fair however the events of one key hang together (Hölder's inequality).
/// Most failures are the only one of their key, so most of the bet is on the first.
const WEIGHTS: [f64; CLASSES] = [0.8, 0.1, 0.05, 0.05];

/// The odds that are bet on. The first keeps the money.
const ODDS: [f64; 7] = [1.0, 1.25, 1.6, 2.5, 5.0, 20.0, 200.0];
/// At the n-th moment in which something happened `1 / (n + MOVES)` of the capital moves between the bets: all of that together costs
/// little, however long it lasts.
const MOVES: f64 = 50.0;
/// What one moment can win, as a logarithm.
const MOMENT: f64 = 1.0;

/// What happened at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moment {
    /// The share of keys that were drawn into the service.
    pub share: f64,
    /// Whether more of the service's requests had it, whatever their keys.
    pub worse: bool,
    /// What happened to requests of the monolith and of the service, by class of weight.
    pub events: [[u32; CLASSES]; 2],
}

/// The capital.
#[derive(Clone, Debug, PartialEq)]
pub struct Race {
    /// How it is spread over the bets.
    spread: [f64; ODDS.len()],
    /// Moments in which something happened.
    moments: f64,
    /// The logarithm of all of it.
    capital: f64,
    /// What single moments have won beyond what is paid out at once.
    reserve: f64,
    /// The most that it ever was.
    most: f64,
}

impl Default for Race {
    fn default() -> Self {
        #[allow(clippy::cast_precision_loss, reason = "seven")]
        let even = 1.0 / ODDS.len() as f64;
        Self { spread: [even; ODDS.len()], moments: 0.0, capital: 0.0, reserve: 0.0, most: 0.0 }
    }
}

impl Race {
    /// Takes in what happened at a moment.
    pub fn run(&mut self, moment: &Moment) {
        let share = moment.share;
        if share <= 0.0 || share >= 1.0 {
            return;
        }
        let weigh = |events: &[u32; CLASSES]| -> f64 {
            events.iter().zip(WEIGHTS).map(|(count, weight)| f64::from(*count) * weight).sum()
        };
        let [lost, won] = moment.events.map(|events| weigh(&events));
        let gain = if lost + won > 0.0 { self.bet(share, lost, won) } else { 0.0 };
        self.capital += gain.min(MOMENT);
        if moment.worse {
            self.reserve += (gain - MOMENT).max(0.0);
            let paid = self.reserve.min(MOMENT - gain.clamp(0.0, MOMENT));
            self.reserve -= paid;
            self.capital += paid;
        } else {
            self.reserve = 0.0;
        }
        self.most = self.most.max(self.capital);
    }

    /// What all bets together have won, as a logarithm.
    fn bet(&mut self, share: f64, lost: f64, won: f64) -> f64 {
        let mut gains = [0.0; ODDS.len()];
        for (gain, odds) in gains.iter_mut().zip(ODDS) {
            *gain = won * odds.ln() - (won + lost) * (share * (odds - 1.0)).ln_1p();
        }
        let best = gains.iter().copied().fold(f64::MIN, f64::max);
        let parts: Vec<f64> = self.spread.iter().zip(gains).map(|(part, gain)| part * (gain - best).exp()).collect();
        let sum: f64 = parts.iter().sum();
        let moves = 1.0 / (self.moments + MOVES);
        self.moments += 1.0;
        #[allow(clippy::cast_precision_loss, reason = "seven")]
        let even = moves / ODDS.len() as f64;
        for (part, new) in self.spread.iter_mut().zip(parts) {
            *part = (1.0 - moves) * new / sum + even;
        }
        sum.ln() + best
    }

    /// Whether the service was ever shown to have more, but for a chance of `alpha`.
    pub fn is_lost(&self, alpha: f64) -> bool {
        self.most >= (1.0 / alpha).ln()
    }

    /// The evidence, as the logarithm to base ten of how unlikely it is.
    pub fn evidence(&self) -> f64 {
        self.most / std::f64::consts::LN_10
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn moment(share: f64, events: [u32; 2]) -> Moment {
        Moment { share, worse: events[1] > events[0], events: events.map(|count| [count, 0, 0, 0]) }
    }

    #[test]
    fn a_service_that_fails_everything_is_found_out_at_once() {
        for (share, count) in [(0.01, 3), (0.25, 63), (0.5, 125)] {
            let mut race = Race::default();
            let moments = (1..20).find(|_| {
                race.run(&moment(share, [0, count]));
                race.is_lost(0.0005)
            });
            assert!(moments.is_some_and(|moments| moments <= 9), "{share}: {moments:?}");
        }
    }

    #[test]
    fn good_times_are_not_held_against_bad_news() {
        let mut race = Race::default();
        for _ in 0..10_000 {
            race.run(&moment(0.25, [3, 1]));
        }
        assert!(!race.is_lost(0.01));
        let moments = (1..40).find(|_| {
            race.run(&moment(0.25, [3, 250]));
            race.is_lost(0.0005)
        });
        assert!(moments.is_some_and(|moments| moments <= 30), "{moments:?}");
    }

    #[test]
    fn one_key_wins_less_than_several() {
        let after = |events: [u32; CLASSES]| {
            let mut race = Race::default();
            race.run(&Moment { share: 0.5, worse: true, events: [[0; CLASSES], events] });
            race.capital
        };
        let (one, two) = (after([1, 1, 0, 0]), after([2, 0, 0, 0]));
        assert!(one < two, "{one} {two}");
    }

    /// What one moment wins beyond its limit is paid out while the service stays worse, and lost once it is not.
    #[test]
    fn one_bad_moment_is_no_proof_and_ten_are() {
        let after = |recovers: bool| {
            let mut race = Race::default();
            let quiet = |worse| Moment { share: 0.05, worse, events: [[0; CLASSES]; 2] };
            race.run(&moment(0.05, [0, 50]));
            race.run(&quiet(!recovers));
            for _ in 0..20 {
                race.run(&quiet(true));
            }
            race.is_lost(0.0005)
        };
        assert!(after(false) && !after(true));
    }

    proptest! {
        /// The bet is fair: over both outcomes the expected capital is no more than what there was.
        #[test]
        fn no_bet_wins_under_the_null(share in 0.0001_f64..0.9999, class in 0..CLASSES, before in 0_u32..20) {
            let mut race = Race::default();
            for _ in 0..before {
                race.run(&moment(share, [1, 1]));
            }
            let after = |arm: usize| {
                let mut race = race.clone();
                let mut events = [[0; CLASSES]; 2];
                events[arm][class] = 1;
                race.run(&Moment { share, worse: arm == 1, events });
                race.capital
            };
            let expected = share * after(1).exp() + (1.0 - share) * after(0).exp();
            prop_assert!(expected <= race.capital.exp() * (1.0 + 1e-9), "{expected}");
        }
    }
}
