//! What every change of an inode's pages goes through: a count of freezes, and a lock of each inode's own.
//!
//! This file knows no memory, so that a model of it can be run with other locks: see `tests/freeze_model.rs`.

use crate::sync::PoisonError;
use crate::sync::RwLock;

/// Why a change may not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closed {
    /// A freeze stands.
    Frozen,
    /// The machine that owns the memory is gone.
    Ended,
}

/// The gate. `H` is what keeps faults from adding pages while a freeze stands.
#[derive(Debug)]
pub(crate) struct Gate<H>(RwLock<State<H>>);

#[derive(Debug)]
struct State<H> {
    freezes: usize,
    hold: Option<H>,
    ended: bool,
}

impl<H> Gate<H> {
    /// Open.
    pub(crate) fn new() -> Self {
        Self(RwLock::new(State { freezes: 0, hold: None, ended: false }))
    }

    /// Makes a change, which a freeze and an end wait for. It runs beside other changes.
    pub(crate) fn change<T>(&self, act: impl FnOnce() -> T) -> Result<T, Closed> {
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match *state {
            State { ended: true, .. } => Err(Closed::Ended),
            State { freezes: 0, .. } => Ok(act()),
            State { .. } => Err(Closed::Frozen),
        }
    }

    /// Adds a freeze. The first one calls `hold`, with no change running and none that can start. `told` looks at
    /// what holds.
    pub(crate) fn freeze<T, E>(
        &self,
        hold: impl FnOnce() -> Result<H, E>,
        told: impl FnOnce(&H) -> T,
    ) -> Result<T, Stopped<E>> {
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if state.ended {
            return Err(Stopped::Ended);
        }
        let held = match state.hold.take() {
            Some(held) => held,
            None => hold().map_err(Stopped::Hold)?,
        };
        let told = told(&held);
        state.hold = Some(held);
        state.freezes += 1;
        Ok(told)
    }

    /// Adds a freeze if one stands, in one step with finding that out.
    pub(crate) fn join<T>(&self, told: impl FnOnce(&H) -> T) -> Option<T> {
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let told = told(state.hold.as_ref()?);
        state.freezes += 1;
        Some(told)
    }

    /// Takes a freeze away, and with the last one what holds faults. Waits for no change: none can be running.
    pub(crate) fn thaw(&self) {
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        state.freezes -= 1;
        if state.freezes == 0 {
            // Ends a registration: whoever waits at a hole goes on.
            state.hold = None;
        }
    }

    /// Ends changes and freezes for good; what holds faults goes to `end`. Does nothing a second time.
    pub(crate) fn end(&self, end: impl FnOnce(Option<H>)) {
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if !state.ended {
            state.ended = true;
            end(state.hold.take());
        }
    }

    /// True while a freeze stands.
    pub(crate) fn is_frozen(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).freezes > 0
    }

    /// True once it has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).ended
    }
}

/// Why no freeze was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stopped<E> {
    /// Faults could not be held.
    Hold(E),
    /// The machine that owns the memory is gone.
    Ended,
}
