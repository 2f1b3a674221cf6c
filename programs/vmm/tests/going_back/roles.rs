//! What this program is when a test starts it: the first VMM of a machine, one that hands it over and does nothing
//! else, or a successor. Each may come to grief where its [`Plan`] says.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fdpass::Channel;
use fdpass::Deadline;
use fdpass::Listener;
use machine::Machine;
use machine::MemoryName;
use machine::MemorySpec;
use machine::SessionName;
use machine::Spec;
use machine::StateName;
use machine::update::Step;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use socket::Offer;
use socket::Outcome;
use socket::Successor;
use socket::Timeouts;
use tideover_vmm::Backends;
use tideover_vmm::Health;
use tideover_vmm::KvmGuest;
use tideover_vmm::NewVm;
use tideover_vmm::Served;
use tideover_vmm::Setup;
use tideover_vmm::Start;
use tideover_vmm::ThreadGuest;
use tideover_vmm::control::GuestKind;
use tideover_vmm::control::MachineSpec;

use crate::fake;

/// Names the folder that a test and its processes share. It is the processes' environment, not the test's.
pub(crate) const FOLDER: &str = "TIDEOVER_GOING_BACK";

/// What a process that a test starts is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// A machine's first VMM, which then serves.
    First,
    /// A machine's first VMM, which hands the machine over to who comes to [`First::socket`], and serves if that fails.
    Alone,
    /// A VMM that takes over from one that listens.
    Successor,
}

impl Role {
    /// Its arguments. A VMM starts its successor with the same first ones.
    pub(crate) fn arguments(self, socket: &Path) -> Vec<&OsStr> {
        let words: &[&str] = match self {
            Self::First => &["vmm", "first"],
            Self::Alone => &["vmm", "alone"],
            Self::Successor => &["vmm", "succeed"],
        };
        let words = words.iter().map(OsStr::new);
        words.chain((self == Self::Successor).then_some(socket.as_os_str())).collect()
    }
}

/// Where a process is in an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// It has done nothing yet.
    Started,
    /// It has said hello.
    Greeted,
    /// It has reached a step.
    At(Step),
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Greeted => "greeted",
            Self::At(step) => step.name(),
        }
    }
}

/// What happens to a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Fault {
    /// It is killed.
    Killed,
    /// It is stopped, until somebody lets it go on.
    Stopped,
    /// It ends.
    Ends(i32),
    /// It says something that is no message, and stays.
    Babbles,
    /// It goes on, and another process is killed.
    Kills(u32),
}

/// How a process fares.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    fault: Option<(String, Fault)>,
    /// How long it waits for the other side, in milliseconds.
    patience_ms: Option<u64>,
}

impl Plan {
    /// All goes well.
    pub(crate) fn well() -> Self {
        Self::default()
    }

    pub(crate) fn at(place: Place, fault: Fault) -> Self {
        Self { fault: Some((place.name().to_owned(), fault)), patience_ms: None }
    }

    pub(crate) fn with_patience(self, patience: Duration) -> Self {
        Self { patience_ms: u64::try_from(patience.as_millis()).ok(), ..self }
    }

    fn timeouts(&self) -> Timeouts {
        let patience = Duration::from_millis(self.patience_ms.unwrap_or(20_000));
        Timeouts { prepare: patience, hand_over: patience }
    }

    /// Does what is planned for this place.
    fn pass(&self, place: Place) {
        let Some((_, fault)) = self.fault.as_ref().filter(|(planned, _)| *planned == place.name()) else {
            return;
        };
        let signal =
            |pid, signal| kill_process(pid, signal).expect("a process of this test can be signalled");
        match fault {
            Fault::Killed => signal(rustix::process::getpid(), Signal::KILL),
            Fault::Stopped => signal(rustix::process::getpid(), Signal::STOP),
            Fault::Kills(pid) => signal(pid_of(*pid), Signal::KILL),
            Fault::Ends(code) => std::process::exit(*code),
            Fault::Babbles => {
                let channel = Channel::from_stdin().expect("a successor is started with a channel");
                channel.send(b"Segmentation fault\x1b[1m", &[], Deadline::never()).expect("it is connected");
                thread::sleep(Duration::from_secs(60));
            }
        }
    }
}

/// A process id as the kernel's calls take it.
pub(crate) fn pid_of(pid: u32) -> Pid {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.expect("process ids are positive and fit")
}

/// How a program fares that a VMM executes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Executed {
    /// All goes well.
    Well,
    /// It goes as planned.
    Fares(Plan),
    /// It finds at once that it cannot run the machine.
    FailsAtOnce,
    /// It finds so after it has claimed the machine.
    FailsWhenClaimed,
}

/// What the first VMM of a test is told.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct First {
    pub(crate) spec: MachineSpec,
    pub(crate) programs: Vec<PathBuf>,
    /// For [`Role::Alone`]: how it fares.
    pub(crate) plan: Plan,
    /// For [`Role::Alone`]: where it listens.
    pub(crate) socket: PathBuf,
}

pub(crate) fn write<T: Serialize>(folder: &Path, name: &str, value: &T) {
    let text = serde_json::to_vec(value).expect("it can be written as JSON");
    // In one step: a process may read it at any time.
    let new = folder.join(format!("{name}.new"));
    fs::write(&new, text).and_then(|()| fs::rename(&new, folder.join(name))).expect("the folder is ours");
}

fn read<T: DeserializeOwned>(folder: &Path, name: &str) -> anyhow::Result<T> {
    Ok(serde_json::from_slice(&fs::read(folder.join(name))?)?)
}

/// Plays the role that `arguments` name, in this folder.
pub(crate) fn play(folder: &Path, arguments: &[String]) -> ExitCode {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let played = match arguments[..] {
        ["vmm", "first"] => read::<First>(folder, "first.json")
            .and_then(|told| tideover_vmm::run(&told.spec, told.programs, false)),
        ["vmm", "alone"] => alone(folder),
        ["vmm", "succeed"] => succeed(folder, &Start::Started),
        ["vmm", "succeed", "--handoff", number] => go_on(folder, number),
        ["vmm", "succeed", path] => succeed(folder, &Start::Connect(path.into())),
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

fn succeed(folder: &Path, start: &Start) -> anyhow::Result<()> {
    let plan: Plan = read(folder, "plan.json")?;
    plan.pass(Place::Started);
    if plan.fault.as_ref().is_some_and(|(place, _)| place == Place::Greeted.name()) {
        return greet_only(start, &plan);
    }
    tideover_vmm::succeed(start, plan.timeouts(), &mut |step: Step| plan.pass(Place::At(step)))
}

/// Takes the machine over from the program before. One that is to come to grief does so once: the program before is this
/// one, too.
fn go_on(folder: &Path, handoff: &str) -> anyhow::Result<()> {
    let executed: Executed = read(folder, "executed.json")?;
    let handoff = handoff.parse()?;
    write(folder, "executed.json", &Executed::Well);
    if let Executed::Well | Executed::Fares(_) = executed {
        let plan = if let Executed::Fares(plan) = executed { plan } else { Plan::well() };
        plan.pass(Place::Started);
        let mut observer = |step: Step| plan.pass(Place::At(step));
        return tideover_vmm::succeed(&Start::Executed(handoff), Timeouts::default(), &mut observer);
    }
    let nothing = &mut |_: Step| ();
    let arguments = ["vmm", "succeed", "--handoff"].map(str::to_owned);
    let life = exec::Life::begin(&handoff)?;
    let handed = match executed {
        Executed::FailsWhenClaimed => {
            let formats: Vec<&str> = tideover_vmm::formats().collect();
            let successor = Successor::greet(life.channel, &formats, Timeouts::default())?;
            Some(successor.attach(nothing)?.claim(nothing)?)
        }
        _ => None,
    };
    let error =
        life.way_back.expect("it was not executed to go back").take("it was told to fail", &arguments);
    drop(handed);
    Err(error.into())
}

/// Says hello by hand, which the library does in one with what follows.
fn greet_only(start: &Start, plan: &Plan) -> anyhow::Result<()> {
    let channel = match start {
        Start::Started => Channel::from_stdin()?,
        Start::Connect(path) => fdpass::connect(path, Deadline::after(plan.timeouts().prepare))?,
        Start::Executed(_) => anyhow::bail!("there is nobody to greet"),
    };
    channel.send(&fake::bytes(&fake::hello()), &[], Deadline::after(plan.timeouts().prepare))?;
    plan.pass(Place::Greeted);
    // Woken again, it hears that nothing is to be had any more.
    let fake = fake::Fake::new(channel);
    let offer = fake.hear()?;
    anyhow::ensure!(offer["message"] == "offer", "not an offer: {offer}");
    fake.say(&json!({ "message": "accept" }))?;
    let memory = fake.hear()?;
    anyhow::bail!("the machine was given to one that is late: {memory}")
}

fn alone(folder: &Path) -> anyhow::Result<()> {
    let told: First = read(folder, "first.json")?;
    let control = Channel::from_stdin()?;
    let vcpus = told.spec.vcpus;
    let of_each = |name: &str| (0..vcpus).map(|vcpu| format!("{name}{vcpu}")).collect();
    let states: Vec<String> = match told.spec.guest {
        GuestKind::Kvm => [vec!["vm".to_owned(), "devices".to_owned()], of_each("vcpu")].concat(),
        GuestKind::Thread => of_each("walk"),
    };
    let spec = Spec {
        name: SessionName::new(told.spec.name.as_bytes())?,
        vcpus: vcpus.into(),
        memories: vec![MemorySpec::new(MemoryName::literal("ram"), told.spec.memory_bytes)],
        states: states.iter().map(|name| StateName::new(name.as_bytes())).collect::<Result<_, _>>()?,
    };
    let machine = Machine::create(&spec, &mut |_, _| {})?;
    let memory = &machine.memories()[0].inode;
    let backends = Arc::new(Backends::open(&told.spec)?);
    let (identity, health) = (machine.identity(), Health::well()?);
    match told.spec.guest {
        GuestKind::Kvm => {
            let setup = Setup { spec: &told.spec, memory, identity, backends: &backends, health };
            let guest = KvmGuest::first(NewVm::make()?, &setup)?;
            hand_over(&told, machine, guest, backends, control)
        }
        GuestKind::Thread => {
            let guest = ThreadGuest::first(memory, vcpus, health)?;
            hand_over(&told, machine, guest, backends, control)
        }
    }
}

fn hand_over<G: Served + 'static>(
    told: &First,
    mut machine: Machine,
    mut guest: G,
    backends: Arc<Backends>,
    control: Channel,
) -> anyhow::Result<()> {
    guest.start()?;
    let listener = Listener::bind(&told.socket)?;
    let channel = listener.accept(Deadline::after(Duration::from_secs(20)))?;
    let offer = Offer {
        formats: guest.formats(),
        fds: vec![(machine::FdName::literal("client0"), control.as_fd())],
        vmm: json!({
            "spec": told.spec,
            "before_pause": guest.before_pause(),
            "populate": true,
            "probe": false,
            "held": false,
            "clients": ["asks"],
            "programs": told.programs,
            "history": { "made_ns": 0, "updates": 0 },
        }),
        timeouts: told.plan.timeouts(),
    };
    let mut observer = |step: Step| told.plan.pass(Place::At(step));
    let outcome = socket::hand_over(&mut machine, &mut guest, &channel, &offer, &mut observer)?;
    drop(offer);
    match outcome {
        Outcome::Updated(_) => Ok(()),
        Outcome::RolledBack { reason, .. } => {
            eprintln!("{} rolled back: {:#}", std::process::id(), anyhow::Error::new(reason));
            let spec = told.spec.clone();
            tideover_vmm::serve(spec, machine, Box::new(guest), backends, control, told.programs.clone())
        }
    }
}
