//! Regions of huge pages from the host's pool, and of a guest_memfd.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;

use kvm::GuestMemfdFlags;
use kvm::VmBuilder;
use kvm::guest_memfd;
use kvm::kvm_ioctls::Kvm;
use rustix::fs::MemfdFlags;
use rustix::fs::SealFlags;
use rustix::fs::fcntl_add_seals;
use rustix::fs::ftruncate;
use rustix::fs::memfd_create;
use tideover_region::HugePages;
use tideover_region::Mapping;
use tideover_region::PageSize;
use tideover_region::Policy;
use tideover_region::Region;
use tideover_region::RegionError;
use tideover_region::Shortage;
use tideover_region::Store;
use tideover_region::host_nodes;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn dup(mapping: &Mapping) -> OwnedFd {
    mapping.region().as_fd().try_clone_to_owned().unwrap()
}

/// What a descriptor is instead of a region.
#[track_caller]
fn why(accepted: Result<Region, RegionError>) -> String {
    match accepted {
        Err(RegionError::NotARegion { why, .. }) => why,
        other => panic!("{other:?}"),
    }
}

fn policy_on_the_first_node() -> Policy {
    let first = host_nodes().iter().next().unwrap();
    Policy::Bind(first.to_string().parse().unwrap())
}

/// Writes a word here and there, and reads it through another mapping of the same file.
#[track_caller]
fn assert_shared(one: &Mapping, other: &Mapping) {
    for offset in (0..one.len_bytes()).step_by(usize::try_from(MIB / 2).unwrap()) {
        one.store(offset, offset ^ 0x5EED).unwrap();
        assert_eq!(other.load(offset).unwrap(), offset ^ 0x5EED);
    }
}

#[test]
fn a_hugetlb_region_has_all_its_pages_when_it_is_mapped() {
    harness::need!(hugetlb);
    let region = Region::create_hugetlb("huge", 8 * MIB, PageSize::Huge).unwrap();
    assert_eq!((region.allocated_bytes().unwrap(), region.is_whole().unwrap()), (Some(0), false));
    let mut seen = Vec::new();
    let mapping = region.map_with(&Policy::Default, &mut |done, of| seen.push((done, of))).unwrap();
    assert_eq!(seen, [(0, 8 * MIB), (8 * MIB, 8 * MIB)]);
    let region = mapping.region();
    assert_eq!((region.allocated_bytes().unwrap(), region.is_whole().unwrap()), (Some(8 * MIB), true));
    assert_eq!((region.store(), region.page_size()), (Store::Hugetlb, PageSize::Huge));
    assert!(mapping.host_address().is_multiple_of(2 << 20));
    assert_eq!(mapping.huge_bytes().unwrap(), 8 * MIB);
    let account = mapping.warm(PageSize::Huge, &mut |_, _| {}).unwrap();
    assert_eq!((account.huge_bytes, account.refused), (8 * MIB, None));
    assert!(ftruncate(region, 4 * MIB).is_err() && ftruncate(region, 16 * MIB).is_err());
    assert!(fcntl_add_seals(region, SealFlags::FUTURE_WRITE).is_err());
}

#[test]
fn a_hugetlb_region_keeps_its_pages() {
    harness::need!(hugetlb);
    let mapping = Region::create_hugetlb("kept", 4 * MIB, PageSize::Huge).unwrap().map().unwrap();
    mapping.store(0, 7).unwrap();
    let refused = mapping.region().punch(0, 2 * MIB);
    assert!(matches!(refused, Err(RegionError::Whole { .. })), "{refused:?}");
    assert_eq!(mapping.load(0).unwrap(), 7);
    mapping.region().allocate(0, 4096).unwrap();
    mapping.region().fill().unwrap();
    assert_eq!(mapping.load(0).unwrap(), 7);
}

/// P6.5.7.
#[test]
fn hugetlb_memory_is_accepted_if_it_is_whole_and_has_the_pages_that_were_told() {
    harness::need!(hugetlb);
    let mapping = Region::create_hugetlb("handed", 4 * MIB, PageSize::Huge).unwrap().map().unwrap();
    let accept = |bytes, store, page_size| Region::accept_as("t", dup(&mapping), bytes, store, page_size);
    let other = accept(4 * MIB, Store::Hugetlb, PageSize::Huge).unwrap().map().unwrap();
    assert_eq!(other.huge_bytes().unwrap(), 0, "nothing was touched through it");
    assert_shared(&mapping, &other);
    assert!(why(accept(2 * MIB, Store::Hugetlb, PageSize::Huge)).contains("has 4194304 bytes"));
    assert!(why(accept(4 * MIB, Store::Memfd, PageSize::Huge)).contains("from the host's pool"));
    assert!(why(accept(4 * MIB, Store::GuestMemfd, PageSize::Small)).contains("is no guest_memfd"));

    let small = Region::create("small", 4 * MIB).unwrap();
    let fd = small.as_fd().try_clone_to_owned().unwrap();
    assert!(why(Region::accept_as("t", fd, 4 * MIB, Store::Hugetlb, PageSize::Huge)).contains("not of huge"));

    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    let bare = |seals| {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
        let fd = memfd_create("bare", flags | MemfdFlags::HUGE_2MB).unwrap();
        ftruncate(&fd, GIB).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        fd
    };
    let accept = |fd, page_size| Region::accept_as("t", fd, GIB, Store::Hugetlb, page_size);
    assert!(why(accept(bare(seals), PageSize::Huge)).contains("not all of its huge pages"));
    assert!(why(accept(bare(seals), PageSize::Giant)).contains("has pages of 2097152 bytes, not of 1 GiB"));
    assert!(why(accept(bare(SealFlags::GROW), PageSize::Huge)).contains("not sealed"));
}

#[test]
fn more_huge_pages_than_there_are_are_refused_before_anything_is_touched() {
    let Some(pool) = HugePages::of(PageSize::Huge) else {
        let refused = Region::create_hugetlb("many", 1 << 40, PageSize::Huge).unwrap_err();
        let shortage = Shortage::NoSuchSize { page_size: PageSize::Huge };
        assert!(
            matches!(&refused, RegionError::HugePages { shortage: s, .. } if **s == shortage),
            "{refused:?}"
        );
        return;
    };
    assert!(pool.free < 1 << 19, "a terabyte of them");
    let refused = Region::create_hugetlb("many", 1 << 40, PageSize::Huge).unwrap().map().unwrap_err();
    let text = refused.to_string();
    assert!(text.contains("for the region many: 524288 huge pages of 2 MiB are wanted, and "), "{text}");
    assert!(text.contains("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"), "{text}");
}

#[test]
fn hugetlb_memory_comes_from_the_nodes_that_were_asked_for() {
    harness::need!(hugetlb);
    let policy = policy_on_the_first_node();
    let region = Region::create_hugetlb("bound", 4 * MIB, PageSize::Huge).unwrap();
    let mapping = region.map_with(&policy, &mut |_, _| {}).unwrap();
    assert_eq!(mapping.policy().unwrap(), Some(policy));
    assert!(mapping.region().is_whole().unwrap());
    let other = Region::accept_as("t", dup(&mapping), 4 * MIB, Store::Hugetlb, PageSize::Huge).unwrap();
    let other = other.map_with(&policy, &mut |_, _| {}).unwrap();
    assert_eq!(other.policy().unwrap(), Some(policy));
}

#[test]
fn pages_of_a_gib_are_mapped_whole() {
    harness::need!(hugetlb_1g);
    let mapping = Region::create_hugetlb("giant", GIB, PageSize::Giant).unwrap().map().unwrap();
    assert!(mapping.host_address().is_multiple_of(1 << 30));
    assert!(mapping.region().is_whole().unwrap());
    assert_eq!(mapping.warm(PageSize::Giant, &mut |_, _| {}).unwrap().huge_bytes, GIB);
    let accept = |page_size| Region::accept_as("t", dup(&mapping), GIB, Store::Hugetlb, page_size);
    assert!(why(accept(PageSize::Huge)).contains("not of 2 MiB"));
    let other = accept(PageSize::Giant).unwrap().map().unwrap();
    assert!(other.host_address().is_multiple_of(1 << 30));
    assert_shared(&mapping, &other);
}

/// A guest_memfd, and the VM that made it.
fn guest_memfd_with(flags: GuestMemfdFlags, bytes: u64) -> (OwnedFd, VmBuilder) {
    let builder = VmBuilder::create(&Kvm::new().unwrap()).unwrap();
    (guest_memfd::create(builder.fd(), bytes, flags).unwrap(), builder)
}

fn guest_memfd_region(bytes: u64) -> (Region, VmBuilder) {
    let (fd, builder) = guest_memfd_with(GuestMemfdFlags::MMAP | GuestMemfdFlags::INIT_SHARED, bytes);
    (Region::accept_as("gmem", fd, bytes, Store::GuestMemfd, PageSize::Small).unwrap(), builder)
}

/// R4.1, G5.4.1.
#[test]
fn a_guest_memfd_is_known_as_one() {
    harness::need!(kvm, guest_memfd);
    let flags = GuestMemfdFlags::MMAP | GuestMemfdFlags::INIT_SHARED;
    let (fd, _vm) = guest_memfd_with(flags, 4 * MIB);
    let accept =
        |bytes, store| Region::accept_as("t", fd.try_clone().unwrap(), bytes, store, PageSize::Small);
    assert!(accept(4 * MIB, Store::GuestMemfd).is_ok());
    assert!(why(accept(8 * MIB, Store::GuestMemfd)).contains("has 4194304 bytes"));
    assert!(why(accept(4 * MIB, Store::Memfd)).contains("no memory file"));
    let memfd = Region::create("anon_inode:[kvm-gmem]", 4 * MIB).unwrap();
    let memfd = memfd.as_fd().try_clone_to_owned().unwrap();
    let refused = Region::accept_as("t", memfd, 4 * MIB, Store::GuestMemfd, PageSize::Small);
    assert!(why(refused).contains("is no guest_memfd"));
    let huge = Region::accept_as("t", fd, 4 * MIB, Store::GuestMemfd, PageSize::Huge);
    assert!(matches!(huge, Err(RegionError::PageSize { .. })), "{huge:?}");
}

/// R4.1.
#[test]
fn two_guest_memfds_are_two_files() {
    harness::need!(kvm, guest_memfd);
    let (one, other) = (guest_memfd_region(MIB), guest_memfd_region(MIB));
    assert_ne!(one.0.file_number().unwrap(), other.0.file_number().unwrap());
}

/// R1.2, G5.3.9, G5.3.12, G5.4.1.
#[test]
fn a_guest_memfd_that_the_host_cannot_touch_is_not_mapped() {
    harness::need!(kvm, guest_memfd);
    for flags in [GuestMemfdFlags::NONE, GuestMemfdFlags::MMAP] {
        let (fd, _vm) = guest_memfd_with(flags, MIB);
        let region = Region::accept_as("t", fd, MIB, Store::GuestMemfd, PageSize::Small).unwrap();
        match region.map() {
            Err(RegionError::NotARegion { why, .. }) => assert!(why.contains("INIT_SHARED"), "{why}"),
            other => panic!("{flags}: {other:?}"),
        }
    }
}

/// G5.3.10, G5.3.13, G5.4.2.
#[test]
fn of_a_guest_memfd_is_known_what_was_touched_and_whether_we_filled_it() {
    harness::need!(kvm, guest_memfd);
    let (region, _vm) = guest_memfd_region(4 * MIB);
    let mapping = region.map().unwrap();
    let known = || {
        let region = mapping.region();
        assert_eq!(region.allocated_bytes().unwrap(), None);
        (region.is_whole().unwrap(), mapping.touched_bytes().unwrap())
    };
    mapping.store(0, 1).unwrap();
    mapping.store(2 * MIB, 1).unwrap();
    assert_eq!(known(), (false, 8192));
    mapping.region().allocate(0, 4 * MIB).unwrap();
    assert_eq!(known(), (false, 8192), "it could be, and nobody keeps account of parts");
    mapping.region().fill().unwrap();
    assert_eq!(known(), (true, 8192));
    mapping.region().punch(2 * MIB, 4096).unwrap();
    assert_eq!(known(), (false, 4096));
    assert_eq!(mapping.load(2 * MIB).unwrap(), 0);
    let account = mapping.warm(PageSize::Small, &mut |_, _| {}).unwrap();
    assert_eq!((account.huge_bytes, account.refused), (0, None));
    assert_eq!(known(), (true, 4 * MIB));
    let other = Region::accept_as("t", dup(&mapping), 4 * MIB, Store::GuestMemfd, PageSize::Small);
    let other = other.unwrap().map().unwrap();
    assert_shared(&mapping, &other);
    assert!(!other.region().is_whole().unwrap(), "who gets it does not know");
}

#[test]
fn a_guest_memfd_keeps_its_policy_or_says_that_it_cannot() {
    harness::need!(kvm, guest_memfd);
    let policy = policy_on_the_first_node();
    let (region, _vm) = guest_memfd_region(MIB);
    match region.map_with(&policy, &mut |_, _| {}) {
        Ok(mapping) => {
            let other = Region::accept_as("t", dup(&mapping), MIB, Store::GuestMemfd, PageSize::Small);
            assert_eq!(other.unwrap().map().unwrap().policy().unwrap(), Some(policy));
        }
        Err(refused @ RegionError::PolicyNotKept { .. }) => {
            assert!(refused.to_string().contains("numactl"), "{refused}");
        }
        Err(other) => panic!("{other:?}"),
    }
}
