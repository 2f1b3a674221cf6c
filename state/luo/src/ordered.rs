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

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::hash::Hasher;

    use super::*;

    thread_local! {
        static COMPARED: Cell<u64> = const { Cell::new(0) };
    }

    /// Counts how often it is compared.
    #[derive(Debug, Clone, Copy)]
    struct Counted(u64);

    impl PartialEq for Counted {
        fn eq(&self, other: &Self) -> bool {
            COMPARED.set(COMPARED.get() + 1);
            self.0 == other.0
        }
    }

    impl Eq for Counted {}

    impl Hash for Counted {
        fn hash<H: Hasher>(&self, hasher: &mut H) {
            self.0.hash(hasher);
        }
    }

    /// Comparisons for each key, to add and to find, among as many.
    fn comparisons(keys: u64) -> f64 {
        COMPARED.set(0);
        let mut ordered: Ordered<Counted, u64> = (0..keys).map(|key| (Counted(key), key)).collect();
        for key in 0..keys {
            assert_eq!(ordered.get(&Counted(key)), Some(&key));
            assert!(!ordered.contains(&Counted(key + keys)));
            *ordered.get_mut(&Counted(key)).unwrap() += 1;
        }
        (0..keys / 2).for_each(|key| assert_eq!(ordered.remove(&Counted(key)), Some(key + 1)));
        assert!(ordered.iter().copied().eq(keys / 2 + 1..=keys), "in the order of their adding");
        f64::from(u32::try_from(COMPARED.get()).unwrap()) / f64::from(u32::try_from(keys).unwrap())
    }

    /// H3.10.1.
    #[test]
    fn to_find_a_key_takes_no_more_comparisons_among_many() {
        let [few, many] = [100, 100_000].map(comparisons);
        assert!((1.0..6.0).contains(&few) && (1.0..6.0).contains(&many), "{few} and {many} for each key");
    }
}
