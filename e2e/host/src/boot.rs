//! Becoming a host, and becoming the next one.

use std::fs;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::Context as _;
use rustix::mount::MountFlags;

/// Where the kernel lies that is booted next: the one that runs.
const KERNEL: &str = "/boot/kernel";
/// The disk with the file system that the kernel starts from; it has to be a file to be loaded again.
const INITRD_DISK: &str = "/dev/vda";
const INITRD: &str = "/run/initrd";

/// Which case and which life.
const CASE: &str = "e2e.case=";
const LIFE: &str = "e2e.life=";
/// How many bytes of the disk are the file system.
const INITRD_BYTES: &str = "e2e.initrd=";

/// What the kernel was told.
pub(crate) struct CommandLine {
    whole: String,
    pub(crate) case: String,
    pub(crate) life: u32,
    initrd_bytes: u64,
}

impl CommandLine {
    pub(crate) fn read() -> anyhow::Result<Self> {
        let whole = fs::read_to_string("/proc/cmdline")?.trim().to_owned();
        let value = |name: &str| {
            let value = whole.split_whitespace().find_map(|word| word.strip_prefix(name));
            value.map(str::to_owned).with_context(|| format!("the kernel was not told {name}"))
        };
        let (case, life, bytes) = (value(CASE)?, value(LIFE)?.parse()?, value(INITRD_BYTES)?.parse()?);
        Ok(Self { case, life, initrd_bytes: bytes, whole })
    }

    fn next(&self) -> String {
        let next = |word: &str| match word.starts_with(LIFE) {
            true => format!("{LIFE}{}", self.life + 1),
            false => word.to_owned(),
        };
        self.whole.split_whitespace().map(next).collect::<Vec<_>>().join(" ")
    }
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

/// Has this host boot its kernel again, by kexec.
pub(crate) fn next_life(command_line: &CommandLine) -> anyhow::Result<()> {
    if !Path::new(INITRD).exists() {
        let mut disk = std::io::Read::take(File::open(INITRD_DISK)?, command_line.initrd_bytes);
        std::io::copy(&mut disk, &mut File::create(INITRD)?).context("cannot copy the file system")?;
    }
    let (kernel, initrd) = (File::open(KERNEL)?, File::open(INITRD)?);
    liveupdate::kexec::load(kernel.as_fd(), Some(initrd.as_fd()), &command_line.next())?;
    match liveupdate::kexec::execute()? {}
}
