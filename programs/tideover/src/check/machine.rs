//! The machines: can each be carried, and what will it take?

use std::fs;
use std::fs::File;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::path::PathBuf;

use ::kexec::MAX_NAME_BYTES;
use ::vmm::control::DeviceKind;
use ::vmm::control::DeviceStatus;
use ::vmm::control::GuestKind;
use ::vmm::control::GuestState;
use ::vmm::control::Status;
use ::vmm::control::Store;
use machine::SessionName;
use rustix::fs::SealFlags;

use super::Sight;
use super::device::Kept;
use super::device::open_sessions;
use super::finding::Finding;
use super::finding::Id;
use super::host::Host;
use super::memory::amount;
use super::memory::available_bytes;
use crate::machines::NoMachine;
use crate::table;

const SMALL: u64 = 4096;
const HUGE: u64 = 2 << 20;
/// A machine's metadata, in pages of 4 KiB beside its memory.
const METADATA_BYTES: u64 = 8 << 20;
/// What a page of 4 KiB takes to be preserved and to come back, in nanoseconds: by itself, and as a part of a huge page. As measured
/// on one host; others are slower or faster.
const PRESERVE_NS: [u64; 2] = [550, 12];
const RETRIEVE_NS: [u64; 2] = [3000, 66];
/// File systems whose files are gone with the kernel.
const VOLATILE: [&str; 4] = ["tmpfs", "ramfs", "rootfs", "hugetlbfs"];

/// A machine, and what its VMM has open.
struct Machine<'a> {
    host: &'a Host,
    status: Status,
    files: Option<Files>,
}

/// The memory files of a VMM.
#[derive(Default)]
struct Files {
    /// Their sizes together.
    bytes: u64,
    /// How much of that has memory.
    filled_bytes: u64,
    /// Whether one is sealed against execution.
    sealed_exec: bool,
}

pub(super) fn findings(sight: &Sight<'_>) -> Vec<Finding> {
    let named = &sight.subject.machines;
    let names = match named.is_empty() {
        false => Ok(named.clone()),
        true => sight.host.calls.machines(),
    };
    let names = match names {
        Ok(names) => names,
        Err(error) => return vec![Id::MachineAnswers.failure(format!("{error:#}"), "see $TIDEOVER_DIR")],
    };
    let (mut all, mut holes_bytes) = (Vec::new(), 0);
    for name in &names {
        let of = match sight.host.calls.status(name) {
            Ok(status) => {
                let machine = Machine::of(sight.host, status);
                holes_bytes += machine.holes_bytes().unwrap_or_default();
                machine.findings(sight)
            }
            Err(error) => vec![silent(&error, !named.is_empty())],
        };
        let shown = name.escape_debug().to_string();
        all.extend(of.into_iter().map(|finding| finding.of_machine(&shown)));
    }
    all.insert(0, host_memory(sight, holes_bytes));
    all
}

/// A machine that does not answer.
fn silent(error: &anyhow::Error, named: bool) -> Finding {
    let id = Id::MachineAnswers;
    match error.is::<NoMachine>() && !named {
        true => id.warning(
            "is dead: its socket is there, and nobody answers",
            "remove the socket, or run the machine again",
        ),
        false => id.failure(
            format!("{error:#}").escape_debug().to_string(),
            "see `tideover ls` and the machine's log; one that is held: `tideover resume` or `stop` it",
        ),
    }
}

fn host_memory(sight: &Sight<'_>, holes_bytes: u64) -> Finding {
    let id = Id::HostMemory;
    let Some(available) = available_bytes(sight.host) else {
        return id.warning("how much is free cannot be told", "see /proc/meminfo");
    };
    let free = amount(available);
    match holes_bytes {
        0 => id.ok(free),
        holes if holes <= available => {
            id.ok(format!("{free}, of which the machines' untouched pages will take {}", amount(holes)))
        }
        holes => id.failure(
            format!("{free}, and to preserve the machines' untouched pages takes {}", amount(holes)),
            "free memory, or stop a machine: what cannot be given memory cannot be preserved",
        ),
    }
}

impl<'a> Machine<'a> {
    fn of(host: &'a Host, status: Status) -> Self {
        let files = files(host, status.pid);
        Self { host, status, files }
    }

    /// Bytes that have no memory yet, and get some when they are preserved; `None` if that cannot be told.
    fn holes_bytes(&self) -> Option<u64> {
        let files = self.files.as_ref().filter(|_| self.status.store == Store::Memfd)?;
        Some(files.bytes.saturating_sub(files.filled_bytes))
    }

    fn findings(&self, sight: &Sight<'_>) -> Vec<Finding> {
        let mut all = match self.status.store {
            Store::Path => vec![self.answers(), self.goes(), self.guest(), self.store(sight)],
            _ if sight.only_reserved() => vec![self.answers(), self.guest(), ends()],
            _ => self.by_the_device(sight),
        };
        let devices = &self.status.devices;
        all.extend(devices.iter().filter_map(|device| match device.kind {
            DeviceKind::Disk => Some(self.disk(device)),
            DeviceKind::Net => Some(tap(device)),
            DeviceKind::Serial | DeviceKind::Power => None,
        }));
        all.extend(self.consoles());
        all
    }

    /// What it takes to be carried by /dev/liveupdate.
    fn by_the_device(&self, sight: &Sight<'_>) -> Vec<Finding> {
        let mut all = vec![self.answers(), self.goes(), self.name()];
        all.extend(self.session(sight));
        all.extend([self.guest(), self.store(sight)]);
        if self.status.store == Store::Memfd {
            all.extend(self.seals());
            all.extend([self.pages(), self.holes()]);
            all.extend(self.cgroup());
        }
        all
    }

    fn answers(&self) -> Finding {
        let Status { pid, state, vcpus, memory_bytes, .. } = &self.status;
        let state = match state {
            GuestState::Running => "the guest runs",
            GuestState::Paused => "the guest stands still, and will after the kexec",
            GuestState::Ended => "the guest has ended",
        };
        Id::MachineAnswers.ok(format!(
            "process {pid}, {}, {} of memory; {state}",
            table::vcpus(*vcpus),
            amount(*memory_bytes)
        ))
    }

    fn name(&self) -> Finding {
        match self.status.name.len() {
            len @ ..=MAX_NAME_BYTES => Id::MachineName.ok(format!("{len} of at most {MAX_NAME_BYTES} bytes")),
            len => Id::MachineName.failure(
                format!("{len} bytes; the name of its session has room for {MAX_NAME_BYTES}"),
                "run it under a shorter name",
            ),
        }
    }

    fn goes(&self) -> Finding {
        let id = Id::MachineThroughKexec;
        match self.status.through_kexec {
            _ if self.status.store == Store::Path => self.stays(),
            true => id.ok("it was run with --through-kexec"),
            false => id.failure(
                "it was not run with --through-kexec, and would end with this kernel",
                "run such machines with --through-kexec, stop it before the kexec, or leave it behind by `tideover kexec --leave-others`",
            ),
        }
    }

    /// Of a machine at a path, whether what is there stays.
    fn stays(&self) -> Finding {
        let (id, at) = (Id::MachineThroughKexec, self.at());
        match self.status.through_kexec {
            true => id.ok(format!("it lies at {at}, which stays where it is")),
            false => id.failure(
                format!("it lies at {at}, whose memory is this kernel's, and would end with it"),
                "run it on reserved memory (--path), stop it before the kexec, or leave it behind by `tideover kexec --leave-others`",
            ),
        }
    }

    fn at(&self) -> String {
        let path = self.status.path.as_ref().map(|path| path.display().to_string());
        path.map_or_else(|| "a path that it does not name".to_owned(), |path| path.escape_debug().to_string())
    }

    /// A session of its name is in the way of another one.
    fn session(&self, sight: &Sight<'_>) -> Option<Finding> {
        let name = SessionName::new(self.status.name.as_bytes()).ok()?;
        let name = ::kexec::session_name(name).ok()?.to_string();
        let pid = *open_sessions(&sight.files).get(name.as_str())?;
        Some(Id::MachineSession.failure(
            format!(
                "process {pid} ({}) has {name} open: a kexec is under way, or the last one is not finished",
                sight.host.process_name(pid)
            ),
            "wait until it ends; a machine that is held has to be resumed or stopped",
        ))
    }

    fn guest(&self) -> Finding {
        match self.status.guest {
            GuestKind::Kvm => Id::MachineGuest.ok("a VM of KVM, whose state Tideover carries itself"),
            GuestKind::Thread => Id::MachineGuest.ok("threads of the VMM, which need no KVM"),
        }
    }

    fn store(&self, sight: &Sight<'_>) -> Finding {
        let id = Id::MachineStore;
        if self.status.store == Store::Path {
            return id.ok(format!("{}: no kernel has to preserve it", self.at()));
        }
        let kinds = sight.device.kinds();
        let (name, kept) = match self.status.store {
            Store::Memfd | Store::Path => ("a memfd", kinds.map(|kinds| &kinds.memfd)),
            Store::Hugetlb => ("a memfd of huge pages (hugetlb)", kinds.map(|kinds| &kinds.hugetlb)),
            // It goes with its VM object alone.
            Store::GuestMemfd => {
                let needed = kinds.map(|kinds| match kinds.vm {
                    Kept::Yes => &kinds.guest_memfd,
                    _ => &kinds.vm,
                });
                ("a guest_memfd", needed)
            }
        };
        let other = "run the machine with --store memfd, whose pages are huge where that can be had";
        match (kept, self.status.store) {
            (Some(Kept::Yes), _) => id.ok(format!("{name}, which this kernel preserves")),
            (Some(Kept::Unsupported), _) => {
                id.failure(format!("{name}, which this kernel does not preserve"), other)
            }
            (Some(Kept::Refused(why) | Kept::NotTried(why)), _) => id.failure(
                format!("{name}; whether this kernel preserves it was not to be seen: {why}"),
                other,
            ),
            (None, Store::Memfd) => id
                .ok(format!("{name}: Linux preserves it since 6.19, and /dev/liveupdate could not be asked")),
            (None, _) => id.failure(format!("{name}, which no released kernel preserves"), other),
        }
    }

    fn seals(&self) -> Option<Finding> {
        let id = Id::MachineSeals;
        Some(match self.files.as_ref()?.sealed_exec {
            false => id.ok("not sealed against execution"),
            true => id.failure(
                "sealed against execution: Linux gives such memory back read-only for ever",
                "run the machine anew: an update does not mend it",
            ),
        })
    }

    fn pages(&self) -> Finding {
        let id = Id::MachinePages;
        let Status { memory_bytes, huge_bytes, page_size, huge_refused, .. } = self.status;
        let huge = huge_bytes.min(memory_bytes);
        let small_pages = (memory_bytes - huge + METADATA_BYTES) / SMALL;
        let folios = small_pages + huge / HUGE;
        let takes =
            |ns: [u64; 2]| span(small_pages.saturating_mul(ns[0]).saturating_add(huge / SMALL * ns[1]));
        let found = format!(
            "{} of {} in huge pages; {folios} pages in all, about {} to preserve and {} to retrieve",
            amount(huge),
            amount(memory_bytes),
            takes(PRESERVE_NS),
            takes(RETRIEVE_NS)
        );
        if huge >= memory_bytes - huge {
            return id.ok(found);
        }
        let setting = self.host.text("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
        let setting = setting.and_then(|text| Some(text.split_once('[')?.1.split_once(']')?.0.to_owned()));
        let advice = if page_size < HUGE {
            "run the machine with --page-size 2MiB".to_owned()
        } else {
            let refused =
                huge_refused.map(|errno| format!(" (refused: {})", std::io::Error::from_raw_os_error(errno)));
            format!(
                "free memory in pieces of 2 MiB before the machine is run{}; shmem_enabled is {}, which `advise` helps",
                refused.unwrap_or_default(),
                setting.as_deref().unwrap_or("not there")
            )
        };
        id.warning(found, advice)
    }

    fn holes(&self) -> Finding {
        let id = Id::MachineHoles;
        match self.holes_bytes() {
            None => id.warning(
                "how much of its memory was never touched cannot be told: the VMM's files may not be looked at",
                "run this as root",
            ),
            Some(0) => id.ok("none: all of its memory is there"),
            Some(bytes) => id.ok(format!("{} were never touched, and get memory when they are preserved", amount(bytes))),
        }
    }

    /// Whether the limits of the VMM's cgroup allow what is preserved, and what comes back.
    fn cgroup(&self) -> Option<Finding> {
        let id = Id::MachineCgroup;
        let (mount, group) = cgroup(self.host, self.status.pid)?;
        let holes = self.holes_bytes().unwrap_or_default();
        let whole = self.status.memory_bytes.saturating_add(METADATA_BYTES);
        let mut limits = 0;
        for ancestor in group.ancestors() {
            let folder = mount.join(ancestor.strip_prefix("/").unwrap_or(ancestor));
            let number = |file: &str| self.host.text(folder.join(file))?.parse::<u64>().ok();
            let Some(max) = number("memory.max") else { continue };
            limits += 1;
            let shown = ancestor.display().to_string().escape_debug().to_string();
            let current = number("memory.current").unwrap_or_default();
            if current.saturating_add(holes) > max {
                return Some(id.failure(
                    format!(
                        "{shown} uses {} of at most {}, and to preserve the rest takes {}",
                        amount(current),
                        amount(max),
                        amount(holes)
                    ),
                    "raise its memory.max",
                ));
            }
            if whole > max {
                return Some(id.failure(
                    format!("{shown} may use {}, and {} come back after the kexec", amount(max), amount(whole)),
                    "raise its memory.max: what comes back is charged to a cgroup of that name, else to that of `tideover resume`",
                ));
            }
        }
        Some(match limits {
            0 => id.ok("no limit on its memory"),
            _ => id.ok("its limits leave room").note(
                "they have to after the kexec, too: what comes back is charged to a cgroup of that name, else to that of `tideover resume`",
            ),
        })
    }

    fn disk(&self, device: &DeviceStatus) -> Finding {
        let id = Id::MachineDisk;
        let path = PathBuf::from(device.backend.as_deref().unwrap_or_default());
        let shown = format!("{}: {}", device.name.escape_debug(), path.display().to_string().escape_debug());
        let Some(real) = self.host.real(&path) else {
            return id.failure(
                format!("{shown} is not there any more, and has to be opened by that path after the kexec"),
                "put the file back at that path",
            );
        };
        let is_block =
            fs::metadata(self.host.path(&real)).is_ok_and(|node| node.file_type().is_block_device());
        match file_system(self.host, &real) {
            Some(kind) if VOLATILE.contains(&kind.as_str()) && !is_block => id.warning(
                format!("{shown} lies on a {kind}, which is gone with the kernel"),
                "move it to a file system that the next kernel mounts, or put it there again before the machine is resumed",
            ),
            _ => id.ok(format!("{shown} is opened again by that path after the kexec")),
        }
    }

    fn consoles(&self) -> Option<Finding> {
        let count = self.status.consoles;
        let found = format!("{count} attached");
        (count > 0).then(|| {
            Id::MachineConsoles.ok(found).note("they end with this kernel: attach them again after the kexec")
        })
    }
}

/// Of a machine that lies where the kernel's memory is, on a host that carries none of that.
fn ends() -> Finding {
    Id::MachineStore.failure(
        "not in reserved memory, and there is no /dev/liveupdate: it ends with this kernel",
        "stop it before the kexec, and run it in reserved memory (run --path)",
    )
}

fn tap(device: &DeviceStatus) -> Finding {
    let tap = device.backend.as_deref().unwrap_or_default().escape_debug();
    Id::MachineTap.warning(
        format!("{}: {tap} ends with this kernel, as all interfaces do", device.name.escape_debug()),
        format!("have {tap} made again before the machine is resumed (ip tuntap add {tap} mode tap)"),
    )
}

/// Looks at the memory files that a process has open; `None` if that may not be.
fn files(host: &Host, pid: u32) -> Option<Files> {
    let mut seen = Vec::new();
    let mut all = Files::default();
    let memory = host.open_files_of(pid)?.into_iter().filter(|file| file.name.contains("/memfd:"));
    for file in memory {
        let Ok(node) = fs::metadata(&file.link) else { continue };
        if seen.contains(&node.ino()) {
            continue;
        }
        seen.push(node.ino());
        all.bytes += node.len();
        all.filled_bytes += node.blocks() * 512;
        let seals = File::open(&file.link).ok().and_then(|file| rustix::fs::fcntl_get_seals(file).ok());
        all.sealed_exec |= seals.is_some_and(|seals| seals.contains(SealFlags::EXEC));
    }
    Some(all)
}

/// A line of the host's mounts: where, and what kind of file system.
fn mounts(host: &Host) -> Vec<(PathBuf, String)> {
    let text = host.text("/proc/self/mountinfo").unwrap_or_default();
    let mounts = text.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let at = mount.split(' ').nth(4)?;
        Some((PathBuf::from(plain(at)), kind.split(' ').next()?.to_owned()))
    });
    mounts.collect()
}

/// A path as it is, without the octal numbers that stand for white space.
pub(crate) fn plain(path: &str) -> String {
    let letters = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    letters.into_iter().fold(path.to_owned(), |path, (number, letter)| path.replace(number, letter))
}

/// What kind of file system a file lies on.
fn file_system(host: &Host, path: &Path) -> Option<String> {
    let under = mounts(host).into_iter().filter(|(at, _)| path.starts_with(at));
    // Of two at one place the later one hides the other.
    under
        .enumerate()
        .max_by_key(|(order, (at, _))| (at.components().count(), *order))
        .map(|(_, (_, kind))| kind)
}

/// Where the cgroups are, and the one of a process.
fn cgroup(host: &Host, pid: u32) -> Option<(PathBuf, PathBuf)> {
    let (mount, _) = mounts(host).into_iter().find(|(_, kind)| kind == "cgroup2")?;
    let text = host.text(format!("/proc/{pid}/cgroup"))?;
    let group = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some((mount, PathBuf::from(group)))
}

/// A span of time for people, of which little is known.
fn span(ns: u64) -> String {
    match ns {
        0..1_000_000 => "1 ms".to_owned(),
        1_000_000..1_000_000_000 => format!("{} ms", ns / 1_000_000),
        _ => format!("{}.{} s", ns / 1_000_000_000, ns / 100_000_000 % 10),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;
    use std::os::fd::OwnedFd;

    use rustix::fs::MemfdFlags;

    use super::super::Level;
    use super::super::device::Device;
    use super::super::device::Kinds;
    use super::super::tree::PID;
    use super::super::tree::Tree;
    use super::super::tree::device;
    use super::super::tree::kinds;
    use super::*;

    const MIB: u64 = 1 << 20;

    fn memory(flags: MemfdFlags, bytes: u64, filled: usize) -> OwnedFd {
        let file = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC | flags).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        rustix::io::pwrite(&file, &vec![1; filled], 0).unwrap();
        file
    }

    #[test]
    fn a_machine_that_does_not_answer_is_told_of() {
        let mut tree = Tree::new();
        tree.finds(Id::MachineAnswers, Level::Ok, "process 77, 2 vCPUs, 1 GiB of memory; the guest runs");
        tree.status().state = GuestState::Paused;
        tree.finds(Id::MachineAnswers, Level::Ok, "stands still");
        tree.status().state = GuestState::Ended;
        tree.finds(Id::MachineAnswers, Level::Ok, "has ended");
        // Dead, and then busy.
        tree.status().pid = 1;
        tree.finds(Id::MachineAnswers, Level::Warning, "is dead");
        tree.status().pid = 0;
        tree.finds(Id::MachineAnswers, Level::Failure, "no answer in time");
        tree.subject.machines = vec!["web2".to_owned()];
        tree.finds(Id::MachineAnswers, Level::Failure, "there is no machine");
        assert_eq!(tree.find(Id::MachineAnswers).unwrap().machine.as_deref(), Some("web2"));
        tree.subject.machines.clear();
        tree.answers.unlisted = true;
        tree.finds(Id::MachineAnswers, Level::Failure, "cannot read the folder");
    }

    #[test]
    fn every_machine_is_looked_at_or_those_that_are_named() {
        let mut tree = Tree::new();
        tree.answers.machines.push(tree.machine("web2"));
        let machines = |tree: &Tree| {
            let findings = tree.run().into_iter().filter(|finding| finding.id == Id::MachineName);
            findings.map(|finding| finding.machine.unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(machines(&tree), ["web1", "web2"]);
        tree.subject.machines = vec!["web2".to_owned()];
        assert_eq!(machines(&tree), ["web2"]);
    }

    #[test]
    fn a_name_has_to_have_room_in_a_sessions_name() {
        let mut tree = Tree::new();
        for (len, level) in [(60, Level::Ok), (61, Level::Failure)] {
            tree.status().name = "n".repeat(len);
            tree.finds(Id::MachineName, level, &format!("{len} "));
        }
    }

    #[test]
    fn a_machine_goes_along_if_it_was_run_so() {
        let mut tree = Tree::new();
        tree.finds(Id::MachineThroughKexec, Level::Ok, "");
        tree.status().through_kexec = false;
        tree.finds(Id::MachineThroughKexec, Level::Failure, "would end with this kernel");
    }

    #[test]
    fn a_session_of_the_machines_name_is_in_the_way() {
        let tree = Tree::new();
        tree.opens(20, 3, "anon_inode:[luo_session] vm:web10");
        assert_eq!(tree.find(Id::MachineSession), None);
        tree.opens(PID, 3, "anon_inode:[luo_session] vm:web1");
        tree.finds(Id::MachineSession, Level::Failure, "process 77 (tideover) has vm:web1 open");
    }

    #[test]
    fn each_guest_can_be_carried() {
        let mut tree = Tree::new();
        tree.finds(Id::MachineGuest, Level::Ok, "KVM");
        tree.status().guest = GuestKind::Thread;
        tree.finds(Id::MachineGuest, Level::Ok, "threads");
    }

    #[test]
    fn a_store_has_to_be_preserved_by_the_kernel() {
        let mut tree = Tree::new();
        tree.finds(Id::MachineStore, Level::Ok, "which this kernel preserves");
        for (store, name) in [(Store::Hugetlb, "hugetlb"), (Store::GuestMemfd, "guest_memfd")] {
            tree.status().store = store;
            tree.finds(Id::MachineStore, Level::Failure, name);
            // Its pages are not told of.
            assert_eq!(tree.find(Id::MachinePages), None);
        }
        tree.answers.device = || Device::Open(Box::new(Kinds { guest_memfd: Kept::Yes, ..kinds() }));
        tree.finds(Id::MachineStore, Level::Failure, "does not preserve");
        tree.answers.device =
            || Device::Open(Box::new(Kinds { guest_memfd: Kept::Yes, vm: Kept::Yes, ..kinds() }));
        tree.finds(Id::MachineStore, Level::Ok, "guest_memfd");
        tree.answers.device =
            || Device::Open(Box::new(Kinds { vm: Kept::NotTried("no KVM".to_owned()), ..kinds() }));
        tree.finds(Id::MachineStore, Level::Failure, "no KVM");
        tree.answers.device = || Device::NoSession(String::new());
        tree.finds(Id::MachineStore, Level::Failure, "no released kernel");
        tree.status().store = Store::Memfd;
        tree.finds(Id::MachineStore, Level::Ok, "could not be asked");
    }

    #[test]
    fn most_memory_in_small_pages_is_a_warning_that_says_what_it_costs() {
        let mut tree = Tree::new();
        tree.finds(
            Id::MachinePages,
            Level::Ok,
            "1 GiB of 1 GiB in huge pages; 2560 pages in all, about 4 ms to preserve and 23 ms to retrieve",
        );
        tree.status().huge_bytes = (512 << 20) - (2 << 20);
        tree.finds(Id::MachinePages, Level::Warning, "shmem_enabled is never");
        tree.status().huge_refused = Some(12);
        tree.finds(Id::MachinePages, Level::Warning, "Cannot allocate memory");
        tree.status().huge_bytes = 0;
        tree.status().page_size = 4096;
        tree.finds(Id::MachinePages, Level::Warning, "264192 pages in all, about 145 ms to preserve and 792 ms to retrieve -> run the machine with --page-size 2MiB");
        tree.status().memory_bytes = 64 << 30;
        tree.finds(Id::MachinePages, Level::Warning, "about 9.2 s to preserve and 50.3 s to retrieve");
    }

    #[test]
    fn what_was_never_touched_gets_memory_and_that_has_to_be_there() {
        let tree = Tree::new();
        tree.finds(Id::MachineHoles, Level::Ok, "none");
        tree.finds(Id::HostMemory, Level::Ok, "4 GiB");
        let ram = memory(MemfdFlags::EXEC, 3 << 30, 1 << 20);
        tree.opens_memory(PID, 3, ram.as_raw_fd());
        // The same file again.
        tree.opens_memory(PID, 4, ram.as_raw_fd());
        tree.finds(Id::MachineHoles, Level::Ok, "2.9 GiB were never touched");
        tree.finds(
            Id::HostMemory,
            Level::Ok,
            "4 GiB, of which the machines' untouched pages will take 2.9 GiB",
        );
        tree.file("/proc/meminfo", "MemAvailable:    2097152 kB\n");
        tree.finds(Id::HostMemory, Level::Failure, "2 GiB, and to preserve");
        tree.remove("/proc/meminfo");
        tree.finds(Id::HostMemory, Level::Warning, "cannot be told");
        tree.remove(&format!("/proc/{PID}"));
        tree.finds(Id::MachineHoles, Level::Warning, "as root");
    }

    #[test]
    fn memory_that_is_sealed_against_execution_is_a_failure() {
        let tree = Tree::new();
        let ram = memory(MemfdFlags::EXEC, MIB, 0);
        tree.opens_memory(PID, 3, ram.as_raw_fd());
        tree.finds(Id::MachineSeals, Level::Ok, "not sealed");
        let sealed = memory(MemfdFlags::NOEXEC_SEAL, MIB, 0);
        tree.opens_memory(PID, 4, sealed.as_raw_fd());
        tree.finds(Id::MachineSeals, Level::Failure, "read-only for ever");
    }

    #[test]
    fn the_limits_of_a_cgroup_have_to_leave_room() {
        let tree = Tree::new();
        let find = |level, about: &str| tree.finds(Id::MachineCgroup, level, about);
        assert_eq!(tree.find(Id::MachineCgroup), None);
        tree.file(
            "/proc/self/mountinfo",
            "1 0 8:1 / / rw - ext4 /dev/vda rw\n2 1 0:3 / /sys/fs/c\\040g rw shared:1 - cgroup2 cgroup2 rw\n",
        );
        tree.file(&format!("/proc/{PID}/cgroup"), "1:name=systemd:/x\n0::/vms/web1\n");
        find(Level::Ok, "no limit");
        let ram = memory(MemfdFlags::EXEC, 100 * MIB, 0);
        tree.opens_memory(PID, 3, ram.as_raw_fd());
        tree.file("/sys/fs/c g/vms/web1/memory.max", "max\n");
        tree.file("/sys/fs/c g/vms/memory.max", (2_u64 << 30).to_string());
        tree.file("/sys/fs/c g/vms/memory.current", (1_u64 << 30).to_string());
        find(Level::Ok, "leave room");
        tree.file("/sys/fs/c g/vms/memory.current", ((2_u64 << 30) - 50 * MIB).to_string());
        find(Level::Failure, "/vms uses 1.9 GiB of at most 2 GiB, and to preserve the rest takes 100 MiB");
        tree.file("/sys/fs/c g/vms/memory.max", (1_u64 << 30).to_string());
        tree.file("/sys/fs/c g/vms/memory.current", MIB.to_string());
        find(Level::Failure, "come back after the kexec");
    }

    #[test]
    fn a_disk_has_to_be_there_by_its_path_after_the_kexec() {
        let mut tree = Tree::new();
        tree.status().devices =
            vec![device(DeviceKind::Disk, "/srv/vm 1.img"), device(DeviceKind::Serial, "")];
        let find = |tree: &Tree, level, about: &str| tree.finds(Id::MachineDisk, level, about);
        find(&tree, Level::Failure, "x0: /srv/vm 1.img is not there any more");
        tree.file("/srv/vm 1.img", "");
        find(&tree, Level::Ok, "opened again");
        let mounts = "1 0 8:1 / / rw - ext4 /dev/vda rw\n2 1 0:3 / /srv rw - xfs x rw\n";
        tree.file("/proc/self/mountinfo", mounts);
        find(&tree, Level::Ok, "opened again");
        // A later mount at the same place, and a link to there.
        tree.file("/proc/self/mountinfo", format!("{mounts}3 1 0:4 / /srv rw - tmpfs tmpfs rw\n"));
        find(&tree, Level::Warning, "lies on a tmpfs");
        tree.link("/link.img", tree.path("/srv/vm 1.img"));
        tree.status().devices = vec![device(DeviceKind::Disk, "/link.img")];
        find(&tree, Level::Warning, "lies on a tmpfs");
    }

    #[test]
    fn a_tap_has_to_be_made_again_and_consoles_attached() {
        let mut tree = Tree::new();
        assert_eq!(tree.find(Id::MachineConsoles), None);
        tree.status().devices = vec![device(DeviceKind::Net, "tap0")];
        tree.status().consoles = 2;
        tree.finds(Id::MachineTap, Level::Warning, "ip tuntap add tap0 mode tap");
        tree.finds(Id::MachineConsoles, Level::Ok, "attach them again");
    }
}
