//! What the kernel says of processes, and signals to them.

use std::fmt::Display;
use std::fs;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use fdpass::Deadline;
use fdpass::Pidfd;
use rustix::process::Signal;
use rustix::process::WaitId;
use rustix::process::WaitIdOptions;
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
            if self.ends_within(Duration::ZERO) {
                return false;
            }
            // A thread that is about to end is there for a moment still, and stops no more.
            let mut states =
                threads(self.pid).into_iter().filter(|state| !matches!(state, 'Z' | 'X')).peekable();
            if states.peek().is_some() && states.all(|state| state == 'T') {
                return true;
            }
            thread::sleep(Duration::from_micros(100));
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

/// The letter by which the kernel tells the state of the process or thread of this folder.
fn state_in(folder: &Path) -> Option<char> {
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The state of each thread of a process.
fn threads(pid: u32) -> Vec<char> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|task| state_in(&task.path())).collect()
}

/// The letter by which the kernel tells a process's state; `None` if there is no such process.
#[must_use]
pub fn state(pid: u32) -> Option<char> {
    state_in(Path::new(&format!("/proc/{pid}")))
}

/// The VMMs that live whose environment has that in it, of the processes of this program.
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

/// Ends all processes of this program whose environment has that in it.
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
    let Some(program) = program_of("self") else { return Vec::new() };
    // What a process executes is quicker to ask for than its environment, and few processes are of this program.
    let ours = all().filter(|pid| program_of(*pid) == Some(program));
    let has = |pid: &u32| {
        let has = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        has.split(|byte| *byte == 0).any(|variable| variable == environment.as_bytes())
    };
    ours.filter(has).filter(|pid| !matches!(state(*pid), None | Some('Z' | 'X'))).collect()
}

/// Every process of this host. One that lives all the while is among them, whoever its parent becomes: the lists of a process's children
/// do not promise that.
fn all() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The file that a process executes, by its device and number; `None` if it has ended, or is another user's.
fn program_of(pid: impl Display) -> Option<(u64, u64)> {
    let file = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
    Some((file.dev(), file.ino()))
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
