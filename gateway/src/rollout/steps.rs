//! From verdicts to steps. Pure.

use serde::{Deserialize, Serialize};

use super::verdict::Verdict;
use crate::config::rollout::OnFailure;

/// How a rollout stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It looks for evidence, or waits at a gate.
    Running,
    /// Its last step has passed.
    Complete,
    /// It was shown to be worse, and a person shall decide.
    Frozen,
    /// It was taken back.
    RolledBack,
}

impl Phase {
    /// The word in histories.
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Complete => "complete",
            Self::Frozen => "frozen",
            Self::RolledBack => "rolled_back",
        }
    }
}

/// Where a rollout is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// How it stands.
    pub phase: Phase,
    /// The step that runs; none before the first.
    pub step: Option<usize>,
}

impl Position {
    /// Before the first step.
    pub const START: Self = Self { phase: Phase::Running, step: None };

    /// The share, of 10,000, with these steps.
    pub fn share(self, steps: &[u16]) -> u16 {
        match (self.phase, self.step) {
            (Phase::RolledBack, _) | (_, None) => 0,
            (_, Some(step)) => steps.get(step).copied().unwrap_or(0),
        }
    }

    /// The step after this, if there is one.
    pub fn next(self, steps: &[u16]) -> Option<usize> {
        let next = self.step.map_or(0, |step| step + 1);
        (next < steps.len()).then_some(next)
    }

    /// Whether evidence is looked at: not where nothing is the service's, and not where all is and the rollout is over.
    pub fn is_judged(self, steps: &[u16]) -> bool {
        match self.phase {
            Phase::Running => self.step.is_some(),
            Phase::Complete => self.share(steps) < crate::routing::cohort::BUCKETS,
            Phase::Frozen | Phase::RolledBack => false,
        }
    }

    /// Where it goes with this verdict; nowhere while a gate before the next step is closed.
    pub fn after(self, verdict: &Verdict, steps: &[u16], gates_are_open: bool, on_failure: OnFailure) -> Option<Self> {
        match verdict {
            Verdict::Fail(_) if self.is_judged(steps) => Some(match on_failure {
                OnFailure::Rollback => Self { phase: Phase::RolledBack, ..self },
                OnFailure::Freeze => Self { phase: Phase::Frozen, ..self },
            }),
            Verdict::Pass if self.phase == Phase::Running => match self.next(steps) {
                None => Some(Self { phase: Phase::Complete, ..self }),
                next => gates_are_open.then_some(Self { step: next, ..self }),
            },
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [u16; 3] = [100, 5_000, 10_000];

    fn after(position: Position, verdict: &Verdict, open: bool) -> Option<Position> {
        position.after(verdict, &STEPS, open, OnFailure::Rollback)
    }

    #[test]
    fn steps_are_taken_one_by_one_and_only_on_proof() {
        let hold = Verdict::Hold(Vec::new());
        let mut position = Position::START;
        let mut shares = vec![position.share(&STEPS)];
        while let Some(next) = after(position, &Verdict::Pass, true) {
            assert_eq!(after(position, &hold, true), None);
            assert!(next.phase == Phase::Complete || after(position, &Verdict::Pass, false).is_none());
            position = next;
            shares.push(position.share(&STEPS));
        }
        assert_eq!((shares, position.phase), (vec![0, 100, 5_000, 10_000, 10_000], Phase::Complete));
    }

    #[test]
    fn a_failure_takes_back_or_freezes() {
        let fail = Verdict::Fail(String::new());
        let half = Position { phase: Phase::Running, step: Some(1) };
        let back = after(half, &fail, false).unwrap();
        assert_eq!((back.phase, back.share(&STEPS)), (Phase::RolledBack, 0));
        let frozen = half.after(&fail, &STEPS, true, OnFailure::Freeze).unwrap();
        assert_eq!((frozen.phase, frozen.share(&STEPS)), (Phase::Frozen, 5_000));
        assert_eq!(after(back, &Verdict::Pass, true), None);
        assert_eq!(after(frozen, &Verdict::Pass, true), None);
        // Done at half: still watched. Done altogether: nobody to compare with.
        let done = |steps: &[u16]| Position { phase: Phase::Complete, step: Some(1) }.is_judged(steps);
        assert!(done(&[100, 5_000]) && !done(&[100, 10_000]));
    }
}
