//! What the kernel says of processes.

use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use rustix::process::Signal;
use rustix::process::kill_process;

use crate::roles::pid_of;

/// How long a process may take to do what it is about to do.
const PATIENCE: Duration = Duration::from_secs(20);

/// A process that a test started; it is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    /// The file that its standard error goes to. Not a pipe: a successor that it starts has it open, too.
    stderr: PathBuf,
}

impl Process {
    pub(crate) fn start(mut command: Command, stderr: PathBuf) -> Self {
        let file = File::create(&stderr).expect("the folder is ours");
        let child = command.stderr(file).spawn().expect("this program can be started");
        Self { child, stderr }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it has stopped itself; false if it ends instead.
    pub(crate) fn stops(&mut self) -> bool {
        await_that("a process stops or ends", || {
            let ended = self.child.try_wait().expect("it is our child").is_some();
            (ended || state(self.child.id()) == Some('T')).then_some(!ended)
        })
    }

    /// Waits until it has stopped itself; false if `other` ends before.
    pub(crate) fn stops_before(&self, other: &mut Self) -> bool {
        await_that("a process stops", || {
            let ended = other.child.try_wait().expect("it is our child").is_some();
            let stopped = state(self.child.id()) == Some('T');
            (ended || stopped).then_some(stopped)
        })
    }

    /// Lets it go on.
    pub(crate) fn wake(&self) {
        wake(self.pid());
    }

    /// Waits for its end: how it ended, and what it said on standard error.
    pub(crate) fn ends(&mut self) -> (ExitStatus, String) {
        let status = await_that("a process ends", || self.child.try_wait().expect("it is our child"));
        (status, self.said())
    }

    /// What it, and the successors that it started, have said on standard error.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.stderr).expect("it is text")
    }

    /// Waits for its end, which is to be a failure, and gives what it said.
    #[track_caller]
    pub(crate) fn fails(&mut self) -> String {
        let (status, said) = self.ends();
        assert_eq!(status.code(), Some(1), "{said}");
        said
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `done` gives something.
#[track_caller]
pub(crate) fn await_that<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = done() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "it does not come to pass that {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The letter by which the kernel tells a process's state; `None` if there is no such process.
pub(crate) fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Lets a process go on that was stopped.
pub(crate) fn wake(pid: u32) {
    kill_process(pid_of(pid), Signal::CONT).expect("a process of this test can be signalled");
}

/// Children of a process, those included that have ended and were not asked how. None if it is gone itself.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of_task = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    of_task.collect::<String>().split(' ').filter_map(|pid| pid.parse().ok()).collect()
}

/// What a process holds: how many threads, and how many descriptors and mappings of each file.
pub(crate) fn holdings(pid: u32) -> BTreeMap<String, usize> {
    let count = |folder: &str| fs::read_dir(format!("/proc/{pid}/{folder}")).expect("it lives").flatten();
    let mut holdings = BTreeMap::from([("threads".to_owned(), count("task").count())]);
    for link in count("fd") {
        let target = fs::read_link(link.path()).unwrap_or_default().display().to_string();
        // Numbers tell one socket or anonymous file from another, and are not the kind.
        let kind = target.split_once(":[").map_or(target.as_str(), |(kind, _)| kind).to_owned();
        *holdings.entry(kind).or_default() += 1;
    }
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it lives");
    for path in maps.lines().filter_map(|line| Some(line.split_once('/')?.1)) {
        *holdings.entry(format!("mapped {path}")).or_default() += 1;
    }
    holdings
}

/// A field of `/proc/PID/status`, in KiB there; `None` if the process is gone.
pub(crate) fn status_bytes(pid: u32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// Waits until somebody listens at the path, whose last part no other socket has.
pub(crate) fn await_listener(path: &Path) {
    /// As the kernel shows the flag of a socket that listens.
    const LISTENS: &str = "00010000";
    let name = path.file_name().and_then(|name| name.to_str()).expect("its name is text");
    let name = format!("/{name}");
    await_that("somebody listens", || {
        let sockets = fs::read_to_string("/proc/net/unix").expect("the kernel lists sockets");
        let ours = |line: &str| line.ends_with(&name) && line.split(' ').any(|field| field == LISTENS);
        sockets.lines().any(ours).then_some(())
    });
}
