//! The state of a VM that is not in its vCPUs: interrupt controllers, interval timer, clock.
//!
//! Saved before the vCPUs and loaded after them: interrupts flow from here to the LAPICs. One that is
//! saved in both places is seen twice, which every guest bears; one that is saved in neither is lost. And
//! when an IOAPIC is loaded, it hands interrupts that wait in it to the LAPICs, whose loading would
//! overwrite them.
//!
//! # The clock
//!
//! The clock (kvmclock) is set forward by the time that passed between save and load. It is to be loaded before the
//! MSRs by which the guest shares it ([`Loader::finish`](crate::Loader::finish)).
//!
//! What passed is what the host's TSC says, where KVM tells it with its clock (`KVM_CLOCK_HOST_TSC`: the host keeps time by its
//! TSC, and all vCPUs' TSCs go together) on both sides, and says how fast it runs (Linux 5.18). The clock then stands to some
//! microseconds where it would stand had the guest run on, across a kexec too, and whatever is done to the host's time of
//! day meanwhile; and it stays with the guest's own TSC.
//!
//! Elsewhere it is the host's time of day, set forward by KVM where it can (`KVM_CLOCK_REALTIME`), else here: right to a second after a
//! kexec, and wrong by whatever that time was stepped by meanwhile. A time of day that went back sets nothing
//! back.
//!
//! A host's TSC that stands before where it stood is refused. One that was reset and has come past that is not told from one that
//! ran on: the clock is then late, with the guest's TSC.

use std::num::NonZeroU32;
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

/// What the clock may be off from what the host's TSC says, in ns: more than it takes to read and set it.
const CLOSE_NS: u64 = 10_000;

/// How often it is set by the TSC, at most: a thread that lost its processor in between sets it late.
const CORRECTIONS: u32 = 3;

fn set_clock(vm: &Vm, data: &[u8]) -> Result<(), Fault> {
    let saved: kvm_clock_data = take(data)?;
    let kvm_sets_forward =
        vm.capabilities().clock_flags.is_some_and(|flags| flags & bind::KVM_CLOCK_REALTIME != 0);
    vm.fd().set_clock(&clock_to_set(&saved, kvm_sets_forward, time_of_day()))?;
    // Not sooner: a VM whose vCPUs have not run tells the host's TSC only when its clock has been set.
    let mut now = vm.fd().get_clock()?;
    let ran_on = host_tsc_ran_on(&saved, &now)?;
    let Some(khz) = vm.capabilities().host_tsc_khz.filter(|_| ran_on) else { return Ok(()) };
    for _ in 0..CORRECTIONS {
        let Some(clock) = correction(&saved, &now, khz) else { break };
        vm.fd().set_clock(&kvm_clock_data { clock, ..Default::default() })?;
        now = vm.fd().get_clock()?;
    }
    Ok(())
}

/// Whether the host's TSC ran on, as far as KVM tells it with its clocks; refuses if it went back.
fn host_tsc_ran_on(saved: &kvm_clock_data, now: &kvm_clock_data) -> Result<bool, Fault> {
    let both_tell = saved.flags & now.flags & bind::KVM_CLOCK_HOST_TSC != 0;
    if both_tell && now.host_tsc < saved.host_tsc {
        return Err(Fault::HostTscWentBack { saved: saved.host_tsc, now: now.host_tsc });
    }
    Ok(both_tell)
}

/// What the clock has to be by the host's TSC, if it is not that already.
fn correction(saved: &kvm_clock_data, now: &kvm_clock_data, khz: NonZeroU32) -> Option<u64> {
    let ticks = now.host_tsc.saturating_sub(saved.host_tsc);
    let passed_ns = u128::from(ticks) * 1_000_000 / u128::from(khz.get());
    let clock = saved.clock.saturating_add(u64::try_from(passed_ns).unwrap_or(u64::MAX));
    (clock.abs_diff(now.clock) > CLOSE_NS).then_some(clock)
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
        assert!(host_tsc_ran_on(&SAVED, &later).unwrap());
        let refused = host_tsc_ran_on(&later, &SAVED);
        assert!(matches!(refused, Err(Fault::HostTscWentBack { saved: 78, now: 77 })), "{refused:?}");
        let untold = kvm_clock_data { flags: 0, host_tsc: 0, ..SAVED };
        assert!(!host_tsc_ran_on(&SAVED, &untold).unwrap());
        assert!(!host_tsc_ran_on(&untold, &SAVED).unwrap());
    }

    #[test]
    fn a_clock_that_is_off_is_set_to_what_the_hosts_tsc_says() {
        let khz = NonZeroU32::new(2_600_000).unwrap();
        let now = |clock, ticks| kvm_clock_data { clock, host_tsc: SAVED.host_tsc + ticks, ..SAVED };
        // 13 s, in which the time of day went on by 14, or back.
        let (ticks, due) = (33_800_000_000, 13_000_001_000);
        assert_eq!(correction(&SAVED, &now(14_000_001_000, ticks), khz), Some(due));
        assert_eq!(correction(&SAVED, &now(1_000, ticks), khz), Some(due));
        assert_eq!(correction(&SAVED, &now(due + CLOSE_NS + 1, ticks), khz), Some(due));
        for close in [due - CLOSE_NS, due, due + CLOSE_NS] {
            assert_eq!(correction(&SAVED, &now(close, ticks), khz), None);
        }
    }

    #[test]
    fn a_clock_comes_to_its_end_and_not_to_its_beginning() {
        let khz = NonZeroU32::new(1).unwrap();
        let now = kvm_clock_data { host_tsc: u64::MAX, ..SAVED };
        assert_eq!(correction(&SAVED, &now, khz), Some(u64::MAX));
        let saved = kvm_clock_data { clock: u64::MAX - 5, ..SAVED };
        let now = kvm_clock_data { host_tsc: SAVED.host_tsc + 2_600_000, ..SAVED };
        assert_eq!(correction(&saved, &now, NonZeroU32::new(2_600_000).unwrap()), Some(u64::MAX));
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
