//! VMMs whose cgroup runs out of memory: their machines are kept whole, or their memory is given back, as was asked for.

use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::ensure;
use rustix::process::WaitOptions;
use serde_json::Value;
use serde_json::json;
use vmm::Picture;

use crate::boot::Life;
use crate::daemon;
use crate::daemon::Daemon;
use crate::tideover;
use crate::tideover::PATIENCE;
use crate::tideover::number;

use super::Then;

const GROUPS: &str = "/sys/fs/cgroup";
/// How much a guest has to count between two looks.
const TICKS: u64 = 200;
const MEMORY: &str = "32MiB";
/// Less than a VMM with so much memory needs, and more.
const TOO_LITTLE: u64 = 16 << 20;
const ENOUGH: u64 = 256 << 20;
/// What is left where nothing of a machine is: less than a quarter of its memory.
const NOTHING: u64 = 8 << 20;
/// How this program is told to take more and more memory.
pub(crate) const HOG: &str = "hog";
/// How long after the end of another process tideoverd takes a VMM's for one of the same kind.
const END: Duration = Duration::from_secs(30);

pub(crate) fn run(_: &Life) -> anyhow::Result<Then> {
    let _daemon = Daemon::start()?;
    fs::write(format!("{GROUPS}/cgroup.subtree_control"), "+memory")?;
    is_kept_whole()?;
    is_given_back()?;
    is_no_victim()?;
    Ok(Then::End)
}

/// Takes memory until it is ended.
pub(crate) fn hog() -> ExitCode {
    if fs::write("/proc/self/oom_score_adj", "1000").is_err() {
        return ExitCode::FAILURE;
    }
    let mut taken = Vec::new();
    loop {
        taken.push(vec![1_u8; 1 << 20]);
        std::hint::black_box(&taken);
    }
}

/// What is started meanwhile is in this cgroup from its beginning, as all its memory is.
fn within<T>(group: &str, start: impl FnOnce() -> T) -> anyhow::Result<T> {
    fs::write(format!("{GROUPS}/{group}/cgroup.procs"), "0")?;
    let started = start();
    fs::write(format!("{GROUPS}/cgroup.procs"), "0")?;
    Ok(started)
}

/// A machine in a cgroup of its own.
struct Machine {
    name: &'static str,
    pid: u64,
}

impl Machine {
    fn run(name: &'static str, on_oom: &str) -> anyhow::Result<Self> {
        fs::create_dir(format!("{GROUPS}/{name}"))?;
        let run = || tideover::json(&["run", name, "--memory", MEMORY, "--on-oom", on_oom]);
        let begun = within(name, run)??;
        ensure!(begun["guest"] == "kvm" && begun["kept"] == true, "{begun}");
        tideover::wait_ticks(name, TICKS)?;
        let machine = Self { name, pid: number(&begun, "pid")? };
        let members = fs::read_to_string(machine.file("cgroup.procs"))?;
        ensure!(members.trim() == machine.pid.to_string(), "the cgroup has {members:?}");
        ensure!(machine.charged()? > 32 << 20, "{} bytes are charged", machine.charged()?);
        Ok(machine)
    }

    fn file(&self, name: &str) -> PathBuf {
        [GROUPS, self.name, name].into_iter().collect()
    }

    fn limit(&self, bytes: u64) -> anyhow::Result<()> {
        fs::write(self.file("memory.max"), bytes.to_string()).context("cannot limit a cgroup")
    }

    fn charged(&self) -> anyhow::Result<u64> {
        Ok(fs::read_to_string(self.file("memory.current"))?.trim().parse()?)
    }

    fn kills(&self) -> anyhow::Result<u64> {
        let events = fs::read_to_string(self.file("memory.events.local"))?;
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(kills.context("kills are not counted")?.trim().parse()?)
    }

    /// Has the kernel end its VMM for want of memory.
    fn runs_out(&self) -> anyhow::Result<()> {
        self.limit(TOO_LITTLE)?;
        tideover::wait_for("an end for want of memory", PATIENCE, || {
            Ok((self.kills()? > 0 && !tideover::is_alive(self.pid)).then_some(()))
        })
    }

    /// As it is listed.
    fn listed(&self) -> anyhow::Result<Option<Value>> {
        let all = tideover::json(&["ls"])?;
        Ok(all.as_array().and_then(|all| all.iter().find(|one| one["name"] == self.name)).cloned())
    }

    fn await_held(&self) -> anyhow::Result<()> {
        tideover::wait_for("a machine that is held", PATIENCE, || {
            Ok(self.listed()?.filter(|machine| machine["state"] == "held").map(drop))
        })
    }

    /// Every word of its memory is what it was.
    fn is_whole(&self) -> anyhow::Result<()> {
        let (custody, fds, _connection) = tideover::connect(self.name)?.ask_custody()?;
        let check = Picture::of(&custody, fds)?.check()?;
        let lost = check.pages_lost + check.guest_errors + check.registers_lost + check.ticks_miscounted;
        ensure!(lost == 0 && check.pages_checked > 1000, "{}: {check:?}", self.name);
        println!("{}: {} pages are whole", self.name, check.pages_checked);
        Ok(())
    }
}

fn is_kept_whole() -> anyhow::Result<()> {
    let machine = Machine::run("keep", "keep")?;
    machine.runs_out()?;
    machine.await_held()?;
    machine.is_whole()?;
    // In its cgroup, which has room again.
    machine.limit(ENOUGH)?;
    let report = tideover::json(&["recover", machine.name, "--else", "boot"])?;
    ensure!(report["how"] == "booted", "{report}");
    let members = fs::read_to_string(machine.file("cgroup.procs"))?;
    let pid = number(&report, "pid")?;
    ensure!(members.lines().any(|member| member == pid.to_string()), "{members:?} without {pid}");
    let adjust = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?;
    ensure!(adjust.trim() == "0", "its VMM is spared: {adjust}");
    tideover::wait_ticks(machine.name, TICKS)?;
    tideover::check(machine.name)?;
    tideover::run(&["stop", machine.name])?;
    Ok(())
}

fn is_given_back() -> anyhow::Result<()> {
    let machine = Machine::run("drop", "drop")?;
    machine.runs_out()?;
    tideover::wait_for("memory that is given back", PATIENCE, || {
        Ok((machine.charged()? < NOTHING).then_some(()))
    })?;
    daemon::await_status("no machine", |status| status["kept"] == json!([]) && status["alone"] == json!([]))?;
    // Its socket is all that is left of it.
    ensure!(machine.listed()?.is_none_or(|listed| listed["state"] == "dead"), "{:?}", machine.listed()?);
    machine.limit(ENOUGH)?;
    // Its name is free, and another one is another machine.
    tideover::run(&["run", machine.name, "--memory", "8MiB"])?;
    tideover::run(&["stop", machine.name])?;
    Ok(())
}

/// Another process of its cgroup was ended for want of memory, and its VMM a while later for another reason.
fn is_no_victim() -> anyhow::Result<()> {
    let machine = Machine::run("beside", "drop")?;
    machine.limit(machine.charged()? + (16 << 20))?;
    let mut hog = within(machine.name, || Command::new("/proc/self/exe").arg(HOG).spawn())??;
    ended(&mut hog)?;
    ensure!(machine.kills()? > 0, "it was not for want of memory");
    thread::sleep(END + Duration::from_secs(5));
    tideover::kill(machine.pid)?;
    machine.await_held()?;
    machine.is_whole()?;
    tideover::run(&["stop", machine.name])?;
    Ok(())
}

fn ended(child: &mut Child) -> anyhow::Result<()> {
    let pid = rustix::process::Pid::from_child(child);
    tideover::wait_for("the end of a hog", PATIENCE, || {
        Ok(rustix::process::waitpid(Some(pid), WaitOptions::NOHANG)?.map(drop))
    })
}
