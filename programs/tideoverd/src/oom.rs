//! Whether a process was ended because memory ran out: its cgroup counts such ends.

use std::fs;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;

/// Where groups of processes are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// How often a process of this cgroup was ended for want of memory; `None` where that is not counted.
pub(crate) fn kills(cgroup: Option<&str>) -> Option<u64> {
    let events = fs::read_to_string(folder(cgroup?)?.join("memory.events")).ok()?;
    parse(&events)
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
