//! A machine as a unit of systemd's: what its ExecStart= and its ExecStop= run.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::ExitCode;
use std::time::Duration;

use ::vmm::control::Answer;
use ::vmm::control::Client;
use ::vmm::control::Request;
use anyhow::Context as _;
use anyhow::bail;
use fdpass::Deadline;
use fdpass::Pidfd;
use fdpass::systemd::Manager;
use fdpass::systemd::Tell;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;
use socket::Program;
use tracing::debug;

use crate::cli;
use crate::cli::ServiceVerb;
use crate::machines;
use crate::machines::NoMachine;
use crate::verbs;

/// How long a VMM may take to leave its machine in the store: it may have much memory to look at.
const PARK: Duration = Duration::from_secs(300);
/// How long it may take to have the machine end.
const STOP: Duration = Duration::from_secs(60);
/// How long its process may take to be gone then.
const END: Duration = Duration::from_secs(300);
/// How long the manager may take to hear.
const HEAR: Duration = Duration::from_secs(5);

pub(crate) fn service(arguments: &cli::Service) -> anyhow::Result<ExitCode> {
    match &arguments.verb {
        ServiceVerb::Run(arguments) => run(arguments),
        ServiceVerb::Stop(arguments) => stop(arguments),
    }
}

fn run(arguments: &cli::ServiceRun) -> anyhow::Result<ExitCode> {
    rustix::thread::set_name(c"tideover-vmm").context("cannot take a name")?;
    // What the store has, or a VMM that is left over, takes this host's memory already.
    let name = &arguments.new.name;
    let is_new = !fdpass::systemd::has_passed() && machines::connect(name).is_err();
    let spec = verbs::spec(&arguments.new, is_new, is_new)?;
    let allowed = arguments.new.allow_program.iter().cloned();
    let programs = [Program::this_path()?].into_iter().chain(allowed).collect();
    ::vmm::serve_unit(&spec, programs)?;
    Ok(ExitCode::SUCCESS)
}

/// What the manager is about to do with the unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    /// Its next process is started when this one has ended.
    Restart,
    /// It ends.
    Stop,
    /// Nothing: its main process has ended by itself.
    None,
}

fn stop(arguments: &cli::ServiceStop) -> anyhow::Result<ExitCode> {
    let name = &arguments.name;
    let job = job()?;
    if job == Job::None {
        return Ok(ExitCode::SUCCESS);
    }
    let client = match machines::connect(name) {
        Ok(client) => client,
        // It was faster.
        Err(error) if error.is::<NoMachine>() => return Ok(ExitCode::SUCCESS),
        Err(error) => return Err(error),
    };
    extend(if job == Job::Restart { PARK } else { STOP } + END + HEAR);
    let main = MainProcess::of_environment();
    match job {
        Job::Restart => park(name, &client.with_patience(PARK))?,
        _ => end(name, &client.with_patience(STOP), main.as_ref())?,
    }
    // The manager would wait for it as well, but not as long: freeing much memory takes its time.
    main.map_or(Ok(ExitCode::SUCCESS), |main| main.await_end().map(|()| ExitCode::SUCCESS))
}

fn park(name: &str, client: &Client) -> anyhow::Result<()> {
    stir_cgroups();
    let parked = verbs::ask(client, &Request::Park);
    stir_cgroups();
    match parked {
        // One that holds it leaves that to the unit's next process.
        Ok(Answer::Sealed(_) | Answer::Held(_)) => Ok(()),
        Ok(other) => bail!("unexpected answer to park: {other:?}"),
        Err(error) => {
            Err(error.context(format!("{name} cannot be left in the store, and its guest runs on")))
        }
    }
}

/// Puts this process where it is: into its own cgroup. The manager does that with the unit's next process, and the guest waits. The kernel
/// has such a change wait for all processors first, some 9 ms, unless there was one just before.
fn stir_cgroups() {
    let list = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = list.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    // The second is where the hierarchies of version 1 are, too.
    for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        let procs = Path::new(root).join(own.trim_start_matches('/')).join("cgroup.procs");
        match fs::write(&procs, std::process::id().to_string()) {
            Ok(()) => return,
            // It takes longer, then.
            Err(error) => debug!(%error, "cannot write {}", procs.display()),
        }
    }
}

fn end(name: &str, client: &Client, main: Option<&MainProcess>) -> anyhow::Result<()> {
    let error = match verbs::ask(client, &Request::Stop) {
        Ok(Answer::Stopped) => return Ok(()),
        Ok(other) => bail!("unexpected answer to stop: {other:?}"),
        Err(error) => error,
    };
    let killed = main.context("its process is not known").and_then(MainProcess::kill);
    killed.with_context(|| format!("{name} does not end ({error:#}), and cannot be killed"))?;
    bail!("{name} was killed, as it did not end: {error:#}")
}

/// The unit's main process, which the manager names.
struct MainProcess {
    number: Pid,
    process: Pidfd,
}

impl MainProcess {
    fn of_environment() -> Option<Self> {
        let number: u32 = std::env::var("MAINPID").ok()?.parse().ok()?;
        let process = Pidfd::of_number(number).ok()?;
        Some(Self { number: Pid::from_raw(i32::try_from(number).ok()?)?, process })
    }

    /// The manager kills no VMM that is to be stopped, since one that could not be left in the store is to run on.
    fn kill(&self) -> anyhow::Result<()> {
        kill_process(self.number, Signal::KILL).context("kill")?;
        self.await_end()
    }

    fn await_end(&self) -> anyhow::Result<()> {
        self.process.wait_exit(Deadline::after(END)).context("the VMM does not end")
    }
}

/// Asks the manager for more time than a stop usually has. Without it this is cut short, and the guest may be killed.
fn extend(span: Duration) {
    let told = Manager::from_environment()
        .map(|manager| manager.map(|manager| manager.tell(&[Tell::Extend(span)], Deadline::after(HEAR))));
    if !matches!(told, Ok(Some(Ok(())))) {
        complain!("tideover: the service manager was not asked for more time: {told:?}");
    }
}

/// The manager's job for the unit that this process is in.
fn job() -> anyhow::Result<Job> {
    let list = fs::read_to_string("/proc/self/cgroup").context("cannot tell which unit this is")?;
    let name = unit(&list).context("this process is in no unit: ExecStop= is to run this")?;
    let mut command = Command::new("systemctl");
    command.args(is_of_user().then_some("--user")).args([
        "list-jobs",
        "--no-legend",
        "--no-pager",
        "--full",
        "--plain",
    ]);
    let output = command.output().context("cannot run systemctl")?;
    if !output.status.success() {
        bail!(
            "systemctl list-jobs does not tell whether this is a restart: {}",
            String::from_utf8_lossy(&output.stderr).trim().escape_debug()
        );
    }
    job_of(&name, &String::from_utf8_lossy(&output.stdout))
}

/// The manager is a user's, not the system's: it listens below the user's directory.
fn is_of_user() -> bool {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let (at, below) = (variable("NOTIFY_SOCKET"), variable("XDG_RUNTIME_DIR"));
    at.zip(below).is_some_and(|(at, below)| at.starts_with(below))
}

/// The unit whose cgroup a process is in that /proc tells this of.
fn unit(cgroups: &str) -> Option<String> {
    let own = |prefix: &str| {
        let path = cgroups.lines().find_map(|line| line.split_once(prefix).map(|(_, path)| path))?;
        let parts: Vec<&str> = Path::new(path).iter().filter_map(|part| part.to_str()).collect();
        parts.iter().rev().find(|part| part.ends_with(".service")).map(|name| (*name).to_owned())
    };
    own("0::").or_else(|| own(":name=systemd:"))
}

/// What `systemctl list-jobs` says of a unit: lines of a number, the unit, the job and its state.
fn job_of(unit: &str, list: &str) -> anyhow::Result<Job> {
    let jobs = list.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, of, job, ..] = fields[..] else { return None };
        (of == unit).then_some(job)
    });
    match jobs.collect::<Vec<_>>()[..] {
        [] => Ok(Job::None),
        ["stop"] => Ok(Job::Stop),
        ["restart" | "try-restart" | "start"] => Ok(Job::Restart),
        [other, ..] => bail!("the unit's job is `{}`: neither a stop nor a restart", other.escape_debug()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_is_the_innermost_service_of_the_cgroup() {
        let found = |cgroups| unit(cgroups).unwrap_or_default();
        let system = "0::/system.slice/system-tideover.slice/tideover@web1.service\n";
        assert_eq!(found(system), "tideover@web1.service");
        assert_eq!(found("0::/system.slice/a.service/.control\n"), "a.service");
        assert_eq!(found("0::/user.slice/user-1.slice/user@1.service/app.slice/vm.service"), "vm.service");
        assert_eq!(found("5:cpu:/\n1:name=systemd:/system.slice/a.service\n0::/user.slice\n"), "a.service");
        assert_eq!(found("0::/user.slice/session-1.scope\n"), "");
        assert_eq!(found(""), "");
    }

    #[test]
    fn a_restart_is_told_from_a_stop_by_the_job() {
        let list = " 7 b.service  stop    waiting\n12 a.service  restart running\n";
        assert_eq!(job_of("a.service", list).unwrap(), Job::Restart);
        assert_eq!(job_of("b.service", list).unwrap(), Job::Stop);
        assert_eq!(job_of("c.service", list).unwrap(), Job::None);
        assert_eq!(job_of("a.service", "No jobs running.\n").unwrap(), Job::None);
        assert!(job_of("a.service", "1 a.service verify-active running").is_err());
    }
}
