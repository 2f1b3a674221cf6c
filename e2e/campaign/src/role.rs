//! What this program is when it is started as a machine's VMM: the first one, or a successor. Each comes to grief where
//! the [plan](crate::plan) says.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use machine::update::Step;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::getpid;
use rustix::process::kill_process;
use socket::Successor;
use socket::Timeouts;
use vmm::Side;
use vmm::Start;
use vmm::Watch;

use crate::plan::Actor;
use crate::plan::Fault;
use crate::plan::Folder;
use crate::plan::Place;
use crate::plan::Plan;
use crate::plan::Strike;

/// Names the folder in the environment of a machine's processes. Nobody else has it there.
pub const FOLDER: &str = "TIDEOVER_CAMPAIGN_FOLDER";
/// The arguments of a machine's first VMM.
pub const FIRST: [&str; 2] = ["vmm", "first"];
/// The arguments of a successor that is another process.
pub const SUCCEED: [&str; 2] = ["vmm", "succeed"];

/// Plays the role that `arguments` name, in this folder.
#[must_use]
pub fn play(folder: PathBuf, arguments: &[String]) -> ExitCode {
    let folder = Folder::at(folder);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let played = match arguments[..] {
        [] | ["hold"] => return tideoverd::main(),
        ["vmm", "first"] => first(&folder),
        ["vmm", "succeed"] | ["vmm", "--detach", "succeed"] => succeed(&folder, &Start::Started),
        ["vmm", "succeed", "--handoff", handoff] => go_on(&folder, handoff),
        _ => Err(anyhow::anyhow!("no role: {arguments:?}")),
    };
    match played {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{} {arguments:?}: {error:#}", std::process::id());
            ExitCode::FAILURE
        }
    }
}

fn first(folder: &Folder) -> anyhow::Result<()> {
    leave_session()?;
    let programs = vec![socket::Program::this_path()?];
    let player = Player { folder: folder.clone(), plan: Plan::default(), takes: Actor::Successor };
    vmm::run_watched(&folder.spec()?, programs, false, player.watch())
}

fn succeed(folder: &Folder, start: &Start) -> anyhow::Result<()> {
    leave_session()?;
    let plan = folder.plan()?;
    let takes = if plan.rehearsed { Actor::Rehearsed } else { Actor::Successor };
    take_over(Player { folder: folder.clone(), plan, takes }, start)
}

/// A key that is pressed for the campaign is none for a VMM. Nor does the kernel hang up on it, and wake it, where it is stopped as
/// its predecessor ends: it does that to a group that is left without a parent in its session.
fn leave_session() -> anyhow::Result<()> {
    rustix::process::setsid()?;
    Ok(())
}

fn take_over(player: Player, start: &Start) -> anyhow::Result<()> {
    player.folder.tell(player.takes, Place::Started)?;
    player.pass(player.takes, Place::Started);
    let patience = Duration::from_millis(player.plan.patience_ms);
    let timeouts = Timeouts { prepare: patience, hand_over: patience };
    vmm::succeed_watched(start, timeouts, player.watch())
}

/// Takes the machine over from the program that this process executed before.
fn go_on(folder: &Folder, handoff: &str) -> anyhow::Result<()> {
    let plan = folder.plan()?;
    // The program before, executed again, has nothing to go back to.
    let takes = if handoff.contains(',') { Actor::Next } else { Actor::Back };
    let handoff = handoff.parse()?;
    if let (Actor::Next, Some(place)) = (takes, plan.next_fails) {
        return fail(&handoff, place);
    }
    take_over(Player { folder: folder.clone(), plan, takes }, &Start::Executed(handoff))
}

/// Finds at this place that this program cannot run the machine, and goes back to the one before.
fn fail(handoff: &exec::Handoff, place: Place) -> anyhow::Result<()> {
    let life = exec::Life::begin(handoff)?;
    let nothing = &mut |_: Step| ();
    let handed = match place {
        Place::Started => None,
        Place::At(_) => {
            let formats: Vec<&str> = vmm::formats().collect();
            let successor = Successor::greet(life.channel, &formats, Timeouts::default())?;
            Some(successor.attach(nothing)?.claim(nothing)?)
        }
    };
    let way_back = life.way_back.ok_or_else(|| anyhow::anyhow!("there is no way back"))?;
    let arguments = ["vmm", "succeed", "--handoff"].map(str::to_owned);
    let error = way_back.take("the campaign told it to fail", &arguments);
    drop(handed);
    Err(error.into())
}

/// A VMM that is told of its steps.
struct Player {
    folder: Folder,
    plan: Plan,
    /// What it is when it takes a machine over.
    takes: Actor,
}

impl Player {
    fn watch(mut self) -> Watch {
        Box::new(move |side, step| self.reached(side, step))
    }

    fn reached(&mut self, side: Side, step: Step) {
        let actor = match side {
            Side::Predecessor => Actor::Predecessor,
            Side::Rehearsal => Actor::Rehearsal,
            Side::Successor => self.takes,
        };
        // The first step of an update from here: what was planned before is over.
        if side != Side::Successor && step == Step::Connected {
            self.plan = self.folder.plan().unwrap_or_default();
        }
        self.pass(actor, Place::At(step));
    }

    /// Does what is planned for this place.
    fn pass(&self, actor: Actor, place: Place) {
        let strike = self.plan.strike.as_ref();
        let Some(strike) = strike.filter(|strike| (strike.actor, strike.place) == (actor, place)) else {
            return;
        };
        // Once: by exec a program hands over a second time, to the one before.
        let _ = self.folder.write_plan(&Plan { strike: None, ..self.plan.clone() });
        // Whoever looks on has to know, or takes it for another fault.
        if let Err(error) = self.folder.tell(actor, place) {
            eprintln!("cannot tell of {place:?}: {error:#}");
        }
        strike_at(strike);
    }
}

fn strike_at(strike: &Strike) {
    let signal = match strike.fault {
        Fault::Kill => Signal::KILL,
        Fault::Stop => Signal::STOP,
    };
    let other = strike.victim.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    let itself = (other.is_none() || strike.both).then(getpid);
    for pid in other.into_iter().chain(itself) {
        // It may have ended by itself.
        let _ = kill_process(pid, signal);
    }
}
