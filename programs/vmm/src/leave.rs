//! A machine that is to leave for the next kernel, from the side of its VMM.

use std::os::fd::OwnedFd;

use anyhow::Context as _;
use custody::LostError;
use custody::Offer;
use fdpass::Channel;
use fdpass::Deadline;
use fdstore::Deposit;
use kexec::Leaving;
use liveupdate::Outgoing;
use liveupdate::moment::TscRate;
use machine::update::Step;
use machine::update::Timeline;
use path::Place;
use socket::Program;
use tracing::debug;
use tracing::warn;

use crate::clients::ClientId;
use crate::control;
use crate::control::Answer;
use crate::control::PreservedReport;
use crate::control::Request;
use crate::control::SealedReport;
use crate::crossing::Crossing;
use crate::guest::AnyGuest;
use crate::measure;
use crate::serve::After;
use crate::serve::History;
use crate::serve::Told;
use crate::serve::Vmm;

impl Vmm {
    /// What whoever runs the machine next is told, if nothing but its memory gets there.
    pub(crate) fn told_alone(&self) -> Told {
        Told {
            spec: self.spec.clone(),
            before_pause: self.guest.guest.before_pause(),
            // The guest would wait for it.
            populate: false,
            probe: false,
            held: self.guest.held,
            clients: Vec::new(),
            consoles: Vec::new(),
            programs: self.programs.clone(),
            history: self.history,
            answered: None,
            parts: false,
            faults: self.faults(),
            crossing: None,
            crossed: self.crossed.clone(),
            alone: None,
            stored: self.deposit.as_ref().map(Deposit::told),
            restart: None,
        }
    }

    /// Does what whoever asked wants to have done for a kexec, until it has enough or is gone: then everything is as
    /// before, if this kernel is still there.
    pub(crate) fn preserve(&mut self, client: ClientId, session: Option<OwnedFd>) -> anyhow::Result<After> {
        let ready = session.map(Outgoing::from_fd).transpose().context("what came with the request");
        let ready = ready.and_then(|session| {
            let crossing = Some(Crossing::begin(&*self.guest.guest));
            let history = History { lived_ns: self.history.age_ns(), ..self.history };
            let offer = self.leave_offer(|told| Told { crossing, history, crossed: None, ..told })?;
            Ok((session, offer, self.tsc_rate()?))
        });
        let (session, offer, rate) = match ready {
            Ok(ready) => ready,
            Err(error) => {
                self.clients.tell(client, &Answer::Error(format!("{error:#}")));
                return Ok(After::Go);
            }
        };
        let Some(channel) = self.clients.take(client) else { return Ok(After::Go) };
        let mut observer = |step: Step| debug!(%step, "leaves this kernel");
        let leaving = Leaving::new(&mut self.machine, &mut self.guest, session, &mut observer);
        let went_on = leave(leaving, (offer, rate), &channel, self.place.as_ref());
        self.clients.put(channel);
        went_on.context("the guest is lost")?;
        // What was noted for the next kernel is not so.
        self.renew_note_at_path();
        Ok(After::Go)
    }

    /// What is said of the machine to who is to run it when this process has ended.
    pub(crate) fn leave_offer(&self, how: impl FnOnce(Told) -> Told) -> anyhow::Result<Offer> {
        self.guest.guest.before_freeze()?;
        let told = self.told_alone();
        Ok(Offer {
            formats: self.guest.guest.formats(),
            program: Program::this_path().context("cannot find this program")?,
            vmm: serde_json::to_value(how(told))?,
        })
    }
}

/// Does what comes over the channel.
///
/// # Errors
/// If the guest runs nowhere.
fn leave(
    mut leaving: Leaving<'_, AnyGuest>,
    (offer, rate): (Offer, TscRate),
    channel: &Channel,
    place: Option<&Place>,
) -> Result<(), LostError> {
    match leaving.preserve(offer) {
        Ok(preserved) => tell(channel, &Answer::Preserved(report(preserved))),
        Err(error) => {
            let gone_back = leaving.go_back();
            tell(channel, &Answer::Error(format!("{:#}", anyhow::Error::new(error))));
            return gone_back.map(drop);
        }
    }
    let mut failed = None;
    while let Some(request) = next_request(channel) {
        match request {
            Request::Seal => match seal(&mut leaving, &rate, place) {
                Ok(epoch) => tell(channel, &Answer::Sealed(sealed_report(epoch, leaving.timeline()))),
                Err(error) => {
                    failed = Some(format!("{error:#}"));
                    break;
                }
            },
            Request::GoOn => break,
            other => {
                debug!(?other, "not now");
                tell(channel, &Answer::Error("the machine is about to leave this kernel".to_owned()));
            }
        }
    }
    let pause = leaving.go_back()?;
    warn!(?pause, ?failed, "there is no kexec; the guest runs on");
    let pause_us = pause.map(measure::micros_of);
    tell(channel, &failed.map_or(Answer::WentOn { pause_us }, Answer::Error));
    Ok(())
}

/// Has the guest stand still, and seals the machine; of one at a path its note says so, there.
fn seal(leaving: &mut Leaving<'_, AnyGuest>, rate: &TscRate, place: Option<&Place>) -> anyhow::Result<u32> {
    let epoch = leaving.seal(rate)?;
    if let (Some(place), Some(note)) = (place, leaving.note()) {
        place.write(note)?;
    }
    Ok(epoch)
}

/// `None` if nobody is there who could ask, or who is cannot be understood: then all is to be as before.
fn next_request(channel: &Channel) -> Option<Request> {
    control::receive(channel, Deadline::never()).unwrap_or_else(|error| {
        warn!(%error, "not a request");
        None
    })
}

/// Whoever asked may be gone: that is noticed where the next request is due.
fn tell(channel: &Channel, answer: &Answer) {
    if let Err(error) = control::send(channel, answer) {
        debug!(%error, "nobody hears the answer");
    }
}

fn report(preserved: kexec::Preserved) -> PreservedReport {
    PreservedReport {
        pid: std::process::id(),
        bytes: preserved.bytes,
        fill_us: measure::micros_of(preserved.fill),
        kernel_us: measure::micros_of(preserved.kernel),
    }
}

pub(crate) fn sealed_report(epoch: u32, timeline: &Timeline) -> SealedReport {
    let phases = timeline.phases();
    let phases_us = phases.map(|(step, took)| (step.name().to_owned(), measure::micros_of(took))).collect();
    SealedReport { epoch, phases_us }
}
