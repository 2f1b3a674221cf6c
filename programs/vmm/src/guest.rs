//! What the VMM knows of its guest, whatever it is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use machine::StateName;
use machine::update::Guest;
use pulse::MAILBOX_OFFSET;
use pulse::Mailbox;
use pulse::Words;
use region::Mapping;
use thiserror::Error;

use crate::control::GuestKind;

/// How long a guest may take to stop.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a guest could not be made, stopped, saved or loaded.
#[derive(Debug, Error)]
pub enum GuestError {
    /// It did not stop in time.
    #[error("the guest did not {0} in time")]
    TimedOut(&'static str),
    /// Its state cannot be loaded any more.
    #[error("the guest runs already")]
    RunsAlready,
    /// Its thread is gone.
    #[error("the guest's thread is gone")]
    ThreadGone,
    /// It ended by itself.
    #[error("the guest has failed: {0}")]
    Failed(String),
    /// Something below failed.
    #[error("cannot {what}")]
    Below {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A state is missing.
    #[error("no state was handed over for {0}")]
    NoState(StateName),
}

/// Wraps an error of a lower layer.
pub(crate) fn below<E: std::error::Error + Send + Sync + 'static>(
    what: &'static str,
) -> impl Fn(E) -> GuestError {
    move |source| GuestError::Below { what, source: Box::new(source) }
}

/// Guest memory as the words that pulse and its host talk through.
#[derive(Debug, Clone)]
pub(crate) struct MemoryWords(pub(crate) Arc<Mapping>);

impl Words for MemoryWords {
    fn load(&self, offset_bytes: u64) -> u64 {
        // pulse asks for words of its layout, and that was made for this memory.
        self.0.load(offset_bytes).unwrap_or_default()
    }

    fn store(&self, offset_bytes: u64, value: u64) {
        let _ = self.0.store(offset_bytes, value);
    }
}

impl MemoryWords {
    pub(crate) fn mailbox(&self) -> Mailbox<'_, Self> {
        Mailbox::new(self, MAILBOX_OFFSET)
    }

    /// The longest pause that the guest has recorded from number `first` on, in nanoseconds by its own clock.
    pub(crate) fn longest_pause_ns(&self, first: u64) -> Option<u64> {
        let mailbox = self.mailbox();
        let longest = mailbox.pauses_from(first).into_iter().map(|(_, pause)| pause.cycles).max()?;
        mailbox.nanoseconds(longest)
    }
}

/// From how long on the guest records a gap as a pause, in cycles of its clock: 100 µs. That is below any update's,
/// and above what a fault of guest memory costs, of which there are many after one.
pub(crate) const fn pause_threshold(cycles_per_ms: u64) -> u64 {
    if cycles_per_ms == 0 { u64::MAX } else { cycles_per_ms / 10 }
}

/// Why the guest does not run any more; nothing as long as it does.
#[derive(Debug, Clone, Default)]
pub(crate) struct Health(Arc<Mutex<Option<String>>>);

impl Health {
    pub(crate) fn fail(&self, why: String) {
        let mut failure = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(why);
    }

    pub(crate) fn failure(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A guest that can be served, and handed over.
pub trait Served: Guest<Error = GuestError> + Send {
    /// Which kind it is.
    fn kind(&self) -> GuestKind;

    /// Loads the states of a stopped guest, which another VMM has saved.
    ///
    /// # Errors
    /// [`GuestError`]; then it does not run.
    fn load(&mut self, states: &BTreeMap<StateName, Vec<u8>>) -> Result<(), GuestError>;

    /// Lets it run: for the first time, or after [`load`](Served::load).
    ///
    /// # Errors
    /// [`GuestError`] if its thread is gone.
    fn start(&mut self) -> Result<(), GuestError>;

    /// Formats of its states, which a successor has to be able to read.
    fn formats(&self) -> Vec<String>;

    /// An update begins, and the guest's memory is about to be frozen: from then on who touches a page that is not
    /// there waits. A guest that cannot be stopped while it waits makes sure now that it will not have to.
    ///
    /// # Errors
    /// [`GuestError`]; there is no update then.
    fn before_freeze(&self) -> Result<(), GuestError>;

    /// What a successor needs to know of it before the pause.
    fn before_pause(&self) -> serde_json::Value;

    /// When it executed its last instruction before it was stopped, on the host's monotonic clock, in
    /// nanoseconds.
    fn stopped_ns(&self) -> Option<u64>;

    /// When it was last about to execute its first instruction, likewise.
    fn entered_ns(&self) -> Option<u64>;

    /// Why it does not run any more, if so.
    fn failure(&self) -> Option<String>;
}

/// A guest behind a pointer is a guest.
pub(crate) struct AnyGuest(pub(crate) Box<dyn Served>);

impl Guest for AnyGuest {
    type Error = GuestError;

    fn pause(&mut self) -> Result<(), GuestError> {
        self.0.pause()
    }

    fn save(&mut self) -> Result<Vec<(StateName, Vec<u8>)>, GuestError> {
        self.0.save()
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.0.resume()
    }
}
