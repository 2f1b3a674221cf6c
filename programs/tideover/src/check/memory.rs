//! The host's memory: what memfds may be made, how much is free.

use super::Sight;
use super::finding::Finding;
use super::finding::Id;
use super::host::Host;

pub(super) fn findings(sight: &Sight<'_>) -> Vec<Finding> {
    vec![memfd_noexec(sight)]
}

/// Memory that processes can still get, in bytes.
pub(super) fn available_bytes(host: &Host) -> Option<u64> {
    let text = host.text("/proc/meminfo")?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    kib.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn memfd_noexec(sight: &Sight<'_>) -> Finding {
    let id = Id::MemfdNoexec;
    match sight.host.number("/proc/sys/vm/memfd_noexec") {
        None => id.ok("the kernel has no such setting"),
        Some(0) => id.ok("0: no memfd is refused"),
        Some(1) => id.ok("1: does not touch Tideover's memory, which is made with MFD_EXEC").note(
            "other programs' memfds are sealed against execution, and come back from a kexec read-only for ever",
        ),
        Some(mode) => id.failure(
            format!("{mode}: memory that is not sealed against execution is refused, and sealed so it would come back read-only for ever"),
            "sysctl vm.memfd_noexec=1",
        ),
    }
}

/// A size for people.
pub(crate) fn amount(bytes: u64) -> String {
    let (unit, name) = match bytes {
        0..1_048_576 => (1 << 10, "KiB"),
        1_048_576..1_073_741_824 => (1 << 20, "MiB"),
        _ => (1 << 30, "GiB"),
    };
    match (bytes / unit, bytes % unit * 10 / unit) {
        (whole, 0) => format!("{whole} {name}"),
        (whole, tenth) => format!("{whole}.{tenth} {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::super::tree::Tree;
    use super::*;

    #[test]
    fn a_host_that_makes_only_sealed_memory_is_a_failure() {
        let tree = Tree::new();
        let setting = "/proc/sys/vm/memfd_noexec";
        tree.finds(Id::MemfdNoexec, Level::Ok, "0: ");
        tree.file(setting, "1\n");
        tree.finds(Id::MemfdNoexec, Level::Ok, "other programs'");
        tree.file(setting, "2\n");
        tree.finds(Id::MemfdNoexec, Level::Failure, "sysctl vm.memfd_noexec=1");
        tree.remove(setting);
        tree.finds(Id::MemfdNoexec, Level::Ok, "no such setting");
    }

    #[test]
    fn sizes_are_shown_in_their_unit() {
        let shown =
            [0, 512, 4096, 1_048_576, 1_572_864, 13 << 20, (1 << 30) - 1, 1 << 30, 3 << 29].map(amount);
        let wanted =
            ["0 KiB", "0.5 KiB", "4 KiB", "1 MiB", "1.5 MiB", "13 MiB", "1023.9 MiB", "1 GiB", "1.5 GiB"];
        assert_eq!(shown, wanted);
    }
}
