//! Carries a machine over a restart of its service: what it takes to go on is in the service manager's file descriptor store.
//!
//! A VMM that systemd has started as a service gives its machine's regions and a *note* to the store ([`Deposit`]) before the
//! guest runs, so that they are there whenever it ends. systemd starts the service's next process with copies ([`take`]).
//!
//! ```text
//! VMM: pushes regions and note, runs the guest
//!   restart: pushes a note of what is now; pauses, saves, seals; writes the seal into that note; ends
//!   or it dies
//! next process: takes regions and note, and has the machine in its custody ([`custody::Kept`])
//!   sealed: it is the successor, claims, loads, runs, and pushes a note of its own
//!   not sealed: it holds the memory
//! ```
//!
//! A note is not replaced where it stands while it is the only one: it is pushed beside the last one, under the next number, and
//! that is taken out then. So there is a whole one at every moment, and the newest that can be read counts.
//!
//! The manager does not answer. [`fdpass::systemd`] says how it is found out that there is no room; that is so before the guest
//! stands still.
#![forbid(unsafe_code)]

mod deposit;
mod found;

use fdpass::systemd::StoreName;
use fdpass::systemd::StoreNameError;
use machine::update::Capabilities;

pub use deposit::Deposit;
pub use deposit::Told;
pub use found::Found;
pub use found::FoundError;
pub use found::take;

/// What this carrier can do.
pub const CAPABILITIES: Capabilities =
    Capabilities { other_descriptors: false, overlap: false, survives_crash: true, survives_kexec: false };

/// What the name of everything in the store begins with that is a machine's.
const PREFIX: &str = "tideover/";
/// What a note's number stands behind.
const NOTE: &str = "note.";

/// What in the store is a machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Item {
    /// A note: the one with the highest number counts.
    Note(u64),
    /// A region; 0 is metadata.
    Region(usize),
}

impl Item {
    fn name(self, machine: &str) -> Result<StoreName, StoreNameError> {
        StoreName::new(&match self {
            Self::Note(number) => format!("{PREFIX}{machine}/{NOTE}{number}"),
            Self::Region(index) => format!("{PREFIX}{machine}/{index}"),
        })
    }

    /// What is called so; `None` if that is not of this machine.
    fn parse(name: &str, machine: &str) -> Option<Self> {
        let item = name.strip_prefix(PREFIX)?.strip_prefix(machine)?.strip_prefix('/')?;
        match item.strip_prefix(NOTE) {
            Some(number) => number.parse().ok().map(Self::Note),
            None => item.parse().ok().map(Self::Region),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_the_store_is_known_by_its_name_and_its_machine() {
        for item in [Item::Note(0), Item::Note(u64::MAX), Item::Region(0), Item::Region(255)] {
            let name = item.name("web-1.a_b").unwrap();
            assert_eq!(Item::parse(name.as_str(), "web-1.a_b"), Some(item), "{name}");
            assert_eq!(Item::parse(name.as_str(), "web-1"), None, "{name}");
        }
        for other in [
            "stored",
            "tideover/m/",
            "tideover/m/note.",
            "tideover/m/note.x",
            "tideover/m/-1",
            "tideover/m",
            "m/0",
        ] {
            assert_eq!(Item::parse(other, "m"), None, "{other}");
        }
        assert!(Item::Region(0).name("a:b").is_err());
    }
}
