//! Becoming a host, and becoming the next one.

use std::error::Error;
use std::fs;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::str::FromStr;

use anyhow::Context as _;
use kvm_ioctls::Kvm;
use rustix::mount::MountFlags;

use crate::tideover;

/// Where the kernel lies that is booted next: the one that runs.
const KERNEL: &str = "/boot/kernel";
/// The disk with the file system that the kernel starts from; it has to be a file to be loaded again.
const INITRD_DISK: &str = "/dev/vda";
const INITRD: &str = "/run/initrd";

/// The disk that outlives the host's kernels, if its case has one, and where cases find what is on it.
const DISK: &str = "/dev/vdb";
pub(crate) const DISK_AT: &str = "/disk";

/// Which case and which life.
const CASE: &str = "e2e.case=";
const LIFE: &str = "e2e.life=";
/// What a case is told besides.
const WITH: &str = "e2e.with.";
/// How many bytes of the disk are the file system.
const INITRD_BYTES: &str = "e2e.initrd=";
/// The TSC's rate, and that the kernel is to measure it no more: each measure comes to another one, and KVM takes a guest with
/// its TSC only where that has the same.
const TSC_KHZ: &str = "tsc_early_khz=";
const CONSTANT_TSC: &str = "setcpuid=constant_tsc";
const KNOWN_TSC: &str = "setcpuid=constant_tsc,tsc_known_freq";

/// One life of the host, as its kernel was told of it.
pub(crate) struct Life {
    command_line: String,
    pub(crate) case: String,
    /// 1 and up.
    pub(crate) number: u32,
    initrd_bytes: u64,
}

/// How the command line of a host says that it has no such file system: it starts from a disk.
const NO_INITRD: u64 = 0;

/// What the host boots next.
pub(crate) struct Next {
    pub(crate) kernel: &'static Path,
    pub(crate) initrd: Option<&'static Path>,
    pub(crate) command_line: String,
}

impl Life {
    pub(crate) fn read() -> anyhow::Result<Self> {
        let command_line = fs::read_to_string("/proc/cmdline")?.trim().to_owned();
        let value = |name: &str| {
            word(&command_line, name)
                .map(str::to_owned)
                .with_context(|| format!("the kernel was not told {name}"))
        };
        let (case, number, initrd_bytes) =
            (value(CASE)?, value(LIFE)?.parse()?, value(INITRD_BYTES)?.parse()?);
        Ok(Self { command_line, case, number, initrd_bytes })
    }

    /// What the case was told by this name, else what it is to take for it.
    pub(crate) fn with<T>(&self, name: &str, or: T) -> anyhow::Result<T>
    where
        T: FromStr<Err: Error + Send + Sync + 'static>,
    {
        match word(&self.command_line, &format!("{WITH}{name}=")) {
            Some(told) => told.parse().with_context(|| format!("cannot read {name}={told}")),
            None => Ok(or),
        }
    }

    /// What the next life is to be booted from: this one's kernel, and the same first process.
    pub(crate) fn next(&self) -> anyhow::Result<Next> {
        let kernel = Path::new(KERNEL);
        let initrd = (self.initrd_bytes != NO_INITRD).then_some(Path::new(INITRD));
        if initrd.is_some_and(|initrd| !initrd.exists()) {
            let mut disk = std::io::Read::take(File::open(INITRD_DISK)?, self.initrd_bytes);
            std::io::copy(&mut disk, &mut File::create(INITRD)?).context("cannot copy the file system")?;
        }
        let next = |word: &str| match word {
            CONSTANT_TSC => Ok(format!("{KNOWN_TSC} {TSC_KHZ}{}", tsc_khz()?)),
            _ if word.starts_with(LIFE) => Ok(format!("{LIFE}{}", self.number + 1)),
            _ => Ok(word.to_owned()),
        };
        let words = self.command_line.split_whitespace().map(next).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Next { kernel, initrd, command_line: words.join(" ") })
    }
}

/// What stands behind a name in a command line.
fn word<'a>(command_line: &'a str, name: &str) -> Option<&'a str> {
    command_line.split_whitespace().find_map(|word| word.strip_prefix(name))
}

/// Whether systemd is the first process, and has done what is done here otherwise.
pub(crate) fn has_service_manager() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Mounts what every Linux has.
pub(crate) fn mount() -> anyhow::Result<()> {
    let systems = [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
        ("debugfs", "/sys/kernel/debug"),
        ("cgroup2", "/sys/fs/cgroup"),
    ];
    for (kind, at) in systems {
        fs::create_dir_all(at).with_context(|| format!("cannot make {at}"))?;
        match rustix::mount::mount(kind, at, kind, MountFlags::empty(), None::<&std::ffi::CStr>) {
            // The kernel has done so.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(errno) => return Err(errno).with_context(|| format!("cannot mount {kind} at {at}")),
        }
    }
    Ok(())
}

/// Mounts the disk that outlives the host's kernels.
pub(crate) fn mount_disk() -> anyhow::Result<()> {
    rustix::mount::mount(DISK, DISK_AT, "ext4", MountFlags::empty(), None::<&std::ffi::CStr>)
        .with_context(|| format!("cannot mount {DISK}"))
}

/// Waits until the kernel has measured the TSC: in a host's first life this takes it a second.
pub(crate) fn await_tsc() -> anyhow::Result<()> {
    tideover::wait_for("the kernel's measure of the TSC", tideover::PATIENCE, || {
        let clock = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")?;
        Ok((clock.trim() == "tsc").then_some(()))
    })
}

/// The TSC's rate, as KVM knows it.
fn tsc_khz() -> anyhow::Result<u32> {
    let vcpu = Kvm::new()?.create_vm()?.create_vcpu(0)?;
    vcpu.get_tsc_khz().context("KVM does not say how fast the TSC is")
}

/// Has this host boot its kernel again, by kexec.
pub(crate) fn next_life(life: &Life) -> anyhow::Result<()> {
    let next = life.next()?;
    let (kernel, initrd) = (File::open(next.kernel)?, next.initrd.map(File::open).transpose()?);
    liveupdate::kexec::load(kernel.as_fd(), initrd.as_ref().map(File::as_fd), &next.command_line)?;
    match liveupdate::kexec::execute()? {}
}
