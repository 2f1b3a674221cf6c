//! State as groups: what both a vCPU's and a VM's state are made of.
//!
//! A *state* is a list of groups, each of which one ioctl (or one series of them) saves and loads. On the
//! wire it is an [`abi::groups`] list; the data of a group is the kernel's own structure, byte for byte.
//! A group that the KVM at hand cannot do is left out, and the state says so in a group of its own, so
//! that what was left out can be told from what got lost.

use abi::groups::{self, Group, GroupsError};
use kvm_bindings as bind;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Id of the group that lists the ids of the absent groups, each as a little-endian u32.
const ABSENT: u32 = 0;

/// How long the data of a group is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Len {
    Exactly(usize),
    AtLeast(usize),
    MultipleOf(usize),
}

impl Len {
    const fn allows(self, len: usize) -> bool {
        match self {
            Self::Exactly(exactly) => len == exactly,
            Self::AtLeast(least) => len >= least,
            Self::MultipleOf(unit) => len.is_multiple_of(unit),
        }
    }

    const fn of<T>() -> Self {
        Self::Exactly(size_of::<T>())
    }
}

/// The groups of one kind of state.
pub(crate) trait GroupKind: Copy + Eq + 'static {
    /// Whose state it is, for people.
    const WHOSE: &'static str;
    /// Every group.
    const ALL: &'static [Self];

    fn id(self) -> u32;
    fn name(self) -> &'static str;
    fn len(self) -> Len;
}

macro_rules! group_kinds {
    (
        $(#[$doc:meta])* $kind:ident, $whose:literal;
        $($(#[$group_doc:meta])* $group:ident = $id:literal, $name:literal, $len:expr;)+
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum $kind {
            $($(#[$group_doc])* $group,)+
        }

        impl $kind {
            /// Every group.
            pub const ALL: &[Self] = &[$(Self::$group),+];

            /// The id of the group on the wire.
            #[must_use]
            pub const fn id(self) -> u32 {
                match self { $(Self::$group => $id),+ }
            }

            /// The group's name, for people.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$group => $name),+ }
            }
        }

        impl std::fmt::Display for $kind {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }

        impl GroupKind for $kind {
            const WHOSE: &'static str = $whose;
            const ALL: &'static [Self] = Self::ALL;

            fn id(self) -> u32 { self.id() }
            fn name(self) -> &'static str { self.name() }
            fn len(self) -> Len {
                match self { $(Self::$group => $len),+ }
            }
        }
    };
}

group_kinds! {
    /// The groups of a vCPU's state. The ids are for good: a group whose layout changes gets a new one.
    VcpuGroup, "vCPU";

    /// `struct kvm_mp_state`: whether it runs, halts, or waits to be started.
    MpState = 1, "MP state", Len::of::<bind::kvm_mp_state>();
    /// `struct kvm_vcpu_events`: exceptions, interrupts and NMIs that are pending or being delivered.
    Events = 2, "vCPU events", Len::of::<bind::kvm_vcpu_events>();
    /// `struct kvm_regs`.
    Registers = 3, "registers", Len::of::<bind::kvm_regs>();
    /// `struct kvm_sregs`: segments, control registers, EFER, base of the LAPIC.
    SpecialRegisters = 4, "special registers", Len::of::<bind::kvm_sregs>();
    /// `struct kvm_debugregs`.
    DebugRegisters = 5, "debug registers", Len::of::<bind::kvm_debugregs>();
    /// `struct kvm_xcrs`: extended control registers.
    Xcrs = 6, "extended control registers", Len::of::<bind::kvm_xcrs>();
    /// The XSAVE area, as long as the KVM that saved it says: x87, SSE, AVX and what came after.
    Xsave = 7, "extended state (XSAVE)", Len::AtLeast(size_of::<bind::kvm_xsave>());
    /// Little-endian u32: frequency of the guest's TSC in kHz.
    TscKhz = 8, "TSC frequency", Len::of::<u32>();
    /// Little-endian u64: what the guest's TSC is ahead of the host's, in ticks of the guest's, modulo
    /// 2^64.
    TscOffset = 9, "TSC offset", Len::of::<u64>();
    /// Array of `struct kvm_msr_entry`, without those of [`GuestMemoryMsrs`](Self::GuestMemoryMsrs).
    Msrs = 10, "MSRs", Len::MultipleOf(size_of::<bind::kvm_msr_entry>());
    /// Array of `struct kvm_msr_entry`: the registers with whose value KVM writes guest memory, such as
    /// those of kvmclock.
    GuestMemoryMsrs = 11, "MSRs for guest memory", Len::MultipleOf(size_of::<bind::kvm_msr_entry>());
    /// `struct kvm_lapic_state`.
    Lapic = 12, "LAPIC", Len::of::<bind::kvm_lapic_state>();
}

group_kinds! {
    /// The groups of a VM's state. The ids are for good: a group whose layout changes gets a new one.
    VmGroup, "VM";

    /// `struct kvm_pit_state2`.
    Pit = 1, "PIT", Len::of::<bind::kvm_pit_state2>();
    /// `struct kvm_irqchip` of the first PIC.
    PicMaster = 2, "master PIC", Len::of::<bind::kvm_irqchip>();
    /// `struct kvm_irqchip` of the second PIC.
    PicSlave = 3, "slave PIC", Len::of::<bind::kvm_irqchip>();
    /// `struct kvm_irqchip` of the IOAPIC.
    Ioapic = 4, "IOAPIC", Len::of::<bind::kvm_irqchip>();
    /// `struct kvm_clock_data`. `realtime` always has the host's time of day at which `clock` was read, in
    /// ns since the epoch.
    Clock = 5, "clock", Len::of::<bind::kvm_clock_data>();
}

/// Why bytes are not a state that this release can load.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// They are not a list of groups.
    #[error("the {whose} state is no list of groups")]
    Groups {
        /// Whose state it was to be.
        whose: &'static str,
        /// What is wrong with the list.
        #[source]
        source: GroupsError,
    },
    /// They hold a group that this release does not know.
    #[error("the {whose} state holds group {id:#x}, which this release does not know")]
    UnknownGroup {
        /// Whose state it is.
        whose: &'static str,
        /// The group's id.
        id: u32,
    },
    /// A group has another length than its kind has.
    #[error("the {whose} state holds {len} bytes of {group}, which that cannot be")]
    GroupLength {
        /// Whose state it is.
        whose: &'static str,
        /// The group's name.
        group: &'static str,
        /// Bytes that it has.
        len: usize,
    },
    /// The list of absent groups is missing, or names a group that is there, or one twice.
    #[error("the {whose} state contradicts itself about the groups that it lacks")]
    Absent {
        /// Whose state it is.
        whose: &'static str,
    },
}

/// What KVM refused in the middle of a group.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The ioctl failed.
    #[error("KVM refused it")]
    Kvm(#[source] kvm_ioctls::Error),
    /// `KVM_GET_MSRS` stopped at a register.
    #[error("KVM stopped reading at MSR {index:#x}")]
    MsrRead {
        /// The register.
        index: u32,
    },
    /// `KVM_SET_MSRS` stopped at a register.
    #[error("KVM stopped setting at MSR {index:#x}, which was to be {value:#x}")]
    MsrSet {
        /// The register.
        index: u32,
        /// What it was to be.
        value: u64,
    },
    /// A register that cannot be set on this KVM has another value than it had.
    #[error("MSR {index:#x}, which this KVM does not let be set, is {has:#x} and was {wanted:#x}")]
    MsrFixed {
        /// The register.
        index: u32,
        /// What it was.
        wanted: u64,
        /// What it is here.
        has: u64,
    },
    /// The extended state is longer than the one of this KVM. The process that saved it may have asked for
    /// guest state (`ARCH_REQ_XCOMP_GUEST_PERM`) that this one did not ask for before its first vCPU.
    #[error("there are {len} bytes of it, and this KVM has room for {most}")]
    XsaveLen {
        /// Bytes of the state.
        len: usize,
        /// Bytes that this KVM keeps.
        most: usize,
    },
    /// The host's TSC stands before where it stood when the state was saved: it was not the same host,
    /// or that host's TSC was reset, and the offset of the guest's TSC to it no longer holds.
    #[error("the host's TSC went back, from {saved:#x} to {now:#x}")]
    HostTscWentBack {
        /// The host's TSC when the state was saved.
        saved: u64,
        /// The host's TSC now.
        now: u64,
    },
    /// The TSC runs at another frequency than the guest's did, and this KVM can neither scale it
    /// (`KVM_CAP_TSC_CONTROL`) nor take the two for one.
    #[error(
        "the guest's TSC ran at {saved} kHz, and here it runs at {here} kHz, which this KVM cannot change"
    )]
    TscKhz {
        /// The frequency in the state, in kHz.
        saved: u32,
        /// The frequency here, in kHz.
        here: u32,
    },
    /// The guest is a hypervisor with guests of its own, whose state this crate does not save.
    #[error("the guest uses nested virtualization")]
    Nested,
    /// The data is not as long as the kernel's structure.
    #[error("{len} bytes are not the kernel's structure of {structure}")]
    Length {
        /// Bytes of the data.
        len: usize,
        /// Bytes of the structure.
        structure: usize,
    },
}

impl From<kvm_ioctls::Error> for Fault {
    fn from(error: kvm_ioctls::Error) -> Self {
        Self::Kvm(error)
    }
}

/// The groups of a vCPU or VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State<K> {
    // The first is ABSENT, whose data names groups of K that do not follow; each group that follows is of
    // K, comes once, and its data has a length that its kind allows.
    groups: Vec<Group>,
    kind: std::marker::PhantomData<K>,
}

impl<K: GroupKind> State<K> {
    /// A state to be filled, of those groups of `order` that are `offered`.
    pub(crate) fn of(order: &[K], offered: impl Fn(K) -> bool) -> Self {
        let (present, absent): (Vec<K>, Vec<K>) = order.iter().copied().partition(|&kind| offered(kind));
        let absent = absent.iter().flat_map(|kind| kind.id().to_le_bytes()).collect();
        let mut groups = vec![Group { id: ABSENT, data: absent }];
        groups.extend(present.iter().map(|kind| Group { id: kind.id(), data: Vec::new() }));
        Self { groups, kind: std::marker::PhantomData }
    }

    /// Each group that is there, to be filled. The caller keeps to the lengths of the kinds.
    pub(crate) fn fill(&mut self) -> impl Iterator<Item = (K, &mut Vec<u8>)> {
        self.groups.iter_mut().filter_map(|group| Some((kind_of(group.id)?, &mut group.data)))
    }

    pub(crate) fn data(&self, kind: K) -> Option<&[u8]> {
        self.groups.iter().find(|group| group.id == kind.id()).map(|group| group.data.as_slice())
    }

    /// The data as the kernel's structure.
    pub(crate) fn get<T: FromBytes>(&self, kind: K) -> Option<T> {
        T::read_from_bytes(self.data(kind)?).ok()
    }

    pub(crate) fn present(&self) -> impl Iterator<Item = K> + '_ {
        self.groups.iter().filter_map(|group| kind_of(group.id))
    }

    pub(crate) fn absent(&self) -> impl Iterator<Item = K> + '_ {
        let ids = self.groups.first().map_or(&[][..], |group| group.data.as_slice());
        ids.as_chunks().0.iter().filter_map(|&id| kind_of(u32::from_le_bytes(id)))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        groups::encode(&self.groups)
    }

    pub(crate) fn encode_into(&self, bytes: &mut Vec<u8>) {
        groups::encode_into(&self.groups, bytes);
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let whose = K::WHOSE;
        let mut groups = groups::decode(bytes).map_err(|source| StateError::Groups { whose, source })?;
        let Some(place) = groups.iter().position(|group| group.id == ABSENT) else {
            return Err(StateError::Absent { whose });
        };
        groups.swap(0, place);
        for group in groups.iter().skip(1) {
            let kind = kind_of::<K>(group.id).ok_or(StateError::UnknownGroup { whose, id: group.id })?;
            if !kind.len().allows(group.data.len()) {
                let (group, len) = (kind.name(), group.data.len());
                return Err(StateError::GroupLength { whose, group, len });
            }
        }
        let state = Self { groups, kind: std::marker::PhantomData };
        state.check_absent()?;
        Ok(state)
    }

    fn check_absent(&self) -> Result<(), StateError> {
        let whose = K::WHOSE;
        let ids = self.groups.first().map_or(&[][..], |group| group.data.as_slice());
        let (ids, rest) = ids.as_chunks();
        if !rest.is_empty() {
            return Err(StateError::Absent { whose });
        }
        for (place, id) in ids.iter().enumerate() {
            let id_number = u32::from_le_bytes(*id);
            let kind = kind_of::<K>(id_number).ok_or(StateError::UnknownGroup { whose, id: id_number })?;
            if self.data(kind).is_some() || ids.iter().take(place).any(|earlier| earlier == id) {
                return Err(StateError::Absent { whose });
            }
        }
        Ok(())
    }
}

/// The group with that id.
pub(crate) fn kind_of<K: GroupKind>(id: u32) -> Option<K> {
    K::ALL.iter().copied().find(|kind| kind.id() == id)
}

/// Makes `out` the bytes of the structure.
pub(crate) fn put<T: IntoBytes + Immutable>(out: &mut Vec<u8>, structure: &T) {
    out.clear();
    out.extend_from_slice(structure.as_bytes());
}

/// The structure whose bytes `data` is.
pub(crate) fn take<T: FromBytes>(data: &[u8]) -> Result<T, Fault> {
    T::read_from_bytes(data).map_err(|_| Fault::Length { len: data.len(), structure: size_of::<T>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ids_on_the_wire_are_those_of_every_release() {
        let vcpu = [
            (1, VcpuGroup::MpState),
            (2, VcpuGroup::Events),
            (3, VcpuGroup::Registers),
            (4, VcpuGroup::SpecialRegisters),
            (5, VcpuGroup::DebugRegisters),
            (6, VcpuGroup::Xcrs),
            (7, VcpuGroup::Xsave),
            (8, VcpuGroup::TscKhz),
            (9, VcpuGroup::TscOffset),
            (10, VcpuGroup::Msrs),
            (11, VcpuGroup::GuestMemoryMsrs),
            (12, VcpuGroup::Lapic),
        ];
        assert_eq!(VcpuGroup::ALL.len(), vcpu.len());
        for (id, group) in vcpu {
            assert_eq!(kind_of(id), Some(group));
        }
        let vm = [
            (1, VmGroup::Pit),
            (2, VmGroup::PicMaster),
            (3, VmGroup::PicSlave),
            (4, VmGroup::Ioapic),
            (5, VmGroup::Clock),
        ];
        assert_eq!(VmGroup::ALL.len(), vm.len());
        for (id, group) in vm {
            assert_eq!(kind_of(id), Some(group));
        }
    }

    /// A VM's state with this list of absent groups and these groups.
    fn vm_state(absent: &[u8], groups: &[(VmGroup, usize)]) -> Result<State<VmGroup>, StateError> {
        let mut list: Vec<_> =
            groups.iter().map(|(group, len)| Group { id: group.id(), data: vec![0; *len] }).collect();
        // In the wire's order it may stand anywhere.
        list.push(Group { id: ABSENT, data: absent.to_vec() });
        State::decode(&groups::encode(&list))
    }

    #[test]
    fn what_is_there_and_what_is_absent_is_told_apart() {
        let state =
            vm_state(&[1, 0, 0, 0, 3, 0, 0, 0], &[(VmGroup::Ioapic, 520), (VmGroup::Clock, 48)]).unwrap();
        assert_eq!(state.present().collect::<Vec<_>>(), [VmGroup::Clock, VmGroup::Ioapic]);
        assert_eq!(state.absent().collect::<Vec<_>>(), [VmGroup::Pit, VmGroup::PicSlave]);
        assert_eq!(State::decode(&state.encode()).unwrap(), state);
    }

    #[test]
    fn a_state_that_contradicts_itself_is_refused() {
        let there_and_absent = vm_state(&[5, 0, 0, 0], &[(VmGroup::Clock, 48)]);
        let absent_twice = vm_state(&[1, 0, 0, 0, 1, 0, 0, 0], &[]);
        let half_an_id = vm_state(&[1, 0], &[]);
        let no_list = State::<VmGroup>::decode(&groups::encode(&[]));
        for state in [there_and_absent, absent_twice, half_an_id, no_list] {
            assert!(matches!(state, Err(StateError::Absent { whose: "VM" })), "{state:?}");
        }
        let unknown = vm_state(&[9, 0, 0, 0], &[]);
        assert!(matches!(unknown, Err(StateError::UnknownGroup { id: 9, .. })), "{unknown:?}");
        let short = vm_state(&[], &[(VmGroup::Clock, 47)]);
        assert!(matches!(short, Err(StateError::GroupLength { group: "clock", len: 47, .. })), "{short:?}");
    }
}
