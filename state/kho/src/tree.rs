//! The published tree, as a reader of the arena finds it.

use std::collections::BTreeMap;

use abi::Malformed;
use abi::Memory;
use abi::NoMemory;
use abi::Problem;
use abi::arena::Header;
use abi::arena::RootSlot;
use abi::holds;
use abi::kho::RootFdt;
use abi::radix;
use abi::radix::Found;
use abi::radix::Key;
use abi::vm::Identity;
use pages::Order;
use pages::PFN_BITS;
use pages::PageRange;
use pages::Pfn;

use crate::metadata::Metadata;

/// Blocks that one run of frames is cut into at most: two of each order.
const BLOCKS_OF_A_RUN: usize = 2 * PFN_BITS as usize;

/// The most blocks outside region 0: what the other regions, each preserved as a whole, are cut into.
pub(crate) fn max_blocks(runs: &[PageRange]) -> usize {
    BLOCKS_OF_A_RUN * runs.len().saturating_sub(1)
}

/// What a tree hangs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// Whose arena it is.
    pub identity: Identity,
    /// Frames of region 0.
    pub frames: u64,
    /// The root slot that counts.
    pub slot: RootSlot,
    /// The root FDT.
    pub fdt: RootFdt,
}

impl Root {
    /// Reads the header, the root slot that counts and the FDT that it names. The tree is not looked at: whether the
    /// frames of the FDT and of what it names are preserved is not known. Region 0 is all that has to be there.
    ///
    /// # Errors
    /// [`Malformed`] if one of them is not what it should be, or region 0 is smaller than its header says.
    pub fn read(memory: &impl Memory) -> Result<Self, Malformed> {
        let header = Header::read(memory)?;
        let (found, runs) = (header.frames(), memory.runs());
        let there = runs.first().filter(|run| run.start() == Pfn::ZERO).map_or(0, |run| run.len_pages());
        if found > there {
            return Err(bad(0, "frames", Problem::TooLarge { found, limit: there }));
        }
        let slot = RootSlot::read(memory)?;
        let fdt = RootFdt::read(&Metadata::new(memory, header.frames()), slot.fdt())?;
        Ok(Self { identity: header.identity(), frames: header.frames(), slot, fdt })
    }
}

/// One whole tree: what a commit published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// Whose arena it is.
    pub identity: Identity,
    /// Frames of region 0.
    pub frames: u64,
    /// The root slot that counts.
    pub slot: RootSlot,
    /// The root FDT.
    pub fdt: RootFdt,
    /// Preserved blocks, by their first frame.
    pub blocks: BTreeMap<u64, Key>,
    /// Addresses of the tree's nodes, by level and prefix.
    pub nodes: BTreeMap<(u32, u64), u64>,
}

pub(crate) fn bad(address: u64, field: &'static str, problem: Problem) -> Malformed {
    Malformed { format: "kho tree of an arena", address, field, problem }
}

impl Tree {
    /// Reads the tree of the arena in `memory`, and checks it whole: blocks lie in one region each and do not
    /// overlap; in region 0 they are single frames; the FDT and every node lie there, are marked, and are each one
    /// thing.
    ///
    /// The work is bounded by the frames of region 0 and the number of regions, whatever the tree says: outside
    /// region 0 there may be no more blocks than the other regions make that are preserved as a whole.
    ///
    /// # Errors
    /// [`Malformed`] at the first rule that is broken.
    pub fn read(memory: &impl Memory) -> Result<Self, Malformed> {
        let Root { identity, frames, slot, fdt } = Root::read(memory)?;
        let mut tree = Self { identity, frames, slot, fdt, blocks: BTreeMap::new(), nodes: BTreeMap::new() };
        let (runs, mut outside) = (memory.runs(), 0);
        let root = tree.fdt.map;
        radix::walk(&Metadata::new(memory, frames), root, |found| match found {
            Found::Node { level, prefix, address } => {
                tree.nodes.insert((level, prefix), address);
                Ok(())
            }
            Found::Block(key) => tree.add(key, &runs, &mut outside),
        })?;
        tree.check_overlap()?;
        let own = tree.nodes.values().copied().chain([slot.fdt()]);
        own.map(|address| tree.check_marked(address)).collect::<Result<Vec<()>, _>>()?;
        match tree.nodes.values().find(|address| **address == slot.fdt()) {
            Some(found) => Err(bad(*found, "page of the tree itself", Problem::Repeated { found: *found })),
            None => Ok(tree),
        }
    }

    /// `outside` counts the blocks outside region 0.
    fn add(&mut self, key: Key, runs: &[PageRange], outside: &mut usize) -> Result<(), Malformed> {
        let range = key.range();
        let start = range.start();
        let found = start.address();
        if start.get() < self.frames && (key.order() != Order::PAGE || start.get() == 0) {
            return Err(bad(found, "block in region 0", Problem::Unknown { found }));
        }
        if !holds(runs, range) {
            let none = NoMemory { address: found, len_bytes: range.len_bytes() };
            return Err(bad(found, "block", Problem::Unreadable(none)));
        }
        *outside += usize::from(start.get() >= self.frames);
        let limit = max_blocks(runs);
        if *outside > limit {
            let (found, limit) = (*outside as u64, limit as u64);
            return Err(bad(start.address(), "blocks", Problem::TooLarge { found, limit }));
        }
        match self.blocks.insert(start.get(), key) {
            Some(_) => Err(bad(found, "block", Problem::Repeated { found })),
            None => Ok(()),
        }
    }

    fn check_overlap(&self) -> Result<(), Malformed> {
        let mut end = 0;
        for key in self.blocks.values() {
            let range = key.range();
            let found = range.start().address();
            if range.start().get() < end {
                return Err(bad(found, "block", Problem::Repeated { found }));
            }
            end = range.end();
        }
        Ok(())
    }

    fn check_marked(&self, address: u64) -> Result<(), Malformed> {
        let key =
            Pfn::at(address).ok().filter(|pfn| pfn.get() < self.frames).map(|pfn| Key::of(pfn, Order::PAGE));
        let marked = key.is_some_and(|key| self.blocks.get(&key.range().start().get()) == Some(&key));
        if marked {
            Ok(())
        } else {
            Err(bad(address, "page of the tree itself", Problem::Structure("is not preserved")))
        }
    }
}
