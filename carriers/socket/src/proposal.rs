//! What a successor is told of a machine before it gets anything of it.

use fdpass::Channel;
use fdpass::Deadline;
use machine::update::Step;
use tracing::info;

use crate::Origin;
use crate::message;
use crate::message::LinkError;
use crate::message::Message;
use crate::message::PROTOCOL;
use crate::predecessor::Reason;

pub(crate) struct Proposal {
    pub(crate) identity: String,
    pub(crate) formats: Vec<String>,
    pub(crate) regions: Vec<u64>,
    pub(crate) descriptors: usize,
    pub(crate) vmm: serde_json::Value,
    pub(crate) origin: Origin,
}

impl Proposal {
    /// Asks the successor who it is, and whether it can read what it would get. Gives its process id, as it says itself.
    pub(crate) fn agree(
        self,
        channel: &Channel,
        reached: &mut dyn FnMut(Step),
        deadline: Deadline,
    ) -> Result<u32, Reason> {
        let link = |step| move |source| Reason::Link { step, source };
        let hello = message::receive(channel, "hello", deadline).map_err(link(Step::Connected))?;
        let Message::Hello { protocol, program, version, pid, reads } = hello else {
            return Err(link(Step::Connected)(LinkError::Closed));
        };
        if protocol != PROTOCOL {
            return Err(link(Step::Connected)(LinkError::Protocol { theirs: protocol }));
        }
        // Its own word has to do: of a socket pair the kernel names the maker, which may be a third.
        let (program, version) = (message::shown(&program), message::shown(&version));
        info!(pid, program, version, "a successor is here");
        reached(Step::Connected);
        let Self { identity, formats, regions, descriptors, vmm, origin } = self;
        let unread: Vec<String> = formats.iter().filter(|format| !reads.contains(format)).cloned().collect();
        if !unread.is_empty() {
            let reason = format!("formats that you cannot read: {}", unread.join(", "));
            message::refuse(channel, &reason);
            return Err(Reason::Formats { formats: unread });
        }
        let offer =
            Message::Offer { protocol: PROTOCOL, identity, formats, regions, descriptors, vmm, origin };
        message::send(channel, &offer, &[], deadline).map_err(link(Step::Offered))?;
        message::receive(channel, "accept", deadline).map_err(link(Step::Offered))?;
        reached(Step::Offered);
        Ok(pid)
    }
}
