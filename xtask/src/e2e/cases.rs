//! The cases. What each does stands in `e2e/host/src/cases`, under its name.

use std::fmt::Write as _;

/// A case, and what its host has.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// What it is about, and what it can be told.
    about: &'static str,
    pub(crate) memory_mib: u32,
    /// A second disk, with a file system, which outlives the host's kernels.
    pub(crate) disk: bool,
    /// It starts from a disk with systemd.
    pub(crate) systemd: bool,
    /// How long it may take, in seconds: several times what it takes where nothing else runs.
    pub(crate) timeout_s: u64,
    /// CI runs it.
    pub(crate) smoke: bool,
    pub(crate) ground: Ground,
    /// What its kernels are told besides.
    pub(crate) parameters: &'static str,
}

/// Which kernel a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ground {
    /// One with /dev/liveupdate, built for these cases.
    Built,
    /// One that Debian ships, with its modules.
    Stock,
}

impl Ground {
    pub(crate) const ALL: [Self; 2] = [Self::Built, Self::Stock];
}

/// Memory that the kernel is to leave alone, in the midst of what the host has: as a disk, and as a device. QEMU has something of its
/// own at the end of a host's memory, so it does not reach there.
const AS_DISK: &str = "memmap=512M!1G";
const AS_DEVICE: &str = "memmap=512M%0x40000000-1+0xefffffff";

/// With nested page tables the emulator now and then takes a page of another guest, or none, for one of the tables of the guest that it
/// enters, if several take turns on a processor: the guest ends with a triple fault, and its memory is whole. QEMU 7.2 does so
/// in every second run or so of eight guests; with shadow page tables it was not seen to.
const SHADOW_PAGES: &str = "kvm_amd.npt=0";

impl Case {
    const fn new(name: &'static str, about: &'static str, memory_mib: u32, timeout_s: u64) -> Self {
        let (disk, systemd, smoke) = (false, false, false);
        let (parameters, ground) = ("", Ground::Built);
        Self { name, about, memory_mib, disk, systemd, timeout_s, smoke, parameters, ground }
    }

    const fn with_disk(self) -> Self {
        Self { disk: true, ..self }
    }

    const fn with_systemd(self) -> Self {
        Self { systemd: true, ..self }
    }

    const fn on_stock(self) -> Self {
        Self { ground: Ground::Stock, ..self }
    }

    const fn told(self, parameters: &'static str) -> Self {
        Self { parameters, ..self }
    }

    const fn in_ci(self) -> Self {
        Self { smoke: true, ..self }
    }
}

pub(crate) const CASES: &[Case] = &[
    Case::new("agents", "agents of tideoverd, and a machine that it keeps, live through a kernel", 1024, 300),
    Case::new("check", "what check finds, before and after a kexec", 1024, 240),
    Case::new("demo", "the demo by both carriers (updates=2)", 1024, 120),
    Case::new("device", "what /dev/liveupdate answers", 768, 60).in_ci(),
    Case::new("fdstore", "systemd restarts, stops and loses a machine that is a unit", 1024, 600)
        .with_systemd(),
    Case::new("kexec", "a machine lives through two kernels", 1024, 240).in_ci(),
    Case::new("kexec-called-off", "a kexec that does not come about leaves nothing behind", 1024, 900),
    Case::new("kexec-eight", "eight machines at once", 1024, 600).told(SHADOW_PAGES),
    Case::new("kexec-gib", "a machine of 1 GiB through three kernels", 2560, 600),
    Case::new("kexec-kills", "holders and VMMs are killed at each step after a kexec", 1280, 900),
    Case::new("kexec-linux", "Linux as a guest, its disk, and the host's file system", 1024, 360)
        .with_disk()
        .in_ci(),
    Case::new("kexec-small-pages", "pages of 4 KiB, of which the guest has touched some", 1024, 300),
    Case::new("kexec-twenty", "a machine through twenty kernels", 1024, 1500),
    Case::new("kexec-systemd", "systemd shuts the host down before its kexec", 1024, 600).with_systemd(),
    Case::new("linux", "Linux is updated while it checks its memory and disk (updates=2)", 1024, 180)
        .with_disk(),
    Case::new("machine", "a machine is updated by both carriers", 1024, 120).in_ci(),
    Case::new("memfd", "a memory file lives through two kernels", 768, 180).in_ci(),
    Case::new("oom", "VMMs whose memory runs out: what tideoverd keeps of their machines", 1024, 300),
    Case::new(
        "path-devdax",
        "a machine that has a DAX device: kexec, death of its VMM, kernel gone",
        2048,
        420,
    )
    .with_disk()
    .on_stock()
    .told(AS_DEVICE),
    Case::new(
        "path-ext4",
        "machines in files on ext4 with DAX: kexec, death of a VMM, kernel gone",
        2048,
        480,
    )
    .with_disk()
    .on_stock()
    .told(AS_DISK),
    Case::new("path-twenty", "a machine in a file through twenty of Debian's kernels", 2048, 1500)
        .with_disk()
        .on_stock()
        .told(AS_DISK),
    Case::new("stock-devdax", "memory of a DAX device lives through two of Debian's kernels", 2048, 240)
        .on_stock()
        .told(AS_DEVICE),
    Case::new(
        "stock-ext4",
        "memory of a file on ext4 with DAX lives through two of Debian's kernels",
        2048,
        240,
    )
    .on_stock()
    .told(AS_DISK),
    Case::new("stock-machine", "a machine is updated by both carriers, on Debian's kernel", 1024, 180)
        .on_stock(),
    Case::new("tideoverd-systemd", "tideoverd as a service of systemd, and what outlives it", 1024, 420)
        .with_systemd(),
];

/// The cases as a table.
pub(crate) fn list() -> String {
    let head = ["case", "memory", "at most", "smoke", "kernel"];
    let mut shown =
        format!("{:<18} {:>8} {:>8}  {:<6} {:<6} what\n", head[0], head[1], head[2], head[3], head[4]);
    for case in CASES {
        let (memory, time) = (format!("{} MiB", case.memory_mib), format!("{} s", case.timeout_s));
        let smoke = if case.smoke { "yes" } else { "" };
        let kernel = if case.ground == Ground::Stock { "stock" } else { "built" };
        // A string takes whatever is written to it.
        let _ =
            writeln!(shown, "{:<18} {memory:>8} {time:>8}  {smoke:<6} {kernel:<6} {}", case.name, case.about);
    }
    shown
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own_and_a_line_in_the_list() {
        let names: BTreeSet<&str> = CASES.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), CASES.len());
        assert_eq!(list().lines().count(), CASES.len() + 1);
        assert!(names.iter().all(|name| list().contains(name)));
    }
}
