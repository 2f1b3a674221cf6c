//! The tree of preserved memory.
//!
//! A block of pages is one *key*, which holds its order and its address; the tree is a set of keys: five
//! levels of tables of 512 addresses, and leaves that are bitmaps of 32,768 keys. Every node is one page.
//! The walk goes by ascending key, so larger blocks come first.

use alloc::collections::BTreeSet;

use pages::Order;
use pages::PAGE_BYTES;
use pages::PFN_BITS;
use pages::PageRange;
use pages::Pfn;

use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::OnFault;
use crate::memory::Place;
use crate::memory::Problem;
use crate::memory::stop;

/// Levels of tables above a leaf; the root is at this level.
pub const LEVELS: u32 = 5;
/// Key bits that a leaf resolves.
pub const LEAF_BITS: u32 = 15;
/// Key bits that a table resolves.
pub const TABLE_BITS: u32 = 9;
/// Slots of a table.
pub const SLOTS: usize = 512;
/// 64-bit words of a node, table or leaf.
pub const WORDS: usize = PAGE_BYTES / 8;

const FORMAT: &str = "kho radix tree";

/// A block of pages as the tree stores it: `(1 << (52 - order)) | (address >> (12 + order))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(u64);

impl Key {
    /// The key of the block of `order` at `pfn`, which has to be aligned to it: lower bits are lost.
    pub fn of(pfn: Pfn, order: Order) -> Self {
        Self(1 << (PFN_BITS - order.get()) | pfn.get() >> order.get())
    }

    /// The key with this number; `None` if it means no block.
    pub fn new(number: u64) -> Option<Self> {
        let order = PFN_BITS.checked_sub(number.checked_ilog2()?)?;
        (order <= Order::MAX.get()).then_some(Self(number))
    }

    /// The key's number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The block's order.
    pub fn order(self) -> Order {
        Order::new(PFN_BITS - self.0.ilog2()).unwrap_or(Order::MAX)
    }

    /// The block's pages. The highest bit says the order, the ones below it say where it lies.
    pub fn range(self) -> PageRange {
        let order = self.order();
        let start = (self.0 ^ 1 << self.0.ilog2()) << order.get();
        // Both always succeed: the bits below the highest are at most 52 - order.
        let start = Pfn::new(start).unwrap_or_else(|_| unreachable!("a key names a page"));
        PageRange::block(start, order).unwrap_or_else(|_| unreachable!("a key names a block"))
    }

    /// Slot in the table at `level` (1 to 5) on the way to this key.
    pub fn slot(self, level: u32) -> usize {
        masked(self.0 >> (LEAF_BITS + TABLE_BITS * (level - 1)), TABLE_BITS)
    }

    /// Word in its leaf, and bit in that word.
    pub fn leaf_bit(self) -> (usize, usize) {
        let bit = masked(self.0, LEAF_BITS);
        (bit / 64, bit % 64)
    }
}

/// The lowest `bits` bits (at most 15), as an index.
#[expect(clippy::cast_possible_truncation, reason = "at most 15 bits remain")]
fn masked(value: u64, bits: u32) -> usize {
    (value & ((1 << bits) - 1)) as usize
}

/// A node's words.
pub type Node = [u64; WORDS];

/// Reads the node at `address`.
///
/// # Errors
/// [`Malformed`] if the address is none of a page, or nothing is there.
pub fn read_node(memory: &(impl Memory + ?Sized), address: u64) -> Result<Node, Malformed> {
    let place = Place::new(FORMAT, address);
    place.page_address("node", address)?;
    let mut page = [0; PAGE_BYTES];
    memory.read(address, &mut page).map_err(|none| place.bad("node", Problem::Unreadable(none)))?;
    let mut node = [0; WORDS];
    for (word, bytes) in node.iter_mut().zip(page.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    Ok(node)
}

/// The bytes of a node.
pub fn node_bytes(node: &Node) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    for (bytes, word) in page.as_chunks_mut::<8>().0.iter_mut().zip(node) {
        *bytes = word.to_le_bytes();
    }
    page
}

/// What a walk meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// A node of the tree itself: its level (0 for a leaf), the key bits above it, and its address.
    Node {
        /// 5 for the root, 0 for a leaf.
        level: u32,
        /// The keys below it, without the bits that the node and its children resolve.
        prefix: u64,
        /// Physical address of its page.
        address: u64,
    },
    /// A preserved block.
    Block(Key),
}

/// Walks the tree at `root`, each node before what is below it, blocks by ascending key.
///
/// # Errors
/// [`Malformed`] at the first node that cannot be read or stands in the tree twice (so that a tree that
/// refers to itself ends), and at the first key that means no block.
pub fn walk(
    memory: &(impl Memory + ?Sized),
    root: u64,
    mut visit: impl FnMut(Found) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    walk_on(memory, root, &mut visit, &mut stop)
}

/// Walks the tree at `root` as [`walk`] does, past what is wrong: a node that cannot be read or was met before is left out
/// with all that is below it, a key that means no block is left out.
///
/// # Errors
/// What `visit` and `on_fault` make of what they are told.
pub fn walk_on(
    memory: &(impl Memory + ?Sized),
    root: u64,
    visit: &mut dyn FnMut(Found) -> Result<(), Malformed>,
    on_fault: &mut OnFault<'_>,
) -> Result<(), Malformed> {
    Walk { memory, seen: BTreeSet::new(), visit, on_fault }.descend(root, LEVELS, 0)
}

struct Walk<'a, 'b, M: ?Sized> {
    memory: &'a M,
    seen: BTreeSet<u64>,
    visit: &'a mut dyn FnMut(Found) -> Result<(), Malformed>,
    on_fault: &'a mut OnFault<'b>,
}

impl<M: Memory + ?Sized> Walk<'_, '_, M> {
    fn descend(&mut self, address: u64, level: u32, prefix: u64) -> Result<(), Malformed> {
        let place = Place::new(FORMAT, address);
        let node = match read_node(self.memory, address) {
            Ok(node) => node,
            Err(fault) => return (self.on_fault)(fault),
        };
        if !self.seen.insert(address) {
            return (self.on_fault)(place.bad("node", Problem::Repeated { found: address }));
        }
        (self.visit)(Found::Node { level, prefix, address })?;
        if level == 0 {
            return self.leaf(place, &node, prefix);
        }
        for (slot, child) in (0u64..).zip(node).filter(|(_, child)| *child != 0) {
            let below = prefix.checked_mul(1 << TABLE_BITS).map(|above| above | slot);
            match below.filter(|below| below.leading_zeros() >= unused_bits(level - 1)) {
                Some(below) => self.descend(child, level - 1, below)?,
                None => (self.on_fault)(place.bad("slot", Problem::TooLarge { found: slot, limit: 0 }))?,
            }
        }
        Ok(())
    }

    fn leaf(&mut self, place: Place, node: &Node, prefix: u64) -> Result<(), Malformed> {
        for (index, word) in (0u64..).zip(node) {
            let mut left = *word;
            while left != 0 {
                let bit = left.trailing_zeros();
                left &= left - 1;
                let number = (prefix << LEAF_BITS) | (index * 64) | u64::from(bit);
                match Key::new(number) {
                    Some(key) => (self.visit)(Found::Block(key))?,
                    None => (self.on_fault)(place.bad("key", Problem::Unknown { found: number }))?,
                }
            }
        }
        Ok(())
    }
}

/// Bits at the top of a prefix at `level` that no key of 53 bits uses.
fn unused_bits(level: u32) -> u32 {
    u64::BITS - (PFN_BITS + 1) + LEAF_BITS + TABLE_BITS * level
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(address: u64, order: u32) -> Key {
        Key::of(Pfn::at(address).unwrap(), Order::new(order).unwrap())
    }

    #[test]
    fn the_worked_examples_have_the_kernels_keys() {
        let examples = [
            (0x1_2345_6000, 0, 0x0010_0000_0012_3456, [2, 0, 0, 0, 36], 13398),
            (0x1_2340_0000, 9, 0x0000_0800_0000_091A, [0, 2, 0, 0, 0], 2330),
            (0x4000_0000, 18, 0x0000_0004_0000_0001, [0, 0, 2, 0, 0], 1),
            (0x1_2345_6000, 1, 0x0008_0000_0009_1A2B, [1, 0, 0, 0, 18], 6699),
            (0, 0, 0x0010_0000_0000_0000, [2, 0, 0, 0, 0], 0),
        ];
        for (address, order, number, slots, bit) in examples {
            let key = key(address, order);
            assert_eq!(key.get(), number);
            assert_eq!([5, 4, 3, 2, 1].map(|level| key.slot(level)), slots);
            let (word, shift) = key.leaf_bit();
            assert_eq!(word * 64 + shift, bit);
            assert_eq!(key.range(), PageRange::block(Pfn::at(address).unwrap(), key.order()).unwrap());
            assert_eq!(key.order().get(), order);
        }
    }

    #[test]
    fn numbers_that_mean_no_block_are_no_keys() {
        assert_eq!(Key::new(0), None);
        assert_eq!(Key::new(1), None);
        assert_eq!(Key::new(1 << 53), None);
        assert!(Key::new(2).is_some());
    }

    /// Root, four tables and one leaf at the pages 1 to 6.
    fn single_path(key: Key) -> Vec<u8> {
        let mut memory = vec![0; 7 * PAGE_BYTES];
        for level in 1..=5u32 {
            let at = (6 - level as usize) * PAGE_BYTES + key.slot(level) * 8;
            memory[at..at + 8].copy_from_slice(&(u64::from(7 - level) * 4096).to_le_bytes());
        }
        let (word, bit) = key.leaf_bit();
        memory[6 * PAGE_BYTES + word * 8..][..8].copy_from_slice(&(1u64 << bit).to_le_bytes());
        memory
    }

    #[test]
    fn a_leaf_bit_stands_where_the_kernel_sets_it() {
        let memory = single_path(key(0x1_2345_6000, 0));
        assert_eq!(memory[6 * PAGE_BYTES + 1674], 1 << 6);
    }

    #[test]
    fn a_tree_that_refers_to_itself_ends_with_an_error() {
        let mut memory = single_path(key(0x1_2345_6000, 0));
        memory[PAGE_BYTES..PAGE_BYTES + 8].copy_from_slice(&4096u64.to_le_bytes());
        let error = walk(&memory, 4096, |_| Ok(())).unwrap_err();
        assert_eq!(error.problem, Problem::Repeated { found: 4096 });
    }

    #[test]
    fn a_slot_beyond_the_keys_width_is_refused() {
        let mut memory = single_path(key(0, 0));
        memory[PAGE_BYTES + 511 * 8..][..8].copy_from_slice(&(3 * 4096u64).to_le_bytes());
        assert_eq!(walk(&memory, 4096, |_| Ok(())).unwrap_err().field, "slot");
    }

    proptest! {
        #[test]
        fn a_walk_finds_the_block(pfn in 0u64..1 << 52, order in 0u32..=51) {
            let key = key((pfn >> order << order) << 12, order);
            let mut blocks = Vec::new();
            walk(&single_path(key), 4096, |found| {
                if let Found::Block(block) = found {
                    blocks.push(block);
                }
                Ok(())
            }).unwrap();
            prop_assert_eq!(blocks, [key]);
        }
    }
}
