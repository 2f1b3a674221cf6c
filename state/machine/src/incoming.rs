//! The machine while another process runs it, or did.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use abi::Malformed;
use abi::Problem;
use abi::arena::Header;
use abi::arena::OWNERSHIP_ADDRESS;
use abi::arena::OwnershipWord;
use abi::luo::SessionName;
use abi::regions;
use abi::regions::RegionEntry;
use abi::state::StateName;
use abi::vm::Identity;
use gmem::Inode;
use kho::Kho;
use luo::File;
use luo::Luo;
use luo::Token;
use pages::PAGE_SIZE;
use pages::PageRange;
use region::Arena;
use region::Mapping;
use region::OutOfRange;
use region::Region;
use region::RegionError;
use region::liveness;
use region::liveness::LivenessError;
use region::liveness::LivenessLock;
use thiserror::Error;

use crate::CreateError;
use crate::Nonce;
use crate::handlers::StateFile;
use crate::handlers::VmFile;
use crate::layout;
use crate::layout::MemoryPlace;
use crate::machine;
use crate::machine::Machine;
use crate::machine::Memory;
use crate::ownership;
use crate::ownership::Ownership;
use crate::ownership::OwnershipError;

/// A region as the other side hands it over: an allegation.
#[derive(Debug)]
pub struct OfferedRegion {
    /// Its descriptor.
    pub fd: OwnedFd,
    /// Its size, as the other side says.
    pub len_bytes: u64,
}

/// Why an arena was not accepted.
#[derive(Debug, Error)]
pub enum AttachError {
    /// No regions came.
    #[error("no region was handed over")]
    NoRegions,
    /// A region is not what it should be.
    #[error("cannot take over the machine's memory")]
    Region(#[source] RegionError),
    /// Region 0 is too small for a header.
    #[error("region 0 is too small")]
    TooSmall(#[source] OutOfRange),
    /// The metadata breaks a rule.
    #[error("the machine's metadata cannot be read")]
    Malformed(#[source] Malformed),
    /// The sessions break a rule, or are of kinds that this version does not know.
    #[error("the machine's session cannot be read")]
    Luo(#[source] luo::AttachError),
    /// The regions are not those that the metadata tells of.
    #[error("the metadata tells of {told} regions, {came} came")]
    Regions {
        /// In the region table.
        told: usize,
        /// Handed over.
        came: usize,
    },
    /// A region is not where or how large the metadata says.
    #[error("region {index} has {came} bytes, the metadata says {told}")]
    Size {
        /// Its number.
        index: usize,
        /// In the region table, in bytes.
        told: u64,
        /// In truth, in bytes.
        came: u64,
    },
    /// A region is another file than the one that the metadata tells of: another machine's, or out of order.
    #[error("region {index} is the file {came}, the metadata says {told}")]
    File {
        /// Its number.
        index: usize,
        /// Inode number in the region table.
        told: u64,
        /// In truth.
        came: u64,
    },
    /// The arena holds no session, or several.
    #[error("the arena holds {sessions} sessions, and should hold the machine's alone")]
    Sessions {
        /// How many.
        sessions: usize,
    },
    /// A file could not be made again.
    #[error("cannot retrieve the machine's files")]
    Retrieve(#[source] luo::RetrieveError),
    /// A token names a file of another kind than it should, or is none of a machine's.
    #[error("{token:?} of session {session} is not what its number says")]
    Kind {
        /// The session.
        session: SessionName,
        /// The token.
        token: Token,
    },
    /// Two tokens name one thing: another one would be lost.
    #[error("{token:?} of session {session} is what another token names already")]
    Repeated {
        /// The session.
        session: SessionName,
        /// The token.
        token: Token,
    },
    /// A lock could not be taken.
    #[error("cannot take part in the machine's hand-over")]
    Hold(#[source] Box<CreateError>),
}

/// Why a machine was not claimed.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// It is not sealed, or not by the seal that was told, or somebody else claimed it.
    #[error("cannot claim the machine")]
    Ownership(#[source] OwnershipError),
    /// Its sealed state cannot be read.
    #[error("cannot read the machine's sealed state")]
    Attach(#[source] AttachError),
    /// Nothing was saved for a vCPU or device, or at another instant than this seal's.
    #[error("the state of {name} was not saved at this seal")]
    Stale {
        /// What it is the state of.
        name: StateName,
    },
}

/// A machine that another process runs, checked and mapped here. Nothing of it may be written.
#[derive(Debug)]
pub struct Incoming {
    arena: Arena,
    places: Vec<MemoryPlace>,
    ownership: Ownership,
    nonce: Nonce,
    alive: LivenessLock,
    parts: Parts,
}

/// What a session of a machine holds.
#[derive(Debug)]
struct Parts {
    name: SessionName,
    vm: Arc<VmFile>,
    memories: Vec<Arc<Inode>>,
    states: Vec<Arc<StateFile>>,
}

impl Incoming {
    /// Checks regions that came from another process, and maps them: region 0 first, then the others in the order
    /// of the region table.
    ///
    /// Guest memory bears no mark of whose it is, since every byte of it is the guest's. Which file it is, by its
    /// inode number, stands in the region table.
    ///
    /// # Errors
    /// [`AttachError`]; then nothing stays mapped, and nothing was written.
    pub fn attach(offered: Vec<OfferedRegion>) -> Result<Self, AttachError> {
        let came = offered.len();
        let mut offered = offered.into_iter();
        let first = offered.next().ok_or(AttachError::NoRegions)?;
        let region0 = accept("metadata", first)?;
        // Without, the same pages come one by one, while the guest stands still.
        let _ = region0.prefault_first(layout::HOT_BYTES);
        let word = region0.word(OWNERSHIP_ADDRESS).map_err(AttachError::TooSmall)?;
        let mut arena = Arena::new(Arc::clone(&region0));
        let entries = region_table(&arena, came)?;
        if entries.len() != came {
            return Err(AttachError::Regions { told: entries.len(), came });
        }
        check_region(0, &entries[0], &region0)?;
        for ((index, entry), region) in (1..).zip(&entries[1..]).zip(offered) {
            let mapping = accept("memory", region)?;
            check_region(index, entry, &mapping)?;
            // The table was checked for overlap when it was read.
            let _ = arena.place(entry.range, mapping);
        }
        let place = |entry: &RegionEntry| MemoryPlace { frames: entry.range, page_bytes: entry.page_bytes };
        let places = entries.iter().map(place).collect();
        let (_, _, parts) = read_session(&arena, Vec::new())?;
        let (nonce, alive) =
            machine::hold(region0.region()).map_err(|error| AttachError::Hold(Box::new(error)))?;
        Ok(Self { arena, places, ownership: Ownership::new(word), nonce, alive, parts })
    }

    /// The machine's name.
    pub fn name(&self) -> SessionName {
        self.parts.name
    }

    /// The machine's identity.
    pub fn identity(&self) -> Identity {
        self.parts.vm.record().identity
    }

    /// How many vCPUs it has.
    pub fn vcpus(&self) -> u64 {
        self.parts.vm.record().vcpus
    }

    /// Its guest memory, mapped here. The predecessor's guest runs in it.
    pub fn memories(&self) -> &[Arc<Inode>] {
        &self.parts.memories
    }

    /// Names of the states that the seal will hold.
    pub fn state_names(&self) -> impl Iterator<Item = StateName> + '_ {
        self.parts.states.iter().map(|state| state.name())
    }

    /// The ownership word as it is now.
    ///
    /// # Errors
    /// [`Malformed`] if it is none.
    pub fn ownership(&self) -> Result<OwnershipWord, Malformed> {
        self.ownership.read()
    }

    /// Does the process that the ownership word names still live?
    ///
    /// # Errors
    /// [`LivenessError`] if the kernel does not say.
    pub fn owner_lives(&self, word: OwnershipWord) -> Result<bool, LivenessError> {
        liveness::is_held(self.arena.regions()[0].mapping.region(), word.nonce().get())
    }

    /// Claims the machine as it was sealed at epoch `sealed`, and reads its state.
    ///
    /// # Errors
    /// [`ClaimError`]. The predecessor may take the machine back, or has.
    pub fn claim(self, sealed: u32) -> Result<Claimed, ClaimError> {
        let claimed = self.ownership.transition(|found| ownership::claim(found, sealed, self.nonce));
        let word = claimed.map_err(ClaimError::Ownership)?;
        let (kho, luo, parts) = read_session(&self.arena, self.parts.memories).map_err(ClaimError::Attach)?;
        let mut states = BTreeMap::new();
        for file in &parts.states {
            let saved = file.saved().take().filter(|saved| saved.epoch == sealed);
            let name = file.name();
            states.insert(name, saved.ok_or(ClaimError::Stale { name })?.bytes);
        }
        let memories = parts.memories.iter().zip(&self.places[1..]);
        let machine = Machine {
            name: parts.name,
            arena: self.arena,
            kho,
            luo,
            ownership: self.ownership,
            word,
            vm: parts.vm,
            memories: memories
                .map(|(inode, place)| Memory {
                    inode: Arc::clone(inode),
                    page_bytes: place.page_bytes,
                    account: None,
                })
                .collect(),
            places: self.places,
            states: parts.states,
            settled: false,
            _alive: self.alive,
        };
        Ok(Claimed { machine, states })
    }
}

/// A machine that stands still, and whose state this process alone loads.
#[derive(Debug)]
pub struct Claimed {
    machine: Machine,
    states: BTreeMap<StateName, Vec<u8>>,
}

impl Claimed {
    /// Its guest memory.
    pub fn memories(&self) -> &[Memory] {
        self.machine.memories()
    }

    /// The states that were sealed.
    pub fn states(&self) -> &BTreeMap<StateName, Vec<u8>> {
        &self.states
    }

    /// Takes the machine over: the point of no return. The guest may run here from now on, and the session that
    /// was received is to be ended by [`Machine::settle`] once it does.
    ///
    /// # Errors
    /// [`OwnershipError`] if the predecessor took the machine back: the guest must not run here.
    pub fn run(self) -> Result<Machine, OwnershipError> {
        let mut machine = self.machine;
        let claimed = machine.word;
        machine.word = machine.ownership.transition(|found| ownership::run(found, claimed))?;
        Ok(machine)
    }
}

fn accept(name: &str, offered: OfferedRegion) -> Result<Arc<Mapping>, AttachError> {
    let region = Region::accept(name, offered.fd, offered.len_bytes).map_err(AttachError::Region)?;
    Ok(Arc::new(region.map().map_err(AttachError::Region)?))
}

/// The region table in region 0. `came` regions were handed over.
fn region_table(arena: &Arena, came: usize) -> Result<Vec<RegionEntry>, AttachError> {
    let header = Header::read(arena).map_err(AttachError::Malformed)?;
    let told_bytes = header.frames() * PAGE_SIZE;
    let came_bytes = arena.regions()[0].mapping.len_bytes();
    if told_bytes != came_bytes {
        return Err(AttachError::Size { index: 0, told: told_bytes, came: came_bytes });
    }
    let tree = kho::Tree::read(arena).map_err(AttachError::Malformed)?;
    let table = tree.fdt.subtree(&regions::SUBTREE).ok_or(AttachError::Regions { told: 0, came })?;
    let entries = regions::read(arena, table.data).map_err(AttachError::Malformed)?;
    // It stays where it is from life to life. Were its frames not marked, this life would give them out.
    let frames =
        PageRange::of_bytes(table.data, (regions::encode(&entries).len() as u64).next_multiple_of(PAGE_SIZE));
    if frames.is_ok_and(|frames| frames.pages().all(|frame| tree.blocks.contains_key(&frame.get()))) {
        return Ok(entries);
    }
    Err(AttachError::Malformed(Malformed {
        format: regions::FORMAT.compatible,
        address: table.data,
        field: "frames",
        problem: Problem::Structure("are not preserved"),
    }))
}

fn check_region(index: usize, entry: &RegionEntry, mapping: &Mapping) -> Result<(), AttachError> {
    let (told, came) = (entry.range.len_bytes(), mapping.len_bytes());
    if told != came {
        return Err(AttachError::Size { index, told, came });
    }
    let (told, came) = (entry.file, mapping.region().file_number().map_err(AttachError::Region)?);
    if told == came { Ok(()) } else { Err(AttachError::File { index, told, came }) }
}

/// Reads the machine's session as it is published now.
fn read_session(arena: &Arena, known: Vec<Arc<Inode>>) -> Result<(Kho, Luo, Parts), AttachError> {
    let mut kho = Kho::attach(Box::new(arena.clone())).map_err(AttachError::Malformed)?;
    let mut luo = Luo::attach(&kho, machine::handlers(arena, known)).map_err(AttachError::Luo)?;
    let sessions: Vec<SessionName> = luo.incoming_sessions().collect();
    let [name] = sessions[..] else {
        return Err(AttachError::Sessions { sessions: sessions.len() });
    };
    let mut memories: Vec<Arc<Inode>> = Vec::new();
    let mut states: Vec<Arc<StateFile>> = Vec::new();
    for token in luo.tokens(name).collect::<Vec<_>>() {
        let kind = AttachError::Kind { session: name, token };
        let repeated = if layout::is_memory_token(token) {
            let inode = retrieve::<Inode>(&mut luo, &mut kho, name, token)?.ok_or(kind)?;
            let repeated = memories.iter().any(|other| other.frames() == inode.frames());
            memories.push(inode);
            repeated
        } else if layout::is_state_token(token) {
            let state = retrieve::<StateFile>(&mut luo, &mut kho, name, token)?.ok_or(kind)?;
            let repeated = states.iter().any(|other| other.name() == state.name());
            states.push(state);
            repeated
        } else if token == layout::VM_TOKEN {
            false
        } else {
            // A file that is passed over would be missed by nobody until the guest runs without it.
            return Err(kind);
        };
        if repeated {
            return Err(AttachError::Repeated { session: name, token });
        }
    }
    let token = layout::VM_TOKEN;
    let kind = AttachError::Kind { session: name, token };
    let vm = retrieve::<VmFile>(&mut luo, &mut kho, name, token)?.ok_or(kind)?;
    // Region 0 is no guest memory; each other region is one, and no two are the same.
    let (told, came) = (memories.len() + 1, arena.regions().len());
    if told != came {
        return Err(AttachError::Regions { told, came });
    }
    // By place, so that the n-th memory is the n-th region.
    memories.sort_by_key(|inode| inode.frames().start());
    Ok((kho, luo, Parts { name, vm, memories, states }))
}

fn retrieve<T: Send + Sync + 'static>(
    luo: &mut Luo,
    kho: &mut Kho,
    name: SessionName,
    token: Token,
) -> Result<Option<Arc<T>>, AttachError> {
    let file: File = luo.retrieve(kho, name, token).map_err(AttachError::Retrieve)?;
    Ok(file.downcast::<T>().ok())
}
