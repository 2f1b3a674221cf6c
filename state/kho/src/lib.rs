//! Which frames of an arena stay, kept in Kexec Handover's format.
//!
//! A [`Kho`] is the writer of one arena's metadata: it gives out frames of region 0, marks runs of frames
//! anywhere in the arena as *preserved*, and hangs named blobs on the *root FDT*. All of that is a tree in
//! region 0, byte for byte as a kernel would write it, with arena addresses for physical ones. [`Tree`] is
//! the same state as a reader sees it.
//!
//! Changes gather in memory and become visible by [`Kho::commit`] alone. A commit writes new nodes and a
//! new root FDT into free frames and then switches one root slot of the arena's header. So at every store
//! the old or the new tree is whole, and a process that attaches after a crash finds one of them. Frames
//! that a change gives up are used again only after the commit that gives them up.
//!
//! Unlike a kernel's, the tree also marks its own nodes and the FDT: the marks in region 0 *are* the
//! allocator's state, and [`Kho::attach`] needs nothing else.
//!
//! Not here: what the blobs mean (`luo`), who may write (`machine`).
#![forbid(unsafe_code)]

mod commit;
mod frames;
mod metadata;
mod tree;

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use abi::Malformed;
use abi::MemoryMut;
use abi::NoMemory;
use abi::Problem;
use abi::arena::Header;
use abi::arena::RootSlot;
use abi::holds;
use abi::kho::Subtree;
use abi::kho::SubtreeName;
use abi::radix::Key;
use abi::radix::LEAF_BITS;
use abi::radix::Node;
use abi::radix::WORDS;
use abi::record::Format;
use abi::vm::Identity;
use abi::vmalloc::CHUNK_BLOCKS;
use abi::vmalloc::Descriptor;
use abi::vmalloc::List;
pub use commit::CommitError;
use frames::Frames;
pub use metadata::Metadata;
use pages::Order;
use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;
use thiserror::Error;
pub use tree::Root;
pub use tree::Tree;
use tree::bad;
use tree::max_blocks;

/// Memory that a [`Kho`] writes: an arena, or what stands for one in a test.
pub trait ArenaMemory: MemoryMut + Send + Sync {}

impl<M: MemoryMut + Send + Sync> ArenaMemory for M {}

/// Frames that only a commit may take, so that one is possible when all others are given out.
const COMMIT_RESERVE: u64 = 32;

/// No room in region 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("region 0 has no run of {wanted} free frames ({free} of {frames} are free)")]
pub struct NoFrames {
    /// Frames asked for, in a row.
    pub wanted: u64,
    /// Frames that are free, in all.
    pub free: u64,
    /// Frames of region 0.
    pub frames: u64,
}

/// Bytes could not be kept in region 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum StoreError {
    /// No room.
    #[error("cannot keep {len_bytes} bytes")]
    NoFrames {
        /// How many bytes.
        len_bytes: usize,
        /// What there is.
        #[source]
        source: NoFrames,
    },
    /// More pages than a list can count (16 TiB).
    #[error("cannot keep {len_bytes} bytes in one list")]
    TooLong {
        /// How many bytes.
        len_bytes: usize,
    },
    /// Region 0 is smaller than its header says.
    #[error("cannot write the arena")]
    NoMemory(#[source] NoMemory),
}

/// Why frames could not be preserved, or given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PreserveError {
    /// Some of them are preserved already.
    #[error("{range:?} overlaps {other:?}, which is preserved already")]
    Overlap {
        /// The frames.
        range: PageRange,
        /// The block in the way.
        other: PageRange,
    },
    /// They are not all there, or a block of them lies in two regions.
    #[error("{range:?} is not in the arena's regions")]
    Absent {
        /// The frames.
        range: PageRange,
    },
    /// More runs than a reader of the arena puts up with.
    #[error("guest memory may be preserved in {limit} blocks at most")]
    TooMany {
        /// How many blocks.
        limit: usize,
    },
    /// They lie in region 0, where the allocator decides.
    #[error("{range:?} lies in region 0")]
    Metadata {
        /// The frames.
        range: PageRange,
    },
    /// Not all of them are preserved, or a block of them reaches beyond.
    #[error("{block:?} of {range:?} is not preserved")]
    NotPreserved {
        /// The frames.
        range: PageRange,
        /// The first frame that is not, or that such a block begins at.
        block: PageRange,
    },
}

/// The metadata of one arena, and the right to write it.
pub struct Kho {
    memory: Box<dyn ArenaMemory>,
    identity: Identity,
    /// Frames of region 0: taken are those of the published tree and those given out since.
    frames: Frames,
    /// Frames of region 0 that are the published tree's: the header's, the FDT's, the nodes'.
    own: Frames,
    /// Frames of region 0 of which it is known what they hold: those above, and what was [adopted](Kho::adopt).
    adopted: Frames,
    /// Frames of region 0 that the published tree holds and the next one will not, and whether they were adopted.
    leaving: BTreeMap<Pfn, bool>,
    /// Frames of region 0 that were given out since the last commit: no reader knows them.
    fresh: BTreeSet<Pfn>,
    /// Preserved blocks by first frame; those of region 0 are single frames.
    blocks: BTreeMap<u64, Key>,
    /// Leaves of the next tree, by prefix.
    leaves: BTreeMap<u64, Box<Node>>,
    /// Prefixes of the leaves that differ from the published ones.
    changed: BTreeSet<u64>,
    /// Places of the published tree's nodes, by level and prefix.
    nodes: BTreeMap<(u32, u64), u64>,
    subtrees: Vec<Subtree>,
    slot: RootSlot,
}

/// What a [`Kho`] knows of its arena beside the bytes: frames taken, given back and adopted, marks, blobs, the tree's nodes.
/// Of two that are equal, every later call takes the same frames and publishes the same tree.
#[derive(Clone, PartialEq, Eq)]
pub struct Books {
    frames: Frames,
    own: Frames,
    adopted: Frames,
    leaving: BTreeMap<Pfn, bool>,
    fresh: BTreeSet<Pfn>,
    blocks: BTreeMap<u64, Key>,
    leaves: BTreeMap<u64, Box<Node>>,
    nodes: BTreeMap<(u32, u64), u64>,
    subtrees: Vec<Subtree>,
    slot: RootSlot,
}

impl std::fmt::Debug for Books {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let blocks: Vec<PageRange> = self.blocks.values().map(|key| key.range()).collect();
        f.debug_struct("Books")
            .field("taken", &self.frames.taken())
            .field("adopted", &self.adopted.taken())
            .field("given out since the last commit", &self.fresh)
            .field("given back since", &self.leaving)
            .field("marked", &blocks)
            .field("subtrees", &self.subtrees)
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Kho {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kho")
            .field("generation", &self.slot.generation())
            .field("blocks", &self.blocks.len())
            .field("subtrees", &self.subtrees)
            .finish_non_exhaustive()
    }
}

impl Kho {
    /// Makes an arena of `memory`, whose region 0 has `frames` frames, and commits an empty tree.
    ///
    /// # Errors
    /// [`CommitError`] if region 0 is too small, or not there.
    pub fn format(
        memory: Box<dyn ArenaMemory>,
        identity: Identity,
        frames: u64,
    ) -> Result<Self, CommitError> {
        let header = Header::new(identity, frames);
        let mut kho = Self {
            memory,
            identity,
            frames: Frames::new(frames),
            own: Frames::new(frames),
            adopted: Frames::new(frames),
            leaving: BTreeMap::new(),
            fresh: BTreeSet::new(),
            blocks: BTreeMap::new(),
            leaves: BTreeMap::new(),
            changed: BTreeSet::new(),
            nodes: BTreeMap::new(),
            subtrees: Vec::new(),
            slot: RootSlot::default(),
        };
        kho.commit()?;
        // Last, so that memory is an arena only once it has a tree.
        kho.memory.order_writes();
        kho.memory.write(0, zerocopy_bytes(&header)).map_err(CommitError::NoMemory)?;
        Ok(kho)
    }

    /// Takes over the arena in `memory` as its last commit left it. The frames of the named blobs are
    /// [adopted](Kho::adopt).
    ///
    /// # Errors
    /// [`Malformed`] if it is none, or its tree breaks a rule of the format or of ours.
    pub fn attach(memory: Box<dyn ArenaMemory>) -> Result<Self, Malformed> {
        let tree = Tree::read(&memory.as_ref())?;
        let mut frames = Frames::new(tree.frames);
        let mut own = Frames::new(tree.frames);
        let nodes = tree.nodes.values().copied().chain([tree.slot.fdt()]);
        nodes.filter_map(|address| Pfn::at(address).ok()).for_each(|pfn| own.take(pfn));
        let mut leaves: BTreeMap<u64, Box<Node>> = BTreeMap::new();
        for key in tree.blocks.values() {
            if key.range().start().get() < tree.frames {
                frames.take(key.range().start());
            }
            set_bit(&mut leaves, *key, true);
        }
        let mut kho = Self {
            memory,
            identity: tree.identity,
            frames,
            adopted: own.clone(),
            own,
            leaving: BTreeMap::new(),
            fresh: BTreeSet::new(),
            blocks: tree.blocks,
            leaves,
            changed: BTreeSet::new(),
            nodes: tree.nodes,
            subtrees: tree.fdt.subtrees,
            slot: tree.slot,
        };
        for subtree in kho.subtrees.clone() {
            kho.adopt_blob(&subtree)?;
        }
        Ok(kho)
    }

    fn adopt_blob(&mut self, subtree: &Subtree) -> Result<(), Malformed> {
        let (first, last) = (subtree.data / PAGE_SIZE, subtree.data.checked_add(subtree.size.max(1) - 1));
        let range = last.map(|last| last / PAGE_SIZE + 1 - first);
        let range = range.and_then(|count| PageRange::new(Pfn::new(first).ok()?, count).ok());
        let none = Problem::TooLarge { found: subtree.size, limit: u64::MAX - subtree.data };
        self.adopt("kho subtree", range.ok_or_else(|| bad(subtree.data, "blob-size", none))?)
    }

    /// Says that a structure of `format` was read in these frames of region 0. Whoever reads what an earlier life
    /// left says so for all that he reads, and before he allocates what it asks for: so the frames of region 0 bound
    /// both, and none is two things, of which one would be overwritten when the other is given back.
    ///
    /// Frames are adopted until they are given back.
    ///
    /// # Errors
    /// [`Malformed`] if one of them is outside region 0, is not preserved, or is something else already. Then none was
    /// adopted.
    pub fn adopt(&mut self, format: &'static str, range: PageRange) -> Result<(), Malformed> {
        self.adopt_all(format, &[range])
    }

    /// [Adopts](Kho::adopt) the frames of several structures.
    ///
    /// # Errors
    /// [`Malformed`] if one of them cannot be, or stands twice; then none was adopted.
    pub fn adopt_all(&mut self, format: &'static str, ranges: &[PageRange]) -> Result<(), Malformed> {
        let mut taken = Vec::new();
        let result = ranges.iter().try_for_each(|range| self.adopt_one(format, *range, &mut taken));
        if result.is_err() {
            taken.into_iter().for_each(|pfn| self.adopted.release(pfn));
        }
        result
    }

    fn adopt_one(
        &mut self,
        format: &'static str,
        range: PageRange,
        taken: &mut Vec<Pfn>,
    ) -> Result<(), Malformed> {
        let bad = |pfn: Pfn, problem| Malformed { format, address: pfn.address(), field: "frames", problem };
        if range.end() > self.frames.len() {
            let none = NoMemory { address: range.start().address(), len_bytes: range.len_bytes() };
            return Err(bad(range.start(), Problem::Unreadable(none)));
        }
        for pfn in range.pages() {
            if self.adopted.is_taken(pfn) {
                return Err(bad(pfn, Problem::Structure("are something else, too")));
            }
            if !self.blocks.contains_key(&pfn.get()) {
                return Err(bad(pfn, Problem::Structure("are not preserved")));
            }
            self.adopted.take(pfn);
            taken.push(pfn);
        }
        Ok(())
    }

    /// [Adopts](Kho::adopt) the frames of the record of `format` at `address`: those that
    /// [`free_record`](Kho::free_record) gives back.
    ///
    /// # Errors
    /// [`Malformed`] if it is no such record, or a frame cannot be adopted.
    pub fn adopt_record(&mut self, format: &Format, address: u64) -> Result<(), Malformed> {
        self.adopt(format.compatible, record_frames(&self.memory(), format, address)?)
    }

    /// [Adopts](Kho::adopt) the chunks and blocks of a list.
    ///
    /// # Errors
    /// [`Malformed`] if a frame cannot be adopted; then none was.
    pub fn adopt_list(&mut self, list: &List) -> Result<(), Malformed> {
        self.adopt_all("kho_vmalloc", &list_frames(list).collect::<Vec<_>>())
    }

    /// Reaches its arena by way of `memory` from now on, which has the same bytes: to see what it writes, or to hinder it.
    pub fn set_memory(&mut self, memory: Box<dyn ArenaMemory>) {
        self.memory = memory;
    }

    /// Whose arena it is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Region 0, to read what was stored. There is nothing else in it.
    pub fn memory(&self) -> Metadata<'_> {
        Metadata::new(self.memory.as_ref(), self.frames.len())
    }

    /// Number of the last commit.
    pub fn generation(&self) -> u64 {
        self.slot.generation()
    }

    /// Bytes of region 0 that are in use, the header's frame included.
    pub fn used_bytes(&self) -> u64 {
        self.frames.taken() * PAGE_SIZE
    }

    /// Frames of region 0 that are not in use.
    pub fn free_frames(&self) -> u64 {
        self.frames.free()
    }

    /// Gives out `count` frames of region 0 in a row. They are preserved from the next commit on.
    ///
    /// # Errors
    /// [`NoFrames`] if there is no such run.
    pub fn allocate(&mut self, count: u64) -> Result<PageRange, NoFrames> {
        let none = NoFrames { wanted: count, free: self.frames.free(), frames: self.frames.len() };
        if self.frames.free() < count.saturating_add(COMMIT_RESERVE) {
            return Err(none);
        }
        let range = self.frames.take_run(count).ok_or(none)?;
        range.pages().for_each(|pfn| self.mark(Key::of(pfn, Order::PAGE)));
        self.fresh.extend(range.pages());
        Ok(range)
    }

    /// Gives frames of region 0 back. Those that are in the published tree stay as they are until the next commit.
    ///
    /// Frames that are not given out, and those of the tree itself, are passed over: what a broken record
    /// says to free is not believed.
    pub fn free(&mut self, range: PageRange) {
        let frames = self.frames.len();
        for pfn in range.pages().take_while(|pfn| pfn.get() < frames) {
            let key = Key::of(pfn, Order::PAGE);
            if self.blocks.get(&pfn.get()) == Some(&key) && !self.own.is_taken(pfn) {
                self.unmark(key);
                let was_adopted = self.adopted.is_taken(pfn);
                self.adopted.release(pfn);
                // What no published tree knows can be given out again at once.
                if self.fresh.remove(&pfn) {
                    self.frames.release(pfn);
                } else {
                    self.leaving.insert(pfn, was_adopted);
                }
            }
        }
    }

    /// Takes back that frames were [given back](Kho::free): they stay as if they never had been. Only for frames of the
    /// published tree, and until the next commit; others are passed over. True if all of them stay.
    pub fn keep(&mut self, range: PageRange) -> bool {
        let frames = self.frames.len();
        let mut kept = 0;
        for pfn in range.pages().take_while(|pfn| pfn.get() < frames) {
            if let Some(was_adopted) = self.leaving.remove(&pfn) {
                kept += 1;
                self.mark(Key::of(pfn, Order::PAGE));
                if was_adopted {
                    self.adopted.take(pfn);
                }
            }
        }
        kept == range.len_pages()
    }

    /// Keeps `bytes` in frames of region 0 in a row, from the start of the first.
    ///
    /// # Errors
    /// [`StoreError`] if there is no room; then nothing is taken.
    pub fn store(&mut self, bytes: &[u8]) -> Result<PageRange, StoreError> {
        let count = bytes.len().div_ceil(PAGE_BYTES).max(1) as u64;
        let no_frames = |source| StoreError::NoFrames { len_bytes: bytes.len(), source };
        let range = self.allocate(count).map_err(no_frames)?;
        if let Err(none) = self.memory.write(range.start().address(), bytes) {
            self.free(range);
            return Err(StoreError::NoMemory(none));
        }
        Ok(range)
    }

    /// Writes the start of a frame that was given out and is in no published tree yet.
    ///
    /// # Errors
    /// [`NoMemory`] for a frame of a published tree or of none, and for more than a page.
    pub fn fill(&mut self, pfn: Pfn, bytes: &[u8]) -> Result<(), NoMemory> {
        let none = NoMemory::at(pfn.address(), bytes.len());
        if !self.fresh.contains(&pfn) || bytes.len() > PAGE_BYTES {
            return Err(none);
        }
        self.memory.write(pfn.address(), bytes)
    }

    /// Gives the frames of the record of `format` at `address` back, as [`Kho::free`] does. What is no such record
    /// keeps its frames: who knows whose they are.
    pub fn free_record(&mut self, format: &Format, address: u64) {
        if let Ok(range) = record_frames(&self.memory(), format, address) {
            self.free(range);
        }
    }

    /// Keeps `bytes` in scattered frames of region 0 that a `kho_vmalloc` list names.
    ///
    /// # Errors
    /// [`StoreError`] if there is no room; then nothing is taken.
    pub fn store_list(&mut self, bytes: &[u8]) -> Result<Descriptor, StoreError> {
        if bytes.is_empty() {
            return Ok(Descriptor::default());
        }
        let len_bytes = bytes.len();
        let total =
            u32::try_from(len_bytes.div_ceil(PAGE_BYTES)).map_err(|_| StoreError::TooLong { len_bytes })?;
        let blocks = len_bytes.div_ceil(PAGE_BYTES);
        let mut taken = Vec::new();
        let stored = self.store_listed(bytes, blocks, &mut taken);
        if stored.is_err() {
            let pages = taken.into_iter().filter_map(|page| Pfn::at(page).ok());
            pages.for_each(|pfn| self.free(PageRange::page(pfn)));
        }
        Ok(Descriptor::plain(stored?, total))
    }

    /// Gives the address of the first chunk. What was `taken` is the caller's to give back if this fails.
    fn store_listed(&mut self, bytes: &[u8], blocks: usize, taken: &mut Vec<u64>) -> Result<u64, StoreError> {
        let no_frames = |source| StoreError::NoFrames { len_bytes: bytes.len(), source };
        for _ in 0..blocks + Descriptor::chunks(blocks) {
            taken.push(self.allocate(1).map_err(no_frames)?.start().address());
        }
        let (data, chunks) = taken.split_at(blocks);
        self.write_list(bytes, data, chunks).map_err(StoreError::NoMemory)?;
        Ok(chunks.first().copied().unwrap_or_default())
    }

    fn write_list(&mut self, bytes: &[u8], data: &[u64], chunks: &[u64]) -> Result<(), NoMemory> {
        for (page, address) in bytes.chunks(PAGE_BYTES).zip(data) {
            self.memory.write(*address, page)?;
        }
        let next = chunks.iter().skip(1).copied().chain([0]);
        let mut listed = data.chunks(CHUNK_BLOCKS);
        for (chunk, next) in chunks.iter().zip(next) {
            let mut page = [0u8; PAGE_BYTES];
            let words = [next].into_iter().chain(listed.next().unwrap_or_default().iter().copied());
            for (slot, word) in page.as_chunks_mut::<8>().0.iter_mut().zip(words) {
                *slot = word.to_le_bytes();
            }
            self.memory.write(*chunk, &page)?;
        }
        Ok(())
    }

    /// Gives the frames of a list back, as [`Kho::free`] does.
    ///
    /// # Errors
    /// [`Malformed`] if the list cannot be read; then nothing is given back.
    pub fn free_list(&mut self, descriptor: &Descriptor) -> Result<(), Malformed> {
        let list = List::read(&self.memory(), descriptor)?;
        list_frames(&list).for_each(|range| self.free(range));
        Ok(())
    }

    /// Marks frames outside region 0 as preserved, in the largest blocks that they make.
    ///
    /// # Errors
    /// [`PreserveError`] if some of them are marked already (a kernel does not notice), lie in region 0 or in no
    /// region, or make more blocks than [`Tree::read`] takes.
    pub fn preserve(&mut self, range: PageRange) -> Result<(), PreserveError> {
        if !range.is_empty() && range.start().get() < self.frames.len() {
            return Err(PreserveError::Metadata { range });
        }
        if let Some(other) = self.overlapping(range) {
            return Err(PreserveError::Overlap { range, other });
        }
        let runs = self.memory.runs();
        let blocks = range.blocks().map(|(pfn, order)| Key::of(pfn, order));
        if blocks.clone().any(|key| !holds(&runs, key.range())) {
            return Err(PreserveError::Absent { range });
        }
        let limit = max_blocks(&runs);
        if self.blocks.range(self.frames.len()..).count() + blocks.count() > limit {
            return Err(PreserveError::TooMany { limit });
        }
        range.blocks().for_each(|(pfn, order)| self.mark(Key::of(pfn, order)));
        Ok(())
    }

    /// Takes the mark off frames that are preserved. It goes block by block as they are marked, so that it does not
    /// matter how the run was cut when that was done.
    ///
    /// # Errors
    /// [`PreserveError::NotPreserved`] if not all of them are, or a block reaches beyond; then nothing changed.
    pub fn unpreserve(&mut self, range: PageRange) -> Result<(), PreserveError> {
        let keys = self.marked(range).map_err(|block| PreserveError::NotPreserved { range, block })?;
        keys.into_iter().for_each(|key| self.unmark(key));
        Ok(())
    }

    /// True if every frame of the run is preserved, in blocks that do not reach beyond.
    pub fn is_preserved(&self, range: PageRange) -> bool {
        self.marked(range).is_ok()
    }

    /// The blocks that a run is marked in, or the first frame where there is none, or none that ends within it.
    fn marked(&self, range: PageRange) -> Result<Vec<Key>, PageRange> {
        let mut keys = Vec::new();
        let mut next = range.start();
        for (start, key) in self.blocks.range(range.start().get()..range.end()) {
            if *start != next.get() || key.range().end() > range.end() {
                return Err(PageRange::page(next));
            }
            keys.push(*key);
            match Pfn::new(key.range().end()) {
                Ok(end) => next = end,
                // The end of all memory.
                Err(_) => return Ok(keys),
            }
        }
        if next.get() == range.end() { Ok(keys) } else { Err(PageRange::page(next)) }
    }

    fn overlapping(&self, range: PageRange) -> Option<PageRange> {
        let before = self.blocks.range(..range.end()).next_back();
        before.map(|(_, key)| key.range()).filter(|block| block.overlaps(range))
    }

    /// The blob of this name: its address and size.
    pub fn subtree(&self, name: &SubtreeName) -> Option<&Subtree> {
        self.subtrees.iter().find(|subtree| subtree.name == *name)
    }

    /// Takes a blob's name away, from the next commit on.
    pub fn remove_subtree(&mut self, name: &SubtreeName) {
        self.subtrees.retain(|subtree| subtree.name != *name);
    }

    /// What is known of the arena beside its bytes.
    pub fn books(&self) -> Books {
        Books {
            frames: self.frames.clone(),
            own: self.own.clone(),
            adopted: self.adopted.clone(),
            leaving: self.leaving.clone(),
            fresh: self.fresh.clone(),
            blocks: self.blocks.clone(),
            leaves: self
                .leaves
                .iter()
                .filter(|(_, leaf)| leaf.iter().any(|word| *word != 0))
                .map(|(prefix, leaf)| (*prefix, leaf.clone()))
                .collect(),
            nodes: self.nodes.clone(),
            subtrees: self.subtrees.clone(),
            slot: self.slot,
        }
    }

    /// Names a blob, from the next commit on; one that had the name is replaced.
    pub fn set_subtree(&mut self, subtree: Subtree) {
        match self.subtrees.iter_mut().find(|other| other.name == subtree.name) {
            Some(other) => *other = subtree,
            None => self.subtrees.push(subtree),
        }
    }

    fn mark(&mut self, key: Key) {
        self.blocks.insert(key.range().start().get(), key);
        self.changed.insert(set_bit(&mut self.leaves, key, true));
    }

    fn unmark(&mut self, key: Key) {
        self.blocks.remove(&key.range().start().get());
        self.changed.insert(set_bit(&mut self.leaves, key, false));
    }
}

fn zerocopy_bytes(header: &Header) -> &[u8] {
    zerocopy::IntoBytes::as_bytes(header)
}

/// The frames that a record takes.
fn record_frames(memory: &Metadata<'_>, format: &Format, address: u64) -> Result<PageRange, Malformed> {
    let (_, payload) = format.read(memory, address)?;
    let len_bytes = Format::pages(payload.len() as u64) * PAGE_SIZE;
    let none = |_| bad(address, "address", Problem::Unreadable(NoMemory { address, len_bytes }));
    PageRange::of_bytes(address, len_bytes).map_err(none)
}

/// The frames that a list takes.
fn list_frames(list: &List) -> impl Iterator<Item = PageRange> {
    let chunks = list.chunks.iter().filter_map(|chunk| Pfn::at(*chunk).ok()).map(PageRange::page);
    chunks.chain(list.blocks.iter().copied())
}

/// Sets or clears a key's bit; gives the prefix of its leaf.
fn set_bit(leaves: &mut BTreeMap<u64, Box<Node>>, key: Key, value: bool) -> u64 {
    let prefix = key.get() >> LEAF_BITS;
    let leaf = leaves.entry(prefix).or_insert_with(|| Box::new([0; WORDS]));
    let (word, bit) = key.leaf_bit();
    if let Some(word) = leaf.get_mut(word) {
        *word = if value { *word | 1 << bit } else { *word & !(1 << bit) };
    }
    prefix
}
