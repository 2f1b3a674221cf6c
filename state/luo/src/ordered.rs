//! Entries in the order in which they were added, found by their key.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;

/// Sessions by name, or files by token. The order is part of LUO's rules; the lookup is not linear, as it is
/// in a kernel, where n files cost O(n²).
pub(crate) struct Ordered<K, V> {
    /// By the number of their adding.
    entries: BTreeMap<u64, V>,
    /// One for each entry.
    numbers: HashMap<K, u64>,
    next: u64,
}

/// The entries, the first added first.
impl<K, V: fmt::Debug> fmt::Debug for Ordered<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.entries.values()).finish()
    }
}

impl<K, V> Default for Ordered<K, V> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), numbers: HashMap::new(), next: 0 }
    }
}

impl<K: Eq + Hash, V> Ordered<K, V> {
    /// Adds an entry behind all others; one that had the key goes.
    pub(crate) fn push(&mut self, key: K, value: V) {
        if let Some(old) = self.numbers.insert(key, self.next) {
            self.entries.remove(&old);
        }
        self.entries.insert(self.next, value);
        self.next += 1;
    }

    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        self.entries.remove(&self.numbers.remove(key)?)
    }

    pub(crate) fn contains(&self, key: &K) -> bool {
        self.numbers.contains_key(key)
    }

    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        self.entries.get(self.numbers.get(key)?)
    }

    pub(crate) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.entries.get_mut(self.numbers.get(key)?)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The first added first.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &V> {
        self.entries.values()
    }

    pub(crate) fn iter_mut(&mut self) -> impl DoubleEndedIterator<Item = &mut V> {
        self.entries.values_mut()
    }

    pub(crate) fn into_values(self) -> impl DoubleEndedIterator<Item = V> {
        self.entries.into_values()
    }
}

impl<K: Eq + Hash, V> FromIterator<(K, V)> for Ordered<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut ordered = Self::default();
        entries.into_iter().for_each(|(key, value)| ordered.push(key, value));
        ordered
    }
}
