//! Every order of the steps of a machine's processes, with a crash or a stall at each: who may run the guest?
//!
//! The first process runs the machine. Each *attempt* at an update has a successor of its own, and an attempt
//! may be made by whoever runs the machine then. So three attempts cover those that go back and are tried
//! again, updates that follow each other, and both in turn. A swap of the ownership word is two steps, a
//! load and a compare-and-swap of what was loaded; a message waits until its reader is ready; a timeout fires
//! whenever it likes. A process that stalls is one whose next step comes later than everybody else's.
//!
//! The transitions are those of `tideover_machine::ownership`. That the model would notice a mistake in
//! them is shown by making some.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::collections::HashSet;

use abi::arena::OwnershipState;
use stateright::Checker;
use stateright::HasDiscoveries;
use stateright::Model;
use stateright::Property;
use tideover_machine::Nonce;
use tideover_machine::OwnershipWord;
use tideover_machine::ownership;
use tideover_machine::ownership::Lost;

/// Number of a process: 0 runs the machine first, n is the successor of attempt n.
type Id = usize;

const ATTEMPTS: usize = 3;

fn nonce(id: Id) -> Nonce {
    Nonce::new(u32::try_from(id + 1).unwrap()).unwrap()
}

/// The transitions, so that a test can put a mistake in the place of one.
#[derive(Clone)]
struct Protocol {
    seal: fn(OwnershipWord, OwnershipWord) -> Result<OwnershipWord, Lost>,
    claim: fn(OwnershipWord, u32, Nonce) -> Result<OwnershipWord, Lost>,
    claim_again: fn(OwnershipWord, OwnershipWord, Nonce) -> Result<OwnershipWord, Lost>,
    recover: fn(OwnershipWord, OwnershipWord, Nonce) -> Result<OwnershipWord, Lost>,
    run: fn(OwnershipWord, OwnershipWord) -> Result<OwnershipWord, Lost>,
    take_back: fn(OwnershipWord, OwnershipWord) -> Result<OwnershipWord, Lost>,
    /// Is this transition a compare-and-swap? Else it is a store.
    swaps: fn(&Verb) -> bool,
}

const PROTOCOL: Protocol = Protocol {
    seal: ownership::seal,
    claim: ownership::claim,
    claim_again: ownership::claim_again,
    recover: ownership::recover,
    run: ownership::run,
    take_back: ownership::take_back,
    swaps: |_| true,
};

/// A transition that a process wants to make, and what it knows of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Verb {
    Seal { running: OwnershipWord },
    Claim { sealed: u32 },
    ClaimAgain { dead: OwnershipWord },
    Recover { dead: OwnershipWord },
    Run { claimed: OwnershipWord },
    TakeBack { sealed: OwnershipWord },
}

impl Protocol {
    fn next(&self, verb: &Verb, found: OwnershipWord, id: Id) -> Result<OwnershipWord, Lost> {
        match *verb {
            Verb::Seal { running } => (self.seal)(found, running),
            Verb::Claim { sealed } => (self.claim)(found, sealed, nonce(id)),
            Verb::ClaimAgain { dead } => (self.claim_again)(found, dead, nonce(id)),
            Verb::Recover { dead } => (self.recover)(found, dead, nonce(id)),
            Verb::Run { claimed } => (self.run)(found, claimed),
            Verb::TakeBack { sealed } => (self.take_back)(found, sealed),
        }
    }
}

/// Where a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Process {
    /// Not started yet.
    Absent,
    /// A successor that was not told of a seal.
    Waiting,
    /// Before or in the midst of a transition; `found` is the word that was loaded for it.
    Swapping {
        verb: Verb,
        found: Option<OwnershipWord>,
    },
    /// It claimed the machine and loads its state.
    Claimed {
        word: OwnershipWord,
    },
    /// The guest runs here.
    Running {
        word: OwnershipWord,
    },
    /// The guest was stopped, and its state is being written.
    Stopped {
        word: OwnershipWord,
    },
    /// It sealed the machine, and has not told its successor.
    Sealed {
        word: OwnershipWord,
    },
    /// It sealed the machine and told its successor.
    Told {
        word: OwnershipWord,
    },
    /// It has nothing to do with the machine any more.
    Gone,
    Crashed,
}

impl Process {
    fn runs_the_guest(&self) -> bool {
        matches!(self, Self::Running { .. })
    }

    fn writes_the_tree(&self) -> bool {
        matches!(
            self,
            Self::Running { .. } | Self::Stopped { .. } | Self::Swapping { verb: Verb::Seal { .. }, .. }
        )
    }

    /// It gave the machine up and does not know yet what came of that.
    fn may_go_back(&self) -> bool {
        matches!(
            self,
            Self::Sealed { .. } | Self::Told { .. } | Self::Swapping { verb: Verb::TakeBack { .. }, .. }
        )
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    word: OwnershipWord,
    /// Every word that there was.
    words: Vec<OwnershipWord>,
    processes: Vec<Process>,
    /// The seal's epoch that the successor of each attempt was told, read or not.
    told: Vec<Option<u32>>,
    /// Attempts begun.
    attempts: usize,
    /// Who sealed the machine last.
    sealer: Id,
    /// The attempt that the last seal was made for.
    sealed_for: Id,
    /// Who claimed the machine without being the one that it was sealed for, while its sealer lived; or recovered it, while its
    /// owner did.
    stranger: Option<Id>,
}

impl World {
    /// The process that the word names is dead.
    fn holder_is_dead(&self, word: OwnershipWord) -> bool {
        let holder = (0..self.processes.len()).find(|id| nonce(*id) == word.nonce());
        holder.is_some_and(|id| self.processes[id] == Process::Crashed)
    }

    /// What whoever keeps the memory can have another process do: nobody has the machine, or who has it is dead.
    fn to_entrust(&self) -> Option<Verb> {
        let (word, dead) = (self.word, self.holder_is_dead(self.word));
        let sealer_is_dead = self.processes[self.sealer] == Process::Crashed;
        let verb = match word.state() {
            OwnershipState::Sealed if sealer_is_dead => Verb::Claim { sealed: word.epoch() },
            OwnershipState::Claimed if sealer_is_dead && dead => Verb::ClaimAgain { dead: word },
            OwnershipState::Running | OwnershipState::Recovering if dead => Verb::Recover { dead: word },
            _ => return None,
        };
        (self.attempts < ATTEMPTS).then_some(verb)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// The next step of what the process is doing.
    Step(Id),
    /// It does not wait any longer.
    TimeOut(Id),
    /// The process hears that its successor runs the machine.
    Hear(Id),
    /// A successor that nobody told finds the machine sealed and its sealer dead.
    Inherit(Id),
    /// Who keeps the memory of a machine whose sealer is dead starts another successor: nobody had it, or who had
    /// claimed it is dead. Or who ran it is.
    Entrust,
    Crash(Id),
}

struct Machine {
    protocol: Protocol,
}

impl Machine {
    fn real() -> Self {
        Self { protocol: PROTOCOL }
    }

    /// What process `id` can do, but for crashing.
    fn own_actions(&self, world: &World, id: Id) -> Vec<Action> {
        match world.processes[id] {
            Process::Absent | Process::Gone | Process::Crashed => vec![],
            Process::Waiting => {
                let step = world.told[id].map(|_| Action::Step(id));
                let orphan = world.word.state() == OwnershipState::Sealed
                    && world.processes[world.sealer] == Process::Crashed;
                let inherit = orphan.then_some(Action::Inherit(id));
                [Some(Action::TimeOut(id)), step, inherit].into_iter().flatten().collect()
            }
            Process::Running { .. } if world.attempts == ATTEMPTS => vec![],
            Process::Told { .. } => {
                let elsewhere = world.processes.iter().any(|other| other.runs_the_guest());
                let hear = elsewhere.then_some(Action::Hear(id));
                [Some(Action::TimeOut(id)), hear].into_iter().flatten().collect()
            }
            _ => vec![Action::Step(id)],
        }
    }

    fn step(&self, world: &mut World, id: Id) {
        world.processes[id] = match world.processes[id] {
            Process::Waiting => {
                let sealed = world.told[id].unwrap();
                Process::Swapping { verb: Verb::Claim { sealed }, found: None }
            }
            Process::Swapping { verb, found: None } => Process::Swapping { verb, found: Some(world.word) },
            Process::Swapping { verb, found: Some(found) } => self.swap(world, id, verb, found),
            Process::Claimed { word } => Process::Swapping { verb: Verb::Run { claimed: word }, found: None },
            Process::Running { word } => {
                // The successor is started and attaches while the guest runs.
                world.attempts += 1;
                world.processes[world.attempts] = Process::Waiting;
                Process::Stopped { word }
            }
            Process::Stopped { word } => {
                Process::Swapping { verb: Verb::Seal { running: word }, found: None }
            }
            Process::Sealed { word } => {
                world.told[world.sealed_for] = Some(word.epoch());
                Process::Told { word }
            }
            other => other,
        };
    }

    /// The second half of a transition.
    fn swap(&self, world: &mut World, id: Id, verb: Verb, found: OwnershipWord) -> Process {
        let Ok(next) = self.protocol.next(&verb, found, id) else {
            return Process::Gone;
        };
        if world.word != found && (self.protocol.swaps)(&verb) {
            return Process::Swapping { verb, found: None };
        }
        world.word = next;
        world.words.push(next);
        match verb {
            Verb::Seal { .. } => {
                world.sealer = id;
                world.sealed_for = world.attempts;
                Process::Sealed { word: next }
            }
            Verb::Claim { .. } | Verb::ClaimAgain { .. } => {
                if world.sealed_for != id && world.processes[world.sealer] != Process::Crashed {
                    world.stranger = Some(id);
                }
                Process::Claimed { word: next }
            }
            Verb::Recover { .. } => {
                if !world.holder_is_dead(found) {
                    world.stranger = Some(id);
                }
                // Nobody is left who could take it back.
                world.sealer = id;
                Process::Claimed { word: next }
            }
            Verb::Run { .. } | Verb::TakeBack { .. } => Process::Running { word: next },
        }
    }

    /// Where process `id` ends if nobody else takes a step from here on.
    fn alone(&self, world: &World, id: Id) -> Process {
        let mut world = world.clone();
        // More than there are steps from a seal to running again, with one swap that has to be tried anew.
        for _ in 0..16 {
            if world.processes[id].runs_the_guest() {
                break;
            }
            let step = Action::Step(id);
            let actions = self.own_actions(&world, id);
            let action = if actions.contains(&step) { Some(step) } else { actions.last().copied() };
            let Some(next) = action.and_then(|action| self.next_state(&world, action)) else { break };
            world = next;
        }
        world.processes[id]
    }

    fn is_final(&self, world: &World) -> bool {
        (0..world.processes.len()).all(|id| self.own_actions(world, id).is_empty())
    }
}

impl Model for Machine {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let word = ownership::first(nonce(0));
        let mut processes = vec![Process::Absent; 1 + ATTEMPTS];
        processes[0] = Process::Running { word };
        vec![World {
            word,
            words: vec![word],
            processes,
            told: vec![None; 1 + ATTEMPTS],
            attempts: 0,
            sealer: 0,
            sealed_for: 0,
            stranger: None,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for (id, process) in world.processes.iter().enumerate() {
            actions.extend(self.own_actions(world, id));
            if !matches!(process, Process::Absent | Process::Gone | Process::Crashed) {
                actions.push(Action::Crash(id));
            }
        }
        if world.to_entrust().is_some() {
            actions.push(Action::Entrust);
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::Step(id) => self.step(&mut world, id),
            Action::TimeOut(id) => {
                world.processes[id] = match world.processes[id] {
                    Process::Told { word } => {
                        Process::Swapping { verb: Verb::TakeBack { sealed: word }, found: None }
                    }
                    _ => Process::Gone,
                };
            }
            Action::Hear(id) => world.processes[id] = Process::Gone,
            Action::Inherit(id) => {
                let sealed = world.word.epoch();
                world.processes[id] = Process::Swapping { verb: Verb::Claim { sealed }, found: None };
            }
            Action::Entrust => {
                let verb = world.to_entrust()?;
                world.attempts += 1;
                world.processes[world.attempts] = Process::Swapping { verb, found: None };
            }
            Action::Crash(id) => world.processes[id] = Process::Crashed,
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        [safety(), progress(), coverage()].into_iter().flatten().collect()
    }
}

const ONE_RUNS: &str = "at most one process runs the guest";
const ONE_WRITES: &str = "at most one process writes the tree, and its nonce is in the word";
const RUNNER_IS_NAMED: &str = "who runs the guest is the nonce in the word, which says that it runs";
const FRESH_WORDS: &str = "no epoch comes back, so no word does";
const NO_STRANGER: &str = "only the successor that a seal was made for claims it, and nobody recovers it, while there is one who lives";
const NO_CRASH_NO_LOSS: &str = "where nobody crashed, exactly one process runs the guest in the end";
const LOSS_IS_THE_OWNERS: &str = "where none runs it in the end, the one that could have has crashed";
const WAY_BACK: &str = "who sealed the machine last gets it back alone, unless another runs it";
const WAY_ON: &str = "a successor that was told of the seal that stands takes over alone";

fn safety() -> Vec<Property<Machine>> {
    fn count(world: &World, is: fn(&Process) -> bool) -> usize {
        world.processes.iter().filter(|process| is(process)).count()
    }
    fn all_named(world: &World, is: fn(&Process) -> bool) -> bool {
        let named = |id: Id| world.word.nonce() == nonce(id) && world.word.state() == OwnershipState::Running;
        world.processes.iter().enumerate().filter(|(_, process)| is(process)).all(|(id, _)| named(id))
    }
    vec![
        Property::<Machine>::always(ONE_RUNS, |_, world| count(world, Process::runs_the_guest) <= 1),
        Property::<Machine>::always(ONE_WRITES, |_, world| {
            count(world, Process::writes_the_tree) <= 1 && all_named(world, Process::writes_the_tree)
        }),
        Property::<Machine>::always(RUNNER_IS_NAMED, |_, world| {
            let word = |process: &Process| match process {
                Process::Running { word } => Some(*word),
                _ => None,
            };
            world.processes.iter().filter_map(word).all(|word| word == world.word)
                && all_named(world, Process::runs_the_guest)
        }),
        Property::<Machine>::always(FRESH_WORDS, |_, world| {
            let mut seen = HashSet::new();
            world.words.iter().all(|word| seen.insert(word.epoch()))
        }),
        Property::<Machine>::always(NO_STRANGER, |_, world| world.stranger.is_none()),
    ]
}

/// All paths are finite, so these are told from single states: from final ones, or by going on from one.
fn progress() -> Vec<Property<Machine>> {
    fn runner(world: &World) -> Option<&Process> {
        world.processes.iter().find(|process| process.runs_the_guest())
    }
    vec![
        Property::<Machine>::always(NO_CRASH_NO_LOSS, |model, world| {
            let crashed = world.processes.contains(&Process::Crashed);
            crashed || !model.is_final(world) || runner(world).is_some()
        }),
        Property::<Machine>::always(LOSS_IS_THE_OWNERS, |model, world| {
            let owner = match world.word.state() {
                OwnershipState::Running => (0..=ATTEMPTS).find(|id| nonce(*id) == world.word.nonce()),
                OwnershipState::Sealed | OwnershipState::Claimed | OwnershipState::Recovering => {
                    Some(world.sealer)
                }
            };
            let owner_crashed = owner.is_some_and(|id| world.processes[id] == Process::Crashed);
            !model.is_final(world) || runner(world).is_some() || owner_crashed
        }),
        Property::<Machine>::always(WAY_BACK, |model, world| {
            let seal_counts = world.word.state() != OwnershipState::Running;
            world.processes.iter().enumerate().filter(|(_, process)| process.may_go_back()).all(|(id, _)| {
                match seal_counts && id == world.sealer {
                    true => model.alone(world, id).runs_the_guest(),
                    false => model.alone(world, id) == Process::Gone,
                }
            })
        }),
        Property::<Machine>::always(WAY_ON, |model, world| {
            let told = |id: Id| match world.processes[id] {
                Process::Waiting => world.told[id],
                Process::Swapping { verb: Verb::Claim { sealed }, .. } => Some(sealed),
                _ => None,
            };
            let stands = |id: &Id| {
                world.word.state() == OwnershipState::Sealed && told(*id) == Some(world.word.epoch())
                    || world.processes[*id] == Process::Claimed { word: world.word }
            };
            (0..=ATTEMPTS).filter(stands).all(|id| model.alone(world, id).runs_the_guest())
        }),
    ]
}

/// The model walks where it was built to walk.
fn coverage() -> Vec<Property<Machine>> {
    fn runs(world: &World, id: Id) -> bool {
        world.processes[id].runs_the_guest()
    }
    vec![
        Property::<Machine>::sometimes("the first attempt goes back and the second succeeds", |_, world| {
            runs(world, 2) && world.words.len() == 7 && world.sealer == 0
        }),
        Property::<Machine>::sometimes("two updates succeed one after the other", |_, world| {
            runs(world, 2) && world.sealer == 1
        }),
        Property::<Machine>::sometimes(
            "a stalled successor still has a word of an attempt before",
            |_, world| {
                matches!(world.processes[1], Process::Swapping { verb: Verb::Claim { .. }, found: Some(found) }
                if world.word.state() == OwnershipState::Sealed && found.epoch() < world.word.epoch())
            },
        ),
        Property::<Machine>::sometimes(
            "a claimant has lost its claim",
            |_, world| matches!(world.processes[1], Process::Claimed { word } if word != world.word),
        ),
        Property::<Machine>::sometimes("a seal is inherited from the dead", |_, world| {
            runs(world, 1) && world.told[1].is_none()
        }),
        Property::<Machine>::sometimes("a claim whose claimant died is made again", |_, world| {
            let states = world.words.windows(2);
            let again =
                |pair: &[OwnershipWord]| pair.iter().all(|word| word.state() == OwnershipState::Claimed);
            states.into_iter().any(again) && runs(world, 3)
        }),
        Property::<Machine>::sometimes("a machine is recovered from one that ran it and died", |_, world| {
            let recovered = |pair: &[OwnershipWord]| {
                pair[0].state() == OwnershipState::Running && pair[1].state() == OwnershipState::Recovering
            };
            world.words.windows(2).any(recovered) && runs(world, world.attempts)
        }),
        Property::<Machine>::sometimes("all three attempts go back", |_, world| {
            runs(world, 0) && world.attempts == ATTEMPTS
        }),
    ]
}

/// R3.3, L2.8.1.
#[test]
fn one_process_runs_the_guest_whatever_crashes_or_stalls() {
    let checker = Machine::real().checker().spawn_bfs().join();
    println!(
        "{} states, {} with repetitions, {} steps deep",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth()
    );
    checker.assert_properties();
}

/// Asserts that a protocol with a mistake breaks `property`.
#[track_caller]
fn assert_broken(protocol: Protocol, property: &'static str) {
    let found = HasDiscoveries::AnyOf([property].into());
    let checker = Machine { protocol }.checker().finish_when(found).spawn_bfs().join();
    let Some(path) = checker.discovery(property) else {
        panic!("{} states, and the mistake was not noticed", checker.unique_state_count());
    };
    println!("broken after {:?}: {property}", path.into_actions());
}

#[test]
fn a_claim_that_ignores_the_epoch_is_noticed() {
    let claim = |found: OwnershipWord, _: u32, claimant| ownership::claim(found, found.epoch(), claimant);
    assert_broken(Protocol { claim, ..PROTOCOL }, NO_STRANGER);
}

#[test]
fn a_take_back_that_leaves_the_epoch_is_noticed() {
    let take_back = |found: OwnershipWord, sealed: OwnershipWord| {
        ownership::take_back(found, sealed)
            .map(|next| OwnershipWord::new(found.epoch(), next.state(), next.nonce()))
    };
    assert_broken(Protocol { take_back, ..PROTOCOL }, FRESH_WORDS);
}

#[test]
fn a_take_back_that_puts_the_word_before_the_seal_back_is_noticed() {
    let take_back = |found: OwnershipWord, sealed: OwnershipWord| {
        let before = |next: OwnershipWord| OwnershipWord::new(sealed.epoch() - 1, next.state(), next.nonce());
        ownership::take_back(found, sealed).map(before)
    };
    assert_broken(Protocol { take_back, ..PROTOCOL }, NO_STRANGER);
}

#[test]
fn a_take_back_from_one_that_runs_is_noticed() {
    let take_back =
        |found: OwnershipWord, sealed: OwnershipWord| Ok(found.next(OwnershipState::Running, sealed.nonce()));
    assert_broken(Protocol { take_back, ..PROTOCOL }, ONE_RUNS);
}

#[test]
fn a_predecessor_that_never_takes_back_a_claimed_machine_is_noticed() {
    let take_back = |found: OwnershipWord, sealed: OwnershipWord| match found == sealed {
        true => ownership::take_back(found, sealed),
        false => Err(ownership::take_back(sealed, found).unwrap_err()),
    };
    assert_broken(Protocol { take_back, ..PROTOCOL }, WAY_BACK);
}

#[test]
fn a_run_by_a_plain_store_is_noticed() {
    assert_broken(Protocol { swaps: |verb| !matches!(verb, Verb::Run { .. }), ..PROTOCOL }, ONE_RUNS);
}

#[test]
fn a_claim_by_a_plain_store_is_noticed() {
    assert_broken(Protocol { swaps: |verb| !matches!(verb, Verb::Claim { .. }), ..PROTOCOL }, ONE_WRITES);
}

#[test]
fn a_take_back_by_a_plain_store_is_noticed() {
    assert_broken(Protocol { swaps: |verb| !matches!(verb, Verb::TakeBack { .. }), ..PROTOCOL }, ONE_RUNS);
}

#[test]
fn a_run_that_does_not_ask_for_its_own_claim_is_noticed() {
    let run = |found: OwnershipWord, claimed: OwnershipWord| {
        Ok(found.next(OwnershipState::Running, claimed.nonce()))
    };
    assert_broken(Protocol { run, ..PROTOCOL }, ONE_RUNS);
}

#[test]
fn a_claim_from_the_dead_that_does_not_look_whose_claim_it_finds_is_noticed() {
    let claim_again =
        |found: OwnershipWord, _: OwnershipWord, claimant| Ok(found.next(OwnershipState::Claimed, claimant));
    assert_broken(Protocol { claim_again, ..PROTOCOL }, ONE_RUNS);
}

#[test]
fn a_recovery_that_does_not_look_whose_machine_it_finds_is_noticed() {
    let recover =
        |found: OwnershipWord, _: OwnershipWord, claimant| Ok(found.next(OwnershipState::Claimed, claimant));
    assert_broken(Protocol { recover, ..PROTOCOL }, ONE_RUNS);
}
