//! A VMM's life while it runs the guest: it does what comes over the control channel.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process;
use std::sync::Arc;

use anyhow::Context as _;
use anyhow::bail;
use fdpass::Channel;
use fdpass::monotonic_ns;
use fdstore::Deposit;
use liveupdate::moment::Moment;
use liveupdate::moment::TscRate;
use machine::Machine;
use machine::OwnershipWord;
use machine::update::Guest as _;
use machine::update::Step;
use path::Place;
use pulse::Mailboxes;
use serde::Deserialize;
use serde::Serialize;
use tracing::debug;
use tracing::warn;

use crate::backends::Backends;
use crate::clients::Came;
use crate::clients::ClientId;
use crate::clients::Clients;
use crate::clients::Mode;
use crate::confine;
use crate::confine::Confine;
use crate::confine::ConfineError;
use crate::control::Answer;
use crate::control::End;
use crate::control::GuestKind;
use crate::control::GuestState;
use crate::control::KexecReport;
use crate::control::MachineSpec;
use crate::control::Request;
use crate::control::Status;
use crate::control::Then;
use crate::control::UpdateReport;
use crate::crossing::Crossing;
use crate::first;
use crate::guest;
use crate::guest::AnyGuest;
use crate::guest::MemoryWords;
use crate::guest::Served;
use crate::measure;
use crate::remains::AtRest;
use crate::service::Restart;

/// What a VMM tells its successor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Told {
    pub(crate) spec: MachineSpec,
    pub(crate) before_pause: serde_json::Value,
    pub(crate) populate: bool,
    pub(crate) probe: bool,
    pub(crate) held: bool,
    pub(crate) clients: Vec<Mode>,
    /// Numbers of the consoles.
    #[serde(default)]
    pub(crate) consoles: Vec<u32>,
    pub(crate) programs: Vec<PathBuf>,
    pub(crate) history: History,
    /// Who is to be told how the update went, and by whom. By exec, nobody is left to do that in its place.
    #[serde(default)]
    pub(crate) answered: Option<Answered>,
    /// Whoever tells this says farewell when it has told how the update went, and the successor what it told.
    #[serde(default)]
    pub(crate) parts: bool,
    /// What went wrong last in each device, by its name.
    #[serde(default)]
    pub(crate) faults: BTreeMap<String, String>,
    /// The machine comes from a kernel before this one: nothing but its memory came with it.
    #[serde(default)]
    pub(crate) crossing: Option<Crossing>,
    /// What the last kexec took.
    #[serde(default)]
    pub(crate) crossed: Option<KexecReport>,
    /// The process that ran the machine is dead: nothing but its memory is left.
    #[serde(default)]
    pub(crate) alone: Option<Alone>,
    /// The machine's regions and note are in the store of the service that its VMMs belong to.
    #[serde(default)]
    pub(crate) stored: Option<fdstore::Told>,
    /// The service was restarted: nothing but the machine's memory came with it.
    #[serde(default)]
    pub(crate) restart: Option<Restart>,
}

/// What is to be done with a machine of which nothing but memory is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Alone {
    /// It was sealed: its guest runs on.
    RunOn,
    /// Its guest starts from the beginning.
    Boot,
}

impl Told {
    /// Nobody who was connected is there still, and no file is open.
    pub(crate) fn is_left(&self) -> bool {
        self.crossing.is_some() || self.alone.is_some() || self.restart.is_some()
    }
}

/// Who asked for an update, and the process that is to answer.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Answered {
    pub(crate) client: ClientId,
    pub(crate) by: u32,
}

/// What a machine has behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct History {
    /// When it was made, on the host's monotonic clock.
    pub(crate) made_ns: u64,
    /// How many times its VMM was replaced.
    pub(crate) updates: u64,
    /// How old it was then: kernels before this one had other clocks.
    #[serde(default)]
    pub(crate) lived_ns: u64,
    /// How many kernels it has left.
    #[serde(default)]
    pub(crate) kexecs: u64,
    /// How many of its VMMs have died.
    #[serde(default)]
    pub(crate) recoveries: u64,
}

impl History {
    /// How old the machine is, in nanoseconds.
    pub(crate) fn age_ns(&self) -> u64 {
        self.lived_ns.saturating_add(monotonic_ns().saturating_sub(self.made_ns))
    }
}

/// A VMM that runs a guest.
pub(crate) struct Vmm {
    pub(crate) spec: MachineSpec,
    pub(crate) machine: Machine,
    pub(crate) guest: AnyGuest,
    /// Where pulse tells how it is; no other guest does.
    pub(crate) words: Option<MemoryWords>,
    pub(crate) clients: Clients,
    pub(crate) backends: Arc<Backends>,
    /// Programs that the machine may be updated to.
    pub(crate) programs: Vec<PathBuf>,
    pub(crate) history: History,
    /// How this process is confined.
    pub(crate) confined: Confine,
    /// What the last kexec took.
    pub(crate) crossed: Option<KexecReport>,
    /// What the last update took since then.
    pub(crate) updated: Option<UpdateReport>,
    /// The guest stands still, and the machine is sealed: should this process die, it can run on.
    pub(crate) at_rest: AtRest,
    /// What the service manager keeps of the machine, if its VMMs are a service.
    pub(crate) deposit: Option<Deposit>,
    /// Where the machine lies, if it is found by its path.
    pub(crate) place: Option<Place>,
    /// When this process got here: how fast the host's TSC runs is seen from there on.
    pub(crate) since: Option<Moment>,
    /// Is told of the steps of updates from here.
    pub(crate) watch: Watch,
}

/// Is told of each step of an update that this process reaches, and on which side. Within the pause: be quick.
pub type Watch = Box<dyn FnMut(Side, Step)>;

/// On which side of an update a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// It hands the machine over.
    Predecessor,
    /// It has a program show that it can take the machine over, before it executes that.
    Rehearsal,
    /// It takes the machine over.
    Successor,
}

impl Side {
    /// Its name, in lower case.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Predecessor => "predecessor",
            Self::Rehearsal => "rehearsal",
            Self::Successor => "successor",
        }
    }
}

/// One that tells the log alone.
pub(crate) fn unwatched() -> Watch {
    Box::new(|side, step| debug!(%step, "{}", side.name()))
}

/// What is left to do after a request.
pub(crate) enum After {
    /// The next request.
    Go,
    /// End: the guest runs elsewhere, or nowhere.
    End,
}

/// Runs the guest of `machine`, which was made as `spec` says, and obeys `control` and whoever comes to the machine's
/// socket, until the guest is handed over or ended. Its devices use `backends`. `programs` are what the machine may be
/// updated to.
///
/// # Errors
/// If the guest was lost, or nobody can come to the socket.
pub fn serve(
    spec: MachineSpec,
    machine: Machine,
    guest: Box<dyn Served>,
    backends: Arc<Backends>,
    control: Channel,
    programs: Vec<PathBuf>,
) -> anyhow::Result<()> {
    let clients = Clients::first(control, spec.socket.as_deref()).map_err(|(error, _)| error)?;
    Vmm::new(spec, machine, guest, clients, backends, programs).obey()
}

impl Vmm {
    pub(crate) fn new(
        spec: MachineSpec,
        machine: Machine,
        guest: Box<dyn Served>,
        clients: Clients,
        backends: Arc<Backends>,
        programs: Vec<PathBuf>,
    ) -> Self {
        let words = MemoryWords::of(&spec, &machine);
        let history = History { made_ns: monotonic_ns(), updates: 0, lived_ns: 0, kexecs: 0, recoveries: 0 };
        let guest = AnyGuest { guest, held: false };
        Self {
            spec,
            machine,
            guest,
            words,
            clients,
            backends,
            programs,
            history,
            confined: Confine::No,
            crossed: None,
            updated: None,
            at_rest: AtRest::default(),
            deposit: None,
            place: None,
            since: Moment::now().ok(),
            watch: unwatched(),
        }
    }

    /// Lets a new machine's guest run.
    ///
    /// # Errors
    /// If it does not, or the machine could not be found by its path.
    pub(crate) fn begin(&mut self) -> anyhow::Result<()> {
        self.find_place()?;
        if let Some(place) = &self.place {
            if self.spec.through_kexec && !place.survives_kexec() {
                let at = place.file().path().display();
                bail!(
                    "{at} does not outlive this kernel: --through-kexec takes a file on reserved memory, or a devdax device"
                );
            }
            // What goes through a kexec is what it lies in.
            self.spec.through_kexec = place.survives_kexec();
            place.write(&self.note()?)?;
        }
        self.guest.guest.start()?;
        guest::serves(&*self.guest.guest, &self.machine);
        Ok(())
    }

    /// Gives up what is not needed while the guest runs, if the machine is to be confined.
    ///
    /// # Errors
    /// If the kernel does not take the filter.
    pub(crate) fn confine(&mut self) -> Result<(), ConfineError> {
        confine::filter_calls(self.spec.confine)?;
        self.confined = self.spec.confine;
        Ok(())
    }

    /// How fast the host's TSC runs. It takes no time once this process is 10 ms old.
    pub(crate) fn tsc_rate(&self) -> anyhow::Result<TscRate> {
        let seen = self.since.zip(Moment::now().ok());
        let seen = seen.and_then(|(since, now)| TscRate::between(&since, &now).ok());
        seen.map_or_else(TscRate::measure, Ok).context("cannot tell how fast the host's TSC runs")
    }

    pub(crate) fn obey(mut self) -> anyhow::Result<()> {
        // The bell goes on ringing. That the guest has ended is not enough to stop listening: it may have ended while
        // something else was done.
        let mut heard = false;
        self.tell_keepers();
        self.rest();
        loop {
            let bell = (!heard).then(|| self.guest.guest.health().as_fd());
            let after = match self.clients.wait(bell)? {
                Came::Request(client, request, fd) => self.act(client, request, fd)?,
                Came::Bell => {
                    heard = true;
                    self.ended(&mut heard)?
                }
                // Nobody is left who could end the guest: it must not run for ever.
                Came::Nobody => After::End,
            };
            if matches!(after, After::End) {
                return Ok(());
            }
            self.rest();
        }
    }

    fn act(&mut self, client: ClientId, request: Request, fd: Option<OwnedFd>) -> anyhow::Result<After> {
        debug!(?request, "request");
        if !request.leaves_at_rest() {
            self.rise()?;
        }
        let answer = match request {
            Request::Status => Answer::Status(Box::new(self.status())),
            Request::Check => self.check(client),
            Request::Pause => self.pause(),
            Request::Preserve => return self.preserve(client, fd),
            Request::Park => return self.park(client),
            Request::Seal => Answer::Error("the machine is not preserved".to_owned()),
            // It does already, since something went wrong.
            Request::GoOn => Answer::WentOn { pause_us: None },
            Request::Revive { .. } => {
                Answer::Error("the machine runs: there is nothing to revive".to_owned())
            }
            Request::Recover { .. } => {
                Answer::Error("the machine runs: there is nothing to recover".to_owned())
            }
            Request::Custody => {
                self.give_custody(client);
                return Ok(After::Go);
            }
            Request::Report => Answer::Report(self.crossed.clone().map(Box::new)),
            Request::LastUpdate => Answer::LastUpdate(self.updated.clone().map(Box::new)),
            Request::Resume => self.resume(),
            Request::Wait => {
                self.clients.set_mode(client, Mode::Waits);
                return Ok(After::Go);
            }
            Request::Update(update) => return self.update(client, &update, fd),
            Request::Console => {
                self.attach(client);
                return Ok(After::Go);
            }
            Request::Stop => {
                self.give_up_deposit();
                self.tell_of_end(&Answer::Stopped);
                self.clients.tell(client, &Answer::Stopped);
                return Ok(After::End);
            }
        };
        self.clients.tell(client, &answer);
        Ok(After::Go)
    }

    fn attach(&mut self, client: ClientId) {
        if self.spec.guest == GuestKind::Thread {
            let answer = Answer::Error("a guest that is a thread has no serial line".to_owned());
            return self.clients.tell(client, &answer);
        }
        if let Some(channel) = self.clients.take(client) {
            self.backends.console.attach(channel);
        }
    }

    /// Tells all who wait for the guest's end, and its consoles.
    fn tell_of_end(&self, answer: &Answer) {
        self.backends.console.tell(answer);
        self.clients.tell_waiting(answer);
    }

    fn check(&mut self, client: ClientId) -> Answer {
        let Some(words) = self.words.clone() else {
            return Answer::Error("this guest does not check its memory: pulse alone does".to_owned());
        };
        if self.guest.held {
            return Answer::Error("the guest is paused, and checks nothing: resume it first".to_owned());
        }
        let clients = &self.clients;
        let mut progress = |what: &str, done, of| {
            clients.tell(client, &Answer::Progress { what: what.to_owned(), done, of });
        };
        match measure::check(&mut self.guest, &words, &mut progress) {
            Ok(report) => Answer::Check(report),
            Err(error) => Answer::Error(format!("cannot check the guest: {error:#}")),
        }
    }

    fn pause(&mut self) -> Answer {
        match self.guest.pause() {
            Ok(()) => {
                self.guest.held = true;
                // First: should this process die as soon as the machine is sealed, it is known that it stands still.
                self.tell_of_change();
                self.rest();
                Answer::Paused
            }
            Err(error) => {
                // Of several vCPUs some may have stopped.
                let resumed = self.guest.resume();
                let resumed =
                    resumed.map_or_else(|error| format!("; nor does it run on: {error}"), |()| String::new());
                Answer::Error(format!("cannot pause the guest: {error}{resumed}"))
            }
        }
    }

    fn resume(&mut self) -> Answer {
        if !std::mem::replace(&mut self.guest.held, false) {
            return Answer::Resumed;
        }
        let resumed = self.guest.resume();
        self.tell_of_change();
        match resumed {
            Ok(()) => Answer::Resumed,
            Err(error) => Answer::Error(format!("cannot resume the guest: {error}")),
        }
    }

    /// The guest has ended by itself: does what was asked for that. If it starts again, its end has not been `heard`.
    fn ended(&mut self, heard: &mut bool) -> anyhow::Result<After> {
        let Some(end) = self.guest.guest.health().ended() else { return Ok(After::Go) };
        warn!(%end, "the guest has ended");
        self.rise()?;
        // The others must not run on without one of them.
        self.guest.pause()?;
        let then = match end {
            End::PowerOff => self.spec.on_power_off,
            End::Reset => self.spec.on_reset,
            End::Crashed(_) => self.spec.on_crash,
        };
        match then {
            Then::Keep => Ok(After::Go),
            Then::Stop => {
                self.give_up_deposit();
                self.tell_of_end(&Answer::Ended(end));
                Ok(After::End)
            }
            Then::Restart => {
                if let Err(error) = self.restart() {
                    self.tell_of_end(&Answer::Error(format!("cannot restart the guest: {error:#}")));
                    return Err(error.context("cannot restart the guest"));
                }
                *heard = false;
                Ok(After::Go)
            }
        }
    }

    fn restart(&mut self) -> anyhow::Result<()> {
        self.backends.faults().clear();
        self.guest.guest = first::boot_again(
            &self.spec,
            &self.machine.memories()[0].inode,
            self.machine.identity(),
            &self.backends,
        )?;
        if !self.guest.held {
            self.guest.guest.start()?;
        }
        guest::serves(&*self.guest.guest, &self.machine);
        // The vCPUs are others.
        self.tell_keepers();
        Ok(())
    }

    /// The last pause for an update or a kexec: an update that was rolled back may have had one, too.
    fn last_pause_us(&self) -> Option<f64> {
        let crossed = self.crossed.as_ref().and_then(|report| report.pause_us);
        self.updated.as_ref().and_then(|report| report.pause_us).or(crossed)
    }

    fn status(&self) -> Status {
        let memory = &self.machine.memories()[0];
        let mailboxes = self.words.as_ref().map(|words| words.mailboxes().ok());
        let mailboxes = mailboxes.as_ref().map(Option::as_ref);
        let failure = self.guest.failure();
        Status {
            name: self.spec.name.clone(),
            pid: process::id(),
            state: match (&failure, self.guest.held) {
                (Some(_), _) => GuestState::Ended,
                (None, true) => GuestState::Paused,
                (None, false) => GuestState::Running,
            },
            updates: self.history.updates,
            kexecs: self.history.kexecs,
            age_ms: self.history.age_ns() / 1_000_000,
            identity: self.machine.identity().to_string(),
            guest: self.guest.guest.kind(),
            vcpus: self.machine.vcpus(),
            memory_bytes: memory.inode.size_bytes(),
            store: self.spec.store,
            page_size: memory.page_bytes,
            huge_bytes: memory.inode.mapping().huge_bytes().unwrap_or_default(),
            huge_refused: memory.account.and_then(|account| account.refused),
            ticks: mailboxes.map(|all| all.map_or(0, Mailboxes::ticks)),
            passes: mailboxes.map(|all| all.map_or(0, Mailboxes::passes)),
            errors: mailboxes.map(|all| all.map_or(0, Mailboxes::errors)),
            failure,
            devices: self.guest.guest.devices(&self.spec),
            consoles: self.backends.console.attached(),
            confined: self.confined,
            through_kexec: self.spec.through_kexec,
            epoch: self.machine.ownership().ok().map(OwnershipWord::epoch),
            frozen: memory.inode.is_frozen(),
            last_pause_us: self.last_pause_us(),
            kept: self.place.is_some() || self.deposit.is_some() || self.clients.keepers().next().is_some(),
            recoveries: self.history.recoveries,
            stored: self.deposit.is_some(),
            path: self.place.as_ref().map(|place| place.file().path().to_owned()),
        }
    }
}
