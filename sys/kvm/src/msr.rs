//! Model-specific registers: read and set in chunks, with every count checked.
//!
//! `KVM_GET_MSRS` and `KVM_SET_MSRS` stop at the first register they refuse and answer with how many
//! they did before it: no error, and the rest untouched. Here a count that falls short is an error that
//! names the register.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Error, VcpuFd};
use zerocopy::IntoBytes;

use crate::state::Fault;

/// `IA32_TIME_STAMP_COUNTER`.
pub(crate) const TSC: u32 = 0x10;

/// `IA32_TSC_DEADLINE`: when the LAPIC's timer is to fire, if its mode is to compare with the TSC.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

/// Registers per ioctl. KVM takes up to 255.
const CHUNK: usize = 128;

/// Whether setting the register makes KVM write, now or at the next entry, to the guest memory that the
/// value points to: the clocks, steal time, async page faults and end-of-interrupt flag that KVM shares
/// with its guests, and the Hyper-V registers.
pub(crate) const fn writes_guest_memory(index: u32) -> bool {
    matches!(index, 0x11 | 0x12 | 0x4b56_4d00..=0x4b56_4dff | 0x4000_0000..=0x4000_01ff)
}

/// Registers that are to be read at one time, in buffers that are ready for it.
#[derive(Debug, Default)]
pub(crate) struct MsrReader {
    chunks: Vec<Msrs>,
}

impl MsrReader {
    pub(crate) fn new(indices: &[u32]) -> Result<Self, Error> {
        let entries: Vec<_> =
            indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let chunks = entries.chunks(CHUNK).map(msrs).collect::<Result<_, _>>()?;
        Ok(Self { chunks })
    }

    /// Reads all of the registers and puts them behind `out`, as the kernel's `struct kvm_msr_entry`.
    pub(crate) fn read(&mut self, vcpu: &VcpuFd, out: &mut Vec<u8>) -> Result<(), Fault> {
        for chunk in &mut self.chunks {
            let read = vcpu.get_msrs(chunk).map_err(Fault::Kvm)?;
            if let Some(refused) = chunk.as_slice().get(read) {
                return Err(Fault::MsrRead { index: refused.index });
            }
            out.extend_from_slice(chunk.as_slice().as_bytes());
        }
        Ok(())
    }

    pub(crate) fn indices(&self) -> impl Iterator<Item = u32> + '_ {
        self.chunks.iter().flat_map(Msrs::as_slice).map(|entry| entry.index)
    }
}

/// Which registers KVM lets be read on this vCPU, with their values, and which not.
pub(crate) fn read_each(vcpu: &VcpuFd, indices: &[u32]) -> Result<(Vec<kvm_msr_entry>, Vec<u32>), Error> {
    let mut values = Vec::with_capacity(indices.len());
    let mut refused = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let (chunk, _) = rest.split_at(rest.len().min(CHUNK));
        let entries: Vec<_> =
            chunk.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut chunk = msrs(&entries)?;
        let read = vcpu.get_msrs(&mut chunk)?;
        values.extend(chunk.as_slice().iter().take(read));
        rest = rest.get(read..).unwrap_or(&[]);
        if let (true, Some((&index, behind))) = (read < entries.len(), rest.split_first()) {
            refused.push(index);
            rest = behind;
        }
    }
    Ok((values, refused))
}

/// Which of the registers KVM refuses to set, tried with the values given.
pub(crate) fn refused_by_set(vcpu: &VcpuFd, values: &[kvm_msr_entry]) -> Result<Vec<u32>, Error> {
    let mut refused = Vec::new();
    let mut rest = values;
    while !rest.is_empty() {
        let chunk_len = rest.len().min(CHUNK);
        let set = vcpu.set_msrs(&msrs(&rest[..chunk_len])?)?;
        rest = rest.get(set..).unwrap_or(&[]);
        if let (true, Some((entry, behind))) = (set < chunk_len, rest.split_first()) {
            refused.push(entry.index);
            rest = behind;
        }
    }
    Ok(refused)
}

/// Sets the registers, in their order. Those in `fixed`, which KVM does not let be set, have to have their
/// values already.
pub(crate) fn set(vcpu: &VcpuFd, values: &[kvm_msr_entry], fixed: &[u32]) -> Result<(), Fault> {
    let is_fixed = |entry: &&kvm_msr_entry| fixed.contains(&entry.index);
    let settable: Vec<_> = values.iter().filter(|entry| !is_fixed(entry)).copied().collect();
    for chunk in settable.chunks(CHUNK) {
        let set = vcpu.set_msrs(&msrs(chunk).map_err(Fault::Kvm)?).map_err(Fault::Kvm)?;
        if let Some(refused) = chunk.get(set) {
            return Err(Fault::MsrSet { index: refused.index, value: refused.data });
        }
    }
    for wanted in values.iter().filter(is_fixed) {
        let mut one =
            msrs(&[kvm_msr_entry { index: wanted.index, ..Default::default() }]).map_err(Fault::Kvm)?;
        if vcpu.get_msrs(&mut one).map_err(Fault::Kvm)? != 1 {
            return Err(Fault::MsrRead { index: wanted.index });
        }
        let has = one.as_slice().first().map_or(0, |entry| entry.data);
        if has != wanted.data {
            return Err(Fault::MsrFixed { index: wanted.index, wanted: wanted.data, has });
        }
    }
    Ok(())
}

fn msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(entries).map_err(|_| Error::new(libc::E2BIG))
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;
    use crate::vm::{Irqchip, VmBuilder};

    #[test]
    fn the_registers_that_share_memory_with_the_guest_are_known() {
        let kvmclock = [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01];
        let steal_time_and_async_faults = [0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04, 0x4b56_4d06];
        let hyper_v_hypercall_page_and_clock_page = [0x4000_0001, 0x4000_0021];
        for index in kvmclock
            .into_iter()
            .chain(steal_time_and_async_faults)
            .chain(hyper_v_hypercall_page_and_clock_page)
        {
            assert!(writes_guest_memory(index), "{index:#x}");
        }
        let lstar = 0xc000_0082;
        for index in [TSC, TSC_DEADLINE, lstar] {
            assert!(!writes_guest_memory(index), "{index:#x}");
        }
    }

    #[test]
    fn a_register_that_kvm_does_not_read_is_named() {
        harness::need!(kvm);
        let vm = VmBuilder::create(&Kvm::new().unwrap()).unwrap().finish(Irqchip::None).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let (sysenter_cs, bogus, sysenter_esp) = (0x174, 0x0bad_0bad, 0x175);

        let mut all = MsrReader::new(&[sysenter_cs, bogus, sysenter_esp]).unwrap();
        let stopped = all.read(vcpu.fd(), &mut Vec::new()).unwrap_err();
        assert!(matches!(stopped, Fault::MsrRead { index } if index == bogus), "{stopped:?}");

        let (values, refused) = read_each(vcpu.fd(), &[bogus, sysenter_cs, bogus, sysenter_esp]).unwrap();
        assert_eq!(values.iter().map(|entry| entry.index).collect::<Vec<_>>(), [sysenter_cs, sysenter_esp]);
        assert_eq!(refused, [bogus, bogus]);

        let entry = |index| kvm_msr_entry { index, ..Default::default() };
        let refused = refused_by_set(vcpu.fd(), &[entry(sysenter_cs), entry(bogus), entry(sysenter_esp)]);
        assert_eq!(refused.unwrap(), [bogus]);
    }

    #[test]
    fn registers_beyond_one_ioctl_are_read_and_set_too() {
        harness::need!(kvm);
        let vm = VmBuilder::create(&Kvm::new().unwrap()).unwrap().finish(Irqchip::None).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        // The same few registers over and over: what counts is how many entries there are.
        let (cs, esp) = (0x174, 0x175);
        let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let mut values = vec![entry(cs, 1); 2 * CHUNK];
        values.push(entry(esp, 0x1234));
        set(vcpu.fd(), &values, &[]).unwrap();

        let indices: Vec<_> = values.iter().map(|entry| entry.index).collect();
        let mut bytes = Vec::new();
        MsrReader::new(&indices).unwrap().read(vcpu.fd(), &mut bytes).unwrap();
        assert_eq!(bytes, values.as_bytes());
        assert_eq!(read_each(vcpu.fd(), &indices).unwrap().0, values);

        let bogus = 0x0bad_0bad;
        values.insert(2 * CHUNK, entry(bogus, 5));
        let stopped = set(vcpu.fd(), &values, &[]).unwrap_err();
        assert!(matches!(stopped, Fault::MsrSet { index, value: 5 } if index == bogus), "{stopped:?}");
        assert_eq!(refused_by_set(vcpu.fd(), &values).unwrap(), [bogus]);
    }
}
