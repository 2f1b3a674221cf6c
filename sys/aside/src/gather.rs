//! Parks the other threads of this process.
//!
//! A thread may be parked in the midst of anything, the allocator too, whose locks it keeps then. So from the first signal
//! until the threads go on nothing here allocates, frees or takes a lock: what is needed is there before.

use std::io;
use std::mem;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::RawDir;
use rustix::fs::SeekFrom;

use crate::files;
use crate::files::OfThread;
use crate::go::AsideError;
use crate::kernel;
use crate::task::CANNOT;
use crate::task::FREE;
use crate::task::GO;
use crate::task::PARKED;
use crate::task::Slot;

/// Threads that can step aside at once; the last slot is that of the one that makes them do so.
pub(crate) const SLOTS: usize = 257;
/// Of them and of those that the kernel has made.
const SEEN: usize = 4 * SLOTS;
const LISTING_BYTES: usize = 1 << 15;

type Table = [Slot; SLOTS];

/// Where a thread finds its slot. What it points to is never freed: a handler that comes late reads it, too, and threads
/// that have been left parked do for as long as their process executes nothing else.
static TABLE: AtomicPtr<Table> = AtomicPtr::new(ptr::null_mut());

/// How long to wait before looking whether a thread is still there.
const LOOK: Duration = Duration::from_millis(1);

fn table() -> Option<&'static Table> {
    // SAFETY: null, or a table that was leaked, of which nothing but atomics is ever changed.
    unsafe { TABLE.load(Ordering::Acquire).as_ref() }
}

/// The table, made if there is none.
fn lay_table() -> &'static Table {
    table().unwrap_or_else(|| {
        let table: &'static mut Table = Box::leak(Box::new([const { Slot::new() }; SLOTS]));
        TABLE.store(table, Ordering::Release);
        table
    })
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
    kernel::learn();
    *installed = true;
    Ok(())
}

extern "C" fn on_signal(_signal: libc::c_int) {
    // SAFETY: gives the address of this thread's own errno, which is an int.
    let errno = unsafe { *libc::__errno_location() };
    let tid = gettid();
    if let Some(slot) = table().and_then(|table| table[..SLOTS - 1].iter().find(|slot| slot.take(tid))) {
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

/// Why not all threads are parked. Saying it whole takes an allocation, which has to wait until they go on.
#[derive(Debug)]
pub(crate) enum Obstacle {
    Threads(io::Error),
    TooMany,
    Cannot(i32),
    Stuck(i32, OfThread<64>),
}

impl From<Obstacle> for AsideError {
    fn from(obstacle: Obstacle) -> Self {
        match obstacle {
            Obstacle::Threads(source) => Self::Threads(source),
            Obstacle::TooMany => Self::TooMany { most: SLOTS - 1 },
            Obstacle::Cannot(thread) => Self::Cannot { thread },
            Obstacle::Stuck(thread, why) => Self::Stuck { thread, why: why.text() },
        }
    }
}

/// Threads that are parked. They go on when it is dropped, unless they [stay](Parked::stay).
#[derive(Debug)]
pub(crate) struct Parked {
    table: &'static Table,
    pub(crate) slots: Vec<&'static Slot>,
    seen: Vec<i32>,
    tasks: OwnedFd,
    listing: Vec<MaybeUninit<u8>>,
}

impl Parked {
    /// None yet, and room for all.
    pub(crate) fn nobody() -> Result<Self, AsideError> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let tasks = rustix::fs::open(c"/proc/self/task", flags, Mode::empty())
            .map_err(|errno| AsideError::Threads(errno.into()))?;
        let (slots, seen) = (Vec::with_capacity(SLOTS), Vec::with_capacity(SEEN));
        Ok(Self {
            table: lay_table(),
            slots,
            seen,
            tasks,
            listing: vec![MaybeUninit::uninit(); LISTING_BYTES],
        })
    }

    /// The slot of the thread that has the others step aside.
    pub(crate) fn own_slot(&self) -> &'static Slot {
        let slot = &self.table[SLOTS - 1];
        slot.give(gettid());
        slot
    }

    /// Parks every thread of this process but those of `except`.
    pub(crate) fn gather(&mut self, except: &[i32], patience: Duration) -> Result<(), Obstacle> {
        let until = Instant::now() + patience;
        self.seen.extend_from_slice(except);
        // Until a look finds nobody new: a thread that is not parked yet may make others.
        while self.invite()? {
            self.await_all(until)?;
        }
        Ok(())
    }

    /// Sends the signal to all that have not been seen before, if there are any.
    fn invite(&mut self) -> Result<bool, Obstacle> {
        let failed = |errno: rustix::io::Errno| Obstacle::Threads(errno.into());
        rustix::fs::seek(&self.tasks, SeekFrom::Start(0)).map_err(failed)?;
        let before = self.seen.len();
        let mut listing = RawDir::new(&self.tasks, &mut self.listing);
        while let Some(entry) = listing.next() {
            let entry = entry.map_err(failed)?;
            let number = entry.file_name().to_str().ok().and_then(|name| name.parse::<i32>().ok());
            let Some(tid) = number.filter(|tid| !self.seen.contains(tid)) else { continue };
            // What has no room would be an allocation.
            if self.seen.len() == SEEN {
                return Err(Obstacle::TooMany);
            }
            self.seen.push(tid);
            if is_the_kernels(tid) {
                continue;
            }
            // A thread that has stepped aside before may not have left its slot yet.
            let mut free = self.table[..SLOTS - 1].iter().filter(|slot| slot.is_free());
            let slot = free.next().ok_or(Obstacle::TooMany)?;
            slot.give(tid);
            match tell(tid, signal()) {
                true => self.slots.push(slot),
                false => _ = slot.withdraw(),
            }
        }
        Ok(self.seen.len() > before)
    }

    fn await_all(&mut self, until: Instant) -> Result<(), Obstacle> {
        let mut next = 0;
        while let Some(slot) = self.slots.get(next).copied() {
            let tid = slot.tid.load(Ordering::Acquire);
            match slot.state.load(Ordering::Acquire) {
                PARKED => next += 1,
                CANNOT => {
                    self.slots.remove(next);
                    return Err(Obstacle::Cannot(tid));
                }
                // It was about to end.
                _ if !tell(tid, 0) => {
                    slot.withdraw();
                    self.slots.remove(next);
                }
                state if Instant::now() < until => slot.wait(state, LOOK),
                _ => return Err(Obstacle::Stuck(tid, files::read(tid, "wchan"))),
            }
        }
        Ok(())
    }

    /// They never go on: others do in their place. Their table stays theirs, so that nothing that is said in the next one
    /// is heard by them.
    pub(crate) fn stay(mut self) {
        self.slots.clear();
        TABLE.store(ptr::null_mut(), Ordering::Release);
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

/// A thread that the kernel has made in this process for itself, as KVM does. It runs nothing of this program's, takes
/// no signal, and ends with its process.
fn is_the_kernels(tid: i32) -> bool {
    /// `PF_IO_WORKER`, `PF_USER_WORKER`.
    const WORKER: u64 = 0x10 | 0x4000;
    let stat = files::read::<256>(tid, "stat");
    // What comes before is the thread's name, in which there may be anything.
    let flags =
        stat.str().rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & WORKER != 0)
}

/// Sends a signal, or with 0 looks whether the thread is there.
fn tell(tid: i32, signal: i32) -> bool {
    // SAFETY: tgkill has no conditions on memory.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal) == 0 }
}
