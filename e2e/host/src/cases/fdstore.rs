//! A machine that is a unit: systemd restarts it, stops it, loses it, and has too small a store for it.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::bail;
use anyhow::ensure;
use serde_json::Value;

use crate::boot::Life;
use crate::tideover;
use crate::tideover::number;

use super::Then;

const MACHINE: &str = "m1";
const UNIT: &str = "tideover@m1.service";
/// How much the guest has to count between two looks.
const TICKS: u64 = 1000;
const RESTARTS: u32 = 3;
/// Where the options of units are, and what overrides the units themselves.
const OPTIONS: &str = "/etc/tideover";
const OVERRIDES: &str = "/run/systemd/system";
/// The machine's regions and its note.
const KEPT: &str = "3";

pub(crate) fn run(_: &Life) -> anyhow::Result<Then> {
    let version = systemctl(&["--version"])?;
    println!("{}", version.lines().next().unwrap_or_default());
    fs::create_dir_all(OPTIONS)?;
    for name in [MACHINE, "bare", "small", "failed"] {
        fs::write(format!("{OPTIONS}/{name}.conf"), "OPTIONS=--memory 64MiB\n")?;
    }
    let made = begins()?;
    outlives_restarts(&made)?;
    outlives_updates(&made)?;
    restarts_anew()?;
    runs_on_where_it_cannot_be_kept(&made)?;
    is_held_after_a_death(&made)?;
    is_over_after_a_stop()?;
    is_not_started_without_a_store()?;
    outlives_a_failed_unit()?;
    Ok(Then::End)
}

fn systemctl(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("systemctl").arg("--no-pager").args(arguments).output()?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let complained = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(output.status.success(), "systemctl {}: {}: {complained}", arguments.join(" "), output.status);
    Ok(said)
}

fn property(unit: &str, name: &str) -> anyhow::Result<String> {
    systemctl(&["show", "--value", "-p", name, unit])
}

fn is(unit: &str, name: &str, wanted: &str) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        let found = property(unit, name)?;
        if found == wanted {
            return Ok(());
        }
        ensure!(begun.elapsed() < tideover::PATIENCE, "{name} of {unit} is {found:?}, not {wanted:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// The unit's main process is the machine's VMM, and its store has what it takes.
fn is_whole(made: &Value) -> anyhow::Result<Value> {
    let status = tideover::status(MACHINE)?;
    ensure!(status["identity"] == made["identity"], "another machine: {status}");
    ensure!(status["state"] == "running", "it does not run: {status}");
    is(UNIT, "MainPID", &number(&status, "pid")?.to_string())?;
    is(UNIT, "ActiveState", "active")?;
    is(UNIT, "NFileDescriptorStore", KEPT)?;
    tideover::wait_ticks(MACHINE, TICKS)?;
    Ok(status)
}

fn begins() -> anyhow::Result<Value> {
    systemctl(&["start", UNIT])?;
    let made = tideover::status(MACHINE)?;
    ensure!(made["guest"] == "kvm", "not a guest of KVM: {made}");
    is_whole(&made)?;
    Ok(made)
}

fn outlives_restarts(made: &Value) -> anyhow::Result<()> {
    for restart in 1..=RESTARTS {
        let before = tideover::status(MACHINE)?;
        systemctl(&["restart", UNIT])?;
        let after = is_whole(made)?;
        ensure!(after["pid"] != before["pid"], "the same process");
        ensure!(number(&after, "updates")? == u64::from(restart), "{after}");
        ensure!(number(&after, "ticks")? > number(&before, "ticks")?, "its guest began anew: {after}");
        println!("restart {restart}: {}", took(UNIT)?);
        println!("{}", tideover::run(&["report", MACHINE])?);
    }
    tideover::check(MACHINE)
}

/// How long the unit was not active, by systemd's clock.
fn took(unit: &str) -> anyhow::Result<String> {
    let at = |name: &str| -> anyhow::Result<u64> {
        property(unit, name)?.parse().with_context(|| format!("{name} of {unit}"))
    };
    let span = at("ActiveEnterTimestampMonotonic")?.saturating_sub(at("ActiveExitTimestampMonotonic")?);
    Ok(format!("{unit} took {span} us from stop to ready"))
}

fn outlives_updates(made: &Value) -> anyhow::Result<()> {
    for carrier in ["socket", "exec"] {
        tideover::update(MACHINE, carrier)?;
        is_whole(made)?;
        systemctl(&["restart", UNIT])?;
        is_whole(made)?;
    }
    tideover::check(MACHINE)
}

/// What it takes to compare a restart with: the same program, whose machine is made anew.
fn restarts_anew() -> anyhow::Result<()> {
    let bare = "tideover@bare.service";
    overrides(bare, "[Service]\nExecStop=\nExecStop=/usr/bin/tideover stop bare\n")?;
    systemctl(&["start", bare])?;
    for _ in 0..RESTARTS {
        systemctl(&["restart", bare])?;
        println!("anew: {}", took(bare)?);
    }
    systemctl(&["stop", bare])?;
    Ok(())
}

fn overrides(unit: &str, text: &str) -> anyhow::Result<()> {
    let folder = format!("{OVERRIDES}/{unit}.d");
    fs::create_dir_all(&folder)?;
    fs::write(format!("{folder}/e2e.conf"), text)?;
    systemctl(&["daemon-reload"])?;
    Ok(())
}

/// The guest runs on in the process that could not leave it, and then in the unit's next one.
fn runs_on_where_it_cannot_be_kept(made: &Value) -> anyhow::Result<()> {
    let before = is_whole(made)?;
    // There is no room for another note. What is in the store stays there.
    overrides(UNIT, "[Service]\nFileDescriptorStoreMax=3\nTimeoutStopSec=3s\n")?;
    systemctl(&["restart", UNIT])?;
    let after = tideover::status(MACHINE)?;
    ensure!(after["identity"] == made["identity"], "another machine: {after}");
    ensure!(number(&after, "ticks")? > number(&before, "ticks")?, "its guest began anew: {after}");
    is(UNIT, "MainPID", &number(&after, "pid")?.to_string())?;
    tideover::check(MACHINE)?;
    overrides(UNIT, "[Service]\n")?;
    systemctl(&["restart", UNIT])?;
    is_whole(made)?;
    Ok(())
}

fn is_held_after_a_death(made: &Value) -> anyhow::Result<()> {
    let pid = property(UNIT, "MainPID")?;
    systemctl(&["kill", "--kill-whom=main", "--signal=KILL", UNIT])?;
    let begun = Instant::now();
    let held = loop {
        match tideover::status(MACHINE) {
            Ok(status) if status["state"] == "held" => break status,
            other if begun.elapsed() > tideover::PATIENCE => bail!("it is not held: {other:?}"),
            _ => thread::sleep(Duration::from_millis(100)),
        }
    };
    ensure!(held["pid"].as_u64() != pid.parse().ok(), "the same process");
    is(UNIT, "ActiveState", "active")?;
    is(UNIT, "NFileDescriptorStore", KEPT)?;
    systemctl(&["restart", UNIT])?;
    ensure!(tideover::status(MACHINE)?["state"] == "held", "it is not held any more");
    tideover::run(&["recover", MACHINE, "--else", "boot"])?;
    is_whole(made)?;
    systemctl(&["restart", UNIT])?;
    is_whole(made)?;
    Ok(())
}

fn is_over_after_a_stop() -> anyhow::Result<()> {
    systemctl(&["stop", UNIT])?;
    is(UNIT, "ActiveState", "inactive")?;
    is(UNIT, "NFileDescriptorStore", "0")?;
    tideover::fails(&["status", MACHINE], 3)?;
    Ok(())
}

fn is_not_started_without_a_store() -> anyhow::Result<()> {
    let small = "tideover@small.service";
    for store in ["FileDescriptorStoreMax=0", "FileDescriptorStoreMax=5"] {
        overrides(small, &format!("[Service]\n{store}\nRestart=no\n"))?;
        let started = systemctl(&["start", small]);
        ensure!(started.is_err(), "it starts with {store}");
        is(small, "ActiveState", "failed")?;
        is(small, "NFileDescriptorStore", "0")?;
        tideover::fails(&["status", "small"], 3)?;
    }
    Ok(())
}

/// Where the store is preserved, it stays though the unit has failed.
fn outlives_a_failed_unit() -> anyhow::Result<()> {
    let failed = "tideover@failed.service";
    overrides(failed, "[Service]\nRestart=no\n")?;
    systemctl(&["start", failed])?;
    let made = tideover::status("failed")?;
    systemctl(&["kill", "--kill-whom=main", "--signal=KILL", failed])?;
    is(failed, "ActiveState", "failed")?;
    is(failed, "NFileDescriptorStore", KEPT)?;
    systemctl(&["start", failed])?;
    ensure!(tideover::status("failed")?["state"] == "held", "it is not held");
    tideover::run(&["recover", "failed", "--else", "boot"])?;
    ensure!(tideover::status("failed")?["identity"] == made["identity"], "another machine");
    systemctl(&["stop", failed])?;
    is(failed, "NFileDescriptorStore", "0")
}
