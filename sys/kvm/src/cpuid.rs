//! The CPUID of a vCPU: what it was told that it is.
//!
//! It does not change while a guest runs, so it is carried over before the pause. Asking the KVM of the
//! successor what it supports (`KVM_GET_SUPPORTED_CPUID`) would cost half a millisecond, and might answer
//! what the guest was never told.

use abi::groups::{self, Group};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use zerocopy::IntoBytes;

use crate::state::{StateError, take};
use crate::vcpu::Vcpu;

/// The only group: an array of `struct kvm_cpuid_entry2`.
const ENTRIES: u32 = 1;

const WHOSE: &str = "CPUID";

/// Why CPUID could not be read or set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpuidError {
    /// KVM did not say what it supports.
    #[error("KVM_GET_SUPPORTED_CPUID failed")]
    Supported(#[source] kvm_ioctls::Error),
    /// KVM did not say what the vCPU has.
    #[error("KVM_GET_CPUID2 failed")]
    Get(#[source] kvm_ioctls::Error),
    /// KVM refused to give the vCPU this CPUID.
    #[error("KVM_SET_CPUID2 of {entries} entries failed")]
    Set {
        /// Entries of the CPUID.
        entries: usize,
        /// What the kernel said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// The CPUID of a vCPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Cpuid {
    // At most KVM_MAX_CPUID_ENTRIES.
    entries: Vec<kvm_cpuid_entry2>,
}

impl Cpuid {
    /// Everything that this KVM supports.
    ///
    /// # Errors
    ///
    /// See [`CpuidError`].
    pub fn supported(kvm: &Kvm) -> Result<Self, CpuidError> {
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Supported)?;
        Ok(Self { entries: cpuid.as_slice().to_vec() })
    }

    /// What this vCPU has.
    ///
    /// # Errors
    ///
    /// See [`CpuidError`].
    pub fn of(vcpu: &Vcpu) -> Result<Self, CpuidError> {
        let cpuid = vcpu.fd().get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Get)?;
        Ok(Self { entries: cpuid.as_slice().to_vec() })
    }

    /// Gives the vCPU this CPUID. Before anything else is loaded into it.
    ///
    /// # Errors
    ///
    /// See [`CpuidError`].
    pub fn load(&self, vcpu: &Vcpu) -> Result<(), CpuidError> {
        let entries = self.entries.len();
        let failed = |source| CpuidError::Set { entries, source };
        let cpuid =
            CpuId::from_entries(&self.entries).map_err(|_| failed(kvm_ioctls::Error::new(libc::E2BIG)))?;
        vcpu.fd().set_cpuid2(&cpuid).map_err(failed)
    }

    /// Its entries.
    #[must_use]
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }

    /// Its entries, to be changed: the APIC id, the topology, features taken away.
    pub fn entries_mut(&mut self) -> &mut [kvm_cpuid_entry2] {
        &mut self.entries
    }

    /// The CPUID as bytes: an [`abi::groups`] list of one group.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        groups::encode(&[Group { id: ENTRIES, data: self.entries.as_bytes().to_vec() }])
    }

    /// The CPUID whose bytes these are.
    ///
    /// # Errors
    ///
    /// See [`StateError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let whose = WHOSE;
        let list = groups::decode(bytes).map_err(|source| StateError::Groups { whose, source })?;
        let data = match list.as_slice() {
            [Group { id: ENTRIES, data }] => data,
            [Group { id, .. }] | [_, Group { id, .. }, ..] => {
                return Err(StateError::UnknownGroup { whose, id: *id });
            }
            [] => return Err(StateError::Absent { whose }),
        };
        let length = StateError::GroupLength { whose, group: "entries", len: data.len() };
        let chunks = data.chunks(size_of::<kvm_cpuid_entry2>());
        if chunks.len() > KVM_MAX_CPUID_ENTRIES {
            return Err(length);
        }
        match chunks.map(take).collect() {
            Ok(entries) => Ok(Self { entries }),
            Err(_) => Err(length),
        }
    }
}
