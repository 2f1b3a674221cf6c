//! What the kernel's device answers, without a kexec.

use std::fs::File;
use std::os::fd::AsFd as _;

use anyhow::ensure;
use liveupdate::CreateError;
use liveupdate::Device;
use liveupdate::FindError;
use liveupdate::Name;
use liveupdate::OpenError;
use liveupdate::Outgoing;
use liveupdate::PreserveError;
use rustix::fs::MemfdFlags;

use crate::boot::Life;

use super::Then;

pub(crate) fn run(_life: &Life) -> anyhow::Result<Then> {
    let device = Device::open()?;
    ensure!(matches!(Device::open(), Err(OpenError::Busy)), "the device has a second user");
    let name = Name::new(b"one \x1b[31mred\xff")?;
    let mut session = device.create(&name)?;
    ensure!(session.name()? == name, "the name is another: {}", session.name()?);
    let again = device.create(&name);
    ensure!(matches!(again, Err(CreateError::Exists { .. })), "a name is given twice: {again:?}");
    let absent = device.retrieve(&name);
    ensure!(matches!(absent, Err(FindError::Absent { .. })), "an outgoing session comes back: {absent:?}");
    // Its end is not the sessions'.
    drop(device);
    preserves(&mut session)?;
    let kept = Outgoing::from_fd(session.as_fd().try_clone_to_owned()?)?;
    drop(session);
    let device = Device::open()?;
    ensure!(matches!(device.create(&name), Err(CreateError::Exists { .. })), "a copy keeps no session");
    drop(kept);
    let mut session = device.create(&name)?;
    preserves(&mut session)?;
    let no_session = Outgoing::from_fd(File::open("/dev/null")?.into());
    ensure!(no_session.is_err(), "/dev/null is a session");
    Ok(Then::End)
}

/// Files that can be preserved, and those that can not.
fn preserves(session: &mut Outgoing) -> anyhow::Result<()> {
    let memfd = || rustix::fs::memfd_create("memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
    let (one, other) = (memfd()?, memfd()?);
    session.preserve(u64::MAX, one.as_fd())?;
    let same_token = session.preserve(u64::MAX, other.as_fd());
    ensure!(matches!(same_token, Err(PreserveError::Exists { token: u64::MAX })), "{same_token:?}");
    let same_file = session.preserve(0, one.as_fd());
    ensure!(matches!(same_file, Err(PreserveError::Busy)), "{same_file:?}");
    session.preserve(0, other.as_fd())?;
    let hugetlb =
        rustix::fs::memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?;
    for fd in [File::open("/dev/null")?.into(), File::open("/proc/self/exe")?.into(), hugetlb] {
        let unsupported = session.preserve(2, fd.as_fd());
        ensure!(matches!(unsupported, Err(PreserveError::Unsupported)), "{unsupported:?}");
    }
    Ok(())
}
