//! VMMs that fail: this program, executed by a name that says how. Each is the real one until then.

use std::fs::OpenOptions;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::ExitCode;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use fdpass::Channel;
use machine::update::Step;
use rustix::process::Pid;
use rustix::process::Signal;
use socket::Successor;
use socket::Timeouts;
use vmm::Start;

/// Where they are.
const DIRECTORY: &str = "/run/roles";
/// The program that they are.
const PROGRAM: &str = "/init";

/// What a VMM does at a step.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is killed.
    Dies,
    /// Its holder is killed, the first time; it goes on.
    Orphans,
    /// It stops, in a process that is not its holder's child, and goes on when it is told to.
    Lurks,
}

impl Fault {
    const ALL: [Self; 3] = [Self::Dies, Self::Orphans, Self::Lurks];

    const fn name(self) -> &'static str {
        match self {
            Self::Dies => "dies",
            Self::Orphans => "orphans",
            Self::Lurks => "lurks",
        }
    }
}

/// A VMM that can read the guest's memory and nothing else.
const OLD: &str = "old";
/// A successor in a process of its own: its first word says that it is.
const LURKER: &str = "lurker";

/// The path of a VMM that does so at this step.
pub(crate) fn faulty(fault: Fault, step: Step) -> anyhow::Result<String> {
    role(&format!("{}-{step}", fault.name()))
}

/// The path of a VMM that knows none of this one's own formats.
pub(crate) fn old() -> anyhow::Result<String> {
    role(OLD)
}

fn role(name: &str) -> anyhow::Result<String> {
    std::fs::create_dir_all(DIRECTORY)?;
    let path = Path::new(DIRECTORY).join(name);
    if !path.exists() {
        symlink(PROGRAM, &path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    path.to_str().map(str::to_owned).context("a path that is not UTF-8")
}

/// Is what this process was executed as, if that is a role.
pub(crate) fn play() -> Option<ExitCode> {
    let mut words = std::env::args();
    let path = PathBuf::from(words.next()?);
    let name = path.file_name()?.to_str()?;
    if name == OLD {
        return Some(end(greet_as_an_old_one()));
    }
    let (fault, step) = name.split_once('-')?;
    let fault = Fault::ALL.into_iter().find(|known| known.name() == fault)?;
    let step = Step::named(step)?;
    if fault == Fault::Lurks && words.next().as_deref() != Some(LURKER) {
        return Some(end(start_lurker(&path)));
    }
    Some(end(succeed(fault, step, &path)))
}

fn end(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn greet_as_an_old_one() -> anyhow::Result<()> {
    let successor = Successor::greet(Channel::from_stdin()?, &[], Timeouts::default())?;
    drop(successor);
    anyhow::bail!("it was offered what it cannot read");
}

/// Its standard input goes with it; this process waits until it is killed.
fn start_lurker(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt as _;
    Command::new("/proc/self/exe").arg0(path).arg(LURKER).stdin(Stdio::inherit()).spawn()?;
    loop {
        thread::park();
    }
}

fn succeed(fault: Fault, at: Step, path: &Path) -> anyhow::Result<()> {
    let mut at = Some(at);
    // A step of both sides, before the first one of this.
    if at == Some(Step::Connected) {
        at = None;
        act(fault, path)?;
    }
    let mut observer = |step: Step| {
        if at.take_if(|at| *at == step).is_some()
            && let Err(error) = act(fault, path)
        {
            eprintln!("{error:#}");
        }
    };
    vmm::succeed(&Start::Started, Timeouts::default(), &mut observer)
}

fn act(fault: Fault, path: &Path) -> anyhow::Result<()> {
    let this = rustix::process::getpid();
    match fault {
        Fault::Dies => rustix::process::kill_process(this, Signal::KILL)?,
        Fault::Lurks => rustix::process::kill_process(this, Signal::STOP)?,
        Fault::Orphans => {
            let first = OpenOptions::new().write(true).create_new(true).open(path.with_extension("once"));
            let holder = rustix::process::getppid().filter(|holder| *holder != Pid::INIT);
            if let (Ok(_), Some(holder)) = (first, holder) {
                rustix::process::kill_process(holder, Signal::KILL)?;
                while rustix::process::getppid() == Some(holder) {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }
    Ok(())
}
