//! One try: an update, a fault, and the truth after it.

use std::os::fd::AsFd as _;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::ensure;
use fdpass::Deadline;
use machine::OwnershipState;
use machine::OwnershipWord;
use rustix::process::Signal;
use vmm::control;
use vmm::control::Answer;
use vmm::control::CheckReport;
use vmm::control::Recovered;
use vmm::control::Request;
use vmm::control::Source;
use vmm::control::UpdateRequest;

use crate::choice::Carrier;
use crate::choice::Try;
use crate::choice::When;
use crate::choice::Whom;
use crate::keeper::Keeper;
use crate::machine::Event;
use crate::machine::Machine;
use crate::plan::Actor;
use crate::plan::Fault;
use crate::plan::Place;
use crate::plan::Plan;
use crate::plan::Strike;
use crate::process;
use crate::process::Process;
use crate::record::Outcome;
use crate::witness::Comparison;

/// How long predecessor and successor wait for each other: before the pause, and in it.
#[derive(Debug, Clone, Copy)]
struct Patience {
    prepare: Duration,
    hand_over: Duration,
}

/// Of whoever is killed nobody needs to wait for anything.
const AMPLE: Patience = Patience { prepare: Duration::from_secs(60), hand_over: Duration::from_secs(60) };
/// Longer than the way to the place takes where a process is to be stopped, or it is not reached: if a machine has much else
/// to do, it is tried again with more.
const BRIEF: [Patience; 4] = [brief(300), brief(1200), brief(6000), brief(30_000)];

const fn brief(millis: u64) -> Patience {
    Patience { prepare: Duration::from_millis(millis), hand_over: Duration::from_millis(millis / 2) }
}

/// How long something may take that nothing keeps from coming.
const END: Duration = Duration::from_secs(180);
/// From when on it is looked whether anybody is left who could answer.
const SILENCE: Duration = Duration::from_millis(200);
/// How long a process may take to end that has nothing else to do.
const SOON: Duration = Duration::from_secs(20);
/// How long it is looked whether somebody else runs the guest.
const LOOK: Duration = Duration::from_millis(2);

/// What a try came to.
#[derive(Debug, Clone)]
pub struct Found {
    /// How it ended.
    pub outcome: Outcome,
    /// Processes that were killed.
    pub kills: u32,
    /// Processes that were stopped.
    pub stops: u32,
    /// It was recovered, and the guest ran on from where it stood.
    pub ran_on: bool,
    /// How long the guest stood still for the update, in microseconds, if that is known.
    pub pause_us: Option<f64>,
    /// What the memory holds.
    pub memory: Comparison,
    /// Processes in which the guest ran.
    pub owners: u32,
    /// What else is to be said.
    pub note: Option<String>,
}

/// Does it. After any outcome but [`WentThrough`](Outcome::WentThrough), [`RolledBack`](Outcome::RolledBack) and
/// [`Recovered`](Outcome::Recovered) the machine is of no more use.
#[must_use]
pub fn attempt(machine: &mut Machine, chosen: &Try) -> Found {
    let mut course = Course::default();
    let found = course.run(machine, chosen);
    found.unwrap_or_else(|error| {
        let states: Vec<_> = machine.processes().into_iter().map(|pid| (pid, process::state(pid))).collect();
        let note = format!("{error:#}; processes {states:?}; {:?}; said: {}", course.struck, machine.said());
        course.found(Outcome::Hung, None, Some(note))
    })
}

/// What happens in a try.
#[derive(Debug, Default)]
struct Course {
    /// Who was struck.
    struck: Vec<Process>,
    /// One of them is stopped still.
    is_stopped: bool,
    kills: u32,
    stops: u32,
    /// The guest ran, under the word before, in one that was killed.
    killed_runner: bool,
    successor: Option<Process>,
    pause_us: Option<f64>,
    owners: u32,
    ran_on: bool,
    memory: Comparison,
}

/// How it was before.
struct Before {
    word: OwnershipWord,
    owner: Process,
    ticks: u64,
    asked: Instant,
}

/// Something is waited for, and does not come. Time in which this process stood still, too, does not count.
struct Limit {
    left: Duration,
    last: Instant,
}

impl Limit {
    fn new() -> Self {
        Self { left: END, last: Instant::now() }
    }

    fn pass(&mut self, what: &str) -> anyhow::Result<()> {
        let passed = self.last.elapsed().min(Duration::from_secs(1));
        self.last = Instant::now();
        self.left = self.left.saturating_sub(passed);
        ensure!(!self.left.is_zero(), "{what} does not come to an end");
        Ok(())
    }
}

impl Course {
    fn found(&self, outcome: Outcome, owners: Option<u32>, note: Option<String>) -> Found {
        let Self { kills, stops, ran_on, pause_us, memory, .. } = *self;
        Found { outcome, kills, stops, ran_on, pause_us, memory, owners: owners.unwrap_or(self.owners), note }
    }

    fn run(&mut self, machine: &mut Machine, chosen: &Try) -> anyhow::Result<Found> {
        let levels: &[Patience] = if chosen.fault == Fault::Stop { &BRIEF } else { &[AMPLE] };
        let mut found = None;
        for patience in levels {
            let before = self.update(machine, chosen, *patience)?;
            let after = self.aftermath(machine, chosen, &before)?;
            let is_alive = matches!(after.outcome, Outcome::WentThrough | Outcome::RolledBack);
            // It was too short to get there.
            let again = is_alive && self.kills + self.stops == 0 && matches!(chosen.when, When::At { .. });
            found = Some(after);
            if !again {
                break;
            }
        }
        found.context("nothing was tried")
    }

    /// The update, up to whoever asked for it knows how it went, or cannot know any more.
    fn update(&mut self, machine: &mut Machine, chosen: &Try, patience: Patience) -> anyhow::Result<Before> {
        machine.keeper.as_ref().map_or(Ok(()), Keeper::await_kept)?;
        let word = machine.witness.owner()?;
        let holders = machine.witness.holders(word, &machine.processes());
        ensure!(holders.len() == 1, "before the update, {holders:?} hold {word:?}");
        let owner = Process::open(holders[0])?;
        let ticks = machine.witness.ticks();
        machine.folder.write_plan(&plan(chosen, owner.pid, patience)?)?;
        let _ = machine.events();
        self.successor = None;
        let passed = if chosen.starts { None } else { Some(machine.start_successor()?) };
        let (successor, channel) = passed.unzip();
        self.successor = successor.flatten();
        let asked = Instant::now();
        // A successor may have killed its predecessor by now: nobody is there to answer then, which is heard below.
        let sent = machine.send(&request(chosen, patience)?, channel.as_ref());
        ensure!(sent.is_ok() || chosen.whom != Whom::Itself, "nobody can be asked: {sent:?}");
        drop(channel);
        let before = Before { word, owner, ticks, asked };
        self.follow(machine, chosen, patience, &before)?;
        Ok(before)
    }

    fn follow(
        &mut self,
        machine: &mut Machine,
        chosen: &Try,
        patience: Patience,
        before: &Before,
    ) -> anyhow::Result<()> {
        let mut limit = Limit::new();
        let stopped_for = patience.prepare.mul_f64(f64::from(u32::try_from(chosen.stop_percent)?) / 100.0);
        let mut moment = match chosen.when {
            When::After(after_us) => Some(before.asked + Duration::from_micros(after_us)),
            When::At { .. } => None,
        };
        let mut wake = None;
        loop {
            limit.pass("the update")?;
            let look = Instant::now() + SILENCE;
            let until = [moment, wake].into_iter().flatten().fold(look, Instant::min);
            let fds = [machine.control.as_fd(), machine.events.as_fd()];
            let ready = fdpass::ready(&fds, Deadline::at(until))?;
            if ready.contains(&1) {
                for event in machine.events() {
                    self.hear(chosen, before, event)?;
                }
            }
            if ready.contains(&0) && self.is_answered(machine)? {
                return Ok(());
            }
            if moment.is_some_and(|moment| moment <= Instant::now()) {
                moment = None;
                self.strike(machine, chosen, before)?;
            }
            if self.is_stopped && wake.is_none() {
                wake = Some(Instant::now() + stopped_for);
            }
            if wake.is_some_and(|wake| wake <= Instant::now()) {
                self.wake();
                wake = Some(Instant::now() + END);
            }
            if ready.is_empty() && self.kills > 0 && is_settled(machine)? {
                // Nobody is left who would answer: the one who was to is dead.
                return Ok(());
            }
        }
    }

    /// Hears the other end of the control channel: true if nothing more is to come.
    fn is_answered(&mut self, machine: &Machine) -> anyhow::Result<bool> {
        match control::receive(&machine.control, Deadline::after(Duration::ZERO))? {
            Some(Answer::Progress { .. }) => Ok(false),
            Some(Answer::Update(report)) => {
                self.pause_us = report.pause_us;
                Ok(true)
            }
            // The guest is lost, or nobody is left: it is looked which.
            Some(Answer::Error(_)) | None => Ok(true),
            other => anyhow::bail!("unexpected answer to an update: {other:?}"),
        }
    }

    /// A process tells where it is: at its start, or where it comes to grief.
    fn hear(&mut self, chosen: &Try, before: &Before, event: Event) -> anyhow::Result<()> {
        let When::At { actor, place } = chosen.when else {
            if event.actor == Actor::Successor {
                self.successor = Process::open(event.pid).ok();
            }
            return Ok(());
        };
        // At its start a process tells of itself twice: as such, and where it comes to grief.
        if (event.actor, event.place) != (actor, place) || self.kills + self.stops > 0 {
            return Ok(());
        }
        let others = matches!(chosen.whom, Whom::Predecessor | Whom::Both).then_some(before.owner.pid);
        let itself = (chosen.whom != Whom::Predecessor).then_some(event.pid);
        for pid in others.into_iter().chain(itself) {
            self.count(chosen.fault);
            // One that is killed may be gone by now.
            self.struck.extend(Process::open(pid).ok());
        }
        if chosen.fault == Fault::Stop {
            let stopped = self.struck.last().context("a stopped process is gone")?;
            ensure!(stopped.stands(), "process {} does not stop", stopped.pid);
            self.is_stopped = true;
        }
        Ok(())
    }

    fn count(&mut self, fault: Fault) {
        match fault {
            Fault::Kill => self.kills += 1,
            Fault::Stop => self.stops += 1,
        }
    }

    /// The moment has come.
    fn strike(&mut self, machine: &mut Machine, chosen: &Try, before: &Before) -> anyhow::Result<()> {
        if chosen.whom == Whom::Daemon {
            self.count(Fault::Kill);
            return machine.keeper.as_mut().map_or(Ok(()), Keeper::kill_and_start);
        }
        let pids = machine.processes();
        let holders = machine.witness.holders(before.word, &pids);
        let main = before.owner.pid;
        let others: Vec<u32> = match chosen.carrier {
            Carrier::Socket => self.successor.iter().map(|process| process.pid).collect(),
            Carrier::Exec => pids.iter().copied().filter(|pid| *pid != main).collect(),
        };
        let victims: Vec<u32> = match chosen.whom {
            Whom::Itself | Whom::Predecessor => vec![main],
            Whom::Successor => others,
            Whom::Daemon => Vec::new(),
            Whom::Both => others.into_iter().chain([main]).collect(),
            Whom::Aside => holders.iter().copied().filter(|pid| *pid != main).collect(),
        };
        let signal = match chosen.fault {
            Fault::Kill => Signal::KILL,
            Fault::Stop => Signal::STOP,
        };
        for pid in victims.into_iter().filter(|pid| pids.contains(pid)) {
            let Ok(process) = Process::open(pid) else { continue };
            if process.signal(signal) {
                self.count(chosen.fault);
                self.killed_runner |= holders.contains(&pid);
                self.is_stopped |= chosen.fault == Fault::Stop && process.stands();
                self.struck.push(process);
            }
        }
        Ok(())
    }

    fn wake(&mut self) {
        if std::mem::replace(&mut self.is_stopped, false) {
            self.struck.iter().for_each(Process::wake);
        }
    }

    /// The truth, from outside.
    fn aftermath(&mut self, machine: &mut Machine, chosen: &Try, before: &Before) -> anyhow::Result<Found> {
        for event in machine.events() {
            self.hear(chosen, before, event)?;
        }
        self.bury(chosen)?;
        self.owners = self.look_who_runs(machine)?;
        let mut limit = Limit::new();
        let status = loop {
            while !is_settled(machine)? {
                limit.pass("what is left of the update")?;
                await_change(machine);
                // One that nobody waited for any more may get to its place now.
                for event in machine.events() {
                    self.hear(chosen, before, event)?;
                }
                if self.is_stopped {
                    self.owners = self.owners.max(self.look_who_runs(machine)?);
                }
                self.bury(chosen)?;
            }
            let word = machine.witness.owner()?;
            let Some(pid) = machine.processes().first().copied() else {
                return self.lost(machine, chosen, before, word);
            };
            let status = match machine.status() {
                Ok(status) => status,
                // One whose threads were killed as they left it has their locks until it ends, which it does then.
                Err(error) => match Process::open(pid).is_ok_and(|process| !process.ends_within(SOON)) {
                    true => return Err(error),
                    false => return self.lost(machine, chosen, before, word),
                },
            };
            if status.pid == pid {
                break status;
            }
            // An update that nobody struck was still under way: the machine has changed hands between the two looks.
            limit.pass(&format!("{} answers, and {pid} holds the word {word:?}", status.pid))?;
            await_change(machine);
        };
        let pid = status.pid;
        ensure!(status.identity == machine.identity, "the machine's identity is {} now", status.identity);
        if let Some(still) = stands_still(machine)? {
            return Ok(self.found(Outcome::Stranded, None, Some(format!("{still} in process {pid}"))));
        }
        let ticks = machine.witness.ticks();
        ensure!(ticks > before.ticks, "the guest had counted {}, and now {ticks}", before.ticks);
        let check = machine.check()?;
        self.memory = comparison(&check);
        let went = status.updates - machine.updates;
        machine.updates = status.updates;
        ensure!(went <= 1, "{went} updates at once");
        let outcome = if went == 1 { Outcome::WentThrough } else { Outcome::RolledBack };
        Ok(self.found(outcome, Some(self.owners.max(1)), check.first_bad))
    }

    /// Waits for the end of those that were killed: a process that dies has its locks and files for a moment still.
    fn bury(&self, chosen: &Try) -> anyhow::Result<()> {
        let all_dead = || self.struck.iter().all(|process| process.ends_within(END));
        ensure!(chosen.fault == Fault::Stop || all_dead(), "a process that was killed does not end");
        Ok(())
    }

    /// No process is left.
    fn lost(
        &mut self,
        machine: &mut Machine,
        chosen: &Try,
        before: &Before,
        word: OwnershipWord,
    ) -> anyhow::Result<Found> {
        self.memory = machine.witness.compare()?;
        let is_meant = match chosen.loses() {
            Some(loses) => loses && self.kills > 0,
            None => self.may_be_lost(chosen, before, word),
        };
        if is_meant {
            return match machine.keeper {
                Some(_) => self.recover(machine, word),
                None => Ok(self.found(Outcome::Lost, Some(0), None)),
            };
        }
        let note = format!("{word:?}, before {:?}; said: {}", before.word, machine.said());
        Ok(self.found(Outcome::Stranded, Some(0), Some(note)))
    }

    /// A daemon has kept the machine: it is held, whole, and runs again.
    fn recover(&mut self, machine: &mut Machine, word: OwnershipWord) -> anyhow::Result<Found> {
        let keeper = machine.keeper.as_ref().context("nobody keeps the machine")?;
        // What was planned is over, though nobody may have come to its place.
        machine.folder.write_plan(&Plan { patience_ms: millis(AMPLE.prepare)?, ..Plan::default() })?;
        let held = keeper.await_held()?;
        let (held_memory, files) = keeper.compare()?;
        ensure!(machine.witness.are_same(&files)?, "other memory is held than the machine had");
        self.memory = self.memory.and(&comparison(&held_memory));
        let ticks = machine.witness.ticks();
        let report = keeper.recover()?;
        self.ran_on = report.how == Recovered::RunsOn;
        let may_run_on = word.state() != OwnershipState::Running;
        ensure!(self.ran_on == held.complete, "complete: {}, {report:?}", held.complete);
        ensure!(may_run_on || !self.ran_on, "a state runs on with memory of a later instant: {word:?}");
        machine.control = keeper.connect()?;
        let status = machine.status()?;
        ensure!(status.pid == report.pid, "{} answers, and {} was to run", status.pid, report.pid);
        ensure!(status.identity == machine.identity, "the machine's identity is {} now", status.identity);
        machine.updates = status.updates;
        let mut limit = Limit::new();
        while !is_settled(machine)? {
            limit.pass("the recovery")?;
            await_change(machine);
        }
        ensure!(!self.ran_on || machine.witness.ticks() >= ticks, "ticks went back from {ticks}");
        if let Some(still) = stands_still(machine)? {
            return Ok(self.found(Outcome::Stranded, None, Some(format!("{still} after a recovery"))));
        }
        self.memory = self.memory.and(&comparison(&machine.check()?));
        Ok(self.found(Outcome::Recovered, Some(1), None))
    }

    /// Whether the one that ran the guest was killed as it did, going by the word that it left.
    fn may_be_lost(&self, chosen: &Try, before: &Before, word: OwnershipWord) -> bool {
        match chosen.whom {
            _ if self.kills == 0 => false,
            Whom::Both => true,
            _ if word.state() != OwnershipState::Running => false,
            _ if word.nonce() == before.word.nonce() => self.killed_runner,
            // It is the next one's: of another process, or of the next program in the same.
            Whom::Successor => true,
            Whom::Predecessor => chosen.carrier == Carrier::Exec,
            _ => false,
        }
    }

    /// Lets whoever is stopped go on, and looks whether the guest runs in another process than its owner: that one stands still
    /// meanwhile. Gives in how many processes the guest runs.
    fn look_who_runs(&mut self, machine: &Machine) -> anyhow::Result<u32> {
        let pids = machine.processes();
        let word = machine.witness.owner()?;
        let holders = machine.witness.holders(word, &pids);
        let owner = match holders[..] {
            [owner] if word.state() == OwnershipState::Running => Process::open(owner).ok(),
            _ => None,
        };
        let owner =
            owner.filter(|owner| !self.is_stopped || self.struck.iter().all(|one| one.pid != owner.pid));
        let Some(owner) = owner.filter(|_| pids.len() > 1) else {
            self.wake();
            return Ok(0);
        };
        if !owner.stop() {
            owner.wake();
            self.wake();
            return Ok(0);
        }
        let same = || machine.witness.owner().is_ok_and(|now| now == word);
        let (before, was_same) = (machine.witness.ticks_of_each(), same());
        self.wake();
        thread::sleep(LOOK);
        let (after, is_same) = (machine.witness.ticks_of_each(), same());
        owner.wake();
        // If it changed hands meanwhile, somebody else has every right to run it.
        Ok(if was_same && is_same && before != after { 2 } else { 1 })
    }
}

fn comparison(check: &CheckReport) -> Comparison {
    Comparison {
        pages_checked: check.pages_checked,
        pages_lost: check.pages_lost,
        guest_errors: check.guest_errors,
        registers_lost: check.registers_lost,
        ticks_miscounted: check.ticks_miscounted,
    }
}

fn plan(chosen: &Try, predecessor: u32, patience: Patience) -> anyhow::Result<Plan> {
    let strike = match chosen.when {
        When::After(_) => None,
        When::At { actor, place } => Some(Strike {
            actor,
            place,
            fault: chosen.fault,
            victim: matches!(chosen.whom, Whom::Predecessor | Whom::Both).then_some(predecessor),
            both: chosen.whom == Whom::Both,
        }),
    };
    let goes_back = strike.as_ref().is_some_and(|strike| strike.actor == Actor::Back);
    Ok(Plan {
        strike,
        rehearsed: chosen.carrier == Carrier::Exec,
        next_fails: goes_back.then_some(chosen.next_fails),
        patience_ms: millis(patience.prepare)?,
    })
}

fn millis(span: Duration) -> anyhow::Result<u64> {
    Ok(u64::try_from(span.as_millis())?)
}

fn request(chosen: &Try, patience: Patience) -> anyhow::Result<Request> {
    Ok(Request::Update(UpdateRequest {
        successor: if chosen.starts { Source::Own } else { Source::Passed },
        carrier: match chosen.carrier {
            Carrier::Socket => control::Carrier::Socket,
            Carrier::Exec => control::Carrier::Exec,
        },
        populate: true,
        probe: false,
        timeout_ms: millis(patience.hand_over)?,
        prepare_timeout_ms: millis(patience.prepare)?,
    }))
}

/// Whether one process is left, which owns the machine, or none.
fn is_settled(machine: &Machine) -> anyhow::Result<bool> {
    let pids = machine.processes();
    let word = machine.witness.owner()?;
    Ok(match pids[..] {
        [] => true,
        [_] => word.state() == OwnershipState::Running && machine.witness.holders(word, &pids) == pids,
        _ => false,
    })
}

/// Waits for one of the processes to end, for a moment.
fn await_change(machine: &Machine) {
    let processes: Vec<Process> =
        machine.processes().into_iter().filter_map(|pid| Process::open(pid).ok()).collect();
    let fds: Vec<_> = processes.iter().map(|process| process.as_fd()).collect();
    // Those that are orphans now are taken note of by others, and this is asked again.
    let _ = fdpass::ready(&fds, Deadline::after(Duration::from_millis(5)));
    thread::sleep(Duration::from_micros(100));
}

/// Waits until each vCPU has counted on; says which does not.
fn stands_still(machine: &Machine) -> anyhow::Result<Option<String>> {
    let before = machine.witness.ticks_of_each();
    ensure!(before.len() == usize::try_from(machine.vcpus)?, "{} vCPUs are in the memory", before.len());
    let mut limit = Limit::new();
    loop {
        let now = machine.witness.ticks_of_each();
        if before.iter().zip(&now).all(|(before, now)| now > before) {
            return Ok(None);
        }
        if limit.pass("the guest's standstill").is_err() {
            return Ok(Some(format!("a vCPU stands still: {before:?}, {now:?}")));
        }
        thread::sleep(Duration::from_micros(200));
    }
}

/// The place of a try, if it has one.
#[must_use]
pub fn place_of(chosen: &Try) -> (Option<Actor>, Option<Place>, Option<u64>) {
    match chosen.when {
        When::At { actor, place } => (Some(actor), Some(place), None),
        When::After(after_us) => (None, None, Some(after_us)),
    }
}
