//! What a machine may lack, and how to tell without a system call of our own: by opening what the
//! test will open, by reading what the kernel says under `/proc` and `/sys`, and by asking KVM.

use std::fmt;
use std::fs::{File, OpenOptions, read_to_string};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kvm_ioctls::Kvm;

use crate::hugetlb::Pages;

/// Huge pages that a test which needs them has at least.
const HUGE_PAGES: u64 = 16;
/// The same of 1 GiB.
const GIANT_PAGES: u64 = 1;

/// Something that a test needs of the machine and cannot make for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// `/dev/kvm`, open for reading and writing.
    Kvm,
    /// A userfaultfd that also sees the kernel's own faults, as KVM's are.
    Userfaultfd,
    /// Page frame numbers in `/proc/self/pagemap`, which the kernel shows as zero to those without
    /// `CAP_SYS_ADMIN`.
    Pagemap,
    /// 16 free huge pages of 2 MiB: set aside for the test if this user may, and given back after it.
    Hugetlb,
    /// A free huge page of 1 GiB, likewise.
    Hugetlb1g,
    /// A KVM whose guest_memfd can be mapped and touched.
    GuestMemfd,
    /// `/dev/net/tun`, and `CAP_NET_ADMIN` to make an interface.
    Tap,
}

impl Need {
    /// Every need.
    pub const ALL: [Self; 7] = [
        Self::Kvm,
        Self::Userfaultfd,
        Self::Pagemap,
        Self::Hugetlb,
        Self::Hugetlb1g,
        Self::GuestMemfd,
        Self::Tap,
    ];

    /// The name by which [`need!`](crate::need) and the environment know it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Userfaultfd => "userfaultfd",
            Self::Pagemap => "pagemap",
            Self::Hugetlb => "hugetlb",
            Self::Hugetlb1g => "hugetlb_1g",
            Self::GuestMemfd => "guest_memfd",
            Self::Tap => "tap",
        }
    }

    /// The need of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|need| need.name() == name)
    }

    /// Looks whether this machine, for this user, meets the need, and sets aside what the test then has
    /// until what is returned is dropped.
    ///
    /// # Errors
    ///
    /// The reason why not, as one line for people.
    pub fn meet(self) -> Result<Met, String> {
        let pages = match self {
            Self::Kvm => open(Path::new("/dev/kvm")).map(|()| None),
            Self::Userfaultfd => userfaultfd(Path::new("/")).map(|()| None),
            Self::Pagemap => pagemap().map(|()| None),
            Self::Hugetlb => hugetlb(Path::new("/"), "2048kB", HUGE_PAGES),
            Self::Hugetlb1g => hugetlb(Path::new("/"), "1048576kB", GIANT_PAGES),
            Self::GuestMemfd => guest_memfd().map(|()| None),
            Self::Tap => tap(Path::new("/")).map(|()| None),
        };
        Ok(Met { _pages: pages? })
    }
}

/// A need that is met for as long as this lives.
#[derive(Debug)]
pub struct Met {
    _pages: Option<Pages>,
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn open(path: &Path) -> Result<(), String> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map(drop)
        .map_err(|error| format!("{} cannot be opened: {error}", path.display()))
}

fn read(path: &Path) -> Result<String, String> {
    read_to_string(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))
}

/// Follows the kernel's rule: whoever can open the device may make one; the system call wants
/// either the host-wide setting or `CAP_SYS_PTRACE` in the first user namespace.
fn userfaultfd(root: &Path) -> Result<(), String> {
    const CAP_SYS_PTRACE: u32 = 19;

    let Err(device) = open(&root.join("dev/userfaultfd")) else {
        return Ok(());
    };
    let setting = root.join("proc/sys/vm/unprivileged_userfaultfd");
    if read(&setting)?.trim() == "1" {
        return Ok(());
    }
    let effective = capabilities(root)?;
    let first_namespace =
        read(&root.join("proc/self/uid_map"))?.split_whitespace().eq(["0", "0", "4294967295"]);
    if first_namespace && effective & (1 << CAP_SYS_PTRACE) != 0 {
        return Ok(());
    }
    Err(format!("{device}; and without CAP_SYS_PTRACE the system call wants vm.unprivileged_userfaultfd=1"))
}

/// What this process may do, a bit for each capability.
fn capabilities(root: &Path) -> Result<u64, String> {
    let status = read(&root.join("proc/self/status"))?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .ok_or_else(|| "/proc/self/status says no CapEff".to_owned())
}

fn tap(root: &Path) -> Result<(), String> {
    const CAP_NET_ADMIN: u32 = 12;

    open(&root.join("dev/net/tun"))?;
    if capabilities(root)? & (1 << CAP_NET_ADMIN) != 0 {
        return Ok(());
    }
    Err("CAP_NET_ADMIN is missing".to_owned())
}

/// Looks up a page of our own that is certainly present.
fn pagemap() -> Result<(), String> {
    const FRAME: usize = 4096;
    const PRESENT: u64 = 1 << 63;
    const PFN: u64 = (1 << 55) - 1;

    // Larger than a page and written to, so that the middle of it is present whatever its
    // alignment.
    let memory = black_box(vec![1u8; 4 * FRAME]);
    let address = memory.as_ptr().addr() + 2 * FRAME;
    let offset = u64::try_from(address / FRAME * 8).map_err(|error| error.to_string())?;

    let path = Path::new("/proc/self/pagemap");
    let mut entry = [0; 8];
    File::open(path)
        .and_then(|file| file.read_exact_at(&mut entry, offset))
        .map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    black_box(&memory);

    #[expect(clippy::host_endian_bytes, reason = "the kernel gives the entries in the host's byte order")]
    let entry = u64::from_ne_bytes(entry);
    if entry & PRESENT == 0 {
        return Err(format!("{} takes a page in use for absent: {entry:#018x}", path.display()));
    }
    if entry & PFN == 0 {
        return Err(format!("{} hides page frame numbers: CAP_SYS_ADMIN is missing", path.display()));
    }
    Ok(())
}

fn hugetlb(root: &Path, size: &str, count: u64) -> Result<Option<Pages>, String> {
    let folder = root.join("sys/kernel/mm/hugepages").join(format!("hugepages-{size}"));
    if !folder.exists() {
        return Err(format!("this kernel has no huge pages of {size}"));
    }
    Pages::set_aside(&folder, count)
}

fn guest_memfd() -> Result<(), String> {
    const KVM_CAP_GUEST_MEMFD: u64 = 234;
    const KVM_CAP_GUEST_MEMFD_FLAGS: u64 = 244;
    const MMAP_AND_INIT_SHARED: i32 = 3;

    let vm = Kvm::new().and_then(|kvm| kvm.create_vm());
    let vm = vm.map_err(|error| format!("KVM makes no VM: {error}"))?;
    let flags = vm.check_extension_raw(KVM_CAP_GUEST_MEMFD_FLAGS);
    if vm.check_extension_raw(KVM_CAP_GUEST_MEMFD) <= 0
        || flags & MMAP_AND_INIT_SHARED != MMAP_AND_INIT_SHARED
    {
        return Err(format!("this KVM has no guest_memfd that can be mapped and touched (flags {flags:#x})"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir_all, remove_dir_all, write};
    use std::path::PathBuf;

    use super::*;

    /// A made-up `/` under the folder for temporary files, removed when dropped.
    struct Root(PathBuf);

    impl Root {
        fn with(test: &str, files: &[(&str, &str)]) -> Self {
            let root =
                Self(std::env::temp_dir().join(format!("tideover-harness-{}-{test}", std::process::id())));
            for (path, text) in files {
                let path = root.0.join(path);
                create_dir_all(path.parent().unwrap()).unwrap();
                write(path, text).unwrap();
            }
            root
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = remove_dir_all(&self.0);
        }
    }

    const SETTING: &str = "proc/sys/vm/unprivileged_userfaultfd";
    const STATUS: &str = "proc/self/status";
    const UID_MAP: &str = "proc/self/uid_map";
    const HUGE: &str = "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    const FIRST: &str = "         0          0 4294967295\n";
    const WITH_PTRACE: &str = "Name:\tx\nCapEff:\t0000000000080000\n";
    const WITHOUT_PTRACE: &str = "Name:\tx\nCapEff:\tfffffffffff7ffff\n";

    #[test]
    fn every_need_is_found_by_its_name() {
        for need in Need::ALL {
            assert_eq!(Need::named(need.name()), Some(need));
        }
        assert_eq!(Need::named("Kvm"), None);
        assert_eq!(Need::named(""), None);
    }

    #[test]
    fn a_device_that_is_not_there_is_named_in_the_reason() {
        let reason = open(Path::new("/dev/no such device")).unwrap_err();
        assert!(reason.starts_with("/dev/no such device cannot be opened: "), "{reason}");
    }

    #[test]
    fn userfaultfd_is_met_by_the_device_alone() {
        let root = Root::with("device", &[("dev/userfaultfd", "")]);
        assert_eq!(userfaultfd(&root.0), Ok(()));
    }

    #[test]
    fn userfaultfd_is_met_by_the_host_wide_setting() {
        let root = Root::with("setting", &[(SETTING, "1\n")]);
        assert_eq!(userfaultfd(&root.0), Ok(()));
    }

    #[test]
    fn userfaultfd_is_met_by_the_capability_in_the_first_namespace_only() {
        let files = [(SETTING, "0\n"), (STATUS, WITH_PTRACE), (UID_MAP, FIRST)];
        let root = Root::with("capability", &files);
        assert_eq!(userfaultfd(&root.0), Ok(()));

        let files = [(SETTING, "0\n"), (STATUS, WITH_PTRACE), (UID_MAP, "0 1000 1\n")];
        let root = Root::with("namespace", &files);
        assert!(userfaultfd(&root.0).is_err());

        let files = [(SETTING, "0\n"), (STATUS, WITHOUT_PTRACE), (UID_MAP, FIRST)];
        let root = Root::with("no-capability", &files);
        assert!(userfaultfd(&root.0).unwrap_err().contains("CAP_SYS_PTRACE"));
    }

    #[test]
    fn userfaultfd_is_not_met_by_a_kernel_without_it() {
        let root = Root::with("kernel", &[(STATUS, WITH_PTRACE), (UID_MAP, FIRST)]);
        assert!(userfaultfd(&root.0).unwrap_err().contains(SETTING));
    }

    #[test]
    fn tap_wants_the_device_and_the_capability() {
        let device = ("dev/net/tun", "");
        let with = "CapEff:\t0000000000001000\n";
        assert_eq!(tap(&Root::with("tap", &[device, (STATUS, with)]).0), Ok(()));
        assert!(tap(&Root::with("tap-none", &[(STATUS, with)]).0).unwrap_err().contains("dev/net/tun"));
        let without = tap(&Root::with("tap-user", &[device, (STATUS, WITH_PTRACE)]).0);
        assert!(without.unwrap_err().contains("CAP_NET_ADMIN"));
    }

    #[test]
    fn hugetlb_wants_as_many_pages_as_a_test_has() {
        let root = Root::with("huge", &[(HUGE, "16\n")]);
        assert!(hugetlb(&root.0, "2048kB", HUGE_PAGES).unwrap().is_none());
        let root = Root::with("huge-used", &[(HUGE, "15\n")]);
        assert!(hugetlb(&root.0, "2048kB", HUGE_PAGES).unwrap_err().contains("15 free huge pages of 16"));
        assert!(hugetlb(&root.0, "1048576kB", 1).unwrap_err().contains("no huge pages of 1048576kB"));
    }
}
