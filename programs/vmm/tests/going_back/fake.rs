//! A successor that is no program: this process says what one would say, or something else.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use abi::arena::OWNERSHIP_ADDRESS;
use fdpass::Channel;
use fdpass::Deadline;
use fdpass::MAX_MESSAGE_BYTES;
use fdpass::MAX_MESSAGE_FDS;
use machine::Incoming;
use machine::OfferedRegion;
use region::Region;
use rustix::net::SendFlags;
use serde_json::Value;
use serde_json::json;

/// How long the VMM may take to say something.
const PATIENCE: Duration = Duration::from_secs(20);
/// Formats of the states of both guests, but for those of devices.
pub(crate) const GUESTS: [&str; 5] = [
    "tideover-pulse-walk-v1",
    "tideover-kvm-vm-v1",
    "tideover-kvm-vcpu-v1",
    "tideover-devices-v1",
    "tideover-console-v1",
];

pub(crate) fn bytes(message: &Value) -> Vec<u8> {
    message.to_string().into_bytes()
}

/// The first message of a successor that can read everything.
pub(crate) fn hello() -> Value {
    let own = GUESTS.into_iter().chain(devices::FORMATS).map(str::to_owned);
    let reads: Vec<String> = socket::readable_formats().into_iter().chain(own).collect();
    json!({
        "message": "hello",
        "protocol": socket::PROTOCOL,
        "program": "fake",
        "version": "0",
        "pid": std::process::id(),
        "reads": reads,
    })
}

/// The message that is due from a successor at each of its turns, in order.
pub(crate) fn due() -> [Value; 4] {
    let steps = json!([]);
    [
        hello(),
        json!({ "message": "accept" }),
        json!({ "message": "warm", "steps": steps }),
        json!({ "message": "running", "steps": steps }),
    ]
}

/// One end of a conversation with a VMM.
#[derive(Debug)]
pub(crate) struct Fake {
    channel: Channel,
}

impl Fake {
    pub(crate) fn new(channel: Channel) -> Self {
        Self { channel }
    }

    pub(crate) fn connect(path: &Path) -> Self {
        Self::new(fdpass::connect(path, Deadline::after(PATIENCE)).expect("the VMM listens"))
    }

    /// One that has said what was due `turns` times, and heard each answer. Gives what it was given: the last
    /// answer, and the machine's memory, if it came so far.
    pub(crate) fn after(path: &Path, turns: usize) -> (Self, Heard) {
        let fake = Self::connect(path);
        let mut heard = Heard::default();
        for message in due().iter().take(turns) {
            fake.say(message).expect("the VMM hears");
            let (message, fds) = fake.hear_all().expect("the VMM answers");
            if message["message"] == "offer" {
                heard.regions =
                    message["regions"].as_array().expect("sizes").iter().filter_map(Value::as_u64).collect();
            }
            heard.fds.extend(fds);
            heard.last = message;
        }
        (fake, heard)
    }

    pub(crate) fn say(&self, message: &Value) -> anyhow::Result<()> {
        self.say_with(&bytes(message), &[])
    }

    pub(crate) fn say_with(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        Ok(self.channel.send(bytes, fds, Deadline::after(PATIENCE))?)
    }

    /// Says more than a message may have, which the library does not do.
    pub(crate) fn say_too_much(&self) {
        let much = vec![b'!'; MAX_MESSAGE_BYTES + 1];
        let sent = rustix::net::send(self.channel.as_fd(), &much, SendFlags::NOSIGNAL);
        assert_eq!(sent, Ok(much.len()));
    }

    /// A message of no bytes.
    pub(crate) fn say_nothing(&self) {
        assert_eq!(rustix::net::send(self.channel.as_fd(), &[], SendFlags::NOSIGNAL), Ok(0));
    }

    pub(crate) fn hear(&self) -> anyhow::Result<Value> {
        Ok(self.hear_all()?.0)
    }

    fn hear_all(&self) -> anyhow::Result<(Value, Vec<OwnedFd>)> {
        let message = self.channel.receive(MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS, Deadline::after(PATIENCE))?;
        Ok((serde_json::from_slice(&message.bytes)?, message.fds))
    }
}

impl AsFd for Fake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

/// What a fake successor was given.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) last: Value,
    /// Sizes of the regions, which are the first descriptors.
    regions: Vec<u64>,
    fds: Vec<OwnedFd>,
}

impl Heard {
    /// The machine, as a successor takes it in.
    pub(crate) fn attach(&self) -> Incoming {
        let region = |(len_bytes, fd): (&u64, &OwnedFd)| OfferedRegion {
            fd: fd.try_clone().expect("there is room for a descriptor"),
            len_bytes: *len_bytes,
        };
        let others = self.fds.iter().skip(self.regions.len());
        let others = others.map(|fd| fd.try_clone().expect("there is room for a descriptor"));
        let regions = self.regions.iter().zip(&self.fds).map(region).collect();
        Incoming::attach(regions, others.collect()).expect("it is a machine")
    }

    /// Writes nonsense over the word that says who owns the machine.
    pub(crate) fn destroy_word(&self) {
        let fd = self.fds[0].try_clone().expect("there is room for a descriptor");
        let region0 =
            Region::accept("metadata", fd, self.regions[0]).and_then(Region::map).expect("it is a region");
        Arc::new(region0).word(OWNERSHIP_ADDRESS).expect("it has a header").store(u64::MAX);
    }
}
