//! The host's pools of huge pages: how many it has set aside, and how many of those are free.

use std::fmt;
use std::fs;
use std::path::Path;

use abi::numa::Nodes;
use abi::numa::Policy;
use thiserror::Error;

use crate::PageSize;

const POOLS: &str = "sys/kernel/mm/hugepages";
const NODES: &str = "sys/devices/system/node";

/// The host's pool of huge pages of one size, as the kernel tells it in `/sys/kernel/mm/hugepages`. Others take
/// from it at any time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePages {
    /// Their size.
    pub page_size: PageSize,
    /// Pages in the pool.
    pub total: u64,
    /// Of those, pages that nobody has or was promised.
    pub free: u64,
    /// Pages that the kernel may add to the pool on demand, if it finds the memory.
    pub may_add: u64,
}

/// There are not as many huge pages as a region takes. Says what to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Shortage {
    /// The kernel knows none of this size.
    #[error(
        "this host has no huge pages of {page_size}: its processor or its kernel (CONFIG_HUGETLBFS) does not know \
         them"
    )]
    NoSuchSize {
        /// The size.
        page_size: PageSize,
    },
    /// The pool has too few.
    #[error(
        "{wanted} huge pages of {page_size} are wanted, and {free} of {total} are free{}: {}",
        On(*nodes), Remedy { wanted: *wanted, free: *free, total: *total, page_size: *page_size, nodes: *nodes }
    )]
    TooFew {
        /// The size.
        page_size: PageSize,
        /// Pages that are wanted.
        wanted: u64,
        /// Pages that are free.
        free: u64,
        /// Pages in the pool.
        total: u64,
        /// The nodes that they have to be on, if they do.
        nodes: Option<Nodes>,
    },
    /// The pool has enough, and the kernel gave none.
    #[error(
        "{free} huge pages of {page_size} are free{}, and the kernel gives less than {wanted}: look at the hugetlb \
         limit of the control group, and at the memory nodes of its cpuset",
        On(*nodes)
    )]
    Refused {
        /// The size.
        page_size: PageSize,
        /// Pages that are wanted.
        wanted: u64,
        /// Pages that are free.
        free: u64,
        /// The nodes that they have to be on, if they do.
        nodes: Option<Nodes>,
    },
}

struct On(Option<Nodes>);

impl fmt::Display for On {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(nodes) => write!(f, " on NUMA nodes {nodes}"),
            None => Ok(()),
        }
    }
}

/// What to do about too small a pool.
struct Remedy {
    wanted: u64,
    free: u64,
    total: u64,
    page_size: PageSize,
    nodes: Option<Nodes>,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pool, more) = (pool_name(self.page_size), self.wanted.saturating_sub(self.free));
        match self.nodes {
            Some(_) => write!(
                f,
                "have the host set {more} more aside there (/{NODES}/nodeN/hugepages/{pool}/nr_hugepages)"
            )?,
            None => write!(
                f,
                "have the host set more aside (echo {} > /{POOLS}/{pool}/nr_hugepages{})",
                self.total.saturating_add(more),
                if self.page_size == PageSize::Huge {
                    ", or vm.nr_hugepages where that is the default size"
                } else {
                    ""
                }
            )?,
        }
        match self.page_size {
            PageSize::Giant => write!(
                f,
                "; where it has no such memory in one piece any more, by the kernel's command line (hugepagesz=1G \
                 hugepages={})",
                self.total.saturating_add(more)
            ),
            PageSize::Small | PageSize::Huge => Ok(()),
        }
    }
}

impl HugePages {
    /// The pool of pages of this size. `None` if this host has none, as it never has for small pages.
    pub fn of(page_size: PageSize) -> Option<Self> {
        Self::under(Path::new("/"), page_size)
    }

    fn under(root: &Path, page_size: PageSize) -> Option<Self> {
        let pool = root.join(POOLS).join(pool_name(page_size));
        let count = |file| number(&pool.join(file));
        let total = count("nr_hugepages")?;
        let [free, reserved, most, added] =
            ["free_hugepages", "resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages"]
                .map(|file| count(file).unwrap_or_default());
        let may_add = most.saturating_sub(added);
        Some(Self { page_size, total, free: free.saturating_sub(reserved), may_add })
    }

    /// Looks whether `len_bytes` bytes of pages of this size can be had under a policy. Until they are had, they
    /// can be gone again.
    ///
    /// # Errors
    /// [`Shortage`]
    pub fn check(page_size: PageSize, len_bytes: u64, policy: &Policy) -> Result<(), Shortage> {
        Self::check_under(Path::new("/"), page_size, len_bytes, policy)
    }

    pub(crate) fn check_under(
        root: &Path,
        page_size: PageSize,
        len_bytes: u64,
        policy: &Policy,
    ) -> Result<(), Shortage> {
        let pool = Self::under(root, page_size).ok_or(Shortage::NoSuchSize { page_size })?;
        let wanted = len_bytes.div_ceil(page_size.bytes());
        let Self { total, free, may_add, .. } = pool;
        if wanted > free.saturating_add(may_add) {
            return Err(Shortage::TooFew { page_size, wanted, free, total, nodes: None });
        }
        let Policy::Bind(nodes) = *policy else { return Ok(()) };
        let (free, total) = on_nodes(root, page_size, nodes).unwrap_or((free, total));
        if wanted > free.saturating_add(may_add) {
            return Err(Shortage::TooFew { page_size, wanted, free, total, nodes: Some(nodes) });
        }
        Ok(())
    }

    /// Why the kernel did not give `len_bytes` bytes, as far as the pool tells.
    pub(crate) fn shortage(page_size: PageSize, len_bytes: u64, policy: &Policy) -> Shortage {
        let refused = || {
            let nodes = if let Policy::Bind(nodes) = policy { Some(*nodes) } else { None };
            let free = Self::of(page_size).map_or(0, |pool| pool.free);
            Shortage::Refused { page_size, wanted: len_bytes.div_ceil(page_size.bytes()), free, nodes }
        };
        Self::check(page_size, len_bytes, policy).err().unwrap_or_else(refused)
    }
}

impl fmt::Display for HugePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} huge pages of {} are free", self.free, self.total, self.page_size)
    }
}

/// The kernel's name for the pool.
fn pool_name(page_size: PageSize) -> String {
    format!("hugepages-{}kB", page_size.bytes() >> 10)
}

/// Free pages and pages on these nodes. `None` if the kernel does not tell them apart by node.
fn on_nodes(root: &Path, page_size: PageSize, nodes: Nodes) -> Option<(u64, u64)> {
    let mut sums = (0, 0);
    for node in nodes.iter() {
        let pool = root.join(NODES).join(format!("node{node}/hugepages")).join(pool_name(page_size));
        sums.0 += number(&pool.join("free_hugepages"))?;
        sums.1 += number(&pool.join("nr_hugepages"))?;
    }
    Some(sums)
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A made-up `/`, removed when dropped.
    pub(crate) struct Root(pub(crate) PathBuf);

    impl Root {
        pub(crate) fn with(test: &str, files: &[(&str, u64)]) -> Self {
            let root =
                Self(std::env::temp_dir().join(format!("tideover-region-{}-{test}", std::process::id())));
            for (file, number) in files {
                let path = root.0.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, format!("{number}\n")).unwrap();
            }
            root
        }

        fn refused(&self, bytes: u64, policy: &str) -> String {
            let policy =
                if policy.is_empty() { Policy::Default } else { Policy::Bind(policy.parse().unwrap()) };
            match HugePages::check_under(&self.0, PageSize::Huge, bytes, &policy) {
                Ok(()) => "enough".to_owned(),
                Err(shortage) => shortage.to_string(),
            }
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const MIB: u64 = 1 << 20;
    pub(crate) const TOTAL: &str = "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    pub(crate) const FREE: &str = "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    const RESERVED: &str = "sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages";
    const MOST: &str = "sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";
    const ADDED: &str = "sys/kernel/mm/hugepages/hugepages-2048kB/surplus_hugepages";

    #[test]
    fn pages_that_were_promised_to_somebody_are_not_free() {
        let root = Root::with("promised", &[(TOTAL, 10), (FREE, 8), (RESERVED, 3)]);
        let pool = HugePages::under(&root.0, PageSize::Huge).unwrap();
        assert_eq!((pool.total, pool.free, pool.may_add), (10, 5, 0));
        assert_eq!(root.refused(10 * MIB, ""), "enough");
        let refused = root.refused(11 * MIB, "");
        assert!(refused.starts_with("6 huge pages of 2 MiB are wanted, and 5 of 10 are free: "), "{refused}");
        assert!(
            refused.contains("echo 11 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"),
            "{refused}"
        );
    }

    #[test]
    fn pages_that_the_kernel_may_add_count() {
        let root = Root::with("added", &[(TOTAL, 1), (FREE, 1), (MOST, 4), (ADDED, 1)]);
        assert_eq!(root.refused(8 * MIB, ""), "enough");
        assert!(root.refused(10 * MIB, "").starts_with("5 huge pages"));
    }

    #[test]
    fn pages_on_other_nodes_do_not_count_where_memory_is_bound() {
        let node = |node: u32, file: &str| {
            format!("sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/{file}")
        };
        let files = [
            node(0, "nr_hugepages"),
            node(0, "free_hugepages"),
            node(1, "nr_hugepages"),
            node(1, "free_hugepages"),
        ];
        let [total0, free0, total1, free1] = files.each_ref().map(String::as_str);
        let root =
            Root::with("nodes", &[(TOTAL, 8), (FREE, 6), (total0, 5), (free0, 4), (total1, 3), (free1, 2)]);
        assert_eq!(root.refused(12 * MIB, ""), "enough");
        assert_eq!(root.refused(12 * MIB, "0-1"), "enough");
        assert_eq!(root.refused(4 * MIB, "1"), "enough");
        let refused = root.refused(6 * MIB, "1");
        assert!(
            refused.starts_with("3 huge pages of 2 MiB are wanted, and 2 of 3 are free on NUMA nodes 1: "),
            "{refused}"
        );
        assert!(refused.contains("set 1 more aside there"), "{refused}");
    }

    #[test]
    fn a_host_without_pages_of_a_size_says_so() {
        let root = Root::with("none", &[(TOTAL, 1)]);
        let refused = HugePages::check_under(&root.0, PageSize::Giant, 1, &Policy::Default).unwrap_err();
        assert_eq!(refused, Shortage::NoSuchSize { page_size: PageSize::Giant });
        assert_eq!(HugePages::of(PageSize::Small), None);
    }
}
