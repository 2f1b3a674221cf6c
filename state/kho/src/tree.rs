//! The published tree, as a reader of the arena finds it.

use std::collections::BTreeMap;

use abi::Malformed;
use abi::Memory;
use abi::Problem;
use abi::arena::Header;
use abi::arena::RootSlot;
use abi::kho::RootFdt;
use abi::radix;
use abi::radix::Found;
use abi::radix::Key;
use abi::vm::Identity;
use pages::Order;
use pages::Pfn;

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

fn bad(address: u64, field: &'static str, problem: Problem) -> Malformed {
    Malformed { format: "kho tree of an arena", address, field, problem }
}

impl Tree {
    /// Reads the tree of the arena in `memory`, and checks it whole: blocks do not overlap; in region 0 they
    /// are single frames; the FDT and every node lie there and are marked.
    ///
    /// # Errors
    /// [`Malformed`] at the first rule that is broken.
    pub fn read(memory: &impl Memory) -> Result<Self, Malformed> {
        let header = Header::read(memory)?;
        let slot = RootSlot::read(memory)?;
        let fdt = RootFdt::read(memory, slot.fdt())?;
        let mut tree = Self {
            identity: header.identity(),
            frames: header.frames(),
            slot,
            fdt,
            blocks: BTreeMap::new(),
            nodes: BTreeMap::new(),
        };
        let root = tree.fdt.map;
        radix::walk(memory, root, |found| match found {
            Found::Node { level, prefix, address } => {
                tree.nodes.insert((level, prefix), address);
                Ok(())
            }
            Found::Block(key) => tree.add(key),
        })?;
        tree.check_overlap()?;
        let own = tree.nodes.values().copied().chain([slot.fdt()]);
        own.map(|address| tree.check_marked(address)).collect::<Result<Vec<()>, _>>()?;
        Ok(tree)
    }

    fn add(&mut self, key: Key) -> Result<(), Malformed> {
        let range = key.range();
        let start = range.start();
        if start.get() < self.frames && (key.order() != Order::PAGE || start.get() == 0) {
            let found = start.address();
            return Err(bad(found, "block in region 0", Problem::Unknown { found }));
        }
        match self.blocks.insert(start.get(), key) {
            Some(_) => Err(bad(start.address(), "block", Problem::Repeated { found: start.address() })),
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
