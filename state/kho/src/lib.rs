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
mod tree;

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use abi::Malformed;
use abi::Memory;
use abi::MemoryMut;
use abi::NoMemory;
use abi::arena::Header;
use abi::arena::RootSlot;
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
use pages::Order;
use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;
use thiserror::Error;
pub use tree::Tree;

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
    /// They lie in region 0, where the allocator decides.
    #[error("{range:?} lies in region 0")]
    Metadata {
        /// The frames.
        range: PageRange,
    },
    /// They were not preserved as this run.
    #[error("{block:?} of {range:?} is not preserved")]
    NotPreserved {
        /// The frames.
        range: PageRange,
        /// The first block of them that is not.
        block: PageRange,
    },
}

/// The metadata of one arena, and the right to write it.
pub struct Kho {
    memory: Box<dyn ArenaMemory>,
    identity: Identity,
    /// Frames of region 0: taken are those of the published tree and those given out since.
    frames: Frames,
    /// Frames of region 0 that the published tree holds and the next one will not.
    leaving: Vec<Pfn>,
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
            leaving: Vec::new(),
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

    /// Takes over the arena in `memory` as its last commit left it.
    ///
    /// # Errors
    /// [`Malformed`] if it is none, or its tree breaks a rule of the format or of ours.
    pub fn attach(memory: Box<dyn ArenaMemory>) -> Result<Self, Malformed> {
        let tree = Tree::read(&memory.as_ref())?;
        let mut frames = Frames::new(tree.frames);
        let mut leaves: BTreeMap<u64, Box<Node>> = BTreeMap::new();
        for key in tree.blocks.values() {
            if key.range().start().get() < tree.frames {
                frames.take(key.range().start());
            }
            set_bit(&mut leaves, *key, true);
        }
        Ok(Self {
            memory,
            identity: tree.identity,
            frames,
            leaving: Vec::new(),
            fresh: BTreeSet::new(),
            blocks: tree.blocks,
            leaves,
            changed: BTreeSet::new(),
            nodes: tree.nodes,
            subtrees: tree.fdt.subtrees,
            slot: tree.slot,
        })
    }

    /// Whose arena it is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The arena's memory, to read what was stored.
    pub fn memory(&self) -> &(dyn Memory + '_) {
        self.memory.as_ref()
    }

    /// Number of the last commit.
    pub fn generation(&self) -> u64 {
        self.slot.generation()
    }

    /// Bytes of region 0 that are in use, the header's frame included.
    pub fn used_bytes(&self) -> u64 {
        self.frames.taken() * PAGE_SIZE
    }

    /// Gives out `count` frames of region 0 in a row. They are preserved from the next commit on.
    ///
    /// # Errors
    /// [`NoFrames`] if there is no such run.
    pub fn allocate(&mut self, count: u64) -> Result<PageRange, NoFrames> {
        let none = NoFrames { wanted: count, free: self.frames.free(), frames: self.frames.len() };
        if self.frames.free() < count + COMMIT_RESERVE {
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
            if self.blocks.get(&pfn.get()) == Some(&key) && !self.is_own(pfn) {
                self.unmark(key);
                // What no published tree knows can be given out again at once.
                if self.fresh.remove(&pfn) {
                    self.frames.release(pfn);
                } else {
                    self.leaving.push(pfn);
                }
            }
        }
    }

    /// True of the pages of the published tree itself.
    fn is_own(&self, pfn: Pfn) -> bool {
        pfn.address() == self.slot.fdt() || self.nodes.values().any(|node| *node == pfn.address())
    }

    /// Keeps `bytes` in frames of region 0 in a row, from the start of the first.
    ///
    /// # Errors
    /// [`StoreError`] if there is no room.
    pub fn store(&mut self, bytes: &[u8]) -> Result<PageRange, StoreError> {
        let count = bytes.len().div_ceil(PAGE_BYTES).max(1) as u64;
        let no_frames = |source| StoreError::NoFrames { len_bytes: bytes.len(), source };
        let range = self.allocate(count).map_err(no_frames)?;
        self.memory.write(range.start().address(), bytes).map_err(StoreError::NoMemory)?;
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
        let Ok((_, payload)) = format.read(&self.memory.as_ref(), address) else { return };
        if let Ok(range) = PageRange::of_bytes(address, Format::pages(payload.len() as u64) * PAGE_SIZE) {
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
        for _ in 0..blocks + Descriptor::chunks(blocks) {
            match self.allocate(1) {
                Ok(page) => taken.push(page.start().address()),
                Err(source) => {
                    taken
                        .iter()
                        .filter_map(|page| Pfn::at(*page).ok())
                        .for_each(|pfn| self.free(PageRange::page(pfn)));
                    return Err(StoreError::NoFrames { len_bytes, source });
                }
            }
        }
        let (data, chunks) = taken.split_at(blocks);
        self.write_list(bytes, data, chunks).map_err(StoreError::NoMemory)?;
        Ok(Descriptor::plain(chunks.first().copied().unwrap_or_default(), total))
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
        let list = List::read(&self.memory.as_ref(), descriptor)?;
        let chunks = list.chunks.iter().filter_map(|chunk| Pfn::at(*chunk).ok()).map(PageRange::page);
        chunks.chain(list.blocks).for_each(|range| self.free(range));
        Ok(())
    }

    /// Marks frames outside region 0 as preserved, in the largest blocks that they make.
    ///
    /// # Errors
    /// [`PreserveError`] if some of them are marked already (a kernel does not notice), or lie in region 0.
    pub fn preserve(&mut self, range: PageRange) -> Result<(), PreserveError> {
        if !range.is_empty() && range.start().get() < self.frames.len() {
            return Err(PreserveError::Metadata { range });
        }
        if let Some(other) = self.overlapping(range) {
            return Err(PreserveError::Overlap { range, other });
        }
        range.blocks().for_each(|(pfn, order)| self.mark(Key::of(pfn, order)));
        Ok(())
    }

    /// Takes the mark off frames that were preserved as this run.
    ///
    /// # Errors
    /// [`PreserveError::NotPreserved`] if they were not; then nothing changed.
    pub fn unpreserve(&mut self, range: PageRange) -> Result<(), PreserveError> {
        let keys: Vec<Key> = range.blocks().map(|(pfn, order)| Key::of(pfn, order)).collect();
        let missing = keys.iter().find(|key| self.blocks.get(&key.range().start().get()) != Some(key));
        if let Some(key) = missing {
            return Err(PreserveError::NotPreserved { range, block: key.range() });
        }
        keys.into_iter().for_each(|key| self.unmark(key));
        Ok(())
    }

    /// True if every frame of the run is preserved.
    pub fn is_preserved(&self, range: PageRange) -> bool {
        range.blocks().all(|(pfn, order)| self.blocks.get(&pfn.get()) == Some(&Key::of(pfn, order)))
    }

    fn overlapping(&self, range: PageRange) -> Option<PageRange> {
        let before = self.blocks.range(..range.end()).next_back();
        before.map(|(_, key)| key.range()).filter(|block| block.overlaps(range))
    }

    /// The blob of this name: its address and size.
    pub fn subtree(&self, name: &SubtreeName) -> Option<&Subtree> {
        self.subtrees.iter().find(|subtree| subtree.name == *name)
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
