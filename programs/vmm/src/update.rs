//! The predecessor's side of an update.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::bail;
use exec::Replaced;
use fdpass::Channel;
use fdpass::Deadline;
use fdpass::Listener;
use fdstore::Deposit;
use machine::FdName;
use machine::update::Guest as _;
use machine::update::Step;
use socket::LinkError;
use socket::Offer;
use socket::Outcome;
use socket::Program;
use socket::Reason;
use socket::Started;
use socket::Timeouts;
use tracing::debug;
use tracing::info;

use crate::backends::Backends;
use crate::clients::ClientId;
use crate::clients::Clients;
use crate::confine::Confine;
use crate::control::Answer;
use crate::control::Carrier;
use crate::control::Source;
use crate::control::UpdateOutcome;
use crate::control::UpdateReport;
use crate::control::UpdateRequest;
use crate::guest::MemoryWords;
use crate::guest::STOP_TIMEOUT;
use crate::measure;
use crate::serve::After;
use crate::serve::Answered;
use crate::serve::Side;
use crate::serve::Told;
use crate::serve::Vmm;

/// How long to wait for the end of a process whose end of the channel is closed.
const DEATH: Duration = Duration::from_millis(500);

/// How long somebody who connects may take to say hello.
const HELLO: Duration = Duration::from_secs(1);
/// What a program is told to take a machine over from another process.
const SUCCEED: [&str; 2] = ["vmm", "succeed"];
/// What a program is told to run the machine of the program that this process executed before.
const GO_ON: [&str; 3] = ["vmm", "succeed", "--handoff"];

/// What a program is told to run the machine of the program that this process executed before, but for the hand-off.
pub(crate) fn go_on() -> [String; 3] {
    GO_ON.map(str::to_owned)
}

fn timeouts(request: &UpdateRequest) -> Timeouts {
    Timeouts {
        prepare: Duration::from_millis(request.prepare_timeout_ms),
        hand_over: Duration::from_millis(request.timeout_ms),
    }
}

/// Consoles of the machine, each with its number.
type Consoles = Vec<(u32, FdName, OwnedFd)>;

/// What goes with the machine beside its memory.
fn fds<'a>(
    clients: &'a Clients,
    backends: &'a Backends,
    consoles: &'a Consoles,
) -> anyhow::Result<Vec<(FdName, BorrowedFd<'a>)>> {
    let consoles = consoles.iter().map(|(_, name, fd)| (*name, fd.as_fd()));
    Ok(clients.fds().into_iter().chain(backends.fds()?).chain(consoles).collect())
}

impl Vmm {
    /// `passed` is what came with the request.
    pub(crate) fn update(
        &mut self,
        client: ClientId,
        request: &UpdateRequest,
        passed: Option<OwnedFd>,
    ) -> anyhow::Result<After> {
        if self.confined != Confine::No && !matches!(request.successor, Source::Passed | Source::Listen(_)) {
            let reason = "this VMM is confined, and starts no program: the successor has to be started by who asks, and \
                          the carrier is socket";
            return Ok(self.refuse(client, reason.to_owned()));
        }
        if let Some(reason) = self.is_outsider(client, &request.successor) {
            return Ok(self.refuse(client, reason));
        }
        let patience = timeouts(request).hand_over.min(STOP_TIMEOUT);
        self.guest.guest.set_patience(patience);
        let updated = match request.carrier {
            Carrier::Socket => self.hand_over(client, request, passed),
            Carrier::Exec => self.execute(client, request),
        };
        self.guest.guest.set_patience(STOP_TIMEOUT);
        updated.inspect_err(|error| {
            self.clients.tell(client, &Answer::Error(format!("{error:#}")));
        })
    }

    fn told(
        &self,
        request: &UpdateRequest,
        consoles: &Consoles,
        answered: Option<Answered>,
    ) -> anyhow::Result<serde_json::Value> {
        let told = Told {
            spec: self.spec.clone(),
            before_pause: self.guest.guest.before_pause(),
            populate: request.populate,
            probe: request.probe,
            held: self.guest.held,
            clients: self.clients.modes(),
            consoles: consoles.iter().map(|(number, ..)| *number).collect(),
            programs: self.programs.clone(),
            history: self.history,
            answered,
            parts: true,
            faults: self.faults(),
            crossing: None,
            crossed: self.crossed.clone(),
            alone: None,
            stored: self.deposit.as_ref().map(Deposit::told),
            restart: None,
        };
        Ok(serde_json::to_value(told)?)
    }

    pub(crate) fn faults(&self) -> BTreeMap<String, String> {
        let devices = self.guest.guest.devices(&self.spec);
        devices.into_iter().filter_map(|device| device.fault.map(|fault| (device.name, fault))).collect()
    }

    fn consoles(&self) -> anyhow::Result<Consoles> {
        self.backends.console.fds().context("cannot have the consoles go with the machine")
    }

    /// The guest runs on here, for a reason that came before anything was tried.
    fn refuse(&mut self, client: ClientId, reason: String) -> After {
        self.stay(client, self.rolled_back(reason, None))
    }

    /// The guest runs on here: tells who asked why.
    fn stay(&mut self, client: ClientId, report: UpdateReport) -> After {
        self.updated = Some(report.clone());
        self.clients.tell(client, &Answer::Update(Box::new(report)));
        After::Go
    }

    fn hand_over(
        &mut self,
        client: ClientId,
        request: &UpdateRequest,
        passed: Option<OwnedFd>,
    ) -> anyhow::Result<After> {
        let timeouts = timeouts(request);
        let ready = || -> anyhow::Result<_> {
            let (channel, started) = self.successor(request, passed, timeouts)?;
            self.guest.guest.before_freeze()?;
            Ok((channel, started, self.consoles()?))
        };
        let (channel, started, consoles) = match ready() {
            Ok(found) => found,
            Err(error) => return Ok(self.refuse(client, format!("{error:#}"))),
        };
        let answered = Answered { client, by: process::id() };
        let offer = self.offer(request, &consoles, Some(answered))?;
        let offer = Offer { fds: fds(&self.clients, &self.backends, &consoles)?, ..offer };
        let mut observer = |step: Step| (self.watch)(Side::Predecessor, step);
        let outcome = socket::hand_over(&mut self.machine, &mut self.guest, &channel, &offer, &mut observer);
        drop(offer);
        match outcome.context("the guest is lost")? {
            Outcome::Updated(report) => {
                if let Some(started) = started {
                    started.let_go();
                }
                let report = measure::report(&report, self.guest.stopped_ns());
                Ok(self.leave(client, report, &channel))
            }
            Outcome::RolledBack { reason, pause, .. } => {
                drop(channel);
                let report = self.rolled_back(why(reason, started), pause.map(measure::micros_of));
                Ok(self.stay(client, report))
            }
        }
    }

    /// Executes the successor's program, once it has shown in a process of its own that it can run the machine.
    fn execute(&mut self, client: ClientId, request: &UpdateRequest) -> anyhow::Result<After> {
        let rehearsed = self.consoles().and_then(|consoles| {
            let program = self.rehearsed(request, &consoles)?;
            Ok((program, consoles))
        });
        let (program, consoles) = match rehearsed {
            Ok(rehearsed) => rehearsed,
            Err(error) => return Ok(self.refuse(client, format!("{error:#}"))),
        };
        let offer = self.offer(request, &consoles, None)?;
        let offer = Offer { fds: fds(&self.clients, &self.backends, &consoles)?, ..offer };
        let mut observer = |step: Step| (self.watch)(Side::Predecessor, step);
        let replaced =
            exec::replace(&mut self.machine, &mut self.guest, &program, &go_on(), &offer, &mut observer);
        drop(offer);
        match replaced.context("the guest is lost")? {
            Replaced::Updated { report, aside, channel } => {
                let report = measure::report(&report, self.guest.stopped_ns());
                let report = UpdateReport { aside_us: Some(measure::micros_of(aside)), ..report };
                Ok(self.leave(client, report, &channel))
            }
            Replaced::WentBack { reason, pause, report, aside, channel } => {
                let reason = format!("{:#}", anyhow::Error::new(reason));
                let report = measure::report_of_return(&report, self.guest.stopped_ns(), reason, pause);
                let report = UpdateReport { aside_us: Some(measure::micros_of(aside)), ..report };
                Ok(self.leave(client, report, &channel))
            }
            Replaced::RolledBack { reason, pause, left } => {
                let reason = format!("{:#}", anyhow::Error::new(reason));
                let reason = left.map_or(reason.clone(), |left| {
                    format!(
                        "{reason}; the guest runs on in process {}, and no longer in {left}",
                        process::id()
                    )
                });
                let report = self.rolled_back(reason, pause.map(measure::micros_of));
                Ok(self.stay(client, report))
            }
        }
    }

    /// What is told of the machine, without the descriptors that go with it.
    fn offer(
        &self,
        request: &UpdateRequest,
        consoles: &Consoles,
        answered: Option<Answered>,
    ) -> anyhow::Result<Offer<'static>> {
        Ok(Offer {
            formats: self.guest.guest.formats(),
            fds: Vec::new(),
            vmm: self.told(request, consoles, answered)?,
            timeouts: timeouts(request),
        })
    }

    /// The guest runs elsewhere: tells who asked, and then the successor what that was, and leaves.
    fn leave(&mut self, client: ClientId, report: UpdateReport, successor: &Channel) -> After {
        info!(pause_us = report.pause_us, successor = report.successor_pid, outcome = ?report.outcome, "leaves");
        // Should this not be JSON, nobody hears it: it is told below all the same.
        let last = serde_json::to_value(&report).unwrap_or_default();
        self.clients.tell(client, &Answer::Update(Box::new(report)));
        self.clients.leave();
        socket::farewell(successor, last);
        After::End
    }

    fn rehearsed(&mut self, request: &UpdateRequest, consoles: &Consoles) -> anyhow::Result<Program> {
        let program = self.program(&request.successor)?;
        self.guest.guest.before_freeze()?;
        let (channel, started) = program.start(SUCCEED)?;
        let offer = self.offer(&UpdateRequest { populate: false, ..request.clone() }, consoles, None)?;
        let offer = Offer { fds: fds(&self.clients, &self.backends, consoles)?, ..offer };
        let mut observer = |step: Step| (self.watch)(Side::Rehearsal, step);
        let rehearsed = socket::rehearse(&mut self.machine, &channel, &offer, &mut observer);
        rehearsed.map_err(|reason| anyhow::anyhow!(why(reason, Some(started))))?;
        Ok(program)
    }

    /// The program to update to.
    fn program(&self, source: &Source) -> anyhow::Result<Program> {
        let path = match source {
            Source::Own => Program::this_path().context("cannot find this program")?,
            Source::Program(path) => path.clone(),
            Source::Listen(_) | Source::Passed => bail!("a program can be executed, not a process"),
        };
        Ok(Program::open(&path, &self.programs)?)
    }

    fn rolled_back(&self, reason: String, pause_us: Option<f64>) -> UpdateReport {
        let ticks = self.words.as_ref().map(MemoryWords::ticks);
        UpdateReport {
            predecessor_pid: process::id(),
            successor_pid: None,
            outcome: UpdateOutcome::RolledBack,
            reason: Some(reason),
            pause_us,
            aside_us: None,
            guest_pause_us: None,
            phases_us: BTreeMap::new(),
            ticks_before: ticks.unwrap_or_default(),
            ticks_after: ticks,
            probe: None,
        }
    }

    /// Starts the successor, or waits for it.
    fn successor(
        &self,
        request: &UpdateRequest,
        passed: Option<OwnedFd>,
        timeouts: Timeouts,
    ) -> anyhow::Result<(Channel, Option<Started>)> {
        match &request.successor {
            Source::Listen(path) => Ok((listen(path, timeouts)?, None)),
            Source::Passed => {
                let passed = passed.context("no successor came with the request")?;
                Ok((Channel::from_fd(passed).context("what came with the request")?, None))
            }
            source => {
                let (channel, started) = self.program(source)?.start(SUCCEED)?;
                Ok((channel, Some(started)))
            }
        }
    }
}

/// Why an update was rolled back, in one line. Ends the successor, if it was started here and has not ended.
fn why(reason: Reason, started: Option<Started>) -> String {
    let gone = matches!(reason, Reason::Link { source: LinkError::Closed, .. });
    let patience = if gone { DEATH } else { Duration::ZERO };
    let ended = started.and_then(|mut started| started.ended(patience));
    let reason = format!("{:#}", anyhow::Error::new(reason));
    match ended {
        Some(status) => format!("{reason} (its program ended by itself: {status})"),
        None => reason,
    }
}

/// Waits for a successor that comes to `path`. Who comes and says nothing is none, and keeps nobody from coming after it.
fn listen(path: &Path, timeouts: Timeouts) -> anyhow::Result<Channel> {
    let listener = Listener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
    let deadline = Deadline::after(timeouts.prepare);
    loop {
        let channel =
            listener.accept(deadline).with_context(|| format!("no successor came to {}", path.display()))?;
        let soon = deadline.remaining().map_or(HELLO, |left| left.min(HELLO));
        fdpass::ready(&[channel.as_fd()], Deadline::after(soon))
            .context("cannot wait for a successor's hello")?;
        if channel.has_message() {
            return Ok(channel);
        }
        debug!("somebody came and said nothing");
    }
}
