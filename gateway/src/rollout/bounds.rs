//! Bounds that hold at every look at once: confidence sequences of a share and of a quantile.
//!
//! A share: Robbins' mixture of likelihood ratios against a Beta distribution (Robbins 1970; Howard, Ramdas, `McAuliffe` and
//! Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences", Ann. Statist. 49, 2021). A quantile: the number of
//! values at or below the true quantile is a count with a known share, so the same mixture says which ranks it may have
//! (Howard and Ramdas, "Sequential estimation of quantiles with applications to A/B testing and best-arm identification",
//! Bernoulli 28, 2022). By Ville's inequality each holds for all sample sizes together with probability 1 − alpha, so
//! looking often costs nothing. Pure.

use libm::lgamma;

/// The Beta mixture is centred near the shares that matter here, about a percent.
const A: f64 = 1.0;
/// Its other parameter.
const B: f64 = 100.0;

fn ln_beta(a: f64, b: f64) -> f64 {
    lgamma(a) + lgamma(b) - lgamma(a + b)
}

/// The evidence against each share: the logarithm of the mixture's likelihood ratio.
fn against(hits: f64, count: f64, (a, b): (f64, f64)) -> impl Fn(f64) -> f64 {
    let misses = count - hits;
    let mixture = ln_beta(hits + a, misses + b) - ln_beta(a, b);
    let log = |x: f64, p: f64| if x > 0.0 { x * p.ln() } else { 0.0 };
    move |share| mixture - log(hits, share) - log(misses, 1.0 - share)
}

/// A share that lies between these, whenever one looks, but for a chance of `alpha` on each side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// The least.
    pub low: f64,
    /// The most.
    pub high: f64,
}

/// The share of `hits` among `count`, soonest known where it is about a percent.
pub fn share(hits: f64, count: f64, alpha: f64) -> Interval {
    around((A, B), hits, count, alpha)
}

/// The same where it may as well be any other.
pub fn any_share(hits: f64, count: f64, alpha: f64) -> Interval {
    around((1.0, 1.0), hits, count, alpha)
}

fn around(mixture: (f64, f64), hits: f64, count: f64, alpha: f64) -> Interval {
    if count <= 0.0 {
        return Interval { low: 0.0, high: 1.0 };
    }
    let limit = (1.0 / alpha).ln();
    let against = against(hits, count, mixture);
    let refused = |share: f64| against(share) >= limit;
    let mean = (hits / count).clamp(0.0, 1.0);
    let bisect = |mut inside: f64, mut outside: f64| {
        // The evidence grows away from the mean, on both sides.
        for _ in 0..40 {
            let middle = f64::midpoint(inside, outside);
            if refused(middle) {
                outside = middle;
            } else {
                inside = middle;
            }
        }
        outside
    };
    let (least, most) = (1e-12, 1.0 - 1e-12);
    Interval {
        low: if mean > least && refused(least) { bisect(mean, least) } else { 0.0 },
        high: if mean < most && refused(most) { bisect(mean.max(least), most) } else { 1.0 },
    }
}

/// The ranks, counted from one among `count` values in order, between which a quantile lies. Nothing where they do not bound it yet.
pub fn ranks(quantile: f64, count: u64, alpha: f64) -> (Option<u64>, Option<u64>) {
    if count == 0 {
        return (None, None);
    }
    #[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    let of = |n: u64| n as f64;
    let limit = (1.0 / alpha).ln();
    // Around the quantile's own share: the mixture is as wide as a few hundred values.
    let mixture = (quantile * 200.0, (1.0 - quantile) * 200.0);
    let refused = |below: u64| against(of(below), of(count), mixture)(quantile) >= limit;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count")]
    let middle = (of(count) * quantile) as u64;
    // How many values are at or below it: from `low` to `high`.
    let low = refused(0).then(|| {
        let (mut outside, mut inside) = (0, middle);
        while inside - outside > 1 {
            let n = outside.midpoint(inside);
            if refused(n) { outside = n } else { inside = n }
        }
        inside
    });
    let high = refused(count).then(|| {
        let (mut inside, mut outside) = (middle, count);
        while outside - inside > 1 {
            let n = inside.midpoint(outside);
            if refused(n) { outside = n } else { inside = n }
        }
        inside
    });
    // With `k` values at or below it, it is at least the k-th and less than the one after.
    (low, high.map(|high| high + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_hold_the_mean_and_narrow() {
        let mut width = 1.0;
        for n in [10.0, 100.0, 1_000.0, 10_000.0, 100_000.0] {
            let Interval { low, high } = share(n * 0.02, n, 0.001);
            assert!(low < 0.02 && high > 0.02, "{n}: {low} {high}");
            assert!(high - low < width, "{n}");
            width = high - low;
        }
        assert!(width < 0.005);
        let none = share(0.0, 3_000.0, 0.0005);
        assert!(none.low == 0.0 && none.high < 0.005, "{none:?}");
        let all = share(50.0, 50.0, 0.001);
        assert!(all.low > 0.1 && (all.high - 1.0).abs() < 1e-9, "{all:?}");
        let all = any_share(50.0, 50.0, 0.001);
        assert!(all.low > 0.75 && (all.high - 1.0).abs() < 1e-9, "{all:?}");
    }

    #[test]
    fn ranks_close_in_on_the_quantile() {
        assert_eq!(ranks(0.99, 10, 0.001).1, None);
        let (low, high) = ranks(0.99, 100_000, 0.001);
        let (low, high) = (low.unwrap(), high.unwrap());
        assert!((98_700..99_000).contains(&low) && (99_000..99_250).contains(&high), "{low} {high}");
    }

    /// The promise itself: over many sequences, looked at after every value, few ever leave their bounds.
    #[test]
    fn few_sequences_ever_leave_their_bounds() {
        let mut state = 7_u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            f64::from(u32::try_from(state >> 40).unwrap()) / f64::from(1 << 24)
        };
        let (mut left, limit) = (0, (1.0_f64 / 0.05).ln());
        for _ in 0..400 {
            let mut hits = 0.0;
            let ever = (1..=1_000).fold(false, |ever, n| {
                hits += f64::from(u8::from(random() < 0.01));
                ever | (against(hits, f64::from(n), (A, B))(0.01) >= limit)
            });
            left += i32::from(ever);
        }
        assert!(left <= 20, "{left} of 400, 20 are allowed");
    }
}
