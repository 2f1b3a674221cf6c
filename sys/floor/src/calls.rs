//! The calls of a hop: what is read from one VM and its vCPU, and written into the other.
//!
//! Order and choice follow `tideover-kvm`, whose documentation says why.

use std::ffi::c_ulong;
use std::os::fd::AsRawFd;

use kvm_bindings as bind;
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{Msrs, Xsave};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::vm::{Vm, extension};
use crate::{FloorError, call, kvm};

/// `_IOW(KVMIO, 0xe1 and so on, struct kvm_device_attr)`, for vCPUs left out by kvm-ioctls.
const KVM_SET_DEVICE_ATTR: c_ulong = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: c_ulong = 0x4018_aee2;
const KVM_HAS_DEVICE_ATTR: c_ulong = 0x4018_aee3;
const _: () = assert!(size_of::<bind::kvm_device_attr>() == 0x18);

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;

/// Whether setting the register makes KVM write guest memory: such ones come last.
const fn writes_guest_memory(index: u32) -> bool {
    matches!(index, 0x11 | 0x12 | 0x4b56_4d00..=0x4b56_4dff | 0x4000_0000..=0x4000_01ff)
}

/// Room for all that is read, made before the guest is stopped, and what the KVM at hand offers of it.
pub(crate) struct Calls {
    clock: Option<bind::kvm_clock_data>,
    sets_realtime: bool,
    nested: Option<Box<KvmNestedStateBuffer>>,
    mp_state: Option<bind::kvm_mp_state>,
    events: Option<bind::kvm_vcpu_events>,
    regs: bind::kvm_regs,
    sregs: bind::kvm_sregs,
    debug: Option<bind::kvm_debugregs>,
    xcrs: Option<bind::kvm_xcrs>,
    // With room for what KVM_CAP_XSAVE2 said when a vCPU was there.
    xsave: Xsave,
    xsave2: bool,
    tsc_khz: Option<u32>,
    tsc_offset: Option<u64>,
    msrs: Msrs,
    guest_memory_msrs: Msrs,
    lapic: bind::kvm_lapic_state,
}

impl Calls {
    /// Finds out what can be called, on a VM that has not run and is not used for anything else after.
    pub(crate) fn prepare(kvm_device: &Kvm, vm: &Vm) -> Result<Self, FloorError> {
        let has = |cap| extension(&vm.fd, cap) > 0;
        let tsc_offset = has_tsc_offset(&vm.vcpu);
        let room = usize::try_from(extension(&vm.fd, bind::KVM_CAP_XSAVE2)).unwrap_or_default();
        let words = room.saturating_sub(size_of::<bind::kvm_xsave>()).div_ceil(size_of::<u32>());
        let (guest_memory, others) = msrs_of(kvm_device, &vm.vcpu, tsc_offset)?;
        Ok(Self {
            clock: has(bind::KVM_CAP_ADJUST_CLOCK).then(Default::default),
            sets_realtime: extension(&vm.fd, bind::KVM_CAP_ADJUST_CLOCK) & bind::KVM_CLOCK_REALTIME != 0,
            nested: has(bind::KVM_CAP_NESTED_STATE).then(Box::default),
            mp_state: has(bind::KVM_CAP_MP_STATE).then(Default::default),
            events: has(bind::KVM_CAP_VCPU_EVENTS).then(Default::default),
            regs: Default::default(),
            sregs: Default::default(),
            debug: has(bind::KVM_CAP_DEBUGREGS).then(Default::default),
            xcrs: has(bind::KVM_CAP_XCRS).then(Default::default),
            xsave: Xsave::new(words).map_err(|_| no_room())?,
            xsave2: room > 0,
            tsc_khz: vm.vcpu.get_tsc_khz().ok(),
            tsc_offset: tsc_offset.then_some(0),
            msrs: msrs(&others)?,
            guest_memory_msrs: msrs(&guest_memory)?,
            lapic: Default::default(),
        })
    }

    /// The GET ioctls.
    pub(crate) fn save(&mut self, vm: &Vm) -> Result<(), FloorError> {
        let failed = kvm("read the state");
        let vcpu = &vm.vcpu;
        if let Some(clock) = &mut self.clock {
            *clock = vm.fd.get_clock().map_err(&failed)?;
        }
        if let Some(nested) = &mut self.nested {
            **nested = KvmNestedStateBuffer::empty();
            vcpu.nested_state(nested).map_err(&failed)?;
        }
        if let Some(mp_state) = &mut self.mp_state {
            *mp_state = vcpu.get_mp_state().map_err(&failed)?;
        }
        if let Some(events) = &mut self.events {
            *events = vcpu.get_vcpu_events().map_err(&failed)?;
        }
        self.regs = vcpu.get_regs().map_err(&failed)?;
        self.sregs = vcpu.get_sregs().map_err(&failed)?;
        if let Some(debug) = &mut self.debug {
            *debug = vcpu.get_debug_regs().map_err(&failed)?;
        }
        if let Some(xcrs) = &mut self.xcrs {
            *xcrs = vcpu.get_xcrs().map_err(&failed)?;
        }
        if self.xsave2 {
            // SAFETY: `xsave` has the room that KVM said for the first vCPU of this process. From then on the
            // kernel lets the process no longer ask for more guest state, so KVM writes no more.
            unsafe { vcpu.get_xsave2(&mut self.xsave) }.map_err(&failed)?;
        } else {
            let xsave = vcpu.get_xsave().map_err(&failed)?;
            // SAFETY: the length of what follows the structure is left as it is.
            unsafe { self.xsave.as_mut_fam_struct() }.xsave = xsave;
        }
        if let Some(khz) = &mut self.tsc_khz {
            *khz = vcpu.get_tsc_khz().map_err(&failed)?;
        }
        if let Some(offset) = &mut self.tsc_offset {
            get_tsc_offset(vcpu, offset)?;
        }
        for list in [&mut self.msrs, &mut self.guest_memory_msrs] {
            let given = list.as_slice().len();
            all_of(vcpu.get_msrs(list).map_err(&failed)?, given)?;
        }
        self.lapic = vcpu.get_lapic().map_err(&failed)?;
        Ok(())
    }

    /// The SET ioctls.
    pub(crate) fn load(&self, vm: &Vm) -> Result<(), FloorError> {
        let failed = kvm("write the state");
        let vcpu = &vm.vcpu;
        if let Some(khz) = self.tsc_khz
            && vcpu.get_tsc_khz().map_err(&failed)? != khz
        {
            vcpu.set_tsc_khz(khz).map_err(&failed)?;
        }
        if let Some(offset) = &self.tsc_offset {
            set_tsc_offset(vcpu, offset)?;
        }
        vcpu.set_sregs(&self.sregs).map_err(&failed)?;
        vcpu.set_regs(&self.regs).map_err(&failed)?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(&failed)?;
        }
        // SAFETY: as in `save`: KVM reads no more than it wrote there.
        unsafe { vcpu.set_xsave2(&self.xsave) }.map_err(&failed)?;
        if let Some(debug) = &self.debug {
            vcpu.set_debug_regs(debug).map_err(&failed)?;
        }
        vcpu.set_lapic(&self.lapic).map_err(&failed)?;
        set_msrs(vcpu, &self.msrs)?;
        if let Some(events) = &self.events {
            vcpu.set_vcpu_events(events).map_err(&failed)?;
        }
        if let Some(mp_state) = self.mp_state {
            vcpu.set_mp_state(mp_state).map_err(&failed)?;
        }
        if let Some(saved) = &self.clock {
            // Asked here, too, as who loads a state from elsewhere has to: did the host's clock go back?
            vm.fd.get_clock().map_err(&failed)?;
            vm.fd.set_clock(&self.clock_to_set(saved)).map_err(&failed)?;
        }
        set_msrs(vcpu, &self.guest_memory_msrs)
    }

    fn clock_to_set(&self, saved: &bind::kvm_clock_data) -> bind::kvm_clock_data {
        let mut clock = bind::kvm_clock_data { clock: saved.clock, ..Default::default() };
        if self.sets_realtime && saved.flags & bind::KVM_CLOCK_REALTIME != 0 {
            clock.flags = bind::KVM_CLOCK_REALTIME;
            clock.realtime = saved.realtime;
        }
        clock
    }
}

/// The registers that make up the state and can be read and set here: those whose setting makes KVM write guest
/// memory, and the others.
fn msrs_of(kvm_device: &Kvm, vcpu: &VcpuFd, tsc_offset: bool) -> Result<(Vec<u32>, Vec<u32>), FloorError> {
    let list = kvm_device.get_msr_index_list().map_err(kvm("list model-specific registers"))?;
    let mut indices = list.as_slice().to_vec();
    indices.retain(|&index| !(index == TSC && tsc_offset) && is_movable(vcpu, index));
    indices.sort_by_key(|&index| match index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(indices.into_iter().partition(|&index| writes_guest_memory(index)))
}

fn is_movable(vcpu: &VcpuFd, index: u32) -> bool {
    let Ok(mut one) = msrs(&[index]) else { return false };
    matches!(vcpu.get_msrs(&mut one), Ok(1)) && matches!(vcpu.set_msrs(&one), Ok(1))
}

fn msrs(indices: &[u32]) -> Result<Msrs, FloorError> {
    let entries: Vec<_> =
        indices.iter().map(|&index| bind::kvm_msr_entry { index, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| no_room())
}

fn set_msrs(vcpu: &VcpuFd, list: &Msrs) -> Result<(), FloorError> {
    let set = vcpu.set_msrs(list).map_err(kvm("write the state"))?;
    all_of(set, list.as_slice().len())
}

fn all_of(taken: usize, given: usize) -> Result<(), FloorError> {
    if taken == given { Ok(()) } else { Err(FloorError::Msrs { taken, given }) }
}

fn no_room() -> FloorError {
    kvm("make room for the state")(kvm_ioctls::Error::new(libc::E2BIG))
}

fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    let attr = tsc_offset_attr(0);
    // SAFETY: only the attribute's name is looked at.
    unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_HAS_DEVICE_ATTR, &raw const attr) == 0 }
}

fn get_tsc_offset(vcpu: &VcpuFd, offset: &mut u64) -> Result<(), FloorError> {
    let attr = tsc_offset_attr((&raw mut *offset).expose_provenance() as u64);
    // SAFETY: for this attribute KVM writes a u64 at `addr`, which is `offset`.
    let ret = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &raw const attr) };
    if ret == 0 { Ok(()) } else { Err(call("read the TSC's offset")) }
}

fn set_tsc_offset(vcpu: &VcpuFd, offset: &u64) -> Result<(), FloorError> {
    let attr = tsc_offset_attr((&raw const *offset).expose_provenance() as u64);
    // SAFETY: for this attribute KVM reads a u64 at `addr`, which is `offset`.
    let ret = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attr) };
    if ret == 0 { Ok(()) } else { Err(call("write the TSC's offset")) }
}

fn tsc_offset_attr(addr: u64) -> bind::kvm_device_attr {
    bind::kvm_device_attr {
        flags: 0,
        group: bind::KVM_VCPU_TSC_CTRL,
        attr: u64::from(bind::KVM_VCPU_TSC_OFFSET),
        addr,
    }
}
