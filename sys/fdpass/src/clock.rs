//! A clock that all processes of a host share.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds on the host's monotonic clock: moments that two processes have seen can be compared.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}
