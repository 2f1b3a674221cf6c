//! The machine while another process runs it, or did.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
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
use abi::regions::RegionTable;
use abi::state::StateName;
use abi::vm::Identity;
use gmem::Inode;
use kho::Kho;
use luo::File;
use luo::Luo;
use luo::Token;
use pages::PAGE_SIZE;
use region::Arena;
use region::Mapping;
use region::OutOfRange;
use region::PageSize;
use region::Region;
use region::RegionError;
use region::Store;
use region::liveness;
use region::liveness::LivenessError;
use region::liveness::LivenessLock;
use region::path;
use thiserror::Error;

use crate::CreateError;
use crate::Nonce;
use crate::foreign::FdError;
use crate::foreign::FdFile;
use crate::foreign::Fds;
use crate::handlers::StateFile;
use crate::layout;
use crate::layout::MemoryPlace;
use crate::machine;
use crate::machine::Machine;
use crate::machine::Memory;
use crate::ownership;
use crate::ownership::Lost;
use crate::ownership::Ownership;
use crate::ownership::OwnershipError;
use crate::vm_file::VmFile;

/// A region as the other side hands it over: an allegation.
#[derive(Debug)]
pub struct OfferedRegion {
    /// Its descriptor.
    pub fd: OwnedFd,
    /// Its size, as the other side says.
    pub len_bytes: u64,
}

/// How regions are known to be those that the region table tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Files {
    /// They are the same files.
    Same,
    /// A kernel made them again, each as the one that the carrier says.
    MadeAgain,
    /// They are the same files, and what else went with the machine is gone with the process that had it.
    LeftBehind,
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
    /// A region has pages of a size that this version does not know.
    #[error("region {index} has pages of {told} bytes, which this version does not know")]
    PageSize {
        /// Its number.
        index: usize,
        /// In the region table, in bytes.
        told: u64,
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
    /// A region's memory comes from elsewhere than the metadata says.
    #[error("region {index} is a {came}, the metadata says {told}")]
    Store {
        /// Its number.
        index: usize,
        /// In the region table.
        told: Store,
        /// In truth.
        came: Store,
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
    /// The descriptors that came beside the regions are not those of the session.
    #[error("the descriptors that go with the machine are not those of its session")]
    Fds(#[source] FdError),
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
    /// It is to be claimed after one that claimed it before, and that one lives.
    #[error("the process that claimed the machine before is alive")]
    ClaimantLives,
    /// Whether who claimed it before lives is not known.
    #[error("cannot tell whether the process that claimed the machine before is alive")]
    Liveness(#[source] LivenessError),
    /// Its sealed state cannot be read.
    #[error("cannot read the machine's sealed state")]
    Attach(#[source] AttachError),
    /// Its region table is another than when it was attached: what is mapped here is not what it tells of.
    #[error("the machine's regions changed while it was handed over")]
    Regions,
    /// The descriptors that go with it are others than when it was attached.
    #[error("the descriptors that go with the machine changed while it was handed over")]
    Fds,
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
    /// The region table, which the mapped regions were held against.
    table: Vec<RegionEntry>,
    ownership: Ownership,
    nonce: Nonce,
    alive: LivenessLock,
    parts: Parts,
    fds: Fds,
    files: Files,
}

/// What a session of a machine holds.
#[derive(Debug)]
struct Parts {
    name: SessionName,
    vm: Arc<VmFile>,
    memories: Vec<Arc<Inode>>,
    states: Vec<Arc<StateFile>>,
    fds: Vec<Arc<FdFile>>,
}

impl Incoming {
    /// Checks regions that came from another process, and maps them: region 0 first, then the others in the order
    /// of the region table. `fds` are the descriptors that go with the machine.
    ///
    /// Guest memory bears no mark of whose it is, since every byte of it is the guest's. Which file it is, by its
    /// inode number, stands in the region table.
    ///
    /// # Errors
    /// [`AttachError`]; then nothing stays mapped, and nothing was written.
    pub fn attach(offered: Vec<OfferedRegion>, fds: Vec<OwnedFd>) -> Result<Self, AttachError> {
        Self::attach_files(offered, fds, Files::Same)
    }

    /// The same of regions that a kernel has made again after a kexec, in the order of the region table: their inode
    /// numbers are others, and that each is the one that it should be is the carrier's word alone. Other descriptors do not
    /// live through a kexec.
    ///
    /// # Errors
    /// As of [`attach`](Self::attach).
    pub fn attach_made_again(offered: Vec<OfferedRegion>) -> Result<Self, AttachError> {
        Self::attach_files(offered, Vec::new(), Files::MadeAgain)
    }

    /// The same of regions that are left of a process that is dead. The descriptors that its session tells of, if it died in
    /// the midst of an update, are gone with it: the session that is made of it here has none.
    ///
    /// # Errors
    /// As of [`attach`](Self::attach).
    pub fn attach_left_behind(offered: Vec<OfferedRegion>) -> Result<Self, AttachError> {
        Self::attach_files(offered, Vec::new(), Files::LeftBehind)
    }

    fn attach_files(
        offered: Vec<OfferedRegion>,
        fds: Vec<OwnedFd>,
        files: Files,
    ) -> Result<Self, AttachError> {
        let came = offered.len();
        let mut offered = offered.into_iter();
        let first = offered.next().ok_or(AttachError::NoRegions)?;
        let region0 = accept_region0(first.fd, first.len_bytes);
        let region0 = Arc::new(region0.and_then(Region::map).map_err(AttachError::Region)?);
        // Without, the same pages come one by one, while the guest stands still.
        let _ = region0.prefault_first(layout::HOT_BYTES);
        let word = region0.word(OWNERSHIP_ADDRESS).map_err(AttachError::TooSmall)?;
        let mut arena = Arena::new(Arc::clone(&region0));
        let entries = region_table(&arena, came)?;
        if entries.len() != came {
            return Err(AttachError::Regions { told: entries.len(), came });
        }
        check_region(0, &entries[0], &region0, files)?;
        let parts = layout::parts(entries.iter().map(|entry| entry.range.len_bytes())).skip(1);
        for (((index, entry), at), region) in (1..).zip(&entries[1..]).zip(parts).zip(offered) {
            let mapping = accept(index, entry, at, region)?;
            check_region(index, entry, &mapping, files)?;
            // The table was checked for overlap when it was read.
            let _ = arena.place(entry.range, mapping);
        }
        let (_, _, parts) = read_session(&arena, Vec::new())?;
        let fds = match files {
            Files::LeftBehind => Fds::default(),
            Files::Same | Files::MadeAgain => Fds::join(&parts.fds, fds).map_err(AttachError::Fds)?,
        };
        let (nonce, alive) =
            machine::hold(region0.region()).map_err(|error| AttachError::Hold(Box::new(error)))?;
        Ok(Self { arena, table: entries, ownership: Ownership::new(word), nonce, alive, parts, fds, files })
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

    /// The descriptors that go with the machine. Those that are not taken are closed by the claim.
    pub fn fds(&mut self) -> &mut Fds {
        &mut self.fds
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
        read_states(self.into_machine(word)?, sealed)
    }

    /// Claims the machine as it was sealed last, after one that claimed it under the word `dead` and died
    /// before it ran it. To be asked for only where no predecessor lives that could take the machine back.
    ///
    /// # Errors
    /// [`ClaimError`]: also if who claimed it lives.
    pub fn claim_again(self, dead: OwnershipWord) -> Result<Claimed, ClaimError> {
        let word = self.claim_from_dead(dead, ownership::claim_again)?;
        // A claim comes from a seal or from another claim of it, and nobody publishes anything in between: what is there is the
        // seal's, all of one epoch.
        let machine = self.into_machine(word)?;
        let sealed = machine.states.iter().find_map(|file| file.saved().as_ref().map(|saved| saved.epoch));
        read_states(machine, sealed.unwrap_or_default())
    }

    /// Claims the machine whose owner died under the word `dead` while it ran it, or whose recoverer did before that. Its
    /// memory is as the guest left it; nothing that was saved before belongs to it any more, and nothing is read of it. To
    /// be asked for only where no predecessor lives that could take the machine back.
    ///
    /// # Errors
    /// [`ClaimError`]: also if the owner lives.
    pub fn recover(self, dead: OwnershipWord) -> Result<Claimed, ClaimError> {
        let word = self.claim_from_dead(dead, ownership::recover)?;
        Ok(Claimed { machine: self.into_machine(word)?, states: BTreeMap::new() })
    }

    /// Makes a transition from the word `dead`, whose process has to be that.
    fn claim_from_dead(
        &self,
        dead: OwnershipWord,
        next: fn(OwnershipWord, OwnershipWord, Nonce) -> Result<OwnershipWord, Lost>,
    ) -> Result<OwnershipWord, ClaimError> {
        if self.owner_lives(dead).map_err(ClaimError::Liveness)? {
            return Err(ClaimError::ClaimantLives);
        }
        let claimed = self.ownership.transition(|found| next(found, dead, self.nonce));
        claimed.map_err(ClaimError::Ownership)
    }

    /// The machine as its session is published now.
    fn into_machine(self, claimed: OwnershipWord) -> Result<Machine, ClaimError> {
        let (kho, luo, parts) = read_session(&self.arena, self.parts.memories).map_err(ClaimError::Attach)?;
        let table = region_table(&self.arena, self.table.len()).map_err(ClaimError::Attach)?;
        if table != self.table {
            return Err(ClaimError::Regions);
        }
        let places: Vec<MemoryPlace> = table.iter().map(MemoryPlace::of).collect();
        let records = |fds: &[Arc<FdFile>]| fds.iter().map(|fd| *fd.record()).collect::<Vec<_>>();
        if records(&parts.fds) != records(&self.parts.fds) {
            return Err(ClaimError::Fds);
        }
        let memories = parts.memories.iter().zip(&places[1..]);
        let memories: Vec<Memory> = memories
            .map(|(inode, place)| Memory {
                inode: Arc::clone(inode),
                page_bytes: place.page_bytes,
                policy: place.policy,
                account: None,
            })
            .collect();
        Ok(Machine {
            owners: machine::owners(&memories),
            name: parts.name,
            arena: self.arena,
            kho,
            luo,
            ownership: self.ownership,
            word: claimed,
            vm: parts.vm,
            memories,
            places,
            states: parts.states,
            fds: Vec::new(),
            settled: false,
            table_is_old: self.files == Files::MadeAgain,
            _alive: self.alive,
        })
    }
}

/// The states of the seal of this epoch.
fn read_states(machine: Machine, sealed: u32) -> Result<Claimed, ClaimError> {
    let mut states = BTreeMap::new();
    for file in &machine.states {
        let saved = file.saved().take().filter(|saved| saved.epoch == sealed);
        let name = file.name();
        states.insert(name, saved.ok_or(ClaimError::Stale { name })?.bytes);
    }
    Ok(Claimed { machine, states })
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

    /// The states that were sealed; none of a machine that was [recovered](Incoming::recover).
    pub fn states(&self) -> &BTreeMap<StateName, Vec<u8>> {
        &self.states
    }

    /// Takes the machine over: the point of no return. The guest may run here from now on, and the session that
    /// was received is to be ended by [`Machine::settle`] once it does.
    ///
    /// # Errors
    /// [`OwnershipError`] if the machine is another's by now: the guest must not run here.
    pub fn run(self) -> Result<Machine, OwnershipError> {
        let mut machine = self.machine;
        let claimed = machine.word;
        machine.word = machine.ownership.transition(|found| ownership::run(found, claimed))?;
        Ok(machine)
    }
}

/// Takes a descriptor that came from elsewhere for a machine's region 0, which has so many bytes: a memfd, or a part of the file that the
/// machine lies in.
///
/// # Errors
/// [`RegionError`] if it is none.
pub fn accept_region0(fd: OwnedFd, len_bytes: u64) -> Result<Region, RegionError> {
    match path::is_path(fd.as_fd()) {
        true => Region::part("metadata", fd, path::REGION0_AT, len_bytes),
        false => Region::accept("metadata", fd, len_bytes),
    }
}

/// Takes region `index` for what the region table says of it, and maps it; at a path it lies `at` so many bytes. Pages that are made
/// here come from where it says, too.
fn accept(
    index: usize,
    entry: &RegionEntry,
    at: u64,
    offered: OfferedRegion,
) -> Result<Arc<Mapping>, AttachError> {
    let told = entry.page_bytes;
    let page_size = PageSize::of_bytes(told).ok_or(AttachError::PageSize { index, told })?;
    let OfferedRegion { fd, len_bytes } = offered;
    let region = match entry.store {
        Store::Path => Region::part("memory", fd, at, len_bytes),
        store => Region::accept_as("memory", fd, len_bytes, store, page_size),
    };
    let mapping = region.and_then(|region| region.map_with(&entry.policy, &mut |_, _| {}));
    Ok(Arc::new(mapping.map_err(AttachError::Region)?))
}

/// The region table in region 0. `came` regions were handed over.
fn region_table(arena: &Arena, came: usize) -> Result<Vec<RegionEntry>, AttachError> {
    let header = Header::read(arena).map_err(AttachError::Malformed)?;
    let told_bytes = header.frames() * PAGE_SIZE;
    let came_bytes = arena.regions()[0].mapping.len_bytes();
    if told_bytes != came_bytes {
        return Err(AttachError::Size { index: 0, told: told_bytes, came: came_bytes });
    }
    let root = kho::Root::read(arena).map_err(AttachError::Malformed)?;
    let table = root.fdt.subtree(&regions::SUBTREE).ok_or(AttachError::Regions { told: 0, came })?;
    let RegionTable { entries, len_bytes } =
        regions::read(arena, table.data).map_err(AttachError::Malformed)?;
    let (expected, found) = (len_bytes, table.size);
    if expected == found {
        return Ok(entries);
    }
    // It stays where it is from life to life: were its frames not known, this life would give them out.
    Err(AttachError::Malformed(Malformed {
        format: regions::FORMAT.compatible,
        address: table.data,
        field: "blob-size",
        problem: Problem::Mismatch { expected, found },
    }))
}

fn check_region(
    index: usize,
    entry: &RegionEntry,
    mapping: &Mapping,
    files: Files,
) -> Result<(), AttachError> {
    let (told, came) = (entry.range.len_bytes(), mapping.len_bytes());
    if told != came {
        return Err(AttachError::Size { index, told, came });
    }
    let (told, came) = (entry.store, mapping.region().store());
    if told != came {
        return Err(AttachError::Store { index, told, came });
    }
    let (told, came) = (entry.file, mapping.region().file_number().map_err(AttachError::Region)?);
    if told == came || files == Files::MadeAgain {
        Ok(())
    } else {
        Err(AttachError::File { index, told, came })
    }
}

/// Reads the machine's session as it is published now.
fn read_session(arena: &Arena, known: Vec<Arc<Inode>>) -> Result<(Kho, Luo, Parts), AttachError> {
    let mut kho = Kho::attach(Box::new(arena.clone())).map_err(AttachError::Malformed)?;
    let mut luo = Luo::attach(&mut kho, machine::handlers(arena, known)).map_err(AttachError::Luo)?;
    let sessions: Vec<SessionName> = luo.incoming_sessions().collect();
    let [name] = sessions[..] else {
        return Err(AttachError::Sessions { sessions: sessions.len() });
    };
    let mut memories: Vec<Arc<Inode>> = Vec::new();
    let mut states: Vec<Arc<StateFile>> = Vec::new();
    let mut fds: Vec<Arc<FdFile>> = Vec::new();
    // Region 0 may hold tens of thousands of records, if somebody means harm.
    let (mut state_names, mut fd_names) = (BTreeSet::new(), BTreeSet::new());
    for token in luo.tokens(name).collect::<Vec<_>>() {
        let kind = AttachError::Kind { session: name, token };
        let repeated = if layout::is_memory_token(token) {
            let inode = retrieve::<Inode>(&mut luo, &mut kho, name, token)?.ok_or(kind)?;
            let repeated = memories.iter().any(|other| other.frames() == inode.frames());
            memories.push(inode);
            repeated
        } else if layout::is_state_token(token) {
            let state = retrieve::<StateFile>(&mut luo, &mut kho, name, token)?.ok_or(kind)?;
            let repeated = !state_names.insert(*state.name().field());
            states.push(state);
            repeated
        } else if layout::is_fd_token(token) {
            let fd = retrieve::<FdFile>(&mut luo, &mut kho, name, token)?.ok_or(kind)?;
            let repeated = !fd_names.insert(*fd.record().name.field());
            fds.push(fd);
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
    Ok((kho, luo, Parts { name, vm, memories, states, fds }))
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
