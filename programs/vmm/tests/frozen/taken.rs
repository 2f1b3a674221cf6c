//! A guest whose memory is taken from under it.

use std::os::fd::AsFd;
use std::sync::Arc;

use kvm::GuestMemfdFlags;
use kvm::MemoryFault;
use kvm::RunError;
use kvm::VmBuilder;
use region::Mapping;
use region::PageSize;
use region::Region;
use region::Store;

use crate::rig::Guest;
use crate::rig::MEMORY_BYTES;
use crate::rig::PAGE;
use crate::rig::SHAPES;
use crate::rig::builder;
use crate::rig::inode;
use crate::rig::progress;
use crate::rig::region;
use crate::rig::soon;

/// From here on the memory is one that is taken. The program and the page tables stay: KVM reads some of them by the host's
/// mapping.
const TAKEN: u64 = 2 << 20;

fn guest_memfd(builder: &VmBuilder) -> Arc<Mapping> {
    let flags = GuestMemfdFlags::MMAP | GuestMemfdFlags::INIT_SHARED;
    let fd = kvm::guest_memfd::create(builder.fd(), MEMORY_BYTES, flags).unwrap();
    let region = Region::accept_as("taken", fd, MEMORY_BYTES, Store::GuestMemfd, PageSize::Small).unwrap();
    Arc::new(region.map().unwrap())
}

/// G5.6.2.
#[test]
fn a_guest_whose_guest_memfd_is_gone_fails_and_kvm_says_at_which_address() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    let (program, taken) = (inode(region(false)), guest_memfd(&builder));
    let mut guest = Guest::with(builder, &program, TAKEN, SHAPES[1], |slots| {
        let file = kvm::Binding { guest_memfd: taken.region().as_fd(), offset_bytes: TAKEN };
        slots.add_bound(1, TAKEN, &taken, TAKEN, MEMORY_BYTES - TAKEN, file).unwrap();
    });
    guest.start();
    soon("the guest goes through its memory", || progress(&program).1 > 0);
    // The file goes with its last mapping and descriptor; the slot stays.
    taken.revoke().unwrap();
    let failed = guest.failed();
    let RunError::Memory(fault) = failed else { panic!("{failed:?}") };
    let MemoryFault { guest_address, len_bytes, private, poisoned, .. } = fault;
    assert!((TAKEN..MEMORY_BYTES).contains(&guest_address) && guest_address.is_multiple_of(PAGE), "{fault}");
    assert_eq!((len_bytes, private, poisoned), (PAGE, false, false), "{fault}");

    // It stands where it stood, can be saved, and meets the same again.
    let before = (guest.vcpu().fd().get_regs().unwrap(), guest.save());
    guest.start();
    let again = guest.failed();
    assert_eq!(again.errno(), Some(libc::EFAULT));
    assert!(matches!(again, RunError::Memory(other) if other == fault), "{again:?}");
    assert_eq!(guest.vcpu().fd().get_regs().unwrap(), before.0);
}
