//! Whether a process was ended because memory ran out: its cgroup counts such ends.
//!
//! It does not say whose they were. One that was counted long before a VMM died was another process's; so it is heard when they are
//! counted.

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context as _;
use rustix::fs::inotify;
use rustix::fs::inotify::CreateFlags;
use rustix::fs::inotify::WatchFlags;
use tracing::debug;

/// Where groups of processes are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Where a cgroup counts, without those below it.
const EVENTS: &str = "memory.events.local";

/// How often a process of this cgroup was ended for want of memory; `None` where that is not counted.
pub(crate) fn kills(cgroup: Option<&str>) -> Option<u64> {
    let events = fs::read_to_string(folder(cgroup?)?.join(EVENTS)).ok()?;
    parse(&events)
}

/// Rings when a process of a cgroup may have been ended for want of memory.
#[derive(Debug)]
pub(crate) struct Ends(OwnedFd);

impl Ends {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let flags = CreateFlags::CLOEXEC | CreateFlags::NONBLOCK;
        Ok(Self(inotify::init(flags).context("cannot watch cgroups")?))
    }

    /// Rings for this cgroup, too, as long as that is there.
    pub(crate) fn add(&self, cgroup: &str) {
        let Some(events) = folder(cgroup).map(|folder| folder.join(EVENTS)) else { return };
        if let Err(errno) = inotify::add_watch(&self.0, &events, WatchFlags::MODIFY) {
            debug!(%errno, "{} is not watched", events.display());
        }
    }

    /// It was heard. What it was is looked up in the cgroups.
    pub(crate) fn heard(&self) {
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.0, &mut space);
        while events.next().is_ok() {}
    }
}

impl AsFd for Ends {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A name leads nowhere else than below the file system of cgroups.
fn folder(cgroup: &str) -> Option<PathBuf> {
    let relative = Path::new(cgroup.trim_start_matches('/'));
    let below = relative.components().all(|part| matches!(part, Component::Normal(_)));
    below.then(|| Path::new(CGROUPS).join(relative))
}

fn parse(events: &str) -> Option<u64> {
    events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kills_alone_are_counted() {
        assert_eq!(parse("low 0\noom 7\noom_kill 3\noom_group_kill 1\n"), Some(3));
        assert_eq!(parse("low 0\noom 7\n"), None);
        assert_eq!(folder("/a/../b"), None);
        assert_eq!(folder("/a/b").unwrap(), Path::new("/sys/fs/cgroup/a/b"));
    }
}
