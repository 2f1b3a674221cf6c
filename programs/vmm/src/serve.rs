//! A VMM's life while it runs the guest: it does what comes over the control channel.

use std::os::fd::AsFd;
use std::path::Path;
use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use fdpass::Channel;
use fdpass::Deadline;
use fdpass::Listener;
use machine::Machine;
use machine::update::Step;
use serde::Deserialize;
use serde::Serialize;
use socket::LinkError;
use socket::Offer;
use socket::Outcome;
use socket::Program;
use socket::Reason;
use socket::Started;
use socket::Timeouts;
use tracing::debug;
use tracing::info;

use crate::control;
use crate::control::Answer;
use crate::control::Request;
use crate::control::Source;
use crate::control::Status;
use crate::control::UpdateOutcome;
use crate::control::UpdateReport;
use crate::control::UpdateRequest;
use crate::guest::AnyGuest;
use crate::guest::MemoryWords;
use crate::guest::Served;
use crate::measure;

/// Name of the control channel among the descriptors that go with the machine.
pub(crate) const CONTROL: &str = "control";

/// How long to wait for the end of a process whose end of the channel is closed.
const DEATH: Duration = Duration::from_millis(500);

/// What a VMM tells its successor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Told {
    pub(crate) guest: control::GuestKind,
    pub(crate) before_pause: serde_json::Value,
    pub(crate) populate: bool,
    pub(crate) probe: bool,
    pub(crate) programs: Vec<PathBuf>,
}

/// A VMM that runs a guest.
pub(crate) struct Vmm {
    pub(crate) machine: Machine,
    pub(crate) guest: AnyGuest,
    pub(crate) words: MemoryWords,
    pub(crate) control: Channel,
    /// Programs that the machine may be updated to.
    pub(crate) programs: Vec<PathBuf>,
}

/// What is left to do after a request.
enum After {
    /// The next request.
    Go,
    /// End: the guest runs elsewhere, or nowhere.
    End,
}

/// Runs the guest of `machine` and obeys `control` until the guest is handed over or ended. `programs` are what the
/// machine may be updated to.
///
/// # Errors
/// If the guest was lost.
pub fn serve(
    machine: Machine,
    guest: Box<dyn Served>,
    control: Channel,
    programs: Vec<PathBuf>,
) -> anyhow::Result<()> {
    let words = MemoryWords(Arc::clone(machine.memories()[0].inode.mapping()));
    Vmm { machine, guest: AnyGuest(guest), words, control, programs }.obey()
}

impl Vmm {
    pub(crate) fn obey(mut self) -> anyhow::Result<()> {
        loop {
            let request = control::receive::<Request>(&self.control, Deadline::never());
            let after = match request {
                Ok(Some(request)) => self.act(request)?,
                // Nobody is left who could end the guest: it must not run for ever.
                Ok(None) => After::End,
                Err(error) => {
                    self.tell(&Answer::Error(format!("not a request: {error}")));
                    After::Go
                }
            };
            if matches!(after, After::End) {
                return Ok(());
            }
        }
    }

    /// Whoever asked may be gone: that ends the next wait for a request.
    fn tell(&self, answer: &Answer) {
        if let Err(error) = control::send(&self.control, answer) {
            debug!(%error, "nobody hears the answer");
        }
    }

    fn act(&mut self, request: Request) -> anyhow::Result<After> {
        debug!(?request, "request");
        match request {
            Request::Status => {
                self.tell(&Answer::Status(self.status()));
                Ok(After::Go)
            }
            Request::Check => {
                let control = &self.control;
                let mut progress = |what: &str, done, of| {
                    let _ = control::send(control, &Answer::Progress { what: what.to_owned(), done, of });
                };
                let answer = match measure::check(&mut self.guest, &self.words, &mut progress) {
                    Ok(report) => Answer::Check(report),
                    Err(error) => Answer::Error(format!("cannot check the guest: {error:#}")),
                };
                self.tell(&answer);
                Ok(After::Go)
            }
            Request::Update(update) => self.update(&update),
            Request::Stop => {
                self.tell(&Answer::Stopped);
                Ok(After::End)
            }
        }
    }

    fn status(&self) -> Status {
        let memory = &self.machine.memories()[0];
        let mailbox = self.words.mailbox();
        let passes = mailbox.layout().map_or(0, |layout| mailbox.progress(&layout).pass);
        Status {
            pid: process::id(),
            identity: self.machine.identity().to_string(),
            guest: self.guest.0.kind(),
            memory_bytes: memory.inode.size_bytes(),
            page_size: memory.page_bytes,
            huge_bytes: memory.inode.mapping().huge_bytes().unwrap_or_default(),
            huge_refused: memory.account.and_then(|account| account.refused),
            ticks: mailbox.ticks(),
            passes,
            errors: mailbox.errors(),
            failure: self.guest.0.failure(),
        }
    }

    fn update(&mut self, request: &UpdateRequest) -> anyhow::Result<After> {
        let timeouts = Timeouts {
            prepare: Duration::from_millis(request.prepare_timeout_ms),
            hand_over: Duration::from_millis(request.timeout_ms),
        };
        let ready = || -> anyhow::Result<_> {
            let found = self.successor(request, timeouts)?;
            self.guest.0.before_freeze()?;
            Ok(found)
        };
        let (channel, started) = match ready() {
            Ok(found) => found,
            Err(error) => {
                self.tell(&Answer::Update(Box::new(self.rolled_back(format!("{error:#}"), None))));
                return Ok(After::Go);
            }
        };
        let told = Told {
            guest: self.guest.0.kind(),
            before_pause: self.guest.0.before_pause(),
            populate: request.populate,
            probe: request.probe,
            programs: self.programs.clone(),
        };
        let offer = Offer {
            formats: self.guest.0.formats(),
            descriptors: vec![(CONTROL.to_owned(), self.control.as_fd())],
            vmm: serde_json::to_value(told)?,
            timeouts,
        };
        let mut observer = |step: Step| debug!(%step, "predecessor");
        let outcome = socket::hand_over(&mut self.machine, &mut self.guest, &channel, &offer, &mut observer);
        drop(offer);
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                let error = anyhow::Error::new(error).context("the guest is lost");
                self.tell(&Answer::Error(format!("{error:#}")));
                return Err(error);
            }
        };
        match outcome {
            Outcome::Updated(report) => {
                let report = measure::report(&report, self.guest.0.stopped_ns());
                info!(pause_us = report.pause_us, successor = report.successor_pid, "updated");
                self.tell(&Answer::Update(Box::new(report)));
                if let Some(started) = started {
                    started.let_go();
                }
                Ok(After::End)
            }
            Outcome::RolledBack { reason, pause, .. } => {
                let reason = why(reason, started);
                let pause = pause.map(measure::micros_of);
                self.tell(&Answer::Update(Box::new(self.rolled_back(reason, pause))));
                Ok(After::Go)
            }
        }
    }

    fn rolled_back(&self, reason: String, pause_us: Option<f64>) -> UpdateReport {
        let ticks = self.words.mailbox().ticks();
        UpdateReport {
            predecessor_pid: process::id(),
            successor_pid: None,
            outcome: UpdateOutcome::RolledBack,
            reason: Some(reason),
            pause_us,
            guest_pause_us: None,
            phases_us: std::collections::BTreeMap::new(),
            ticks_before: ticks,
            ticks_after: Some(ticks),
            probe: None,
        }
    }

    /// Starts the successor, or waits for it.
    fn successor(
        &self,
        request: &UpdateRequest,
        timeouts: Timeouts,
    ) -> anyhow::Result<(Channel, Option<Started>)> {
        match &request.successor {
            Source::Program(path) => {
                let program = Program::open(path, &self.programs)?;
                let (channel, started) = program.start(["vmm", "succeed"])?;
                Ok((channel, Some(started)))
            }
            Source::Listen(path) => Ok((accept(path, timeouts)?, None)),
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

fn accept(path: &Path, timeouts: Timeouts) -> anyhow::Result<Channel> {
    let listener = Listener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
    listener
        .accept(Deadline::after(timeouts.prepare))
        .with_context(|| format!("no successor came to {}", path.display()))
}
