//! Machines without guests.

use std::fs;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;
use std::process;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::Result;
use custody::Note;
use fdpass::Channel;
use fdpass::Deadline;
use fdpass::Listener;
use machine::Machine;
use machine::MemoryName;
use machine::MemorySpec;
use machine::SessionName;
use machine::Spec;
use machine::StateName;
use region::Region;
use rustix::event::EventfdFlags;
use rustix::event::eventfd;
use socket::Origin;
use vmm::control;
use vmm::control::Answer;
use vmm::control::Custody;
use vmm::control::OnOom;
use vmm::control::Request;

/// What the file that says that one process's machines are there ends with.
pub(crate) const READY: &str = ".ready";
const MEMORY: u64 = 2 << 20;

struct One {
    name: String,
    machine: Machine,
    vcpu: OwnedFd,
    listener: Listener,
    connections: Vec<Channel>,
}

impl One {
    fn make(directory: &Path, number: usize) -> Result<Self> {
        let name = format!("m{number:04}");
        let ram = MemorySpec::new(MemoryName::new(b"ram")?, MEMORY);
        let states = vec![StateName::new(b"vcpu0")?];
        let session = SessionName::new(name.as_bytes())?;
        let spec = Spec { name: session, vcpus: 1, memories: vec![ram], states };
        let machine = Machine::create(&spec, &mut |_, _| {})?;
        let listener = Listener::bind(&vmm::machines::socket(directory, &name))?;
        let vcpu = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self { name, machine, vcpu, listener, connections: Vec::new() })
    }

    fn give(&self, channel: &Channel) -> Result<()> {
        let Self { name, machine, vcpu, .. } = self;
        let note = Note {
            machine: name.clone(),
            identity: machine.identity().to_string(),
            formats: machine.formats().into_iter().collect(),
            regions: machine.regions().map(Region::len_bytes).collect(),
            program: PathBuf::new(),
            cgroup: custody::cgroup(),
            vmm: serde_json::Value::Null,
            sealed: None,
        };
        let (pid, origin, on_oom) = (process::id(), Origin::LeftBehind, OnOom::Keep);
        let custody = Custody { note, vcpus: 1, pid, origin, on_oom, stored: false };
        let fds: Vec<BorrowedFd<'_>> = machine.regions().map(Region::as_fd).chain([vcpu.as_fd()]).collect();
        control::send_with(channel, &Answer::Custody(Box::new(custody)), &fds)
    }

    /// Hears who came, or who is connected.
    fn hear(&mut self, place: usize) -> Result<()> {
        let now = Deadline::after(Duration::ZERO);
        let Some(place) = place.checked_sub(1) else {
            self.connections.push(self.listener.accept(now)?);
            return Ok(());
        };
        let channel = &self.connections[place];
        match control::receive(channel, now) {
            Ok(Some(Request::Custody)) => self.give(channel),
            Ok(_) | Err(_) => {
                self.connections.remove(place);
                Ok(())
            }
        }
    }
}

/// Is the machines with these numbers, until it is killed.
pub(crate) fn be(numbers: &str) -> Result<()> {
    let (from, to) = numbers.split_once('-').context("no range of numbers")?;
    let (from, to) = (from.parse::<usize>()?, to.parse()?);
    raise_limit()?;
    let directory = vmm::machines::directory();
    let all: Result<Vec<One>> = (from..to).map(|number| One::make(&directory, number)).collect();
    let mut all = all?;
    fs::write(directory.join(format!("{from}{READY}")), "")?;
    loop {
        let mut fds = Vec::new();
        let mut of = Vec::new();
        for (one, at) in all.iter().zip(0_usize..) {
            let these = [one.listener.as_fd()].into_iter().chain(one.connections.iter().map(Channel::as_fd));
            for (fd, place) in these.zip(0_usize..) {
                fds.push(fd);
                of.push((at, place));
            }
        }
        let rang = fdpass::ready(&fds, Deadline::never())?;
        // One connection may go, and those behind it move: they are heard the next time.
        let mut last = None;
        for (at, place) in rang.into_iter().map(|rang| of[rang]) {
            if last.replace(at) != Some(at) {
                all[at].hear(place)?;
            }
        }
    }
}

fn raise_limit() -> Result<()> {
    use rustix::process::Resource;
    use rustix::process::Rlimit;
    let limit = rustix::process::getrlimit(Resource::Nofile);
    Ok(rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?)
}
