//! What a holder does, done here: each of its parts is left undone once.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::Context as _;
use anyhow::bail;
use anyhow::ensure;
use custody::Standing;
use custody::When;
use kexec::Found;
use liveupdate::Device;
use liveupdate::FindError;
use liveupdate::Incoming;
use machine::OwnershipState;
use machine::SessionName;
use socket::Program;
use vmm::Brings;
use vmm::Hold;
use vmm::control::Answer;
use vmm::control::Client;

use crate::tideover;
use crate::tideover::PATIENCE;

use super::ABSENT;
use super::PROGRAM;
use super::is_back_paused;

fn retrieve(name: &str) -> anyhow::Result<Incoming> {
    let device = tideover::wait_for("the device", PATIENCE, || Ok(Device::open().ok()))?;
    let name = kexec::session_name(SessionName::new(name.as_bytes())?)?;
    let session = device.retrieve(&name)?;
    let again = device.retrieve(&name);
    ensure!(matches!(again, Err(FindError::Taken { .. })), "{again:?}");
    Ok(session)
}

/// As long as somebody has the session, one holder after another can die.
pub(super) fn run(name: &str) -> anyhow::Result<()> {
    let session = retrieve(name)?;
    let again = || Ok::<_, anyhow::Error>(Incoming::from_fd(session.as_fd().try_clone_to_owned()?)?);
    // After the session; after the note; after the regions.
    drop(again()?);
    for _ in 0..2 {
        let found = Found::read(again()?).map_err(|failed| failed.1)?;
        ensure!(found.note().machine == name, "the note of {}", found.note().machine);
    }
    for _ in 0..2 {
        let found = Found::read(again()?).map_err(|failed| failed.1)?;
        let (kept, _session) = found.retrieve().map_err(|failed| failed.1)?;
        let standing = kept.standing()?;
        ensure!(
            matches!(standing, Standing::Ready(word) if word.state() == OwnershipState::Sealed),
            "{standing:?}"
        );
    }
    // One that has taken the machine from a claimant, and dies.
    for _ in 0..2 {
        let found = Found::read(again()?).map_err(|failed| failed.1)?;
        let (kept, _session) = found.retrieve().map_err(|failed| failed.1)?;
        let standing = kept.standing()?;
        let Standing::Ready(word) = standing else { bail!("{standing:?}") };
        kept.revoke(word)?;
        let standing = kept.standing()?;
        let Standing::Ready(word) = standing else { bail!("{standing:?}") };
        ensure!(word.state() == OwnershipState::Claimed, "{word:?}");
    }
    // One that dies at once, and one that does not.
    let (channel, started) = holder()?;
    vmm::give(&channel, &hold(name), &[session.as_fd()])?;
    drop((channel, started));
    let (channel, started) = holder()?;
    vmm::give(&channel, &hold(name), &[session.as_fd()])?;
    started.let_go();
    let answer = Client::new(channel).with_patience(3 * PATIENCE).answer(&mut |_, _, _| {})?;
    let Answer::Report(Some(report)) = answer else { bail!("{answer:?}") };
    ensure!(report.name == name, "the report of {}", report.name);
    drop(session);
    is_back_paused(name)?;
    tideover::run(&["stop", name])?;
    Ok(())
}

fn holder() -> anyhow::Result<(fdpass::Channel, socket::Started)> {
    let path = Path::new(PROGRAM);
    let program = Program::open(path, &[path.to_owned()])?;
    let started = program.start_with(["vmm", "--detach", "hold"], Stdio::inherit(), Stdio::inherit())?;
    vmm::await_ready(&started.0).context("a holder that is not ready")?;
    Ok(started)
}

fn hold(name: &str) -> Hold {
    let socket = PathBuf::from(tideover::DIRECTORY).join(format!("{name}.sock"));
    Hold {
        name: name.to_owned(),
        socket,
        when: When::default(),
        program: None,
        log: None,
        brings: Brings::Session,
        stored: None,
    }
}

/// The last descriptor of a session is closed, and nothing of it was retrieved.
pub(super) fn dropped(name: &str) -> anyhow::Result<()> {
    drop(retrieve(name)?);
    let gone = format!("no session vm:{name}, or it is finished");
    tideover::fails_with(&["resume", name], ABSENT, &gone)?;
    tideover::fails_with(&["status", name], ABSENT, "there is no machine")
}
