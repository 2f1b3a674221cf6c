//! What this host has for memory, asked before anything is made.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use abi::numa::Nodes;
use abi::numa::Policy;
use abi::regions::Store;

use crate::HugePages;
use crate::PageSize;
use crate::Region;
use crate::RegionError;
use crate::check_size;
use crate::numa;

/// What this host has for memory. A memfd of small pages can be had everywhere. For a guest_memfd ask a VM:
/// `kvm::Capabilities` has the flags with which its KVM makes one, and here MMAP and INIT_SHARED are needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    /// Transparent huge pages of memfds.
    pub transparent: Transparent,
    /// The host's pools of huge pages, by size. Empty on a host without any.
    pub hugetlb: Vec<HugePages>,
    /// NUMA nodes that have memory.
    pub nodes: Nodes,
}

/// Whether transparent huge pages of a memfd can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transparent {
    /// The host's `shmem_enabled`: `never` is common, and says that none come by themselves. `None` if the kernel has
    /// no such setting.
    pub shmem_enabled: Option<String>,
    /// Whether memory could be collapsed into a huge page, which the setting does not tell: 2 MiB were tried. Else
    /// the kernel's error number.
    pub collapse: Result<(), i32>,
}

/// Asks, and tries out what does not say. Takes 2 MiB of memory for the while.
pub fn available() -> Available {
    let hugetlb = [PageSize::Huge, PageSize::Giant].into_iter().filter_map(HugePages::of).collect();
    let transparent = Transparent { shmem_enabled: shmem_enabled(), collapse: try_collapse() };
    Available { transparent, hugetlb, nodes: numa::host_nodes() }
}

fn shmem_enabled() -> Option<String> {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").ok()?;
    let (_, chosen) = text.split_once('[')?;
    Some(chosen.split_once(']')?.0.to_owned())
}

fn try_collapse() -> Result<(), i32> {
    let failed = |errno: rustix::io::Errno| errno.raw_os_error();
    let bytes = PageSize::Huge.bytes();
    let mapping =
        Region::create("trial", bytes).and_then(Region::map).map_err(|_| failed(rustix::io::Errno::NOMEM))?;
    let account = mapping.warm(PageSize::Huge, &mut |_, _| {});
    match account.map_err(|_| failed(rustix::io::Errno::NOMEM))? {
        account if account.huge_bytes == bytes => Ok(()),
        account => Err(account.refused.unwrap_or_default()),
    }
}

/// What a region is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its size, in bytes.
    pub len_bytes: u64,
    /// What its memory comes from.
    pub store: Store,
    /// The page size to ask for.
    pub page_size: PageSize,
    /// Which NUMA nodes its pages come from.
    pub policy: Policy,
}

/// Looks whether the host can give all of these at once, as far as it can be told before they are made: sizes and
/// stores that go together, NUMA nodes, free huge pages. What is told here may have gone to somebody else by the
/// time it is wanted.
///
/// # Errors
/// [`RegionError`]: what is wrong with the first that cannot be had, and what to do.
pub fn ask(wants: &[Want<'_>]) -> Result<(), RegionError> {
    ask_under(Path::new("/"), wants)
}

fn ask_under(root: &Path, wants: &[Want<'_>]) -> Result<(), RegionError> {
    let mut huge_bytes: BTreeMap<u64, u64> = BTreeMap::new();
    for Want { name, len_bytes, store, page_size, policy } in wants {
        page_size.check(name, *store)?;
        check_size(name, *len_bytes, *page_size)?;
        numa::check_nodes(name, policy)?;
        if *store != Store::Hugetlb {
            continue;
        }
        let sum = huge_bytes.entry(page_size.bytes()).or_default();
        *sum = sum.saturating_add(*len_bytes);
        let short =
            |shortage| RegionError::HugePages { name: (*name).to_owned(), shortage: Box::new(shortage) };
        HugePages::check_under(root, *page_size, *len_bytes, policy).map_err(short)?;
        HugePages::check_under(root, *page_size, *sum, &Policy::Default).map_err(short)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Shortage;
    use crate::hugepages::tests::FREE;
    use crate::hugepages::tests::Root;
    use crate::hugepages::tests::TOTAL;

    fn want(store: Store, page_size: PageSize, len_bytes: u64) -> Want<'static> {
        Want { name: "t", len_bytes, store, page_size, policy: Policy::Default }
    }

    #[test]
    fn the_host_says_what_it_has() {
        let available = available();
        assert!(!available.nodes.is_empty());
        assert!(
            available.hugetlb.iter().all(|pool| pool.free <= pool.total && pool.total > 0 || pool.free == 0)
        );
        if let Some(setting) = available.transparent.shmem_enabled {
            let known = ["always", "within_size", "advise", "never", "deny", "force"];
            assert!(known.contains(&setting.as_str()), "{setting}");
        }
        if let Err(errno) = available.transparent.collapse {
            assert_ne!(errno, 0, "a refusal has a number");
        }
    }

    #[test]
    fn sizes_and_stores_that_do_not_go_together_are_refused() {
        let page = |store, page_size| ask(&[want(store, page_size, 4 << 30)]).err();
        assert!(page(Store::Memfd, PageSize::Small).is_none());
        assert!(page(Store::Memfd, PageSize::Huge).is_none());
        assert!(page(Store::GuestMemfd, PageSize::Small).is_none());
        let no_such = [
            (Store::Memfd, PageSize::Giant),
            (Store::Hugetlb, PageSize::Small),
            (Store::GuestMemfd, PageSize::Huge),
            (Store::GuestMemfd, PageSize::Giant),
        ];
        for (store, page_size) in no_such {
            let refused = page(store, page_size);
            assert!(matches!(refused, Some(RegionError::PageSize { .. })), "{refused:?}");
        }
        let size = ask(&[want(Store::Hugetlb, PageSize::Huge, (2 << 20) + 4096)]).unwrap_err();
        assert!(matches!(size, RegionError::Size { page_size: PageSize::Huge, .. }), "{size:?}");
    }

    #[test]
    fn huge_pages_are_counted_over_all_that_is_wanted() {
        let root = Root::with("sum", &[(TOTAL, 10), (FREE, 10)]);
        let some = want(Store::Hugetlb, PageSize::Huge, 10 << 20);
        let small = want(Store::Memfd, PageSize::Small, 10 << 20);
        ask_under(&root.0, &[some, small, some]).unwrap();
        match ask_under(&root.0, &[some, some, some]).unwrap_err() {
            RegionError::HugePages { shortage, .. } => {
                assert!(matches!(*shortage, Shortage::TooFew { wanted: 15, free: 10, .. }), "{shortage:?}");
            }
            other => panic!("{other:?}"),
        }
        let giant = want(Store::Hugetlb, PageSize::Giant, 1 << 30);
        assert!(ask_under(&root.0, &[giant]).unwrap_err().to_string().contains("no huge pages of 1 GiB"));
    }

    #[test]
    fn a_node_that_the_host_does_not_have_is_named() {
        let policy = Policy::Bind("1023".parse().unwrap());
        let refused = ask(&[Want { policy, ..want(Store::Memfd, PageSize::Small, 4096) }]).unwrap_err();
        assert!(refused.to_string().contains("1023"), "{refused}");
    }
}
