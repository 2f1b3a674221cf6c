//! Which try is done: all of it follows from the seed and the try's number.

use serde::Deserialize;
use serde::Serialize;

use crate::plan::Actor;
use crate::plan::Fault;
use crate::plan::Place;

/// How the machine gets to its next VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Carrier {
    /// To another process.
    Socket,
    /// To another program of the same process.
    Exec,
}

/// Who is struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whom {
    /// The process that passes the place.
    Itself,
    /// The process that ran the guest when the update was asked for.
    Predecessor,
    /// The process that is to run it.
    Successor,
    /// Both of them.
    Both,
    /// The daemon that keeps the machine; it is started again.
    Daemon,
    /// The process in which the program before goes on, once the one that it was in executes the next.
    Aside,
}

/// Where or when it is struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// As soon as a process is there.
    At {
        /// Who passes there.
        actor: Actor,
        /// The place.
        place: Place,
    },
    /// So long after the update was asked for, in microseconds.
    After(u64),
}

/// A try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Try {
    /// Its number.
    pub index: u64,
    /// How many vCPUs the machine has.
    pub vcpus: u32,
    /// A daemon keeps it.
    pub kept: bool,
    /// How the machine goes.
    pub carrier: Carrier,
    /// The VMM starts its successor itself; else it is given one. By exec that is always so.
    pub starts: bool,
    /// What is done.
    pub fault: Fault,
    /// To whom.
    pub whom: Whom,
    /// When.
    pub when: When,
    /// How long one that is stopped stays so, as a share of the time-outs, in percent.
    pub stop_percent: u64,
    /// Where the next program fails by itself, for the way back.
    pub next_fails: Place,
}

impl Try {
    /// Whether a machine ends by this, since the process that runs its guest is killed while it does. `None` if that depends
    /// on the moment.
    #[must_use]
    pub fn loses(&self) -> Option<bool> {
        let When::At { actor, place } = self.when else { return None };
        let named = |names: &[&str]| names.contains(&place.name());
        Some(match (self.fault, self.whom, actor) {
            (Fault::Stop, ..) | (_, _, Actor::Rehearsed) => false,
            (_, Whom::Both, _) | (_, _, Actor::Rehearsal) => true,
            (_, Whom::Predecessor, _) => named(&["started", "received", "attached", "warm"]),
            (_, _, Actor::Predecessor) => named(&["connected", "offered", "warm", "paused", "saved"]),
            _ => named(&["running", "settled"]),
        })
    }
}

/// A place, and what is done there.
type Spot = (Carrier, Actor, Place, Fault, Whom);

/// Every place there is, with every fault.
#[must_use]
pub fn spots() -> Vec<Spot> {
    let actors = [
        (Carrier::Socket, Actor::Predecessor),
        (Carrier::Socket, Actor::Successor),
        (Carrier::Exec, Actor::Rehearsal),
        (Carrier::Exec, Actor::Rehearsed),
        (Carrier::Exec, Actor::Predecessor),
        (Carrier::Exec, Actor::Next),
        (Carrier::Exec, Actor::Back),
    ];
    let mut spots = Vec::new();
    for (carrier, actor) in actors {
        for place in actor.places() {
            let faults = [Fault::Kill, Fault::Stop];
            spots.extend(faults.map(|fault| (carrier, actor, place, fault, Whom::Itself)));
            if actor == Actor::Successor {
                let others = [Whom::Predecessor, Whom::Both];
                spots.extend(others.map(|whom| (carrier, actor, place, Fault::Kill, whom)));
            }
        }
    }
    spots
}

/// Every place, in an order of the seed's own.
#[must_use]
pub fn walk(seed: u64) -> Vec<Spot> {
    let mut spots = spots();
    let mut random = Random::of(seed, u64::MAX);
    for last in (1..spots.len()).rev() {
        spots.swap(last, random.below_usize(last + 1));
    }
    spots
}

/// The try of this number.
#[must_use]
pub fn choose(seed: u64, walk: &[Spot], index: u64) -> Try {
    let mut random = Random::of(seed, index);
    let in_walk = usize::try_from(index).ok().and_then(|index| walk.get(index)).copied();
    let is_spot = random.below(2) == 0;
    let any = walk[random.below_usize(walk.len())];
    let (carrier, fault, whom, when) = match in_walk.or(is_spot.then_some(any)) {
        // Whoever is stopped is waited for: of those that come again and again most are killed.
        Some((_, _, _, Fault::Stop, _)) if in_walk.is_none() && random.below(4) > 0 => moment(&mut random),
        Some((carrier, actor, place, fault, whom)) => (carrier, fault, whom, When::At { actor, place }),
        None => moment(&mut random),
    };
    let kept = is_kept(index);
    // That alone: a machine whose VMM dies while nobody keeps it is lost.
    let is_daemon = kept && matches!(when, When::After(_)) && random.below(4) == 0;
    let (fault, whom) = if is_daemon { (Fault::Kill, Whom::Daemon) } else { (fault, whom) };
    Try {
        index,
        kept,
        vcpus: if index.is_multiple_of(2) { 1 } else { 2 },
        carrier,
        starts: carrier == Carrier::Exec || random.below(3) == 0,
        fault,
        whom,
        when,
        // In the walk, longer than anybody waits.
        stop_percent: if in_walk.is_some() { 150 } else { 20 + random.below(180) },
        next_fails: if random.below(2) == 0 {
            Place::Started
        } else {
            Place::At(machine::update::Step::Claimed)
        },
    }
}

/// Half of the machines are kept, many tries in a row: so they are used again.
const fn is_kept(index: u64) -> bool {
    (index / 64) % 2 == 1
}

/// How long after the request most of what happens in an update is over, in microseconds. Shorter spans meet the places
/// at its start more often.
const SPANS_US: [u64; 4] = [3_000, 12_000, 25_000, 50_000];

fn moment(random: &mut Random) -> (Carrier, Fault, Whom, When) {
    let carrier = if random.below(3) == 0 { Carrier::Exec } else { Carrier::Socket };
    let fault = if random.below(12) == 0 { Fault::Stop } else { Fault::Kill };
    let whom = match (carrier, random.below(8)) {
        (_, 0) if fault == Fault::Kill => Whom::Both,
        (Carrier::Exec, 1..=3) => Whom::Aside,
        (_, 1..=5) => Whom::Successor,
        _ => Whom::Predecessor,
    };
    let whom = if carrier == Carrier::Exec && whom == Whom::Successor { Whom::Predecessor } else { whom };
    let span = SPANS_US[random.below_usize(SPANS_US.len())];
    (carrier, fault, whom, When::After(random.below(span)))
}

/// Numbers that look random and are not: splitmix64.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn of(seed: u64, index: u64) -> Self {
        let mut random = Self(seed ^ index.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        // Neighbours begin far apart.
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    fn below_usize(&mut self, end: usize) -> usize {
        usize::try_from(self.below(end as u64)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_makes_the_same_choices_and_another_seed_others() {
        let tries = |seed| (0..500).map(|index| choose(seed, &walk(seed), index)).collect::<Vec<_>>();
        assert_eq!(tries(7), tries(7));
        assert_ne!(tries(7), tries(8));
    }

    #[test]
    fn the_walk_goes_by_each_place_once_with_each_fault() {
        let key = |spot: &Spot| format!("{spot:?}");
        let walked: BTreeSet<String> = walk(1).iter().map(key).collect();
        assert_eq!(walked.len(), walk(1).len());
        assert_eq!(walked, spots().iter().map(key).collect());
        for (index, spot) in (0..).zip(walk(1)) {
            let chosen = choose(1, &walk(1), index);
            assert_eq!(chosen.when, When::At { actor: spot.1, place: spot.2 });
            assert_eq!((chosen.carrier, chosen.fault, chosen.whom), (spot.0, spot.3, spot.4));
        }
    }

    #[test]
    fn what_comes_after_the_walk_strikes_everybody_at_places_and_at_moments() {
        let walk = walk(3);
        let tries: Vec<Try> = (1000..6000).map(|index| choose(3, &walk, index)).collect();
        let all = [Whom::Itself, Whom::Predecessor, Whom::Successor, Whom::Both, Whom::Aside, Whom::Daemon];
        for whom in all {
            assert!(tries.iter().any(|one| one.whom == whom), "{whom:?}");
        }
        let at_moments = tries.iter().filter(|one| matches!(one.when, When::After(_))).count();
        assert!((1500..4500).contains(&at_moments), "{at_moments}");
        let stops = tries.iter().filter(|one| one.fault == Fault::Stop).count();
        assert!((200..1500).contains(&stops), "{stops}");
    }

    #[test]
    fn only_a_kill_of_who_runs_the_guest_loses_a_machine() {
        let walk = walk(3);
        let lost = |actor: Actor, place: &str, whom: Whom| {
            let spot = walk.iter().position(|spot| {
                (spot.1, spot.2.name(), spot.3, spot.4) == (actor, place, Fault::Kill, whom)
            });
            choose(3, &walk, spot.expect("it is there") as u64).loses()
        };
        assert_eq!(lost(Actor::Predecessor, "saved", Whom::Itself), Some(true));
        assert_eq!(lost(Actor::Predecessor, "sealed", Whom::Itself), Some(false));
        assert_eq!(lost(Actor::Successor, "loaded", Whom::Itself), Some(false));
        assert_eq!(lost(Actor::Successor, "running", Whom::Itself), Some(true));
        assert_eq!(lost(Actor::Successor, "warm", Whom::Predecessor), Some(true));
        assert_eq!(lost(Actor::Successor, "claimed", Whom::Predecessor), Some(false));
    }
}
