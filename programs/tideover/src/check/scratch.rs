//! Scratch memory: what the next kernel boots in, set aside when the host was booted cold.

use super::Sight;
use super::finding::Finding;
use super::finding::Id;
use super::host::Host;
use super::kernel::CommandLine;
use super::kernel::Log;
use super::memory::amount;

const DEBUG: &str = "/sys/kernel/debug";
const LENGTHS: &str = "/sys/kernel/debug/kho/out/scratch_len";
/// What the kernel says of it when it sets it aside.
const SAID: &str = "KHO: scratch areas: ";

/// What is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Scratch {
    /// The areas' sizes, in bytes.
    Areas {
        bytes: Vec<u64>,
        /// Where that is said.
        source: &'static str,
    },
    /// The kernel could not set it aside, and says so.
    Refused(String),
    /// Handover is off.
    Off,
    /// It cannot be told.
    Unknown,
}

impl Scratch {
    /// `can`: the kernel is one that can hand over.
    pub(super) fn of_host(host: &Host, told: &CommandLine, log: &Log, can: bool) -> Self {
        if !can {
            return Self::Off;
        }
        if let Some(bytes) = host.text(LENGTHS).and_then(|text| lengths(&text)) {
            return Self::Areas { bytes, source: LENGTHS };
        }
        if let Some(line) = log.find("KHO: Failed to reserve") {
            return Self::Refused(line.escape_debug().to_string());
        }
        let nodes = nodes(host);
        if let Some(bytes) = log.find(SAID).and_then(|line| logged(&line[SAID.len()..], nodes)) {
            return Self::Areas { bytes, source: "the kernel's log" };
        }
        // There is something of others, so it is mounted, and this is not in it.
        if host.exists(&format!("{DEBUG}/clear_warn_once")) && !host.exists(&format!("{DEBUG}/kho")) {
            return Self::Off;
        }
        // A kernel that was itself booted by such a kexec keeps the areas that it was given.
        let inherited =
            host.exists(&format!("{DEBUG}/kho/in")) || log.find("KHO: found kexec handover data").is_some();
        match told.value("kho_scratch").filter(|_| !inherited).and_then(|text| given(text, nodes)) {
            Some(bytes) => Self::Areas { bytes, source: "kho_scratch= on the kernel's command line" },
            None => Self::Unknown,
        }
    }

    /// The areas' sizes, if they are known.
    pub(super) fn areas(&self) -> Option<&[u64]> {
        match self {
            Self::Areas { bytes, .. } => Some(bytes),
            _ => None,
        }
    }
}

/// NUMA nodes of the host.
fn nodes(host: &Host) -> usize {
    let is_node = |name: &str| name.strip_prefix("node").is_some_and(|number| number.parse::<u32>().is_ok());
    let entries = std::fs::read_dir(host.path("/sys/devices/system/node")).into_iter().flatten();
    let nodes = entries
        .filter(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name().to_str().is_some_and(is_node)));
    nodes.count().max(1)
}

/// A size in hexadecimal on each line.
fn lengths(text: &str) -> Option<Vec<u64>> {
    let sizes = text.lines().map(|line| u64::from_str_radix(line.trim().strip_prefix("0x")?, 16).ok());
    sizes.collect::<Option<Vec<_>>>().filter(|sizes| !sizes.is_empty())
}

/// `lowmem: 32MiB global: 96MiB pernode: 32MiB`.
fn logged(text: &str, nodes: usize) -> Option<Vec<u64>> {
    let words: Vec<_> = text.split_whitespace().take(6).collect();
    let [_, low, _, global, _, node] = words[..] else { return None };
    let mib = |word: &str| word.strip_suffix("MiB")?.parse::<u64>().ok()?.checked_mul(1 << 20);
    Some([mib(low)?, mib(global)?].into_iter().chain(vec![mib(node)?; nodes]).collect())
}

/// `32M,96M,32M`: what the kernel was told, of which it makes whole 4 MiB.
fn given(text: &str, nodes: usize) -> Option<Vec<u64>> {
    let sizes = text.split(',').map(memparse).collect::<Option<Vec<_>>>()?;
    let [low, global, node] = sizes[..] else { return None };
    let whole = |bytes: u64| bytes.checked_next_multiple_of(4 << 20);
    Some([whole(low)?, whole(global)?].into_iter().chain(vec![whole(node)?; nodes]).collect())
}

/// A size as the kernel reads it.
fn memparse(text: &str) -> Option<u64> {
    let end = text.find(|letter: char| !letter.is_ascii_alphanumeric()).unwrap_or(text.len());
    let (number, shift) = match text[..end].char_indices().next_back()? {
        (at, 'K' | 'k') => (&text[..at], 10),
        (at, 'M' | 'm') => (&text[..at], 20),
        (at, 'G' | 'g') => (&text[..at], 30),
        _ => (&text[..end], 0),
    };
    let number = match number.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => number.parse(),
    };
    number.ok()?.checked_mul(1 << shift)
}

pub(super) fn findings(sight: &Sight<'_>) -> Vec<Finding> {
    let id = Id::ScratchMemory;
    let finding = match &sight.scratch {
        Scratch::Areas { bytes, source } => {
            let sizes = bytes.iter().map(|bytes| amount(*bytes)).collect::<Vec<_>>().join(", ");
            id.ok(format!("{sizes} ({source})"))
        }
        Scratch::Refused(line) => id.failure(
            format!("the kernel could not set it aside at boot, and turned handover off ({line})"),
            "boot with kho_scratch=64M,256M,64M, or what the host has room for (low memory, all memory, each NUMA node)",
        ),
        Scratch::Off if !sight.device.is_there() => {
            id.failure(
                "there is none: the kernel hands nothing over",
                "boot a kernel that does, built with CONFIG_KEXEC_HANDOVER, and with kho=on",
            )
        }
        // A kernel without CONFIG_KEXEC_HANDOVER_DEBUGFS.
        Scratch::Off | Scratch::Unknown => id.warning(
            "its sizes cannot be seen, so whether the next kernel fits in cannot be told",
            format!("as root, mount -t debugfs none {DEBUG} (a kernel with CONFIG_KEXEC_HANDOVER_DEBUGFS shows them there)"),
        ),
    };
    vec![finding]
}

#[cfg(test)]
mod tests {
    use ::liveupdate::OpenError;

    use super::super::Level;
    use super::super::device::Device;
    use super::super::tree::Tree;
    use super::*;

    const MIB: u64 = 1 << 20;

    #[track_caller]
    fn finds(tree: &Tree, level: Level, about: &str) {
        tree.finds(Id::ScratchMemory, level, about);
    }

    #[test]
    fn sizes_come_from_the_kernel_its_log_or_its_command_line() {
        let tree = Tree::new();
        finds(&tree, Level::Ok, "64 MiB, 256 MiB, 64 MiB (/sys/kernel/debug/kho/out/scratch_len)");
        tree.remove("/sys/kernel/debug");
        finds(&tree, Level::Ok, "64 MiB, 256 MiB, 64 MiB (kho_scratch= on the");
        tree.file("/dev/kmsg", "5,13,0,-;KHO: scratch areas: lowmem: 32MiB global: 96MiB pernode: 8MiB\n");
        tree.file("/sys/devices/system/node/node0/x", "");
        tree.file("/sys/devices/system/node/node1/x", "");
        tree.file("/sys/devices/system/node/possible", "");
        finds(&tree, Level::Ok, "32 MiB, 96 MiB, 8 MiB, 8 MiB (the kernel's log)");
    }

    #[test]
    fn sizes_that_cannot_be_seen_are_a_warning() {
        let tree = Tree::new();
        tree.remove("/sys/kernel/debug");
        tree.file("/proc/cmdline", "liveupdate=on kho_scratch=200%");
        finds(&tree, Level::Warning, "mount -t debugfs");
        // One that a kexec has booted ignores what it is told.
        tree.file("/proc/cmdline", "liveupdate=on kho_scratch=1M,1M,1M");
        tree.file("/dev/kmsg", "6,1,0,-;KHO: found kexec handover data.\n");
        finds(&tree, Level::Warning, "mount -t debugfs");
        // The device is there, so the kernel hands over, and does not show it.
        tree.file("/sys/kernel/debug/clear_warn_once", "");
        finds(&tree, Level::Warning, "CONFIG_KEXEC_HANDOVER_DEBUGFS");
    }

    #[test]
    fn scratch_memory_that_was_not_to_be_had_is_a_failure() {
        let mut tree = Tree::new();
        tree.answers.device = || Device::Refused(OpenError::Absent);
        tree.remove("/sys/kernel/debug/kho");
        finds(&tree, Level::Failure, "hands nothing over");
        tree.file("/dev/kmsg", "3,8,9,-;KHO: Failed to reserve nid 1 scratch buffer\n");
        finds(&tree, Level::Failure, "nid 1");
        tree.file("/boot/config-7.3.4", "# CONFIG_KEXEC_HANDOVER is not set\n");
        finds(&tree, Level::Failure, "CONFIG_KEXEC_HANDOVER,");
    }

    #[test]
    fn sizes_are_read_as_the_kernel_writes_and_reads_them() {
        assert_eq!(lengths("0x2000000\n0x6000000\n"), Some(vec![32 * MIB, 96 * MIB]));
        assert_eq!([lengths(""), lengths("12"), lengths("0x1\n?")], [None, None, None]);
        assert_eq!(given("32M,1G,0x10k", 2), Some(vec![32 * MIB, 1024 * MIB, 4 * MIB, 4 * MIB]));
        assert_eq!(
            ["200%", "1M,2M", "", "1M,2M,x", "1M,2M,99999999999G"].map(|text| given(text, 1)),
            [const { None }; 5]
        );
        assert_eq!(logged("lowmem: 1MiB global: 2MiB pernode: -3MiB", 1), None);
        assert_eq!(logged("lowmem: 1MiB", 1), None);
    }
}
