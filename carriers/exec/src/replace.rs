//! The program that runs the guest, and gives its process up.

use std::os::fd::OwnedFd;
use std::process;
use std::sync::mpsc;
use std::time::Duration;

use aside::Aside;
use aside::AsideError;
use fdpass::Channel;
use fdpass::PairError;
use machine::Machine;
use machine::update::Guest;
use machine::update::Observer;
use socket::Fatal;
use socket::Offer;
use socket::Outcome;
use socket::Program;
use socket::ProgramError;
use socket::Report;
use thiserror::Error;
use tracing::info;
use tracing::warn;

use crate::handoff::Back;
use crate::handoff::Handoff;

/// How long a thread may take to stop. The guest stands still while it does.
const PATIENCE: Duration = Duration::from_secs(1);

/// How an update ended.
#[derive(Debug)]
pub enum Replaced {
    /// The next program runs the guest, in the process that this program was in. What is left to do here is to end.
    Updated {
        /// Of the update.
        report: Report,
        /// How long the guest stood still before, when the threads stepped aside.
        aside: Duration,
        /// To the program that runs the guest, which may wait to hear a [`farewell`](socket::farewell).
        channel: Channel,
    },
    /// The next program failed, and the one before, executed again, runs the guest in the process that it was in. What is
    /// left to do here is to end.
    WentBack {
        /// Why.
        reason: Reason,
        /// How long the guest stood still in the attempt, if it did.
        pause: Option<Duration>,
        /// Of the way back.
        report: Report,
        /// How long the guest stood still before all this, when the threads stepped aside.
        aside: Duration,
        /// To the program that runs the guest, which may wait to hear a [`farewell`](socket::farewell).
        channel: Channel,
    },
    /// The guest runs on here.
    RolledBack {
        /// Why.
        reason: Reason,
        /// How long the guest stood still, if it did.
        pause: Option<Duration>,
        /// The process that this program was in, if it is in another one now.
        left: Option<u32>,
    },
}

/// Why the next program does not run the guest.
#[derive(Debug, Error)]
pub enum Reason {
    /// There are no channels to the next program.
    #[error("cannot make a channel to the next program")]
    Channel(#[source] PairError),
    /// The threads of this process could not step aside.
    #[error("cannot keep the guest running while the program is replaced")]
    Aside(#[source] AsideError),
    /// The program could not be executed, or looked at.
    #[error("cannot execute the next program")]
    Program(#[source] ProgramError),
    /// The program did not take the machine over.
    #[error(transparent)]
    Socket(socket::Reason),
}

/// Gives the machine to `program`, which this process executes with `arguments` and a [`Handoff`]. The guest runs on
/// meanwhile, and so does whoever calls this: in another process, which shares the memory. It stands still no longer than
/// in an update to another process.
///
/// # Errors
/// [`Fatal`] if the guest runs nowhere.
pub fn replace<G: Guest>(
    machine: &mut Machine,
    guest: &mut G,
    program: &Program,
    arguments: &[String],
    offer: &Offer<'_>,
    observer: &mut dyn Observer,
) -> Result<Replaced, Fatal> {
    let Path { aside, next, back, failed } = match Path::make(program, arguments) {
        Ok(path) => path,
        Err(reason) => return Ok(Replaced::RolledBack { reason, pause: None, left: None }),
    };
    let outcome = socket::hand_over(machine, guest, &next, offer, observer)?;
    let (reason, pause) = match outcome {
        Outcome::Updated(report) => {
            let report = Report { predecessor_pid: aside.left, ..report };
            return Ok(Replaced::Updated { report, aside: aside.stopped, channel: next });
        }
        Outcome::RolledBack { reason, pause, .. } => (reason, pause),
    };
    drop(next);
    let reason = failed.try_recv().map_or(Reason::Socket(reason), Reason::Program);
    match socket::hand_over(machine, guest, &back, offer, observer)? {
        Outcome::Updated(report) => {
            let report = Report { predecessor_pid: aside.left, ..report };
            Ok(Replaced::WentBack { reason, pause, report, aside: aside.stopped, channel: back })
        }
        Outcome::RolledBack { reason: again, pause: another, .. } => {
            let (reason_back, pid) = (&again as &dyn std::error::Error, process::id());
            warn!(
                reason_back,
                left = aside.left,
                pid,
                "the program before does not take the guest back; it runs on here"
            );
            let pause = pause.into_iter().chain(another).reduce(|one, other| one + other);
            Ok(Replaced::RolledBack { reason, pause, left: Some(aside.left) })
        }
    }
}

/// This program is in a process of its own, and the one that it was in executes the next.
struct Path {
    aside: Aside,
    next: Channel,
    back: Channel,
    /// Why the next program could not be executed, if it could not.
    failed: mpsc::Receiver<ProgramError>,
}

impl Path {
    fn make(program: &Program, arguments: &[String]) -> Result<Self, Reason> {
        let (next, theirs) = Channel::pair().map_err(Reason::Channel)?;
        let (back, theirs_back) = Channel::pair().map_err(Reason::Channel)?;
        let old = Program::running().map_err(Reason::Program)?;
        let luggage: Vec<OwnedFd> = vec![theirs.into_stdio(), theirs_back.into_stdio(), OwnedFd::from(old)];
        let (execute, arguments) = (program.to_execute(), arguments.to_vec());
        let (tell, failed) = mpsc::channel();
        let stays = move |numbers: &[i32]| {
            let [channel, back, program] = *numbers else { return };
            let handoff = Handoff { channel, back: Some(Back { channel: back, program }) }.to_string();
            let _ = tell.send(execute.now(arguments.iter().chain([&handoff])));
        };
        let aside = aside::step_aside(luggage, stays, PATIENCE).map_err(Reason::Aside)?;
        info!(left = aside.left, pid = process::id(), threads = aside.others + 1, stopped = ?aside.stopped, "stepped aside");
        Ok(Self { aside, next, back, failed })
    }
}
