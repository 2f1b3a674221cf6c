//! Stopping a vCPU from another thread, without a race.
//!
//! A *kick* asks a vCPU to leave the guest. It is a token, not an event: it stays with the vCPU until a
//! run takes it, so a kick that comes before the run ends the run at once, and of two kicks at one time
//! one is taken for both.
//!
//! # Why no kick is lost
//!
//! A kick does two things in this order: (K1) it sets `immediate_exit` in the vCPU's `kvm_run` page, (K2)
//! under a lock it looks whether a thread is inside a run, and if so sends that thread a signal. A run
//! does: (R1) under the same lock it says that its thread is inside, (R2) it calls `KVM_RUN`, which reads
//! `immediate_exit` at its entry, and (R3) at the end it says under the lock that the thread is out.
//!
//! - K2 before R1: the lock orders K1 before R2, and `KVM_RUN` sees `immediate_exit` and returns EINTR.
//! - K2 after R1 and before R3: the signal finds the thread inside the run. Before `KVM_RUN`, the signal
//!   is taken in user mode, but K1 was earlier and so the entry sees `immediate_exit`. In `KVM_RUN`, a
//!   pending signal ends it with EINTR, wherever it is: in the guest, halted, or parked in a page fault.
//!   After a `KVM_RUN` that returned an exit, the next one sees `immediate_exit`.
//! - K2 after R3: no signal is sent, and the next run sees `immediate_exit`, since only a run takes it back.
//!
//! As the lock is held while the signal is sent, it never reaches a thread that has left the run, or one
//! that got the number of a thread that ended.
//!
//! The page is written through a mapping of its own, of which nothing but this one byte is ever touched,
//! and that atomically. So the kick needs no access to the run's mapping, to which kvm-ioctls makes
//! exclusive references.

use std::io;
use std::mem::{self, offset_of};
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

/// Length of the mapping: the page that holds `immediate_exit`.
const MAPPED_LEN: usize = 4096;

const _: () = assert!(offset_of!(kvm_run, immediate_exit) < MAPPED_LEN);

/// A kick waits for a run to take it.
const KICKED: u8 = 1;

/// The run itself wants `KVM_RUN` to return before the guest goes on. KVM asks only whether the byte is
/// zero, so the bits are ours.
const SETTLING: u8 = 2;

/// Why the kick signal could not be made ready.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignalError {
    /// The program has a handler of its own for the signal.
    #[error("signal {signal}, which stops vCPUs, has another handler")]
    Taken {
        /// Number of the signal.
        signal: i32,
    },
    /// The handler could not be installed.
    #[error("the handler of signal {signal} could not be installed")]
    Install {
        /// Number of the signal.
        signal: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Why [`Kicker::kick`] could not signal the vCPU's thread.
///
/// The kick itself stays with the vCPU, which will take it when it next leaves the guest by itself.
#[derive(Debug, thiserror::Error)]
#[error("the vCPU's thread could not be sent signal {signal}")]
pub struct KickError {
    /// Number of the signal.
    pub signal: i32,
    /// What the kernel said: EAGAIN if the user has too many signals queued.
    #[source]
    pub source: io::Error,
}

/// Number of the signal that stops vCPUs: `SIGRTMIN + 1`.
///
/// Its handler does nothing and is installed, for the process, when the first vCPU is made. It is
/// installed without `SA_RESTART`: a system call in which the thread sits because of an exit it handles
/// ends with EINTR too.
#[must_use]
pub fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 1
}

/// The signal's only work is to interrupt.
extern "C" fn nothing(_signal: libc::c_int) {}

/// Installs the signal's handler, once for the process.
pub(crate) fn install_handler() -> Result<(), SignalError> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    let signal = kick_signal();
    let failed = || SignalError::Install { signal, source: io::Error::last_os_error() };
    // SAFETY: all zeros are a valid sigaction: the default action, an empty mask, no flags.
    let mut old: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: a null action only asks; `old` is a sigaction to be written.
    if unsafe { libc::sigaction(signal, ptr::null(), &raw mut old) } != 0 {
        return Err(failed());
    }
    if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN {
        return Err(SignalError::Taken { signal });
    }
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(libc::c_int) = nothing;
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: `action` is a valid sigaction whose handler has the type that goes with its flags, and does
    // nothing, so it is safe in a signal at any place.
    if unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } != 0 {
        return Err(failed());
    }
    *installed = true;
    Ok(())
}

/// A mapping of a vCPU's `kvm_run` page in which only `immediate_exit` is ever touched.
#[derive(Debug)]
struct ExitFlag {
    // The start of MAPPED_LEN bytes that only `drop` unmaps.
    page: NonNull<libc::c_void>,
}

// SAFETY: the page is reached only as one `AtomicU8`, and belongs to no thread.
unsafe impl Send for ExitFlag {}
// SAFETY: as for `Send`.
unsafe impl Sync for ExitFlag {}

impl ExitFlag {
    fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                MAPPED_LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(page) {
            Some(page) if page.as_ptr() != libc::MAP_FAILED => Ok(Self { page }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn bits(&self) -> &AtomicU8 {
        // SAFETY:
        // 1. The byte lies in the mapping: asserted next to `MAPPED_LEN`; and the mapping lasts as long as
        //    the borrow of `self`, since only `drop` unmaps it. A byte is always aligned.
        // 2. Through this mapping it is reached only by this function, so always atomically. What writes
        //    the page through other mappings, KVM among them, does not touch this byte: of our own code,
        //    nothing calls `set_kvm_immediate_exit`.
        unsafe {
            AtomicU8::from_ptr(self.page.as_ptr().cast::<u8>().add(offset_of!(kvm_run, immediate_exit)))
        }
    }
}

impl Drop for ExitFlag {
    fn drop(&mut self) {
        // SAFETY: `map` made this mapping with this length, and no borrow of it outlives `self`.
        unsafe { libc::munmap(self.page.as_ptr(), MAPPED_LEN) };
    }
}

/// What a vCPU and its kickers share.
#[derive(Debug)]
pub(crate) struct Bell {
    exit: ExitFlag,
    /// The thread inside a run. Not its number, which is another once it has gone on in another process.
    inside: Mutex<Option<libc::pthread_t>>,
}

impl Bell {
    pub(crate) fn new(vcpu: &VcpuFd) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { exit: ExitFlag::map(vcpu)?, inside: Mutex::new(None) }))
    }

    fn inside(&self) -> MutexGuard<'_, Option<libc::pthread_t>> {
        // Nothing that can panic runs under the lock.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that this thread is inside a run, until the guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Inside {
        unblock_signal();
        // SAFETY: pthread_self has no conditions.
        *self.inside() = Some(unsafe { libc::pthread_self() });
        Inside(Arc::clone(self))
    }

    /// Takes the kick, if there is one.
    pub(crate) fn take_kick(&self) -> bool {
        self.exit.bits().fetch_and(!KICKED, Ordering::SeqCst) & KICKED != 0
    }

    /// Lets each `KVM_RUN` return before it enters the guest, or no longer does. A kick is left as it is.
    pub(crate) fn settle(&self, on: bool) {
        if on {
            self.exit.bits().fetch_or(SETTLING, Ordering::SeqCst);
        } else {
            self.exit.bits().fetch_and(!SETTLING, Ordering::SeqCst);
        }
    }
}

/// A thread is inside a run for as long as this lives.
pub(crate) struct Inside(Arc<Bell>);

impl Drop for Inside {
    fn drop(&mut self) {
        *self.0.inside() = None;
    }
}

/// Lets the signal reach this thread, which may have inherited a mask that does not.
fn unblock_signal() {
    static SET: OnceLock<libc::sigset_t> = OnceLock::new();
    let set = SET.get_or_init(|| {
        // SAFETY: all zeros are a valid set, and both calls write only the set they are given; the
        // signal's number is a valid one.
        unsafe {
            let mut set = mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, kick_signal());
            set
        }
    });
    // SAFETY: `set` is a valid set; the old mask is not asked for. With these arguments it cannot fail.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, set, ptr::null_mut()) };
}

/// Stops a vCPU from any thread. Cheap to clone; does not keep the vCPU or its VM alive.
#[derive(Clone, Debug)]
pub struct Kicker {
    bell: Weak<Bell>,
}

impl Kicker {
    pub(crate) fn of(bell: &Arc<Bell>) -> Self {
        Self { bell: Arc::downgrade(bell) }
    }

    /// Makes the run that the vCPU is in, or else its next one, return
    /// [`Stopped::Kicked`](crate::Stopped::Kicked). Does not wait for it.
    ///
    /// Of a vCPU that is gone, nothing is asked.
    ///
    /// # Errors
    ///
    /// [`KickError`] if the signal could not be sent.
    pub fn kick(&self) -> Result<(), KickError> {
        let Some(bell) = self.bell.upgrade() else { return Ok(()) };
        bell.exit.bits().fetch_or(KICKED, Ordering::SeqCst);
        let inside = bell.inside();
        let Some(thread) = *inside else { return Ok(()) };
        let signal = kick_signal();
        // SAFETY: the lock, held until the end, keeps the thread in its run and so alive.
        match unsafe { libc::pthread_kill(thread, signal) } {
            0 => Ok(()),
            errno => Err(KickError { signal, source: io::Error::from_raw_os_error(errno) }),
        }
    }
}
