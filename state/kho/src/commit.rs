//! The switch from one tree to the next.
//!
//! Only changed leaves and the tables above them are written anew, into free frames; the others are shared
//! with the tree before. The leaf that covers region 0 always changes, since it marks the new nodes.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use abi::NoMemory;
use abi::arena::MAX_GENERATION;
use abi::arena::RootSlot;
use abi::kho::RootFdt;
use abi::kho::TooManySubtrees;
use abi::radix;
use abi::radix::Key;
use abi::radix::LEAF_BITS;
use abi::radix::LEVELS;
use abi::radix::Node;
use abi::radix::TABLE_BITS;
use abi::radix::WORDS;
use pages::Order;
use pages::Pfn;
use thiserror::Error;
use zerocopy::IntoBytes;

use crate::Kho;
use crate::NoFrames;
use crate::set_bit;

/// Why a change could not be published. The tree before it still is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CommitError {
    /// No room for the new tree beside the old one.
    #[error("no room for a new tree")]
    NoFrames(#[source] NoFrames),
    /// More named blobs than the root FDT holds.
    #[error("cannot build the root FDT")]
    Fdt(#[source] TooManySubtrees),
    /// Region 0 is smaller than its header says.
    #[error("cannot write the arena")]
    NoMemory(#[source] NoMemory),
    /// The published tree has the highest number that one can have.
    #[error("no generation follows {generation:#x}")]
    Generation {
        /// The published tree's.
        generation: u64,
    },
}

/// A tree being built: frames for what is new, and what will be left behind.
#[derive(Default)]
struct Draft {
    taken: Vec<Pfn>,
    /// New places of nodes; `None` for one that is empty and goes.
    nodes: BTreeMap<(u32, u64), Option<u64>>,
}

type NodeName = (u32, u64);

impl Kho {
    /// Publishes all changes since the last commit at once.
    ///
    /// # Errors
    /// [`CommitError`]; then the changes are still pending.
    pub fn commit(&mut self) -> Result<(), CommitError> {
        let region0_leaf = Key::of(Pfn::ZERO, Order::PAGE).get() >> LEAF_BITS;
        self.changed.insert(region0_leaf);
        let mut draft = Draft::default();
        let result = self.draft(&mut draft).and_then(|fdt| self.write(&draft, fdt));
        match result {
            Ok(slot) => {
                self.publish(draft, slot);
                Ok(())
            }
            Err(error) => {
                // Their marks go, too: the frames are free again, and the next try takes others.
                self.set_marks(&draft.taken, false);
                draft.taken.into_iter().for_each(|pfn| self.frames.release(pfn));
                Err(error)
            }
        }
    }

    /// Finds frames for the FDT and every node that is written anew. Gives the FDT's.
    fn draft(&mut self, draft: &mut Draft) -> Result<u64, CommitError> {
        let fdt = self.take_frame(draft)?;
        // Marks first: a leaf's content must not change once it is known which nodes are empty.
        let changed: BTreeSet<NodeName> = (0..=LEVELS)
            .flat_map(|level| self.changed.iter().map(move |leaf| (level, leaf >> (TABLE_BITS * level))))
            .collect();
        for name in changed {
            let address = if self.will_be_there(draft, name) { Some(self.take_frame(draft)?) } else { None };
            draft.nodes.insert(name, address);
        }
        Ok(fdt)
    }

    fn take_frame(&mut self, draft: &mut Draft) -> Result<u64, CommitError> {
        let none = NoFrames { wanted: 1, free: self.frames.free(), frames: self.frames.len() };
        let page = self.frames.take_run(1).ok_or(CommitError::NoFrames(none))?.start();
        draft.taken.push(page);
        self.set_marks(&[page], true);
        Ok(page.address())
    }

    fn set_marks(&mut self, frames: &[Pfn], value: bool) {
        for pfn in frames {
            let key = Key::of(*pfn, Order::PAGE);
            set_bit(&mut self.leaves, key, value);
            match value {
                true => self.blocks.insert(pfn.get(), key),
                false => self.blocks.remove(&pfn.get()),
            };
        }
    }

    fn will_be_there(&self, draft: &Draft, (level, prefix): NodeName) -> bool {
        match level {
            LEVELS => true,
            0 => self.leaves.get(&prefix).is_some_and(|leaf| leaf.iter().any(|word| *word != 0)),
            _ => self.children(draft, (level, prefix)).next().is_some(),
        }
    }

    /// Slots and addresses of a table's children in the next tree, in no order.
    fn children(&self, draft: &Draft, (level, prefix): NodeName) -> impl Iterator<Item = (usize, u64)> {
        let (below, first) = (level - 1, prefix << TABLE_BITS);
        let range = (below, first)..(below, first + (1 << TABLE_BITS));
        let published = self.nodes.range(range.clone()).map(|(name, address)| (*name, Some(*address)));
        let kept = published.filter(move |(name, _)| !draft.nodes.contains_key(name));
        let new = draft.nodes.range(range).map(|(name, place)| (*name, *place));
        kept.chain(new).filter_map(move |((_, child), place)| {
            // A table has 512 slots.
            Some((usize::try_from(child - first).ok()?, place?))
        })
    }

    fn node(&self, draft: &Draft, (level, prefix): NodeName, leaving: &[Pfn]) -> Node {
        let mut node = [0; WORDS];
        if level == 0 {
            if let Some(leaf) = self.leaves.get(&prefix) {
                node = **leaf;
            }
            // What the new tree leaves behind is not marked in it.
            for key in leaving
                .iter()
                .map(|pfn| Key::of(*pfn, Order::PAGE))
                .filter(|key| key.get() >> LEAF_BITS == prefix)
            {
                let (word, bit) = key.leaf_bit();
                node[word] &= !(1 << bit);
            }
        } else {
            self.children(draft, (level, prefix)).for_each(|(slot, address)| node[slot] = address);
        }
        node
    }

    /// Frames of the published tree itself that the next one replaces.
    fn replaced(&self, draft: &Draft) -> Vec<Pfn> {
        let nodes = draft.nodes.keys().filter_map(|name| self.nodes.get(name).copied());
        let fdt = (self.slot.fdt() != 0).then_some(self.slot.fdt());
        nodes.chain(fdt).filter_map(|address| Pfn::at(address).ok()).collect()
    }

    /// Writes everything but the slot, then the slot.
    fn write(&mut self, draft: &Draft, fdt: u64) -> Result<RootSlot, CommitError> {
        let generation = self.slot.generation();
        let next = generation.checked_add(1).filter(|next| *next <= MAX_GENERATION);
        let slot = RootSlot::new(next.ok_or(CommitError::Generation { generation })?, fdt);
        let replaced = self.replaced(draft);
        for (name, place) in &draft.nodes {
            if let Some(address) = place {
                let bytes = radix::node_bytes(&self.node(draft, *name, &replaced));
                self.memory.write(*address, &bytes).map_err(CommitError::NoMemory)?;
            }
        }
        let map = draft.nodes.get(&(LEVELS, 0)).copied().flatten().unwrap_or_default();
        let root = RootFdt { map, subtrees: self.subtrees.clone() };
        let bytes = root.encode().map_err(CommitError::Fdt)?;
        self.memory.write(fdt, &bytes).map_err(CommitError::NoMemory)?;
        self.memory.order_writes();
        let address = RootSlot::address(slot.generation());
        self.memory.write(address, slot.as_bytes()).map_err(CommitError::NoMemory)?;
        self.memory.order_writes();
        Ok(slot)
    }

    /// The new tree is the published one: what only the old one held is free.
    fn publish(&mut self, draft: Draft, slot: RootSlot) {
        let replaced = self.replaced(&draft);
        self.set_marks(&replaced, false);
        for pfn in &replaced {
            self.own.release(*pfn);
            self.adopted.release(*pfn);
        }
        for pfn in &draft.taken {
            self.own.take(*pfn);
            self.adopted.take(*pfn);
        }
        replaced
            .into_iter()
            .chain(std::mem::take(&mut self.leaving).into_keys())
            .for_each(|pfn| self.frames.release(pfn));
        for (name, place) in draft.nodes {
            match place {
                Some(address) => self.nodes.insert(name, address),
                None => self.nodes.remove(&name),
            };
        }
        self.leaves.retain(|_, leaf| leaf.iter().any(|word| *word != 0));
        self.changed.clear();
        self.fresh.clear();
        self.slot = slot;
    }
}
