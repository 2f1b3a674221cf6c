//! What is said over the agents' socket: a line of JSON each, some with descriptors.

use serde::Deserialize;
use serde::Serialize;

use crate::remains::About;

/// Version of what is ours.
pub(crate) const VERSION: u32 = 1;

/// What a peer asks for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(tag = "cmd", rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum Command {
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
        /// VMMs that have died since it began.
        deaths: u64,
    },
    Kept {
        id: String,
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
