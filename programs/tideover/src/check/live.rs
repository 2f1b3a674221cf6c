//! The calls on the host that this process runs on.

use std::error::Error;
use std::os::fd::AsFd;
use std::time::Duration;

use ::vmm::control::Answer;
use ::vmm::control::Request;
use ::vmm::control::Status;
use anyhow::bail;
use kvm::GuestMemfdFlags;
use kvm::VmBuilder;
use kvm::kvm_ioctls::Kvm;
use liveupdate::Name;
use liveupdate::Outgoing;
use liveupdate::PreserveError;
use liveupdate::kexec;
use region::Region;
use rustix::fs::MemfdFlags;

use super::device::Device;
use super::device::Kept;
use super::device::Kinds;
use super::host::Calls;
use crate::machines;

/// How long a VMM may take to say how it is.
const LOOK: Duration = Duration::from_secs(5);
const PAGE: u64 = 4096;

/// This host.
pub(super) struct Live;

impl Calls for Live {
    fn device(&self) -> Device {
        // First, so that what KVM brings is there when the device is opened.
        let kvm = Kvm::new().map_err(|error| format!("there is no KVM: {error}"));
        let device = match crate::kexec::open_device() {
            Ok(device) => device,
            Err(error) => return Device::Refused(error),
        };
        match make_session(&device) {
            Ok(mut session) => Device::Open(Box::new(kinds(&mut session, kvm))),
            Err(error) => Device::NoSession(format!("{error:#}")),
        }
    }

    fn file_load(&self) -> Result<(), kexec::LoadError> {
        kexec::ask()
    }

    fn machines(&self) -> anyhow::Result<Vec<String>> {
        machines::names()
    }

    fn status(&self, machine: &str) -> anyhow::Result<Status> {
        let client = machines::connect(machine)?.with_patience(LOOK);
        match client.ask(&Request::Status, &mut |_, _, _| {})? {
            Answer::Status(status) => Ok(*status),
            Answer::Held(held) => bail!("is held by process {}, and does not run: {}", held.pid, held.why),
            other => bail!("unexpected answer to status: {other:?}"),
        }
    }
}

/// A session of a name that nobody has: Linux 7.3 does not forgive one that is created twice.
fn make_session(device: &liveupdate::Device) -> anyhow::Result<Outgoing> {
    let name = format!("tideover-check-{:016x}{:016x}", getrandom::u64()?, getrandom::u64()?);
    Ok(device.create(&Name::new(name.as_bytes())?)?)
}

/// Tries one file of each kind. They are as before when the session ends.
fn kinds(session: &mut Outgoing, kvm: Result<Kvm, String>) -> Kinds {
    let hugetlb = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let vm = kvm.and_then(|kvm| VmBuilder::create(&kvm).map_err(|error| said(&error)));
    let flags = GuestMemfdFlags::MMAP | GuestMemfdFlags::INIT_SHARED;
    let guest_memfd = match &vm {
        Ok(vm) => kvm::guest_memfd::create(vm.fd(), PAGE, flags).map_err(|error| said(&error)),
        Err(error) => Err(error.clone()),
    };
    Kinds {
        memfd: preserve(session, 0, Region::create("check", PAGE).map_err(|error| said(&error))),
        hugetlb: preserve(
            session,
            1,
            rustix::fs::memfd_create("check", hugetlb).map_err(|error| error.to_string()),
        ),
        vm: preserve(session, 2, vm.and_then(|vm| kvm::descriptor(vm.fd()).map_err(|error| said(&error)))),
        guest_memfd: preserve(session, 3, guest_memfd),
    }
}

fn preserve(session: &mut Outgoing, token: u64, file: Result<impl AsFd, String>) -> Kept {
    let file = match file {
        Ok(file) => file,
        Err(error) => return Kept::NotTried(error),
    };
    match session.preserve(token, file.as_fd()) {
        Ok(()) => Kept::Yes,
        Err(PreserveError::Unsupported) => Kept::Unsupported,
        Err(error) => Kept::Refused(said(&error)),
    }
}

/// An error and what it came of.
fn said(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |cause| Error::source(*cause));
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
