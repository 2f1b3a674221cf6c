//! Memory of which a page is lost, or the guest's alone. The marks of userfaultfd stand for the hardware's: to the kernel's page tables the two are
//! one.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::sync::Arc;

use abi::gmem::MemoryName;
use abi::gmem::flags;
use abi::vm::Identity;
use pages::PageRange;
use region::Errno;
use region::Region;
use tideover_gmem::ChangeError;
use tideover_gmem::Inode;
use tideover_gmem::Sharing;
use tideover_gmem::UnfitError;
use uffd::Mode;
use uffd::Uffd;

const MIB: usize = 1 << 20;
const SIZE: usize = 64 * MIB;

fn inode() -> Arc<Inode> {
    let mapping = Arc::new(Region::create("poison", SIZE as u64).unwrap().map().unwrap());
    let frames = PageRange::of_bytes(1 << 30, SIZE as u64).unwrap();
    Inode::new(MemoryName::literal("ram"), Identity::new([1; 16]), mapping, frames, flags::MMAP)
}

fn poison(inode: &Inode, offset: usize) {
    let uffd = Uffd::open().unwrap();
    uffd.register(inode.mapping(), 0..SIZE, Mode::Missing).unwrap();
    uffd.poison(inode.mapping(), offset..offset + 4096).unwrap();
}

/// R1.6.
#[test]
fn memory_with_a_poisoned_page_is_refused_and_the_first_one_is_told() {
    harness::need!(userfaultfd);
    let inode = inode();
    inode.mapping().write(0, &[7; 4 * MIB]).unwrap();
    inode.check_fit().unwrap();
    let name = inode.name();
    for offset in [48 * MIB, 20 * MIB, 4 * MIB] {
        poison(&inode, offset);
        let refused = inode.check_fit().unwrap_err();
        assert_eq!(refused, UnfitError::Poisoned { name, offset_bytes: offset as u64 });
        assert_eq!(refused.errno(), Errno::HWPOISON);
    }
    let present = inode.mapping().region().allocated_bytes().unwrap();
    assert_eq!(present, Some(4 * MIB as u64), "nothing was filled by looking");
    // Memory like any other, but for that page.
    inode.mapping().write(8 * MIB as u64, &[7; 4096]).unwrap();
    drop(inode.freeze().unwrap());
    inode.punch(0, 4 * MIB as u64).unwrap();
}

/// R1.6.
#[test]
fn pages_that_are_held_or_on_their_way_are_not_poisoned() {
    harness::need!(userfaultfd);
    let inode = inode();
    inode.allocate(0, MIB as u64).unwrap();
    let _frozen = inode.freeze().unwrap();
    inode.check_fit().unwrap();
}

/// O1.4, O1.6.
#[test]
fn memory_is_private_range_by_range_and_refused_if_any_is() {
    let inode = inode();
    let page = |number: u64| number * 4096;
    assert_eq!(inode.first_private(0, SIZE as u64), None);
    inode.converted(page(8), page(8), Sharing::Private).unwrap();
    inode.converted(page(10), page(2), Sharing::Shared).unwrap();
    let first = |from, len| inode.first_private(page(from), page(len));
    assert_eq!((first(0, 8), first(0, 9)), (None, Some(page(8))));
    assert_eq!((first(10, 2), first(10, 3), first(16, 100)), (None, Some(page(12)), None));
    let name = inode.name();
    let refused = inode.check_fit().unwrap_err();
    assert_eq!(refused, UnfitError::Private { name, offset_bytes: page(8) });
    assert_eq!(refused.errno(), Errno::OPNOTSUPP);

    let frozen = inode.freeze().unwrap();
    let refused = inode.converted(page(8), page(8), Sharing::Shared).unwrap_err();
    assert!(matches!(refused, ChangeError::Frozen { .. }), "{refused:?}");
    drop(frozen);
    let refused = inode.converted(SIZE as u64, page(1), Sharing::Private).unwrap_err();
    assert!(matches!(refused, ChangeError::Range { .. }), "{refused:?}");
    inode.converted(0, SIZE as u64, Sharing::Shared).unwrap();
    inode.check_fit().unwrap();
}
