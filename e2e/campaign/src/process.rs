//! What the kernel says of processes, and signals to them.

use std::fs;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use fdpass::Deadline;
use fdpass::Pidfd;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::WaitId;
use rustix::process::WaitIdOptions;
use rustix::process::kill_process_group;
use rustix::process::pidfd_send_signal;
use rustix::process::waitid;

/// A process, whatever becomes of its number.
#[derive(Debug)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    handle: Pidfd,
}

impl Process {
    /// The process that has this number now.
    ///
    /// # Errors
    /// If there is none.
    pub fn open(pid: u32) -> anyhow::Result<Self> {
        Ok(Self { pid, handle: Pidfd::of_number(pid)? })
    }

    /// Sends a signal; false if it has ended.
    pub fn signal(&self, signal: Signal) -> bool {
        pidfd_send_signal(self.handle.as_fd(), signal).is_ok()
    }

    /// Waits for its end; false if that takes longer.
    #[must_use]
    pub fn ends_within(&self, span: Duration) -> bool {
        self.handle.wait_exit(Deadline::after(span)).is_ok()
    }

    /// Stops it, and waits until all of its threads stand; false if it ends.
    #[must_use]
    pub fn stop(&self) -> bool {
        self.signal(Signal::STOP) && self.stands()
    }

    /// Waits until all of its threads stand; false if it ends, or does not within a while.
    #[must_use]
    pub fn stands(&self) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(20) {
            match threads(self.pid) {
                states if states.is_empty() || states.contains(&'Z') => return false,
                states if states.iter().all(|state| *state == 'T') => return true,
                _ => thread::sleep(Duration::from_micros(100)),
            }
        }
        false
    }

    /// Lets it go on.
    pub fn wake(&self) {
        self.signal(Signal::CONT);
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

/// What the kernel tells of a process in one line: its state, and its group.
fn stat(path: &str) -> Option<(char, u32)> {
    let stat = fs::read_to_string(path).ok()?;
    let mut words = stat.rsplit_once(") ")?.1.split(' ');
    let state = words.next()?.chars().next()?;
    Some((state, words.nth(1)?.parse().ok()?))
}

/// The state of each thread of a process.
fn threads(pid: u32) -> Vec<char> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|task| stat(task.path().join("stat").to_str()?)).map(|(state, _)| state).collect()
}

/// The letter by which the kernel tells a process's state; `None` if there is no such process.
#[must_use]
pub fn state(pid: u32) -> Option<char> {
    stat(&format!("/proc/{pid}/stat")).map(|(state, _)| state)
}

/// The processes of a group that live, of those that this process or a child of its started.
#[must_use]
pub fn living(group: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut look = children(std::process::id());
    while let Some(pid) = look.pop() {
        look.extend(children(pid));
        let Some((state, its_group)) = stat(&format!("/proc/{pid}/stat")) else { continue };
        if its_group == group && !matches!(state, 'Z' | 'X') {
            found.push(pid);
        }
    }
    found.sort_unstable();
    found
}

/// The VMMs that live whose environment has that in it, of the processes that this one, or a child of its, started.
#[must_use]
pub fn living_vmms(environment: &str) -> Vec<u32> {
    let mut vmms = with(environment);
    vmms.retain(|pid| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).nth(1) == Some(b"vmm")
    });
    vmms.sort_unstable();
    vmms
}

/// Ends all processes whose environment has that in it.
pub fn kill_with(environment: &str) {
    // One that is killed may just have started another.
    for _ in 0..3 {
        let processes = with(environment).into_iter().filter_map(|pid| Process::open(pid).ok());
        for process in processes {
            process.signal(Signal::KILL);
        }
    }
}

fn with(environment: &str) -> Vec<u32> {
    let mut found = Vec::new();
    let mut look = children(std::process::id());
    while let Some(pid) = look.pop() {
        look.extend(children(pid));
        let has = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let has = has.split(|byte| *byte == 0).any(|variable| variable == environment.as_bytes());
        if has && !matches!(state(pid), None | Some('Z' | 'X')) {
            found.push(pid);
        }
    }
    found
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of_task = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    of_task.flat_map(|list| list.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

/// Ends all processes of a group.
pub fn kill_group(group: u32) {
    if let Some(pid) = i32::try_from(group).ok().and_then(Pid::from_raw) {
        // It may be empty.
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

/// Makes this process the parent of all that loses its own.
///
/// # Errors
/// As the kernel.
pub fn adopt_orphans() -> anyhow::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("cannot adopt processes")
}

/// Takes note of all children that have ended, so that they leave the list of processes.
pub fn reap() {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    while let Ok(Some(_)) = waitid(WaitId::All, options) {}
}
