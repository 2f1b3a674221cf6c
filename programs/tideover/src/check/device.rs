//! `/dev/liveupdate`: may it be opened, who has it, what does it preserve, which sessions are there.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::fs::MetadataExt as _;

use ::liveupdate::OpenError;

use super::Sight;
use super::finding::Finding;
use super::finding::Id;
use super::host::OpenFile;
use super::kernel::Release;

const PATH: &str = "/dev/liveupdate";
/// What the kernel calls a session's file, before its name.
const SESSION: &str = "anon_inode:[luo_session]";
/// Sessions that go into one of the kernel's blocks.
const BLOCK: usize = 51;
/// How many names are shown.
const SHOWN: usize = 5;

/// What came of opening the device.
#[derive(Debug)]
pub(super) enum Device {
    /// It was opened, and closed again.
    Open(Box<Kinds>),
    /// No session could be made.
    NoSession(String),
    /// It could not be opened.
    Refused(OpenError),
}

/// What the kernel preserves.
#[derive(Debug, Clone)]
pub(super) struct Kinds {
    pub(super) memfd: Kept,
    pub(super) hugetlb: Kept,
    pub(super) vm: Kept,
    pub(super) guest_memfd: Kept,
}

/// Whether it preserves a file of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kept {
    Yes,
    /// ENOENT: nothing in this kernel preserves such files.
    Unsupported,
    /// It does so, and refused.
    Refused(String),
    /// There was no such file to try with.
    NotTried(String),
}

impl Device {
    /// Whether there is one, whoever may open it.
    pub(super) fn is_there(&self) -> bool {
        !matches!(self, Self::Refused(OpenError::Absent))
    }

    /// What the kernel preserves, if it said so.
    pub(super) fn kinds(&self) -> Option<&Kinds> {
        match self {
            Self::Open(kinds) => Some(kinds),
            Self::NoSession(_) | Self::Refused(_) => None,
        }
    }
}

pub(super) fn findings(sight: &Sight<'_>) -> Vec<Finding> {
    let mut all = vec![opened(sight)];
    if let Some(kinds) = sight.device.kinds() {
        all.extend(preserved(kinds));
    }
    all.push(sessions(&sight.files));
    all
}

/// Where there is none, and reserved memory.
pub(super) fn not_needed(_: &Sight<'_>) -> Vec<Finding> {
    vec![Id::DeviceOpen.ok(format!("there is no {PATH}: only machines in reserved memory can be carried"))]
}

fn opened(sight: &Sight<'_>) -> Finding {
    let id = Id::DeviceOpen;
    let error = match &sight.device {
        Device::Open(_) => return id.ok(format!("{PATH} can be opened, and takes sessions")),
        Device::NoSession(error) => {
            return id.failure(
                format!("{PATH} can be opened, and takes no session: {error}"),
                "look for `luo:` in the kernel's log",
            );
        }
        Device::Refused(error) => error,
    };
    match error {
        OpenError::Absent => {
            let (why, advice) = why_absent(sight);
            id.failure(format!("there is no {PATH}: {why}"), advice)
        }
        OpenError::Busy => {
            let holder = holder(sight);
            let of = holder.clone().unwrap_or_else(|| "a process that cannot be seen from here".to_owned());
            id.failure(
                format!("{PATH} is in use, and has one user at a time: {of}"),
                match holder {
                    Some(_) => "stop it, or have it keep Tideover's session",
                    None => "run this as root, in the host's own PID namespace, to see who it is",
                },
            )
        }
        OpenError::Unreadable => id.failure(
            format!(
                "{PATH} gives EIO: the kernel could not read what the one before it left, and says so until the next boot; \
                 all of that is lost"
            ),
            "look for `luo:` in the kernel's log for the reason, and boot the host afresh",
        ),
        OpenError::Denied(_) => id.failure(format!("{PATH} may be opened by root alone"), "run this as root"),
        OpenError::Other(source) => {
            id.failure(format!("{PATH} cannot be opened: {source}"), "look for `luo:` in the kernel's log")
        }
    }
}

/// Why there is no device, and what to do.
fn why_absent(sight: &Sight<'_>) -> (String, String) {
    let boot = |parameters: &str| format!("add {parameters} to the kernel's command line, and boot it");
    if sight.release.is_some_and(|release| release < Release::FIRST) {
        let first = Release::FIRST;
        return (
            format!("it is new in Linux {first}"),
            format!("boot Linux {first} or later, built with CONFIG_LIVEUPDATE"),
        );
    }
    if sight.host.exists("/sys/class/misc/liveupdate") {
        let advice = "run this where the host's /dev is: in no container";
        return ("the kernel has it, but this /dev lacks it".to_owned(), advice.to_owned());
    }
    if let Some(missing) =
        sight.config.as_ref().map(|config| config.missing()).filter(|missing| !missing.is_empty())
    {
        let missing = missing.join(", CONFIG_");
        return (
            format!("the kernel was built without CONFIG_{missing}"),
            "boot a kernel that has it".to_owned(),
        );
    }
    if let Some(line) = sight.log.find("KHO: Failed to reserve") {
        return (
            format!(
                "the kernel could not set scratch memory aside at boot, and turned handover off ({})",
                line.escape_debug()
            ),
            boot(
                "kho_scratch=64M,256M,64M, or what the host has room for (low memory, all memory, each NUMA node),",
            ),
        );
    }
    match sight.told.missing(sight.config.as_ref()) {
        (missing, _) if !missing.is_empty() => {
            (format!("the kernel was not told {}", missing.join(" and ")), boot(&missing.join(" ")))
        }
        (_, perhaps) if !perhaps.is_empty() => {
            ("the kernel was not told kho=on, perhaps".to_owned(), boot(&perhaps.join(" ")))
        }
        _ => (
            "why, cannot be seen from here".to_owned(),
            "look for `KHO:` and `luo:` in the kernel's log".to_owned(),
        ),
    }
}

/// Who has the device, in words.
fn holder(sight: &Sight<'_>) -> Option<String> {
    let device = fs::metadata(sight.host.path(PATH)).ok().filter(|node| node.file_type().is_char_device());
    let device = device.map(|node| node.rdev());
    let is_device = |file: &&OpenFile| {
        // Under another name, too, as in a container.
        file.name == PATH
            || device.is_some_and(|device| {
                file.name.contains("/dev/")
                    && fs::metadata(&file.link)
                        .is_ok_and(|node| node.file_type().is_char_device() && node.rdev() == device)
            })
    };
    let mut pids: Vec<u32> = sight.files.iter().filter(is_device).map(|file| file.pid).collect();
    pids.dedup();
    (!pids.is_empty()).then(|| processes(sight, &pids))
}

fn processes(sight: &Sight<'_>, pids: &[u32]) -> String {
    let named = pids.iter().map(|pid| format!("process {pid} ({})", sight.host.process_name(*pid)));
    named.collect::<Vec<_>>().join(", ")
}

fn preserved(kinds: &Kinds) -> [Finding; 4] {
    let told = |id: Id, kept: &Kept, without: &str| match kept {
        Kept::Yes => id.ok("preserved by this kernel"),
        Kept::Unsupported => id.ok(format!("not preserved by this kernel: {without}")),
        Kept::Refused(error) => id.ok(format!("preserved by this kernel, but not now: {error}")),
        Kept::NotTried(why) => id.ok(format!("not tried: {why}")),
    };
    let memfd = Id::PreservesMemfd;
    let memfd = match &kinds.memfd {
        Kept::Yes => memfd.ok("preserved by this kernel"),
        Kept::Unsupported => memfd.failure(
            "not preserved by this kernel, and guest memory is made of it",
            "boot a kernel built with CONFIG_LIVEUPDATE_MEMFD",
        ),
        Kept::Refused(error) => {
            memfd.failure(format!("not preserved now: {error}"), "look for `memfd_luo:` in the kernel's log")
        }
        Kept::NotTried(why) => memfd.failure(
            format!("cannot be made, and guest memory is made of it: {why}"),
            "see vm.memfd_noexec, and how much memory is free",
        ),
    };
    let state = "Tideover carries the VM's state itself";
    let store = "machines of that store stay behind";
    [
        memfd,
        told(Id::PreservesHugetlb, &kinds.hugetlb, store),
        told(Id::PreservesVm, &kinds.vm, state),
        told(Id::PreservesGuestMemfd, &kinds.guest_memfd, store),
    ]
}

/// The names of the sessions that somebody has open, as the kernel lists none; and who that is.
pub(super) fn open_sessions(files: &[OpenFile]) -> BTreeMap<&str, u32> {
    let mut names = BTreeMap::new();
    for file in files {
        if let Some(name) = file.name.strip_prefix(SESSION) {
            names.entry(name.trim_start()).or_insert(file.pid);
        }
    }
    names
}

fn sessions(files: &[OpenFile]) -> Finding {
    let id = Id::Sessions;
    let names = open_sessions(files);
    if names.is_empty() {
        return id.ok("none that could be seen");
    }
    let shown = names.iter().take(SHOWN);
    let shown: Vec<_> = shown.map(|(name, pid)| format!("{} (process {pid})", name.escape_debug())).collect();
    let more = if names.len() > SHOWN { ", …" } else { "" };
    let found = format!("{} open: {}{more}", names.len(), shown.join(", "));
    if names.len().is_multiple_of(BLOCK) {
        return id.warning(
            format!(
                "{found}; with {BLOCK}, {}, … of them Linux 7.3 makes the next kernel panic if a name is created twice",
                2 * BLOCK
            ),
            "make or close one more session right before the kexec: that mends it",
        );
    }
    id.ok(found)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::super::Level;
    use super::super::tree::Tree;
    use super::super::tree::kinds;
    use super::*;

    fn refused(errno: i32) -> Device {
        let source = io::Error::from_raw_os_error(errno);
        Device::Refused(match errno {
            13 => OpenError::Denied(source),
            _ => OpenError::Other(source),
        })
    }

    fn absent() -> Device {
        Device::Refused(OpenError::Absent)
    }

    #[track_caller]
    fn why(tree: &Tree, about: &str) {
        tree.finds(Id::DeviceOpen, Level::Failure, about);
    }

    #[test]
    fn each_refusal_says_what_it_means() {
        let mut tree = Tree::new();
        tree.finds(Id::DeviceOpen, Level::Ok, "takes sessions");
        tree.answers.device = || Device::NoSession("full".to_owned());
        why(&tree, "full");
        tree.answers.device = || Device::Refused(OpenError::Unreadable);
        why(&tree, "EIO");
        tree.answers.device = || refused(13);
        why(&tree, "as root");
        tree.answers.device = || refused(5);
        why(&tree, "cannot be opened");
        // What it preserves was not to be learnt.
        assert_eq!(tree.find(Id::PreservesMemfd), None);
    }

    #[test]
    fn a_device_that_is_not_there_has_a_reason() {
        let mut tree = Tree::new();
        tree.answers.device = absent;
        why(&tree, "cannot be seen from here");
        tree.file("/proc/cmdline", "quiet");
        why(&tree, "not told liveupdate=on");
        tree.remove("/boot");
        tree.file("/proc/cmdline", "liveupdate=on");
        why(&tree, "kho=on, perhaps");
        tree.file("/dev/kmsg", "3,88,97416,-;KHO: Failed to reserve global scratch buffer\n");
        why(&tree, "KHO: Failed to reserve global scratch buffer");
        tree.file("/boot/config-7.3.4", "CONFIG_KEXEC_FILE=y\nCONFIG_MEMFD_CREATE=y\n");
        why(&tree, "without CONFIG_KEXEC_HANDOVER, CONFIG_LIVEUPDATE ->");
        tree.file("/sys/class/misc/liveupdate/dev", "10:258");
        why(&tree, "this /dev lacks it");
        tree.file("/proc/sys/kernel/osrelease", "6.12.1");
        why(&tree, "new in Linux 6.19");
    }

    #[test]
    fn who_has_the_device_is_named() {
        let mut tree = Tree::new();
        tree.answers.device = || Device::Refused(OpenError::Busy);
        why(&tree, "cannot be seen from here");
        tree.file("/proc/1/comm", "system\u{7}d\n");
        tree.opens(1, 9, "/dev/liveupdate");
        tree.opens(1, 10, "/dev/liveupdate");
        why(&tree, "process 1 (system\\u{7}d) ->");
        // Under another name: it is told by its number.
        tree.link("/dev/liveupdate", "/dev/null");
        tree.opens(512, 3, "/dev/null");
        why(&tree, "process 1 (system\\u{7}d), process 512 (?)");
    }

    #[test]
    fn what_the_kernel_preserves_is_said_of_each_kind() {
        let mut tree = Tree::new();
        tree.finds(Id::PreservesMemfd, Level::Ok, "preserved by");
        tree.finds(Id::PreservesHugetlb, Level::Ok, "not preserved by this kernel");
        tree.finds(Id::PreservesVm, Level::Ok, "Tideover carries the VM's state itself");
        tree.finds(Id::PreservesGuestMemfd, Level::Ok, "stay behind");
        tree.answers.device = || {
            Device::Open(Box::new(Kinds {
                memfd: Kept::Unsupported,
                hugetlb: Kept::Yes,
                vm: Kept::Refused("busy".to_owned()),
                guest_memfd: Kept::NotTried("no KVM".to_owned()),
            }))
        };
        tree.finds(Id::PreservesMemfd, Level::Failure, "CONFIG_LIVEUPDATE_MEMFD");
        tree.finds(Id::PreservesHugetlb, Level::Ok, "preserved by this kernel ->");
        tree.finds(Id::PreservesVm, Level::Ok, "not now: busy");
        tree.finds(Id::PreservesGuestMemfd, Level::Ok, "not tried: no KVM");
        tree.answers.device =
            || Device::Open(Box::new(Kinds { memfd: Kept::Refused("no memory".to_owned()), ..kinds() }));
        tree.finds(Id::PreservesMemfd, Level::Failure, "no memory");
        tree.answers.device =
            || Device::Open(Box::new(Kinds { memfd: Kept::NotTried("denied".to_owned()), ..kinds() }));
        tree.finds(Id::PreservesMemfd, Level::Failure, "vm.memfd_noexec");
    }

    #[test]
    fn sessions_are_counted_by_their_names() {
        let tree = Tree::new();
        tree.finds(Id::Sessions, Level::Ok, "none");
        // Two processes have the same.
        tree.opens(20, 3, "anon_inode:[luo_session] a b");
        tree.opens(21, 3, "anon_inode:[luo_session] a b");
        tree.finds(Id::Sessions, Level::Ok, "1 open: a b (process 20)");
        for number in 1..51 {
            tree.opens(30, number, format!("anon_inode:[luo_session] s\u{1b}{number:02}"));
        }
        tree.finds(Id::Sessions, Level::Warning, "51 open: a b (process 20), s\\u{1b}01 (process 30)");
        tree.opens(30, 51, "anon_inode:[luo_session] t");
        tree.finds(Id::Sessions, Level::Ok, "52 open");
    }
}
