//! The machine while this process runs it.

use std::collections::BTreeSet;
use std::sync::Arc;

use abi::arena::Nonce;
use abi::arena::OWNERSHIP_ADDRESS;
use abi::arena::OwnershipState;
use abi::arena::OwnershipWord;
use abi::gmem::MemoryName;
use abi::gmem::flags;
use abi::kho::Subtree;
use abi::luo::SessionName;
use abi::numa::Policy;
use abi::regions;
use abi::regions::Store;
use abi::state::StateName;
use abi::vm::Identity;
use abi::vm::VmRecord;
use abi::vmalloc::Descriptor;
use gmem::GmemHandler;
use gmem::GuestMemfd;
use gmem::Inode;
use gmem::Owner;
use kho::CommitError;
use kho::Kho;
use kho::StoreError;
use kvm::kvm_ioctls::VmFd;
use luo::File;
use luo::Finished;
use luo::Handlers;
use luo::Luo;
use luo::PublishError;
use luo::RegisterError;
use luo::Token;
use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use pages::PageRange;
use region::Account;
use region::Arena;
use region::Mapping;
use region::PageSize;
use region::Region;
use region::RegionError;
use region::Want;
use region::WarmError;
use region::liveness::LivenessError;
use region::liveness::LivenessLock;
use region::path::PathFile;
use thiserror::Error;

use crate::foreign::FdFile;
use crate::foreign::FdHandler;
use crate::handlers::Saved;
use crate::handlers::StateFile;
use crate::handlers::StateHandler;
use crate::layout;
use crate::layout::MemoryPlace;
use crate::layout::Wanted;
use crate::ownership;
use crate::ownership::Ownership;
use crate::ownership::OwnershipError;
use crate::vm_file::Created;
use crate::vm_file::Origin;
use crate::vm_file::VmFile;
use crate::vm_file::VmHandler;

/// What guest memory comes from.
#[derive(Debug, Clone, Default)]
pub enum MemoryStore {
    /// A memfd of pages of 4 KiB, or of 2 MiB where they can be had.
    #[default]
    Memfd,
    /// Pages of 2 MiB or 1 GiB from the host's pool, all of them from the start.
    Hugetlb,
    /// A guest_memfd, which the VMM's first VM object made. Successors use it as plain memory.
    GuestMemfd(Arc<GuestMemfd>),
    /// A file or device that is found by its path, and all zero. All of the machine lies there, region 0 too.
    Path(Arc<PathFile>),
}

impl MemoryStore {
    fn kind(&self) -> Store {
        match self {
            Self::Memfd => Store::Memfd,
            Self::Hugetlb => Store::Hugetlb,
            Self::GuestMemfd(_) => Store::GuestMemfd,
            Self::Path(_) => Store::Path,
        }
    }
}

/// A piece of guest memory that a machine is to have.
#[derive(Debug, Clone)]
pub struct MemorySpec {
    /// What the VMM calls it.
    pub name: MemoryName,
    /// Its size, in bytes: whole pages of `page_size`.
    pub size_bytes: u64,
    /// The page size to ask for. What came is in [`Memory::account`].
    pub page_size: PageSize,
    /// Give every page memory now, or leave it to the first touch.
    pub prefault: bool,
    /// What it comes from.
    pub store: MemoryStore,
    /// Which NUMA nodes its pages come from, here and in every successor.
    pub policy: Policy,
}

impl MemorySpec {
    /// Memory of `size_bytes` bytes in small pages, all of them there from the start, from wherever the host has
    /// them.
    pub fn new(name: MemoryName, size_bytes: u64) -> Self {
        let (store, policy) = (MemoryStore::Memfd, Policy::Default);
        Self { name, size_bytes, page_size: PageSize::Small, prefault: true, store, policy }
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            size_bytes: self.size_bytes,
            page_bytes: self.page_size.bytes(),
            store: self.store.kind(),
            policy: self.policy,
        }
    }
}

/// What a machine is to have.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Its name, which is also its session's.
    pub name: SessionName,
    /// vCPUs.
    pub vcpus: u64,
    /// Its guest memory.
    pub memories: Vec<MemorySpec>,
    /// Every vCPU and device whose state is handed over: each has to be saved for a seal.
    pub states: Vec<StateName>,
}

/// A piece of guest memory that a machine has.
#[derive(Debug, Clone)]
pub struct Memory {
    /// The memory itself.
    pub inode: Arc<Inode>,
    /// The page size that it was made for, in bytes.
    pub page_bytes: u64,
    /// Which NUMA nodes its pages come from.
    pub policy: Policy,
    /// What warming it up gave; `None` if it was not warmed up by this process.
    pub account: Option<Account>,
}

/// Why a machine was not made.
#[derive(Debug, Error)]
pub enum CreateError {
    /// The specification cannot be met by any machine.
    #[error("cannot make machine {name}: {why}")]
    Spec {
        /// Its name.
        name: SessionName,
        /// Why.
        why: &'static str,
    },
    /// A region could not be made.
    #[error("cannot make the machine's memory")]
    Region(#[source] RegionError),
    /// There is not enough memory.
    #[error("cannot warm up the machine's memory")]
    Warm(#[source] WarmError),
    /// The metadata could not be written.
    #[error("cannot write the machine's metadata")]
    Commit(#[source] CommitError),
    /// The metadata could not be written.
    #[error("cannot write the machine's metadata")]
    Table(#[source] TableError),
    /// The session could not be filled.
    #[error("cannot preserve the machine")]
    Settle(#[source] SettleError),
    /// The kernel gives no random numbers.
    #[error("the kernel gives no random numbers")]
    Random(#[source] getrandom::Error),
    /// The lock that shows that this process lives could not be taken.
    #[error("cannot lock the machine's metadata")]
    Liveness(#[source] LivenessError),
}

/// Why a machine's files are not all in its session.
#[derive(Debug, Error)]
pub enum SettleError {
    /// The session received could not be finished.
    #[error("cannot finish the session that was received")]
    Finish(#[source] luo::FinishError),
    /// The session could not be made.
    #[error("cannot make the session")]
    Session(#[source] luo::SessionError),
    /// A file could not be preserved.
    #[error("cannot fill the session")]
    Preserve(#[source] luo::PreserveError),
    /// The region table could not be written anew.
    #[error("cannot write down which files the machine's regions are")]
    Table(#[source] TableError),
    /// The result could not be published.
    #[error("cannot publish the session")]
    Publish(#[source] PublishError),
}

/// Why a machine's region table was not written.
#[derive(Debug, Error)]
pub enum TableError {
    /// The kernel does not say which file a region is.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// There is no room.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a machine was not sealed. It is as it was and may run on, except after [`SealError::Ownership`].
#[derive(Debug, Error)]
pub enum SealError {
    /// A state was not given, or is none of the machine's.
    #[error("the state of {name} {why}")]
    State {
        /// What it is the state of.
        name: StateName,
        /// Why.
        why: &'static str,
    },
    /// The states are too large for region 0.
    #[error("the states need {wanted} frames with what comes after the seal, and region 0 has {free} left")]
    NoRoom {
        /// Frames that they need.
        wanted: u64,
        /// Frames that are free.
        free: u64,
    },
    /// The session of the life before could not be left behind.
    #[error("the machine is not ready for another update")]
    Settle(#[source] SettleError),
    /// A file refused its last callback.
    #[error("cannot freeze the session")]
    Freeze(#[source] luo::PreserveError),
    /// The result could not be published.
    #[error("cannot publish the sealed state")]
    Publish(#[source] PublishError),
    /// This process does not own the machine any more, or has sealed it already: the guest must not run here.
    #[error("cannot give the machine up")]
    Ownership(#[source] OwnershipError),
}

/// Why a machine was not taken back.
#[derive(Debug, Error)]
pub enum UnsealError {
    /// The successor runs it: it must not run here.
    #[error("the machine is not ours any more")]
    Ownership(#[source] OwnershipError),
}

/// What a publish takes whatever it publishes: its lists of files, and what `kho` keeps for the commit alone.
const SPARE_FRAMES: u64 = 64;

/// A machine that this process owns: it may run the guest, and it alone writes the metadata.
#[derive(Debug)]
pub struct Machine {
    /// Of its memory, which ends with it. First, as fields are dropped in order: the lock says last that this process is
    /// gone.
    pub(crate) owners: Vec<Owner>,
    pub(crate) name: SessionName,
    pub(crate) arena: Arena,
    pub(crate) places: Vec<MemoryPlace>,
    pub(crate) kho: Kho,
    pub(crate) luo: Luo,
    pub(crate) ownership: Ownership,
    /// The word under which this process runs it, or sealed it.
    pub(crate) word: OwnershipWord,
    pub(crate) vm: Arc<VmFile>,
    pub(crate) memories: Vec<Memory>,
    pub(crate) states: Vec<Arc<StateFile>>,
    /// Descriptors that go with it, as far as an update has asked for them.
    pub(crate) fds: Vec<Arc<FdFile>>,
    /// All files are in an outgoing session of this life, and the received one is finished.
    pub(crate) settled: bool,
    /// A kernel made the regions again: they are other files than the table says.
    pub(crate) table_is_old: bool,
    pub(crate) _alive: LivenessLock,
}

impl Machine {
    /// Makes a machine: its memory, its metadata, its session, all preserved from now on. `progress` gets bytes
    /// warmed up and bytes in all.
    ///
    /// # Errors
    /// [`CreateError`]; then nothing stays behind.
    pub fn create(spec: &Spec, progress: &mut dyn FnMut(u64, u64)) -> Result<Self, CreateError> {
        let places = check(spec)?;
        let identity = random_identity()?;
        let (arena, memories) = make_regions(spec, &places, identity, progress)?;
        let region0 = Arc::clone(&arena.regions()[0].mapping);
        let (nonce, alive) = hold(region0.region())?;
        let word =
            region0.word(OWNERSHIP_ADDRESS).unwrap_or_else(|_| unreachable!("region 0 holds its header"));
        let ownership = Ownership::new(word);
        let word = ownership.begin(nonce);
        let frames = layout::REGION0_BYTES / PAGE_SIZE;
        let mut kho = Kho::format(Box::new(arena.clone()), identity, frames).map_err(CreateError::Commit)?;
        write_region_table(&mut kho, &arena, &places).map_err(CreateError::Table)?;
        let record = VmRecord { identity, vm_type: 0, vcpus: spec.vcpus };
        let mut machine = Self {
            owners: owners(&memories),
            name: spec.name,
            luo: Luo::new(handlers(
                &arena,
                memories.iter().map(|memory| Arc::clone(&memory.inode)).collect(),
            )),
            arena,
            places,
            kho,
            ownership,
            word,
            vm: VmFile::make(record, Origin::Made),
            memories,
            states: spec.states.iter().map(|name| StateFile::new(*name, None)).collect(),
            fds: Vec::new(),
            settled: false,
            table_is_old: false,
            _alive: alive,
        };
        machine.settle().map_err(CreateError::Settle)?;
        Ok(machine)
    }

    /// Puts every file of the machine into an outgoing session, and ends the one that was received, in one
    /// step. Names what nobody had retrieved there. Does nothing if that is done.
    ///
    /// # Errors
    /// [`SettleError`]
    pub fn settle(&mut self) -> Result<Finished, SettleError> {
        if self.settled {
            return Ok(Finished::default());
        }
        let received = self.luo.incoming_sessions().any(|name| name == self.name);
        let finished = match received {
            true => self.luo.finish(&mut self.kho, self.name).map_err(SettleError::Finish)?,
            false => Finished::default(),
        };
        if !self.luo.outgoing_sessions().any(|name| name == self.name) {
            self.fill_session()?;
        }
        if self.table_is_old {
            write_region_table(&mut self.kho, &self.arena, &self.places).map_err(SettleError::Table)?;
        }
        self.luo.publish(&mut self.kho).map_err(SettleError::Publish)?;
        (self.settled, self.table_is_old) = (true, false);
        Ok(finished)
    }

    /// All files of the machine or no session: one with some of them must never be published.
    fn fill_session(&mut self) -> Result<(), SettleError> {
        self.luo.create_session(self.name).map_err(SettleError::Session)?;
        for (token, file) in self.files() {
            if let Err(error) = self.luo.preserve(&mut self.kho, self.name, token, file) {
                let _ = self.luo.drop_session(&mut self.kho, self.name);
                return Err(SettleError::Preserve(error));
            }
        }
        Ok(())
    }

    fn files(&self) -> Vec<(Token, File)> {
        let vm: File = Arc::clone(&self.vm) as File;
        let memory = |(index, memory): (usize, &Memory)| {
            (layout::memory_token(index), Arc::clone(&memory.inode) as File)
        };
        let state = |(index, state): (usize, &Arc<StateFile>)| {
            (layout::state_token(index), Arc::clone(state) as File)
        };
        let fd = |(index, fd): (usize, &Arc<FdFile>)| (layout::fd_token(index), Arc::clone(fd) as File);
        [(layout::VM_TOKEN, vm)]
            .into_iter()
            .chain(self.memories.iter().enumerate().map(memory))
            .chain(self.states.iter().enumerate().map(state))
            .chain(self.fds.iter().enumerate().map(fd))
            .collect()
    }

    /// Gives the machine up: writes the states, publishes them, and swaps the ownership word. From now on the
    /// guest must not run here, unless the machine is [unsealed](Machine::unseal). Gives the seal's epoch.
    ///
    /// # Errors
    /// [`SealError`]: one state for each name of the specification, guest memory frozen, room in region 0.
    pub fn seal(&mut self, states: Vec<(StateName, Vec<u8>)>) -> Result<u32, SealError> {
        self.settle().map_err(SealError::Settle)?;
        let epoch =
            ownership::seal(self.word, self.word).map_err(|lost| SealError::Ownership(lost.into()))?.epoch();
        self.fill(states, epoch)?;
        self.check_room()?;
        let sealed = self.publish_sealed();
        match sealed {
            Ok(word) => {
                self.word = word;
                Ok(epoch)
            }
            // Whoever owns it now writes the metadata: not even what was just published may be undone here.
            Err(error @ SealError::Ownership(_)) => Err(error),
            Err(error) => {
                self.unfreeze();
                Err(error)
            }
        }
    }

    fn fill(&self, states: Vec<(StateName, Vec<u8>)>, epoch: u32) -> Result<(), SealError> {
        self.forget_states();
        for (name, bytes) in states {
            let file = self.states.iter().find(|file| file.name() == name);
            let file = file.ok_or(SealError::State { name, why: "is none of this machine's" })?;
            if file.saved().replace(Saved { epoch, bytes }).is_some() {
                return Err(SealError::State { name, why: "is given twice" });
            }
        }
        match self.states.iter().find(|file| file.saved().is_none()) {
            Some(file) => Err(SealError::State { name: file.name(), why: "is missing" }),
            None => Ok(()),
        }
    }

    /// A seal leaves room for what follows it, here or in the successor: the way back and the way on both
    /// write every record and list anew while the old ones still stand.
    fn check_room(&self) -> Result<(), SealError> {
        let frames = |file: &Arc<StateFile>| {
            let blocks = file.saved().as_ref().map_or(0, |saved| saved.bytes.len()).div_ceil(PAGE_BYTES);
            (1 + blocks + Descriptor::chunks(blocks)) as u64
        };
        let files = (1 + self.memories.len() + self.states.len() + self.fds.len()) as u64;
        let states: u64 = self.states.iter().map(frames).sum();
        let wanted = states + 2 * files + SPARE_FRAMES;
        let free = self.kho.free_frames();
        if wanted > free { Err(SealError::NoRoom { wanted, free }) } else { Ok(()) }
    }

    fn forget_states(&self) {
        self.states.iter().for_each(|file| *file.saved() = None);
    }

    fn publish_sealed(&mut self) -> Result<OwnershipWord, SealError> {
        self.luo.freeze(&mut self.kho).map_err(SealError::Freeze)?;
        self.luo.publish(&mut self.kho).map_err(SealError::Publish)?;
        let running = self.word;
        let sealed = self.ownership.transition(|found| ownership::seal(found, running));
        sealed.map_err(SealError::Ownership)
    }

    /// Takes the machine back: the successor failed, or took too long. The guest may run here again.
    ///
    /// # Errors
    /// [`UnsealError`] if the successor runs it: then it must not run here any more.
    pub fn unseal(&mut self) -> Result<(), UnsealError> {
        let sealed = self.word;
        let back = self.ownership.transition(|found| ownership::take_back(found, sealed));
        self.word = back.map_err(UnsealError::Ownership)?;
        self.unfreeze();
        Ok(())
    }

    /// Takes the saved states out of the session again.
    fn unfreeze(&mut self) {
        self.luo.unfreeze(&mut self.kho);
        self.forget_states();
        // Should it fail, the stale states stay until the next publish: their epoch tells that they are stale.
        let _ = self.luo.publish(&mut self.kho);
    }

    /// Its name.
    pub fn name(&self) -> SessionName {
        self.name
    }

    /// Its identity.
    pub fn identity(&self) -> Identity {
        self.vm.record().identity
    }

    /// How many vCPUs it has.
    pub fn vcpus(&self) -> u64 {
        self.vm.record().vcpus
    }

    /// Says that this VM object serves the machine from now on, and tells of it: call it when the guest runs, or is
    /// about to.
    ///
    /// That is told once of each VM object, as what this returns and as a `tracing` event `created` with the target
    /// `tideover::vm`; with `None` there is nothing to tell. A machine that is on its way here cannot be told of before
    /// [`Claimed::run`](crate::Claimed::run) has given it to this process, and one that was sealed not any more, until it
    /// is taken back.
    pub fn serve(&self, vm: &Arc<VmFd>) -> Option<Created> {
        if self.word.state() != OwnershipState::Running {
            return None;
        }
        self.vm.serve(self.name, vm)
    }

    /// The VM object that serves the machine in this process, if it lives: see [`VmFile::vm_object`].
    pub fn vm_object(&self) -> Option<Arc<VmFd>> {
        self.vm.vm_object()
    }

    /// Its guest memory.
    pub fn memories(&self) -> &[Memory] {
        &self.memories
    }

    /// Names of the states that a seal needs.
    pub fn state_names(&self) -> impl Iterator<Item = StateName> + '_ {
        self.states.iter().map(|state| state.name())
    }

    /// Its regions, region 0 first: what a carrier hands over.
    pub fn regions(&self) -> impl Iterator<Item = &Region> {
        self.arena.regions().iter().map(|placed| placed.mapping.region())
    }

    /// Where its regions lie in the arena, region 0 first.
    pub fn places(&self) -> &[MemoryPlace] {
        &self.places
    }

    /// The formats that its session uses.
    pub fn formats(&self) -> Vec<String> {
        let files = self.luo.compatibles().into_iter().map(|compatible| compatible.to_string());
        let table = regions::compatible(self.places.iter().map(|place| (place.store, place.policy)));
        arena_formats(table).into_iter().chain(files).collect()
    }

    /// The ownership word as it is now.
    ///
    /// # Errors
    /// [`abi::Malformed`] if somebody wrote nonsense over it.
    pub fn ownership(&self) -> Result<OwnershipWord, abi::Malformed> {
        self.ownership.read()
    }

    /// The word under which this process has the machine, running or sealed.
    pub fn word(&self) -> OwnershipWord {
        self.word
    }

    /// Region 0, to be read: what a decoder is given.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }
}

/// Every format that [`Incoming`](crate::Incoming) can read.
pub fn readable_formats() -> Vec<String> {
    let files = [abi::vm::FORMAT, abi::gmem::FORMAT, abi::state::FORMAT, abi::foreign::FORMAT];
    let own =
        [regions::V2, regions::FORMAT].into_iter().chain(files).map(|format| format.compatible.to_owned());
    arena_formats(regions::V1.compatible).into_iter().chain(own).collect()
}

/// Formats of the arena itself, whatever its session holds. `table` is that of its region table.
fn arena_formats(table: &str) -> Vec<String> {
    let own = ["tideover-arena-v1", table];
    [abi::kho::COMPATIBLE, abi::luo::COMPATIBLE].into_iter().chain(own).map(str::to_owned).collect()
}

fn check(spec: &Spec) -> Result<Vec<MemoryPlace>, CreateError> {
    let name = spec.name;
    let refuse = |why| Err(CreateError::Spec { name, why });
    if spec.memories.is_empty() {
        return refuse("it has no memory");
    }
    if spec.memories.len() > layout::MAX_MEMORIES {
        return refuse("it has more than 255 pieces of memory");
    }
    if !spec.memories.iter().all(|memory| memory.page_size.suits(memory.store.kind())) {
        return refuse("its memory comes from where there are no pages of the size asked for");
    }
    if let Err(why) = check_guest_memfds(spec).and_then(|()| check_path(spec)) {
        return refuse(why);
    }
    let whole = |memory: &MemorySpec| memory.size_bytes.is_multiple_of(memory.page_size.bytes());
    if !spec.memories.iter().all(whole) {
        return refuse("the size of its memory is no multiple of the page size asked for");
    }
    if repeated(spec.memories.iter().map(|memory| *memory.name.field()))
        || repeated(spec.states.iter().map(|name| *name.field()))
    {
        return refuse("two pieces of its memory, or two of its states, have one name");
    }
    let store = path(spec).map_or(Store::Memfd, |_| Store::Path);
    match layout::places(store, spec.memories.iter().map(MemorySpec::wanted)) {
        Some(places) => Ok(places),
        None => refuse("its memory is larger than an address space"),
    }
}

/// Each guest_memfd is one piece of memory, and all of it.
fn check_guest_memfds(spec: &Spec) -> Result<(), &'static str> {
    let mut seen: Vec<&Arc<GuestMemfd>> = Vec::new();
    for memory in &spec.memories {
        let MemoryStore::GuestMemfd(file) = &memory.store else { continue };
        if file.size_bytes() != memory.size_bytes {
            return Err("the size of its memory is not that of its guest_memfd");
        }
        if seen.iter().any(|other| Arc::ptr_eq(other, file)) {
            return Err("two pieces of its memory have one guest_memfd");
        }
        seen.push(file);
    }
    Ok(())
}

/// Where all of the machine lies, if that has a path.
fn path(spec: &Spec) -> Option<&Arc<PathFile>> {
    spec.memories.iter().find_map(|memory| match &memory.store {
        MemoryStore::Path(file) => Some(file),
        _ => None,
    })
}

/// What lies at a path lies there as a whole.
fn check_path(spec: &Spec) -> Result<(), &'static str> {
    let Some(path) = path(spec) else { return Ok(()) };
    let there =
        |memory: &MemorySpec| matches!(&memory.store, MemoryStore::Path(file) if Arc::ptr_eq(file, path));
    match spec.memories.iter().all(there) {
        true => Ok(()),
        false => Err("some of its memory lies at a path, and some does not"),
    }
}

/// Looks whether the host can give all of the guest memory, before any of it is made.
fn ask_host(spec: &Spec) -> Result<(), CreateError> {
    let names: Vec<String> = spec.memories.iter().map(|memory| region_name(spec, memory)).collect();
    let want = |(memory, name): (&MemorySpec, _)| {
        let Wanted { size_bytes: len_bytes, store, policy, .. } = memory.wanted();
        Want { name, len_bytes, store, page_size: memory.page_size, policy }
    };
    let names = names.iter().map(String::as_str);
    let wants: Vec<Want<'_>> = spec.memories.iter().zip(names).map(want).collect();
    region::ask(&wants).map_err(CreateError::Region)
}

fn region_name(spec: &Spec, memory: &MemorySpec) -> String {
    format!("{}.{}", spec.name, memory.name)
}

fn repeated(names: impl Iterator<Item = [u8; 32]>) -> bool {
    let mut seen = BTreeSet::new();
    names.into_iter().any(|name| !seen.insert(name))
}

fn random_identity() -> Result<Identity, CreateError> {
    let mut bits = [0; 16];
    getrandom::fill(&mut bits).map_err(CreateError::Random)?;
    Ok(Identity::new(bits))
}

/// Nonces that are tried before it is clear that somebody holds them all: of 16 million two meet by chance once in a
/// lifetime, not so many times in a row.
const NONCE_TRIES: u32 = 16;

/// Draws a nonce that nobody holds, and holds it.
pub(crate) fn hold(region0: &Region) -> Result<(Nonce, LivenessLock), CreateError> {
    let mut tries = 0;
    loop {
        tries += 1;
        let bits = getrandom::u32().map_err(CreateError::Random)?;
        let Some(nonce) = Nonce::new(bits >> 8) else { continue };
        match LivenessLock::take(region0, nonce.get()) {
            Ok(lock) => return Ok((nonce, lock)),
            Err(LivenessError::Taken { .. }) if tries < NONCE_TRIES => {}
            Err(error) => return Err(CreateError::Liveness(error)),
        }
    }
}

fn make_regions(
    spec: &Spec,
    places: &[MemoryPlace],
    identity: Identity,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Arena, Vec<Memory>), CreateError> {
    ask_host(spec)?;
    let path = path(spec);
    let sizes = places.iter().map(|place| place.frames.len_bytes());
    let mut parts = layout::parts(sizes);
    let (name, at) = (format!("{}.metadata", spec.name), parts.next().unwrap_or_default());
    let region0 = match path {
        Some(file) => file.part(&name, at, layout::REGION0_BYTES),
        None => Region::create(&name, layout::REGION0_BYTES),
    };
    let region0 = Arc::new(region0.and_then(Region::map).map_err(CreateError::Region)?);
    region0.prefault_first(layout::HOT_BYTES).map_err(CreateError::Warm)?;
    let mut arena = Arena::new(region0);
    let mut memories = Vec::new();
    let total: u64 = spec.memories.iter().map(|memory| memory.size_bytes).sum();
    let mut done = 0;
    for ((memory, place), at) in spec.memories.iter().zip(&places[1..]).zip(parts) {
        let name = region_name(spec, memory);
        let (mapping, account) = make_memory(memory, &name, at, &mut |here| progress(done + here, total))?;
        done += memory.size_bytes;
        let (of, frames) = (Arc::clone(&mapping), place.frames);
        let inode = match &memory.store {
            MemoryStore::GuestMemfd(file) => Inode::of_guest_memfd(memory.name, identity, of, frames, file),
            MemoryStore::Memfd | MemoryStore::Hugetlb | MemoryStore::Path(_) => {
                Inode::new(memory.name, identity, of, frames, flags::MMAP | flags::INIT_SHARED)
            }
        };
        memories.push(Memory { inode, page_bytes: place.page_bytes, policy: place.policy, account });
        // The places were made so that they do not overlap.
        let _ = arena.place(place.frames, mapping);
    }
    Ok((arena, memories))
}

/// Makes a piece of guest memory and maps it, warmed up if that is asked for. One at a path lies there `at` so many bytes. `progress` gets
/// bytes done.
fn make_memory(
    memory: &MemorySpec,
    name: &str,
    at: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<(Arc<Mapping>, Option<Account>), CreateError> {
    let region = match &memory.store {
        MemoryStore::Memfd => Region::create(name, memory.size_bytes),
        MemoryStore::Hugetlb => Region::create_hugetlb(name, memory.size_bytes, memory.page_size),
        MemoryStore::GuestMemfd(file) => file.region(name),
        MemoryStore::Path(file) => file.part(name, at, memory.size_bytes),
    };
    let mapping = region.and_then(|region| region.map_with(&memory.policy, &mut |here, _| progress(here)));
    let mapping = Arc::new(mapping.map_err(CreateError::Region)?);
    if !memory.prefault {
        return Ok((mapping, None));
    }
    // What came by mapping, as hugetlb memory does, was told already.
    let told = mapping.region().store() == Store::Hugetlb;
    let mut warmed = |here, _| {
        if !told {
            progress(here)
        }
    };
    let account = mapping.warm(memory.page_size, &mut warmed).map_err(CreateError::Warm)?;
    Ok((mapping, Some(account)))
}

/// Writes which file each region is, in place of what stood there.
fn write_region_table(kho: &mut Kho, arena: &Arena, places: &[MemoryPlace]) -> Result<(), TableError> {
    let mut entries = Vec::new();
    for (place, placed) in places.iter().zip(arena.regions()) {
        entries.push(place.entry(placed.mapping.region().file_number()?));
    }
    let bytes = regions::encode(&entries);
    let data = kho.store(&bytes)?.start().address();
    let old = kho.subtree(&regions::SUBTREE).copied();
    kho.set_subtree(Subtree { name: regions::SUBTREE, data, size: bytes.len() as u64 });
    // Its size was checked against the table's own when it was read.
    if let Some(range) =
        old.and_then(|old| PageRange::of_bytes(old.data, old.size.next_multiple_of(PAGE_SIZE)).ok())
    {
        kho.free(range);
    }
    Ok(())
}

/// Takes memory that nobody has owned yet.
pub(crate) fn owners(memories: &[Memory]) -> Vec<Owner> {
    memories.iter().filter_map(|memory| memory.inode.own()).collect()
}

/// The handlers of every machine.
pub(crate) fn handlers(arena: &Arena, known: Vec<Arc<Inode>>) -> Handlers {
    let mut handlers = Handlers::default();
    let registered: Result<(), RegisterError> = (|| {
        handlers.register(VmHandler)?;
        handlers.register(GmemHandler::new(arena.clone(), known))?;
        handlers.register(StateHandler)?;
        handlers.register(FdHandler)
    })();
    debug_assert!(registered.is_ok(), "four kinds");
    handlers
}

#[cfg(test)]
mod tests;
