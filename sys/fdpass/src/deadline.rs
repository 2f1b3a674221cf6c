//! The instant at which a wait ends, whatever it waits for.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// When to give up waiting.
///
/// One deadline can bound a whole exchange of messages: it is an instant of the monotonic clock and
/// not a span that begins anew with each call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// No end.
    #[must_use]
    pub const fn never() -> Self {
        Self(None)
    }

    /// That instant. One that has passed lets a call do what it can do without waiting.
    #[must_use]
    pub const fn at(instant: Instant) -> Self {
        Self(Some(instant))
    }

    /// That long from now; [`never`](Self::never), if this is beyond what the clock can tell.
    #[must_use]
    pub fn after(span: Duration) -> Self {
        Self(Instant::now().checked_add(span))
    }

    /// The time that is left, zero once it has passed; `None` if there is no end.
    #[must_use]
    pub fn remaining(self) -> Option<Duration> {
        self.0.map(|instant| instant.saturating_duration_since(Instant::now()))
    }

    /// Whether it has passed.
    #[must_use]
    pub fn has_passed(self) -> bool {
        self.remaining() == Some(Duration::ZERO)
    }
}

/// Waits until the descriptor shows one of `events`, an error or a hang-up. `false` if the deadline
/// passed first.
pub(crate) fn wait(fd: BorrowedFd<'_>, events: PollFlags, deadline: Deadline) -> Result<bool, Errno> {
    loop {
        let timeout = deadline
            .remaining()
            // A span that a timespec cannot hold is longer than any machine runs.
            .and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [PollFd::from_borrowed_fd(fd, events)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) if deadline.has_passed() => return Ok(false),
            // A signal came, or the kernel's clock ran ahead of ours: what is left is asked anew.
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_too_far_to_tell_never_passes() {
        assert_eq!(Deadline::after(Duration::MAX), Deadline::never());
        assert_eq!(Deadline::never().remaining(), None);
        assert!(!Deadline::never().has_passed());
    }

    #[test]
    fn a_deadline_that_has_passed_leaves_no_time() {
        let past = Deadline::at(Instant::now());
        assert_eq!(past.remaining(), Some(Duration::ZERO));
        assert!(past.has_passed());
        assert!(!Deadline::after(Duration::from_secs(60)).has_passed());
    }
}
