//! The process that has a machine's memory after a kexec, until a VMM runs the machine.
//!
//! It does nothing that can fail once it has the memory, but to start VMMs. One that fails is followed by another one, when
//! somebody asks: the machine is *held* meanwhile, and answers at its own socket.

use std::fs;
use std::fs::DirBuilder;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::process;
use std::process::Stdio;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::anyhow;
use anyhow::bail;
use custody::Kept;
use custody::Note;
use custody::Standing;
use custody::When;
use fdpass::Channel;
use fdpass::Deadline;
use fdpass::Listener;
use fdpass::MAX_MESSAGE_BYTES;
use kexec::Found;
use liveupdate::Incoming;
use machine::OwnershipState;
use machine::update::Step;
use serde::Deserialize;
use serde::Serialize;
use socket::Agreed;
use socket::Left;
use socket::Origin;
use socket::Program;
use socket::Reason;
use socket::Started;
use socket::Timeouts;
use tracing::debug;
use tracing::warn;

use crate::confine::Confine;
use crate::control;
use crate::control::Answer;
use crate::control::Held;
use crate::control::KexecReport;
use crate::control::Request;
use crate::crossing::Crossing;
use crate::measure;
use crate::room;
use crate::room::Room;
use crate::serve::Told;

/// How long what is to be held may take to come, once it is due.
const REQUEST: Duration = Duration::from_secs(5);
/// Connections that a holder has at a time.
const MAX_CLIENTS: usize = 64;
/// How long a holder may take to be there: its host may have much to do at once.
const START: Duration = Duration::from_secs(60);
/// How long a VMM may take to say what becomes of it when its channel is closed.
const DEATH: Duration = Duration::from_millis(500);
/// How long a VMM that was started early may have waited: half of what it waits.
const EARLY: Duration = Duration::from_secs(30);
/// How long a VMM may take that has claimed the machine, and that this process did not start.
const CLAIM: Duration = Duration::from_secs(10);
/// How often to look whether something has come that there is no call to wait for.
const LOOK: Duration = Duration::from_millis(100);
/// How often to try again what does not work.
const AGAIN: Duration = Duration::from_secs(1);

/// What a holder is told, with the descriptor of the machine's session.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hold {
    /// The machine.
    pub name: String,
    /// Where whoever wants something of it comes, while nothing runs it.
    pub socket: PathBuf,
    /// When what was done for all machines, before and after the kexec.
    pub when: When,
    /// The program that is to run the machine, if not the one that did.
    pub program: Option<PathBuf>,
    /// Where its VMM's log goes.
    pub log: Option<PathBuf>,
}

/// What a holder says first: it is on its own from here on.
const READY: &str = "holder ready";
/// What a holder says when it has all of the machine's memory.
const RETRIEVED: &str = "memory retrieved";

/// Takes a machine's session from whoever started this process, who is at the other end of its standard input, and holds
/// the machine until it runs, or is given up.
///
/// # Errors
/// If the machine cannot be held.
pub fn hold() -> anyhow::Result<()> {
    let channel = Channel::from_stdin().context("a holder is started with a channel as standard input")?;
    spare_this_process();
    control::send(&channel, &Answer::Progress { what: READY.to_owned(), done: 0, of: 2 })?;
    let message = channel.receive(MAX_MESSAGE_BYTES, 1, Deadline::after(REQUEST));
    let message = message.context("nobody says what is to be held")?;
    let told: Hold = serde_json::from_slice(&message.bytes).context("cannot read what is to be held")?;
    let session = message.fds.into_iter().next().context("no session came")?;
    let session = Incoming::from_fd(session).context("what came is no session")?;
    let mut holder = Holder { state: Some(State::Session(session)), told, early: None };
    match holder.revive(&channel) {
        Ok(report) => {
            tell(&channel, &Answer::Report(report.map(Box::new)));
            holder.end();
            Ok(())
        }
        Err(error) => {
            let why = format!("{error:#}");
            tell(&channel, &Answer::Held(holder.held(&why)));
            drop(channel);
            holder.wait(why);
            Ok(())
        }
    }
}

/// The score by which the kernel chooses whom to end when memory runs out.
const SCORE: &str = "oom_score_adj";

/// Has the kernel end others first when memory runs out, if this process may say so: its end is the machine's.
fn spare_this_process() {
    if let Err(error) = fs::write(format!("/proc/self/{SCORE}"), "-1000") {
        debug!(%error, "this process is ended as any other when memory runs out");
    }
}

/// A VMM is to be ended as any other.
fn spare_no_vmm(pid: u32) {
    if let Err(error) = fs::write(format!("/proc/{pid}/{SCORE}"), "0") {
        debug!(%error, "the VMM keeps its holder's score");
    }
}

/// Whoever asked may be gone.
fn tell(channel: &Channel, answer: &Answer) {
    if let Err(error) = control::send(channel, answer) {
        debug!(%error, "nobody hears the answer");
    }
}

/// How much of a machine is here.
enum State {
    /// Its session.
    Session(Incoming),
    /// Its note, too.
    Found(Found),
    /// All of it; and the session, which the kernel could give again until it is finished.
    Kept(Kept, Option<Incoming>),
}

impl State {
    /// Goes on to the next state, or stays, and says why.
    fn advance(self, told: &Hold) -> (Self, anyhow::Result<()>) {
        match self {
            Self::Session(session) => match Found::read(session) {
                Ok(found) => (Self::Found(found), Ok(())),
                Err(failed) => (Self::Session(failed.0), Err(failed.1.into())),
            },
            Self::Found(found) => {
                // Nobody else takes the room that was found until the memory is here.
                let room = match Room::take(found.note(), told.socket.parent()) {
                    Ok(room) => room,
                    Err(error) => return (Self::Found(found), Err(error)),
                };
                let retrieved = match found.retrieve() {
                    Ok((kept, session)) => (Self::Kept(kept, Some(session)), Ok(())),
                    Err(failed) => (Self::Found(failed.0), Err(failed.1.into())),
                };
                drop(room);
                retrieved
            }
            kept @ Self::Kept(..) => (kept, Ok(())),
        }
    }
}

struct Holder {
    state: Option<State>,
    told: Hold,
    /// A VMM that gets ready while the memory is retrieved, and when it has waited for too long: it does not wait for ever
    /// to hear what it is to run.
    early: Option<(Vmm, Deadline)>,
}

/// A VMM that was started, and hears meanwhile what it is to run.
struct Vmm {
    agreed: JoinHandle<Result<Agreed, Reason>>,
    started: Started,
}

impl Holder {
    fn held(&self, why: &str) -> Held {
        Held { name: self.told.name.clone(), pid: process::id(), why: why.to_owned() }
    }

    /// All of the machine, here.
    fn kept(&mut self) -> anyhow::Result<&Kept> {
        while let Some(State::Session(_) | State::Found(_)) = &self.state {
            let Some(state) = self.state.take() else { break };
            if let State::Found(found) = &state {
                // First of all: a VMM is to be where its holder is.
                if let Err(error) = room::join_cgroup(found.note()) {
                    warn!(error = &*error, "the machine is not in its own cgroup");
                }
                // Should it fail, it is tried again when the memory is here, and the reason told.
                self.early = start(found.note(), &self.told).ok().map(|vmm| (vmm, Deadline::after(EARLY)));
            }
            let (state, advanced) = state.advance(&self.told);
            self.state = Some(state);
            advanced.inspect_err(|_| self.early = None)?;
        }
        match &self.state {
            Some(State::Kept(kept, _)) => Ok(kept),
            _ => bail!("the machine was given up"),
        }
    }

    /// Has a VMM run the machine. Gives its report, unless it could not tell.
    fn revive(&mut self, channel: &Channel) -> anyhow::Result<Option<KexecReport>> {
        let kept = self.kept()?;
        kept.remember()?;
        let standing = settled(kept)?;
        tell(channel, &Answer::Progress { what: RETRIEVED.to_owned(), done: 1, of: 2 });
        let left = match standing {
            Standing::Ready { sealed: epoch, claimed } => Left::Sealed { epoch, claimed },
            // Of a holder before this one.
            Standing::Taken(word) if word.state() == OwnershipState::Running => return Ok(None),
            standing => bail!("{}", not_ready(standing)),
        };
        let early = self.early.take().filter(|(_, late)| !late.has_passed()).map(|(vmm, _)| vmm);
        let kept = match &self.state {
            Some(State::Kept(kept, _)) => kept,
            _ => bail!("the machine was given up"),
        };
        run(kept, &self.told, left, early).or_else(|error| match kept.standing() {
            // It has the machine, though it could not say so.
            Ok(Standing::Taken(word)) if word.state() == OwnershipState::Running => Ok(None),
            Ok(Standing::Ready { .. }) | Err(_) => Err(error),
            Ok(standing) => Err(error.context(not_ready(standing))),
        })
    }

    /// Waits for somebody who wants to have it tried again, or given up.
    fn wait(mut self, mut why: String) {
        let mut clients = Vec::new();
        let mut listening = None;
        while let Some(listener) = listening.take().or_else(|| self.listen()) {
            let Some((channel, request)) = next(&listener, &mut clients) else { continue };
            match request {
                Request::Revive { program } => {
                    // The VMM is to have the path.
                    drop(listener);
                    self.told.program = program.or(self.told.program.take());
                    match self.revive(&channel) {
                        Ok(report) => {
                            tell(&channel, &Answer::Report(report.map(Box::new)));
                            break;
                        }
                        Err(error) => why = format!("{error:#}"),
                    }
                    tell(&channel, &Answer::Held(self.held(&why)));
                }
                Request::Stop => {
                    tell(&channel, &Answer::Stopped);
                    break;
                }
                _ => {
                    tell(&channel, &Answer::Held(self.held(&why)));
                    listening = Some(listener);
                }
            }
            clients.push(channel);
        }
        self.end();
    }

    /// Listens at the machine's socket, however long it takes to get there: an end of this process would be the
    /// machine's. `None` if it has come to run meanwhile.
    fn listen(&self) -> Option<Listener> {
        let mut said = None;
        loop {
            if let Some(State::Kept(kept, _)) = &self.state
                && runs(kept)
            {
                return None;
            }
            let made = self.told.make_directory();
            let bound = made.and_then(|()| Ok(Listener::bind(&self.told.socket)?));
            let error = match bound {
                Ok(listener) => return Some(listener),
                Err(error) => format!("{error:#}"),
            };
            if said.as_ref() != Some(&error) {
                warn!(error, "nobody can come to the machine's socket");
                said = Some(error);
            }
            thread::sleep(AGAIN);
        }
    }

    /// The machine runs, or is given up: what is kept here is not needed any more.
    fn end(self) {
        let finished = match self.state {
            Some(State::Kept(_, Some(session)) | State::Session(session)) => session.finish(),
            Some(State::Found(found)) => found.give_up(),
            Some(State::Kept(_, None)) | None => Ok(()),
        };
        if let Err(error) = finished {
            warn!(error = &*error as &dyn std::error::Error, "the session ends with this process");
        }
    }
}

impl Hold {
    /// The directory may be another one in this life, or none.
    fn make_directory(&self) -> anyhow::Result<()> {
        let Some(folder) = self.socket.parent() else { return Ok(()) };
        let made = DirBuilder::new().mode(0o700).recursive(true).create(folder);
        made.with_context(|| format!("cannot make the directory {}", folder.display()))
    }
}

/// Why nobody can run it who begins now.
fn not_ready(standing: Standing) -> String {
    match standing {
        Standing::Ready { .. } => "the machine can run".to_owned(),
        Standing::Taken(word) => format!(
            "a process has claimed the machine, lives, and does not run it: end that one first (its ownership word is {word:?})"
        ),
        Standing::NeverSealed(_) => {
            "the machine's guest was not stopped when the kernel went, so its vCPUs' state is lost; its memory is whole"
                .to_owned()
        }
        Standing::RanOn(_) => {
            "the machine ran under this kernel, and its VMM has died: its memory is later than its vCPUs' state".to_owned()
        }
    }
}

/// How the machine stands once a claimant that another holder has left behind has gone on, or has died.
fn settled(kept: &Kept) -> anyhow::Result<Standing> {
    let until = Deadline::after(CLAIM);
    loop {
        match kept.standing()? {
            Standing::Taken(word) if word.state() == OwnershipState::Claimed && !until.has_passed() => {
                thread::sleep(LOOK);
            }
            standing => return Ok(standing),
        }
    }
}

/// A process runs the machine, and lives.
fn runs(kept: &Kept) -> bool {
    matches!(kept.standing(), Ok(Standing::Taken(word)) if word.state() == OwnershipState::Running)
}

/// Gives the machine to a VMM: the one that was started early, or a new one.
fn run(kept: &Kept, hold: &Hold, left: Left, early: Option<Vmm>) -> anyhow::Result<Option<KexecReport>> {
    let Vmm { agreed, mut started } = early.map_or_else(|| start(kept.note(), hold), Ok)?;
    let mut step = |step: Step| debug!(%step, "holder");
    let last = serde_json::to_value(kept.when())?;
    let agreed = agreed.join().map_err(|_| anyhow!("the thread that offers the machine has panicked"))?;
    match agreed.and_then(|agreed| kept.pass_on(agreed, left, last, &mut step)) {
        Ok(passed) => {
            started.let_go();
            let told: measure::Told = serde_json::from_value(passed.vmm).unwrap_or_default();
            Ok(told.kexec)
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

/// Starts a VMM, which prepares what it can before the memory is here.
fn start(note: &Note, hold: &Hold) -> anyhow::Result<Vmm> {
    let mut told = told_of(note)?;
    let confine = told.spec.confine;
    // The directory may be another one in this life.
    told.spec.socket = Some(hold.socket.clone());
    hold.make_directory()?;
    let crossing = told.crossing.get_or_insert_default();
    let sealed = note.sealed.as_ref().map(|sealed| &sealed.when);
    [sealed, Some(&hold.when)].into_iter().flatten().for_each(|when| crossing.when.extend(when));
    let mut prospect = note.prospect(Origin::MadeAgain, serde_json::Value::Null, timeouts(note));
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

/// Who asks for something, of those who have come or come now; `None` if nobody can come here any more.
fn next(listener: &Listener, clients: &mut Vec<Channel>) -> Option<(Channel, Request)> {
    loop {
        let fds: Vec<_> = clients.iter().map(AsFd::as_fd).chain([listener.as_fd()]).collect();
        let place = match fdpass::ready(&fds, Deadline::never()) {
            Ok(ready) => ready.first().copied()?,
            Err(error) => {
                warn!(%error, "cannot wait for who comes");
                thread::sleep(AGAIN);
                return None;
            }
        };
        if place == clients.len() {
            accept(listener, clients);
            continue;
        }
        let channel = clients.remove(place);
        match control::receive(&channel, Deadline::after(Duration::ZERO)) {
            Ok(Some(request)) => return Some((channel, request)),
            other => debug!(?other, "somebody asks for nothing any more"),
        }
    }
}

fn accept(listener: &Listener, clients: &mut Vec<Channel>) {
    match listener.accept(Deadline::after(Duration::ZERO)) {
        Ok(channel) if channel.require_same_user().is_ok() => {
            // Whoever has been silent for longest makes room.
            clients.drain(..clients.len().saturating_sub(MAX_CLIENTS - 1));
            clients.push(channel);
        }
        Ok(_) => {}
        Err(error) => {
            debug!(%error, "somebody did not stay");
            thread::sleep(LOOK);
        }
    }
}

/// Waits until a holder that was started is on its own: nobody ends it by ending who started it, from then on.
///
/// # Errors
/// If it does not come as far.
pub fn await_ready(channel: &Channel) -> anyhow::Result<()> {
    match control::receive(channel, Deadline::after(START)).context("the holder says nothing")? {
        Some(Answer::Progress { what, .. }) if what == READY => Ok(()),
        other => bail!("unexpected first word of a holder: {other:?}"),
    }
}

/// Has a holder hold a machine, from the side of who started it: gives it the session.
///
/// # Errors
/// If it cannot be reached.
pub fn give(channel: &Channel, hold: &Hold, session: &Incoming) -> anyhow::Result<()> {
    let bytes = serde_json::to_vec(hold)?;
    channel.send(&bytes, &[session.as_fd()], Deadline::after(REQUEST)).context("cannot reach the holder")
}
