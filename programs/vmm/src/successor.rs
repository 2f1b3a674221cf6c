//! A VMM that takes a machine over.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::bail;
use custody::When;
use exec::Handoff;
use fdpass::Channel;
use fdpass::monotonic_ns;
use gmem::Inode;
use liveupdate::moment::Moment;
use liveupdate::moment::TscRate;
use machine::Identity;
use machine::Incoming;
use machine::Machine;
use machine::StateName;
use machine::update::Observer;
use machine::update::Step;
use machine::update::Timeline;
use serde::Deserialize as _;
use socket::Running;
use socket::Successor;
use socket::Timeouts;
use tracing::debug;
use tracing::warn;

use crate::backends::Backends;
use crate::clients::Clients;
use crate::confine::Confine;
use crate::control::Answer;
use crate::control::GuestKind;
use crate::control::UpdateReport;
use crate::first;
use crate::guest;
use crate::guest::AnyGuest;
use crate::guest::Health;
use crate::guest::MemoryWords;
use crate::guest::Served;
use crate::kvm_guest;
use crate::kvm_guest::KvmGuest;
use crate::kvm_guest::NewVm;
use crate::kvm_guest::Setup;
use crate::measure;
use crate::measure::Before;
use crate::remains::AtRest;
use crate::serve::Alone;
use crate::serve::Answered;
use crate::serve::History;
use crate::serve::Side;
use crate::serve::Told;
use crate::serve::Vmm;
use crate::serve::Watch;
use crate::serve::unwatched;
use crate::service;
use crate::thread_guest;
use crate::thread_guest::ThreadGuest;
use crate::update::go_on;

/// How long a predecessor may take to tell how the update went. One that takes longer lives, and tells later.
const FAREWELL: Duration = Duration::from_secs(1);

/// Where the predecessor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// It started this process, and is at the other end of its standard input.
    Started,
    /// It listens at this path.
    Connect(PathBuf),
    /// This process executed it before, and it has left this.
    Executed(Handoff),
}

/// Formats of its own states that this VMM can read.
pub fn formats() -> impl Iterator<Item = &'static str> {
    kvm_guest::FORMATS.into_iter().chain(thread_guest::FORMATS).chain(devices::FORMATS)
}

/// Takes a machine over from its VMM, and serves. `observer` is told each step as it is reached.
///
/// # Errors
/// If the machine was not taken over, which leaves the guest in the predecessor; or if it was, and the guest is lost.
pub fn succeed(start: &Start, timeouts: Timeouts, observer: &mut dyn Observer) -> anyhow::Result<()> {
    taken_over(start, timeouts, observer)?.map_or(Ok(()), serve)
}

/// As [`succeed`]; `watch` is told of the steps of this update, and of those of every later one from here.
///
/// # Errors
/// As [`succeed`].
pub fn succeed_watched(start: &Start, timeouts: Timeouts, mut watch: Watch) -> anyhow::Result<()> {
    let taken = taken_over(start, timeouts, &mut |step: Step| watch(Side::Successor, step))?;
    taken.map_or(Ok(()), |vmm| serve(Vmm { watch, ..vmm }))
}

/// A VMM that has taken the machine over; `None` if that was only to be rehearsed.
fn taken_over(start: &Start, timeouts: Timeouts, observer: &mut dyn Observer) -> anyhow::Result<Option<Vmm>> {
    let formats: Vec<&str> = formats().collect();
    let (successor, way_back) = match start {
        Start::Started => (Successor::from_stdin(&formats, timeouts), None),
        Start::Connect(path) => (Successor::connect(path, &formats, timeouts), None),
        Start::Executed(handoff) => {
            let life = exec::Life::begin(handoff)?;
            (Successor::greet(life.channel, &formats, timeouts), Some(life.way_back))
        }
    };
    let executed_again = matches!(way_back, Some(None));
    let taken = successor.map_err(Into::into).and_then(|successor| take(successor, observer));
    let taken = match (taken, way_back.flatten()) {
        (Err(error), Some(way_back)) => {
            return Err(way_back.take(&format!("{error:#}"), &go_on()).into());
        }
        (taken, _) => taken?,
    };
    match taken {
        Some((running, loaded)) => Ok(Some(begin(running, loaded, !executed_again, observer)?)),
        None => Ok(None),
    }
}

/// Takes a machine over from whoever is at the other end of `channel`, and lets its guest run.
///
/// # Errors
/// As [`succeed`].
pub(crate) fn take_over(
    channel: Channel,
    timeouts: Timeouts,
    observer: &mut dyn Observer,
) -> anyhow::Result<Vmm> {
    let formats: Vec<&str> = formats().collect();
    let taken = take(Successor::greet(channel, &formats, timeouts)?, observer)?;
    let (running, prepared) = taken.context("the machine was only to be rehearsed")?;
    begin(running, prepared, true, observer)
}

/// Takes the machine over; `None` if that was only to be rehearsed. Until it returns, nothing has happened that the
/// predecessor could not undo.
fn take(successor: Successor, observer: &mut dyn Observer) -> anyhow::Result<Option<(Running, Loaded)>> {
    // Before the memory: after a kexec it takes its time to come, and the guest waits.
    let ahead = Ahead::make(successor.vmm());
    let mut attached = successor.attach(observer)?;
    let mut prepared = match Prepared::make(attached.incoming_mut(), ahead) {
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
    let handed = match attached.claim(observer) {
        Ok(handed) => handed,
        Err(error) if error.is_rehearsed() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    prepared.hear(handed.vmm());
    let loaded = match prepared.load(handed.states()) {
        Ok(loaded) => loaded,
        Err(error) => {
            handed.give_up(&format!("{error:#}"));
            return Err(error);
        }
    };
    Ok(Some((handed.run(observer)?, loaded)))
}

/// Serves, as confined as the machine is to be. That this cannot be is no reason to lose the guest.
pub(crate) fn serve(mut vmm: Vmm) -> anyhow::Result<()> {
    if let Err(error) = vmm.confine() {
        warn!(error = &error as &dyn std::error::Error, "the VMM is not confined");
    }
    vmm.obey()
}

/// What is ready before the memory is there. What goes wrong here does so again where it can be told.
struct Ahead {
    begun: Option<Moment>,
    told: anyhow::Result<Told>,
    backends: Option<Backends>,
    vm: Option<NewVm>,
}

impl Ahead {
    fn make(told: &serde_json::Value) -> Self {
        let begun = Moment::now().ok();
        let told = Told::deserialize(told).context("cannot read what the predecessor tells");
        let is_kvm = told.as_ref().is_ok_and(|told| told.spec.guest == GuestKind::Kvm);
        let vm = is_kvm.then(NewVm::make).and_then(Result::ok);
        // Else they come with the memory.
        let left = told.as_ref().ok().filter(|told| told.is_left());
        let backends = left.and_then(|told| Backends::open(&told.spec).ok());
        Self { begun, told, backends, vm }
    }
}

/// What is ready before the state is there.
struct Prepared {
    begun: Option<Moment>,
    told: Told,
    clients: Clients,
    backends: Arc<Backends>,
    guest: Next,
}

/// What the machine's next guest is.
enum Next {
    /// One that is to be loaded.
    Goes(Box<dyn Served>),
    /// One that starts from the beginning, which is made when the memory is this process's to write.
    Boots { memory: Arc<Inode>, identity: Identity },
}

impl Prepared {
    fn make(incoming: &mut Incoming, ahead: Ahead) -> anyhow::Result<Self> {
        let Ahead { begun, told, backends, vm } = ahead;
        let told = told?;
        let socket = told.spec.socket.as_deref();
        let (clients, backends) = match told.is_left() {
            true => (Clients::fresh(socket)?, backends.map_or_else(|| Backends::open(&told.spec), Ok)?),
            false => {
                let clients = Clients::adopt(incoming.fds(), &told.clients, socket)?;
                (clients, Backends::adopt(&told.spec, incoming.fds(), &told.consoles)?)
            }
        };
        let backends = Arc::new(backends);
        backends.faults().clone_from(&told.faults);
        let [memory] = incoming.memories() else {
            bail!(
                "this VMM gives a guest one piece of memory, the machine has {}",
                incoming.memories().len()
            );
        };
        let vcpus = u32::try_from(incoming.vcpus()).context("more vCPUs than any VM has")?;
        let identity = incoming.identity();
        if told.alone == Some(Alone::Boot) {
            let guest = Next::Boots { memory: Arc::clone(memory), identity };
            return Ok(Self { begun, told, clients, backends, guest });
        }
        let health = Health::well()?;
        let guest: Box<dyn Served> = match told.spec.guest {
            GuestKind::Kvm => {
                let spec = &told.spec;
                let setup = Setup { spec, memory, identity, backends: &backends, health };
                let vm = vm.map_or_else(NewVm::make, Ok)?;
                Box::new(KvmGuest::prepare(vm, &setup, vcpus, &told.before_pause)?)
            }
            GuestKind::Thread => Box::new(ThreadGuest::prepare(memory, vcpus, health)?),
        };
        Ok(Self { begun, told, clients, backends, guest: Next::Goes(guest) })
    }

    /// Makes the guest whole, in a machine that is claimed.
    fn load(self, states: &BTreeMap<StateName, Vec<u8>>) -> anyhow::Result<Loaded> {
        let Self { begun, told, clients, backends, guest } = self;
        let guest = match guest {
            Next::Goes(mut guest) => {
                guest.load(states)?;
                guest
            }
            Next::Boots { memory, identity } => first::boot_again(&told.spec, &memory, identity, &backends)?,
        };
        Ok(Loaded { begun, told, clients, backends, guest })
    }

    /// Takes in what the predecessor tells at last.
    fn hear(&mut self, last: &serde_json::Value) {
        if let (Some(crossing), Ok(when)) = (&mut self.told.crossing, When::deserialize(last)) {
            crossing.when.extend(&when);
        }
    }
}

/// What is ready once the state is there.
struct Loaded {
    begun: Option<Moment>,
    told: Told,
    clients: Clients,
    backends: Arc<Backends>,
    guest: Box<dyn Served>,
}

impl Loaded {
    /// Lets the guest run, whose machine is this process's now.
    fn start(&mut self, machine: &Machine) -> anyhow::Result<(Option<MemoryWords>, Before)> {
        let words = MemoryWords::of(&self.told.spec, machine);
        let before = Before::look(words.as_ref(), self.told.probe);
        match self.told.held {
            false => self.guest.start().context("the guest is lost")?,
            true => self.guest.attend(),
        }
        guest::serves(&*self.guest, machine);
        self.clients.own();
        Ok((words, before))
    }

    /// What was seen of the guest since.
    fn seen(&mut self, words: Option<&MemoryWords>, before: Before, timeline: &Timeline) -> measure::Told {
        let mut seen = measure::after_update(words, before, (!self.told.held).then_some(&*self.guest));
        if let Some(mut crossing) = self.told.crossing.take()
            && let Some(rate) = self.rate()
        {
            crossing.look_back(&rate);
            self.told.history = History { kexecs: self.told.history.kexecs + 1, ..self.told.history };
            self.told.history.lived_ns += crossing.since_it_began_ns(&rate);
            self.told.history.made_ns = monotonic_ns();
            let at = (timeline, seen.entered_ns);
            let report = crossing.report(&self.told.spec.name, at, &seen, &*self.guest, &rate);
            self.told.crossed = Some(report.clone());
            seen.kexec = Some(report);
        }
        seen
    }

    fn rate(&self) -> Option<TscRate> {
        let known = TscRate::between(&self.begun?, &Moment::now().ok()?);
        known.ok().or_else(|| TscRate::measure().ok())
    }

    fn serve(self, machine: Machine, words: Option<MemoryWords>, updated: bool) -> Vmm {
        let Self { told, clients, backends, guest, .. } = self;
        let guest = AnyGuest { guest, held: told.held };
        let History { updates, recoveries, .. } = told.history;
        let recovered = u64::from(told.alone.is_some());
        let updates = updates + u64::from(updated && told.alone.is_none());
        let history = History { updates, recoveries: recoveries + recovered, ..told.history };
        let Told { spec, programs, crossed, stored, .. } = told;
        let confined = Confine::No;
        let deposit = stored.and_then(|told| service::deposit(&spec.name, told));
        Vmm {
            spec,
            machine,
            guest,
            words,
            clients,
            backends,
            programs,
            history,
            confined,
            crossed,
            updated: None,
            at_rest: AtRest::default(),
            deposit,
            place: None,
            since: Moment::now().ok(),
            watch: unwatched(),
        }
    }
}

/// Lets the guest run, and makes its machine ready for the next update. It `is_updated`, or back where it was.
fn begin(
    running: Running,
    mut loaded: Loaded,
    is_updated: bool,
    observer: &mut dyn Observer,
) -> anyhow::Result<Vmm> {
    let (words, before) = loaded.start(running.machine())?;
    if loaded.told.stored.is_some() {
        service::tell_main_process();
    }
    let mut seen = measure::Told::default();
    let timeline = running.timeline().clone();
    let tell = || {
        seen = loaded.seen(words.as_ref(), before, &timeline);
        serde_json::to_value(&seen).unwrap_or_default()
    };
    let (settled, parting) = running.settle_and_part(observer, tell);
    let machine = settled.unwrap_or_else(|unsettled| {
        // It runs; the next update tries to settle again, and says so if it cannot.
        warn!(error = &unsettled.cause as &dyn std::error::Error, "the session is not settled");
        unsettled.machine
    });
    let mut updated = None;
    if loaded.told.answered.is_some() || loaded.told.parts {
        match (parting.was_told(FAREWELL), loaded.told.answered) {
            (Some(last), _) => updated = UpdateReport::deserialize(last).ok(),
            (None, Some(Answered { client, by })) => {
                let report = measure::report_of_death(by, &seen);
                loaded.clients.tell(client, &Answer::Update(Box::new(report.clone())));
                updated = Some(report);
            }
            (None, None) => {}
        }
    }
    if let Some(restart) = loaded.told.restart.take() {
        updated = Some(restart.report(&timeline, &seen));
    }
    let mut vmm = Vmm { updated, ..loaded.serve(machine, words, is_updated) };
    if let Err(error) = vmm.find_place() {
        // It runs, and what its last VMM noted is there.
        warn!(error = &*error, "what this VMM notes of the machine is not found by its path");
    }
    vmm.renew_note();
    Ok(vmm)
}
