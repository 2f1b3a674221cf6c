//! What is said over the agents' socket: a line of JSON each, some with descriptors.

use serde::Deserialize;
use serde::Serialize;

use crate::remains::About;

/// Version of what is ours: all but SUBSCRIBE, READY, CLAIM and START_PRESERVATION, which are the kernel community's luo-agent's.
pub(crate) const VERSION: u32 = 1;

/// What a peer asks for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(tag = "cmd", rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum Command {
    /// This agent takes part in live updates.
    Subscribe {
        /// What it is called.
        id: String,
    },
    /// It has preserved what it wants to, in the session that it was given.
    Ready,
    /// After the update: it wants its session back.
    Claim {
        /// What it was called.
        id: String,
    },
    /// It has all that it wants of that session.
    Done {
        /// What it was called.
        id: String,
    },
    /// An operator wants to have everything preserved, as long as this connection stands.
    Preserve {
        /// How long agents may take.
        timeout_ms: u64,
    },
    /// There is no update after all.
    Release,
    /// Give /dev/liveupdate, which has one user at a time.
    Device,
    /// How is this daemon?
    Status,
    /// Say when this machine is kept.
    Keep {
        /// Its name.
        id: String,
    },
    /// Another tideoverd of this version wants to take over.
    Handover {
        /// Its version.
        version: u32,
    },
    /// It has all of it.
    Taken,
}

/// What this daemon says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum Event {
    Status {
        version: u32,
        pid: u32,
        /// Machines that are kept, by name.
        kept: Vec<String>,
        /// Those that are here and that no process has at the moment.
        alone: Vec<String>,
        /// How many names there was no room for in the line.
        #[serde(default)]
        more: usize,
        /// VMMs that have died since it began.
        deaths: u64,
        /// Agents that have subscribed.
        agents: usize,
    },
    /// With it comes a session of the kernel's.
    StartPreservation,
    /// There is no update: the session is gone.
    CancelPreservation,
    /// These agents are ready, and their sessions come with this; those are not.
    Preserved {
        ready: Vec<String>,
        missing: Vec<String>,
    },
    /// A session of the kernel before comes with this.
    Session {
        id: String,
    },
    /// /dev/liveupdate comes with this.
    Device,
    Kept {
        id: String,
    },
    /// A peer, with its connection.
    Peer {
        subscribed: Option<String>,
    },
    /// A machine, with its descriptors: its note's, its regions', its vCPUs'.
    Machine {
        id: String,
        about: Box<About>,
    },
    /// All was handed over. With it comes the socket that agents come to.
    End,
    Error {
        why: String,
    },
}
