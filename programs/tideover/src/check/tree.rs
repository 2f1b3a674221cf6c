//! A made-up host: files below a folder of its own, and answers to what only calls tell.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use ::liveupdate::kexec::LoadError;
use ::vmm::control::Confine;
use ::vmm::control::DeviceKind;
use ::vmm::control::DeviceStatus;
use ::vmm::control::GuestKind;
use ::vmm::control::GuestState;
use ::vmm::control::Status;
use ::vmm::control::Store;
use anyhow::bail;

use super::Finding;
use super::Host;
use super::Level;
use super::Subject;
use super::device::Device;
use super::device::Kept;
use super::device::Kinds;
use super::finding::Id;
use super::host::Calls;
use crate::machines;

/// The VMM of [`Tree::machine`].
pub(super) const PID: u32 = 77;
const CONFIG: &str = "\
CONFIG_KEXEC_FILE=y
CONFIG_KEXEC_HANDOVER=y
CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y
CONFIG_LIVEUPDATE=y
CONFIG_LIVEUPDATE_MEMFD=y
CONFIG_MEMFD_CREATE=y
CONFIG_KVM=m
";

/// What the calls answer.
#[derive(Clone)]
pub(super) struct Answers {
    pub(super) device: fn() -> Device,
    pub(super) file_load: fn() -> Result<(), LoadError>,
    pub(super) machines: Vec<Status>,
    /// Why the machines cannot be listed.
    pub(super) unlisted: bool,
}

impl Calls for Answers {
    fn device(&self) -> Device {
        (self.device)()
    }

    fn file_load(&self) -> Result<(), LoadError> {
        (self.file_load)()
    }

    fn machines(&self) -> anyhow::Result<Vec<String>> {
        if self.unlisted {
            bail!("cannot read the folder");
        }
        Ok(self.machines.iter().map(|status| status.name.clone()).collect())
    }

    fn status(&self, machine: &str) -> anyhow::Result<Status> {
        match self.machines.iter().find(|status| status.name == machine) {
            Some(status) if status.pid == 0 => bail!("no answer in time"),
            // As one that is dead.
            Some(status) if status.pid == 1 => {
                Err(machines::connect("a-name-that-no-machine-has").unwrap_err())
            }
            Some(status) => Ok(status.clone()),
            None => Err(machines::connect("a-name-that-no-machine-has").unwrap_err()),
        }
    }
}

/// What a kernel of 7.3 preserves.
pub(super) fn kinds() -> Kinds {
    Kinds {
        memfd: Kept::Yes,
        hugetlb: Kept::Unsupported,
        vm: Kept::Unsupported,
        guest_memfd: Kept::Unsupported,
    }
}

/// The host. Its files go with it.
pub(super) struct Tree {
    root: PathBuf,
    pub(super) answers: Answers,
    pub(super) subject: Subject,
}

impl Tree {
    /// A host that is as it should be: Linux 7.3, one machine, all that can be seen to be seen.
    pub(super) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("tideover-check-{}-{number}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        let device = || Device::Open(Box::new(kinds()));
        let answers = Answers { device, file_load: || Ok(()), machines: Vec::new(), unlisted: false };
        let mut tree = Self { root, answers, subject: Subject::default() };
        tree.fill();
        tree.answers.machines.push(tree.machine("web1"));
        tree
    }

    fn fill(&self) {
        let files = [
            ("/proc/sys/kernel/osrelease", "7.3.4\n"),
            ("/proc/sys/kernel/version", "#1 SMP Fri\n"),
            ("/proc/cmdline", "console=ttyS0 kho_scratch=64M,256M,64M liveupdate=on\n"),
            ("/boot/config-7.3.4", CONFIG),
            ("/sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n"),
            ("/sys/kernel/debug/clear_warn_once", ""),
            ("/sys/kernel/debug/kho/out/scratch_len", "0x4000000\n0x10000000\n0x4000000\n"),
            ("/sys/kernel/debug/kho/out/fdt", "\0\0compatible\0kho-v4\0\0"),
            ("/sys/kernel/debug/kho/out/sub_fdts/LUO", "luo-v5\0\0\u{1}\0\0\0"),
            ("/sys/kernel/kexec_loaded", "0\n"),
            ("/sys/kernel/security/lockdown", "[none] integrity confidentiality\n"),
            (
                "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
                "always within_size advise [never] deny force\n",
            ),
            ("/proc/sys/kernel/kexec_load_disabled", "0\n"),
            ("/proc/sys/kernel/kexec_load_limit_reboot", "-1\n"),
            ("/proc/sys/vm/memfd_noexec", "0\n"),
            ("/proc/meminfo", "MemTotal:  8000000 kB\nMemAvailable:    4194304 kB\n"),
            ("/proc/self/status", "Name:\tx\nCapEff:\t000001ffffffffff\n"),
            ("/proc/self/mountinfo", "1 0 8:1 / / rw - ext4 /dev/vda rw\n"),
            (&format!("/proc/{PID}/comm"), "tideover\n"),
            (&format!("/proc/{PID}/fd/0"), ""),
        ];
        files.into_iter().for_each(|(path, text)| self.file(path, text));
    }

    /// Where a file of the host is.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    pub(super) fn file(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    pub(super) fn remove(&self, path: &str) {
        let path = self.path(path);
        let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        removed.unwrap();
    }

    /// A link that leads to this, which need not be there.
    pub(super) fn link(&self, path: &str, to: impl AsRef<Path>) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(to, path).unwrap();
    }

    /// Has a process have this open.
    pub(super) fn opens(&self, pid: u32, fd: u32, what: impl AsRef<Path>) {
        self.link(&format!("/proc/{pid}/fd/{fd}"), what);
    }

    /// Has a process have a memory file open that this one has open by this number.
    pub(super) fn opens_memory(&self, pid: u32, fd: u32, own: i32) {
        let memory = self.path("/memfd:ram");
        if !memory.is_symlink() {
            symlink("/proc/self/fd", &memory).unwrap();
        }
        self.opens(pid, fd, memory.join(own.to_string()));
    }

    /// How a machine is whose memory is all there, in huge pages.
    pub(super) fn machine(&self, name: &str) -> Status {
        Status {
            path: None,
            name: name.to_owned(),
            pid: PID,
            state: GuestState::Running,
            updates: 0,
            kexecs: 0,
            age_ms: 1000,
            identity: "0".repeat(32),
            guest: GuestKind::Kvm,
            vcpus: 2,
            memory_bytes: 1 << 30,
            store: Store::Memfd,
            page_size: 2 << 20,
            huge_bytes: 1 << 30,
            huge_refused: None,
            ticks: None,
            passes: None,
            errors: None,
            failure: None,
            devices: Vec::new(),
            consoles: 0,
            confined: Confine::No,
            epoch: Some(1),
            frozen: false,
            last_pause_us: None,
            stored: false,
            through_kexec: true,
            kept: false,
            recoveries: 0,
        }
    }

    /// The machine of the tree.
    pub(super) fn status(&mut self) -> &mut Status {
        &mut self.answers.machines[0]
    }

    /// The next kernel.
    pub(super) fn next(&mut self, image: &[u8]) {
        self.file("/next", image);
        self.subject.kernel = Some(self.path("/next"));
    }

    pub(super) fn host(&self) -> Host {
        Host::made(&self.root, Box::new(self.answers.clone()))
    }

    pub(super) fn run(&self) -> Vec<Finding> {
        super::run(&self.host(), &self.subject)
    }

    /// The finding, of which there is to be one at most.
    pub(super) fn find(&self, id: Id) -> Option<Finding> {
        let mut found = self.run().into_iter().filter(|finding| finding.id == id);
        let one = found.next();
        assert_eq!(found.next(), None);
        one
    }

    /// Checks that one finding is at this level, and speaks of this.
    #[track_caller]
    pub(super) fn finds(&self, id: Id, level: Level, about: &str) {
        let finding = self.find(id).unwrap_or_else(|| panic!("no {id:?}"));
        let said = format!("{} -> {}", finding.found, finding.advice.clone().unwrap_or_default());
        assert_eq!(finding.level, level, "{said}");
        assert!(said.contains(about), "{said}");
        assert!(level == Level::Ok || finding.advice.is_some_and(|advice| !advice.is_empty()), "{said}");
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

pub(super) fn device(kind: DeviceKind, backend: &str) -> DeviceStatus {
    DeviceStatus {
        name: "x0".to_owned(),
        kind,
        backend: Some(backend.to_owned()),
        read_only: None,
        size_bytes: None,
        dropped: None,
        fault: None,
    }
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(bytes).unwrap();
    packer.finish().unwrap()
}

/// What is in a kernel that has these formats, and was built so.
pub(super) fn kernel(formats: &[&str], config: Option<&str>) -> Vec<u8> {
    let mut bytes = b"\x7fELF".to_vec();
    for format in formats {
        bytes.extend_from_slice(&[0; 100]);
        bytes.extend_from_slice(format.as_bytes());
        bytes.push(0);
    }
    if let Some(config) = config {
        bytes.extend([b"IKCFG_ST", &gzip(config.as_bytes())[..], b"IKCFG_ED"].concat());
    }
    bytes.extend_from_slice(&[0; 100]);
    bytes
}

/// A kernel of 7.3, as it should be.
pub(super) fn good_kernel() -> Vec<u8> {
    kernel(&["kho-v4", "luo-v5", "memfd-v2"], Some(CONFIG))
}

/// An image of this version with this in it, however it is packed.
pub(super) fn image(version: &str, packed: &[u8]) -> Vec<u8> {
    const SETUP: usize = 1024;
    const PAYLOAD: usize = 0x400;
    let kernel_bytes = (PAYLOAD + packed.len()).next_multiple_of(16);
    let mut image = vec![0; SETUP + kernel_bytes];
    let mut put = |place: usize, bytes: &[u8]| image[place..place + bytes.len()].copy_from_slice(bytes);
    let dword = |number: usize| u32::try_from(number).unwrap().to_le_bytes();
    put(0x1f1, &[1]);
    put(0x1f4, &dword(kernel_bytes / 16));
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x20e, &0x100_u16.to_le_bytes());
    put(0x300, version.as_bytes());
    put(0x211, &[1]);
    put(0x234, &[1]);
    put(0x236, &3_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x248, &dword(PAYLOAD));
    put(0x24c, &dword(packed.len()));
    put(0x260, &dword(40 << 20));
    put(SETUP + PAYLOAD, packed);
    image
}
