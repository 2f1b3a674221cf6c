//! Which blocks are preserved, and which of them somebody refers to: two bits for each.
//!
//! The leaves of the tree are kept as they are, so this takes as much memory as they do, twice over.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use abi::radix::Key;
use abi::radix::LEAF_BITS;
use abi::radix::Node;
use abi::radix::WORDS;
use pages::Order;
use pages::Pfn;

/// The most leaves that are kept: those of 8 TiB of single pages, in adjacent memory. It bounds what a hostile tree takes.
const MAX_LEAVES: usize = 1 << 16;

struct Leaf {
    preserved: Box<Node>,
    claimed: Box<Node>,
}

#[derive(Default)]
pub(crate) struct Marks {
    leaves: BTreeMap<u64, Leaf>,
    /// Orders of which there is a block, ascending.
    orders: Vec<Order>,
    /// There were more leaves than are kept.
    pub(crate) overflowed: bool,
}

fn test(node: &Node, key: Key) -> bool {
    let (word, bit) = key.leaf_bit();
    node.get(word).is_some_and(|word| word & 1 << bit != 0)
}

/// Sets the key's bit; true if it was set before.
fn set(node: &mut Node, key: Key) -> bool {
    let (word, bit) = key.leaf_bit();
    let Some(word) = node.get_mut(word) else { return false };
    let before = *word & 1 << bit != 0;
    *word |= 1 << bit;
    before
}

/// The keys whose bits are set.
fn keys(prefix: u64, words: impl Iterator<Item = u64>) -> impl Iterator<Item = Key> {
    (0u64..).zip(words).flat_map(move |(index, word)| {
        let bits = core::iter::successors(Some(word), |left| Some(left & left.wrapping_sub(1)));
        let bits = bits.take_while(|left| *left != 0).map(|left| u64::from(left.trailing_zeros()));
        bits.filter_map(move |bit| Key::new((prefix << LEAF_BITS) | (index * 64) | bit))
    })
}

impl Marks {
    pub(crate) fn preserve(&mut self, key: Key) {
        let prefix = key.get() >> LEAF_BITS;
        let full = self.leaves.len() >= MAX_LEAVES;
        if full && !self.leaves.contains_key(&prefix) {
            self.overflowed = true;
            return;
        }
        let empty = || Leaf { preserved: Box::new([0; WORDS]), claimed: Box::new([0; WORDS]) };
        set(&mut self.leaves.entry(prefix).or_insert_with(empty).preserved, key);
        if let Err(at) = self.orders.binary_search(&key.order()) {
            self.orders.insert(at, key.order());
        }
    }

    fn is_preserved(&self, key: Key) -> bool {
        self.leaves.get(&(key.get() >> LEAF_BITS)).is_some_and(|leaf| test(&leaf.preserved, key))
    }

    /// The order of the block that begins at a frame: of several the smallest, which a kernel sees last.
    pub(crate) fn order_at(&self, pfn: Pfn) -> Option<Order> {
        let begins = |order: &&Order| pfn.get().is_multiple_of(order.len_pages());
        self.orders.iter().filter(begins).find(|order| self.is_preserved(Key::of(pfn, **order))).copied()
    }

    /// The block that a frame is in.
    pub(crate) fn covering(&self, pfn: Pfn) -> Option<Key> {
        let mut keys = self.orders.iter().map(|order| Key::of(pfn, *order));
        keys.find(|key| self.is_preserved(*key))
    }

    /// Number of the first frame behind this one, which is in no block, that may be in one.
    pub(crate) fn next(&self, pfn: Pfn) -> u64 {
        let next = |order: &Order| {
            let (shift, at) = (order.get(), pfn.get() >> order.get());
            let leaf = self.leaves.contains_key(&(Key::of(pfn, *order).get() >> LEAF_BITS));
            let next = if leaf { at + 1 } else { ((at >> LEAF_BITS) + 1) << LEAF_BITS };
            next.saturating_mul(1 << shift)
        };
        self.orders.iter().map(next).min().unwrap_or(u64::MAX)
    }

    /// Notes that somebody refers to a block; true if somebody did before.
    pub(crate) fn claim(&mut self, key: Key) -> bool {
        let leaf = self.leaves.get_mut(&(key.get() >> LEAF_BITS));
        leaf.is_some_and(|leaf| set(&mut leaf.claimed, key))
    }

    /// The blocks that nobody refers to, by ascending key.
    pub(crate) fn unclaimed(&self) -> impl Iterator<Item = Key> + '_ {
        self.leaves.iter().flat_map(|(prefix, leaf)| {
            let words = leaf.preserved.iter().zip(leaf.claimed.iter());
            keys(*prefix, words.map(|(preserved, claimed)| preserved & !claimed))
        })
    }

    /// How many leaves list blocks of an order.
    pub(crate) fn leaves_of(&self, order: Order) -> u64 {
        let prefixes = self.leaves.keys().filter_map(|prefix| {
            // The order is the place of the highest bit, which may be below the leaf's part of the key.
            let leaf = self.leaves.get(prefix)?;
            let first = keys(*prefix, leaf.preserved.iter().copied()).find(|key| key.order() == order);
            first.map(|_| 1)
        });
        prefixes.sum()
    }

    /// The blocks that lie in a larger one that is preserved, too.
    pub(crate) fn overlaps(&self) -> impl Iterator<Item = (Key, Key)> + '_ {
        self.leaves.iter().flat_map(move |(prefix, leaf)| {
            let first = keys(*prefix, leaf.preserved.iter().copied()).next();
            let order = first.map_or(Order::PAGE, Key::order);
            // Where no leaf of a larger order is, nothing can overlap.
            let larger: Vec<Order> = self
                .orders
                .iter()
                .copied()
                .filter(|other| {
                    let place = first.map(|first| first.range().start());
                    let above = place.map(|pfn| Key::of(pfn, *other).get() >> LEAF_BITS);
                    *other > order && above.is_some_and(|above| self.leaves.contains_key(&above))
                })
                .collect();
            let none = larger.is_empty() && *prefix != 0;
            let words = leaf.preserved.iter().map(move |word| if none { 0 } else { *word });
            keys(*prefix, words).filter_map(move |key| {
                let start = key.range().start();
                let above =
                    |order: &&Order| **order > key.order() && self.is_preserved(Key::of(start, **order));
                let orders = if larger.is_empty() { &self.orders } else { &larger };
                let found = orders.iter().find(above)?;
                Some((key, Key::of(start, *found)))
            })
        })
    }
}
