//! What an update does with a device.

use std::io;

use thiserror::Error;

use crate::state::StateError;

/// Why a device does not work again.
#[derive(Debug, Error)]
#[error("{device} cannot go on: cannot {what}")]
pub struct ResumeError {
    /// The device's name.
    pub device: String,
    /// What was tried.
    pub what: &'static str,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// A device with state. It is made paused.
pub trait Device: Send + Sync {
    /// Its name, which is the same in predecessor and successor and unlike that of every other device of the machine.
    fn name(&self) -> &str;

    /// The format of its state: one of [`FORMATS`](crate::FORMATS).
    fn format(&self) -> &'static str;

    /// Stops what the device does by itself: when this has returned, it touches neither guest memory nor its backend,
    /// and every request that it took is answered, with the interrupt raised or recorded. Waits for the request under
    /// way, if there is one.
    ///
    /// What vCPUs do to its registers still has effect, and would be missing from a state saved before. So the vCPUs are
    /// stopped first.
    fn pause(&self);

    /// Lets the device work, and raises the interrupts that the guest has not acknowledged.
    ///
    /// # Errors
    /// [`ResumeError`] if an interrupt that is due cannot be raised. The device works all the same.
    fn resume(&self) -> Result<(), ResumeError>;

    /// Its state.
    ///
    /// # Errors
    /// [`StateError::NotPaused`]
    fn save(&self) -> Result<Vec<u8>, StateError>;

    /// Takes over a state that [`save`](Self::save) gave, in this release or the one before.
    ///
    /// # Errors
    /// [`StateError`] if it is not the state of such a device, in such memory. Then nothing has changed.
    fn load(&self, bytes: &[u8]) -> Result<(), StateError>;
}
