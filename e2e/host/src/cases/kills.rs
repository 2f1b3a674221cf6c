//! Machines whose way out of a kexec goes wrong: what is lost is said, and all else comes back.

mod by_hand;
mod group;

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::ensure;
use liveupdate::Device;
use machine::update::Step;
use rustix::process::Signal;
use serde_json::Value;

use crate::boot::Life;
use crate::roles;
use crate::roles::Fault;
use crate::tideover;
use crate::tideover::PATIENCE;
use crate::tideover::Started;
use crate::tideover::number;

use super::Then;
use super::kexec;

/// How much a guest has to count between two looks.
const TICKS: u64 = 200;
/// The program that can do all.
const PROGRAM: &str = "/bin/tideover";
/// The exit codes of what was refused, of no machine, and of a machine that is held.
const REFUSED: i32 = 1;
const ABSENT: i32 = 3;
const HELD: i32 = 6;

/// Those whose holder is killed by their VMM at this step, and their names.
const ORPHANS: [(&str, Step); 6] = [
    ("o1", Step::Connected),
    ("o2", Step::Attached),
    ("o3", Step::Warm),
    ("o4", Step::Claimed),
    ("o5", Step::Loaded),
    ("o6", Step::Running),
];
/// Those that stand still when their kernel goes, so that there is time for the others.
const PAUSED: [&str; 6] = ["ran", "held", "hand", "lost", "paused", "confined"];
/// Those that run.
const RUNNING: [&str; 4] = ["dies", "lurk", "back", group::NAME];

pub(crate) fn run(life: &Life) -> anyhow::Result<Then> {
    match life.number {
        1 => {
            begin()?;
            kexec::leave(life)
        }
        2 => {
            faults()?;
            all_again()?;
            kexec::leave(life)
        }
        3 => {
            left_behind(life)?;
            kexec::leave_others(life)
        }
        _ => {
            tideover::run(&["resume", "--all"])?;
            tideover::fails_with(&["resume", "back"], ABSENT, "the kernel before left no session vm:back")?;
            Ok(Then::End)
        }
    }
}

fn begin() -> anyhow::Result<()> {
    let start = |name: &str| {
        let confine = (name == "confined").then_some("--confine");
        let words = ["run", name, "--memory", "8MiB", "--through-kexec"].into_iter().chain(confine);
        tideover::run(&words.collect::<Vec<_>>())
    };
    for name in ORPHANS.iter().map(|(name, _)| *name).chain(PAUSED) {
        start(name)?;
        tideover::wait_ticks(name, TICKS)?;
        tideover::run(&["pause", name])?;
    }
    for name in RUNNING {
        start(name)?;
        tideover::wait_ticks(name, TICKS)?;
    }
    group::begin()
}

fn faults() -> anyhow::Result<()> {
    let device = Device::open()?;
    tideover::fails_with(&["resume", "--all"], REFUSED, "it has one user at a time")?;
    tideover::fails_with(&["resume", "back"], REFUSED, "it has one user at a time")?;
    drop(device);
    group::run()?;
    // It takes a minute until it is given up.
    let lurks = roles::faulty(Fault::Lurks, Step::Claimed)?;
    let lurks = Started::new(&["resume", "lurk", "--program", &lurks])?;
    tideover::wait_for("a claim", PATIENCE, || Ok(lurker()?.is_some().then_some(())))?;
    dies_at_each_step()?;
    ran_on()?;
    orphans()?;
    holder_of_one_held()?;
    by_hand::run("hand")?;
    by_hand::dropped("lost")?;
    wakes_late(lurks)
}

/// A machine that is back: its guest runs, and every byte is there.
fn is_back(name: &str) -> anyhow::Result<()> {
    tideover::wait_ticks(name, TICKS)?;
    let status = tideover::status(name)?;
    ensure!(number(&status, "errors")? == 0 && number(&status, "kexecs")? > 0, "{status}");
    tideover::check(name)
}

/// The same of one that was paused before the kexec, and is now.
fn is_back_paused(name: &str) -> anyhow::Result<()> {
    let status = tideover::status(name)?;
    ensure!(status["state"] == "paused", "{status}");
    tideover::run(&["resume", name])?;
    is_back(name)
}

/// What is said of one that is held, and the process that holds it.
fn held(name: &str) -> anyhow::Result<(String, u64)> {
    let status = tideover::status(name)?;
    ensure!(status["state"] == "held", "{status}");
    let why = status["why"].as_str().context("it is not said why")?;
    Ok((why.to_owned(), number(&status, "pid")?))
}

/// One VMM after another fails, and the machine is none the worse for it.
fn dies_at_each_step() -> anyhow::Result<()> {
    let old = roles::old()?;
    tideover::fails_with(&["resume", "dies", "--program", &old], HELD, "cannot read")?;
    let (_, holder) = held("dies")?;
    for step in [Step::Connected, Step::Received, Step::Attached, Step::Warm, Step::Claimed, Step::Loaded] {
        let faulty = roles::faulty(Fault::Dies, step)?;
        tideover::fails_with(&["resume", "dies", "--program", &faulty], HELD, "signal: 9")?;
        ensure!(held("dies")?.1 == holder, "another holder");
    }
    tideover::fails_with(
        &["resume", "dies", "--program", "/absent"],
        HELD,
        "cannot open the program /absent",
    )?;
    tideover::run(&["resume", "dies", "--program", PROGRAM])?;
    is_back("dies")?;
    tideover::wait_for("the holder's end", PATIENCE, || Ok((!tideover::is_alive(holder)).then_some(())))?;
    tideover::update("dies", "socket")?;
    tideover::run(&["stop", "dies"])?;
    Ok(())
}

/// One whose VMM dies once it runs the machine: its state is behind its memory for good. What all verbs say of it.
fn ran_on() -> anyhow::Result<()> {
    let faulty = roles::faulty(Fault::Dies, Step::Running)?;
    let words = "so its vCPUs' state is lost; its memory is whole";
    tideover::fails_with(&["resume", "ran", "--program", &faulty], HELD, words)?;
    tideover::fails_with(&["resume", "ran", "--program", PROGRAM], HELD, words)?;
    let (why, holder) = held("ran")?;
    ensure!(why.contains(words), "{why}");
    let said = tideover::run(&["status", "ran"])?;
    ensure!(said.contains("tideover stop ran"), "{said}");
    let all = tideover::json(&["ls"])?;
    let listed = all.as_array().and_then(|all| all.iter().find(|one| one["name"] == "ran"));
    ensure!(listed.is_some_and(|one| one["state"] == "held" && one["pid"] == holder), "{all}");
    ensure!(tideover::run(&["ls"])?.lines().any(|line| line.contains("ran") && line.contains("held")), "ls");
    for verb in ["update", "console", "pause", "rehearse"] {
        tideover::fails_with(&[verb, "ran"], REFUSED, "is held")?;
    }
    tideover::fails_with(&["run", "ran", "--memory", "8MiB"], REFUSED, "there is a machine ran already")?;
    tideover::run(&["stop", "ran"])?;
    tideover::wait_for("the holder's end", PATIENCE, || Ok((!tideover::is_alive(holder)).then_some(())))?;
    tideover::fails_with(&["status", "ran"], ABSENT, "there is no machine ran")
}

/// A holder is killed: the command has another one started.
fn orphans() -> anyhow::Result<()> {
    for (name, step) in ORPHANS {
        let faulty = roles::faulty(Fault::Orphans, step)?;
        tideover::run(&["resume", name, "--program", &faulty])?;
        is_back_paused(name)?;
        tideover::run(&["stop", name])?;
    }
    Ok(())
}

/// Nobody else has what it has.
fn holder_of_one_held() -> anyhow::Result<()> {
    let faulty = roles::faulty(Fault::Dies, Step::Warm)?;
    tideover::fails(&["resume", "held", "--program", &faulty], HELD)?;
    let (_, holder) = held("held")?;
    let score = fs::read_to_string(format!("/proc/{holder}/oom_score_adj"))?;
    ensure!(score.trim() == "-1000", "memory that runs out ends a holder: {score}");
    tideover::kill(holder)?;
    let all = tideover::json(&["ls"])?;
    let listed = all.as_array().and_then(|all| all.iter().find(|one| one["name"] == "held"));
    ensure!(listed.is_some_and(|one| one["state"] == "dead"), "{all}");
    tideover::fails_with(&["resume", "held"], ABSENT, "no session vm:held, or it is finished")
}

/// The process that has claimed a machine and stands still, if it does.
fn lurker() -> anyhow::Result<Option<u64>> {
    let Some(pid) = processes(&["lurker"])?.first().copied() else { return Ok(None) };
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let stopped = stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'));
    Ok(stopped.then_some(pid))
}

/// Processes that were started with these words.
fn processes(words: &[&str]) -> anyhow::Result<Vec<u64>> {
    let pids = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let has_all = |pid: &u64| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let said: Vec<_> = line.split(|byte| *byte == 0).collect();
        words.iter().all(|word| said.contains(&word.as_bytes()))
    };
    Ok(pids.filter(has_all).collect())
}

/// One that has claimed the machine wakes when another one runs it: it never does.
fn wakes_late(mut lurks: Started) -> anyhow::Result<()> {
    let lurker = lurker()?.context("nobody lurks")?;
    ensure!(lurks.code()? == Some(HELD), "it ended otherwise: {:?}", lurks.complained());
    // It listens there, and would not answer.
    fs::remove_file(format!("{}/lurk.sock", tideover::DIRECTORY))?;
    tideover::wait_for("the holder's socket", PATIENCE, || Ok(held("lurk").ok()))?;
    tideover::run(&["resume", "lurk", "--program", PROGRAM])?;
    tideover::wait_ticks("lurk", TICKS)?;
    tideover::signal(lurker, Signal::CONT)?;
    tideover::wait_for("the late one's end", PATIENCE, || Ok((!tideover::is_alive(lurker)).then_some(())))?;
    is_back("lurk")?;
    tideover::run(&["stop", "lurk"])?;
    Ok(())
}

/// A command that is killed while it resumes all, and another one.
fn all_again() -> anyhow::Result<()> {
    let first = Started::new(&["resume", "--all"])?;
    thread::sleep(Duration::from_millis(300));
    tideover::signal(first.pid(), Signal::KILL)?;
    drop(first);
    let names = ["back", "paused", "confined"];
    // What is gone is said once.
    let output = tideover::either(&["resume", "--all"])?;
    println!("{output}");
    tideover::wait_for("all machines", PATIENCE, || {
        let all = tideover::json(&["ls"])?;
        let of = |name: &str| all.as_array()?.iter().find(|one| one["name"] == name)?["pid"].as_u64();
        Ok(names.into_iter().all(|name| of(name).is_some()).then_some(()))
    })?;
    let said = tideover::json(&["resume", "--all"])?;
    ensure!(said == Value::Array(Vec::new()), "{said}");
    is_back("back")?;
    let confined = tideover::status("confined")?;
    ensure!(confined["confined"] == "deny", "{confined}");
    for name in ["paused", "confined"] {
        is_back_paused(name)?;
        tideover::run(&["stop", name])?;
    }
    tideover::run(&["stop", group::NAME])?;
    Ok(())
}

/// A machine that nobody asked for is not passed on, and the command says so before.
fn left_behind(life: &Life) -> anyhow::Result<()> {
    for _ in 0..2 {
        kexec::refused(life, "back came through the last kexec, and would end with this kernel")?;
    }
    Ok(())
}
