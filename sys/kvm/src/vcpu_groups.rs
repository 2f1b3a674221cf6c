//! The list of a vCPU's state groups: how each is saved and loaded, and in which order.
//!
//! All vCPUs of the VM are stopped and no device of the VMM injects anything while one is saved, and
//! none runs before all are loaded.
//!
//! # Order of saving
//!
//! Interrupts flow from the PIT over PIC and IOAPIC to the LAPICs and from there to a vCPU's events.
//! Saving goes with the flow, the VM's state before the vCPUs', so that one that moves meanwhile is saved
//! in both places rather than in neither. Within a vCPU:
//!
//! 1. **MP state** first: asked for it, KVM first lets the vCPU take an INIT or SIPI that waits, and that
//!    changes registers, segments and LAPIC.
//! 2. **Events** next: asked for them, KVM counts the NMIs that were queued meanwhile; and where the VM
//!    does not have `KVM_CAP_EXCEPTION_PAYLOAD` enabled, it writes the payload of a pending exception to
//!    CR2 or DR6. After this nothing in the list changes events, and nothing but running the vCPU does.
//! 3. Registers, special registers, debug registers, extended control registers, extended state: in any
//!    order.
//! 4. TSC frequency and offset, MSRs, those for guest memory, LAPIC: in any order. A LAPIC timer may
//!    fire at any moment, but KVM only notes it and touches neither LAPIC nor MSRs until the vCPU runs. A
//!    one-shot timer that is noted fires again after the load; a tick of a periodic one, noted between
//!    the stop and the save, is lost, as KVM shows it to nobody.
//!
//! # Order of loading
//!
//! CPUID comes before everything, from [`Cpuid`](crate::Cpuid), before the pause: KVM checks CR4, XCR0,
//! the extended state, most MSRs and the modes of the LAPIC timer against it. Then, against the flow:
//!
//! 1. **TSC frequency**: the offset counts ticks of that frequency. **TSC offset** after it, and before
//!    anything that is measured in guest time.
//! 2. **Special registers**: base and mode of the LAPIC are among them, and so are EFER and the control
//!    registers, against which later groups are checked. Under PAE paging, KVM reads the four page
//!    directory pointers from guest memory here, so the memory slots are there before.
//! 3. **Registers** after the special registers, and before the events: setting them drops a pending
//!    exception.
//! 4. Extended control registers, extended state, debug registers: in any order.
//! 5. **LAPIC** after the special registers: loading it restarts its timer.
//! 6. **MSRs** after the LAPIC: KVM drops a TSC deadline while the LAPIC's timer is not in that mode. The
//!    list has the deadline last, and the TSC, where it is there at all, first.
//! 7. **Events**, after all that could drop or add some.
//! 8. **MP state** after the special registers, which start a halted vCPU if they are those of reset, and
//!    after the events, which KVM refuses together with some MP states.
//! 9. **MSRs for guest memory** last, in a step of their own ([`FINISH_ORDER`]), when the VM's state is
//!    loaded too: some of them make KVM write the guest's clocks at once, and what it writes depends on
//!    the VM's clock.
//!
//! # The TSC
//!
//! Where KVM keeps a guest's TSC as an offset to the host's, the offset is saved, and the TSC goes on
//! through the pause as the host's does. Only where it does not is the TSC itself saved, as an MSR; it
//! then stands still during the pause. So of the offset and MSR 0x10 a state has one. Some KVMs show
//! their guests the host's TSC and accept any offset without effect; the offset they report is zero.
//!
//! A kexec does not reset the host's TSC, so the offset holds across it, and the guest's TSC goes on by the time that passed. The
//! next kernel may measure the TSC's frequency anew and find one that is a little off: it is the same TSC, so
//! one within KVM's tolerance is taken as it is. A host whose TSC was reset is refused when the VM's clock is loaded, which is
//! before the guest runs: the guest's TSC would go back, and what hangs on it (deadlines above all) is loaded by
//! then.
//!
//! A guest whose TSC is scaled to another frequency than the host's is not safe across a kexec: how much its offset counts for hangs
//! on the ratio of the two, which the next kernel may measure anew.

use kvm_bindings::kvm_msr_entry;

use crate::ioctl;
use crate::msr::{self, MsrReader};
use crate::state::{Fault, VcpuGroup, put, take};
use crate::vcpu::Vcpu;

/// By how many parts per million two frequencies may differ that are taken for one: what KVM does unless it is told
/// otherwise (its parameter `tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// The MSRs that a vCPU's state is read into, in buffers made ahead.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    pub(crate) msrs: MsrReader,
    pub(crate) guest_memory_msrs: MsrReader,
}

/// Fills the data of a group.
type Save = fn(&Vcpu, &mut Readers, &mut Vec<u8>) -> Result<(), Fault>;

/// Loads the data of a group, told which MSRs cannot be set.
type Load = fn(&mut Vcpu, &[u8], &[u32]) -> Result<(), Fault>;

/// One group of a vCPU's state.
pub(crate) struct Descriptor {
    pub(crate) group: VcpuGroup,
    /// Whether this vCPU has the group.
    pub(crate) offered: fn(&Vcpu) -> bool,
    /// Whether a state that lacks the group can be loaded into a vCPU that has it.
    pub(crate) optional: bool,
    pub(crate) save: Save,
    pub(crate) load: Load,
}

/// The groups, in the order of saving.
pub(crate) const GROUPS: &[Descriptor] = &[
    Descriptor {
        group: VcpuGroup::MpState,
        offered: |vcpu| vcpu.capabilities().mp_state,
        optional: false,
        save: |vcpu, _, out| {
            put(out, &vcpu.fd().get_mp_state()?);
            Ok(())
        },
        load: |vcpu, data, _| Ok(vcpu.fd().set_mp_state(take(data)?)?),
    },
    Descriptor {
        group: VcpuGroup::Events,
        offered: |vcpu| vcpu.capabilities().vcpu_events,
        optional: false,
        save: |vcpu, _, out| {
            put(out, &vcpu.fd().get_vcpu_events()?);
            Ok(())
        },
        load: |vcpu, data, _| Ok(vcpu.fd().set_vcpu_events(&take(data)?)?),
    },
    Descriptor {
        group: VcpuGroup::Registers,
        offered: |_| true,
        optional: false,
        save: |vcpu, _, out| {
            put(out, &vcpu.fd().get_regs()?);
            Ok(())
        },
        load: |vcpu, data, _| Ok(vcpu.fd().set_regs(&take(data)?)?),
    },
    Descriptor {
        group: VcpuGroup::SpecialRegisters,
        offered: |_| true,
        optional: false,
        save: |vcpu, _, out| {
            put(out, &vcpu.fd().get_sregs()?);
            Ok(())
        },
        load: |vcpu, data, _| {
            let special: kvm_bindings::kvm_sregs = take(data)?;
            vcpu.fd().set_sregs(&special)?;
            // Where the LAPIC is not its own, KVM takes CR8 from the kvm_run page at each entry.
            vcpu.set_entry_cr8(special.cr8);
            Ok(())
        },
    },
    Descriptor {
        group: VcpuGroup::DebugRegisters,
        offered: |vcpu| vcpu.capabilities().debug_registers,
        optional: true,
        save: |vcpu, _, out| {
            put(out, &vcpu.fd().get_debug_regs()?);
            Ok(())
        },
        load: |vcpu, data, _| Ok(vcpu.fd().set_debug_regs(&take(data)?)?),
    },
    Descriptor {
        group: VcpuGroup::Xcrs,
        offered: |vcpu| vcpu.capabilities().xcrs,
        optional: true,
        save: |vcpu, _, out| {
            put(out, &vcpu.fd().get_xcrs()?);
            Ok(())
        },
        load: |vcpu, data, _| Ok(vcpu.fd().set_xcrs(&take(data)?)?),
    },
    Descriptor {
        group: VcpuGroup::Xsave,
        offered: |_| true,
        optional: false,
        save: |vcpu, _, out| Ok(ioctl::get_xsave(vcpu.fd(), vcpu.xsave_len(), out)?),
        load: |vcpu, data, _| {
            let most = vcpu.xsave_len().bytes();
            if data.len() > most {
                return Err(Fault::XsaveLen { len: data.len(), most });
            }
            Ok(ioctl::set_xsave(vcpu.fd(), vcpu.xsave_len(), data)?)
        },
    },
    Descriptor {
        group: VcpuGroup::TscKhz,
        offered: |vcpu| vcpu.has_tsc_khz(),
        optional: true,
        save: |vcpu, _, out| {
            put(out, &vcpu.fd().get_tsc_khz()?.to_le_bytes());
            Ok(())
        },
        load: |vcpu, data, _| {
            let (saved, here) = (u32::from_le_bytes(take(data)?), vcpu.fd().get_tsc_khz()?);
            match frequency(saved, here, vcpu.capabilities().tsc_control) {
                Frequency::Fits => Ok(()),
                Frequency::ToSet => Ok(vcpu.fd().set_tsc_khz(saved)?),
                Frequency::CannotBe => Err(Fault::TscKhz { saved, here }),
            }
        },
    },
    Descriptor {
        group: VcpuGroup::TscOffset,
        offered: Vcpu::has_tsc_offset,
        optional: true,
        save: |vcpu, _, out| {
            put(out, &ioctl::tsc_offset(vcpu.fd())?.to_le_bytes());
            Ok(())
        },
        load: |vcpu, data, _| Ok(ioctl::set_tsc_offset(vcpu.fd(), u64::from_le_bytes(take(data)?))?),
    },
    Descriptor {
        group: VcpuGroup::Msrs,
        offered: |_| true,
        optional: false,
        save: |vcpu, readers, out| {
            out.clear();
            readers.msrs.read(vcpu.fd(), out)
        },
        load: |vcpu, data, fixed| msr::set(vcpu.fd(), &entries(data)?, fixed),
    },
    Descriptor {
        group: VcpuGroup::GuestMemoryMsrs,
        offered: |_| true,
        optional: false,
        save: |vcpu, readers, out| {
            out.clear();
            readers.guest_memory_msrs.read(vcpu.fd(), out)
        },
        load: |vcpu, data, fixed| msr::set(vcpu.fd(), &entries(data)?, fixed),
    },
    Descriptor {
        group: VcpuGroup::Lapic,
        offered: |vcpu| vcpu.irqchip().has_lapic(),
        optional: false,
        save: |vcpu, _, out| {
            put(out, &vcpu.fd().get_lapic()?);
            Ok(())
        },
        load: |vcpu, data, _| Ok(vcpu.fd().set_lapic(&take(data)?)?),
    },
];

/// What is to be done about a frequency of the TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frequency {
    Fits,
    ToSet,
    CannotBe,
}

/// What is to be done for a guest whose TSC ran at `saved` kHz on a vCPU whose TSC runs at `here` kHz.
///
/// Without scaling, KVM takes any frequency that is a little off for the host's, makes the guest's TSC jump after a higher one for
/// ever, and refuses a lower one. So what it would take is left as it is, and the rest is refused.
fn frequency(saved: u32, here: u32, can_scale: bool) -> Frequency {
    let apart = u64::from(saved.abs_diff(here)) * 1_000_000;
    match (saved == here, can_scale) {
        (true, _) => Frequency::Fits,
        (false, true) => Frequency::ToSet,
        (false, false) if apart <= u64::from(here) * TSC_TOLERANCE_PPM => Frequency::Fits,
        (false, false) => Frequency::CannotBe,
    }
}

/// The order of loading, up to what needs the VM's state.
pub(crate) const LOAD_ORDER: &[VcpuGroup] = &[
    VcpuGroup::TscKhz,
    VcpuGroup::TscOffset,
    VcpuGroup::SpecialRegisters,
    VcpuGroup::Registers,
    VcpuGroup::Xcrs,
    VcpuGroup::Xsave,
    VcpuGroup::DebugRegisters,
    VcpuGroup::Lapic,
    VcpuGroup::Msrs,
    VcpuGroup::Events,
    VcpuGroup::MpState,
];

/// What is loaded after the VM's state.
pub(crate) const FINISH_ORDER: &[VcpuGroup] = &[VcpuGroup::GuestMemoryMsrs];

/// The groups of one of the two steps of loading, in its order.
pub(crate) fn in_order(order: &[VcpuGroup]) -> impl Iterator<Item = &'static Descriptor> {
    order.iter().filter_map(|&group| GROUPS.iter().find(|entry| entry.group == group))
}

/// The registers of an MSR group.
pub(crate) fn entries(data: &[u8]) -> Result<Vec<kvm_msr_entry>, Fault> {
    data.chunks(size_of::<kvm_msr_entry>()).map(take).collect()
}

/// MSR 0x10 and the deadline have their places, the others follow KVM's order.
pub(crate) fn sort_msrs(indices: &mut [u32]) {
    indices.sort_by_key(|&index| match index {
        msr::TSC => 0,
        msr::TSC_DEADLINE => 2,
        _ => 1,
    });
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_group_is_saved_once_and_loaded_once() {
        let all: BTreeSet<_> = VcpuGroup::ALL.iter().copied().collect();
        let saved: Vec<_> = GROUPS.iter().map(|entry| entry.group).collect();
        let loaded: Vec<_> = LOAD_ORDER.iter().chain(FINISH_ORDER).copied().collect();
        for order in [saved, loaded] {
            assert_eq!(order.len(), all.len());
            assert_eq!(order.into_iter().collect::<BTreeSet<_>>(), all);
        }
    }

    #[test]
    fn a_tsc_that_was_measured_anew_is_the_same_and_another_one_is_refused_or_scaled() {
        let here = 2_600_000;
        for (saved, unscaled) in [
            (here, Frequency::Fits),
            (here + 650, Frequency::Fits),
            (here - 650, Frequency::Fits),
            (here + 651, Frequency::CannotBe),
            (here - 651, Frequency::CannotBe),
            (0, Frequency::CannotBe),
            (u32::MAX, Frequency::CannotBe),
        ] {
            assert_eq!(frequency(saved, here, false), unscaled, "{saved}");
            let scaled = if saved == here { Frequency::Fits } else { Frequency::ToSet };
            assert_eq!(frequency(saved, here, true), scaled, "{saved}");
        }
        assert_eq!(frequency(u32::MAX, u32::MAX - 1, false), Frequency::Fits);
        assert_eq!(frequency(1, 0, false), Frequency::CannotBe);
    }

    #[test]
    fn the_tsc_comes_first_and_its_deadline_last() {
        let mut indices = [0x174, msr::TSC_DEADLINE, 0xc000_0080, msr::TSC, 0x277];
        sort_msrs(&mut indices);
        assert_eq!(indices, [msr::TSC, 0x174, 0xc000_0080, 0x277, msr::TSC_DEADLINE]);
    }
}
