//! How a thread is scheduled: on which processors, in which class. Read off one thread, set for another.
//!
//! A VMM's operator pins vCPUs and gives them a real-time class from outside, by thread id. A successor's threads are
//! other threads, so what was set has to be carried over.
#![expect(unsafe_code, reason = "makes the sched_getattr and sched_setattr calls that rustix leaves out")]

use std::io;

use rustix::thread::CpuSet;
use rustix::thread::Pid;
use rustix::thread::sched_getaffinity;
use rustix::thread::sched_setaffinity;
use thiserror::Error;

/// How a thread is scheduled (`struct sched_attr`; times in nanoseconds).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scheduling {
    /// Processors that it may run on, by number, ascending.
    pub cpus: Vec<u32>,
    /// `SCHED_OTHER`, `SCHED_FIFO` and so on.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// Of an ordinary thread.
    pub nice: i32,
    /// Of a real-time thread.
    pub priority: u32,
    /// Of a deadline thread.
    pub runtime_ns: u64,
    /// Of a deadline thread.
    pub deadline_ns: u64,
    /// Of a deadline thread.
    pub period_ns: u64,
}

/// Why a thread's scheduling was not read or set.
#[derive(Debug, Error)]
#[error("cannot {what} of thread {thread}")]
pub struct SchedError {
    /// What was tried.
    what: &'static str,
    /// The thread's number; 0 is the calling one.
    thread: i32,
    /// Why.
    #[source]
    source: io::Error,
}

fn failed(what: &'static str, thread: Option<i32>) -> impl Fn(io::Error) -> SchedError {
    move |source| SchedError { what, thread: thread.unwrap_or_default(), source }
}

/// Reads how a thread of this process is scheduled: the calling one, or the one with this number.
///
/// # Errors
/// [`SchedError`] if there is no such thread.
pub fn get(thread: Option<i32>) -> Result<Scheduling, SchedError> {
    let affinity = sched_getaffinity(thread.and_then(Pid::from_raw))
        .map_err(|errno| failed("read the affinity", thread)(errno.into()))?;
    let attr = get_attr(thread.unwrap_or_default()).map_err(failed("read the scheduling class", thread))?;
    let cpus = (0..CpuSet::MAX_CPU).filter(|cpu| affinity.is_set(*cpu));
    Ok(Scheduling {
        cpus: cpus.filter_map(|cpu| u32::try_from(cpu).ok()).collect(),
        policy: attr.sched_policy,
        flags: attr.sched_flags,
        nice: attr.sched_nice,
        priority: attr.sched_priority,
        runtime_ns: attr.sched_runtime,
        deadline_ns: attr.sched_deadline,
        period_ns: attr.sched_period,
    })
}

/// Has a thread of this process be scheduled so: the calling one, or the one with this number.
///
/// # Errors
/// [`SchedError`] if there is no such thread, the host has none of the processors, or this process not the right.
pub fn set(thread: Option<i32>, scheduling: &Scheduling) -> Result<(), SchedError> {
    let mut affinity = CpuSet::new();
    for cpu in &scheduling.cpus {
        let cpu = usize::try_from(*cpu).unwrap_or(usize::MAX);
        if cpu < CpuSet::MAX_CPU {
            affinity.set(cpu);
        }
    }
    sched_setaffinity(thread.and_then(Pid::from_raw), &affinity)
        .map_err(|errno| failed("set the affinity", thread)(errno.into()))?;
    let attr = Attr {
        size: ATTR_BYTES,
        sched_policy: scheduling.policy,
        sched_flags: scheduling.flags,
        sched_nice: scheduling.nice,
        sched_priority: scheduling.priority,
        sched_runtime: scheduling.runtime_ns,
        sched_deadline: scheduling.deadline_ns,
        sched_period: scheduling.period_ns,
    };
    set_attr(thread.unwrap_or_default(), &attr).map_err(failed("set the scheduling class", thread))
}

/// How a thread is scheduled, as the kernel says it. Reading and setting it takes no memory from the allocator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exact {
    affinity: CpuSet,
    attr: Attr,
}

impl Exact {
    /// Reads how a thread of this process is scheduled: the calling one, or the one with this number.
    ///
    /// # Errors
    /// [`SchedError`] if there is no such thread.
    pub fn of(thread: Option<i32>) -> Result<Self, SchedError> {
        let affinity = sched_getaffinity(thread.and_then(Pid::from_raw))
            .map_err(|errno| failed("read the affinity", thread)(errno.into()))?;
        let attr =
            get_attr(thread.unwrap_or_default()).map_err(failed("read the scheduling class", thread))?;
        Ok(Self { affinity, attr: Attr { size: ATTR_BYTES, ..attr } })
    }

    /// Has a thread of this process be scheduled so: the calling one, or the one with this number.
    ///
    /// # Errors
    /// [`SchedError`] if there is no such thread, or this process has not the right.
    pub fn give(&self, thread: Option<i32>) -> Result<(), SchedError> {
        sched_setaffinity(thread.and_then(Pid::from_raw), &self.affinity)
            .map_err(|errno| failed("set the affinity", thread)(errno.into()))?;
        set_attr(thread.unwrap_or_default(), &self.attr).map_err(failed("set the scheduling class", thread))
    }
}

/// The first version of `struct sched_attr`, which every kernel takes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct Attr {
    size: u32,
    sched_policy: u32,
    sched_flags: u64,
    sched_nice: i32,
    sched_priority: u32,
    sched_runtime: u64,
    sched_deadline: u64,
    sched_period: u64,
}

const ATTR_BYTES: u32 = 48;
const _: () = assert!(size_of::<Attr>() == 48);

fn get_attr(thread: i32) -> io::Result<Attr> {
    let mut attr = Attr { size: ATTR_BYTES, ..Attr::default() };
    // SAFETY: the kernel writes at most `ATTR_BYTES` bytes at the address given, which are `attr`'s own, plain integers.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, thread, &raw mut attr, ATTR_BYTES, 0) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(attr) }
}

fn set_attr(thread: i32, attr: &Attr) -> io::Result<()> {
    // SAFETY: the kernel reads `attr.size` bytes at the address given, which are `attr`'s own.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, thread, std::ptr::from_ref(attr), 0) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_off_one_thread_can_be_set_for_another() {
        let all = get(None).unwrap();
        assert!(!all.cpus.is_empty());
        let wanted = Scheduling { cpus: vec![all.cpus[0]], policy: 3, nice: 5, ..all.clone() };
        let theirs = wanted.clone();
        let seen = std::thread::spawn(move || {
            set(None, &theirs).unwrap();
            get(None).unwrap()
        });
        let seen = seen.join().unwrap();
        assert_eq!(seen, wanted);
        // This thread is as it was.
        assert_eq!(get(None).unwrap(), all);
    }

    #[test]
    fn what_is_read_exactly_can_be_given_to_another_thread() {
        let all = get(None).unwrap();
        let wanted = Scheduling { cpus: vec![all.cpus[0]], policy: 3, nice: 5, ..all.clone() };
        let theirs = wanted.clone();
        let exact = std::thread::spawn(move || {
            set(None, &theirs).unwrap();
            Exact::of(None).unwrap()
        });
        let exact = exact.join().unwrap();
        let seen = std::thread::spawn(move || {
            exact.give(None).unwrap();
            get(None).unwrap()
        });
        assert_eq!(seen.join().unwrap(), wanted);
        assert_eq!(get(None).unwrap(), all);
    }

    #[test]
    fn processors_that_are_not_there_are_refused() {
        let scheduling = get(None).unwrap();
        let error = set(None, &Scheduling { cpus: vec![1023], ..scheduling }).unwrap_err();
        assert!(error.to_string().contains("affinity"), "{error}");
        assert!(get(Some(i32::MAX)).is_err());
    }
}
