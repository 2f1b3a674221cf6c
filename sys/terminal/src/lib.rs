//! A terminal that passes every key on, and is as it was afterwards.
//!
//! [`Raw`] gives the terminal its modes back when it is dropped. A signal would end the program without that: so
//! [`Signals`] has those that ask a program to end come by a descriptor instead. Nobody can do anything about `SIGKILL`;
//! `stty sane` does then.
#![expect(
    unsafe_code,
    reason = "a descriptor of signals, and which of them are held back, are calls of their own"
)]

use std::fs::File;
use std::io;
use std::io::Read;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::ptr;

use rustix::termios::OptionalActions;
use rustix::termios::QueueSelector;
use rustix::termios::Termios;

/// A terminal in raw mode: no key means anything to it, none is shown, and each comes at once. What is written is
/// processed as before: a new line begins at the left.
#[derive(Debug)]
pub struct Raw<'fd> {
    terminal: BorrowedFd<'fd>,
    before: Termios,
}

impl<'fd> Raw<'fd> {
    /// Puts a terminal into raw mode.
    ///
    /// # Errors
    /// As `tcsetattr`; `NOTTY` if it is no terminal.
    pub fn enter(terminal: BorrowedFd<'fd>) -> io::Result<Self> {
        let before = rustix::termios::tcgetattr(terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.output_modes = before.output_modes;
        rustix::termios::tcsetattr(terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        // Without waiting for output that nobody may ever read.
        let _ = rustix::termios::tcsetattr(self.terminal, OptionalActions::Now, &self.before);
        // Keys that nobody read are no command for whoever reads next.
        let _ = rustix::termios::tcflush(self.terminal, QueueSelector::IFlush);
    }
}

/// The signals that ask a program to end, by a descriptor, for a program with one thread. They end it again when this is
/// dropped.
#[derive(Debug)]
pub struct Signals {
    file: File,
    before: libc::sigset_t,
    /// The mask is that of the thread that made this.
    _thread: PhantomData<*const ()>,
}

impl Signals {
    /// Those that a user, a terminal or a service manager sends.
    const ALL: [libc::c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

    /// Holds them back, for this thread.
    ///
    /// # Errors
    /// As `signalfd`.
    pub fn hold() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: the call makes an empty set of the memory that it is given.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        for signal in Self::ALL {
            // SAFETY: a set that was made empty, and a number of a signal.
            unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
        }
        // SAFETY: it was made empty above.
        let set = unsafe { set.assume_init() };
        // SAFETY: a set that outlives the call; the flags are of this call.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made it, and nobody else has it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut before = MaybeUninit::uninit();
        // SAFETY: one set to read and one to write, which both outlive the call.
        let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, before.as_mut_ptr()) };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        // SAFETY: a call that succeeds has written it.
        let before = unsafe { before.assume_init() };
        Ok(Self { file, before, _thread: PhantomData })
    }

    /// The number of one that came.
    pub fn take(&self) -> Option<i32> {
        let mut bytes = [0; size_of::<libc::signalfd_siginfo>()];
        let read = (&self.file).read(&mut bytes).ok()?;
        // The number is the first field.
        let number = bytes.first_chunk().filter(|_| read == bytes.len())?;
        #[expect(clippy::host_endian_bytes, reason = "it comes from this kernel")]
        let number = u32::from_ne_bytes(*number);
        i32::try_from(number).ok()
    }
}

impl AsFd for Signals {
    /// Can be read when one has come.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the mask that this very thread had (this is not `Send`); nothing is asked back.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use rustix::pty::OpenptFlags;
    use rustix::termios::LocalModes;
    use rustix::termios::tcgetattr;

    use super::*;

    /// Both ends of a terminal.
    fn pair() -> (OwnedFd, OwnedFd) {
        let user = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        rustix::pty::grantpt(&user).unwrap();
        rustix::pty::unlockpt(&user).unwrap();
        let name = rustix::pty::ptsname(&user, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let terminal = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).unwrap();
        (user, terminal)
    }

    #[test]
    fn a_terminal_is_raw_until_it_is_dropped_and_then_as_before() {
        let (_user, terminal) = pair();
        let modes = |terminal: &OwnedFd| {
            let all = tcgetattr(terminal).unwrap();
            (all.local_modes, all.input_modes, all.output_modes)
        };
        let before = modes(&terminal);
        assert!(before.0.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        let raw = Raw::enter(terminal.as_fd()).unwrap();
        let during = modes(&terminal);
        assert!(!during.0.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        assert_eq!(during.2, before.2);
        drop(raw);
        assert_eq!(modes(&terminal), before);
    }

    #[test]
    fn what_is_no_terminal_is_refused() {
        let null = File::open("/dev/null").unwrap();
        assert!(Raw::enter(null.as_fd()).is_err());
    }

    #[test]
    fn a_signal_that_is_held_comes_by_the_descriptor() {
        let signals = Signals::hold().unwrap();
        assert_eq!(signals.take(), None);
        // SAFETY: sends this very thread a signal that it holds back.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGTERM) };
        assert_eq!(signals.take(), Some(libc::SIGTERM));
        assert_eq!(signals.take(), None);
    }
}
