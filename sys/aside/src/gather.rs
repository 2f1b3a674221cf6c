//! Parks the other threads of this process.

use std::collections::BTreeSet;
use std::io;
use std::mem;
use std::ptr;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use crate::go::AsideError;
use crate::task::CANNOT;
use crate::task::FREE;
use crate::task::GO;
use crate::task::PARKED;
use crate::task::Slot;

/// Threads that can step aside at once; the last slot is that of the one that makes them do so.
const SLOTS: usize = 257;

/// They are static, so that a handler that comes late finds one, too.
static TABLE: [Slot; SLOTS] = [const { Slot::new() }; SLOTS];

/// How long to wait before looking whether a thread is still there.
const LOOK: Duration = Duration::from_millis(1);

/// The slot of the thread that has the others step aside.
pub(crate) fn own_slot() -> &'static Slot {
    let slot = &TABLE[SLOTS - 1];
    slot.give(gettid());
    slot
}

pub(crate) fn gettid() -> i32 {
    // SAFETY: gettid has no conditions.
    unsafe { libc::gettid() }
}

/// `SIGRTMIN + 2`.
fn signal() -> i32 {
    libc::SIGRTMIN() + 2
}

/// Installs the handler, once for the process.
pub(crate) fn install_handler() -> Result<(), AsideError> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    let failed = || AsideError::Handler { signal: signal(), source: io::Error::last_os_error() };
    // SAFETY: all zeros are a valid sigaction: the default action, an empty mask, no flags.
    let mut old: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: a null action only asks; `old` is a sigaction to be written.
    if unsafe { libc::sigaction(signal(), ptr::null(), &raw mut old) } != 0 {
        return Err(failed());
    }
    if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN {
        return Err(AsideError::Taken { signal: signal() });
    }
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(libc::c_int) = on_signal;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the mask is `action`'s own. In the handler no signal may come: the thread's stack is another's then.
    unsafe { libc::sigfillset(&raw mut action.sa_mask) };
    // SAFETY: `action` is a valid sigaction, whose handler has the type that goes with its flags and makes nothing but
    // system calls, so that it is safe in a signal at any place.
    if unsafe { libc::sigaction(signal(), &raw const action, ptr::null_mut()) } != 0 {
        return Err(failed());
    }
    *installed = true;
    Ok(())
}

extern "C" fn on_signal(_signal: libc::c_int) {
    // SAFETY: gives the address of this thread's own errno, which is an int.
    let errno = unsafe { *libc::__errno_location() };
    let tid = gettid();
    if let Some(slot) = TABLE[..SLOTS - 1].iter().find(|slot| slot.take(tid)) {
        slot.park();
    }
    // SAFETY: as above. If another task goes on here it has this thread's errno, too.
    unsafe { *libc::__errno_location() = errno };
}

/// Signals that are blocked on this thread, all of them, until it is dropped.
pub(crate) struct Blocked(libc::sigset_t);

impl Blocked {
    pub(crate) fn all() -> Self {
        // SAFETY: all zeros are a valid set; both calls write the sets that they are given, and with these arguments
        // neither can fail.
        unsafe {
            let (mut all, mut old) = (mem::zeroed(), mem::zeroed());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
            Self(old)
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set is the one that was read; the old one is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut()) };
    }
}

/// Threads that are parked. They go on when it is dropped, unless they [stay](Parked::stay).
#[derive(Debug)]
pub(crate) struct Parked {
    pub(crate) slots: Vec<&'static Slot>,
}

impl Parked {
    /// Parks every thread of this process but those of `except`.
    pub(crate) fn gather(except: &[i32], patience: Duration) -> Result<Self, AsideError> {
        let until = Instant::now() + patience;
        let mut parked = Self { slots: Vec::new() };
        // A thread that has stepped aside before may not have left its slot yet.
        let mut free = TABLE[..SLOTS - 1].iter().filter(|slot| slot.is_free());
        let mut seen: BTreeSet<i32> = except.iter().copied().collect();
        // Until a look finds nobody new: a thread that is not parked yet may make others.
        loop {
            let threads = threads().map_err(AsideError::Threads)?;
            let new: Vec<i32> = threads.into_iter().filter(|tid| seen.insert(*tid)).collect();
            if new.is_empty() {
                return Ok(parked);
            }
            for tid in new.iter().filter(|tid| !is_the_kernels(**tid)) {
                let slot = free.next().ok_or(AsideError::TooMany { most: SLOTS - 1 })?;
                slot.give(*tid);
                if tell(*tid, signal()) {
                    parked.slots.push(slot);
                }
            }
            parked.await_all(until)?;
        }
    }

    fn await_all(&mut self, until: Instant) -> Result<(), AsideError> {
        for slot in self.slots.clone() {
            loop {
                let tid = slot.tid.load(Ordering::Acquire);
                match slot.state.load(Ordering::Acquire) {
                    PARKED => break,
                    CANNOT => {
                        self.leave_out(slot);
                        return Err(AsideError::Cannot { thread: tid });
                    }
                    // It was about to end.
                    _ if !tell(tid, 0) => {
                        self.leave_out(slot);
                        break;
                    }
                    state if Instant::now() < until => slot.wait(state, LOOK),
                    _ => return Err(AsideError::Stuck { thread: tid, why: wchan(tid) }),
                }
            }
        }
        Ok(())
    }

    fn leave_out(&mut self, gone: &Slot) {
        self.slots.retain(|slot| !ptr::eq(*slot, gone));
    }

    /// They never go on: others do in their place.
    pub(crate) fn stay(mut self) {
        self.slots.clear();
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.slots.retain(|slot| !slot.withdraw());
        self.slots.iter().for_each(|slot| Slot::say(&slot.command, GO));
        for slot in &self.slots {
            loop {
                match slot.state.load(Ordering::Acquire) {
                    FREE | CANNOT => break,
                    state => slot.wait(state, LOOK),
                }
            }
        }
    }
}

/// Numbers of this process's threads.
fn threads() -> io::Result<Vec<i32>> {
    let number = |entry: io::Result<std::fs::DirEntry>| -> io::Result<Option<i32>> {
        Ok(entry?.file_name().to_str().and_then(|name| name.parse().ok()))
    };
    std::fs::read_dir("/proc/self/task")?.filter_map(|entry| number(entry).transpose()).collect()
}

/// A thread that the kernel has made in this process for itself, as KVM does. It runs nothing of this program's, takes
/// no signal, and ends with its process.
fn is_the_kernels(tid: i32) -> bool {
    /// `PF_IO_WORKER`, `PF_USER_WORKER`.
    const WORKER: u64 = 0x10 | 0x4000;
    let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap_or_default();
    // What comes before is the thread's name, in which there may be anything.
    let flags =
        stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & WORKER != 0)
}

/// Sends a signal, or with 0 looks whether the thread is there.
fn tell(tid: i32, signal: i32) -> bool {
    // SAFETY: tgkill has no conditions on memory.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal) == 0 }
}

/// Where in the kernel a thread waits, if the kernel says so.
fn wchan(tid: i32) -> String {
    std::fs::read_to_string(format!("/proc/self/task/{tid}/wchan")).unwrap_or_default()
}
