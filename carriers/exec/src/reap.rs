//! Children that a process has before its program starts any.

use std::fs;
use std::os::fd::OwnedFd;
use std::thread;

use rustix::process::Pid;
use rustix::process::PidfdFlags;
use rustix::process::WaitId;
use rustix::process::WaitIdOptions;

/// Waits for the end of each child that this process has now, in a thread of its own if there are any. To be called before
/// this program starts one: the others are left from programs before.
///
/// The process in which the program before has stepped aside is nobody's child, and so becomes that of a process that
/// takes such children on: as a rule process 1, or a "subreaper". That may be this one, as in a container.
pub(crate) fn reap() {
    let children: Vec<OwnedFd> = children().into_iter().filter_map(open).collect();
    if children.is_empty() {
        return;
    }
    let wait = move || {
        for child in children {
            let ended = || {
                rustix::process::waitid(
                    WaitId::PidFd(std::os::fd::AsFd::as_fd(&child)),
                    WaitIdOptions::EXITED,
                )
            };
            let _ = rustix::io::retry_on_intr(ended);
        }
    };
    // Without it something is left in the list of processes, and nothing else.
    let _ = thread::Builder::new().name("reaps".to_owned()).spawn(wait);
}

fn open(pid: i32) -> Option<OwnedFd> {
    rustix::process::pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()
}

fn children() -> Vec<i32> {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return Vec::new() };
    let lists = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    #[test]
    #[expect(clippy::zombie_processes, reason = "it is what is to be reaped")]
    fn a_child_that_nobody_waits_for_leaves_nothing() {
        let child = Command::new("/bin/sleep").arg("0.1").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert_eq!(children(), [pid]);
        reap();
        for _ in 0..10_000 {
            if children().is_empty() {
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
        panic!("it is still there");
    }
}
