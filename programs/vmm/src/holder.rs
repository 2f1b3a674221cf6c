//! The process that has a machine's memory after a kexec, until a VMM runs the machine.
//!
//! It does nothing that can fail once it has the memory, but to start VMMs. One that fails is followed by another one, when
//! somebody asks: the machine is *held* meanwhile, and answers at its own socket.

use std::fs;
use std::fs::DirBuilder;
use std::fs::OpenOptions;
use std::os::fd::AsFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::process;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::bail;
use fdpass::Channel;
use fdpass::Deadline;
use fdpass::Listener;
use fdpass::MAX_MESSAGE_BYTES;
use kexec::Found;
use kexec::Kept;
use kexec::Note;
use kexec::Standing;
use kexec::When;
use liveupdate::Incoming;
use machine::OwnershipState;
use machine::OwnershipWord;
use machine::update::Step;
use serde::Deserialize;
use serde::Serialize;
use socket::Program;
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
use crate::measure;
use crate::serve::Told;

/// Where groups of processes are.
const CGROUPS: &str = "/sys/fs/cgroup";
/// How long a request may take to come, once somebody is connected.
const REQUEST: Duration = Duration::from_secs(5);
/// How long a VMM may take to say what becomes of it when its channel is closed.
const DEATH: Duration = Duration::from_millis(500);

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

/// What a holder says when it has all of the machine's memory.
const RETRIEVED: &str = "memory retrieved";

/// Takes a machine's session from whoever started this process, who is at the other end of its standard input, and holds
/// the machine until it runs, or is given up.
///
/// # Errors
/// If the machine cannot be held.
pub fn hold() -> anyhow::Result<()> {
    let channel = Channel::from_stdin().context("a holder is started with a channel as standard input")?;
    let message = channel.receive(MAX_MESSAGE_BYTES, 1, Deadline::after(REQUEST));
    let message = message.context("nobody says what is to be held")?;
    let told: Hold = serde_json::from_slice(&message.bytes).context("cannot read what is to be held")?;
    let session = message.fds.into_iter().next().context("no session came")?;
    let session = Incoming::from_fd(session).context("what came is no session")?;
    let mut holder = Holder { state: Some(State::Session(session)), told };
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
            holder.wait(why)
        }
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
    /// All of it.
    Kept(Kept),
}

impl State {
    /// Goes on to the next state, or stays, and says why.
    fn advance(self) -> (Self, anyhow::Result<()>) {
        match self {
            Self::Session(session) => match Found::read(session) {
                Ok(found) => (Self::Found(found), Ok(())),
                Err(failed) => (Self::Session(failed.0), Err(failed.1.into())),
            },
            Self::Found(found) => {
                if let Err(error) = join_cgroup(found.note()) {
                    warn!(error = &*error, "the machine is not in its own cgroup");
                }
                if let Err(error) = check_room(found.note()) {
                    return (Self::Found(found), Err(error));
                }
                match found.retrieve() {
                    Ok(kept) => (Self::Kept(kept), Ok(())),
                    Err(failed) => (Self::Found(failed.0), Err(failed.1.into())),
                }
            }
            kept @ Self::Kept(_) => (kept, Ok(())),
        }
    }
}

fn join_cgroup(note: &Note) -> anyhow::Result<()> {
    let Some(cgroup) = note.cgroup.as_deref().filter(|cgroup| *cgroup != "/") else { return Ok(()) };
    let folder = cgroup_folder(cgroup)?;
    let procs = folder.join("cgroup.procs");
    fs::write(&procs, process::id().to_string()).with_context(|| format!("cannot join {}", folder.display()))
}

/// A name that came through a kexec leads nowhere else than below the file system of cgroups.
fn cgroup_folder(cgroup: &str) -> anyhow::Result<PathBuf> {
    let relative = Path::new(cgroup.trim_start_matches('/'));
    let plain = relative.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if !plain {
        bail!("`{}` is no cgroup", cgroup.escape_debug());
    }
    Ok(Path::new(CGROUPS).join(relative))
}

/// Refuses what the cgroup could only answer by failing: a file that the kernel fails to give is lost.
fn check_room(note: &Note) -> anyhow::Result<()> {
    let wanted: u64 = note.regions.iter().sum();
    let list = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(own) = list.lines().find_map(|line| line.strip_prefix("0::")) else { return Ok(()) };
    let Ok(mut folder) = cgroup_folder(own) else { return Ok(()) };
    loop {
        let number = |file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
        if let (Some(max), Some(current)) = (number("memory.max"), number("memory.current"))
            && max.saturating_sub(current) < wanted
        {
            bail!(
                "the machine needs {wanted} bytes, and its cgroup {} may have {max}, of which {current} are used: raise \
                 memory.max and try again",
                folder.display()
            );
        }
        if folder == Path::new(CGROUPS) || !folder.pop() {
            return Ok(());
        }
    }
}

struct Holder {
    state: Option<State>,
    told: Hold,
}

impl Holder {
    fn held(&self, why: &str) -> Held {
        Held { name: self.told.name.clone(), pid: process::id(), why: why.to_owned() }
    }

    /// All of the machine, here.
    fn kept(&mut self) -> anyhow::Result<&Kept> {
        while let Some(State::Session(_) | State::Found(_)) = &self.state {
            let Some(state) = self.state.take() else { break };
            let (state, advanced) = state.advance();
            self.state = Some(state);
            advanced?;
        }
        match &self.state {
            Some(State::Kept(kept)) => Ok(kept),
            _ => bail!("the machine was given up"),
        }
    }

    /// Has a VMM run the machine. Gives its report, unless it could not tell.
    fn revive(&mut self, channel: &Channel) -> anyhow::Result<Option<KexecReport>> {
        let standing = self.kept()?.standing()?;
        tell(channel, &Answer::Progress { what: RETRIEVED.to_owned(), done: 1, of: 2 });
        let (sealed, claimed) = match standing {
            Standing::Ready { sealed, claimed } => (sealed, claimed),
            Standing::Taken(word) => {
                bail!("a process has the machine and lives: its ownership word is {word:?}")
            }
            Standing::NeverSealed => bail!(
                "the machine's guest was not stopped when the kernel went, so its vCPUs' state is lost; its memory is whole"
            ),
            Standing::RanOn => bail!(
                "the machine ran under this kernel, and its VMM has died: its memory is later than its vCPUs' state"
            ),
        };
        let kept = match &self.state {
            Some(State::Kept(kept)) => kept,
            _ => bail!("the machine was given up"),
        };
        run(kept, &self.told, (sealed, claimed)).or_else(|error| match kept.standing() {
            // It has the machine, though it could not say so.
            Ok(Standing::Taken(word)) if word.state() == OwnershipState::Running => Ok(None),
            _ => Err(error),
        })
    }

    /// Waits for somebody who wants to have it tried again, or given up.
    fn wait(mut self, mut why: String) -> anyhow::Result<()> {
        loop {
            let path = &self.told.socket;
            let listener =
                Listener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
            let (channel, request) = next(&listener)?;
            match request {
                Request::Revive { program } => {
                    // The VMM is to have the path.
                    drop(listener);
                    self.told.program = program.or(self.told.program.take());
                    match self.revive(&channel) {
                        Ok(report) => {
                            tell(&channel, &Answer::Report(report.map(Box::new)));
                            self.end();
                            return Ok(());
                        }
                        Err(error) => why = format!("{error:#}"),
                    }
                    tell(&channel, &Answer::Held(self.held(&why)));
                }
                Request::Stop => {
                    tell(&channel, &Answer::Stopped);
                    self.end();
                    return Ok(());
                }
                _ => tell(&channel, &Answer::Held(self.held(&why))),
            }
        }
    }

    /// The machine runs, or is given up: what is kept here is not needed any more.
    fn end(self) {
        let finished = match self.state {
            Some(State::Kept(kept)) => kept.finish(),
            Some(State::Found(found)) => found.give_up(),
            Some(State::Session(session)) => session.finish(),
            None => Ok(()),
        };
        if let Err(error) = finished {
            warn!(error = &*error as &dyn std::error::Error, "the session ends with this process");
        }
    }
}

/// Starts a VMM and gives it the machine.
fn run(kept: &Kept, hold: &Hold, seal: (u32, Option<OwnershipWord>)) -> anyhow::Result<Option<KexecReport>> {
    let note = kept.note();
    let mut vmm: Told =
        serde_json::from_value(note.vmm.clone()).context("cannot read what the machine's last VMM tells")?;
    // The directory may be another one in this life.
    vmm.spec.socket = Some(hold.socket.clone());
    if let Some(folder) = hold.socket.parent() {
        let made = DirBuilder::new().mode(0o700).recursive(true).create(folder);
        made.with_context(|| format!("cannot make the directory {}", folder.display()))?;
    }
    let crossing = vmm.crossing.get_or_insert_default();
    let sealed = note.sealed.as_ref().map(|sealed| &sealed.when);
    let whens = [sealed, Some(&hold.when), Some(kept.when())].into_iter().flatten();
    whens.for_each(|when| crossing.when.extend(when));
    let (channel, mut started) = start(note, hold, vmm.spec.confine)?;
    let mut step = |step: Step| debug!(%step, "holder");
    match kept.pass_on(&channel, seal, serde_json::to_value(vmm)?, Timeouts::default(), &mut step) {
        Ok(passed) => {
            started.let_go();
            let told: measure::Told = serde_json::from_value(passed.vmm).unwrap_or_default();
            Ok(told.kexec)
        }
        Err(reason) => {
            drop(channel);
            let ended = started.ended(DEATH);
            let ended = ended.map_or(String::new(), |status| format!(" (its program ended: {status})"));
            // One that runs the machine is not to be killed for its silence.
            match kept.standing() {
                Ok(Standing::Taken(word)) if word.state() == OwnershipState::Running => started.let_go(),
                _ => {}
            }
            bail!("{:#}{ended}", anyhow::Error::new(reason))
        }
    }
}

fn start(note: &Note, hold: &Hold, confine: Confine) -> anyhow::Result<(Channel, Started)> {
    let path = hold.program.as_ref().unwrap_or(&note.program);
    let program = Program::open(path, std::slice::from_ref(path))?;
    let confine = (confine != Confine::No).then_some("--confine");
    let words = ["vmm", "--detach"].into_iter().chain(confine).chain(["succeed"]);
    let log = hold.log.as_ref().and_then(|log| OpenOptions::new().create(true).append(true).open(log).ok());
    Ok(program.start_with(words, Stdio::null(), log.map_or_else(Stdio::inherit, Stdio::from))?)
}

fn next(listener: &Listener) -> anyhow::Result<(Channel, Request)> {
    loop {
        let channel = listener.accept(Deadline::never()).context("nobody can come")?;
        if channel.require_same_user().is_err() {
            continue;
        }
        match control::receive(&channel, Deadline::after(REQUEST)) {
            Ok(Some(request)) => return Ok((channel, request)),
            other => debug!(?other, "somebody came and asked for nothing"),
        }
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
