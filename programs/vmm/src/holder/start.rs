//! A VMM that is to run a machine which is held.

use std::fs;
use std::fs::OpenOptions;
use std::process::Stdio;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::anyhow;
use anyhow::bail;
use custody::Kept;
use custody::Note;
use machine::OwnershipWord;
use machine::update::Step;
use socket::Agreed;
use socket::Program;
use socket::Prospect;
use socket::Reason;
use socket::Started;
use socket::Timeouts;
use tracing::debug;
use tracing::warn;

use super::Hold;
use super::SCORE;
use crate::confine::Confine;
use crate::control::KexecReport;
use crate::crossing::Crossing;
use crate::measure;
use crate::serve::Alone;
use crate::serve::Told;

/// How long a VMM may take to say what becomes of it when its channel is closed.
const DEATH: Duration = Duration::from_millis(500);

/// A VMM that was started, and hears meanwhile what it is to run.
pub(super) struct Vmm {
    agreed: JoinHandle<Result<Agreed, Reason>>,
    started: Started,
}

/// What became of a machine that was passed on: the process that runs it, as it says itself, and its report.
pub(super) type Ran = (u32, Option<KexecReport>);

/// Gives the machine, which was left so, to a VMM that was started for it.
pub(super) fn run(kept: &Kept, left: OwnershipWord, vmm: Vmm) -> anyhow::Result<Ran> {
    let Vmm { agreed, mut started } = vmm;
    let mut step = |step: Step| debug!(%step, "holder");
    let last = serde_json::to_value(kept.when())?;
    let agreed = agreed.join().map_err(|_| anyhow!("the thread that offers the machine has panicked"))?;
    match agreed.and_then(|agreed| kept.pass_on(agreed, left, last, &mut step)) {
        Ok(passed) => {
            started.let_go();
            let told: measure::Told = serde_json::from_value(passed.vmm).unwrap_or_default();
            Ok((passed.successor_pid, told.kexec))
        }
        Err(reason) => {
            let ended = started.ended(DEATH);
            let ended = ended.map_or(String::new(), |status| format!(" (its program ended: {status})"));
            // One that runs the machine is not to be killed for its silence. Any other cannot run it from here on, however late
            // it goes on.
            match kept.revoke(left) {
                Err(error) if error.is_lost() => started.let_go(),
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "the machine's claim stands");
                    drop(started);
                }
                Ok(()) => drop(started),
            }
            bail!("{:#}{ended}", anyhow::Error::new(reason))
        }
    }
}

/// How long a VMM may take. It enters all of the memory's pages before it is ready.
fn timeouts(note: &Note) -> Timeouts {
    let whole: u64 = note.regions.iter().sum();
    let default = Timeouts::default();
    Timeouts { prepare: default.prepare + Duration::from_secs(whole >> 30), ..default }
}

fn told_of(note: &Note) -> anyhow::Result<Told> {
    serde_json::from_value(note.vmm.clone()).context("cannot read what the machine's last VMM tells")
}

/// A VMM is to be ended as any other.
fn spare_no_vmm(pid: u32) {
    if let Err(error) = fs::write(format!("/proc/{pid}/{SCORE}"), "0") {
        debug!(%error, "the VMM keeps its holder's score");
    }
}

/// Starts a VMM for a machine that came through a kexec, which prepares what it can before the memory is here.
pub(super) fn start_after_kexec(note: &Note, hold: &Hold, alone: Option<Alone>) -> anyhow::Result<Vmm> {
    let mut told = told_of(note)?;
    told.alone = alone;
    let crossing = told.crossing.get_or_insert_default();
    let sealed = note.sealed.as_ref().map(|sealed| &sealed.when);
    [sealed, Some(&hold.when)].into_iter().flatten().for_each(|when| crossing.when.extend(when));
    let prospect = note.prospect(socket::Origin::MadeAgain, serde_json::Value::Null, timeouts(note));
    start(note, hold, told, prospect)
}

/// Starts a VMM for a machine that its last VMM has left behind.
pub(super) fn start_after_death(kept: &Kept, hold: &Hold, alone: Alone) -> anyhow::Result<Vmm> {
    let note = kept.note();
    let told = told_of(note)?;
    let stored = hold.stored.or(told.stored);
    let told = Told { alone: Some(alone), restart: None, stored, populate: alone == Alone::RunOn, ..told };
    start(note, hold, told, kept.prospect(serde_json::Value::Null, timeouts(note)))
}

fn start(note: &Note, hold: &Hold, mut told: Told, mut prospect: Prospect) -> anyhow::Result<Vmm> {
    let confine = told.spec.confine;
    // The directory may be another one in this life.
    told.spec.socket = Some(hold.socket.clone());
    hold.make_directory()?;
    let path = hold.program.as_ref().unwrap_or(&note.program);
    let program = Program::open(path, std::slice::from_ref(path))?;
    let confine = (confine != Confine::No).then_some("--confine");
    let words = ["vmm", "--detach"].into_iter().chain(confine).chain(["succeed"]);
    let log = hold.log.as_ref().and_then(|log| OpenOptions::new().create(true).append(true).open(log).ok());
    let log = log.map_or_else(Stdio::inherit, Stdio::from);
    let (channel, started) = program.start_with(words, Stdio::null(), log)?;
    spare_no_vmm(started.pid());
    let agreed = thread::Builder::new().name("offer".to_owned()).spawn(move || {
        told.crossing.iter_mut().for_each(Crossing::look_around);
        prospect.vmm = serde_json::to_value(told).unwrap_or_default();
        prospect.offer(channel)
    })?;
    Ok(Vmm { agreed, started })
}
