//! The registers that a vCPU left at its last exit, for whoever has its descriptor: also when the process that ran it is dead.
//!
//! KVM answers ioctls on a vCPU to the address space that made it, and to no other. But the `kvm_run` page can be mapped by
//! everybody who has the descriptor, and KVM copies registers there at each exit if it was asked to
//! (`KVM_CAP_SYNC_REGS`). The signal that kills a process ends its vCPUs' runs, too, and so the page tells where each of them
//! stood. What it does not tell is more than half of a vCPU's state: nothing can be run on from this.

use std::io;
use std::mem::{self, MaybeUninit, offset_of};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use kvm_bindings::{
    KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_regs, kvm_run, kvm_sregs, kvm_sync_regs,
};
use kvm_ioctls::{SyncReg, VcpuFd};

use crate::capabilities::Capabilities;

/// Length of the mapping: the first page, in which the registers lie.
const MAPPED_LEN: usize = 4096;
/// Where the registers lie.
const REGISTERS: usize = offset_of!(kvm_run, s);

const _: () = assert!(REGISTERS + mem::size_of::<kvm_sync_regs>() <= MAPPED_LEN);

/// Groups of registers that KVM is asked to copy.
const WANTED: u32 = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;

/// Registers of a vCPU as they were at its last exit.
#[derive(Debug, Clone, Copy)]
pub struct LastRegisters {
    /// General registers, instruction pointer and flags.
    pub general: kvm_regs,
    /// Segments, tables and control registers.
    pub special: kvm_sregs,
}

/// Has KVM copy the registers to the page at each exit, if it can.
pub(crate) fn keep(vcpu: &mut VcpuFd, capabilities: &Capabilities) {
    if capabilities.sync_registers & WANTED != WANTED {
        return;
    }
    for group in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
        vcpu.set_sync_valid_reg(group);
    }
}

impl LastRegisters {
    /// Reads those of the vCPU whose descriptor this is; `None` if its KVM was not asked to copy them.
    ///
    /// Of a vCPU that runs they are those of some exit before now, and may be of two.
    ///
    /// # Errors
    ///
    /// If the descriptor cannot be mapped: it is no vCPU's.
    pub fn read(vcpu: impl AsFd) -> io::Result<Option<Self>> {
        let page = Page::map(&vcpu)?;
        let valid: u64 = page.copy(offset_of!(kvm_run, kvm_valid_regs));
        if valid & u64::from(WANTED) != u64::from(WANTED) {
            return Ok(None);
        }
        let registers: kvm_sync_regs = page.copy(REGISTERS);
        Ok(Some(Self { general: registers.regs, special: registers.sregs }))
    }
}

/// A mapping of the first page, to be read.
struct Page(ptr::NonNull<u8>);

impl Page {
    fn map(vcpu: &impl AsFd) -> io::Result<Self> {
        let fd = vcpu.as_fd().as_raw_fd();
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
        let page =
            unsafe { libc::mmap(ptr::null_mut(), MAPPED_LEN, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
        match ptr::NonNull::new(page) {
            Some(page) if page.as_ptr() != libc::MAP_FAILED => Ok(Self(page.cast())),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// What lies at `offset`, byte by byte: somebody else may write it.
    fn copy<T: Plain>(&self, offset: usize) -> T {
        let mut value = MaybeUninit::<T>::uninit();
        assert!(offset + mem::size_of::<T>() <= MAPPED_LEN, "it lies in the page");
        for at in 0..mem::size_of::<T>() {
            // SAFETY: `offset + at` is within the mapping, by the assertion above, and `at` within `value`; a volatile
            // read of a byte is whole, whoever writes to it meanwhile.
            unsafe {
                let byte = self.0.as_ptr().add(offset + at).read_volatile();
                value.as_mut_ptr().cast::<u8>().add(at).write(byte);
            }
        }
        // SAFETY: all bytes were written, and any bytes make a value, by `Plain`.
        unsafe { value.assume_init() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, and nothing borrows from it.
        unsafe { libc::munmap(self.0.as_ptr().cast(), MAPPED_LEN) };
    }
}

/// What any bytes are a value of.
///
/// # Safety
///
/// That has to be so.
unsafe trait Plain: Copy {}

// SAFETY: it is a number.
unsafe impl Plain for u64 {}
// SAFETY: a structure of the kernel's interface, of numbers alone, and as many bytes as it has.
unsafe impl Plain for kvm_sync_regs {}
