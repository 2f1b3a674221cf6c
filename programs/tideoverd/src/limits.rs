//! How many machines there is room for.

use rustix::process::Resource;
use rustix::process::Rlimit;
use rustix::process::getrlimit;
use rustix::process::setrlimit;
use tracing::warn;

use crate::agent::MAX_PEERS;

/// Descriptors that are open whatever is kept: log, sockets, peers, and what a moment takes.
const OWN: u64 = 64 + MAX_PEERS as u64;
/// Of a small machine: its connection, its note, two regions and a vCPU.
const OF_A_MACHINE: u64 = 5;
/// Machines that there is to be room for.
const MACHINES: u64 = 1000;

/// Raises the limit of open descriptors as far as this process may, and says for how few machines it is, if so.
pub(crate) fn raise() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
    {
        warn!(%error, "cannot raise the limit of open files");
    }
    let may = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    if may < OWN + MACHINES * OF_A_MACHINE {
        let machines = may.saturating_sub(OWN) / OF_A_MACHINE;
        warn!(
            may,
            machines,
            "few files may be open: for more machines raise the hard limit (LimitNOFILE= in the unit)"
        );
    }
    may
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of one with 56 vCPUs, and six regions.
    const OF_A_LARGE_MACHINE: u64 = 64;

    #[test]
    fn the_unit_leaves_room_for_so_many_machines_and_large_ones() {
        let unit = include_str!("../../../dist/systemd/system/tideoverd.service");
        let limit = unit.lines().find_map(|line| line.strip_prefix("LimitNOFILE=")).unwrap();
        assert!(limit.parse::<u64>().unwrap() >= OWN + MACHINES * OF_A_LARGE_MACHINE);
    }
}
