//! The process that has a machine's memory while nothing runs the machine: after a kexec, and after the death of its VMM.
//!
//! It does nothing that can fail once it has the memory, but to start VMMs. One that fails is followed by another one, when
//! somebody asks: the machine is *held* meanwhile, and answers at its own socket.

mod clients;
mod start;

use std::fs;
use std::fs::DirBuilder;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::process;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::bail;
use custody::Kept;
use custody::NoteFile;
use custody::Standing;
use custody::When;
use fdpass::Channel;
use fdpass::Deadline;
use fdpass::Listener;
use kexec::Found;
use liveupdate::Incoming;
use machine::OwnershipState;
use machine::OwnershipWord;
use serde::Deserialize;
use serde::Serialize;
use socket::Origin;
use tracing::debug;
use tracing::warn;

use crate::control;
use crate::control::Answer;
use crate::control::Client;
use crate::control::Custody;
use crate::control::Held;
use crate::control::OnOom;
use crate::control::Otherwise;
use crate::control::RecoverReport;
use crate::control::Recovered;
use crate::control::Request;
use crate::room;
use crate::room::Room;
use crate::serve::Alone;
use start::Ran;
use start::Vmm;

/// How long what is to be held may take to come, once it is due.
const REQUEST: Duration = Duration::from_secs(5);
/// How long a holder may take to be there: its host may have much to do at once.
const START: Duration = Duration::from_secs(60);
/// How long a VMM that was started early may have waited: half of what it waits.
const EARLY: Duration = Duration::from_secs(30);
/// How long a VMM may take that has claimed the machine, and that this process did not start.
const CLAIM: Duration = Duration::from_secs(10);
/// How often to look whether something has come that there is no call to wait for.
const LOOK: Duration = Duration::from_millis(100);
/// How often to try again what does not work.
const AGAIN: Duration = Duration::from_secs(1);

/// What a holder is told, with the descriptors of what it is to hold.
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
    /// What comes.
    pub brings: Brings,
    /// What the service manager keeps of the machine, if the holder is a service of it.
    #[serde(default)]
    pub stored: Option<fdstore::Told>,
}

/// Why a machine is held no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Released {
    /// A VMM runs it.
    Runs,
    /// Somebody gave it up.
    GivenUp,
    /// The service manager keeps it, and starts the next process of the service, which holds it.
    Parked,
}

/// What a holder gets.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Brings {
    /// A session of the kernel's, with all of the machine in it: a VMM is started at once.
    Session,
    /// What a VMM that died has left: the note's file, the regions, the vCPUs. It waits until somebody wants to have it run.
    Remains {
        /// How many vCPUs.
        vcpus: usize,
        /// Where the regions' files come from.
        origin: Origin,
        /// The process that died, as far as is known.
        died: String,
    },
}

/// What a holder says first: it is on its own from here on.
const READY: &str = "holder ready";
/// What a holder says when it has all of the machine's memory.
const RETRIEVED: &str = "memory retrieved";

/// Takes what is left of a machine from whoever started this process, who is at the other end of its standard input, and holds
/// the machine until it runs, or is given up.
///
/// # Errors
/// If the machine cannot be held.
pub fn hold() -> anyhow::Result<()> {
    let channel = Channel::from_stdin().context("a holder is started with a channel as standard input")?;
    spare_this_process();
    control::send(&channel, &Answer::Progress { what: READY.to_owned(), done: 0, of: 2 })?;
    let came = control::receive_with(&channel, Deadline::after(REQUEST));
    let (told, fds): (Hold, _) = came?.context("nobody says what is to be held")?;
    match told.brings.clone() {
        Brings::Session => {
            let session = fds.into_iter().next().context("no session came")?;
            let session = Incoming::from_fd(session).context("what came is no session")?;
            Holder::new(told, State::Session(session), Vec::new()).begin(channel);
        }
        Brings::Remains { vcpus, origin, died } => {
            let (kept, vcpus) = remains(fds, vcpus, origin)?;
            let holder = Holder::new(told, State::Kept(kept, None), vcpus);
            let why = holder.why_left(&died);
            let listening = holder.listen();
            tell(&channel, &Answer::Held(holder.held(&why)));
            // It may ask for more.
            holder.wait(why, vec![channel], listening);
        }
    }
    Ok(())
}

fn remains(mut fds: Vec<OwnedFd>, vcpus: usize, origin: Origin) -> anyhow::Result<(Kept, Vec<OwnedFd>)> {
    let regions = fds.len().checked_sub(1 + vcpus).context("fewer descriptors came than were told")?;
    let vcpus = fds.split_off(1 + regions);
    let regions = fds.split_off(1);
    let note = fds.pop().context("no note came")?;
    Ok((Kept::of(NoteFile::from_fd(note)?, regions, origin)?, vcpus))
}

/// Holds what a VMM has left until it runs, or is given up. `died` says which process that was. `ready` is called once somebody who
/// comes to the machine's socket is heard.
pub(crate) fn hold_remains(hold: Hold, kept: Kept, died: &str, ready: impl FnOnce()) -> Released {
    let holder = Holder::new(hold, State::Kept(kept, None), Vec::new());
    let why = holder.why_left(died);
    let listening = holder.listen();
    ready();
    holder.wait(why, Vec::new(), listening)
}

/// The score by which the kernel chooses whom to end when memory runs out.
const SCORE: &str = "oom_score_adj";

/// Has the kernel end others first when memory runs out, if this process may say so: its end is the machine's.
fn spare_this_process() {
    if let Err(error) = fs::write(format!("/proc/self/{SCORE}"), "-1000") {
        debug!(%error, "this process is ended as any other when memory runs out");
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
    /// Of the VMM that died.
    vcpus: Vec<OwnedFd>,
    /// A VMM that gets ready while the memory is retrieved, and when it has waited for too long: it does not wait for ever
    /// to hear what it is to run.
    early: Option<(Vmm, Deadline)>,
}

/// How a machine is to be run.
#[derive(Debug, Clone, Copy)]
struct Way {
    left: OwnershipWord,
    alone: Alone,
}

impl Holder {
    fn new(told: Hold, state: State, vcpus: Vec<OwnedFd>) -> Self {
        Self { state: Some(state), told, vcpus, early: None }
    }

    fn held(&self, why: &str) -> Held {
        let kept = self.here();
        Held {
            name: self.told.name.clone(),
            pid: process::id(),
            why: why.to_owned(),
            left_behind: matches!(self.told.brings, Brings::Remains { .. }),
            complete: kept.is_some_and(|kept| matches!(kept.standing(), Ok(Standing::Ready(_)))),
        }
    }

    /// Why a machine is held whose VMM died.
    fn why_left(&self, died: &str) -> String {
        match self.here().map(|kept| (kept, kept.standing())) {
            Some((kept, Ok(standing))) => format!("its VMM ({died}) has died: {}", stands(kept, standing)),
            Some((_, Err(error))) => format!("its VMM ({died}) has died: {:#}", anyhow::Error::new(error)),
            None => format!("its VMM ({died}) has died"),
        }
    }

    /// All of the machine, if it is here.
    fn here(&self) -> Option<&Kept> {
        match &self.state {
            Some(State::Kept(kept, _)) => Some(kept),
            _ => None,
        }
    }

    /// All of the machine, here.
    fn kept(&mut self) -> anyhow::Result<&Kept> {
        while let Some(State::Session(_) | State::Found(_)) = &self.state {
            let Some(state) = self.state.take() else { break };
            if let State::Found(found) = &state {
                // First of all: a VMM is to be where its holder is.
                join_cgroup(found.note());
                // Should it fail, it is tried again when the memory is here, and the reason told.
                let early = start::start_after_kexec(found.note(), &self.told, None);
                self.early = early.ok().map(|vmm| (vmm, Deadline::after(EARLY)));
            }
            let (state, advanced) = state.advance(&self.told);
            self.state = Some(state);
            advanced.inspect_err(|_| self.early = None)?;
        }
        self.here().context("the machine was given up")
    }

    /// Has a VMM run a machine that came through a kexec, for who waits for that, or waits for others who want it.
    fn begin(mut self, channel: Channel) {
        match self.revive(&channel) {
            Ok(report) => {
                tell(&channel, &report);
                self.end();
            }
            Err(error) => {
                let why = format!("{error:#}");
                tell(&channel, &Answer::Held(self.held(&why)));
                drop(channel);
                self.wait(why, Vec::new(), None);
            }
        }
    }

    /// Has a VMM run the machine on. Gives its report.
    fn revive(&mut self, channel: &Channel) -> anyhow::Result<Answer> {
        let standing = self.settled()?;
        tell(channel, &Answer::Progress { what: RETRIEVED.to_owned(), done: 1, of: 2 });
        let report = match standing {
            Standing::Ready(left) => {
                self.run(Way { left, alone: Alone::RunOn })?.and_then(|(_, report)| report)
            }
            // Of a holder before this one.
            standing if standing.runs() => None,
            standing => bail!("{}", stands(self.kept()?, standing)),
        };
        Ok(Answer::Report(report.map(Box::new)))
    }

    /// Has a VMM run the machine, on if its state is complete, and else as is wanted.
    fn recover(&mut self, otherwise: Otherwise) -> anyhow::Result<RecoverReport> {
        let standing = self.settled()?;
        let (left, how) = match (standing, otherwise) {
            (Standing::Ready(left), _) => (left, Recovered::RunsOn),
            (Standing::RanOn(left), Otherwise::Boot) => (left, Recovered::Booted),
            (standing, _) => bail!("{}", stands(self.kept()?, standing)),
        };
        let alone = match how {
            Recovered::RunsOn => Alone::RunOn,
            Recovered::Booted => Alone::Boot,
        };
        let why = stands(self.kept()?, standing);
        let (pid, _) = self.run(Way { left, alone })?.unwrap_or_default();
        Ok(RecoverReport { name: self.told.name.clone(), pid, how, why })
    }

    /// How the machine stands once a claimant that another holder has left behind has gone on, or has died.
    fn settled(&mut self) -> anyhow::Result<Standing> {
        let kept = self.kept()?;
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

    /// `None` if it runs, and could not say so.
    fn run(&mut self, way: Way) -> anyhow::Result<Option<Ran>> {
        let early = self.early.take().filter(|(_, late)| !late.has_passed()).map(|(vmm, _)| vmm);
        let kept = self.here().context("the machine was given up")?;
        let vmm = match (early, kept.origin(), way.alone) {
            (Some(vmm), _, Alone::RunOn) => vmm,
            (_, Origin::MadeAgain, Alone::RunOn) => {
                join_cgroup(kept.note());
                start::start_after_kexec(kept.note(), &self.told, None)?
            }
            (_, Origin::MadeAgain, Alone::Boot) => {
                join_cgroup(kept.note());
                start::start_after_kexec(kept.note(), &self.told, Some(Alone::Boot))?
            }
            (_, _, alone) => {
                join_cgroup(kept.note());
                start::start_after_death(kept, &self.told, alone)?
            }
        };
        start::run(kept, way.left, vmm).map(Some).or_else(|error| match kept.standing() {
            // It has the machine, though it could not say so.
            Ok(standing) if standing.runs() => Ok(None),
            Ok(Standing::Ready(_)) | Err(_) => Err(error),
            Ok(standing) => Err(error.context(stands(kept, standing))),
        })
    }

    /// Waits for somebody who wants to have it tried again, or given up.
    fn wait(
        mut self,
        mut why: String,
        mut clients: Vec<Channel>,
        mut listening: Option<Listener>,
    ) -> Released {
        let mut released = Released::Runs;
        while let Some(listener) = listening.take().or_else(|| self.listen()) {
            let Some((channel, request)) = clients::next(&listener, &mut clients) else { continue };
            match request {
                Request::Revive { .. } | Request::Recover { .. } => {
                    // The VMM is to have the path.
                    drop(listener);
                    match self.try_again(&channel, request) {
                        Ok(answer) => {
                            tell(&channel, &answer);
                            break;
                        }
                        Err(error) => why = format!("{error:#}"),
                    }
                    // First: whoever hears that it is held may come at once.
                    listening = self.listen();
                    tell(&channel, &Answer::Held(self.held(&why)));
                }
                Request::Stop => {
                    // Those who keep it as well are among them.
                    [&channel].into_iter().chain(&clients).for_each(|one| tell(one, &Answer::Stopped));
                    released = Released::GivenUp;
                    self.empty_place();
                    break;
                }
                Request::Park if self.told.stored.is_some() => {
                    tell(&channel, &Answer::Held(self.held(&why)));
                    released = Released::Parked;
                    break;
                }
                Request::Custody => {
                    self.give_custody(&channel);
                    listening = Some(listener);
                }
                _ => {
                    tell(&channel, &Answer::Held(self.held(&why)));
                    listening = Some(listener);
                }
            }
            clients.push(channel);
        }
        self.end();
        released
    }

    /// The machine is over: nobody is to find it by its path.
    fn empty_place(&self) {
        let region0 = self.here().and_then(|kept| kept.regions().next());
        let place = region0.map_or(Ok(None), path::Place::of_region);
        if let Err(error) = place.and_then(|place| place.map_or(Ok(()), |place| place.empty())) {
            warn!(error = &error as &dyn std::error::Error, "the machine's file stays");
        }
    }

    fn try_again(&mut self, channel: &Channel, request: Request) -> anyhow::Result<Answer> {
        match request {
            Request::Recover { otherwise, program } => {
                self.told.program = program.or(self.told.program.take());
                self.recover(otherwise).map(Answer::Recovered)
            }
            Request::Revive { program } => {
                self.told.program = program.or(self.told.program.take());
                self.revive(channel)
            }
            other => bail!("not to be tried: {other:?}"),
        }
    }

    /// Gives what is here, so that this process's end is not the machine's either.
    fn give_custody(&self, channel: &Channel) {
        let Some(kept) = self.here() else {
            return tell(channel, &Answer::Error("the machine's memory is not here yet".to_owned()));
        };
        let (note, pid) = (kept.note().clone(), process::id());
        let (vcpus, origin) = (self.vcpus.len(), kept.origin());
        let stored = self.told.stored.is_some();
        let custody = Custody { note, vcpus, pid, origin, on_oom: OnOom::Keep, stored };
        let fds: Vec<BorrowedFd<'_>> = kept.regions().chain(self.vcpus.iter().map(AsFd::as_fd)).collect();
        if let Err(error) = control::send_with(channel, &Answer::Custody(Box::new(custody)), &fds) {
            debug!(error = &*error, "nobody keeps the machine");
        }
    }

    /// Listens at the machine's socket, however long it takes to get there: an end of this process would be the
    /// machine's. `None` if it has come to run meanwhile.
    fn listen(&self) -> Option<Listener> {
        let mut said = None;
        loop {
            if self.here().is_some_and(runs) {
                return None;
            }
            let made = self.told.make_directory();
            let bound = made.and_then(|()| Ok(Listener::bind(&self.told.socket)?));
            let error = match bound {
                Ok(listener) => return Some(listener),
                Err(_) if self.is_held_by_another() => return None,
                Err(error) => format!("{error:#}"),
            };
            if said.as_ref() != Some(&error) {
                warn!(error, "nobody can come to the machine's socket");
                said = Some(error);
            }
            thread::sleep(AGAIN);
        }
    }

    /// Another process holds what the same VMM has left: one of the two is enough, and which one that is, its socket says. Whoever
    /// holds a session of the kernel's is the only one that can.
    fn is_held_by_another(&self) -> bool {
        let (Brings::Remains { .. }, Some(kept)) = (&self.told.brings, self.here()) else { return false };
        let connected = fdpass::connect(&self.told.socket, Deadline::after(LOOK)).ok();
        let given = connected.and_then(|channel| Client::new(channel).with_patience(LOOK).ask_custody().ok());
        given.is_some_and(|(custody, ..)| custody.note.identity == kept.note().identity)
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

/// A VMM that this process starts is to be in the machine's cgroup.
fn join_cgroup(note: &custody::Note) {
    if let Err(error) = room::join_cgroup(note) {
        warn!(error = &*error, "the machine is not in its own cgroup");
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

/// How the machine stands, and what that means for whoever wants to run it.
pub(crate) fn stands(kept: &Kept, standing: Standing) -> String {
    let never_sealed = kept.origin() == Origin::MadeAgain && kept.note().sealed.is_none();
    match standing {
        Standing::Ready(_) => {
            "it was sealed, so its state is complete to the last instant, and it can run on".to_owned()
        }
        Standing::Taken(word) => format!(
            "a process has claimed the machine, lives, and does not run it: end that one first (its ownership word is {word:?})"
        ),
        Standing::RanOn(_) if never_sealed => {
            "the machine's guest was not stopped when the kernel went, so its vCPUs' state is lost; its memory is whole"
                .to_owned()
        }
        Standing::RanOn(_) => {
            "its guest ran, so its vCPUs' state is lost; its memory is whole, and later than any state that was saved".to_owned()
        }
    }
}

/// A process runs the machine, and lives.
fn runs(kept: &Kept) -> bool {
    kept.standing().is_ok_and(Standing::runs)
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

/// Has a holder hold a machine, from the side of who started it: gives it what [it brings](Hold::brings).
///
/// # Errors
/// If it cannot be reached.
pub fn give(channel: &Channel, hold: &Hold, fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
    control::send_with(channel, hold, fds).context("cannot reach the holder")
}
