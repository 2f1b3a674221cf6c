//! The ioctls that kvm-ioctls leaves out, or has only as `unsafe` for want of a size it could check.

use std::ffi::c_ulong;
use std::mem::size_of;
use std::num::NonZeroU32;

use kvm_bindings as bind;
use kvm_ioctls::{Error, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{
    _IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl, ioctl_expr, ioctl_with_mut_ptr, ioctl_with_ptr, ioctl_with_ref,
};

use crate::capabilities::extension;

/// An ioctl number of KVM, for an argument of type `T`.
const fn number<T>(direction: u32, nr: u32) -> c_ulong {
    let size = size_of::<T>();
    assert!(size < 1 << 14, "the size field of an ioctl number has 14 bits");
    #[expect(clippy::cast_possible_truncation, reason = "asserted to be below 2^14")]
    ioctl_expr(direction, bind::KVMIO, nr, size as u32)
}

const KVM_GET_XSAVE: c_ulong = number::<bind::kvm_xsave>(_IOC_READ, 0xa4);
const KVM_SET_XSAVE: c_ulong = number::<bind::kvm_xsave>(_IOC_WRITE, 0xa5);
const KVM_GET_XSAVE2: c_ulong = number::<bind::kvm_xsave>(_IOC_READ, 0xcf);
const KVM_GET_TSC_KHZ: c_ulong = ioctl_expr(_IOC_NONE, bind::KVMIO, 0xa3, 0);
const KVM_SET_DEVICE_ATTR: c_ulong = number::<bind::kvm_device_attr>(_IOC_WRITE, 0xe1);
const KVM_GET_DEVICE_ATTR: c_ulong = number::<bind::kvm_device_attr>(_IOC_WRITE, 0xe2);
const KVM_HAS_DEVICE_ATTR: c_ulong = number::<bind::kvm_device_attr>(_IOC_WRITE, 0xe3);

/// What `KVM_GET_XSAVE` and a KVM without `KVM_CAP_XSAVE2` read and write.
const LEGACY_XSAVE_LEN: usize = size_of::<bind::kvm_xsave>();

/// How many bytes KVM reads and writes as a vCPU's extended state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct XsaveLen {
    // At least what KVM says, asked while a vCPU exists: from the first vCPU on, the kernel lets a process
    // no longer ask for more guest state, so the answer cannot grow.
    bytes: usize,
    xsave2: bool,
}

impl XsaveLen {
    /// Asks KVM. Takes a vCPU to show that there is one.
    pub(crate) fn of(vm: &VmFd, _vcpu: &VcpuFd) -> Self {
        match usize::try_from(extension(vm, bind::KVM_CAP_XSAVE2)) {
            Ok(len) if len > 0 => Self { bytes: len.max(LEGACY_XSAVE_LEN), xsave2: true },
            _ => Self { bytes: LEGACY_XSAVE_LEN, xsave2: false },
        }
    }

    pub(crate) const fn bytes(self) -> usize {
        self.bytes
    }
}

/// Reads the extended state into `buffer`, which is made as long as that state.
pub(crate) fn get_xsave(vcpu: &VcpuFd, len: XsaveLen, buffer: &mut Vec<u8>) -> Result<(), Error> {
    buffer.resize(len.bytes, 0);
    let request = if len.xsave2 { KVM_GET_XSAVE2 } else { KVM_GET_XSAVE };
    // SAFETY: KVM writes at most `len.bytes` bytes, as the invariant of `XsaveLen` says, and `buffer` has
    // as many.
    check(unsafe { ioctl_with_mut_ptr(vcpu, request, buffer.as_mut_ptr()) })
}

/// Writes the extended state. A `state` shorter than KVM's goes on in zeros, which say "as after reset".
///
/// Refuses a longer one with E2BIG.
pub(crate) fn set_xsave(vcpu: &VcpuFd, len: XsaveLen, state: &[u8]) -> Result<(), Error> {
    if state.len() > len.bytes {
        return Err(Error::new(libc::E2BIG));
    }
    let longer;
    let state = if state.len() == len.bytes {
        state
    } else {
        let mut padded = vec![0; len.bytes];
        padded[..state.len()].copy_from_slice(state);
        longer = padded;
        &longer
    };
    // SAFETY: KVM reads at most `len.bytes` bytes, as the invariant of `XsaveLen` says, and `state` has as
    // many.
    check(unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE, state.as_ptr()) })
}

/// How fast the TSC of a vCPU is that is made next, in kHz: that of the host's, until the VM is told another. `None` if KVM does
/// not say: it can be asked since Linux 5.18.
pub(crate) fn vm_tsc_khz(vm: &VmFd) -> Option<NonZeroU32> {
    // SAFETY: the call has no argument, and its answer is the number.
    let khz = unsafe { ioctl(vm, KVM_GET_TSC_KHZ) };
    u32::try_from(khz).ok().and_then(NonZeroU32::new)
}

/// Whether the offset of the vCPU's TSC to the host's can be read and set.
pub(crate) fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    // SAFETY: `KVM_HAS_DEVICE_ATTR` reads the attribute's name and nothing else.
    unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR, &tsc_offset_attr(0)) == 0 }
}

/// The offset of the vCPU's TSC to the host's, in ticks of the vCPU's TSC.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0_u64;
    let attr = tsc_offset_attr((&raw mut offset).expose_provenance() as u64);
    // SAFETY: for this attribute KVM writes a u64 at `addr`, which is `offset`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR, &attr) })?;
    Ok(offset)
}

/// Sets the offset of the vCPU's TSC to the host's.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), Error> {
    let attr = tsc_offset_attr((&raw const offset).expose_provenance() as u64);
    // SAFETY: for this attribute KVM reads a u64 at `addr`, which is `offset`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR, &attr) })
}

fn tsc_offset_attr(addr: u64) -> bind::kvm_device_attr {
    bind::kvm_device_attr {
        flags: 0,
        group: bind::KVM_VCPU_TSC_CTRL,
        attr: u64::from(bind::KVM_VCPU_TSC_OFFSET),
        addr,
    }
}

fn check(ret: libc::c_int) -> Result<(), Error> {
    if ret < 0 { Err(Error::last()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;

    #[test]
    fn a_shorter_extended_state_goes_on_as_after_reset_and_a_longer_one_is_refused() {
        harness::need!(kvm);
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let len = XsaveLen::of(&vm, &vcpu);
        let mut state = Vec::new();
        get_xsave(&vcpu, len, &mut state).unwrap();
        assert_eq!(state.len(), len.bytes());

        // The legacy area and the header that says which parts follow: no other than SSE does.
        let (xmm3, present, header_end) = (208, 512, 576);
        state[xmm3] = 0x77;
        state[present] = 3;
        set_xsave(&vcpu, len, &state[..header_end]).unwrap();
        let mut again = Vec::new();
        get_xsave(&vcpu, len, &mut again).unwrap();
        assert_eq!(again[xmm3], 0x77);
        assert_eq!(again.len(), len.bytes());

        let longer = vec![0; len.bytes() + 1];
        assert_eq!(set_xsave(&vcpu, len, &longer).unwrap_err().errno(), libc::E2BIG);
    }

    #[test]
    fn the_tsc_offset_that_is_read_can_be_set() {
        harness::need!(kvm);
        let vcpu = Kvm::new().unwrap().create_vm().unwrap().create_vcpu(0).unwrap();
        match tsc_offset(&vcpu) {
            Ok(offset) => {
                set_tsc_offset(&vcpu, offset).unwrap();
                assert_eq!(tsc_offset(&vcpu).unwrap(), offset);
                assert!(has_tsc_offset(&vcpu));
            }
            Err(_) => assert!(!has_tsc_offset(&vcpu)),
        }
    }
}
