//! The way aside.

use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::process;
use std::ptr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use sched::Exact;
use thiserror::Error;

use crate::descriptors::inherit;
use crate::files;
use crate::files::OfThread;
use crate::gather::Blocked;
use crate::gather::Parked;
use crate::gather::SLOTS;
use crate::gather::gettid;
use crate::gather::install_handler;
use crate::task::END;
use crate::task::GO;
use crate::task::PARKED;
use crate::task::READY;
use crate::task::Slot;
use crate::task::wait;

/// Why no thread has stepped aside.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AsideError {
    /// The program has a handler of its own for the signal.
    #[error("signal {signal}, by which threads are stopped, has another handler")]
    Taken {
        /// Number of the signal.
        signal: i32,
    },
    /// The handler could not be installed.
    #[error("the handler of signal {signal} could not be installed")]
    Handler {
        /// Number of the signal.
        signal: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The threads could not be listed.
    #[error("cannot list the threads of this process")]
    Threads(#[source] io::Error),
    /// There are too many of them.
    #[error("this process has more than {most} threads")]
    TooMany {
        /// How many there can be.
        most: usize,
    },
    /// The kernel does not say where the thread's number is kept, which has to be known.
    #[error("the kernel does not tell what is known of thread {thread} (it lacks CONFIG_CHECKPOINT_RESTORE)")]
    Cannot {
        /// Number of the thread.
        thread: i32,
    },
    /// A thread does not take the signal.
    #[error("thread {thread} cannot be interrupted (it waits in {why})")]
    Stuck {
        /// Number of the thread.
        thread: i32,
        /// Where in the kernel it waits.
        why: String,
    },
    /// The thread that stays could not be started.
    #[error("cannot start the thread that stays")]
    Stayer(#[source] io::Error),
    /// No process or thread could be made.
    #[error("cannot make what the threads of this process are to go on in")]
    Clone(#[source] io::Error),
}

/// The threads that called are in another process now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aside {
    /// The process that they have left.
    pub left: u32,
    /// Threads that came along, without the one that called.
    pub others: usize,
    /// How long they stood still, from the first signal on.
    pub stopped: Duration,
}

/// Has all threads of this process go on in another one, and `stays` be called in this one by a new thread, the only one
/// that it has then. When this returns `Ok` it does so in the other process; when it returns an error, nothing has changed
/// but that the luggage is closed.
///
/// `stays` is to execute a program. If it returns, this process does nothing more, and ends when the other does. It gets
/// the numbers of the `luggage`, which goes into the program; the other process does not have it. Of all other
/// descriptors each process has a copy of its own. Memory both share: what `stays` owns is never dropped.
///
/// # Errors
/// [`AsideError`] if a thread does not stop within `patience`, or the kernel makes no process or thread.
pub fn step_aside(
    luggage: Vec<OwnedFd>,
    stays: impl FnOnce(&[RawFd]) + Send + 'static,
    patience: Duration,
) -> Result<Aside, AsideError> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    install_handler()?;
    let left = process::id();
    let here = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())
        .map_err(|errno| AsideError::Clone(errno.into()))?;
    let stayer = Stayer::start(luggage.iter().map(AsRawFd::as_raw_fd).collect(), stays)?;
    let blocked = Blocked::all();
    // From the first signal until all go on nothing allocates or frees: see `gather`. So they go on, when `parked` is
    // dropped, before anything else is.
    let mut traits = Vec::with_capacity(SLOTS);
    let mut parked = Parked::nobody()?;
    let begun = Instant::now();
    if let Err(obstacle) = parked.gather(&[gettid(), stayer.thread], patience) {
        drop(parked);
        return Err(obstacle.into());
    }
    traits.extend(parked.slots.iter().map(|slot| Traits::of(slot.tid.load(Ordering::Acquire))));
    let own = parked.own_slot();
    stayer.watch(own);
    let alternate = SignalStack::get();
    own.depart().map_err(AsideError::Clone)?;
    // From here on in the other process.
    if let Err(error) = replace_all(&parked, &traits) {
        own.come_back(&error);
        return Err(AsideError::Clone(error));
    }
    let others = parked.slots.len();
    parked.slots.iter().for_each(|slot| Slot::say(&slot.gate, GO));
    let stopped = begun.elapsed();
    parked.stay();
    alternate.set();
    drop(blocked);
    // Else the `execve` could end this thread's old self before that has reaped the process by way of which it left.
    await_departed(own, &here);
    stayer.go();
    Ok(Aside { left, others, stopped })
}

/// Makes a thread in the place of each that is parked, all of which wait at their gates; or none.
fn replace_all(parked: &Parked, traits: &[Traits]) -> io::Result<()> {
    for (made, (slot, traits)) in parked.slots.iter().zip(traits).enumerate() {
        match slot.replace() {
            Ok(tid) => traits.give(tid),
            Err(error) => {
                for slot in &parked.slots[..made] {
                    await_state(slot, READY);
                    Slot::say(&slot.gate, END);
                    slot.await_end();
                    // Its thread is parked as before.
                    slot.state.store(PARKED, Ordering::Release);
                }
                return Err(error);
            }
        }
    }
    // Only then does the C library know their numbers.
    parked.slots.iter().for_each(|slot| await_state(slot, READY));
    Ok(())
}

/// Waits until the thread that the caller was does nothing more, be it that its process, `left`, was killed.
fn await_departed(own: &Slot, left: &OwnedFd) {
    let killed = || {
        let mut polled = [PollFd::new(left, PollFlags::IN)];
        rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
            .is_ok_and(|ready| ready > 0)
    };
    loop {
        match own.state.load(Ordering::Acquire) {
            PARKED => return,
            _ if killed() => return,
            state => own.wait(state, Duration::from_millis(1)),
        }
    }
}

fn await_state(slot: &Slot, awaited: u32) {
    loop {
        match slot.state.load(Ordering::Acquire) {
            state if state == awaited => return,
            state => slot.wait(state, Duration::from_millis(1)),
        }
    }
}

/// What a new thread does not have from the one in whose place it is.
struct Traits {
    name: OfThread<32>,
    scheduling: Option<Exact>,
}

impl Traits {
    fn of(tid: i32) -> Self {
        Self { name: files::read(tid, "comm"), scheduling: Exact::of(Some(tid)).ok() }
    }

    /// As far as this process may: a thread without its name is better than none.
    fn give(&self, tid: i32) {
        if !self.name.bytes().is_empty() {
            files::write(tid, "comm", self.name.bytes());
        }
        let usual = Exact::of(None).ok();
        if let Some(scheduling) = self.scheduling.as_ref().filter(|own| Some(*own) != usual.as_ref()) {
            let _ = scheduling.give(Some(tid));
        }
    }
}

/// The stack on which this thread handles a signal that its own has no room for.
struct SignalStack(Option<libc::stack_t>);

impl SignalStack {
    fn get() -> Self {
        // SAFETY: all zeros are a valid `stack_t`.
        let mut stack: libc::stack_t = unsafe { mem::zeroed() };
        // SAFETY: nothing is set; what is set is written to the local.
        let result = unsafe { libc::sigaltstack(ptr::null(), &raw mut stack) };
        Self((result == 0 && stack.ss_flags & libc::SS_DISABLE == 0).then_some(stack))
    }

    fn set(&self) {
        if let Some(stack) = &self.0 {
            // SAFETY: this thread had it set before, and whoever set it keeps it for as long as the thread lives.
            unsafe { libc::sigaltstack(ptr::from_ref(stack), ptr::null_mut()) };
        }
    }
}

/// The thread that stays.
struct Stayer {
    thread: i32,
    told: Arc<Told>,
}

/// What the thread that stays is told.
#[derive(Default)]
struct Told {
    /// The process that the others are in, once they are all gone; [`NOBODY`] if they stay.
    gone: AtomicU32,
    /// That of the thread that leads them there.
    slot: OnceLock<&'static Slot>,
}

/// Of [`Told::gone`]: the others have not left. No process has this number.
const NOBODY: u32 = u32::MAX;
/// How long it waits before it looks whether the others have died on the way.
const LOOK: Duration = Duration::from_millis(50);

impl Told {
    /// Waits until the others are gone; `None` if they stay.
    fn others_are_gone(&self) -> Option<u32> {
        loop {
            match self.gone.load(Ordering::Acquire) {
                NOBODY => return None,
                0 if self.slot.get().is_some_and(|slot| slot.copy_has_ended()) => end_after_others(),
                0 => wait(&self.gone, 0, LOOK),
                aside => return Some(aside),
            }
        }
    }

    fn say(&self, gone: u32) {
        if self.gone.compare_exchange(0, gone, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            Slot::say(&self.gone, gone);
        }
    }
}

impl Stayer {
    fn start(luggage: Vec<RawFd>, stays: impl FnOnce(&[RawFd]) + Send + 'static) -> Result<Self, AsideError> {
        let (tell, heard) = mpsc::channel();
        let told = Arc::new(Told::default());
        let hears = Arc::clone(&told);
        let body = move || {
            let _ = tell.send(gettid());
            let Some(aside) = hears.others_are_gone() else { return };
            // SAFETY: this process's own copy, open since before the others went, of which only the flag is changed.
            let fds = luggage.iter().map(|number| unsafe { BorrowedFd::borrow_raw(*number) });
            if fds.into_iter().all(|fd| inherit(fd, true).is_ok()) {
                stays(&luggage);
            }
            end_with(aside);
        };
        thread::Builder::new().name("stays".to_owned()).spawn(body).map_err(AsideError::Stayer)?;
        let thread = heard.recv().map_err(|_| AsideError::Stayer(io::Error::other("it has ended")))?;
        Ok(Self { thread, told })
    }

    /// Whoever leads the others away is this slot's.
    fn watch(&self, slot: &'static Slot) {
        // It is told once.
        let _ = self.told.slot.set(slot);
    }

    /// The others are gone.
    fn go(&self) {
        self.told.say(process::id());
    }
}

impl Drop for Stayer {
    fn drop(&mut self) {
        self.told.say(NOBODY);
    }
}

/// Ends this process, whose other threads have died in the one that they were leaving for. They are parked here still, but
/// have done there what cannot be done again; and whoever waits for this process would wait for ever.
fn end_after_others() -> ! {
    const WHY: &[u8] =
        b"the process that this one's threads were leaving for has been killed: this one ends, too\n";
    // SAFETY: writes bytes of a constant. Nothing here may take a lock, which a thread that is parked could hold.
    unsafe { libc::write(libc::STDERR_FILENO, WHY.as_ptr().cast(), WHY.len()) };
    // SAFETY: ends this process at once.
    unsafe { libc::_exit(1) }
}

/// Ends this process when the other one has ended.
fn end_with(aside: u32) -> ! {
    // SAFETY: closes this process's own copies, which nothing uses any more. What owns the descriptors is the other's, and
    // closes those there; kept open here, others would wait for their end in vain.
    unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
    let pid = i32::try_from(aside).ok().and_then(Pid::from_raw);
    let pidfd = pid.and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok());
    if let Some(pidfd) = pidfd {
        while rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None)
            .is_err_and(|errno| errno == rustix::io::Errno::INTR)
        {}
    }
    // SAFETY: ends this process at once. Nothing that this memory holds is to be run down here: it is the other's.
    unsafe { libc::_exit(0) }
}
