//! One machine, as this daemon knows it.

use std::os::fd::AsFd as _;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use custody::Standing;
use custody::When;
use fdpass::Channel;
use fdpass::ConnectError;
use fdpass::Deadline;
use machine::OwnershipState;
use tracing::debug;
use tracing::error;
use tracing::info;
use tracing::warn;
use vmm::Brings;
use vmm::Hold;
use vmm::control;
use vmm::control::Answer;
use vmm::control::OnOom;
use vmm::control::Request;
use vmm::machines;

use crate::closer::Closer;
use crate::holders::Holders;
use crate::oom::Ends;
use crate::remains::Remains;

/// How long a VMM may take to say what it takes to keep its machine: it may be in the midst of an update.
const GIVE: Duration = Duration::from_secs(120);
/// How long a process may take to die whose connection is closed: it closes its descriptors one after another.
const DEATH: Duration = Duration::from_millis(500);
/// How often to look meanwhile.
const LOOK: Duration = Duration::from_millis(10);
/// How often to try again what does not work.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a holder may take to be there.
const START: Duration = Duration::from_secs(60);
/// How long a machine's socket may take to take a connection: where there is room it does so at once, whatever its VMM does. Meanwhile
/// nobody else is heard.
pub(crate) const CONNECT: Duration = Duration::from_millis(2);

/// What entries share.
#[derive(Debug)]
pub(crate) struct Means<'a> {
    pub(crate) directory: &'a Path,
    pub(crate) holders: &'a Holders,
    pub(crate) closer: &'a Closer,
    pub(crate) ends: &'a Ends,
    pub(crate) counts: &'a mut Counts,
}

/// What has happened since this daemon began.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Counts {
    /// VMMs that died.
    pub(crate) deaths: u64,
    /// Holders that were started.
    pub(crate) holders: u64,
    /// Machines that were given up because memory ran out.
    pub(crate) dropped: u64,
}

/// One machine.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    remains: Option<Remains>,
    link: Link,
    /// That nobody has it is known since this daemon had it of somebody.
    died: bool,
}

/// How this daemon stands with whoever has the machine.
#[derive(Debug)]
enum Link {
    /// Nobody is connected: it is tried again then.
    Away(Deadline),
    /// It was asked for the machine.
    Asked(Channel, Deadline),
    /// It gives all that there is to know, and tells when it ends.
    Keeps(Channel),
    /// Its connection is closed: until then it may still be dying. It is looked at again before.
    Closing { until: Deadline, next: Deadline },
    /// A holder was started.
    Starting { channel: Channel, given: bool, until: Deadline },
    /// The machine is over.
    Over,
}

/// How a machine is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keeping {
    /// A process has it, and so has this daemon.
    Kept,
    /// It is here, and the process that has it is about to be found, or another one started.
    Alone,
    /// It is not here yet.
    Not,
}

impl Entry {
    /// A machine that was found.
    pub(crate) fn found(name: String) -> Self {
        Self { name, remains: None, link: Link::Away(Deadline::after(Duration::ZERO)), died: false }
    }

    /// A machine that another daemon had.
    pub(crate) fn adopted(name: String, remains: Remains) -> Self {
        Self { remains: Some(remains), ..Self::found(name) }
    }

    pub(crate) fn remains(&self) -> Option<&Remains> {
        self.remains.as_ref()
    }

    pub(crate) fn is_over(&self) -> bool {
        matches!(self.link, Link::Over)
    }

    pub(crate) fn keeping(&self) -> Keeping {
        match (&self.link, &self.remains) {
            (Link::Keeps(_), Some(_)) => Keeping::Kept,
            (_, Some(_)) => Keeping::Alone,
            (_, None) => Keeping::Not,
        }
    }

    /// A holder was started, and does not listen yet: it is not to be taken for one that is missing.
    pub(crate) fn is_starting(&self) -> bool {
        matches!(self.link, Link::Starting { .. })
    }

    /// What rings when there is something to hear.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.link {
            Link::Asked(channel, _) | Link::Keeps(channel) | Link::Starting { channel, .. } => {
                Some(channel.as_fd())
            }
            Link::Away(_) | Link::Closing { .. } | Link::Over => None,
        }
    }

    /// When to look at it, if nothing is heard before.
    pub(crate) fn due(&self) -> Option<Deadline> {
        match &self.link {
            Link::Away(due) | Link::Asked(_, due) => Some(*due),
            Link::Closing { next, .. } => Some(*next),
            Link::Starting { until, .. } => Some(*until),
            Link::Keeps(_) | Link::Over => None,
        }
    }

    /// It is looked for again: somebody may have come to its socket.
    pub(crate) fn look_again(&mut self) {
        if let Link::Away(due) = &mut self.link {
            *due = Deadline::after(Duration::ZERO);
        }
    }

    /// Something is to be heard.
    pub(crate) fn hear(&mut self, means: &mut Means<'_>) {
        let channel = match &self.link {
            Link::Asked(channel, _) | Link::Keeps(channel) | Link::Starting { channel, .. } => channel,
            Link::Away(_) | Link::Closing { .. } | Link::Over => return,
        };
        match control::receive_with::<Answer>(channel, Deadline::after(Duration::ZERO)) {
            Ok(Some((answer, fds))) => self.heard(answer, fds, means),
            Ok(None) => self.closed(),
            Err(error) => {
                warn!(name = self.name, error = &*error, "what it says cannot be taken");
                self.closed();
            }
        }
    }

    fn heard(&mut self, answer: Answer, fds: Vec<OwnedFd>, means: &mut Means<'_>) {
        if let Link::Starting { .. } = self.link {
            return self.heard_of_holder(&answer);
        }
        match answer {
            // Should its process end, the manager starts the next one: a holder would be in its way.
            Answer::Custody(custody) if custody.stored => {
                info!(name = self.name, "the service manager keeps the machine");
                self.forget(means);
            }
            Answer::Custody(custody) => match Remains::take(&custody, fds) {
                Ok(remains) => self.keep(remains, means),
                Err(error) => warn!(name = self.name, error = &*error, "what it gives is not taken"),
            },
            Answer::Stopped | Answer::Ended(_) => {
                info!(name = self.name, "the machine is over");
                self.forget(means);
            }
            Answer::Error(error) => {
                debug!(name = self.name, error, "it is not given");
                self.away();
            }
            // It has nothing of the machine yet.
            Answer::Held(_) => self.away(),
            _ => {}
        }
    }

    fn keep(&mut self, remains: Remains, means: &Means<'_>) {
        let (pid, bytes) = (remains.about.pid, remains.about.bytes);
        info!(name = self.name, pid, bytes, "the machine is kept");
        if let (OnOom::Drop, Some(cgroup)) = (remains.about.on_oom, &remains.about.cgroup) {
            means.ends.add(cgroup);
        }
        self.died = false;
        if let Some(old) = self.remains.replace(remains) {
            means.closer.close(old.into_fds());
        }
        if let Link::Asked(..) = self.link
            && let Link::Asked(channel, _) = std::mem::replace(&mut self.link, Link::Over)
        {
            self.link = Link::Keeps(channel);
        }
    }

    fn forget(&mut self, means: &Means<'_>) {
        self.link = Link::Over;
        if let Some(remains) = self.remains.take() {
            means.closer.close(remains.into_fds());
        }
    }

    fn away(&mut self) {
        self.link = Link::Away(Deadline::after(AGAIN));
    }

    /// Whoever had the machine is gone, or about to be.
    fn closed(&mut self) {
        // A holder that could not even begin: the next one may not be able to either.
        let soon = if let Link::Starting { .. } = self.link { AGAIN } else { Duration::ZERO };
        self.link = match self.remains {
            Some(_) => Link::Closing { until: Deadline::after(DEATH), next: Deadline::after(soon) },
            None => Link::Away(Deadline::after(AGAIN)),
        };
        // At once: where it was the last process of its cgroup, a service manager takes that away.
        self.look_for_want();
    }

    /// A process of some machine's cgroup may have been ended for want of memory.
    pub(crate) fn look_for_want(&mut self) {
        if let Some(remains) = self.remains.as_mut().filter(|remains| remains.about.on_oom == OnOom::Drop) {
            remains.look_for_want();
        }
    }

    /// It is time to look at it.
    pub(crate) fn act(&mut self, means: &mut Means<'_>) {
        match &self.link {
            Link::Away(_) => self.reach(means),
            Link::Asked(..) => {
                warn!(name = self.name, "its VMM does not answer");
                self.away();
            }
            Link::Closing { until, .. } => {
                let until = *until;
                self.look(until, means);
            }
            Link::Starting { .. } => {
                warn!(name = self.name, "its holder does not get ready; another one is started");
                self.bury(means);
            }
            Link::Keeps(_) | Link::Over => {}
        }
    }

    /// Connects to whoever has the machine, and asks for it.
    fn reach(&mut self, means: &mut Means<'_>) {
        let socket = machines::socket(means.directory, &self.name);
        let asked = match fdpass::connect(&socket, Deadline::after(CONNECT)) {
            Ok(channel) => ask(channel),
            Err(ConnectError::Absent { .. } | ConnectError::Refused { .. }) if self.remains.is_none() => {
                // Its VMM is dead since before this daemon knew it. Should there be a new one, the directory tells.
                self.link = Link::Over;
                return;
            }
            Err(ConnectError::Absent { .. } | ConnectError::Refused { .. }) => return self.closed(),
            Err(error) => Err(error.into()),
        };
        self.asks(asked);
    }

    fn asks(&mut self, asked: anyhow::Result<Channel>) {
        match asked {
            Ok(channel) => self.link = Link::Asked(channel, Deadline::after(GIVE)),
            Err(error) => {
                debug!(name = self.name, error = &*error, "it cannot be reached");
                self.away();
            }
        }
    }

    /// Somebody has come to the machine's socket in the place of who is gone.
    fn has_successor(&mut self, means: &Means<'_>) -> bool {
        let socket = machines::socket(means.directory, &self.name);
        let Ok(channel) = fdpass::connect(&socket, Deadline::after(CONNECT)) else { return false };
        self.asks(ask(channel));
        true
    }

    /// Its connection is closed, and nobody listens: does anybody have it?
    fn look(&mut self, until: Deadline, means: &mut Means<'_>) {
        if self.has_successor(means) {
            return;
        }
        let Some(remains) = &self.remains else { return self.away() };
        match remains.standing() {
            Ok(Standing::Taken(_)) if !until.has_passed() => {
                self.link = Link::Closing { until, next: Deadline::after(LOOK) };
            }
            Ok(Standing::Taken(word)) => {
                // It lives, and went from this daemon: it may be about to listen.
                if word.state() != OwnershipState::Running {
                    debug!(name = self.name, ?word, "the machine is on its way");
                }
                self.away();
            }
            Ok(standing) => {
                if !std::mem::replace(&mut self.died, true) {
                    means.counts.deaths += 1;
                    warn!(name = self.name, pid = remains.about.pid, ?standing, "its VMM has died");
                }
                self.bury(means);
            }
            Err(error) => {
                error!(name = self.name, error = &*error, "nobody can tell how the machine stands");
                self.away();
            }
        }
    }

    /// Nobody runs it: it is held, unless it is to be given up.
    fn bury(&mut self, means: &mut Means<'_>) {
        let Some(remains) = &self.remains else { return self.away() };
        if remains.about.on_oom == OnOom::Drop && remains.ran_out_of_memory() {
            warn!(name = self.name, "memory had run out: the machine's is given back");
            means.counts.dropped += 1;
            return self.forget(means);
        }
        match means.holders.start(&self.name, means.directory) {
            Ok(channel) => {
                means.counts.holders += 1;
                self.link = Link::Starting { channel, given: false, until: Deadline::after(START) };
            }
            Err(error) => {
                error!(name = self.name, error = &*error, "no holder can be started; it is tried again");
                self.link = Link::Closing { until: Deadline::after(DEATH), next: Deadline::after(AGAIN) };
            }
        }
    }

    fn heard_of_holder(&mut self, answer: &Answer) {
        let Link::Starting { channel, given, until } = &mut self.link else { return };
        match answer {
            Answer::Progress { .. } if !*given => {
                let Some(remains) = &self.remains else { return };
                match give(&self.name, channel, remains) {
                    Ok(()) => *given = true,
                    // It is started again.
                    Err(error) => {
                        error!(name = self.name, error = &*error, "its holder does not get it");
                        *until = Deadline::after(Duration::ZERO);
                    }
                }
            }
            Answer::Held(held) => {
                info!(
                    name = self.name,
                    pid = held.pid,
                    complete = held.complete,
                    why = held.why,
                    "the machine is held"
                );
                // From now on as of any other process that has it.
                let Link::Starting { channel, .. } = std::mem::replace(&mut self.link, Link::Over) else {
                    return;
                };
                self.asks(ask(channel));
            }
            _ => {}
        }
    }
}

fn ask(channel: Channel) -> anyhow::Result<Channel> {
    channel.require_same_user()?;
    control::send(&channel, &Request::Custody)?;
    Ok(channel)
}

fn give(name: &str, channel: &Channel, remains: &Remains) -> anyhow::Result<()> {
    let directory = machines::make_directory()?;
    let about = &remains.about;
    let hold = Hold {
        name: name.to_owned(),
        socket: machines::socket(&directory, name),
        when: When::default(),
        program: None,
        log: Some(directory.join(format!("{name}.log"))),
        brings: Brings::Remains {
            vcpus: remains.vcpus(),
            origin: about.origin,
            died: format!("process {}", about.pid),
        },
        stored: None,
    };
    let fds: Vec<BorrowedFd<'_>> = remains.fds().collect();
    vmm::give(channel, &hold, &fds)
}
