//! A VMM that takes a machine over.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use anyhow::bail;
use fdpass::Channel;
use machine::update::Observer;
use serde::Deserialize as _;
use socket::Attached;
use socket::Handed;
use socket::Successor;
use socket::Timeouts;
use tracing::debug;
use tracing::warn;

use crate::control::GuestKind;
use crate::guest::AnyGuest;
use crate::guest::MemoryWords;
use crate::guest::Served;
use crate::kvm_guest;
use crate::kvm_guest::KvmGuest;
use crate::measure;
use crate::measure::Before;
use crate::serve::CONTROL;
use crate::serve::Told;
use crate::serve::Vmm;
use crate::thread_guest;
use crate::thread_guest::ThreadGuest;

/// Where the predecessor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// It started this process, and is at the other end of its standard input.
    Started,
    /// It listens at this path.
    Connect(PathBuf),
}

/// Takes a machine over from its VMM, and serves. `observer` is told each step as it is reached.
///
/// # Errors
/// If the machine was not taken over, which leaves the guest in the predecessor; or if it was, and the guest is lost.
pub fn succeed(start: &Start, timeouts: Timeouts, observer: &mut dyn Observer) -> anyhow::Result<()> {
    let formats: Vec<&str> = kvm_guest::FORMATS.into_iter().chain(thread_guest::FORMATS).collect();
    let successor = match start {
        Start::Started => Successor::from_stdin(&formats, timeouts)?,
        Start::Connect(path) => Successor::connect(path, &formats, timeouts)?,
    };
    let mut attached = successor.attach(observer)?;
    let (told, control, guest) = match prepare(&mut attached) {
        Ok(prepared) => prepared,
        Err(error) => {
            attached.give_up(&format!("{error:#}"));
            return Err(error);
        }
    };
    let handed = attached.claim(observer)?;
    take_over(handed, &told, control, guest, observer)?.obey()
}

/// Everything that can be done while the guest runs in the predecessor.
fn prepare(attached: &mut Attached) -> anyhow::Result<(Told, Channel, Box<dyn Served>)> {
    let told = Told::deserialize(attached.vmm()).context("cannot read what the predecessor tells")?;
    let control = attached.take_descriptor(CONTROL).context("no control channel came with the machine")?;
    let control = Channel::from_fd(control)?;
    if told.populate {
        match attached.populate(&mut |_, _| {}) {
            Ok(populated) => debug!(?populated, "populated"),
            Err(error) => warn!(error = &error as &dyn std::error::Error, "the guest will be slow at first"),
        }
    }
    let incoming = attached.incoming();
    let [memory] = incoming.memories() else {
        bail!("this VMM gives a guest one piece of memory, the machine has {}", incoming.memories().len());
    };
    let guest: Box<dyn Served> = match told.guest {
        GuestKind::Kvm => Box::new(KvmGuest::prepare(memory, incoming.identity(), &told.before_pause)?),
        GuestKind::Thread => Box::new(ThreadGuest::prepare(memory)?),
    };
    Ok((told, control, guest))
}

/// The successor's half of the pause, and what comes right after it.
fn take_over(
    handed: Handed,
    told: &Told,
    control: Channel,
    mut guest: Box<dyn Served>,
    observer: &mut dyn Observer,
) -> anyhow::Result<Vmm> {
    if let Err(error) = guest.load(handed.states()) {
        handed.give_up(&error.to_string());
        return Err(error.into());
    }
    let running = handed.run(observer)?;
    let words = MemoryWords(Arc::clone(running.machine().memories()[0].inode.mapping()));
    let before = Before::look(&words, told.probe);
    guest.start().context("the guest is lost")?;
    let tell = || {
        let told = measure::after_update(&words, before, guest.entered_ns());
        serde_json::to_value(told).unwrap_or_default()
    };
    let machine = match running.settle(observer, tell) {
        Ok(machine) => machine,
        Err(unsettled) => {
            // It runs; the next update tries to settle again, and says so if it cannot.
            warn!(error = &unsettled.cause as &dyn std::error::Error, "the session is not settled");
            unsettled.machine
        }
    };
    Ok(Vmm { machine, guest: AnyGuest(guest), words, control, programs: told.programs.clone() })
}
