//! What a machine is to be made of.

use std::path::PathBuf;

use serde::Deserialize;
use serde::Serialize;

use super::Confine;

/// Which guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestKind {
    /// A VM of KVM.
    Kvm,
    /// Threads of the VMM, one for each vCPU.
    Thread,
}

/// Which pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pages {
    /// 2 MiB where they can be had, for the whole pages of the memory.
    Huge,
    /// 4 KiB.
    Small,
    /// 1 GiB, from the host's pool.
    Giant,
}

/// What guest memory comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Store {
    /// A memfd.
    Memfd,
    /// A guest_memfd, which the machine's first VM makes.
    GuestMemfd,
    /// Huge pages from the host's pool.
    Hugetlb,
    /// A file or a device at [`MachineSpec::path`], which all of the machine lies in.
    Path,
}

/// What to do when the guest ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    /// The machine ends.
    Stop,
    /// The guest starts again from the beginning, in memory that is zero.
    Restart,
    /// The machine stays as it is, with its guest standing still.
    Keep,
}

/// A disk that a machine is to have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Its file or block device.
    pub path: PathBuf,
    /// The guest may only read it.
    pub read_only: bool,
}

/// A Linux kernel that a machine starts with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinuxSpec {
    /// Its image, a bzImage.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The command line. What names the machine's disks and network cards is added.
    pub command_line: String,
}

/// What machine to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Its name.
    pub name: String,
    /// Guest memory, in bytes: a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// The pages to ask for.
    pub pages: Pages,
    /// What the memory comes from.
    pub store: Store,
    /// Where the machine lies, if it is to be found by its path.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Which NUMA nodes it comes from: `bind:`, `interleave:` or `preferred:` and a list as `0,2-3`; from where the
    /// guest touches it, if there is none.
    pub numa: Option<String>,
    /// Give all pages memory before the guest runs.
    pub prefault: bool,
    /// The guest.
    pub guest: GuestKind,
    /// How many vCPUs the guest has.
    #[serde(default = "one")]
    pub vcpus: u32,
    /// Where it is controlled, in a private directory. Without, the machine ends when nobody is connected any more.
    pub socket: Option<PathBuf>,
    /// When the guest switches itself off.
    pub on_power_off: Then,
    /// When the guest asks for a reset.
    pub on_reset: Then,
    /// When the guest does what no guest may do, as a triple fault.
    pub on_crash: Then,
    /// Its disks. A guest that is a thread has none.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// The network interfaces at the other ends of its network cards. A guest that is a thread has none.
    #[serde(default)]
    pub taps: Vec<String>,
    /// What it starts with; the reference guest, pulse, if there is none.
    #[serde(default)]
    pub linux: Option<LinuxSpec>,
    /// What becomes of its VMM at a system call that it has no need of while the guest runs.
    #[serde(default)]
    pub confine: Confine,
    /// It is to go with the host through a kexec.
    #[serde(default)]
    pub through_kexec: bool,
    /// When its VMM is ended for want of memory, and somebody keeps the machine.
    #[serde(default)]
    pub on_oom: OnOom,
}

const fn one() -> u32 {
    1
}

impl MachineSpec {
    /// A machine of one vCPU and `memory_bytes` bytes without a control socket, as small as that can be said.
    pub fn new(name: &str, memory_bytes: u64, guest: GuestKind) -> Self {
        Self {
            name: name.to_owned(),
            memory_bytes,
            pages: Pages::Small,
            store: Store::Memfd,
            path: None,
            numa: None,
            prefault: true,
            guest,
            vcpus: 1,
            socket: None,
            on_power_off: Then::Stop,
            on_reset: Then::Restart,
            on_crash: Then::Stop,
            disks: Vec::new(),
            taps: Vec::new(),
            linux: None,
            confine: Confine::No,
            through_kexec: false,
            on_oom: OnOom::Keep,
        }
    }
}

/// What is to become of a machine's memory when its VMM is ended because the host's memory, or its cgroup's, ran out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnOom {
    /// It is kept, as after any other death.
    #[default]
    Keep,
    /// It is given back.
    Drop,
}
