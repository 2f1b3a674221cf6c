//! Memory that the host's kernels are told to leave alone (`memmap=`): as a file system, or as a device.

use std::ffi::CStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use anyhow::ensure;
use rustix::mount::MountFlags;

use crate::boot::Life;
use crate::tideover;
use crate::tideover::PATIENCE;

const DISK: &str = "/dev/pmem0";
const MAKE: &str = "/bin/mke2fs";
/// Where its file system is.
pub(crate) const AT: &str = "/pmem";
/// Without the page cache, for each file.
const OPTIONS: &CStr = c"dax=always";

/// The device, its name on its bus, and the driver that shows it to programs.
pub(crate) const DEVICE: &str = "/dev/dax0.0";
const NAME: &str = "dax0.0";
const BUS: &str = "/sys/bus/dax";
const DRIVER: &str = "drivers/device_dax/new_id";

/// Mounts the memory's file system, which the first life makes.
pub(crate) fn mount(life: &Life) -> anyhow::Result<()> {
    tideover::wait_for(DISK, PATIENCE, || Ok(Path::new(DISK).exists().then_some(())))?;
    if life.number == 1 {
        let made = Command::new(MAKE).args(["-q", "-F", "-t", "ext4", "-b", "4096", DISK]).output();
        let made = made.with_context(|| format!("cannot run {MAKE}"))?;
        let said = String::from_utf8_lossy(&made.stderr).into_owned();
        ensure!(made.status.success(), "{MAKE}: {}: {said}", made.status);
    }
    rustix::mount::mount(DISK, AT, "ext4", MountFlags::empty(), Some(OPTIONS))
        .with_context(|| format!("cannot mount {DISK} with {OPTIONS:?}"))
}

/// Has the kernel show the memory as a device. Of itself it takes it for memory that could be its own later.
pub(crate) fn show_device() -> anyhow::Result<()> {
    let bus = Path::new(BUS);
    let device = bus.join("devices").join(NAME);
    tideover::wait_for(NAME, PATIENCE, || Ok(device.exists().then_some(())))?;
    fs::write(bus.join(DRIVER), NAME).with_context(|| format!("{NAME} has no driver"))?;
    tideover::wait_for(DEVICE, PATIENCE, || Ok(Path::new(DEVICE).exists().then_some(())))
}

/// How much memory the device has.
pub(crate) fn device_bytes() -> anyhow::Result<u64> {
    let path = Path::new(BUS).join("devices").join(NAME).join("size");
    let text = fs::read_to_string(path).with_context(|| format!("{NAME} has no size"))?;
    text.trim().parse().with_context(|| format!("{NAME} has a size of {text:?}"))
}
