//! The kernel's sessions, and the agents that fill them before a kexec and claim them after it.
//!
//! An agent subscribes, and is given a session when an operator wants to have everything preserved; it says when it is ready. The sessions
//! are kept here and by the operator, so that no agent's end takes its own away. What a session of the kernel before is, is kept until
//! the agent that claimed it says that it is done: one that dies can claim it again.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::Context as _;
use fdpass::Deadline;
use liveupdate::Device;
use liveupdate::Name;
use tracing::info;
use tracing::warn;
use vmm::machines;

use crate::protocol::Event;

/// What an agent's session is called in the kernel, before the agent's own name.
const PREFIX: &str = "agent:";
/// Bytes that an agent's name may have.
const MAX_ID: usize = 57;

/// A peer, whatever comes before or after it in the list of them.
pub(crate) type PeerId = u64;

/// What is to be told: to whom, what, with which descriptors.
pub(crate) type Out = (PeerId, Event, Vec<OwnedFd>);

/// Who makes sessions, and finds those of the kernel before: the kernel.
pub(crate) trait Orchestrator {
    /// /dev/liveupdate, for who is to use it beside this daemon.
    fn device(&mut self) -> anyhow::Result<OwnedFd>;
    /// A session to be filled.
    fn create(&mut self, name: &str) -> anyhow::Result<OwnedFd>;
    /// A session of the kernel before.
    fn retrieve(&mut self, name: &str) -> anyhow::Result<OwnedFd>;
}

/// The kernel. Its device is opened when it is first needed, and has one user at a time: this daemon from then on.
#[derive(Debug, Default)]
pub(crate) struct Kernel {
    device: Option<Device>,
}

impl Kernel {
    pub(crate) fn with(device: OwnedFd) -> anyhow::Result<Self> {
        Ok(Self { device: Some(Device::from_fd(device)?) })
    }

    pub(crate) fn opened(&self) -> Option<&Device> {
        self.device.as_ref()
    }

    fn open(&mut self) -> anyhow::Result<&Device> {
        let device = match self.device.take() {
            Some(device) => device,
            None => {
                // Whatever KVM can preserve is to be known before the kernel looks at what the kernel before left, which it does once.
                let _kvm = File::open("/dev/kvm");
                Device::open()?
            }
        };
        Ok(self.device.insert(device))
    }
}

fn name(of: &str) -> anyhow::Result<Name> {
    Ok(Name::new(of.as_bytes())?)
}

impl Orchestrator for Kernel {
    fn device(&mut self) -> anyhow::Result<OwnedFd> {
        Ok(self.open()?.as_fd().try_clone_to_owned()?)
    }

    fn create(&mut self, of: &str) -> anyhow::Result<OwnedFd> {
        Ok(self.open()?.create(&name(of)?)?.into_fd())
    }

    fn retrieve(&mut self, of: &str) -> anyhow::Result<OwnedFd> {
        Ok(self.open()?.retrieve(&name(of)?)?.into_fd())
    }
}

/// What an operator has asked for.
#[derive(Debug)]
struct Preservation {
    operator: PeerId,
    until: Deadline,
    /// Of each subscriber, by name; and whether that is ready.
    sessions: BTreeMap<String, (OwnedFd, bool)>,
    told: bool,
}

/// The agents and their sessions.
#[derive(Debug)]
pub(crate) struct Sessions<K> {
    pub(crate) kernel: K,
    subscribers: BTreeMap<String, PeerId>,
    preservation: Option<Preservation>,
    /// Of the kernel before.
    claimed: BTreeMap<String, OwnedFd>,
}

impl<K: Orchestrator> Sessions<K> {
    pub(crate) fn new(kernel: K) -> Self {
        let (subscribers, claimed) = (BTreeMap::new(), BTreeMap::new());
        Self { kernel, subscribers, preservation: None, claimed }
    }

    /// How many agents have subscribed.
    pub(crate) fn subscribers(&self) -> usize {
        self.subscribers.len()
    }

    /// Which agent a peer is.
    pub(crate) fn subscribed(&self, peer: PeerId) -> Option<&str> {
        self.subscribers.iter().find(|(_, of)| **of == peer).map(|(id, _)| id.as_str())
    }

    /// What was claimed and is not done.
    pub(crate) fn claimed(&self) -> impl Iterator<Item = (&String, &OwnedFd)> {
        self.claimed.iter()
    }

    /// Another daemon had it.
    pub(crate) fn adopt(&mut self, id: String, session: OwnedFd) {
        self.claimed.insert(id, session);
    }

    /// A preservation is under way: this daemon is not to be replaced.
    pub(crate) fn is_busy(&self) -> bool {
        self.preservation.is_some()
    }

    /// When somebody is told that others are not ready.
    pub(crate) fn due(&self) -> Option<Deadline> {
        self.preservation
            .as_ref()
            .filter(|preservation| !preservation.told)
            .map(|preservation| preservation.until)
    }

    pub(crate) fn subscribe(&mut self, peer: PeerId, id: String) -> anyhow::Result<Vec<Out>> {
        machines::check_name(&id)?;
        anyhow::ensure!(id.len() <= MAX_ID, "an agent's name has at most {MAX_ID} bytes");
        anyhow::ensure!(self.subscribed(peer).is_none(), "this connection has subscribed already");
        anyhow::ensure!(!self.subscribers.contains_key(&id), "another agent is called so");
        self.subscribers.insert(id.clone(), peer);
        info!(id, "an agent has subscribed");
        match &self.preservation {
            Some(preservation) if !preservation.told => self.start(peer, id).map(|out| vec![out]),
            _ => Ok(Vec::new()),
        }
    }

    /// Gives an agent its session.
    fn start(&mut self, peer: PeerId, id: String) -> anyhow::Result<Out> {
        let session = self.kernel.create(&format!("{PREFIX}{id}"))?;
        let copy = session.try_clone().context("cannot copy a session")?;
        if let Some(preservation) = &mut self.preservation {
            preservation.sessions.insert(id, (session, false));
        }
        Ok((peer, Event::StartPreservation, vec![copy]))
    }

    /// An operator wants to have everything preserved.
    pub(crate) fn preserve(&mut self, operator: PeerId, timeout: Duration) -> anyhow::Result<Vec<Out>> {
        anyhow::ensure!(self.preservation.is_none(), "another operator has everything preserved");
        let (until, sessions) = (Deadline::after(timeout), BTreeMap::new());
        self.preservation = Some(Preservation { operator, until, sessions, told: false });
        let mut outs = Vec::new();
        for (id, peer) in self.subscribers.clone() {
            match self.start(peer, id.clone()) {
                Ok(out) => outs.push(out),
                Err(error) => {
                    outs.extend(self.release(operator));
                    return Err(error.context(format!("cannot make a session for {id}")));
                }
            }
        }
        outs.extend(self.act()?);
        Ok(outs)
    }

    pub(crate) fn ready(&mut self, peer: PeerId) -> anyhow::Result<Vec<Out>> {
        let id = self.subscribed(peer).context("this connection has not subscribed")?.to_owned();
        let session = self.preservation.as_mut().and_then(|preservation| preservation.sessions.get_mut(&id));
        let (_, ready) = session.context("nothing is to be preserved")?;
        *ready = true;
        info!(id, "an agent is ready");
        self.act()
    }

    /// Tells the operator, if all are ready, or it is time.
    pub(crate) fn act(&mut self) -> anyhow::Result<Vec<Out>> {
        let Some(preservation) = self.preservation.as_mut().filter(|preservation| !preservation.told) else {
            return Ok(Vec::new());
        };
        let all = preservation.sessions.values().all(|(_, ready)| *ready);
        if !all && !preservation.until.has_passed() {
            return Ok(Vec::new());
        }
        preservation.told = true;
        let names = |wanted: bool| {
            let these = preservation.sessions.iter().filter(move |(_, (_, ready))| *ready == wanted);
            these.map(|(id, _)| id.clone()).collect::<Vec<_>>()
        };
        let (ready, missing) = (names(true), names(false));
        if !missing.is_empty() {
            warn!(?missing, "agents are not ready in time");
        }
        let sessions = preservation.sessions.values().filter(|(_, ready)| *ready);
        let fds = sessions.map(|(session, _)| session.try_clone()).collect::<Result<_, _>>()?;
        Ok(vec![(preservation.operator, Event::Preserved { ready, missing }, fds)])
    }

    /// The operator does not want it any more: everything is as before.
    pub(crate) fn release(&mut self, operator: PeerId) -> Vec<Out> {
        let preservation = self.preservation.take_if(|preservation| preservation.operator == operator);
        let Some(preservation) = preservation else { return Vec::new() };
        info!("nothing is to be preserved any more");
        let started = preservation.sessions.into_keys().filter_map(|id| self.subscribers.get(&id));
        started.map(|peer| (*peer, Event::CancelPreservation, Vec::new())).collect()
    }

    pub(crate) fn claim(&mut self, peer: PeerId, id: String) -> anyhow::Result<Vec<Out>> {
        machines::check_name(&id)?;
        if !self.claimed.contains_key(&id) {
            let session = self.kernel.retrieve(&format!("{PREFIX}{id}"))?;
            info!(id, "an agent has its session back");
            self.claimed.insert(id.clone(), session);
        }
        let copy = self.claimed[&id].try_clone().context("cannot copy a session")?;
        Ok(vec![(peer, Event::Session { id }, vec![copy])])
    }

    /// The agent has all that it wants of a session of the kernel before.
    pub(crate) fn done(&mut self, id: &str) {
        self.claimed.remove(id);
    }

    /// A peer is gone.
    pub(crate) fn gone(&mut self, peer: PeerId) -> Vec<Out> {
        self.subscribers.retain(|_, of| *of != peer);
        self.release(peer)
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;
    use rustix::fs::memfd_create;

    use super::*;

    /// A kernel that makes any session, and has those of these names.
    #[derive(Debug, Default)]
    struct Fake {
        before: Vec<&'static str>,
        full: bool,
    }

    fn file() -> OwnedFd {
        memfd_create("session", MemfdFlags::CLOEXEC).unwrap()
    }

    impl Orchestrator for Fake {
        fn device(&mut self) -> anyhow::Result<OwnedFd> {
            Ok(file())
        }

        fn create(&mut self, _: &str) -> anyhow::Result<OwnedFd> {
            anyhow::ensure!(!self.full, "full");
            Ok(file())
        }

        fn retrieve(&mut self, name: &str) -> anyhow::Result<OwnedFd> {
            let at = self.before.iter().position(|before| *before == name).context("absent")?;
            self.before.remove(at);
            Ok(file())
        }
    }

    fn sessions(agents: &[&str]) -> Sessions<Fake> {
        let mut sessions = Sessions::new(Fake::default());
        for (id, peer) in agents.iter().zip(1..) {
            assert!(sessions.subscribe(peer, (*id).to_owned()).unwrap().is_empty());
        }
        sessions
    }

    const OPERATOR: PeerId = 100;
    const LONG: Duration = Duration::from_secs(600);

    /// To whom, what, how many descriptors.
    fn shown(outs: &[Out]) -> Vec<(PeerId, String, usize)> {
        let show = |(peer, event, fds): &Out| (*peer, serde_json::to_string(event).unwrap(), fds.len());
        outs.iter().map(show).collect()
    }

    fn start(peer: PeerId) -> (PeerId, String, usize) {
        (peer, r#"{"event":"START_PRESERVATION"}"#.to_owned(), 1)
    }

    fn preserved(ready: &str, missing: &str, count: usize) -> (PeerId, String, usize) {
        (OPERATOR, format!(r#"{{"event":"PRESERVED","ready":[{ready}],"missing":[{missing}]}}"#), count)
    }

    #[test]
    fn all_agents_get_a_session_and_the_operator_hears_when_all_are_ready() {
        let mut sessions = sessions(&["a", "b"]);
        assert_eq!(shown(&sessions.preserve(OPERATOR, LONG).unwrap()), [start(1), start(2)]);
        assert!(sessions.ready(2).unwrap().is_empty());
        // One that comes late is in it, too.
        assert_eq!(shown(&sessions.subscribe(3, "c".to_owned()).unwrap()), [start(3)]);
        assert!(sessions.ready(3).unwrap().is_empty());
        assert_eq!(shown(&sessions.ready(1).unwrap()), [preserved(r#""a","b","c""#, "", 3)]);
        assert!(sessions.ready(1).unwrap().is_empty(), "it is told once");
        assert!(sessions.subscribe(4, "d".to_owned()).unwrap().is_empty(), "it is too late for this one");
    }

    #[test]
    fn an_operator_waits_for_nobody_for_longer_than_it_says() {
        assert_eq!(shown(&sessions(&[]).preserve(OPERATOR, LONG).unwrap()), [preserved("", "", 0)]);
        let mut sessions = sessions(&["a", "b"]);
        sessions.preserve(OPERATOR, LONG).unwrap();
        sessions.ready(2).unwrap();
        sessions.preservation.as_mut().unwrap().until = Deadline::after(Duration::ZERO);
        assert_eq!(shown(&sessions.act().unwrap()), [preserved(r#""b""#, r#""a""#, 1)]);
        assert!(sessions.act().unwrap().is_empty());
        assert!(sessions.due().is_none());
    }

    #[test]
    fn what_an_operator_gives_up_or_leaves_behind_is_called_off() {
        for leave in [Sessions::release, Sessions::gone] {
            let mut sessions = sessions(&["a"]);
            sessions.preserve(OPERATOR, LONG).unwrap();
            assert!(leave(&mut sessions, 99).is_empty(), "another peer is not the operator");
            assert_eq!(
                shown(&leave(&mut sessions, OPERATOR)),
                [(1, r#"{"event":"CANCEL_PRESERVATION"}"#.to_owned(), 0)]
            );
            assert!(sessions.ready(1).is_err());
            sessions.preserve(OPERATOR, LONG).unwrap();
        }
    }

    #[test]
    fn a_second_operator_and_a_session_that_cannot_be_made_are_refused() {
        let mut sessions = sessions(&["a"]);
        sessions.preserve(OPERATOR, LONG).unwrap();
        assert!(sessions.preserve(101, LONG).is_err());
        sessions.release(OPERATOR);
        sessions.kernel.full = true;
        assert!(sessions.preserve(OPERATOR, LONG).is_err());
        assert!(!sessions.is_busy());
    }

    #[test]
    fn names_are_one_agent_s_until_it_is_gone() {
        let mut sessions = sessions(&["a"]);
        assert!(sessions.subscribe(2, "a".to_owned()).is_err());
        assert!(sessions.subscribe(1, "b".to_owned()).is_err());
        for bad in ["", "../a", "a b", &"a".repeat(58)] {
            assert!(sessions.subscribe(2, bad.to_owned()).is_err(), "{bad}");
        }
        assert!(sessions.ready(2).is_err());
        sessions.gone(1);
        sessions.subscribe(2, "a".to_owned()).unwrap();
    }

    #[test]
    fn a_session_of_the_kernel_before_can_be_claimed_again_until_its_agent_is_done() {
        let mut sessions = sessions(&[]);
        sessions.kernel.before = vec!["agent:a"];
        for peer in [1, 2] {
            assert_eq!(
                shown(&sessions.claim(peer, "a".to_owned()).unwrap()),
                [(peer, r#"{"event":"SESSION","id":"a"}"#.to_owned(), 1)]
            );
            sessions.gone(peer);
        }
        sessions.done("a");
        assert!(sessions.claim(3, "a".to_owned()).is_err());
        assert!(sessions.claim(3, "b".to_owned()).is_err());
    }
}
