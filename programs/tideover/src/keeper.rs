//! The process that keeps machines ready for a kexec while the host is shut down around it.
//!
//! Sessions of the kernel end with the last process that has them, so it lives until the kernel goes, and the machines' VMMs with it:
//! it takes them into its own cgroup, which shutdown spares. It is told by a hook, the last program that runs on the host, when the
//! guests are to stand still.

use std::fs;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use ::kexec::Index;
use ::vmm::control;
use ::vmm::control::PreservedReport;
use anyhow::Context as _;
use anyhow::bail;
use anyhow::ensure;
use fdpass::Channel;
use fdpass::ConnectError;
use fdpass::Deadline;
use fdpass::Listener;
use liveupdate::filesystems;
use liveupdate::filesystems::Still;
use rustix::io::Errno;
use serde::Deserialize;
use serde::Serialize;
use tracing::debug;
use tracing::error;
use tracing::warn;

use crate::leavers;
use crate::leavers::Goer;
use crate::leavers::Leaver;
use crate::machines;

/// Where the hook finds the keeper. Not in a directory that anyone chooses: the hook knows of none.
const SOCKET: &str = "/run/tideover/kexec.keeper";
/// Where the host's last words go.
const CONSOLE: &str = "/dev/console";
/// Where groups of processes are.
const CGROUPS: &str = "/sys/fs/cgroup";
/// By which systemd knows groups that it does not kill last of all. Which one it sets depends on the kernel.
const SPARED: [&str; 2] = ["user.survive_final_kill_signal", "trusted.survive_final_kill_signal"];

/// How long whoever is connected may take to say what for.
const REQUEST: Duration = Duration::from_secs(5);
/// How long a file system may take to come to rest.
const STILL: Duration = Duration::from_secs(20);
/// How long the hook waits: systemd kills it after 90 seconds.
const SEALED: Duration = Duration::from_secs(85);

/// What a keeper is told to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) machines: Vec<String>,
    /// Those of them that are found by their paths.
    #[serde(default)]
    pub(crate) at_paths: Vec<String>,
    /// How long each machine may take to get ready.
    pub(crate) timeout: Duration,
    /// Agents that are not ready are left.
    #[serde(default)]
    pub(crate) leave_others: bool,
}

/// What a keeper says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Said {
    Progress {
        what: String,
        done: u64,
        of: u64,
    },
    Preserved(Vec<(String, PreservedReport)>),
    /// Nothing can be called off any more.
    ShutsDown,
    /// All guests run on, or it says which do not.
    Failed(String),
}

/// What the hook asks for.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Order {
    Seal,
}

/// What the hook is told: how many machines are sealed, and which are not, and why.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Sealed {
    sealed: usize,
    failed: Vec<String>,
}

/// Keeps the machines that whoever is at the other end of standard input names. Ends only if there is to be no kexec.
pub(crate) fn keep() -> anyhow::Result<()> {
    rustix::thread::set_name(c"tideover-keep").context("cannot take a name")?;
    let channel = Channel::from_stdin().context("a keeper is started with a channel as standard input")?;
    let plan = control::receive(&channel, Deadline::after(REQUEST))?.context("nobody says what to keep")?;
    let keeper = match Keeper::begin(plan, &channel) {
        Ok(keeper) => keeper,
        Err(error) => return control::send(&channel, &Said::Failed(format!("{error:#}"))),
    };
    // Nobody needs to hear it: the host is shut down.
    let _ = control::send(&channel, &Said::ShutsDown);
    drop(channel);
    keeper.wait()
}

/// A process that was taken into another cgroup.
struct Taken {
    pid: u32,
    from: PathBuf,
}

/// The cgroup of this process, which shutdown spares.
struct Scope {
    folder: PathBuf,
    taken: Vec<Taken>,
}

impl Scope {
    fn own() -> anyhow::Result<Self> {
        let folder = cgroup(std::process::id())?;
        let spared =
            SPARED.iter().any(|name| rustix::fs::getxattr(&folder, *name, &mut [0_u8; 8][..]).is_ok());
        ensure!(spared, "systemd would kill what is in {}: it has to be of version 255", folder.display());
        Ok(Self { folder, taken: Vec::new() })
    }

    fn take(&mut self, pid: u32) -> anyhow::Result<()> {
        let from = cgroup(pid)?;
        join(&self.folder, pid)?;
        self.taken.push(Taken { pid, from });
        Ok(())
    }

    /// Gives the processes back to where they came from. Those whose cgroup is gone stay.
    fn give_back(self) {
        for Taken { pid, from } in self.taken {
            if let Err(error) = join(&from, pid) {
                warn!(error = &*error, "a machine's VMM stays in {}", self.folder.display());
            }
        }
        // Who stays is to end with this host as any other does.
        for name in SPARED {
            match rustix::fs::removexattr(&self.folder, name) {
                Ok(()) | Err(Errno::NODATA) => {}
                Err(errno) => warn!(%errno, "shutdown still spares {}", self.folder.display()),
            }
        }
    }
}

/// The folder of a process's cgroup.
fn cgroup(pid: u32) -> anyhow::Result<PathBuf> {
    let path = format!("/proc/{pid}/cgroup");
    let list = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let own = list.lines().find_map(|line| line.strip_prefix("0::"));
    let own = own.context("this host has no cgroups of version 2")?;
    let folder = Path::new(CGROUPS).join(own.trim_start_matches('/'));
    ensure!(folder.join("cgroup.procs").exists(), "there is no cgroup {}", folder.display());
    Ok(folder)
}

fn join(folder: &Path, pid: u32) -> anyhow::Result<()> {
    let procs = folder.join("cgroup.procs");
    fs::write(&procs, pid.to_string())
        .with_context(|| format!("cannot put process {pid} into {}", folder.display()))
}

struct Keeper {
    listener: Listener,
    leavers: Vec<Leaver>,
    index: Option<Index>,
    scope: Scope,
    /// The sessions of tideoverd's agents.
    _agents: Option<tideoverd::Preserved>,
}

impl Keeper {
    /// Has everything made ready, and the host shut down.
    ///
    /// # Errors
    /// Whatever keeps the machines here: then their guests run on.
    fn begin(plan: Plan, channel: &Channel) -> anyhow::Result<Self> {
        let scope = Scope::own()?;
        let listener = listen()?;
        let mut machines = Vec::new();
        for name in &plan.machines {
            let at_path = plan.at_paths.contains(name);
            machines.push(Goer { name: name.clone(), client: machines::connect(name)?, at_path });
        }
        let (device, index) = crate::kexec::list(&machines)?;
        let agents = crate::kexec::preserve_agents(plan.timeout, plan.leave_others)?;
        let progress = |done, of| {
            let said = Said::Progress { what: "preserving".to_owned(), done, of };
            if let Err(error) = control::send(channel, &said) {
                debug!(%error, "nobody hears of the progress");
            }
        };
        let (leavers, failed) = leavers::preserve_all(device.as_ref(), machines, plan.timeout, &progress)?;
        let mut keeper = Self { listener, leavers, index, scope, _agents: agents };
        match failed.map_or_else(|| keeper.shut_down(channel), Err) {
            Ok(()) => Ok(keeper),
            Err(error) => Err(keeper.call_off(error)),
        }
    }

    fn shut_down(&mut self, channel: &Channel) -> anyhow::Result<()> {
        let preserved = self.leavers.iter().map(Leaver::preserved).collect();
        // Who asked and did not wait does not want it any more.
        control::send(channel, &Said::Preserved(preserved)).context("nobody waits for the kexec")?;
        for leaver in &self.leavers {
            let pid = leaver.preserved.pid;
            self.scope.take(pid).with_context(|| format!("the VMM of {}", leaver.name))?;
        }
        self.index.as_mut().map_or(Ok(()), |index| index.note("asked"))?;
        let mut command = Command::new("systemctl");
        let asked = command.args(["--no-ask-password", "kexec"]).stdin(Stdio::null()).output();
        let asked = asked.context("cannot run systemctl")?;
        if !asked.status.success() {
            let why = String::from_utf8_lossy(&asked.stderr).into_owned();
            bail!("systemctl kexec: {}: {}", asked.status, why.trim().escape_debug());
        }
        Ok(())
    }

    fn call_off(self, error: anyhow::Error) -> anyhow::Error {
        let error = leavers::called_off(error, self.leavers);
        self.scope.give_back();
        error
    }

    /// Does what the hook asks for, and lives on until the kernel goes.
    fn wait(mut self) -> ! {
        let mut sealed: Option<(Sealed, Option<Still>)> = None;
        loop {
            let (channel, Order::Seal) = next(&self.listener);
            let (sealed, _) = sealed.get_or_insert_with(|| self.seal());
            if let Err(error) = control::send(&channel, sealed) {
                debug!(%error, "the hook does not wait");
            }
        }
    }

    /// Has all guests stand still, and seals them. What fails keeps nobody else from it: the kernel goes, whatever is said here.
    fn seal(&mut self) -> (Sealed, Option<Still>) {
        let failed = leavers::seal_each(&mut self.leavers);
        let failed: Vec<String> = failed.iter().map(|(name, error)| format!("{name}: {error:#}")).collect();
        // What their disks wrote, where shutdown could not unmount a file system on account of that.
        filesystems::sync();
        let still = Still::hold(STILL).inspect_err(|error| error!(%error, "file systems are not still")).ok();
        if let Err(error) = self.index.as_mut().map_or(Ok(()), |index| index.note("jump")) {
            error!(%error, "it is not noted when this kernel goes");
        }
        (Sealed { sealed: self.leavers.len() - failed.len(), failed }, still)
    }
}

/// There is one keeper at a time.
fn listen() -> anyhow::Result<Listener> {
    let path = Path::new(SOCKET);
    if let Some(folder) = path.parent() {
        machines::make(folder)?;
    }
    Listener::bind(path)
        .with_context(|| format!("cannot listen at {SOCKET}: is there another kexec under way?"))
}

/// The next who asks for something.
fn next(listener: &Listener) -> (Channel, Order) {
    loop {
        let came = listener.accept(Deadline::never()).map_err(anyhow::Error::new).and_then(|channel| {
            channel.require_same_user()?;
            let order = control::receive(&channel, Deadline::after(REQUEST))?;
            Ok((channel, order.context("it asked for nothing")?))
        });
        match came {
            Ok(came) => return came,
            Err(error) => {
                warn!(error = &*error, "somebody came");
                // Should nobody be able to come, this is not to keep the host busy.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// The hook: has the keeper seal its machines, if there is one, waits for that, and says on the host's console how it went: systemd
/// hears nothing of what it runs last.
///
/// # Errors
/// Machines that are not sealed, and so are not all of them after the kexec.
pub(crate) fn seal() -> anyhow::Result<()> {
    let sealed = ask_to_seal();
    let told = match &sealed {
        Ok(None) => return Ok(()),
        Ok(Some(sealed)) => format!("tideover: machines that are sealed: {sealed}\n"),
        Err(error) => format!("tideover: not all machines go through this kexec: {error:#}\n"),
    };
    if let Err(error) =
        OpenOptions::new().write(true).open(CONSOLE).and_then(|mut it| it.write_all(told.as_bytes()))
    {
        debug!(%error, "nobody reads how it went");
    }
    sealed.map(drop)
}

/// Gives how many are sealed; `None` if nobody keeps any.
fn ask_to_seal() -> anyhow::Result<Option<usize>> {
    let channel = match fdpass::connect(Path::new(SOCKET), Deadline::after(REQUEST)) {
        Ok(channel) => channel,
        Err(ConnectError::Absent { .. } | ConnectError::Refused { .. }) => return Ok(None),
        Err(error) => return Err(error).context("cannot reach the keeper"),
    };
    channel.require_same_user().context("the keeper is not to be trusted")?;
    control::send(&channel, &Order::Seal)?;
    let sealed = control::receive(&channel, Deadline::after(SEALED)).context("the keeper does not answer")?;
    let Sealed { sealed, failed } = sealed.context("the keeper is gone")?;
    ensure!(failed.is_empty(), "not sealed, and lost but for their memory: {}", failed.join("; "));
    Ok(Some(sealed))
}
