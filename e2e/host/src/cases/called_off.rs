//! A kexec that does not come about: every guest runs on, and nothing is left behind.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::bail;
use anyhow::ensure;
use liveupdate::Device;
use liveupdate::Name;
use rustix::process::Signal;

use crate::boot::Life;
use crate::boot::Next;
use crate::tideover;
use crate::tideover::PATIENCE;
use crate::tideover::Started;
use crate::tideover::number;

use super::Then;

const MACHINES: [&str; 2] = ["a", "b"];
/// How much a guest has to count between two looks: they share two processors that are emulated.
const TICKS: u64 = 10;
/// The exit code of what was refused, and of what was called off.
const REFUSED: i32 = 1;
const CALLED_OFF: i32 = 4;
/// How often to try what comes too late at times.
const TRIES: u32 = 10;
/// Rehearsals in a row.
const REHEARSALS: u32 = 50;

pub(crate) fn run(life: &Life) -> anyhow::Result<Then> {
    let next = life.next()?;
    for name in MACHINES {
        tideover::run(&["run", name, "--memory", "16MiB", "--through-kexec"])?;
    }
    is_as_before()?;
    refused(&next)?;
    one_cannot_go(&next)?;
    no_kernel_to_jump_to(&next)?;
    one_does_not_answer(&next)?;
    one_is_killed(&next)?;
    command_is_killed(&next)?;
    rehearsed()?;
    for name in MACHINES {
        tideover::check(name)?;
        tideover::update(name, "socket")?;
        tideover::run(&["stop", name])?;
    }
    Ok(Then::End)
}

/// The verb that takes these machines along.
fn kexec(next: &Next) -> anyhow::Result<Vec<&str>> {
    let path = |path: &'static Path| path.to_str().context("a path that is not UTF-8");
    Ok(vec![
        "kexec",
        "--kernel",
        path(next.kernel)?,
        "--initrd",
        path(next.initrd.context("no initial file system")?)?,
        "--cmdline",
        &next.command_line,
        "--now",
        // What is wrong with a machine is to be found by the kernel.
        "--unchecked",
    ])
}

/// All guests count on and have lost nothing, no kernel is loaded, and the names of all sessions are free.
fn is_as_before() -> anyhow::Result<()> {
    for name in MACHINES {
        tideover::wait_ticks(name, TICKS)?;
        let status = tideover::status(name)?;
        ensure!(number(&status, "errors")? == 0 && status["state"] == "running", "{status}");
    }
    tideover::wait_for(
        "no loaded kernel",
        PATIENCE,
        || Ok((!liveupdate::kexec::is_loaded()?).then_some(())),
    )?;
    // One that was killed lets go of the device a little later.
    let device = tideover::wait_for("the device", PATIENCE, || Ok(Device::open().ok()))?;
    for name in MACHINES.into_iter().map(|name| format!("vm:{name}")).chain(["tideover".to_owned()]) {
        let name = Name::new(name.as_bytes())?;
        // In Linux 7.3 one that is tried in vain can cost the next kernel its boot: all are tried again, and made.
        drop(tideover::wait_for("a name that is free", PATIENCE, || Ok(device.create(&name).ok()))?);
    }
    Ok(())
}

/// What is seen to be wrong before anything is done.
fn refused(next: &Next) -> anyhow::Result<()> {
    let instead = |at: usize, with: &'static str| -> anyhow::Result<Vec<&str>> {
        let mut words = kexec(next)?;
        words[at] = with;
        Ok(words)
    };
    fs::write("/run/no-kernel", "no kernel")?;
    tideover::fails_with(&instead(2, "/run/no-kernel")?, REFUSED, "no kernel image")?;
    tideover::fails_with(&instead(2, "/run/absent")?, REFUSED, "cannot open /run/absent")?;
    tideover::fails_with(&instead(4, "/run/absent")?, REFUSED, "cannot open /run/absent")?;
    tideover::fails_with(&instead(6, "console=ttyS0")?, REFUSED, "liveupdate=on")?;
    tideover::run(&["run", "other", "--memory", "8MiB"])?;
    tideover::fails_with(&kexec(next)?, REFUSED, "other would end with this kernel")?;
    tideover::run(&["stop", "other"])?;
    let device = Device::open()?;
    tideover::fails_with(&kexec(next)?, REFUSED, "it has one user at a time")?;
    drop(device);
    is_as_before()
}

/// One whose memory the kernel does not preserve.
fn one_cannot_go(next: &Next) -> anyhow::Result<()> {
    fs::write("/proc/sys/vm/nr_hugepages", "16")?;
    tideover::run(&["run", "huge", "--memory", "8MiB", "--store", "hugetlb", "--through-kexec"])?;
    for _ in 0..2 {
        tideover::fails_with(&kexec(next)?, CALLED_OFF, "does not preserve region 1")?;
        is_as_before()?;
        tideover::wait_ticks("huge", TICKS)?;
    }
    tideover::run(&["stop", "huge"])?;
    fs::write("/proc/sys/vm/nr_hugepages", "0")?;
    Ok(())
}

/// Starts the verb, waits until its kernel is loaded, and takes that away: whatever happens, it will not jump.
fn begin(next: &Next) -> anyhow::Result<Started> {
    let verb = Started::new(&kexec(next)?)?;
    tideover::wait_for("a loaded kernel", PATIENCE, || Ok(liveupdate::kexec::is_loaded()?.then_some(())))?;
    liveupdate::kexec::unload()?;
    Ok(verb)
}

/// As [`begin`], and waits until all machines are preserved.
fn begin_preserved(next: &Next) -> anyhow::Result<Started> {
    let verb = begin(next)?;
    tideover::wait_for("preserved machines", PATIENCE, || {
        Ok((verb.said().len() >= MACHINES.len()).then_some(()))
    })?;
    Ok(verb)
}

fn no_kernel_to_jump_to(next: &Next) -> anyhow::Result<()> {
    let mut verb = begin(next)?;
    ensure!(verb.code()? == Some(CALLED_OFF), "it ended otherwise");
    is_as_before()
}

fn pid_of(name: &str) -> anyhow::Result<u64> {
    number(&tideover::status(name)?, "pid")
}

/// One that stands still itself: the others do not wait for it for long.
fn one_does_not_answer(next: &Next) -> anyhow::Result<()> {
    let pid = pid_of("b")?;
    let stopped = tideover::Stopped::new(pid)?;
    tideover::fails_with(&kexec(next)?, REFUSED, "how is b?")?;
    drop(stopped);
    is_as_before()?;
    // Later on.
    let words = [&kexec(next)?[..], &["--timeout", "2s"]].concat();
    let mut verb = Started::new(&words)?;
    tideover::wait_for("a loaded kernel", PATIENCE, || Ok(liveupdate::kexec::is_loaded()?.then_some(())))?;
    let stopped = tideover::Stopped::new(pid)?;
    liveupdate::kexec::unload()?;
    tideover::wait_ticks("a", TICKS)?;
    drop(stopped);
    ensure!(verb.code()? == Some(CALLED_OFF), "it ended otherwise");
    is_as_before()
}

/// Its VMM, when the kernel has its memory.
fn one_is_killed(next: &Next) -> anyhow::Result<()> {
    for _ in 0..TRIES {
        let pid = pid_of("b")?;
        let mut verb = begin_preserved(next)?;
        let stopped = tideover::Stopped::new(pid)?;
        tideover::kill(pid)?;
        drop(stopped);
        ensure!(verb.code()? == Some(CALLED_OFF), "it ended otherwise");
        tideover::run(&["run", "b", "--memory", "16MiB", "--through-kexec"])?;
        is_as_before()?;
        let complained = verb.complained().join("\n");
        println!("{complained}");
        if complained.contains("cannot seal b") {
            return Ok(());
        }
    }
    bail!("it was never killed in time")
}

/// The command itself, at some instants while its machines are about to leave.
fn command_is_killed(next: &Next) -> anyhow::Result<()> {
    for millis in [0, 5, 10, 20, 40, 80, 160, 320] {
        let verb = begin(next)?;
        thread::sleep(Duration::from_millis(millis));
        drop(verb);
        is_as_before()?;
    }
    // After it has all preserved, and with one that keeps it from going on when the others are sealed.
    let pid = pid_of("b")?;
    let verb = begin_preserved(next)?;
    let stopped = tideover::Stopped::new(pid)?;
    thread::sleep(Duration::from_secs(1));
    tideover::signal(verb.pid(), Signal::KILL)?;
    drop(verb);
    tideover::wait_ticks("a", TICKS)?;
    drop(stopped);
    is_as_before()
}

/// Again and again, without a trace.
fn rehearsed() -> anyhow::Result<()> {
    let pid = pid_of("a")?;
    let fds = || Ok::<_, anyhow::Error>(fs::read_dir(format!("/proc/{pid}/fd"))?.count());
    let told = tideover::json(&["rehearse", "a"])?;
    ensure!(told["with_kernel"] == true && told["preserved"]["kernel_us"].as_f64() > Some(0.0), "{told}");
    ensure!(told["pause_us"].as_f64() > Some(0.0), "{told}");
    let (fds_before, free_before) = (fds()?, free_kib()?);
    for _ in 0..REHEARSALS {
        tideover::json(&["rehearse", "a"])?;
    }
    ensure!(fds()? == fds_before, "{} descriptors, and {fds_before} before", fds()?);
    is_as_before()?;
    // What the kernel keeps of the radix tree that it never gives back is far less.
    let free = free_kib()?;
    println!("{free} KiB free after {REHEARSALS} rehearsals, {free_before} before");
    ensure!(free + 8192 > free_before, "{free} KiB are free, and {free_before} before");
    Ok(())
}

fn free_kib() -> anyhow::Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")).context("no MemAvailable")?;
    Ok(kib.trim().parse()?)
}
