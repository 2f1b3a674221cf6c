//! tideoverd as a service: nothing is lost whatever is done to it, and what limits it has limits no machine.

use std::fs;
use std::os::fd::OwnedFd;
use std::process::Command;

use anyhow::Context as _;
use anyhow::ensure;
use serde_json::Value;
use serde_json::json;
use vmm::Picture;

use crate::boot::Life;
use crate::daemon;
use crate::daemon::Peer;
use crate::tideover;
use crate::tideover::PATIENCE;
use crate::tideover::number;

use super::Then;

const UNIT: &str = "tideoverd";
/// How much a guest has to count between two looks.
const TICKS: u64 = 200;
/// How much memory a VMM may lock.
const ANY: &str = "unlimited";

pub(crate) fn run(_: &Life) -> anyhow::Result<Then> {
    is_active()?;
    for name in ["held", "runs"] {
        let begun = tideover::json(&["run", name, "--memory", "16MiB"])?;
        ensure!(begun["guest"] == "kvm" && begun["kept"] == true, "{begun}");
        tideover::wait_ticks(name, TICKS)?;
    }
    tideover::kill(pid_of("held")?)?;
    let holder = await_held("held", 0)?;
    is_restarted()?;
    let holder = is_followed(holder)?;
    runs_without_limits(holder)?;
    outlives_the_daemon()?;
    has_the_device()?;
    show_exposure();
    for name in ["held", "runs"] {
        tideover::run(&["stop", name])?;
    }
    await_kept(&[], &[])?;
    Ok(Then::End)
}

/// If it is not, what its service manager and itself say of it is told.
fn is_active() -> anyhow::Result<()> {
    systemctl(&["is-active", UNIT]).map(drop).inspect_err(|_| {
        for how in [
            &["systemctl", "status", "--no-pager", UNIT][..],
            &["journalctl", "--no-pager", "-b", "-o", "cat"],
        ] {
            let said = Command::new(how[0]).args(&how[1..]).output().map(|said| said.stdout);
            let said = String::from_utf8_lossy(&said.unwrap_or_default()).into_owned();
            said.lines()
                .filter(|line| line.contains("tideover"))
                .take(40)
                .for_each(|line| println!("{line}"));
        }
    })
}

fn systemctl(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("systemctl").args(arguments).output().context("cannot run systemctl")?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let complained = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(output.status.success(), "systemctl {}: {said}{complained}", arguments.join(" "));
    Ok(said)
}

fn main_pid() -> anyhow::Result<u64> {
    let pid = systemctl(&["show", "--value", "--property=MainPID", UNIT])?;
    pid.parse().with_context(|| format!("its process is {pid}"))
}

fn pid_of(name: &str) -> anyhow::Result<u64> {
    number(&tideover::status(name)?, "pid")
}

/// Waits until it has exactly these, and those are held of them.
fn await_kept(names: &[&str], held: &[&str]) -> anyhow::Result<Value> {
    let is_so = |status: &Value| status["kept"] == json!(names) && status["alone"] == json!([]);
    let status = tideover::wait_for("tideoverd", PATIENCE, || Ok(Peer::connect().ok()))
        .and_then(|_| daemon::await_status("machines that are kept", is_so))?;
    held.iter().try_for_each(|name| is_whole(name))?;
    Ok(status)
}

/// Waits until another process than this one holds it, and gives that.
fn await_held(name: &str, other: u64) -> anyhow::Result<u64> {
    tideover::wait_for("a machine that is held", PATIENCE, || {
        let all = tideover::json(&["ls"])?;
        let machine = all.as_array().and_then(|all| all.iter().find(|one| one["name"] == name));
        let Some(machine) = machine.filter(|machine| machine["state"] == "held") else { return Ok(None) };
        Ok(Some(number(machine, "pid")?).filter(|pid| *pid != other))
    })
}

/// Every word of its memory is what it was.
fn is_whole(name: &str) -> anyhow::Result<()> {
    let (custody, fds, _connection) = tideover::connect(name)?.ask_custody()?;
    let check = Picture::of(&custody, fds)?.check()?;
    let lost = check.pages_lost + check.guest_errors + check.registers_lost + check.ticks_miscounted;
    ensure!(lost == 0 && check.pages_checked > 1000, "{name}: {check:?}");
    Ok(())
}

/// By its service manager as asked, and after it was killed, with a machine that is held and one that runs.
fn is_restarted() -> anyhow::Result<()> {
    let all = ["held", "runs"];
    await_kept(&all, &["held"])?;
    for how in ["restart", "kill"] {
        let before = main_pid()?;
        match how {
            "restart" => drop(systemctl(&["restart", UNIT])?),
            _ => tideover::kill(before)?,
        }
        tideover::wait_for("another tideoverd", PATIENCE, || {
            let now = main_pid()?;
            Ok((now != 0 && now != before).then_some(()))
        })?;
        await_kept(&all, &["held"])?;
        tideover::wait_ticks("runs", TICKS)?;
        println!("tideoverd after a {how}: all machines are kept");
    }
    Ok(())
}

/// A holder is in a unit of its own, and one that dies is followed by another one.
fn is_followed(holder: u64) -> anyhow::Result<u64> {
    let cgroup = fs::read_to_string(format!("/proc/{holder}/cgroup"))?;
    ensure!(cgroup.contains("tideover-hold@"), "the holder is in {cgroup}");
    tideover::kill(holder)?;
    let next = await_held("held", holder)?;
    await_kept(&["held", "runs"], &["held"])?;
    Ok(next)
}

/// What /proc says of a process's limits.
fn limits(pid: u64) -> anyhow::Result<[String; 3]> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(|value| value.trim().to_owned()).with_context(|| format!("no {name}"))
    };
    Ok([value("NoNewPrivs")?, value("Seccomp")?, value("CapBnd")?])
}

/// The daemon is limited; the VMM that runs the machine now is as one that was started by hand, and stays when its holder has ended.
fn runs_without_limits(holder: u64) -> anyhow::Result<()> {
    let none = "0000000000000000";
    let daemon = limits(main_pid()?)?;
    ensure!(daemon == ["1", "2", none], "tideoverd is limited by {daemon:?} alone");
    let report = tideover::json(&["recover", "held", "--else", "boot"])?;
    ensure!(report["how"] == "booted", "{report}");
    tideover::wait_for("the holder's end", PATIENCE, || Ok((!tideover::is_alive(holder)).then_some(())))?;
    let (first, other) = (pid_of("held")?, pid_of("runs")?);
    ensure!(
        limits(first)? == limits(other)?,
        "{:?}, and {:?} without tideoverd",
        limits(first)?,
        limits(other)?
    );
    let adjust = fs::read_to_string(format!("/proc/{first}/oom_score_adj"))?;
    ensure!(adjust.trim() == "0", "its VMM is spared: {adjust}");
    let locked = fs::read_to_string(format!("/proc/{first}/limits"))?;
    ensure!(
        locked.lines().any(|line| line.starts_with("Max locked memory") && line.contains(ANY)),
        "{locked}"
    );
    let root = |pid| fs::read_link(format!("/proc/{pid}/ns/mnt"));
    ensure!(root(first)? == root(other)?, "its VMM sees other file systems");
    tideover::wait_ticks("held", TICKS)?;
    tideover::check("held")?;
    tideover::update("held", "socket")?;
    Ok(())
}

/// Holders and VMMs live on while there is none, and it finds them when it is back.
fn outlives_the_daemon() -> anyhow::Result<()> {
    await_kept(&["held", "runs"], &[])?;
    tideover::run(&["pause", "held"])?;
    tideover::kill(pid_of("held")?)?;
    await_held("held", 0)?;
    systemctl(&["stop", UNIT])?;
    tideover::wait_ticks("runs", TICKS)?;
    is_whole("held")?;
    tideover::run(&["recover", "held"])?;
    tideover::run(&["resume", "held"])?;
    tideover::wait_ticks("held", TICKS)?;
    systemctl(&["start", UNIT])?;
    await_kept(&["held", "runs"], &[])?;
    Ok(())
}

/// Its limits leave it what agents need.
fn has_the_device() -> anyhow::Result<()> {
    let hear = |peer: &mut Peer, event: &str| -> anyhow::Result<Vec<OwnedFd>> {
        let (heard, fds) = peer.hear(PATIENCE)?;
        ensure!(heard["event"] == event, "{heard} instead of {event}");
        Ok(fds)
    };
    let (mut agent, mut operator) = (Peer::connect()?, Peer::connect()?);
    agent.say(&json!({ "cmd": "SUBSCRIBE", "id": "a" }))?;
    agent.say(&json!({ "cmd": "STATUS" }))?;
    hear(&mut agent, "STATUS")?;
    operator.say(&json!({ "cmd": "PRESERVE", "timeout_ms": 60_000 }))?;
    let session = hear(&mut agent, "START_PRESERVATION")?;
    ensure!(session.len() == 1, "no session came");
    agent.say(&json!({ "cmd": "READY" }))?;
    ensure!(hear(&mut operator, "PRESERVED")?.len() == 1, "the operator has no session");
    operator.say(&json!({ "cmd": "DEVICE" }))?;
    let device = hear(&mut operator, "DEVICE")?.pop().context("no device came")?;
    liveupdate::Device::from_fd(device)?;
    drop(operator);
    hear(&mut agent, "CANCEL_PRESERVATION")?;
    Ok(())
}

/// For who reads it.
fn show_exposure() {
    let shown = Command::new("systemd-analyze").args(["security", "--no-pager", UNIT]).output();
    let Ok(shown) = shown else { return };
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    text.lines().rev().take(3).for_each(|line| println!("{line}"));
}
