//! Machines on their way out of this kernel.

use std::os::fd::AsFd as _;
use std::thread;
use std::time::Duration;

use ::vmm::control::Answer;
use ::vmm::control::Client;
use ::vmm::control::PreservedReport;
use ::vmm::control::Request;
use ::vmm::control::SealedReport;
use anyhow::Context as _;
use anyhow::bail;
use liveupdate::Device;
use liveupdate::Outgoing;
use machine::SessionName;

/// How long a machine may take to stand still, be saved and sealed.
const SEAL: Duration = Duration::from_secs(30);
/// How long a machine may take to run on when there is no kexec.
const GO_ON: Duration = Duration::from_secs(60);

/// A machine that is to go to the next kernel.
pub(crate) struct Goer {
    pub(crate) name: String,
    pub(crate) client: Client,
    /// It lies where it is found by its path: no kernel has to preserve it.
    pub(crate) at_path: bool,
}

/// A machine whose VMM obeys nobody else until this is dropped: then it runs on.
pub(crate) struct Leaver {
    pub(crate) name: String,
    client: Client,
    /// The VMM has it, too. Whoever of the two lives longer keeps it.
    _session: Option<Outgoing>,
    pub(crate) preserved: PreservedReport,
}

impl Leaver {
    pub(crate) fn begin(
        name: String,
        client: Client,
        session: Option<Outgoing>,
        timeout: Duration,
    ) -> anyhow::Result<Self> {
        let client = client.with_patience(timeout);
        let what = || format!("cannot get {name} ready");
        let fd = session.as_ref().map(Outgoing::as_fd);
        client.tell(&Request::Preserve, fd).with_context(what)?;
        match client.answer(&mut |_, _, _| {}).with_context(what)? {
            Answer::Preserved(preserved) => Ok(Self { name, client, _session: session, preserved }),
            other => bail!("{name}: unexpected answer to preserve: {other:?}"),
        }
    }

    /// What was preserved of it.
    pub(crate) fn preserved(&self) -> (String, PreservedReport) {
        (self.name.clone(), self.preserved)
    }

    pub(crate) fn seal(&mut self) -> anyhow::Result<SealedReport> {
        self.client.set_patience(SEAL);
        self.client.tell(&Request::Seal, None)?;
        match self.client.answer(&mut |_, _, _| {}).with_context(|| format!("cannot seal {}", self.name))? {
            Answer::Sealed(report) => Ok(report),
            other => bail!("{}: unexpected answer to seal: {other:?}", self.name),
        }
    }

    /// There is no kexec. Gives how long the guest stood still, if it did.
    pub(crate) fn go_on(mut self) -> anyhow::Result<Option<f64>> {
        self.client.set_patience(GO_ON);
        self.client.tell(&Request::GoOn, None)?;
        loop {
            match self.client.answer(&mut |_, _, _| {})? {
                Answer::WentOn { pause_us } => return Ok(pause_us),
                // It came too late to be waited for.
                Answer::Sealed(_) => {}
                other => bail!("{}: unexpected answer to go on: {other:?}", self.name),
            }
        }
    }
}

/// Has all machines preserved at once, by the device unless they lie at paths. Gives those that are, and why another one is not.
pub(crate) fn preserve_all(
    device: Option<&Device>,
    machines: Vec<Goer>,
    timeout: Duration,
    progress: &dyn Fn(u64, u64),
) -> anyhow::Result<(Vec<Leaver>, Option<anyhow::Error>)> {
    let of = u64::try_from(machines.len()).unwrap_or(u64::MAX);
    let mut ready = Vec::new();
    for Goer { name, client, at_path } in machines {
        let session = match device.filter(|_| !at_path) {
            Some(device) => {
                let session = SessionName::new(name.as_bytes()).context("the machine's name")?;
                Some(device.create(&::kexec::session_name(session)?)?)
            }
            None => None,
        };
        ready.push((session, name, client));
    }
    progress(0, of);
    thread::scope(|scope| {
        let begin =
            |(session, name, client)| scope.spawn(move || Leaver::begin(name, client, session, timeout));
        let all: Vec<_> = ready.into_iter().map(begin).collect();
        let mut leavers = Vec::new();
        let mut failed = None;
        for thread in all {
            match thread.join() {
                Ok(Ok(leaver)) => leavers.push(leaver),
                Ok(Err(error)) => failed = Some(error),
                Err(panic) => std::panic::resume_unwind(panic),
            }
            progress(u64::try_from(leavers.len()).unwrap_or(u64::MAX), of);
        }
        Ok((leavers, failed))
    })
}

/// Seals all machines at once. Gives those that could not be, with the reason: they run on.
pub(crate) fn seal_each(leavers: &mut [Leaver]) -> Vec<(String, anyhow::Error)> {
    thread::scope(|scope| {
        let seal = |leaver: &'_ mut Leaver| leaver.seal().err().map(|error| (leaver.name.clone(), error));
        let all: Vec<_> = leavers.iter_mut().map(|leaver| scope.spawn(move || seal(leaver))).collect();
        let ended = all.into_iter().map(|thread| match thread.join() {
            Ok(failed) => failed,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ended.flatten().collect()
    })
}

/// There is no kexec, for this reason: all run on, at once, as one that does not answer is to keep no other waiting. Gives the
/// reason, with those of which it is not known that they do.
pub(crate) fn called_off(error: anyhow::Error, leavers: Vec<Leaver>) -> anyhow::Error {
    let lost: Vec<String> = thread::scope(|scope| {
        let go_on = |leaver: Leaver| (leaver.name.clone(), scope.spawn(move || leaver.go_on()));
        let all: Vec<_> = leavers.into_iter().map(go_on).collect();
        let lost = all.into_iter().filter_map(|(name, thread)| match thread.join() {
            Ok(went_on) => went_on.err().map(|error| format!("{name}: {error:#}")),
            Err(panic) => std::panic::resume_unwind(panic),
        });
        lost.collect()
    });
    match lost.is_empty() {
        true => error,
        false => error.context(format!("not all machines say that they run on: {}", lost.join("; "))),
    }
}
