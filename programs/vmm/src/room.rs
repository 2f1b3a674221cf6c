//! Room for a machine's memory in the cgroup that it is charged to: a file that the kernel fails to give is lost.

use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;
use std::process;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::bail;
use custody::Note;
use fdpass::Deadline;
use rustix::fs::FlockOperation;

/// Where groups of processes are.
const CGROUPS: &str = "/sys/fs/cgroup";
/// Whoever retrieves memory into a cgroup that has a limit holds this file's lock.
const LOCK: &str = "retrieve.lock";
/// How long others may take that retrieve.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often to ask for the lock.
const LOOK: Duration = Duration::from_millis(10);

/// What the kernel itself takes to keep `bytes`, and this process: of each page of 4 KiB, a 64th of a node of 576 bytes.
fn with_upkeep(bytes: u64) -> u64 {
    bytes.saturating_add(bytes >> 7).saturating_add(8 << 20)
}

/// Makes this process one of the machine's cgroup, if that is there in this life.
pub(crate) fn join_cgroup(note: &Note) -> anyhow::Result<()> {
    let Some(cgroup) = note.cgroup.as_deref().filter(|cgroup| *cgroup != "/") else { return Ok(()) };
    let folder = folder(cgroup)?;
    let procs = folder.join("cgroup.procs");
    // It must not be made here: where that is no file system of cgroups, one would be.
    let mut file = OpenOptions::new()
        .write(true)
        .open(procs)
        .with_context(|| format!("cannot join {}", folder.display()))?;
    std::io::Write::write_all(&mut file, process::id().to_string().as_bytes())
        .with_context(|| format!("cannot join {}", folder.display()))
}

/// A name that came through a kexec leads nowhere else than below the file system of cgroups.
fn folder(cgroup: &str) -> anyhow::Result<PathBuf> {
    let relative = Path::new(cgroup.trim_start_matches('/'));
    if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
        bail!("`{}` is no cgroup", cgroup.escape_debug());
    }
    Ok(Path::new(CGROUPS).join(relative))
}

/// Room that nobody else takes who asks for it here: as long as this lives.
#[derive(Debug)]
pub(crate) struct Room {
    _lock: Option<File>,
}

impl Room {
    /// Looks for room in this process's cgroup, and in those that it is in. `shared` is a directory that all holders of
    /// this user have.
    ///
    /// # Errors
    /// If there is too little, or others keep the lock.
    pub(crate) fn take(note: &Note, shared: Option<&Path>) -> anyhow::Result<Self> {
        let wanted = with_upkeep(note.regions.iter().sum());
        let lock = match shared {
            Some(shared) if !limited().is_empty() => Some(lock(&shared.join(LOCK))?),
            _ => None,
        };
        // It may have taken a while to get here.
        for (folder, max) in limited() {
            let used = number(&folder, "memory.current").unwrap_or_default();
            if max.saturating_sub(used) < wanted {
                bail!(
                    "the machine needs {wanted} bytes, and its cgroup {} may have {max}, of which {used} are used: raise its \
                     memory.max to {} and try again",
                    folder.display(),
                    used.saturating_add(wanted)
                );
            }
        }
        Ok(Self { _lock: lock })
    }
}

/// This process's cgroup and those that it is in, as far as they have a limit, and the limit.
fn limited() -> Vec<(PathBuf, u64)> {
    let list = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(own) = list.lines().find_map(|line| line.strip_prefix("0::")) else { return Vec::new() };
    let Ok(own) = folder(own) else { return Vec::new() };
    let all = own.ancestors().take_while(|folder| folder.starts_with(CGROUPS));
    all.filter_map(|folder| Some((folder.to_owned(), number(folder, "memory.max")?))).collect()
}

/// `None` for `max`, too.
fn number(folder: &Path, file: &str) -> Option<u64> {
    fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok()
}

fn lock(path: &Path) -> anyhow::Result<File> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    let until = Deadline::after(PATIENCE);
    while rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if until.has_passed() {
            bail!("others retrieve their memory, and do not get ready: {} stays locked", path.display());
        }
        thread::sleep(LOOK);
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_came_through_a_kexec_leads_out_of_no_file_system_of_cgroups() {
        assert_eq!(folder("/machines/web1").unwrap(), Path::new("/sys/fs/cgroup/machines/web1"));
        assert_eq!(folder("/").unwrap(), Path::new("/sys/fs/cgroup"));
        for bad in ["/../../etc", "/a/../b", "..", "/./../x"] {
            assert!(folder(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn upkeep_is_more_than_what_the_kernel_takes() {
        for bytes in [0, 4096, 1 << 30, 1 << 40] {
            let nodes = bytes / 4096 / 64 * 576 + bytes / 4096 / 4096 * 576;
            assert!(with_upkeep(bytes) >= bytes + nodes, "{bytes}");
        }
        assert_eq!(with_upkeep(u64::MAX), u64::MAX);
    }
}
