//! A machine in a cgroup of its own, which has to have room for it in the next life.

use std::fs;
use std::fs::DirBuilder;
use std::fs::File;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use anyhow::ensure;
use rustix::fs::FlockOperation;
use rustix::process::Signal;

use crate::tideover;
use crate::tideover::PATIENCE;
use crate::tideover::Started;
use crate::tideover::number;

use super::HELD;
use super::held;
use super::is_back;
use super::processes;

pub(super) const NAME: &str = "group";
const GROUPS: &str = "/sys/fs/cgroup";
/// Its memory, and what belongs to it.
const BYTES: u64 = 8 << 20;

fn file(name: &str) -> String {
    format!("{GROUPS}/{NAME}/{name}")
}

fn make() -> anyhow::Result<()> {
    fs::write(format!("{GROUPS}/cgroup.subtree_control"), "+memory")?;
    fs::create_dir(format!("{GROUPS}/{NAME}"))?;
    Ok(())
}

fn limit(bytes: u64) -> anyhow::Result<()> {
    Ok(fs::write(file("memory.max"), bytes.to_string())?)
}

/// The processes that are in it.
fn members() -> anyhow::Result<Vec<u64>> {
    let list = fs::read_to_string(file("cgroup.procs"))?;
    Ok(list.lines().filter_map(|line| line.parse().ok()).collect())
}

/// The holder that is in it, if one is.
fn holder() -> anyhow::Result<Option<u64>> {
    let holders = processes(&["hold"])?;
    Ok(members()?.into_iter().find(|member| holders.contains(member)))
}

/// Puts the machine into it.
pub(super) fn begin() -> anyhow::Result<()> {
    make()?;
    let pid = number(&tideover::status(NAME)?, "pid")?;
    Ok(fs::write(file("cgroup.procs"), pid.to_string())?)
}

pub(super) fn run() -> anyhow::Result<()> {
    make()?;
    limit(512 << 20)?;
    // Others are about to retrieve: its holder has its note, and waits.
    let folder = Path::new(tideover::DIRECTORY);
    DirBuilder::new().mode(0o700).recursive(true).create(folder)?;
    let lock = File::create(folder.join("retrieve.lock"))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    let command = Started::new(&["resume", NAME])?;
    let first = tideover::wait_for("the holder", PATIENCE, holder)?;
    tideover::kill(first)?;
    let second =
        tideover::wait_for("another holder", PATIENCE, || Ok(holder()?.filter(|pid| *pid != first)))?;
    // Who has started it has the session, too, and goes.
    tideover::signal(command.pid(), Signal::KILL)?;
    drop(command);
    limit(BYTES)?;
    drop(lock);
    tideover::wait_for("somebody who answers", PATIENCE, || {
        let all = tideover::json(&["ls"])?;
        let listed = all.as_array().and_then(|all| all.iter().find(|one| one["name"] == NAME));
        Ok(listed.is_some_and(|one| one["state"] == "held").then_some(()))
    })?;
    let (why, holder) = held(NAME)?;
    ensure!(holder == second && why.contains("raise its memory.max to"), "{holder}, and not {second}: {why}");
    tideover::fails_with(&["resume", NAME], HELD, "raise its memory.max to")?;
    ensure!(charged()? < BYTES, "{} bytes are charged", charged()?);
    limit(512 << 20)?;
    tideover::run(&["resume", NAME])?;
    is_back(NAME)?;
    ensure!(charged()? > BYTES, "{} bytes are charged", charged()?);
    let pid = number(&tideover::status(NAME)?, "pid")?;
    ensure!(members()?.contains(&pid), "its VMM is in another cgroup");
    ensure!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim() == "0", "its VMM is spared");
    Ok(())
}

/// Bytes that are charged to it.
fn charged() -> anyhow::Result<u64> {
    Ok(fs::read_to_string(file("memory.current"))?.trim().parse()?)
}
