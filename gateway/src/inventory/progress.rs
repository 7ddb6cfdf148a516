//! How much of the monolith is gone: shares over time, when they would be whole at this pace, and which routes it is silent for.
//!
//! Shares of requests and of writes come from the counters of the routes, which lose nothing; what the gateway answers by
//! itself counts on neither side. Endpoints come from the inventory. Pure, with the time given.

use std::collections::{BTreeMap, VecDeque};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::counts::Seconds;

/// How long a point of each series is, in seconds, and how many are kept: an hour, a day, a month, and three years.
const SERIES: [(u32, usize); 4] = [(5, 720), (300, 288), (3_600, 720), (86_400, 1_100)];
/// The version of the file.
const VERSION: u32 = 1;
/// How often it is looked at, in seconds.
pub const EVERY: u32 = SERIES[0].0;
/// Tags that are told apart.
const TAGS: usize = 32;
/// Points that a forecast looks at.
const LOOKED_AT: usize = 60;
/// And at least, over so many seconds at least.
const ENOUGH: usize = 6;
const LONG_ENOUGH: f64 = 6.0 * 3600.0;

/// What is counted of all routes, or of those with one tag: what the monolith has no part in, and all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Endpoints.
    pub endpoints: (u64, u64),
    /// Requests.
    pub requests: (u64, u64),
    /// Requests that write.
    pub writes: (u64, u64),
}

impl Tally {
    /// Adds what is counted of a time after it; endpoints are as they were last.
    fn follow(&mut self, other: &Self) {
        self.endpoints = other.endpoints;
        for (mine, theirs) in [(&mut self.requests, other.requests), (&mut self.writes, other.writes)] {
            mine.0 += theirs.0;
            mine.1 += theirs.1;
        }
    }
}

/// One point of a series; by tag, and all together under the empty one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// When it ended.
    pub at: Seconds,
    /// What was counted.
    pub of: BTreeMap<String, Tally>,
}

impl Point {
    /// Adds to a tag, as long as there are not too many.
    pub fn add(&mut self, tag: &str, tally: Tally) {
        if !self.of.contains_key(tag) && self.of.len() > TAGS {
            return;
        }
        let known = self.of.entry(tag.to_owned()).or_default();
        for (mine, theirs) in [
            (&mut known.endpoints, tally.endpoints),
            (&mut known.requests, tally.requests),
            (&mut known.writes, tally.writes),
        ] {
            mine.0 += theirs.0;
            mine.1 += theirs.1;
        }
    }
}

/// For how long the monolith has had no part in a route.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Silence {
    /// What the route is, in one number: silence is about that and nothing else.
    pub about: u64,
    /// When it began.
    pub since: Seconds,
    /// How much of that was watched, in seconds: while no gateway runs, nobody knows who asks the monolith.
    pub watched: Seconds,
    /// Whether it was ever seen to answer.
    pub heard: bool,
    /// Requests that the service has answered since, and not with a failure of its own: where nobody asks, silence says little.
    pub served: u64,
}

/// What was seen of a route since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// What the route is, in one number.
    pub about: u64,
    /// Whether the monolith had, or may have had, any part in it.
    pub answered: bool,
    /// Requests that the service has answered well.
    pub served: u64,
    /// The seconds that went by.
    pub elapsed: Seconds,
}

/// The series, and the silence.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// The version of the file.
    version: u32,
    series: Vec<VecDeque<Point>>,
    /// What is being counted of the coarser series.
    open: Vec<Point>,
    /// By route.
    silence: BTreeMap<String, Silence>,
    /// Whether the books were closed: whoever was killed may have missed the last moments.
    closed: bool,
}

/// Which share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// Endpoints.
    Endpoints,
    /// Requests.
    Requests,
    /// Writes.
    Writes,
}

impl What {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Endpoints, Self::Requests, Self::Writes];

    fn of(self, tally: &Tally) -> (u64, u64) {
        match self {
            Self::Endpoints => tally.endpoints,
            Self::Requests => tally.requests,
            Self::Writes => tally.writes,
        }
    }

    /// The share, of one, where there is anything.
    #[allow(clippy::cast_precision_loss, reason = "counts")]
    pub fn share(self, tally: &Tally) -> Option<f64> {
        let (off, all) = self.of(tally);
        (all > 0).then(|| off as f64 / all as f64)
    }
}

/// When a share would be whole at the pace of late.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// The share.
    pub what: What,
    /// When; nothing where it does not grow.
    pub done: Option<Timestamp>,
    /// The earlier and the later end: half of all pairs of points say that it lies between them.
    pub between: Option<(Timestamp, Timestamp)>,
    /// Points of percent a week.
    pub percent_a_week: f64,
    /// The time that it is made from, in hours.
    pub hours: f64,
    /// In words.
    pub told: String,
}

impl Progress {
    /// Whether this gateway can read what was kept.
    pub fn is_known(&self) -> bool {
        self.version <= VERSION
    }

    /// Takes up what was kept, and goes on with what was seen meanwhile. Who did not close the books may have missed an answer of the
    /// monolith: then no silence of before counts.
    #[must_use]
    pub fn resume(mut self, meanwhile: Self) -> Self {
        if !self.closed {
            self.silence.clear();
        }
        self.closed = false;
        self.series.truncate(SERIES.len());
        self.open.truncate(SERIES.len());
        for (route, new) in meanwhile.silence {
            let old = self.silence.get(&route).copied().filter(|old| old.about == new.about && !new.heard);
            let joined = old.map_or(new, |old| Silence {
                since: old.since,
                watched: old.watched.saturating_add(new.watched),
                heard: old.heard,
                served: old.served.saturating_add(new.served),
                ..new
            });
            self.silence.insert(route, joined);
        }
        for point in meanwhile.series.into_iter().take(1).flatten() {
            self.push(point);
        }
        self
    }

    /// Says whether what is kept is all: only what is closed is believed to have missed nothing.
    pub fn close(&mut self, closed: bool) {
        (self.closed, self.version) = (closed, VERSION);
    }

    /// Adds a point of the finest series.
    pub fn push(&mut self, point: Point) {
        self.series.resize_with(SERIES.len(), VecDeque::new);
        self.open.resize_with(SERIES.len(), Point::default);
        let at = point.at;
        for (n, (length, most)) in SERIES.into_iter().enumerate() {
            if n > 0 {
                let open = &mut self.open[n];
                if open.at != 0 && at / length != open.at / length {
                    let done = std::mem::take(open);
                    keep(&mut self.series[n], done, most);
                }
                let open = &mut self.open[n];
                open.at = at;
                // A tag that is not used any more goes with the point in which it was.
                for (tag, tally) in &point.of {
                    open.of.entry(tag.clone()).or_default().follow(tally);
                }
            }
        }
        keep(&mut self.series[0], point, SERIES[0].1);
    }

    /// Notes what was seen of a route since the last look.
    pub fn hear(&mut self, route: &str, heard: Heard, now: Seconds) {
        let new = Silence { about: heard.about, since: now, ..Silence::default() };
        if !self.silence.contains_key(route) {
            self.silence.insert(route.to_owned(), new);
            return;
        }
        let Some(silence) = self.silence.get_mut(route) else { return };
        if silence.about != heard.about {
            *silence = new;
        } else if heard.answered {
            *silence = Silence { heard: true, ..new };
        } else {
            silence.watched = silence.watched.saturating_add(heard.elapsed);
            silence.served = silence.served.saturating_add(heard.served);
        }
    }

    /// Forgets routes that the file does not have.
    pub fn keep_only(&mut self, routes: &dyn Fn(&str) -> bool) {
        self.silence.retain(|name, _| routes(name));
    }

    /// Since when the monolith has not answered for a route.
    pub fn silence(&self, route: &str) -> Option<Silence> {
        self.silence.get(route).copied()
    }

    /// The newest point.
    pub fn newest(&self) -> Option<&Point> {
        self.series.first()?.back()
    }

    /// The points of all series, from the oldest to the newest, each time by the finest that has it.
    pub fn points(&self) -> Vec<&Point> {
        let mut points: Vec<&Point> = Vec::new();
        let mut until = u32::MAX;
        for (series, open) in self.series.iter().zip(&self.open) {
            let open = Some(open).filter(|open| open.at != 0 && !series.is_empty());
            let mut these: Vec<&Point> = series.iter().chain(open).filter(|point| point.at < until).collect();
            until = these.first().map_or(until, |point| point.at);
            these.append(&mut points);
            points = these;
        }
        points
    }

    /// When each share would be whole, by the coarsest series that has enough of it.
    pub fn forecasts(&self, now: Seconds) -> Vec<Forecast> {
        What::ALL
            .into_iter()
            .filter_map(|what| {
                let shares = |series: &VecDeque<Point>| -> Vec<(f64, f64)> {
                    let skip = series.len().saturating_sub(LOOKED_AT);
                    let known = series.iter().skip(skip);
                    known.filter_map(|point| Some((f64::from(point.at), what.share(point.of.get("")?)?))).collect()
                };
                let looked = self.series.iter().rev().map(shares).find(|shares| is_enough(shares))?;
                Some(forecast(what, &looked, now))
            })
            .collect()
    }
}

/// Whether a pace can be told from these.
fn is_enough(shares: &[(f64, f64)]) -> bool {
    let span = shares.last().zip(shares.first()).map_or(0.0, |((to, _), (from, _))| to - from);
    shares.len() >= ENOUGH && span >= LONG_ENOUGH
}

fn keep(series: &mut VecDeque<Point>, point: Point, most: usize) {
    if series.len() >= most {
        series.pop_front();
    }
    series.push_back(point);
}

/// By the median of the slopes of all pairs (Theil 1950, Sen 1968): one odd day moves it little.
fn forecast(what: What, shares: &[(f64, f64)], now: Seconds) -> Forecast {
    let mut slopes = Vec::new();
    for (n, (then, before)) in shares.iter().enumerate() {
        for (later, after) in &shares[n + 1..] {
            slopes.push((after - before) / (later - then).max(1.0));
        }
    }
    slopes.sort_by(f64::total_cmp);
    let at = |part: usize| slopes.get(slopes.len() * part / 4).copied().unwrap_or(0.0);
    let current = shares.last().map_or(0.0, |(_, share)| *share);
    let hours = shares.last().zip(shares.first()).map_or(0.0, |((to, _), (from, _))| (to - from) / 3600.0);
    // Nobody plans for what is farther away than this.
    let most = 20.0 * 365.25 * 86_400.0;
    let when = |slope: f64| {
        let seconds = (1.0 - current) / slope;
        #[allow(clippy::cast_possible_truncation, reason = "less than twenty years")]
        let whole = (slope > 0.0 && seconds < most).then_some(seconds.max(0.0) as i64)?;
        Timestamp::from_second(i64::from(now) + whole).ok()
    };
    let done = if current >= 1.0 { Timestamp::from_second(i64::from(now)).ok() } else { when(at(2)) };
    let between = if current >= 1.0 { None } else { when(at(3)).zip(when(at(1))) };
    let name = match what {
        What::Endpoints => "endpoints",
        What::Requests => "requests",
        What::Writes => "writes",
    };
    let day = |moment: Timestamp| moment.strftime("%Y-%m-%d").to_string();
    let told = match (done, between) {
        _ if current >= 1.0 => format!("all {name} are off the monolith"),
        (Some(done), Some((from, to))) => {
            format!("all {name} off the monolith by {}, probably between {} and {}", day(done), day(from), day(to))
        }
        (Some(done), None) => format!("all {name} off the monolith by {}, if this pace lasts", day(done)),
        (None, _) => format!("the share of {name} off the monolith does not grow"),
    };
    let percent_a_week = (at(2) * 7.0 * 86_400.0 * 1e4).round() / 100.0;
    Forecast { what, done, between, percent_a_week, hours: (hours * 10.0).round() / 10.0, told }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(off: u64, all: u64) -> Tally {
        Tally { endpoints: (off, all), requests: (off * 10, all * 10), writes: (0, all) }
    }

    fn filled(days: u32, share: impl Fn(u32) -> u64) -> Progress {
        let mut progress = Progress::default();
        // A point an hour stands for the many of it.
        for hour in 0..days * 24 {
            let mut point = Point { at: 1_800_000_000 + hour * 3_600, ..Point::default() };
            point.add("", tally(share(hour), 1_000));
            progress.push(point);
        }
        progress
    }

    #[test]
    fn a_share_that_grows_by_one_point_a_day_is_whole_after_a_hundred() {
        let progress = filled(40, |hour| u64::from(hour) * 10 / 24 + u64::from(hour % 7));
        let now = 1_800_000_000 + 40 * 86_400;
        let forecasts = progress.forecasts(now);
        let [endpoints, requests, writes] = &forecasts[..] else { panic!("{forecasts:?}") };
        for forecast in [endpoints, requests] {
            let days = (forecast.done.unwrap().as_second() - i64::from(now)) / 86_400;
            assert!((55..65).contains(&days), "{forecast:?}");
            assert!((6.5..7.5).contains(&forecast.percent_a_week), "{forecast:?}");
            let (from, to) = forecast.between.unwrap();
            assert!(from <= forecast.done.unwrap() && forecast.done.unwrap() <= to, "{forecast:?}");
        }
        assert_eq!((writes.done, writes.percent_a_week), (None, 0.0));
        assert!(writes.told.contains("does not grow"), "{writes:?}");
        // An hour, in however many points, says nothing of a week.
        let mut young = Progress::default();
        for n in 0..720 {
            let mut point = Point { at: 1_800_000_000 + n * 5, ..Point::default() };
            point.add("", tally(u64::from(n), 1_000));
            young.push(point);
        }
        assert!(young.forecasts(1_800_003_600).is_empty());
        // Too little is nothing.
        assert!(filled(0, |_| 1).forecasts(now).is_empty());
    }

    #[test]
    fn series_are_bounded_and_cover_each_time_once() {
        let mut progress = Progress::default();
        for n in 0..200_000_u32 {
            let mut point = Point { at: 1_800_000_000 + n * 5, ..Point::default() };
            point.add("", tally(1, 2));
            point.add(&format!("tag-{}", n % 100), tally(1, 2));
            progress.push(point);
        }
        for (series, (_, most)) in progress.series.iter().zip(SERIES) {
            assert!(series.len() <= most, "{}", series.len());
        }
        let points = progress.points();
        assert!(points.windows(2).all(|pair| pair[0].at < pair[1].at));
        assert_eq!(points.last().unwrap().at, 1_800_000_000 + 199_999 * 5);
        // All requests of a day are in its point.
        let day = &progress.series[3][5].of[""];
        assert_eq!(day.requests, (86_400 / 5 * 10, 86_400 / 5 * 20));
        let mut many = Point::default();
        (0..1_000).for_each(|n| many.add(&n.to_string(), tally(1, 2)));
        assert_eq!(many.of.len(), TAGS + 1);
    }

    #[test]
    fn silence_is_what_was_watched_of_a_route_as_it_is() {
        let mut progress = Progress::default();
        let quiet = Heard { about: 7, answered: false, served: 2, elapsed: 5 };
        let of = |progress: &Progress| progress.silence("orders").unwrap();
        progress.hear("orders", quiet, 1_000);
        assert_eq!((of(&progress).since, of(&progress).watched, of(&progress).served), (1_000, 0, 0));
        for n in 1..=10 {
            progress.hear("orders", quiet, 1_000 + n * 5);
        }
        assert_eq!((of(&progress).since, of(&progress).watched, of(&progress).served), (1_000, 50, 20));
        progress.hear("orders", Heard { answered: true, ..quiet }, 1_055);
        assert_eq!(of(&progress), Silence { about: 7, since: 1_055, watched: 0, heard: true, served: 0 });
        progress.hear("orders", quiet, 1_060);
        // Another route under the same name.
        let mut other = progress.clone();
        other.hear("orders", Heard { about: 8, ..quiet }, 1_065);
        assert_eq!((of(&other).about, of(&other).since, of(&other).watched), (8, 1_065, 0));
        // Killed: an answer may have been missed. Closed: the time between counts for nothing.
        let mut meanwhile = Progress::default();
        meanwhile.hear("orders", quiet, 900_000);
        meanwhile.hear("orders", quiet, 900_005);
        assert_eq!(of(&progress.clone().resume(meanwhile.clone())).since, 900_000);
        progress.close(true);
        let resumed = of(&progress.clone().resume(meanwhile.clone()));
        assert_eq!((resumed.since, resumed.watched, resumed.served), (1_055, 10, 4));
        // What the monolith did since is not forgotten.
        meanwhile.hear("orders", Heard { answered: true, ..quiet }, 900_010);
        assert_eq!(of(&progress.clone().resume(meanwhile)).since, 900_010);
        progress.keep_only(&|name| name == "users");
        assert_eq!(progress.silence("orders"), None);
    }
}
