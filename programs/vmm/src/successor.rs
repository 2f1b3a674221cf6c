//! A VMM that takes a machine over.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use anyhow::bail;
use machine::Incoming;
use machine::Machine;
use machine::SettleError;
use machine::update::Observer;
use serde::Deserialize as _;
use socket::Handed;
use socket::Successor;
use socket::Timeouts;
use tracing::debug;
use tracing::warn;

use crate::backends::Backends;
use crate::clients::Clients;
use crate::confine::Confine;
use crate::control::Answer;
use crate::control::GuestKind;
use crate::guest::AnyGuest;
use crate::guest::Health;
use crate::guest::MemoryWords;
use crate::guest::Served;
use crate::kvm_guest;
use crate::kvm_guest::KvmGuest;
use crate::kvm_guest::Setup;
use crate::measure;
use crate::measure::Before;
use crate::serve::History;
use crate::serve::Told;
use crate::serve::Vmm;
use crate::thread_guest;
use crate::thread_guest::ThreadGuest;
use crate::update::GO_ON;

/// Where the predecessor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// It started this process, and is at the other end of its standard input.
    Started,
    /// It listens at this path.
    Connect(PathBuf),
    /// This process executed it before, and it has left a hand-off in the descriptor with this number.
    Executed(RawFd),
}

/// Takes a machine over from its VMM, and serves. `observer` is told each step as it is reached.
///
/// # Errors
/// If the machine was not taken over, which leaves the guest in the predecessor; or if it was, and the guest is lost.
pub fn succeed(start: &Start, timeouts: Timeouts, observer: &mut dyn Observer) -> anyhow::Result<()> {
    let of_guests = kvm_guest::FORMATS.into_iter().chain(thread_guest::FORMATS);
    let formats: Vec<&str> = of_guests.chain(devices::FORMATS).collect();
    let successor = match start {
        Start::Started => Successor::from_stdin(&formats, timeouts)?,
        Start::Connect(path) => Successor::connect(path, &formats, timeouts)?,
        Start::Executed(number) => return serve(go_on(*number, observer)?),
    };
    let mut attached = successor.attach(observer)?;
    let told = attached.vmm().clone();
    let prepared = Prepared::make(attached.incoming_mut(), &told);
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            attached.give_up(&format!("{error:#}"));
            return Err(error);
        }
    };
    if prepared.told.populate {
        match attached.populate(&mut |_, _| {}) {
            Ok(populated) => debug!(?populated, "populated"),
            Err(error) => warn!(error = &error as &dyn std::error::Error, "the guest will be slow at first"),
        }
    }
    match attached.claim(observer) {
        Ok(handed) => serve(take_over(handed, prepared, observer)?),
        Err(error) if error.is_rehearsed() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Serves, as confined as the machine is to be. That this cannot be is no reason to lose the guest.
fn serve(mut vmm: Vmm) -> anyhow::Result<()> {
    if let Err(error) = vmm.confine() {
        warn!(error = &error as &dyn std::error::Error, "the VMM is not confined");
    }
    vmm.obey()
}

/// What is ready before the state is there.
struct Prepared {
    told: Told,
    clients: Clients,
    backends: Arc<Backends>,
    guest: Box<dyn Served>,
}

impl Prepared {
    fn make(incoming: &mut Incoming, told: &serde_json::Value) -> anyhow::Result<Self> {
        let told = Told::deserialize(told).context("cannot read what the predecessor tells")?;
        let clients = Clients::adopt(incoming.fds(), &told.clients, told.spec.socket.as_deref())?;
        let backends = Arc::new(Backends::adopt(&told.spec, incoming.fds(), &told.consoles)?);
        let [memory] = incoming.memories() else {
            bail!(
                "this VMM gives a guest one piece of memory, the machine has {}",
                incoming.memories().len()
            );
        };
        let vcpus = u32::try_from(incoming.vcpus()).context("more vCPUs than any VM has")?;
        let health = Health::well()?;
        let guest: Box<dyn Served> = match told.spec.guest {
            GuestKind::Kvm => {
                let (spec, identity) = (&told.spec, incoming.identity());
                let setup = Setup { spec, memory, identity, backends: &backends, health };
                Box::new(KvmGuest::prepare(&setup, vcpus, &told.before_pause)?)
            }
            GuestKind::Thread => Box::new(ThreadGuest::prepare(memory, vcpus, health)?),
        };
        Ok(Self { told, clients, backends, guest })
    }

    /// Lets the guest run, whose machine is this process's now.
    fn start(&mut self, machine: &Machine) -> anyhow::Result<(Option<MemoryWords>, Before)> {
        let words = MemoryWords::of(&self.told.spec, machine);
        let before = Before::look(words.as_ref(), self.told.probe);
        match self.told.held {
            false => self.guest.start().context("the guest is lost")?,
            true => self.guest.attend(),
        }
        self.clients.own();
        Ok((words, before))
    }

    /// What was seen of the guest since.
    fn seen(&self, words: Option<&MemoryWords>, before: Before) -> measure::Told {
        measure::after_update(words, before, (!self.told.held).then_some(&*self.guest))
    }

    fn serve(self, machine: Machine, words: Option<MemoryWords>, updated: bool) -> Vmm {
        let Self { told, clients, backends, guest } = self;
        let guest = AnyGuest { guest, held: told.held };
        let history = History { updates: told.history.updates + u64::from(updated), ..told.history };
        let Told { spec, programs, .. } = told;
        Vmm { spec, machine, guest, words, clients, backends, programs, history, confined: Confine::No }
    }
}

/// The successor's half of the pause, and what comes right after it.
fn take_over(handed: Handed, mut prepared: Prepared, observer: &mut dyn Observer) -> anyhow::Result<Vmm> {
    if let Err(error) = prepared.guest.load(handed.states()) {
        handed.give_up(&error.to_string());
        return Err(error.into());
    }
    let running = handed.run(observer)?;
    let (words, before) = prepared.start(running.machine())?;
    let tell = || serde_json::to_value(prepared.seen(words.as_ref(), before)).unwrap_or_default();
    let machine = match running.settle(observer, tell) {
        Ok(machine) => machine,
        Err(unsettled) => {
            unsettled_yet(&unsettled.cause);
            unsettled.machine
        }
    };
    Ok(prepared.serve(machine, words, true))
}

/// It runs; the next update tries to settle again, and says so if it cannot.
fn unsettled_yet(cause: &SettleError) {
    warn!(error = cause as &dyn std::error::Error, "the session is not settled");
}

/// Runs the machine of the program that this process executed before. If that cannot be, executes it again.
fn go_on(number: RawFd, observer: &mut dyn Observer) -> anyhow::Result<Vmm> {
    let arguments = GO_ON.map(str::to_owned).to_vec();
    let (life, way_back) = match exec::Life::begin(number, arguments, observer) {
        Ok(begun) => begun,
        Err(failed) => return Err(go_back(failed.error.into(), failed.way_back)),
    };
    let (running, mut prepared) = match load(life, observer) {
        Ok(loaded) => loaded,
        Err(error) => return Err(go_back(error, way_back)),
    };
    let (words, before) = prepared.start(running.machine())?;
    drop(way_back);
    let seen = prepared.seen(words.as_ref(), before);
    let (machine, report, settled) = running.settle(observer);
    if let Err(error) = settled {
        unsettled_yet(&error);
    }
    let updated = report.failed.is_none();
    let answer = Answer::Update(Box::new(measure::report_of_exec(&report, &seen)));
    prepared.clients.tell(prepared.told.asked_by, &answer);
    Ok(prepared.serve(machine, words, updated))
}

fn load(mut life: exec::Life, observer: &mut dyn Observer) -> anyhow::Result<(exec::Running, Prepared)> {
    let told = life.vmm().clone();
    let mut prepared = Prepared::make(life.incoming(), &told)?;
    let handed = life.claim(observer)?;
    prepared.guest.load(handed.states())?;
    Ok((handed.run(observer)?, prepared))
}

/// Executes the program before again, if there is a way back. What it returns is why there is none.
fn go_back(error: anyhow::Error, way_back: Option<exec::WayBack>) -> anyhow::Error {
    match way_back {
        Some(way_back) => way_back.take(&format!("{error:#}")).into(),
        None => error.context("the guest is lost"),
    }
}
