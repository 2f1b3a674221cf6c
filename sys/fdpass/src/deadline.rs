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

/// Waits until one of the descriptors can be read, is at its end, or shows an error. Gives the places in `fds` of those
/// that do; none if the deadline passed first.
///
/// # Errors
///
/// What the kernel answers, as EINVAL for more descriptors than a process may have.
pub fn ready(fds: &[BorrowedFd<'_>], deadline: Deadline) -> std::io::Result<Vec<usize>> {
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    loop {
        let timeout = deadline.remaining().and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut polled, timeout.as_ref()) {
            Ok(0) if deadline.has_passed() => return Ok(Vec::new()),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => {
                let shown = polled.iter().enumerate().filter(|(_, fd)| !fd.revents().is_empty());
                return Ok(shown.map(|(place, _)| place).collect());
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_descriptors_those_that_can_be_read_or_have_ended_are_ready() {
        use std::os::fd::AsFd as _;
        let pairs: Vec<_> = (0..3).map(|_| crate::Channel::pair().unwrap()).collect();
        let fds: Vec<_> = pairs.iter().map(|(ours, _)| ours.as_fd()).collect();
        let soon = || Deadline::after(Duration::from_millis(1));
        assert_eq!(ready(&fds, soon()).unwrap(), [] as [usize; 0]);
        pairs[2].1.send(b"x", &[], Deadline::never()).unwrap();
        assert_eq!(ready(&fds, soon()).unwrap(), [2]);
        rustix::net::shutdown(&pairs[0].1, rustix::net::Shutdown::Both).unwrap();
        assert_eq!(ready(&fds, Deadline::never()).unwrap(), [0, 2]);
    }

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
