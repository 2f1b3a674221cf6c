//! The first VMM of a machine.

use std::path::PathBuf;

use anyhow::Context as _;
use anyhow::bail;
use fdpass::Channel;
use machine::Machine;
use machine::MemoryName;
use machine::MemorySpec;
use machine::SessionName;
use machine::Spec;
use region::PageSize;

use crate::control;
use crate::control::Answer;
use crate::control::GuestKind;
use crate::control::MachineSpec;
use crate::control::Pages;
use crate::guest::Served;
use crate::kvm_guest;
use crate::kvm_guest::KvmGuest;
use crate::serve;
use crate::thread_guest;
use crate::thread_guest::ThreadGuest;

/// Makes the machine, starts its guest, and serves: the control channel is this process's standard input. If the
/// machine cannot be made, the first request is answered by an [`Answer::Error`]. `programs` are what the machine may be
/// updated to.
///
/// # Errors
/// If the machine cannot be made, or its guest is lost.
pub fn run(spec: &MachineSpec, programs: Vec<PathBuf>) -> anyhow::Result<()> {
    let control =
        Channel::from_stdin().context("a VMM is started with its control channel as standard input")?;
    let (machine, guest) = match make(spec, &control) {
        Ok(made) => made,
        // Whoever started this process hears why, and says so.
        Err(error) => return control::send(&control, &Answer::Error(format!("{error:#}"))),
    };
    serve(machine, guest, control, programs)
}

fn make(spec: &MachineSpec, control: &Channel) -> anyhow::Result<(Machine, Box<dyn Served>)> {
    if !spec.memory_bytes.is_multiple_of(PageSize::Huge.bytes()) {
        bail!("the guest needs whole 2 MiB of memory, not {} bytes", spec.memory_bytes);
    }
    let states = match spec.guest {
        GuestKind::Kvm => kvm_guest::STATES.to_vec(),
        GuestKind::Thread => thread_guest::STATES.to_vec(),
    };
    let memory = MemorySpec {
        name: MemoryName::literal("ram"),
        size_bytes: spec.memory_bytes,
        page_size: match spec.pages {
            Pages::Huge => PageSize::Huge,
            Pages::Small => PageSize::Small,
        },
        prefault: spec.prefault,
    };
    let name = SessionName::new(spec.name.as_bytes()).context("the machine's name")?;
    let spec_of_machine = Spec { name, vcpus: 1, memories: vec![memory], states };
    let mut progress = |done, of| {
        let _ = control::send(control, &Answer::Progress { what: "warming up memory".to_owned(), done, of });
    };
    let machine = Machine::create(&spec_of_machine, &mut progress)?;
    let memory = &machine.memories()[0].inode;
    let mut guest: Box<dyn Served> = match spec.guest {
        GuestKind::Kvm => Box::new(KvmGuest::first(memory, machine.identity())?),
        GuestKind::Thread => Box::new(ThreadGuest::first(memory)?),
    };
    guest.start()?;
    Ok((machine, guest))
}
