//! What a machine's devices have of the host: files, interfaces, a console. It outlives the guest's restarts, and goes
//! with the machine to the next VMM: what is open stays open, under the same lock.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use anyhow::Context as _;
use anyhow::bail;
use devices::disk::Access;
use devices::disk::DiskFile;
use devices::tap::Tap;
use machine::FdName;
use machine::Fds;

use crate::console::Console;
use crate::control::DiskSpec;
use crate::control::GuestKind;
use crate::control::MachineSpec;

const KERNEL: FdName = FdName::literal("kernel");
const INITRD: FdName = FdName::literal("initrd");
/// The most disks and network cards of one machine: as many as there are interrupts of a PC that nobody else has.
pub(crate) const MAX_SLOTS: usize = 4;

/// The files and interfaces of a machine's devices, open.
#[derive(Debug)]
pub struct Backends {
    pub(crate) disks: Vec<Arc<DiskFile>>,
    pub(crate) taps: Vec<Tap>,
    pub(crate) linux: Option<LinuxFiles>,
    pub(crate) console: Console,
    /// What went wrong last in each device, by its name.
    faults: Mutex<BTreeMap<String, String>>,
}

/// What the guest is started with, now and after a reset.
#[derive(Debug)]
pub(crate) struct LinuxFiles {
    pub(crate) kernel: File,
    pub(crate) initrd: Option<File>,
}

impl Backends {
    /// Opens what `spec` asks for.
    ///
    /// # Errors
    /// If something is not there, is of another kind, or is another machine's.
    pub fn open(spec: &MachineSpec) -> anyhow::Result<Self> {
        check(spec)?;
        let disk = |disk: &DiskSpec| DiskFile::open(&disk.path, access(disk)).map(Arc::new);
        let disks = spec.disks.iter().map(disk).collect::<Result<_, _>>()?;
        let linux = spec.linux.as_ref().map(|linux| -> anyhow::Result<_> {
            let mut kernel = open_file("kernel", &linux.kernel)?;
            devices::linux::check(&mut kernel)
                .with_context(|| format!("cannot start the kernel {}", linux.kernel.display()))?;
            let initrd = linux.initrd.as_ref().map(|path| open_file("initial RAM disk", path)).transpose()?;
            Ok(LinuxFiles { kernel, initrd })
        });
        let linux = linux.transpose()?;
        let taps = spec.taps.iter().map(|name| open_tap(name)).collect::<Result<_, _>>()?;
        Ok(Self { disks, taps, linux, console: Console::new()?, faults: Mutex::default() })
    }

    /// Takes what came with a machine that was made as `spec` says. Consoles are in these places.
    pub(crate) fn adopt(spec: &MachineSpec, fds: &mut Fds, consoles: &[u32]) -> anyhow::Result<Self> {
        check(spec)?;
        let disk = |(disk, place): (&DiskSpec, usize)| -> anyhow::Result<_> {
            let name = disk_name(place);
            let file = take(fds, fd_name(&name)?)?;
            Ok(Arc::new(DiskFile::adopt(&name, file.into(), access(disk))?))
        };
        let disks = spec.disks.iter().zip(0..).map(disk).collect::<anyhow::Result<_>>()?;
        let tap = |place| -> anyhow::Result<_> { Ok(Tap::adopt(take(fds, fd_name(&net_name(place))?)?)?) };
        let taps = (0..spec.taps.len()).map(tap).collect::<anyhow::Result<_>>()?;
        let linux = spec.linux.as_ref().map(|linux| -> anyhow::Result<_> {
            let kernel = File::from(take(fds, KERNEL)?);
            let initrd = linux.initrd.as_ref().map(|_| take(fds, INITRD).map(File::from)).transpose()?;
            Ok(LinuxFiles { kernel, initrd })
        });
        let linux = linux.transpose()?;
        Ok(Self { disks, taps, linux, console: Console::adopt(fds, consoles)?, faults: Mutex::default() })
    }

    /// What went wrong last in each device, by its name.
    pub(crate) fn faults(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What went wrong last in a device, which says so `now` if that is new.
    pub(crate) fn fault<E>(&self, device: &str, now: Option<E>) -> Option<String>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let mut faults = self.faults();
        if let Some(error) = now {
            faults.insert(device.to_owned(), format!("{:#}", anyhow::Error::new(error)));
        }
        faults.get(device).cloned()
    }

    /// What goes with the machine, but for the consoles.
    pub(crate) fn fds(&self) -> anyhow::Result<Vec<(FdName, BorrowedFd<'_>)>> {
        let mut fds = Vec::new();
        for (disk, place) in self.disks.iter().zip(0..) {
            fds.push((fd_name(&disk_name(place))?, disk.as_fd()));
        }
        for (tap, place) in self.taps.iter().zip(0..) {
            fds.push((fd_name(&net_name(place))?, tap.as_fd()));
        }
        if let Some(linux) = &self.linux {
            fds.push((KERNEL, linux.kernel.as_fd()));
            fds.extend(linux.initrd.iter().map(|initrd| (INITRD, initrd.as_fd())));
        }
        Ok(fds)
    }
}

/// What a disk is called, as a device and as what goes with the machine.
pub(crate) fn disk_name(place: usize) -> String {
    format!("disk{place}")
}

/// The same of a network card.
pub(crate) fn net_name(place: usize) -> String {
    format!("net{place}")
}

fn fd_name(name: &str) -> anyhow::Result<FdName> {
    FdName::new(name.as_bytes()).with_context(|| format!("no descriptor can be called {name}"))
}

fn take(fds: &mut Fds, name: FdName) -> anyhow::Result<OwnedFd> {
    fds.take(name).with_context(|| format!("{name} did not come with the machine"))
}

fn access(disk: &DiskSpec) -> Access {
    if disk.read_only { Access::ReadOnly } else { Access::ReadWrite }
}

fn check(spec: &MachineSpec) -> anyhow::Result<()> {
    let slots = spec.disks.len() + spec.taps.len();
    if slots > MAX_SLOTS {
        bail!("a machine has at most {MAX_SLOTS} disks and network cards, not {slots}");
    }
    if spec.guest == GuestKind::Thread && (slots > 0 || spec.linux.is_some()) {
        bail!("a guest that is a thread has no devices and no kernel: take one of KVM");
    }
    Ok(())
}

fn open_file(what: &str, path: &Path) -> anyhow::Result<File> {
    let cannot = || format!("cannot open the {what} {}", path.display());
    let file = File::open(path).with_context(cannot)?;
    if !file.metadata().with_context(cannot)?.is_file() {
        bail!("the {what} {} is no file", path.display());
    }
    Ok(file)
}

/// Takes an interface that is there: one that the kernel would make now would be connected to nothing.
fn open_tap(name: &str) -> anyhow::Result<Tap> {
    if !Tap::is_there(name) {
        bail!("there is no tap interface {name:?}: make it with `ip tuntap add dev NAME mode tap`");
    }
    Ok(Tap::open(name)?)
}
