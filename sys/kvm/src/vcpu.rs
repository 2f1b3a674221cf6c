//! A vCPU: run until it exits or is kicked, and then always in a state that can be saved.
//!
//! # What "can be saved" takes
//!
//! An exit for port or memory-mapped I/O leaves half an instruction inside KVM: the guest's registers
//! still stand before the instruction (or the data of an IN is still in the `kvm_run` page), and the other
//! half is done at the entry of the *next* `KVM_RUN`, before KVM looks at `immediate_exit` and before the
//! guest goes on. State saved in between would do the I/O again in the successor, or lose it.
//!
//! So [`Vcpu::run`] returns only after a `KVM_RUN` that ended with EINTR: this one completed whatever
//! the last exit had left, and did not end in an exit itself. A kick leads there by itself. Where the
//! caller's closure ends the run, one more `KVM_RUN` is made that returns before the guest goes on; it
//! costs a few microseconds.

use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use crate::capabilities::Capabilities;
use crate::ioctl::{self, XsaveLen};
use crate::kick::{self, Bell, Kicker, SignalError};
use crate::last_registers;
use crate::vm::{Irqchip, Vm};

/// Why a vCPU could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// `KVM_CREATE_VCPU` failed.
    #[error("KVM_CREATE_VCPU of {id} failed")]
    Create {
        /// The vCPU's number.
        id: u32,
        /// What the kernel said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// This KVM cannot be told to return at once, so a vCPU could not be stopped with certainty.
    #[error("this KVM lacks KVM_CAP_IMMEDIATE_EXIT")]
    NoImmediateExit,
    /// The `kvm_run` page could not be mapped a second time.
    #[error("the kvm_run page could not be mapped")]
    Map(#[source] io::Error),
    /// The signal that stops vCPUs could not be made ready.
    #[error("vCPUs could not be stopped")]
    Signal(#[from] SignalError),
}

/// Why [`Vcpu::run`] returned: in either case the vCPU's state can be saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped<B> {
    /// A [`Kicker`] asked for it.
    Kicked,
    /// The closure that handles exits broke with this value.
    Broke(B),
}

/// Why [`Vcpu::run`] failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A state was loaded but [`Loader::finish`](crate::Loader::finish) was not called, or failed.
    #[error("the vCPU's state is loaded only in part")]
    PartlyLoaded,
    /// KVM cannot give the guest the memory that it reached for, and says which. The vCPU stands before the access: it can
    /// be saved, and run again once that memory can be had.
    #[error("KVM_RUN failed: {0}")]
    Memory(MemoryFault),
    /// `KVM_RUN` failed, with anything but the EINTR and EAGAIN that are part of its normal course.
    #[error("KVM_RUN failed; the exit reason in the kvm_run page is {exit_reason}")]
    Kvm {
        /// `exit_reason` of the `kvm_run` page; KVM sets it for some failures only.
        exit_reason: u32,
        /// What the kernel said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

impl RunError {
    /// The kernel's error number, if this is a failure of `KVM_RUN`.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::PartlyLoaded => None,
            Self::Memory(fault) if fault.poisoned => Some(libc::EHWPOISON),
            Self::Memory(_) => Some(libc::EFAULT),
            Self::Kvm { source, .. } => Some(source.errno()),
        }
    }
}

/// Guest memory that KVM cannot give its guest (`KVM_EXIT_MEMORY_FAULT`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryFault {
    /// Guest physical address of the first byte.
    pub guest_address: u64,
    /// How many bytes, from there on.
    pub len_bytes: u64,
    /// The guest reached for it as its private memory, which the host does not see.
    pub private: bool,
    /// All flags, as KVM numbers them.
    pub flags: u64,
    /// The host's memory is broken there (EHWPOISON); else it is not to be had (EFAULT).
    pub poisoned: bool,
}

impl MemoryFault {
    fn new(flags: u64, guest_address: u64, len_bytes: u64, errno: i32) -> Self {
        let private = flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0;
        Self { guest_address, len_bytes, private, flags, poisoned: errno == libc::EHWPOISON }
    }
}

impl fmt::Display for MemoryFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.private { "private" } else { "shared" };
        let why = if self.poisoned { "broken" } else { "not to be had" };
        let Self { guest_address, len_bytes, .. } = self;
        write!(f, "the {len_bytes:#x} bytes of {kind} guest memory at {guest_address:#x} are {why}")?;
        match self.flags & !u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) {
            0 => Ok(()),
            others => write!(f, " (further flags {others:#x})"),
        }
    }
}

/// How far the loading of a state has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LoadStage {
    /// Nothing was loaded, or everything.
    Whole,
    /// Loading is under way, or failed.
    Partly,
    /// What writes guest memory is still to be loaded.
    ToFinish,
}

/// A vCPU of a [`Vm`].
#[derive(Debug)]
pub struct Vcpu {
    // Dropped first: the VM's own descriptor is to be the last one that goes.
    fd: VcpuFd,
    bell: Arc<Bell>,
    xsave_len: XsaveLen,
    tsc_offset: bool,
    tsc_khz: bool,
    stage: LoadStage,
    irqchip: Irqchip,
    capabilities: Arc<Capabilities>,
    _vm: Arc<VmFd>,
}

impl Vcpu {
    /// Takes up a vCPU of `vm` that was made by other means.
    ///
    /// # Errors
    ///
    /// See [`VcpuError`].
    pub fn adopt(vm: &Vm, mut fd: VcpuFd) -> Result<Self, VcpuError> {
        if !vm.capabilities().immediate_exit {
            return Err(VcpuError::NoImmediateExit);
        }
        kick::install_handler()?;
        let bell = Bell::new(&fd).map_err(VcpuError::Map)?;
        last_registers::keep(&mut fd, vm.capabilities());
        Ok(Self {
            bell,
            xsave_len: XsaveLen::of(vm.fd(), &fd),
            tsc_offset: ioctl::has_tsc_offset(&fd),
            // Refused, whatever the capability says, where the host's TSC is not stable.
            tsc_khz: vm.capabilities().tsc_khz && fd.get_tsc_khz().is_ok(),
            stage: LoadStage::Whole,
            irqchip: vm.irqchip(),
            capabilities: Arc::clone(vm.capabilities()),
            _vm: Arc::clone(vm.fd()),
            fd,
        })
    }

    /// The vCPU's descriptor, for what the caller sets and asks by itself.
    #[must_use]
    pub const fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// A descriptor of it, for whoever is to read its [`LastRegisters`](crate::LastRegisters) one day.
    ///
    /// # Errors
    ///
    /// If this process can have no more descriptors.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        // SAFETY: the vCPU keeps its descriptor open, and is borrowed for longer than this is.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) };
        fd.try_clone_to_owned()
    }

    /// Interrupt controllers of its VM.
    #[must_use]
    pub const fn irqchip(&self) -> Irqchip {
        self.irqchip
    }

    /// What its KVM can do.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Whether its TSC is kept as an offset to the host's (`KVM_VCPU_TSC_OFFSET`).
    pub(crate) const fn has_tsc_offset(&self) -> bool {
        self.tsc_offset
    }

    /// Whether the frequency of its TSC can be asked.
    pub(crate) const fn has_tsc_khz(&self) -> bool {
        self.tsc_khz
    }

    pub(crate) const fn xsave_len(&self) -> XsaveLen {
        self.xsave_len
    }

    /// How far the loading of a state has come.
    pub(crate) const fn load_stage(&self) -> LoadStage {
        self.stage
    }

    pub(crate) const fn set_load_stage(&mut self, stage: LoadStage) {
        self.stage = stage;
    }

    /// Gives KVM the CR8 that it is to take at the next entry, which it does where the LAPIC is not its own.
    pub(crate) fn set_entry_cr8(&mut self, cr8: u64) {
        self.fd.get_kvm_run().cr8 = cr8;
    }

    /// Asks, for a guest without LAPIC in KVM, for an exit as soon as it can take an interrupt.
    pub fn request_interrupt_window(&mut self, wanted: bool) {
        self.fd.get_kvm_run().request_interrupt_window = u8::from(wanted);
    }

    /// Whether the guest, without LAPIC in KVM, could take an interrupt when the last run ended.
    pub fn ready_for_interrupt(&mut self) -> bool {
        self.fd.get_kvm_run().ready_for_interrupt_injection != 0
    }

    /// What stops this vCPU from other threads.
    #[must_use]
    pub fn kicker(&self) -> Kicker {
        Kicker::of(&self.bell)
    }

    /// Runs the guest on this thread. Each exit goes to `on_exit`, which handles it and says whether to go
    /// on.
    ///
    /// Returns when `on_exit` breaks, or at a kick, be it one that was there before the call. When it
    /// returns `Ok`, all I/O of the guest is complete and the state can be saved. For that, after a break,
    /// `on_exit` may be called again for the rest of the instruction that is under way; if it then breaks
    /// again, the later value counts.
    ///
    /// Signals other than the kick's do not end the run.
    ///
    /// # Errors
    ///
    /// See [`RunError`].
    pub fn run<B>(
        &mut self,
        mut on_exit: impl FnMut(VcpuExit<'_>) -> ControlFlow<B>,
    ) -> Result<Stopped<B>, RunError> {
        if self.stage != LoadStage::Whole {
            return Err(RunError::PartlyLoaded);
        }
        let _inside = self.bell.enter();
        loop {
            match self.enter_guest(&mut on_exit)? {
                Entry::Exited(ControlFlow::Continue(())) | Entry::Again => {}
                Entry::Exited(ControlFlow::Break(value)) => {
                    return self.settle(on_exit, value).map(Stopped::Broke);
                }
                Entry::Interrupted => {
                    if self.bell.take_kick() {
                        return Ok(Stopped::Kicked);
                    }
                }
            }
        }
    }

    /// Completes what the last exit left inside KVM, without letting the guest go on.
    fn settle<B>(
        &mut self,
        mut on_exit: impl FnMut(VcpuExit<'_>) -> ControlFlow<B>,
        mut value: B,
    ) -> Result<B, RunError> {
        let bell = Arc::clone(&self.bell);
        bell.settle(true);
        let _unsettle = OnDrop(|| bell.settle(false));
        loop {
            match self.enter_guest(&mut on_exit)? {
                Entry::Exited(ControlFlow::Break(later)) => value = later,
                Entry::Exited(ControlFlow::Continue(())) | Entry::Again => {}
                Entry::Interrupted => return Ok(value),
            }
        }
    }

    /// One `KVM_RUN`.
    fn enter_guest<B>(
        &mut self,
        on_exit: &mut impl FnMut(VcpuExit<'_>) -> ControlFlow<B>,
    ) -> Result<Entry<B>, RunError> {
        match self.fd.run() {
            Ok(VcpuExit::Intr) => Ok(Entry::Again),
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                // This exit comes with an error, which is this thread's last: nothing was called in between.
                let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EFAULT);
                Err(RunError::Memory(MemoryFault::new(flags, gpa, size, errno)))
            }
            Ok(exit) => Ok(Entry::Exited(on_exit(exit))),
            Err(error) if error.errno() == libc::EINTR => Ok(Entry::Interrupted),
            // A vCPU that waited to be started was woken; KVM wants to be called again.
            Err(error) if error.errno() == libc::EAGAIN => Ok(Entry::Again),
            Err(source) => Err(RunError::Kvm { exit_reason: self.fd.get_kvm_run().exit_reason, source }),
        }
    }
}

/// How one `KVM_RUN` ended.
enum Entry<B> {
    /// With an exit, of which the closure said this.
    Exited(ControlFlow<B>),
    /// With EINTR: nothing of the guest's is left half done.
    Interrupted,
    /// Without anything to tell.
    Again,
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;
    use crate::vm::VmBuilder;

    /// G5.6.2.
    #[test]
    fn a_memory_fault_says_which_memory_and_why() {
        let fault = MemoryFault::new(8, 0x1_2345_6000, 0x1000, libc::EFAULT);
        assert!(fault.private && !fault.poisoned);
        assert_eq!(
            RunError::Memory(fault).to_string(),
            "KVM_RUN failed: the 0x1000 bytes of private guest memory at 0x123456000 are not to be had"
        );
        assert_eq!(RunError::Memory(fault).errno(), Some(libc::EFAULT));
        let fault = MemoryFault::new(0x10, 0, 0x20_0000, libc::EHWPOISON);
        assert!(!fault.private && fault.poisoned);
        assert_eq!(
            fault.to_string(),
            "the 0x200000 bytes of shared guest memory at 0x0 are broken (further flags 0x10)"
        );
        assert_eq!(RunError::Memory(fault).errno(), Some(libc::EHWPOISON));
    }

    /// G5.6.1.
    #[test]
    fn a_failed_run_keeps_the_kernels_error() {
        harness::need!(kvm);
        let vm = VmBuilder::create(&Kvm::new().unwrap()).unwrap().finish(Irqchip::None).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let no_such_priority = 0x100;
        vcpu.set_entry_cr8(no_such_priority);
        let failed = vcpu.run(|_| ControlFlow::Break(())).unwrap_err();
        assert_eq!(failed.errno(), Some(libc::EINVAL), "{failed:?}");
        // The lock of the run is free again, and so is the vCPU.
        vcpu.set_entry_cr8(0);
        vcpu.kicker().kick().unwrap();
        assert_eq!(vcpu.run(|_| ControlFlow::Break(())).unwrap(), Stopped::Kicked);
    }
}
