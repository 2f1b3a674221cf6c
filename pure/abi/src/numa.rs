//! Which NUMA nodes memory comes from: a policy and its nodes, as the region table keeps them.

use core::fmt;
use core::str::FromStr;

use thiserror::Error;
use zerocopy::little_endian::U64;

use crate::memory::Malformed;
use crate::memory::Place;
use crate::memory::Problem;

/// Nodes are numbered below this: the most that Linux can be built for.
pub const NODES: usize = 1024;

const WORDS: usize = NODES / 64;

/// A set of NUMA nodes, by the kernel's numbers. Shown and read as the kernel writes one: `0,2-3`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Nodes([u64; WORDS]);

/// A text is no set of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("not a list of NUMA nodes below {NODES}, such as 0,2-3")]
pub struct NotNodes;

impl Nodes {
    /// No node.
    pub const NONE: Self = Self([0; WORDS]);

    /// One node. `None` if there can be none of this number.
    pub fn one(node: usize) -> Option<Self> {
        let mut nodes = Self::NONE;
        *nodes.0.get_mut(node / 64)? |= 1 << (node % 64);
        Some(nodes)
    }

    /// The nodes whose bits are set, the first word's lowest bit being node 0.
    pub const fn from_words(words: [u64; WORDS]) -> Self {
        Self(words)
    }

    /// The inverse of [`Nodes::from_words`].
    pub const fn words(&self) -> &[u64; WORDS] {
        &self.0
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::NONE
    }

    /// The nodes, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..NODES).filter(|node| self.0[node / 64] & 1 << (node % 64) != 0)
    }

    /// All of both.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        let mut nodes = self;
        nodes.0.iter_mut().zip(other.0).for_each(|(word, more)| *word |= more);
        nodes
    }

    /// These, but for those of `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        let mut nodes = self;
        nodes.0.iter_mut().zip(other.0).for_each(|(word, less)| *word &= !less);
        nodes
    }
}

impl fmt::Display for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut nodes = self.iter().peekable();
        let mut comma = "";
        while let Some(first) = nodes.next() {
            let mut last = first;
            while let Some(next) = nodes.next_if_eq(&(last + 1)) {
                last = next;
            }
            match last - first {
                0 => write!(f, "{comma}{first}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
            comma = ",";
        }
        if comma.is_empty() { f.write_str("none") } else { Ok(()) }
    }
}

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nodes({self})")
    }
}

impl FromStr for Nodes {
    type Err = NotNodes;

    fn from_str(text: &str) -> Result<Self, NotNodes> {
        let number = |text: &str| text.parse::<usize>().ok().filter(|node| *node < NODES).ok_or(NotNodes);
        let mut nodes = Self::NONE;
        for part in text.trim_ascii().split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(NotNodes);
            }
            for node in first..=last {
                nodes = nodes.with(Self::one(node).ok_or(NotNodes)?);
            }
        }
        Ok(nodes)
    }
}

/// Where pages come from when they are made. Pages that are there already stay where they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// From where whoever touches a page first runs.
    #[default]
    Default,
    /// From these nodes only; if they have no memory left, there is none.
    Bind(Nodes),
    /// From these nodes in turns.
    Interleave(Nodes),
    /// From these nodes as long as they have memory, else from others.
    Preferred(Nodes),
}

impl Policy {
    /// Its nodes; none for [`Policy::Default`].
    pub fn nodes(&self) -> Nodes {
        match *self {
            Self::Default => Nodes::NONE,
            Self::Bind(nodes) | Self::Interleave(nodes) | Self::Preferred(nodes) => nodes,
        }
    }

    pub(crate) fn code(&self) -> u32 {
        match self {
            Self::Default => 0,
            Self::Bind(_) => 1,
            Self::Interleave(_) => 2,
            Self::Preferred(_) => 3,
        }
    }

    pub(crate) fn read(place: Place, code: u32, words: [U64; WORDS]) -> Result<Self, Malformed> {
        let nodes = Nodes(words.map(U64::get));
        let policy = match code {
            0 => Self::Default,
            1 => Self::Bind(nodes),
            2 => Self::Interleave(nodes),
            3 => Self::Preferred(nodes),
            found => return Err(place.bad("policy", Problem::Unknown { found: found.into() })),
        };
        match (policy, nodes.is_empty()) {
            (Self::Default, false) => {
                Err(place.bad("nodes", Problem::Structure("are given, and the policy has none")))
            }
            (Self::Default, true) | (_, false) => Ok(policy),
            (_, true) => Err(place.bad("nodes", Problem::Zero)),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Bind(nodes) => write!(f, "bind:{nodes}"),
            Self::Interleave(nodes) => write!(f, "interleave:{nodes}"),
            Self::Preferred(nodes) => write!(f, "preferred:{nodes}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nodes_are_shown_as_the_kernel_writes_them() {
        for text in ["0", "0-1", "0,2-3", "1,3,5-7,1023"] {
            assert_eq!(text.parse::<Nodes>().unwrap().to_string(), text);
        }
        assert_eq!("0-1\n".parse::<Nodes>().unwrap().to_string(), "0-1", "as a file ends");
        assert_eq!(Nodes::NONE.to_string(), "none");
    }

    #[test]
    fn what_is_no_set_of_nodes_is_refused() {
        for text in
            ["", "a", "1-", "-1", "3-2", "0,,1", "1024", "0-18446744073709551615", "99999999999999999999"]
        {
            assert_eq!(text.parse::<Nodes>(), Err(NotNodes), "{text:?}");
        }
        assert_eq!(Nodes::one(NODES), None);
    }

    proptest! {
        #[test]
        fn a_set_is_what_was_put_into_it(some in prop::collection::btree_set(0..NODES, 0..20), more in prop::collection::btree_set(0..NODES, 0..20)) {
            let set = |numbers: &std::collections::BTreeSet<usize>| {
                numbers.iter().fold(Nodes::NONE, |nodes, node| nodes.with(Nodes::one(*node).unwrap()))
            };
            let (a, b) = (set(&some), set(&more));
            prop_assert!(a.iter().eq(some.iter().copied()));
            prop_assert!(a.with(b).iter().eq(some.union(&more).copied()));
            prop_assert!(a.without(b).iter().eq(some.difference(&more).copied()));
            prop_assert_eq!(Nodes::from_words(*a.words()), a);
            if !a.is_empty() {
                prop_assert_eq!(a.to_string().parse::<Nodes>(), Ok(a));
            }
        }
    }
}
