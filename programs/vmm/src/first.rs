//! The first VMM of a machine.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use anyhow::bail;
use fdpass::Channel;
use gmem::Inode;
use machine::Identity;
use machine::Machine;
use machine::MemoryName;
use machine::MemorySpec;
use machine::MemoryStore;
use machine::SessionName;
use machine::Spec;
use path::Place;
use pulse::MAX_VCPUS;
use region::PageSize;
use region::Policy;
use tracing::warn;

use crate::backends::Backends;
use crate::clients::Clients;
use crate::clients::Mode;
use crate::control;
use crate::control::Answer;
use crate::control::GuestKind;
use crate::control::MachineSpec;
use crate::control::Pages;
use crate::control::Store;
use crate::guest::Health;
use crate::guest::Served;
use crate::kvm_guest;
use crate::kvm_guest::KvmGuest;
use crate::kvm_guest::NewVm;
use crate::kvm_guest::Setup;
use crate::serve::Vmm;
use crate::serve::Watch;
use crate::serve::unwatched;
use crate::thread_guest;
use crate::thread_guest::ThreadGuest;

/// Makes the machine, starts its guest, and serves: the control channel is this process's standard input. If the
/// machine cannot be made, the first request is answered by an [`Answer::Error`]. `programs` are what the machine may be
/// updated to. Whoever is at the other end of the control channel is told of the guest's end if it `waits` for that, as
/// if it had asked before the guest could end.
///
/// # Errors
/// If the machine cannot be made, or its guest is lost.
pub fn run(spec: &MachineSpec, programs: Vec<PathBuf>, waits: bool) -> anyhow::Result<()> {
    run_watched(spec, programs, waits, unwatched())
}

/// As [`run`]; `watch` is told of the steps of every update from here.
///
/// # Errors
/// As [`run`].
pub fn run_watched(
    spec: &MachineSpec,
    programs: Vec<PathBuf>,
    waits: bool,
    watch: Watch,
) -> anyhow::Result<()> {
    let control =
        Channel::from_stdin().context("a VMM is started with its control channel as standard input")?;
    // The socket first: a name that is taken is no reason to make memory.
    let clients = Clients::first(control, spec.socket.as_deref());
    let mut clients = match clients {
        Ok(clients) => clients,
        Err((error, control)) => return control::send(&control, &Answer::Error(format!("{error:#}"))),
    };
    if waits {
        clients.set_mode(Clients::MAKER, Mode::Waits);
    }
    let mut progress = |done, of| {
        let what = "warming up memory".to_owned();
        clients.tell(Clients::MAKER, &Answer::Progress { what, done, of });
    };
    match make(spec, &mut progress) {
        Ok((machine, guest, backends)) => {
            let vmm = Vmm::new(spec.clone(), machine, guest, clients, backends, programs);
            let mut vmm = Vmm { watch, ..vmm };
            if let Err(error) = vmm.begin() {
                vmm.give_up_place();
                vmm.clients.tell(Clients::MAKER, &Answer::Error(format!("{error:#}")));
                return Ok(());
            }
            if let Err(error) = vmm.confine() {
                vmm.give_up_place();
                vmm.clients.tell(Clients::MAKER, &Answer::Error(format!("{:#}", anyhow::Error::new(error))));
                return Ok(());
            }
            vmm.obey()
        }
        // Whoever started this process hears why, and says so.
        Err(error) => {
            clients.tell(Clients::MAKER, &Answer::Error(format!("{error:#}")));
            Ok(())
        }
    }
}

pub(crate) type Made = (Machine, Box<dyn Served>, Arc<Backends>);

/// Makes the machine, and a guest that does not run yet.
///
/// # Errors
/// If this host cannot have it.
pub(crate) fn make(spec: &MachineSpec, progress: &mut dyn FnMut(u64, u64)) -> anyhow::Result<Made> {
    if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
        bail!("the guest takes 1 to {MAX_VCPUS} vCPUs, not {}", spec.vcpus);
    }
    if spec.linux.is_some() && spec.vcpus != 1 {
        bail!("Linux is started with one vCPU: nothing here would tell it of {}", spec.vcpus);
    }
    if !spec.memory_bytes.is_multiple_of(PageSize::Huge.bytes()) {
        bail!("the guest needs whole 2 MiB of memory, not {} bytes", spec.memory_bytes);
    }
    // Before any memory: what is not there, or another's, is no reason to make some.
    let backends = Arc::new(Backends::open(spec)?);
    // The VM first: memory may be its own.
    let vm = new_vm(spec.guest)?;
    let place =
        spec.path.as_deref().map(|path| Place::make(path, spec.memory_bytes, progress)).transpose()?;
    let made =
        spec_of_machine(spec, vm.as_ref(), place.as_ref()).and_then(|of| Ok(Machine::create(&of, progress)?));
    let machine = made.inspect_err(|_| place.iter().for_each(give_up))?;
    let guest = boot(spec, &machine.memories()[0].inode, machine.identity(), &backends, vm);
    Ok((machine, guest.inspect_err(|_| place.iter().for_each(give_up))?, backends))
}

/// There is no machine after all.
fn give_up(place: &Place) {
    if let Err(error) = place.empty() {
        warn!(error = &error as &dyn std::error::Error, "the machine's file stays");
    }
}

fn new_vm(guest: GuestKind) -> anyhow::Result<Option<NewVm>> {
    match guest {
        GuestKind::Kvm => Ok(Some(NewVm::make()?)),
        GuestKind::Thread => Ok(None),
    }
}

fn spec_of_machine(spec: &MachineSpec, vm: Option<&NewVm>, place: Option<&Place>) -> anyhow::Result<Spec> {
    let states = match spec.guest {
        GuestKind::Kvm => kvm_guest::states(spec.vcpus),
        GuestKind::Thread => thread_guest::states(spec.vcpus),
    };
    let memory = MemorySpec {
        name: MemoryName::literal("ram"),
        size_bytes: spec.memory_bytes,
        // At a path it is the kernel's choice, as far as what is there leaves one.
        page_size: place.map_or(page_size(spec), |place| place.file().page_size()),
        prefault: spec.prefault,
        store: match (spec.store, vm) {
            (Store::Path, _) => {
                let place = place.context("nobody says at which path the machine is to lie")?;
                MemoryStore::Path(Arc::clone(place.file()))
            }
            (Store::Memfd, _) => MemoryStore::Memfd,
            (Store::Hugetlb, _) => MemoryStore::Hugetlb,
            (Store::GuestMemfd, Some(vm)) => {
                MemoryStore::GuestMemfd(Arc::new(vm.guest_memfd(spec.memory_bytes)?))
            }
            (Store::GuestMemfd, None) => bail!("a guest_memfd is made by a VM, and this guest has none"),
        },
        policy: spec.numa.as_deref().map_or(Ok(Policy::Default), policy)?,
    };
    let name = SessionName::new(spec.name.as_bytes()).context("the machine's name")?;
    Ok(Spec { name, vcpus: spec.vcpus.into(), memories: vec![memory], states })
}

fn page_size(spec: &MachineSpec) -> PageSize {
    match spec.pages {
        Pages::Giant => PageSize::Giant,
        Pages::Huge => PageSize::Huge,
        Pages::Small => PageSize::Small,
    }
}

/// A NUMA policy as it is written: `bind:0,2-3`.
fn policy(text: &str) -> anyhow::Result<Policy> {
    let (kind, nodes) =
        text.split_once(':').context("a NUMA policy is `bind:`, `interleave:` or `preferred:` and nodes")?;
    let nodes = nodes.parse().map_err(|error| anyhow::anyhow!("the NUMA nodes `{nodes}`: {error}"))?;
    match kind {
        "bind" => Ok(Policy::Bind(nodes)),
        "interleave" => Ok(Policy::Interleave(nodes)),
        "preferred" => Ok(Policy::Preferred(nodes)),
        other => bail!("unknown NUMA policy `{other}`: use bind, interleave or preferred"),
    }
}

/// A guest that starts from the beginning, in memory that is zero.
fn boot(
    spec: &MachineSpec,
    memory: &Arc<Inode>,
    identity: Identity,
    backends: &Arc<Backends>,
    vm: Option<NewVm>,
) -> anyhow::Result<Box<dyn Served>> {
    let health = Health::well()?;
    Ok(match vm {
        Some(vm) => {
            let setup = Setup { spec, memory, identity, backends, health };
            Box::new(KvmGuest::first(vm, &setup)?)
        }
        None => Box::new(ThreadGuest::first(memory, spec.vcpus, health)?),
    })
}

/// The guest from the beginning once more, in place of one that stands still.
///
/// # Errors
/// If the memory cannot be made zero, or the guest not made.
pub(crate) fn boot_again(
    spec: &MachineSpec,
    memory: &Arc<Inode>,
    identity: Identity,
    backends: &Arc<Backends>,
) -> anyhow::Result<Box<dyn Served>> {
    memory.clear()?;
    if spec.prefault {
        memory.mapping().warm(page_size(spec), &mut |_, _| {})?;
    }
    let vm = new_vm(spec.guest)?;
    boot(spec, memory, identity, backends, vm)
}
