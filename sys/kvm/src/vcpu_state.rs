//! The state of a vCPU, saved and loaded within the pause.
//!
//! Whatever can be found out or set aside before the pause is: a [`Saver`] and a [`Loader`] are prepared
//! for a vCPU while the guest still runs elsewhere or not yet. In which order groups are saved and loaded,
//! and why, is told with their list, in `vcpu_groups`.

use std::fmt;

use kvm_bindings as bind;
use kvm_bindings::nested::KvmNestedStateBuffer;
use zerocopy::IntoBytes;

use crate::contents::Contents;
use crate::msr::{self, MsrReader};
use crate::state::{Fault, State, StateError, VcpuGroup};
use crate::vcpu::{LoadStage, Vcpu};
use crate::vcpu_groups::{FINISH_ORDER, GROUPS, LOAD_ORDER, Readers, entries, in_order, sort_msrs};

/// Why a [`Saver`] or [`Loader`] could not be prepared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// KVM failed while it was asked which MSRs can be read and set.
    #[error("which MSRs can be saved and loaded could not be found out")]
    Msrs(#[source] kvm_ioctls::Error),
}

/// Why [`Saver::save`] failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// A group could not be saved.
    #[error("{group} could not be saved")]
    Group {
        /// The group.
        group: VcpuGroup,
        /// What happened.
        #[source]
        source: Fault,
    },
    /// State that has no group could not be looked at, or is there.
    #[error("the vCPU has state that cannot be saved")]
    Unsaveable(#[source] Fault),
    /// The vCPU itself has a state loaded only in part.
    #[error("the vCPU's own state is loaded only in part")]
    PartlyLoaded,
}

/// Why [`Loader::load`], [`Loader::finish`] or [`Loader::check`] refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The state has a group that this vCPU, in this VM, on this KVM, does not have.
    #[error("the state holds {group}, which this vCPU does not have")]
    CannotLoad {
        /// The group.
        group: VcpuGroup,
    },
    /// The state lacks a group that this vCPU has and cannot do without.
    #[error("the state lacks {group}, which this vCPU has")]
    Lacks {
        /// The group.
        group: VcpuGroup,
    },
    /// The state has an MSR that this KVM does not keep.
    #[error("the state holds MSR {index:#x}, which this KVM does not keep")]
    UnknownMsr {
        /// The register.
        index: u32,
    },
    /// A group could not be loaded.
    #[error("{group} could not be loaded")]
    Group {
        /// The group.
        group: VcpuGroup,
        /// What happened.
        #[source]
        source: Fault,
    },
    /// [`Loader::finish`] was called for a vCPU that [`Loader::load`] did not load.
    #[error("there is nothing loaded to finish")]
    NothingToFinish,
}

/// The state of a vCPU that is stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuState(State<VcpuGroup>);

impl VcpuState {
    /// The state as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.0.encode()
    }

    /// The state as bytes, behind those that `bytes` already holds.
    pub fn encode_into(&self, bytes: &mut Vec<u8>) {
        self.0.encode_into(bytes);
    }

    /// The state whose bytes these are.
    ///
    /// # Errors
    ///
    /// [`StateError`]. What comes through has known groups only, each of a length that it can have; what
    /// the values are worth is for KVM to judge at the load.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        State::decode(bytes).map(Self)
    }

    /// Groups that are there, in the order in which they were saved.
    pub fn groups(&self) -> impl Iterator<Item = VcpuGroup> + '_ {
        self.0.present()
    }

    /// Groups that the KVM that saved the state could not do.
    pub fn absent(&self) -> impl Iterator<Item = VcpuGroup> + '_ {
        self.0.absent()
    }

    /// The bytes of a group: the kernel's structure.
    #[must_use]
    pub fn data(&self, group: VcpuGroup) -> Option<&[u8]> {
        self.0.data(group)
    }

    /// The general registers.
    #[must_use]
    pub fn registers(&self) -> Option<bind::kvm_regs> {
        self.0.get(VcpuGroup::Registers)
    }

    /// The special registers.
    #[must_use]
    pub fn special_registers(&self) -> Option<bind::kvm_sregs> {
        self.0.get(VcpuGroup::SpecialRegisters)
    }

    /// The model-specific registers, those for guest memory included.
    #[must_use]
    pub fn msrs(&self) -> Vec<bind::kvm_msr_entry> {
        [VcpuGroup::Msrs, VcpuGroup::GuestMemoryMsrs]
            .into_iter()
            .filter_map(|group| entries(self.0.data(group)?).ok())
            .flatten()
            .collect()
    }
}

/// Saves one vCPU, with everything ready that can be made ready before the pause.
pub struct Saver {
    readers: Readers,
    unreadable: Vec<u32>,
    nested: Option<Box<KvmNestedStateBuffer>>,
    state: VcpuState,
}

impl Saver {
    /// Finds out what of this vCPU can be saved, and makes the buffers.
    ///
    /// Its CPUID is to be set: on it depends which MSRs the vCPU has. To be called on a vCPU that is not
    /// running, as KVM makes the call wait otherwise; best right after it was made.
    ///
    /// # Errors
    ///
    /// See [`PrepareError`].
    pub fn prepare(vcpu: &Vcpu) -> Result<Self, PrepareError> {
        let indices = msr_indices(vcpu);
        let (readable, unreadable) = msr::read_each(vcpu.fd(), &indices).map_err(PrepareError::Msrs)?;
        let (mut for_guest_memory, mut others): (Vec<_>, Vec<_>) =
            readable.iter().map(|entry| entry.index).partition(|&index| msr::writes_guest_memory(index));
        sort_msrs(&mut for_guest_memory);
        sort_msrs(&mut others);
        let order: Vec<_> = GROUPS.iter().map(|entry| entry.group).collect();
        let offered = |group| GROUPS.iter().any(|entry| entry.group == group && (entry.offered)(vcpu));
        let mut saver = Self {
            readers: Readers {
                msrs: MsrReader::new(&others).map_err(PrepareError::Msrs)?,
                guest_memory_msrs: MsrReader::new(&for_guest_memory).map_err(PrepareError::Msrs)?,
            },
            unreadable,
            nested: vcpu.capabilities().nested_state.then(Box::default),
            state: VcpuState(State::of(&order, offered)),
        };
        saver.reserve(vcpu);
        Ok(saver)
    }

    /// Makes room for each group, so that none is made within the pause.
    fn reserve(&mut self, vcpu: &Vcpu) {
        let msr_len = size_of::<bind::kvm_msr_entry>();
        for (group, data) in self.state.0.fill() {
            data.reserve(match group {
                VcpuGroup::Xsave => vcpu.xsave_len().bytes(),
                VcpuGroup::Msrs => self.readers.msrs.indices().count() * msr_len,
                VcpuGroup::GuestMemoryMsrs => self.readers.guest_memory_msrs.indices().count() * msr_len,
                _ => size_of::<bind::kvm_lapic_state>(),
            });
        }
    }

    /// MSRs that KVM lists and does not let be read on this vCPU. They are not saved.
    #[must_use]
    pub fn unreadable_msrs(&self) -> &[u32] {
        &self.unreadable
    }

    /// What the saved state is going to hold, so that the successor can tell ahead whether it can load it.
    #[must_use]
    pub fn contents(&self, vcpu: &Vcpu) -> Contents {
        let msrs = self.readers.msrs.indices().chain(self.readers.guest_memory_msrs.indices());
        Contents::new(self.state.groups(), msrs, vcpu.xsave_len().bytes())
    }

    /// Saves the vCPU, which is the one that this was prepared for, and is stopped. The state that is
    /// answered stays here until the next save.
    ///
    /// # Errors
    ///
    /// See [`SaveError`]. The vCPU is as it was and can run on.
    pub fn save(&mut self, vcpu: &Vcpu) -> Result<&VcpuState, SaveError> {
        if vcpu.load_stage() != LoadStage::Whole {
            return Err(SaveError::PartlyLoaded);
        }
        if let Some(buffer) = &mut self.nested {
            **buffer = KvmNestedStateBuffer::empty();
            vcpu.fd().nested_state(buffer).map_err(|error| SaveError::Unsaveable(Fault::Kvm(error)))?;
            if uses_nested(buffer) {
                return Err(SaveError::Unsaveable(Fault::Nested));
            }
        }
        for (group, data) in self.state.0.fill() {
            let Some(entry) = GROUPS.iter().find(|entry| entry.group == group) else { continue };
            (entry.save)(vcpu, &mut self.readers, data)
                .map_err(|source| SaveError::Group { group, source })?;
        }
        Ok(&self.state)
    }
}

impl fmt::Debug for Saver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Saver")
            .field("readers", &self.readers)
            .field("unreadable", &self.unreadable)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// Loads one vCPU, with everything found out that can be before the pause.
#[derive(Debug)]
pub struct Loader {
    fixed_msrs: Vec<u32>,
}

impl Loader {
    /// Finds out which MSRs of this vCPU can be set, by setting each to the value that it has.
    ///
    /// Its CPUID is to be loaded, and nothing else yet.
    ///
    /// # Errors
    ///
    /// See [`PrepareError`].
    pub fn prepare(vcpu: &Vcpu) -> Result<Self, PrepareError> {
        let (mut values, unreadable) =
            msr::read_each(vcpu.fd(), &msr_indices(vcpu)).map_err(PrepareError::Msrs)?;
        // Of these, the one moves by itself, and those that are in use already would write guest memory.
        values.retain(|entry| {
            entry.index != msr::TSC && !(msr::writes_guest_memory(entry.index) && entry.data != 0)
        });
        let mut fixed_msrs = msr::refused_by_set(vcpu.fd(), &values).map_err(PrepareError::Msrs)?;
        fixed_msrs.extend(unreadable);
        Ok(Self { fixed_msrs })
    }

    /// MSRs that KVM lists and does not let be set on this vCPU. A state loads if they have their values
    /// already.
    #[must_use]
    pub fn fixed_msrs(&self) -> &[u32] {
        &self.fixed_msrs
    }

    /// Refuses now what [`load`](Self::load) could not load later.
    ///
    /// # Errors
    ///
    /// See [`LoadError`].
    pub fn check(&self, vcpu: &Vcpu, contents: &Contents) -> Result<(), LoadError> {
        for entry in in_order(LOAD_ORDER).chain(in_order(FINISH_ORDER)) {
            let group = entry.group;
            match (contents.has_group(group), (entry.offered)(vcpu)) {
                (true, false) => return Err(LoadError::CannotLoad { group }),
                (false, true) if !entry.optional => return Err(LoadError::Lacks { group }),
                _ => {}
            }
        }
        let known = &vcpu.capabilities().msr_indices;
        if let Some(index) = contents.msr_indices().find(|index| !known.contains(index)) {
            return Err(LoadError::UnknownMsr { index });
        }
        let (len, most) = (contents.xsave_len_bytes(), vcpu.xsave_len().bytes());
        if len > most {
            let source = Fault::XsaveLen { len, most };
            return Err(LoadError::Group { group: VcpuGroup::Xsave, source });
        }
        Ok(())
    }

    /// Loads everything but the MSRs that make KVM write guest memory: this is for
    /// [`finish`](Self::finish), when all vCPUs and the VM's own state are loaded.
    ///
    /// The vCPU, which is the one that this was prepared for, runs no more until `finish` succeeded.
    ///
    /// # Errors
    ///
    /// See [`LoadError`]. The vCPU is then loaded in part; another state may be loaded into it.
    pub fn load(&self, vcpu: &mut Vcpu, state: &VcpuState) -> Result<(), LoadError> {
        vcpu.set_load_stage(LoadStage::Partly);
        self.load_groups(vcpu, state, LOAD_ORDER)?;
        vcpu.set_load_stage(LoadStage::ToFinish);
        Ok(())
    }

    /// Loads the MSRs that make KVM write guest memory. The vCPU can run then.
    ///
    /// # Errors
    ///
    /// See [`LoadError`].
    pub fn finish(&self, vcpu: &mut Vcpu, state: &VcpuState) -> Result<(), LoadError> {
        if vcpu.load_stage() != LoadStage::ToFinish {
            return Err(LoadError::NothingToFinish);
        }
        vcpu.set_load_stage(LoadStage::Partly);
        self.load_groups(vcpu, state, FINISH_ORDER)?;
        vcpu.set_load_stage(LoadStage::Whole);
        Ok(())
    }

    fn load_groups(&self, vcpu: &mut Vcpu, state: &VcpuState, order: &[VcpuGroup]) -> Result<(), LoadError> {
        for entry in in_order(order) {
            let group = entry.group;
            match (state.data(group), (entry.offered)(vcpu)) {
                (Some(data), true) => (entry.load)(vcpu, data, &self.fixed_msrs)
                    .map_err(|source| LoadError::Group { group, source })?,
                (Some(_), false) => return Err(LoadError::CannotLoad { group }),
                (None, false) => {}
                // Left out and said so: the guest there had none, and has here what a reset gives.
                (None, true) if entry.optional && state.absent().any(|absent| absent == group) => {}
                (None, true) => return Err(LoadError::Lacks { group }),
            }
        }
        Ok(())
    }
}

/// The MSRs that make up the state of this vCPU.
fn msr_indices(vcpu: &Vcpu) -> Vec<u32> {
    let indices = vcpu.capabilities().msr_indices.iter().copied();
    indices.filter(|&index| !(index == msr::TSC && vcpu.has_tsc_offset())).collect()
}

/// Whether the guest is a hypervisor that is, or may be, in the middle of something.
fn uses_nested(state: &KvmNestedStateBuffer) -> bool {
    let header = size_of::<bind::kvm_nested_state>();
    let longer_than_header = usize::try_from(state.size).is_ok_and(|size| size > header);
    let flags = u32::from(state.flags);
    let busy = bind::KVM_STATE_NESTED_GUEST_MODE | bind::KVM_STATE_NESTED_RUN_PENDING;
    let armed = match u32::from(state.format) {
        // The first field of the header is the address that VMXON was given, or all ones.
        bind::KVM_STATE_NESTED_FORMAT_VMX => header_start(state) != [0xff; 8],
        // An SVM guest that holds off interrupts with CLGI.
        bind::KVM_STATE_NESTED_FORMAT_SVM => flags & bind::KVM_STATE_NESTED_GIF_SET == 0,
        _ => true,
    };
    longer_than_header || flags & busy != 0 || armed
}

/// The first eight bytes of the header that goes with the format.
fn header_start(state: &KvmNestedStateBuffer) -> &[u8] {
    let start = std::mem::offset_of!(KvmNestedStateBuffer, hdr);
    state.as_bytes().get(start..start + 8).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use zerocopy::FromBytes;

    use super::*;

    /// What KVM answers for a guest of this format, with the header's first field.
    fn nested(format: u32, flags: u32, first_field: u64, size: u32) -> KvmNestedStateBuffer {
        let mut bytes = KvmNestedStateBuffer::empty().as_bytes().to_vec();
        bytes[0..2].copy_from_slice(&u16::try_from(flags).unwrap().to_le_bytes());
        bytes[2..4].copy_from_slice(&u16::try_from(format).unwrap().to_le_bytes());
        bytes[4..8].copy_from_slice(&size.to_le_bytes());
        bytes[8..16].copy_from_slice(&first_field.to_le_bytes());
        KvmNestedStateBuffer::read_from_bytes(&bytes).unwrap()
    }

    #[test]
    fn a_guest_that_uses_nested_virtualization_is_told_from_one_that_could() {
        let (vmx, svm) = (bind::KVM_STATE_NESTED_FORMAT_VMX, bind::KVM_STATE_NESTED_FORMAT_SVM);
        let gif = bind::KVM_STATE_NESTED_GIF_SET;
        assert!(!uses_nested(&nested(vmx, 0, u64::MAX, 128)));
        assert!(!uses_nested(&nested(svm, gif, 0, 128)));

        assert!(uses_nested(&nested(vmx, 0, 0x1000, 128)), "after VMXON");
        assert!(uses_nested(&nested(vmx, 0, 0x1000, 128 + 4096)), "with a VMCS");
        assert!(uses_nested(&nested(vmx, bind::KVM_STATE_NESTED_GUEST_MODE, 0x1000, 128 + 4096)));
        assert!(uses_nested(&nested(svm, gif | bind::KVM_STATE_NESTED_GUEST_MODE, 0, 128)));
        assert!(uses_nested(&nested(svm, 0, 0, 128)), "after CLGI");
        assert!(uses_nested(&nested(7, 0, u64::MAX, 128)), "of an unknown format");
    }
}
