//! Agents of tideoverd have what they have preserved across a kexec, beside a machine.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::thread;
use std::thread::JoinHandle;

use anyhow::Context as _;
use anyhow::anyhow;
use anyhow::ensure;
use liveupdate::Incoming;
use liveupdate::Outgoing;
use rustix::fs::MemfdFlags;
use serde_json::Value;
use serde_json::json;

use crate::boot::Life;
use crate::daemon;
use crate::daemon::Daemon;
use crate::daemon::Peer;
use crate::tideover;
use crate::tideover::PATIENCE;
use crate::tideover::number;

use super::Then;
use super::kexec;

const MACHINE: &str = "m1";
/// How much the guest has to count between two looks.
const TICKS: u64 = 200;
/// Those that preserve; the second is gone by the time of the kexec.
const AGENTS: [&str; 2] = ["one", "two"];
const GONE: &str = AGENTS[1];
/// One that is never ready.
const MUTE: &str = "mute";
const TOKEN: u64 = 0x7ee1;
/// Not whole pages.
const BYTES: usize = (3 << 20) + 77;
/// The kexec was called off.
const CALLED_OFF: i32 = 4;
/// How long the agents that are never ready are waited for.
const SHORT: &str = "3s";

pub(crate) fn run(life: &Life) -> anyhow::Result<Then> {
    let daemon = Daemon::start()?;
    match life.number {
        1 => {
            let begun = tideover::json(&["run", MACHINE, "--memory", "16MiB", "--through-kexec"])?;
            ensure!(begun["guest"] == "kvm" && begun["kept"] == true, "{begun}");
            one_is_never_ready(life)?;
            let _agents = AGENTS.map(start).into_iter().collect::<anyhow::Result<Vec<_>>>()?;
            kexec::leave(life)
        }
        _ => {
            have_all_back(life)?;
            drop(daemon);
            Ok(Then::End)
        }
    }
}

/// What an agent preserves, told from another one's.
fn content(id: &str) -> Vec<u8> {
    let seed = id.bytes().fold(17_u32, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    let word = |at: u32| (at.wrapping_mul(0x9e37_79b9) ^ seed).rotate_left(at % 31).to_le_bytes();
    (0..).flat_map(word).take(BYTES).collect()
}

fn check(id: &str, file: &File) -> anyhow::Result<()> {
    let mut bytes = vec![0; BYTES];
    file.read_exact_at(&mut bytes, 0)?;
    ensure!(file.metadata()?.len() == BYTES as u64, "what {id} has back is of another size");
    let wrong = bytes.iter().zip(content(id)).filter(|(is, was)| **is != *was).count();
    ensure!(wrong == 0, "of what {id} has preserved, {wrong} of {BYTES} bytes are others");
    Ok(())
}

fn preserve(id: &str, session: OwnedFd) -> anyhow::Result<Outgoing> {
    let mut session = Outgoing::from_fd(session)?;
    let memory = File::from(rustix::fs::memfd_create(id, MemfdFlags::CLOEXEC | MemfdFlags::EXEC)?);
    memory.write_all_at(&content(id), 0)?;
    session.preserve(TOKEN, memory.as_fd())?;
    Ok(session)
}

/// An agent that takes part until it hears that there is no update, or is gone.
fn start(id: &'static str) -> anyhow::Result<JoinHandle<anyhow::Result<()>>> {
    let mut peer = subscribe(id)?;
    Ok(thread::spawn(move || {
        let mut fds = expect(&mut peer, "START_PRESERVATION")?;
        let session = preserve(id, fds.pop().context("no session came")?)?;
        peer.say(&json!({ "cmd": "READY" }))?;
        if id == GONE {
            // The session stays, as tideoverd has it, too. In a kexec that is called off it goes all the same.
            return Ok(());
        }
        expect(&mut peer, "CANCEL_PRESERVATION")?;
        drop(session);
        Ok(())
    }))
}

/// One that has subscribed, as its next word shows.
fn subscribe(id: &str) -> anyhow::Result<Peer> {
    let mut peer = Peer::connect()?;
    peer.say(&json!({ "cmd": "SUBSCRIBE", "id": id }))?;
    let (status, _) = peer.ask(&json!({ "cmd": "STATUS" }))?;
    ensure!(status["event"] == "STATUS", "{id} cannot subscribe: {status}");
    Ok(peer)
}

fn expect(peer: &mut Peer, event: &str) -> anyhow::Result<Vec<OwnedFd>> {
    let (heard, fds) = peer.hear(3 * PATIENCE)?;
    ensure!(heard["event"] == event, "{heard} instead of {event}");
    Ok(fds)
}

/// The kexec is called off, all hear of it, and everything runs on.
fn one_is_never_ready(life: &Life) -> anyhow::Result<()> {
    let agents = AGENTS.map(start).into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let mut mute = subscribe(MUTE)?;
    let next = life.next()?;
    let words = [&kexec::verb(&next)?[..], &["--timeout", SHORT]].concat();
    let said = tideover::fails(&words, CALLED_OFF)?;
    ensure!(said.contains(&format!("not preserved what they have in time: {MUTE}")), "{said}");
    let session = expect(&mut mute, "START_PRESERVATION")?;
    expect(&mut mute, "CANCEL_PRESERVATION")?;
    drop(session);
    for agent in agents {
        agent.join().map_err(|_| anyhow!("an agent has panicked"))??;
    }
    tideover::wait_ticks(MACHINE, TICKS)?;
    ensure!(!liveupdate::kexec::is_loaded()?, "a kernel stays loaded");
    drop(mute);
    daemon::await_status("nobody who has subscribed", |status| status["agents"] == 0)?;
    tideover::check(MACHINE)
}

/// The session of an agent, and the file in it.
fn claim(id: &str) -> anyhow::Result<(Peer, Incoming, File)> {
    let mut peer = Peer::connect()?;
    let (event, mut fds) = peer.ask(&json!({ "cmd": "CLAIM", "id": id }))?;
    ensure!(event == json!({ "event": "SESSION", "id": id }), "{event}");
    let mut session = Incoming::from_fd(fds.pop().context("no session came")?)?;
    let file = File::from(session.retrieve(TOKEN)?);
    check(id, &file)?;
    Ok((peer, session, file))
}

fn has_no_session(id: &str) -> anyhow::Result<()> {
    let (event, _) = Peer::connect()?.ask(&json!({ "cmd": "CLAIM", "id": id }))?;
    ensure!(event["event"] == "ERROR", "{id} has a session: {event}");
    Ok(())
}

fn have_all_back(life: &Life) -> anyhow::Result<()> {
    let mut kept = Vec::new();
    let (first, second) = (AGENTS[0], AGENTS[1]);
    // It dies, with all that it has.
    drop(claim(first)?);
    // tideoverd has the device, which has one user at a time, and gives it.
    let taken = liveupdate::Device::open();
    ensure!(taken.is_err(), "the device is nobody's");
    kexec::arrive(life, &[MACHINE.to_owned()])?;
    has_no_session(MUTE)?;
    for id in [second, first] {
        let (mut peer, session, file) = claim(id)?;
        session.finish().map_err(|unfinished| anyhow!("{id} cannot finish: {unfinished:?}"))?;
        peer.say(&json!({ "cmd": "DONE", "id": id }))?;
        let (status, _) = peer.ask(&json!({ "cmd": "STATUS" }))?;
        ensure!(status["event"] == "STATUS", "{status}");
        has_no_session(id)?;
        kept.push((id, file));
    }
    for (id, file) in &kept {
        check(id, file)?;
    }
    is_kept_again()?;
    tideover::check(MACHINE)?;
    tideover::update(MACHINE, "socket")?;
    tideover::run(&["stop", MACHINE])?;
    Ok(())
}

/// The machine is kept in this life, too: its VMM's death costs no memory.
fn is_kept_again() -> anyhow::Result<()> {
    let is_kept = |status: &Value| status["kept"] == json!([MACHINE]);
    daemon::await_status("a machine that is kept", is_kept)?;
    tideover::run(&["pause", MACHINE])?;
    tideover::kill(number(&tideover::status(MACHINE)?, "pid")?)?;
    tideover::wait_for("a machine that is held", PATIENCE, || {
        let all = tideover::json(&["ls"])?;
        Ok((all[0]["state"] == "held" && all[0]["complete"] == true).then_some(()))
    })?;
    tideover::run(&["recover", MACHINE])?;
    tideover::run(&["resume", MACHINE])?;
    tideover::wait_ticks(MACHINE, TICKS)?;
    Ok(())
}
