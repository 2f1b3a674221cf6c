//! How long the tests wait.

use std::time::Duration;

use fdpass::Deadline;

/// Long enough on any machine for what is bound to happen.
pub(crate) fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

/// Enough to see that nothing happens.
pub(crate) fn shortly() -> Deadline {
    Deadline::after(Duration::from_millis(50))
}
