//! A machine whose host is shut down in its order, by systemd, before its kernel is replaced.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::ensure;

use crate::boot::Life;
use crate::tideover;
use crate::tideover::number;

use super::Then;
use super::kexec;

const MACHINE: &str = "m1";
/// How much the guest has to count between two looks.
const TICKS: u64 = 1000;
/// How this program is told to be what a service runs at its end.
pub(crate) const LINGER: &str = "linger";
/// How long it takes to end, at least.
const END: Duration = Duration::from_secs(3);
/// What it has found, for the next life.
const FOUND: &str = "/var/e2e-found";
const RAN_ON: &str = "the guest ran on while services ended";
/// The kexec was called off.
const CALLED_OFF: i32 = 4;
const RESUME: &str = "tideover-resume.service";

pub(crate) fn run(life: &Life) -> anyhow::Result<Then> {
    match life.number {
        1 => leave(life),
        _ => arrive(),
    }
}

fn leave(life: &Life) -> anyhow::Result<Then> {
    let begun = tideover::json(&["run", MACHINE, "--through-kexec", "--memory", "64MiB"])?;
    ensure!(begun["guest"] == "kvm", "not a guest of KVM: {begun}");
    tideover::wait_ticks(MACHINE, TICKS)?;
    let next = life.next()?;
    let arguments = kexec::orderly(&next)?;
    is_called_off_if_refused(&arguments)?;
    print!("{}", tideover::run(&arguments)?);
    Ok(Then::Orderly)
}

/// Where the service manager refuses, everything is as before.
fn is_called_off_if_refused(arguments: &[&str]) -> anyhow::Result<()> {
    let pid = number(&tideover::status(MACHINE)?, "pid")?;
    let cgroup = cgroup(pid)?;
    let folder = Path::new("/run/e2e");
    let program = folder.join("systemctl");
    fs::create_dir_all(folder)?;
    fs::write(&program, "#!/bin/sh\necho not today >&2\nexit 1\n")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let said = tideover::fails_among(arguments, CALLED_OFF, folder)?;
    ensure!(said.contains("not today"), "it does not say why: {said}");
    ensure!(self::cgroup(pid)? == cgroup, "its VMM went from {cgroup} to {}", self::cgroup(pid)?);
    ensure!(!liveupdate::kexec::is_loaded()?, "a kernel stays loaded");
    tideover::wait_ticks(MACHINE, TICKS)?;
    Ok(())
}

fn cgroup(pid: u64) -> anyhow::Result<String> {
    Ok(fs::read_to_string(format!("/proc/{pid}/cgroup"))?.trim().to_owned())
}

/// What a service runs at its end: takes a while, and looks whether guests run meanwhile.
pub(crate) fn linger() -> ExitCode {
    let before = times();
    thread::sleep(END);
    let after = times();
    let ran = after.iter().filter(|(thread, time)| before.get(*thread).is_some_and(|before| before < time));
    let found = if ran.count() > 0 { RAN_ON } else { "no guest ran while services ended" };
    println!("{found}");
    match fs::write(FOUND, found) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// How long each thread of a VMM had a processor.
fn times() -> BTreeMap<String, u64> {
    let folders = |path: &str| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_vmm = |process: &Path| {
        fs::read_to_string(process.join("comm")).is_ok_and(|name| name.trim() == "tideover-vmm")
    };
    let vmms = folders("/proc").filter(|process| is_vmm(process));
    let threads =
        vmms.flat_map(|process| folders(&process.join("task").to_string_lossy()).collect::<Vec<_>>());
    let time = |thread: &Path| {
        let stat = fs::read_to_string(thread.join("stat")).ok()?;
        let (_, fields) = stat.rsplit_once(')')?;
        // User time is the fourteenth field of all, the third being the first behind the name.
        fields.split_whitespace().nth(11)?.parse().ok()
    };
    threads.filter_map(|thread| Some((thread.to_string_lossy().into_owned(), time(&thread)?))).collect()
}

fn arrive() -> anyhow::Result<Then> {
    let found = fs::read_to_string(FOUND).context("no service ended before the kexec")?;
    ensure!(found == RAN_ON, "{found}");
    println!("{}", tideover::run(&["report", MACHINE])?);
    let report = tideover::json(&["report", MACHINE])?;
    kexec::is_sound(&report[0])?;
    // The guest ran while the host was shut down, so no part of the pause is that.
    let shutdown_us =
        report[0]["shutdown_us"].as_f64().context("it does not say how long the shutdown took")?;
    ensure!(shutdown_us >= END.as_secs_f64() * 1e6, "the guest stood still in the shutdown: {report}");
    tideover::wait_ticks(MACHINE, TICKS)?;
    lives_on_without_the_unit()?;
    tideover::check(MACHINE)?;
    tideover::update(MACHINE, "socket")?;
    tideover::run(&["stop", MACHINE])?;
    Ok(Then::End)
}

/// The unit that had it run on can end.
fn lives_on_without_the_unit() -> anyhow::Result<()> {
    let active = Command::new("systemctl").args(["is-active", RESUME]).output()?;
    ensure!(active.status.success(), "{RESUME}: {}", String::from_utf8_lossy(&active.stdout));
    let stopped = Command::new("systemctl").args(["stop", RESUME]).status()?;
    ensure!(stopped.success(), "cannot stop {RESUME}: {stopped}");
    tideover::wait_ticks(MACHINE, TICKS)?;
    Ok(())
}
