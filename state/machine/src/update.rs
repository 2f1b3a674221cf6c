//! The life of an update, in words that all carriers share.

mod departure;

use std::fmt;
use std::time::Duration;

use abi::state::StateName;

pub use self::departure::Departure;
pub use self::departure::DepartureError;

/// Where an update is. Each is reached by one side, in this order; both sides tell of theirs through
/// [`Observer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// The successor is connected and has said what it is.
    Connected,
    /// The successor knows the formats, and can read all of them.
    Offered,
    /// The successor has the regions' descriptors.
    Received,
    /// The successor has checked and mapped the regions.
    Attached,
    /// The successor has a VM with all that does not need the guest's state.
    Warm,
    /// The predecessor's guest stands still.
    Paused,
    /// The predecessor has saved the guest's state.
    Saved,
    /// The predecessor has given the machine up.
    Sealed,
    /// The successor has claimed the machine.
    Claimed,
    /// The successor has loaded the guest's state.
    Loaded,
    /// The successor has taken the machine over: the point of no return.
    Running,
    /// The successor's guest runs, and its session is settled.
    Settled,
}

impl Step {
    /// All of them, in order.
    pub const ALL: [Self; 12] = [
        Self::Connected,
        Self::Offered,
        Self::Received,
        Self::Attached,
        Self::Warm,
        Self::Paused,
        Self::Saved,
        Self::Sealed,
        Self::Claimed,
        Self::Loaded,
        Self::Running,
        Self::Settled,
    ];

    /// The step of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|step| step.name() == name)
    }

    /// Its name, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Offered => "offered",
            Self::Received => "received",
            Self::Attached => "attached",
            Self::Warm => "warm",
            Self::Paused => "paused",
            Self::Saved => "saved",
            Self::Sealed => "sealed",
            Self::Claimed => "claimed",
            Self::Loaded => "loaded",
            Self::Running => "running",
            Self::Settled => "settled",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Is told of each step as it is reached. Within the pause: be quick.
pub trait Observer {
    /// This side has reached a step.
    fn reached(&mut self, step: Step);
}

impl<F: FnMut(Step)> Observer for F {
    fn reached(&mut self, step: Step) {
        self(step);
    }
}

/// When each step was reached, by both sides: how long an update took, and where. Moments are nanoseconds on a
/// clock that both sides share.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Timeline {
    reached: Vec<(Step, u64)>,
}

impl Timeline {
    /// Notes a step. Of a step that was noted before, the first moment counts.
    pub fn note(&mut self, step: Step, at_ns: u64) {
        if self.at_ns(step).is_none() {
            self.reached.push((step, at_ns));
            self.reached.sort_unstable();
        }
    }

    /// When a step was reached.
    pub fn at_ns(&self, step: Step) -> Option<u64> {
        self.reached.iter().find(|(reached, _)| *reached == step).map(|(_, at)| *at)
    }

    /// Every step that was noted, and when, in the order of the steps.
    pub fn reached(&self) -> &[(Step, u64)] {
        &self.reached
    }

    /// How long the way to each step took, from the step before it that was noted.
    pub fn phases(&self) -> impl Iterator<Item = (Step, Duration)> + '_ {
        let pairs = self.reached.windows(2);
        pairs.map(|pair| (pair[1].0, Duration::from_nanos(pair[1].1.saturating_sub(pair[0].1))))
    }

    /// From one step to another.
    pub fn between(&self, from: Step, to: Step) -> Option<Duration> {
        Some(Duration::from_nanos(self.at_ns(to)?.saturating_sub(self.at_ns(from)?)))
    }
}

/// The guest as the predecessor's side of an update needs it.
pub trait Guest {
    /// Why it could not be paused, saved or resumed.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Stops every vCPU and device. When this has returned, nothing of the guest's memory changes.
    ///
    /// # Errors
    /// If one cannot be stopped; it is then resumed.
    fn pause(&mut self) -> Result<(), Self::Error>;

    /// The state of every vCPU and device: one entry for each name of the machine's [`Spec`](crate::Spec).
    /// Called between pause and resume.
    ///
    /// # Errors
    /// If one cannot be saved; the guest is then resumed.
    fn save(&mut self) -> Result<Vec<(StateName, Vec<u8>)>, Self::Error>;

    /// When the last vCPU stopped, if that is known better than by the end of [`pause`](Self::pause): nanoseconds on the
    /// clock of the [`Timeline`].
    fn stopped_ns(&self) -> Option<u64> {
        None
    }

    /// There is no update after all: everything runs on.
    ///
    /// # Errors
    /// If it cannot. The guest is lost then.
    fn resume(&mut self) -> Result<(), Self::Error>;
}

/// What a carrier can do. A session refuses early what its carrier cannot carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Descriptors other than the regions' can be handed over.
    pub other_descriptors: bool,
    /// Predecessor and successor live at the same time: the successor is ready before the pause, and the
    /// predecessor can go back.
    pub overlap: bool,
    /// The machine survives a crash of the VMM.
    pub survives_crash: bool,
    /// The machine survives another kernel.
    pub survives_kexec: bool,
}
