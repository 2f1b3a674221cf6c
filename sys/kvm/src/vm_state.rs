//! The state of a VM that is not in its vCPUs: interrupt controllers, interval timer, clock.
//!
//! Saved before the vCPUs and loaded after them: interrupts flow from here to the LAPICs. One that is
//! saved in both places is seen twice, which every guest bears; one that is saved in neither is lost. And
//! when an IOAPIC is loaded, it hands interrupts that wait in it to the LAPICs, whose loading would
//! overwrite them.
//!
//! The clock (kvmclock) is set forward by the time of day that passed between save and load, by KVM
//! where it can, else here. It is to be loaded before the MSRs by which the guest shares it
//! ([`Loader::finish`](crate::Loader::finish)).

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings as bind;
use kvm_bindings::{kvm_clock_data, kvm_irqchip};

use crate::state::{Fault, State, StateError, VmGroup, put, take};
use crate::vm::Vm;

/// Why a VM's state could not be saved.
#[derive(Debug, thiserror::Error)]
#[error("{group} of the VM could not be saved")]
pub struct VmSaveError {
    /// The group.
    pub group: VmGroup,
    /// What happened.
    #[source]
    pub source: Fault,
}

/// Why a VM's state could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmLoadError {
    /// The state has a group that this VM, on this KVM, does not have.
    #[error("the state holds {group}, which this VM does not have")]
    CannotLoad {
        /// The group.
        group: VmGroup,
    },
    /// The state lacks a group that this VM has and cannot do without.
    #[error("the state lacks {group}, which this VM has")]
    Lacks {
        /// The group.
        group: VmGroup,
    },
    /// A group could not be loaded.
    #[error("{group} of the VM could not be loaded")]
    Group {
        /// The group.
        group: VmGroup,
        /// What happened.
        #[source]
        source: Fault,
    },
}

struct Descriptor {
    group: VmGroup,
    /// Whether this VM has the group.
    offered: fn(&Vm) -> bool,
    /// Whether a state that lacks the group can be loaded into a VM that has it.
    optional: bool,
    save: fn(&Vm) -> Result<Vec<u8>, Fault>,
    load: fn(&Vm, &[u8]) -> Result<(), Fault>,
}

/// The groups, in the order of saving, which is the way that interrupts go. They are loaded the other way,
/// so that the PIT starts when the controllers are ready, and the clock, last here, before everything.
const GROUPS: &[Descriptor] = &[
    Descriptor {
        group: VmGroup::Pit,
        offered: |vm| vm.irqchip().has_pit(),
        optional: false,
        save: |vm| Ok(bytes(&vm.fd().get_pit2()?)),
        load: |vm, data| Ok(vm.fd().set_pit2(&take(data)?)?),
    },
    Descriptor {
        group: VmGroup::PicMaster,
        offered: |vm| vm.irqchip().has_pics(),
        optional: false,
        save: |vm| get_irqchip(vm, bind::KVM_IRQCHIP_PIC_MASTER),
        load: |vm, data| set_irqchip(vm, bind::KVM_IRQCHIP_PIC_MASTER, data),
    },
    Descriptor {
        group: VmGroup::PicSlave,
        offered: |vm| vm.irqchip().has_pics(),
        optional: false,
        save: |vm| get_irqchip(vm, bind::KVM_IRQCHIP_PIC_SLAVE),
        load: |vm, data| set_irqchip(vm, bind::KVM_IRQCHIP_PIC_SLAVE, data),
    },
    Descriptor {
        group: VmGroup::Ioapic,
        offered: |vm| vm.irqchip().has_pics(),
        optional: false,
        save: |vm| get_irqchip(vm, bind::KVM_IRQCHIP_IOAPIC),
        load: |vm, data| set_irqchip(vm, bind::KVM_IRQCHIP_IOAPIC, data),
    },
    Descriptor {
        group: VmGroup::Clock,
        offered: |vm| vm.capabilities().clock_flags.is_some(),
        optional: true,
        save: get_clock,
        load: set_clock,
    },
];

/// The state of a VM whose vCPUs are stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmState(State<VmGroup>);

impl VmState {
    /// Saves the VM, whose vCPUs are stopped. Before the vCPUs are saved.
    ///
    /// # Errors
    ///
    /// [`VmSaveError`]. The VM is as it was.
    pub fn save(vm: &Vm) -> Result<Self, VmSaveError> {
        let order: Vec<_> = GROUPS.iter().map(|entry| entry.group).collect();
        let offered = |group| GROUPS.iter().any(|entry| entry.group == group && (entry.offered)(vm));
        let mut state = State::of(&order, offered);
        for (group, data) in state.fill() {
            let Some(entry) = GROUPS.iter().find(|entry| entry.group == group) else { continue };
            *data = (entry.save)(vm).map_err(|source| VmSaveError { group, source })?;
        }
        Ok(Self(state))
    }

    /// Loads the VM. After the vCPUs are loaded, and before they are finished.
    ///
    /// # Errors
    ///
    /// See [`VmLoadError`]. The VM is then loaded in part; another state may be loaded into it.
    pub fn load(&self, vm: &Vm) -> Result<(), VmLoadError> {
        for entry in GROUPS.iter().rev() {
            let group = entry.group;
            match (self.data(group), (entry.offered)(vm)) {
                (Some(data), true) => {
                    (entry.load)(vm, data).map_err(|source| VmLoadError::Group { group, source })?;
                }
                (Some(_), false) => return Err(VmLoadError::CannotLoad { group }),
                (None, false) => {}
                (None, true) if entry.optional && self.absent().any(|absent| absent == group) => {}
                (None, true) => return Err(VmLoadError::Lacks { group }),
            }
        }
        Ok(())
    }

    /// The state as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.0.encode()
    }

    /// The state whose bytes these are.
    ///
    /// # Errors
    ///
    /// See [`StateError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        State::decode(bytes).map(Self)
    }

    /// Groups that are there.
    pub fn groups(&self) -> impl Iterator<Item = VmGroup> + '_ {
        self.0.present()
    }

    /// Groups that the VM or its KVM did not have.
    pub fn absent(&self) -> impl Iterator<Item = VmGroup> + '_ {
        self.0.absent()
    }

    /// The bytes of a group: the kernel's structure.
    #[must_use]
    pub fn data(&self, group: VmGroup) -> Option<&[u8]> {
        self.0.data(group)
    }

    /// The clock, with the time of day at which it was read.
    #[must_use]
    pub fn clock(&self) -> Option<kvm_clock_data> {
        self.0.get(VmGroup::Clock)
    }
}

fn bytes<T: zerocopy::IntoBytes + zerocopy::Immutable>(structure: &T) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out, structure);
    out
}

fn get_irqchip(vm: &Vm, chip_id: u32) -> Result<Vec<u8>, Fault> {
    let mut irqchip = kvm_irqchip { chip_id, ..Default::default() };
    vm.fd().get_irqchip(&mut irqchip)?;
    Ok(bytes(&irqchip))
}

fn set_irqchip(vm: &Vm, chip_id: u32, data: &[u8]) -> Result<(), Fault> {
    // The group says which chip it is. KVM would load whichever one the bytes name.
    let irqchip = kvm_irqchip { chip_id, ..take(data)? };
    Ok(vm.fd().set_irqchip(&irqchip)?)
}

/// The time of day in ns since the epoch, as KVM counts it.
fn time_of_day() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
}

fn get_clock(vm: &Vm) -> Result<Vec<u8>, Fault> {
    let mut clock = vm.fd().get_clock()?;
    if clock.flags & bind::KVM_CLOCK_REALTIME == 0 {
        // KVM has the two at one instant only where all its clocks go by a stable TSC.
        clock.realtime = time_of_day();
    }
    Ok(bytes(&clock))
}

fn set_clock(vm: &Vm, data: &[u8]) -> Result<(), Fault> {
    let saved: kvm_clock_data = take(data)?;
    check_host_tsc(&saved, &vm.fd().get_clock()?)?;
    let kvm_sets_forward =
        vm.capabilities().clock_flags.is_some_and(|flags| flags & bind::KVM_CLOCK_REALTIME != 0);
    let clock = clock_to_set(&saved, kvm_sets_forward, time_of_day());
    Ok(vm.fd().set_clock(&clock)?)
}

/// Refuses if the host's TSC, as far as KVM tells it with its clocks, went back.
fn check_host_tsc(saved: &kvm_clock_data, now: &kvm_clock_data) -> Result<(), Fault> {
    let both_tell = saved.flags & now.flags & bind::KVM_CLOCK_HOST_TSC != 0;
    if both_tell && now.host_tsc < saved.host_tsc {
        return Err(Fault::HostTscWentBack { saved: saved.host_tsc, now: now.host_tsc });
    }
    Ok(())
}

/// What to give to `KVM_SET_CLOCK` at the time of day `now`. Of the flags that a saved clock has, one can
/// be set; the others only tell.
fn clock_to_set(saved: &kvm_clock_data, kvm_sets_forward: bool, now: u64) -> kvm_clock_data {
    if kvm_sets_forward {
        kvm_clock_data {
            clock: saved.clock,
            flags: bind::KVM_CLOCK_REALTIME,
            realtime: saved.realtime,
            ..Default::default()
        }
    } else {
        let passed = now.saturating_sub(saved.realtime);
        kvm_clock_data { clock: saved.clock.saturating_add(passed), ..Default::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: kvm_clock_data = kvm_clock_data {
        clock: 1_000,
        flags: bind::KVM_CLOCK_TSC_STABLE | bind::KVM_CLOCK_REALTIME | bind::KVM_CLOCK_HOST_TSC,
        pad0: 0,
        realtime: 50_000,
        host_tsc: 77,
        pad: [0; 4],
    };

    #[test]
    fn a_host_tsc_that_went_back_is_refused_where_kvm_tells_it() {
        let later = kvm_clock_data { host_tsc: 78, ..SAVED };
        check_host_tsc(&SAVED, &later).unwrap();
        let refused = check_host_tsc(&later, &SAVED);
        assert!(matches!(refused, Err(Fault::HostTscWentBack { saved: 78, now: 77 })), "{refused:?}");
        let untold = kvm_clock_data { flags: 0, host_tsc: 0, ..SAVED };
        check_host_tsc(&SAVED, &untold).unwrap();
    }

    #[test]
    fn kvm_gets_only_the_flag_that_can_be_set() {
        let clock = clock_to_set(&SAVED, true, 60_000);
        assert_eq!((clock.clock, clock.realtime), (1_000, 50_000));
        assert_eq!((clock.flags, clock.host_tsc), (bind::KVM_CLOCK_REALTIME, 0));
    }

    #[test]
    fn a_kvm_that_does_not_set_clocks_forward_gets_one_that_is() {
        let clock = clock_to_set(&SAVED, false, 60_000);
        assert_eq!((clock.clock, clock.flags, clock.realtime), (11_000, 0, 0));
    }

    #[test]
    fn a_time_of_day_that_went_back_does_not_take_the_clock_back() {
        assert_eq!(clock_to_set(&SAVED, false, 40_000).clock, 1_000);
    }
}
