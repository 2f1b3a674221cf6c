//! A machine whose VMMs are a service of the service manager: its memory is in the manager's store, too, and so outlives a
//! restart of the service, and a VMM that dies.

use std::fs;
use std::path::PathBuf;
use std::process;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::anyhow;
use anyhow::bail;
use custody::Kept;
use custody::Leaving;
use custody::NoteFile;
use custody::Standing;
use custody::When;
use fdpass::Channel;
use fdpass::ConnectError;
use fdpass::Deadline;
use fdpass::monotonic_ns;
use fdpass::systemd::Manager;
use fdpass::systemd::Tell;
use fdstore::Deposit;
use fdstore::Found;
use liveupdate::moment;
use machine::update::Step;
use machine::update::Timeline;
use serde::Deserialize;
use serde::Serialize;
use socket::Timeouts;
use tracing::debug;
use tracing::warn;

use crate::clients::ClientId;
use crate::clients::Clients;
use crate::confine::Confine;
use crate::control::Answer;
use crate::control::Carrier;
use crate::control::Client;
use crate::control::MachineSpec;
use crate::control::Request;
use crate::control::Source;
use crate::control::Status;
use crate::control::UpdateOutcome;
use crate::control::UpdateReport;
use crate::control::UpdateRequest;
use crate::first;
use crate::holder;
use crate::holder::Brings;
use crate::holder::Hold;
use crate::holder::Released;
use crate::leave;
use crate::measure;
use crate::serve::After;
use crate::serve::Alone;
use crate::serve::Told;
use crate::serve::Vmm;
use crate::successor;

/// What the manager shows of a unit whose guest runs.
const RUNS: &str = "the guest runs";
/// How long the manager may take to hear.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a VMM that is there may take to say how it is, and one that is gone to be so.
const SETTLE: Duration = Duration::from_secs(10);
/// How often to look whether it is.
const LOOK: Duration = Duration::from_millis(1);

/// What a VMM leaves for the next process of its service.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Restart {
    /// The process that the machine leaves.
    by: u32,
    /// When it did what.
    when: When,
    #[serde(default)]
    begun: Begun,
}

/// When the next process began, in nanoseconds of the monotonic clock. It measures no other clock for that: the guest waits.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Begun {
    /// When it was made, as exactly as the kernel tells.
    started_ns: Option<u64>,
    /// When it had been loaded.
    taken_ns: Option<u64>,
}

/// Parts of a restart: what each is called, and what it goes on to.
const PARTS: [(&str, &str); 10] = [
    ("paused", "paused"),
    ("saved", "saved"),
    ("sealed", "sealed"),
    ("restarted", "started"),
    ("taken", "taken"),
    ("attached", "attached"),
    ("warm", "warm"),
    ("claimed", "claimed"),
    ("loaded", "loaded"),
    ("entered", "entered"),
];

impl Restart {
    /// What it took. The guest runs by now.
    pub(crate) fn report(&self, timeline: &Timeline, seen: &measure::Told) -> UpdateReport {
        let at = |what: &str| {
            let by_step = Step::named(what).and_then(|step| timeline.at_ns(step));
            let of_process = match what {
                "started" => self.begun.started_ns,
                "taken" => self.begun.taken_ns,
                "entered" => seen.entered_ns,
                _ => None,
            };
            by_step.or(of_process).or_else(|| self.when.at(what).map(|moment| moment.monotonic_ns))
        };
        let mut from = at("stopped");
        let mut phases_us = std::collections::BTreeMap::new();
        for (part, end) in PARTS {
            let Some((begun, ended)) = from.zip(at(end)) else { continue };
            phases_us.insert(part.to_owned(), measure::micros(ended.saturating_sub(begun)));
            from = Some(ended);
        }
        let pause = at("stopped").zip(seen.entered_ns);
        UpdateReport {
            predecessor_pid: self.by,
            successor_pid: Some(process::id()),
            outcome: UpdateOutcome::Updated,
            reason: None,
            pause_us: pause.map(|(stopped, entered)| measure::micros(entered.saturating_sub(stopped))),
            aside_us: None,
            guest_pause_us: seen.guest_pause_us,
            phases_us,
            ticks_before: seen.ticks_before,
            ticks_after: seen.ticks_after,
            probe: None,
        }
    }
}

/// Runs the machine of a service, as its main process: the one that the service's last process has left, or a new one made as
/// `spec` says. `programs` are what it may be updated to.
///
/// # Errors
/// If there is no service manager or it does not keep the machine's memory; if the machine cannot be made, or its guest is
/// lost.
pub fn serve_unit(spec: &MachineSpec, programs: Vec<PathBuf>) -> anyhow::Result<()> {
    let begun = begun();
    let manager = manager()?;
    let found = fdstore::take(&spec.name)?;
    if spec.confine != Confine::No {
        crate::confine::give_up_rights()?;
    }
    let vmm = match (living(spec)?, found.is_none()) {
        (Some(client), _) => join(client, &found)?,
        (None, true) => make(spec, programs, manager)?,
        (None, false) => match take_over(spec, &found, begun) {
            Ok(vmm) => vmm,
            Err(why) => return hold(spec, &found, &format!("{why:#}")),
        },
    };
    let said = Manager::from_environment()?
        .map(|manager| manager.tell(&[Tell::Status(RUNS), Tell::Ready], Deadline::after(PATIENCE)));
    if let Some(Err(error)) = said {
        warn!(error = &error as &dyn std::error::Error, "the service manager is not told");
    }
    successor::serve(vmm)
}

fn manager() -> anyhow::Result<Manager> {
    let none = "no service manager has started this process (NOTIFY_SOCKET is not set): this is for ExecStart= of a unit";
    Manager::from_environment()?.context(none)
}

/// When this process began, and when it got here, on the monotonic clock.
fn begun() -> Begun {
    Begun { started_ns: moment::process_start_ns(process::id()).ok(), taken_ns: Some(monotonic_ns()) }
}

/// Makes the machine, and has its memory kept before its guest runs.
fn make(spec: &MachineSpec, programs: Vec<PathBuf>, manager: Manager) -> anyhow::Result<Vmm> {
    // The socket first: a name that is taken is no reason to make memory.
    let clients = Clients::fresh(spec.socket.as_deref())?;
    let (machine, guest, backends) = first::make(spec, &mut |_, _| {})?;
    let mut vmm = Vmm::new(spec.clone(), machine, guest, clients, backends, programs);
    let note = NoteFile::make(&vmm.note()?)?;
    let deposit = Deposit::make(manager, &vmm.machine, &note);
    vmm.deposit = Some(deposit.context("the machine's memory cannot be kept over a restart")?);
    vmm.begin()?;
    Ok(vmm)
}

/// The VMM that runs the machine, if one does, and how it is: a process of this service that was left over.
fn living(spec: &MachineSpec) -> anyhow::Result<Option<(Client, Answer)>> {
    let Some(socket) = &spec.socket else { return Ok(None) };
    let until = Deadline::after(SETTLE);
    loop {
        let channel = match fdpass::connect(socket, until) {
            Ok(channel) => channel,
            Err(ConnectError::Absent { .. } | ConnectError::Refused { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        channel.require_same_user().context("who listens at the machine's socket is not to be trusted")?;
        let client = Client::new(channel).with_patience(SETTLE);
        match client.ask(&Request::Status, &mut |_, _, _| {}) {
            Ok(answer) => return Ok(Some((client, answer))),
            // One that is about to end may be connected to, and says nothing.
            Err(error) if until.has_passed() => return Err(error),
            Err(_) => thread::sleep(LOOK),
        }
    }
}

/// Takes the machine over from the VMM that runs it, which has said how it is.
fn join((client, status): (Client, Answer), found: &Found) -> anyhow::Result<Vmm> {
    let stored = match status {
        Answer::Status(status) => is_stored(&status)?,
        Answer::Held(held) => {
            bail!("the machine is held by process {}, and does not run: {}", held.pid, held.why)
        }
        other => bail!("unexpected answer to status: {other:?}"),
    };
    debug!(stored, "a VMM of this service is left over, and runs the machine");
    let (ours, theirs) = Channel::pair()?;
    let timeouts = Timeouts::default();
    let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    let request = UpdateRequest {
        successor: Source::Passed,
        carrier: Carrier::Socket,
        populate: true,
        probe: false,
        timeout_ms: millis(timeouts.hand_over),
        prepare_timeout_ms: millis(timeouts.prepare),
    };
    let mut client = client;
    client.set_patience(timeouts.prepare * 2);
    let asked = thread::Builder::new()
        .name("ask".to_owned())
        .spawn(move || client.ask_update_to(theirs, request, &mut |_, _, _| {}))?;
    let taken = successor::take_over(ours, timeouts, &mut |step| debug!(%step, "joins"));
    let mut vmm = match taken {
        Ok(vmm) => vmm,
        Err(error) => {
            let said = match asked.join() {
                Ok(Ok(Answer::Update(report))) => report.reason,
                Ok(Err(error)) => Some(format!("{error:#}")),
                _ => None,
            };
            return Err(error.context(said.unwrap_or_else(|| "the machine was not taken over".to_owned())));
        }
    };
    // Where the service had come to its end, the manager has emptied its store.
    if found.told().regions != vmm.machine.regions().count()
        && let Some(deposit) = &mut vmm.deposit
        && let Err(error) = deposit.put_regions(&vmm.machine)
    {
        // It runs, and is not to be lost for that: from here on it cannot be left in the store.
        warn!(error = &error as &dyn std::error::Error, "the machine's memory is not kept over a restart");
        vmm.deposit = None;
    }
    Ok(vmm)
}

fn is_stored(status: &Status) -> anyhow::Result<bool> {
    match status.stored {
        true => Ok(true),
        false => bail!(
            "process {} runs a machine {} that is no service: stop it first (`tideover stop {}`)",
            status.pid,
            status.name,
            status.name
        ),
    }
}

/// Takes the machine over that the service's last process has left in the store.
fn take_over(spec: &MachineSpec, found: &Found, begun: Begun) -> anyhow::Result<Vmm> {
    let stored = found.told();
    let kept = found.keep()?;
    let left = match settled(&kept)? {
        Standing::Ready(left) => left,
        standing => bail!("{}", holder::stands(&kept, standing)),
    };
    let mut told: Told =
        serde_json::from_value(kept.note().vmm.clone()).context("cannot read what the last VMM tells")?;
    told.spec.socket.clone_from(&spec.socket);
    if told.spec != *spec {
        warn!("the machine goes on as it was made, not as this process is told to make it");
    }
    told.stored = Some(stored);
    match (&mut told.restart, &kept.note().sealed) {
        (Some(restart), Some(sealed)) => {
            restart.when.extend(&sealed.when);
            restart.begun = begun;
        }
        // Its VMM has died while it was sealed.
        _ => (told.alone, told.restart) = (Some(Alone::RunOn), None),
    }
    let (ours, theirs) = Channel::pair()?;
    let timeouts = timeouts(&kept);
    let prospect = kept.prospect(serde_json::to_value(told)?, timeouts);
    thread::scope(|scope| {
        let passed = scope.spawn(|| {
            let agreed = prospect.offer(ours)?;
            kept.pass_on(agreed, left, serde_json::Value::Null, &mut |step| debug!(%step, "passes on"))
        });
        let taken = successor::take_over(theirs, timeouts, &mut |step| debug!(%step, "takes"));
        let passed = passed.join().map_err(|_| anyhow!("the thread that offers the machine has panicked"))?;
        match (taken, passed) {
            (Ok(vmm), _) => Ok(vmm),
            (Err(error), passed) => {
                if let Err(error) = kept.revoke(left) {
                    warn!(error = &error as &dyn std::error::Error, "the machine's claim stands");
                }
                let said = passed
                    .err()
                    .map_or_else(String::new, |reason| format!("{:#}", anyhow::Error::new(reason)));
                Err(error.context(said))
            }
        }
    })
}

/// Holds the machine that is in the store, which cannot run on: it is as it was left until somebody says what is to become of it.
fn hold(spec: &MachineSpec, found: &Found, why: &str) -> anyhow::Result<()> {
    let stored = found.told();
    let kept = found.keep()?;
    warn!(why, "the machine does not run: it is held");
    let manager = manager()?;
    let status = format!("held, and does not run: {why}");
    let ready = || {
        if let Err(error) = manager.tell(&[Tell::Status(&status), Tell::Ready], Deadline::after(PATIENCE)) {
            warn!(
                error = &error as &dyn std::error::Error,
                "the service manager does not hear that it is held"
            );
        }
    };
    let died = "of the service's last process".to_owned();
    let brings = Brings::Remains { vcpus: 0, origin: kept.origin(), died: died.clone() };
    let socket = spec.socket.clone().context("a machine that is a service has a socket")?;
    let (name, when) = (spec.name.clone(), When::default());
    let hold = Hold { name, socket, when, program: None, log: None, brings, stored: Some(stored) };
    match holder::hold_remains(hold, kept, &died, ready) {
        Released::GivenUp => Ok(Deposit::of(manager, &spec.name, stored)?.empty()?),
        Released::Runs | Released::Parked => Ok(()),
    }
}

/// How long it may take to take the machine over: its guest waits.
fn timeouts(kept: &Kept) -> Timeouts {
    let whole: u64 = kept.note().regions.iter().sum();
    let default = Timeouts::default();
    Timeouts { prepare: default.prepare + Duration::from_secs(whole >> 30), ..default }
}

/// How the machine stands once the process that left it is gone.
fn settled(kept: &Kept) -> anyhow::Result<Standing> {
    let until = Deadline::after(SETTLE);
    loop {
        match kept.standing()? {
            Standing::Taken(_) if !until.has_passed() => thread::sleep(LOOK),
            standing => return Ok(standing),
        }
    }
}

/// What is in the store of the service that this process belongs to, of a machine that another process put there.
pub(crate) fn deposit(machine: &str, told: fdstore::Told) -> Option<Deposit> {
    let manager = match Manager::from_environment() {
        Ok(Some(manager)) => manager,
        Ok(None) => {
            warn!("the machine is a service's, and this process is not");
            return None;
        }
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "the service manager cannot be reached");
            return None;
        }
    };
    Deposit::of(manager, machine, told).ok()
}

/// Tells the service manager that this process is the service's main one, before the one that was may end.
pub(crate) fn tell_main_process() {
    let deadline = Deadline::after(PATIENCE);
    let told = Manager::from_environment().and_then(|manager| {
        let Some(manager) = manager else { return Ok(()) };
        // One that held the machine may have said otherwise.
        manager.tell(&[Tell::MainPid(process::id()), Tell::Status(RUNS)], deadline)?;
        manager.await_done(deadline)
    });
    if let Err(error) = told {
        warn!(error = &error as &dyn std::error::Error, "the service manager does not know its main process");
    }
}

/// The cgroups that a process is in.
fn cgroups(process: u32) -> Option<String> {
    fs::read_to_string(format!("/proc/{process}/cgroup")).ok()
}

impl Vmm {
    /// Has the manager keep a note of this VMM in place of those of the ones before it.
    pub(crate) fn renew_note(&mut self) {
        self.renew_note_at_path();
        if self.deposit.is_none() {
            return;
        }
        let renewed = self.note().and_then(|note| match &mut self.deposit {
            Some(deposit) => Ok(deposit.replace_note(&NoteFile::make(&note)?)?),
            None => Ok(()),
        });
        if let Err(error) = renewed {
            warn!(error = &*error, "the service manager keeps what the VMM before this one has noted");
        }
    }

    /// The machine is over.
    pub(crate) fn give_up_deposit(&mut self) {
        self.give_up_place();
        let Some(mut deposit) = self.deposit.take() else { return };
        if let Err(error) = deposit.empty() {
            warn!(
                error = &error as &dyn std::error::Error,
                "the service manager may keep the machine's memory"
            );
        }
    }

    /// Why a machine that is a service is not to go to a process that somebody else has started, if it is not of the service.
    pub(crate) fn is_outsider(&self, client: ClientId, source: &Source) -> Option<String> {
        self.deposit.as_ref()?;
        let inside = match source {
            Source::Own | Source::Program(_) => true,
            Source::Passed => {
                let theirs = self.clients.process(client).and_then(cgroups);
                theirs.is_some() && theirs == cgroups(process::id())
            }
            Source::Listen(_) => false,
        };
        let why = "the machine's VMMs are a service, and who is to succeed is not of it: restart the service instead";
        (!inside).then(|| why.to_owned())
    }

    /// Leaves the machine in the store, sealed, and ends; or says why not, and the guest runs on.
    pub(crate) fn park(&mut self, client: ClientId) -> anyhow::Result<After> {
        match self.try_park() {
            Ok(Ok(parked)) => {
                self.clients.tell(client, &parked);
                Ok(After::End)
            }
            Ok(Err(error)) => {
                warn!(error = &*error, "the machine is not left in the store; the guest runs on");
                self.clients.tell(client, &Answer::Error(format!("{error:#}")));
                Ok(After::Go)
            }
            Err(error) => Err(error.context("the guest is lost")),
        }
    }

    /// The outer error is that of a guest that is lost.
    fn try_park(&mut self) -> anyhow::Result<anyhow::Result<Answer>> {
        if self.deposit.is_none() {
            return Ok(Err(anyhow!("the VMM is no service: there is nobody to leave the machine with")));
        }
        let ready = || -> anyhow::Result<_> {
            let restart = Some(Restart { by: process::id(), when: When::default(), begun: Begun::default() });
            let offer = self.leave_offer(|told| Told { restart, ..told })?;
            Ok((offer, self.tsc_rate()?))
        };
        let (offer, rate) = match ready() {
            Ok(ready) => ready,
            Err(error) => return Ok(Err(error)),
        };
        let Some(deposit) = &mut self.deposit else { return Ok(Err(anyhow!("no store"))) };
        let mut observer = |step: Step| debug!(%step, "leaves this process");
        let mut leaving = Leaving::new(&mut self.machine, &mut self.guest, &mut observer);
        let kept = leaving.check_memory().and_then(|()| leaving.write_note(offer));
        let kept = kept.map_err(anyhow::Error::new).and_then(|()| {
            let note = leaving.note_file().context("no note")?;
            Ok(deposit.add_note(note)?)
        });
        if let Err(error) = kept {
            leaving.go_back()?;
            return Ok(Err(error));
        }
        match leaving.seal(&rate) {
            Ok(epoch) => {
                let answer = Answer::Sealed(leave::sealed_report(epoch, leaving.timeline()));
                debug!(parked_ns = monotonic_ns(), "sealed");
                leaving.leave();
                Ok(Ok(answer))
            }
            Err(error) => {
                leaving.go_back()?;
                if let Err(error) = deposit.withdraw_note() {
                    warn!(error = &error as &dyn std::error::Error, "a note too many is in the store");
                }
                Ok(Err(error.into()))
            }
        }
    }
}
