//! Whose VM object may see guest memory, and where.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::sync::Arc;

use abi::gmem::MemoryName;
use abi::gmem::flags;
use abi::vm::Identity;
use kvm::MemorySlots;
use kvm::SlotError;
use kvm::VmBuilder;
use kvm::kvm_ioctls::Kvm;
use pages::PageRange;
use region::Errno;
use region::Mapping;
use region::Region;
use tideover_gmem::BindError;
use tideover_gmem::Binding;
use tideover_gmem::GmemFile;
use tideover_gmem::Inode;
use tideover_gmem::OpenError;

const MIB: u64 = 1 << 20;
const OURS: Identity = Identity::new([1; 16]);
const THEIRS: Identity = Identity::new([2; 16]);

fn inode() -> Arc<Inode> {
    let mapping = Arc::new(Region::create("bound", 8 * MIB).unwrap().map().unwrap());
    let frames = PageRange::of_bytes(1 << 30, 8 * MIB).unwrap();
    Inode::new(MemoryName::literal("ram"), OURS, mapping, frames, flags::MMAP)
}

fn slots() -> MemorySlots<Arc<Mapping>> {
    VmBuilder::create(&Kvm::new().unwrap()).unwrap().memory_slots()
}

fn open(inode: &Arc<Inode>, slots: &MemorySlots<Arc<Mapping>>) -> GmemFile {
    GmemFile::open(Arc::clone(inode), OURS, slots.vm()).unwrap()
}

fn binding(slot: u32, offset_mib: u64, len_mib: u64) -> Binding {
    let (offset_bytes, len_bytes) = (offset_mib * MIB, len_mib * MIB);
    Binding { slot, guest_address: 0x1_0000_0000 + u64::from(slot) * 16 * MIB, offset_bytes, len_bytes }
}

/// R3.4, R3.6, R3.7, R3.8, O3.1.
#[test]
fn memory_is_opened_for_its_own_machine_only() {
    harness::need!(kvm);
    let inode = inode();
    let slots = slots();
    let refused = GmemFile::open(Arc::clone(&inode), THEIRS, slots.vm()).unwrap_err();
    assert_eq!(refused, OpenError::Identity { name: inode.name(), owner: OURS, asked: THEIRS });
    let file = GmemFile::open(Arc::clone(&inode), OURS, slots.vm()).unwrap();
    assert!(Arc::ptr_eq(file.inode(), &inode));
    assert_eq!(file.bindings(), []);
}

/// R3.1.
#[test]
fn a_file_keeps_the_memory_that_its_maker_let_go() {
    harness::need!(kvm);
    let inode = inode();
    inode.mapping().write(0, b"kept").unwrap();
    let file = GmemFile::open(inode, OURS, slots().vm()).unwrap();
    let mut read = [0; 4];
    file.inode().mapping().read(0, &mut read).unwrap();
    assert_eq!(&read, b"kept");
}

/// R2.3.
#[test]
fn an_address_of_the_guest_leads_to_its_byte_and_back() {
    harness::need!(kvm);
    let mut slots = slots();
    let file = GmemFile::open(inode(), OURS, slots.vm()).unwrap();
    for binding in [binding(0, 4, 2), binding(3, 0, 1)] {
        file.bind(&mut slots, binding).unwrap();
        for at in [0, 1, 4096, binding.len_bytes - 1] {
            let (offset, address) = (binding.offset_bytes + at, binding.guest_address + at);
            assert_eq!(file.guest_address(offset), Some(address));
            assert_eq!(file.offset_bytes(address), Some(offset));
        }
        assert_eq!(file.offset_bytes(binding.guest_address - 1), None);
        assert_eq!(file.offset_bytes(binding.guest_address + binding.len_bytes), None);
    }
    assert_eq!(
        (file.guest_address(2 * MIB), file.guest_address(6 * MIB), file.guest_address(u64::MAX)),
        (None, None, None)
    );
}

/// G5.5.8.
#[test]
fn a_page_has_one_place_in_a_vm() {
    harness::need!(kvm);
    let mut slots = slots();
    let file = open(&inode(), &slots);
    file.bind(&mut slots, binding(0, 2, 2)).unwrap();
    for (offset, len) in [(2, 2), (2, 1), (3, 1), (1, 2), (3, 4), (0, 8)] {
        match file.bind(&mut slots, binding(1, offset, len)) {
            Err(BindError::Bound { slot, offset_bytes, .. }) => {
                assert_eq!((slot, offset_bytes), (0, offset * MIB))
            }
            other => panic!("{offset} {len}: {other:?}"),
        }
    }
    file.bind(&mut slots, binding(1, 4, 4)).unwrap();
    file.bind(&mut slots, binding(2, 0, 2)).unwrap();
    assert_eq!(file.bindings(), [binding(0, 2, 2), binding(1, 4, 4), binding(2, 0, 2)]);
}

/// G5.5.3, G5.5.5, G5.5.7, G5.5.10.
#[test]
fn a_binding_that_no_slot_can_be_is_refused_and_leaves_nothing() {
    harness::need!(kvm);
    let mut slots = slots();
    let file = open(&inode(), &slots);
    let refused = |file: &GmemFile, slots: &mut _, binding| match file.bind(slots, binding) {
        Err(BindError::Slot { source, .. }) => source,
        other => panic!("{other:?}"),
    };
    let cases = [
        binding(0, 4, 5),
        binding(0, 8, 1),
        binding(0, 0, 0),
        Binding { offset_bytes: 1, ..binding(0, 0, 1) },
        Binding { len_bytes: u64::MAX, ..binding(0, 0, 1) },
        Binding { offset_bytes: u64::MAX - 4095, ..binding(0, 0, 1) },
    ];
    for case in cases {
        let error = refused(&file, &mut slots, case);
        assert!(
            matches!(
                error,
                SlotError::MemoryRange { .. } | SlotError::Unaligned { .. } | SlotError::GuestRange { .. }
            ),
            "{error:?}"
        );
        assert_eq!(file.bindings(), []);
    }
    file.bind(&mut slots, binding(0, 0, 8)).unwrap();
    let other = open(&inode(), &slots);
    assert!(matches!(refused(&other, &mut slots, binding(0, 0, 8)), SlotError::InUse { .. }));
    let here = Binding { slot: 1, ..binding(0, 0, 8) };
    assert!(matches!(refused(&other, &mut slots, here), SlotError::Overlap { .. }));
}

/// R3.4, R4.2, G5.5.14.
#[test]
fn another_vm_object_sees_the_memory_at_places_of_its_own() {
    harness::need!(kvm);
    let inode = inode();
    let (mut first, mut second) = (slots(), slots());
    let one = open(&inode, &first);
    let other = one.link(OURS, second.vm()).unwrap();
    one.bind(&mut first, binding(0, 0, 8)).unwrap();
    other.bind(&mut second, binding(3, 0, 8)).unwrap();
    assert_eq!(one.bindings(), [binding(0, 0, 8)]);
    assert_eq!(other.bindings(), [binding(3, 0, 8)]);
    assert_eq!(inode.files(), 2);
    drop((other, second));
    assert_eq!(inode.files(), 1);
}

/// R3.8, R4.2.
#[test]
fn memory_is_linked_to_each_vm_object_once_and_to_its_own_machine_only() {
    harness::need!(kvm);
    let inode = inode();
    let (mut first, mut second) = (slots(), slots());
    let file = open(&inode, &first);
    let name = inode.name();
    let refused = |asked, slots: &MemorySlots<_>| file.link(asked, slots.vm()).unwrap_err();
    assert_eq!(refused(OURS, &first), OpenError::Taken { name });
    assert_eq!(refused(THEIRS, &second), OpenError::Identity { name, owner: OURS, asked: THEIRS });
    assert_eq!(refused(THEIRS, &second).errno(), Errno::INVAL);
    assert_eq!(refused(OURS, &first).errno(), Errno::INVAL);
    assert_eq!(inode.files(), 1);

    let linked = file.link(OURS, second.vm()).unwrap();
    assert!(Arc::ptr_eq(linked.inode(), &inode), "another file, one inode");
    assert_eq!(linked.bindings(), []);
    // A file is of one VM object, as a guest_memfd is.
    for (file, slots) in [(&file, &mut second), (&linked, &mut first)] {
        let error = file.bind(slots, binding(0, 0, 8)).unwrap_err();
        assert!(matches!(error, BindError::OtherVm { .. }), "{error:?}");
        assert_eq!(error.errno(), Errno::INVAL);
        assert_eq!(slots.iter().count(), 0);
    }
    linked.bind(&mut second, binding(0, 0, 8)).unwrap();
    // The source may go.
    drop((file, first));
    inode.mapping().store(0, 7).unwrap();
    assert_eq!(linked.bindings(), [binding(0, 0, 8)]);
}

/// R3.6, O3.1.
#[test]
fn a_vm_object_at_the_place_of_one_that_is_gone_is_another_one() {
    harness::need!(kvm);
    let inode = inode();
    let first = slots();
    let file = open(&inode, &first);
    drop(first);
    for _ in 0..50 {
        let mut other = slots();
        let refused = file.bind(&mut other, binding(0, 0, 8)).unwrap_err();
        assert!(matches!(refused, BindError::OtherVm { .. }), "{refused:?}");
        file.link(OURS, other.vm()).unwrap();
    }
}

/// G5.7.4.
#[test]
fn a_slot_that_is_deleted_is_bound_no_more_whoever_deletes_it() {
    harness::need!(kvm);
    let mut slots = slots();
    let file = open(&inode(), &slots);
    file.bind(&mut slots, binding(0, 0, 4)).unwrap();
    file.bind(&mut slots, binding(1, 4, 4)).unwrap();
    file.unbind(0).unwrap();
    assert_eq!(file.bindings(), [binding(1, 4, 4)]);
    assert_eq!(slots.iter().map(|range| range.slot).collect::<Vec<_>>(), [1]);
    slots.remove(1).unwrap();
    assert_eq!(file.bindings(), []);
    file.bind(&mut slots, binding(2, 0, 8)).unwrap();
    let refused = file.unbind(1).unwrap_err();
    assert!(matches!(refused, BindError::Slot { source: SlotError::Unknown { slot: 1 }, .. }), "{refused:?}");
    assert_eq!(refused.errno(), Errno::INVAL);
    assert_eq!(file.bindings(), [binding(2, 0, 8)]);
}

/// R3.6, G5.7.4.
#[test]
fn a_slot_of_a_number_that_was_used_before_is_another_slot() {
    harness::need!(kvm);
    let mut slots = slots();
    let (one, other) = (inode(), inode());
    let (one, other) = (open(&one, &slots), open(&other, &slots));
    one.bind(&mut slots, binding(0, 0, 8)).unwrap();
    slots.remove(0).unwrap();
    other.bind(&mut slots, binding(0, 0, 8)).unwrap();
    assert_eq!(one.bindings(), []);
    one.unbind(0).unwrap_err();
    assert_eq!(other.bindings(), [binding(0, 0, 8)]);
    assert_eq!(slots.iter().count(), 1);
}

/// R4.5, R4.6.
#[test]
fn a_file_that_is_refused_is_in_no_list_and_every_error_gives_the_inode_back() {
    harness::need!(kvm);
    let inode = inode();
    let mut slots = slots();
    let counts = |slots: &MemorySlots<Arc<Mapping>>| {
        (Arc::strong_count(&inode), Arc::strong_count(inode.mapping()), Arc::strong_count(slots.vm()))
    };
    let before = counts(&slots);
    GmemFile::open(Arc::clone(&inode), THEIRS, slots.vm()).unwrap_err();
    assert_eq!((inode.files(), counts(&slots)), (0, before));
    let file = open(&inode, &slots);
    let (inodes, mappings, vms) = before;
    assert_eq!((inode.files(), counts(&slots)), (1, (inodes + 1, mappings, vms)), "it keeps the inode");
    file.link(OURS, slots.vm()).unwrap_err();
    file.link(THEIRS, slots.vm()).unwrap_err();
    file.bind(&mut slots, binding(0, 4, 5)).unwrap_err();
    assert_eq!((inode.files(), counts(&slots)), (1, (inodes + 1, mappings, vms)));
    file.bind(&mut slots, binding(0, 0, 8)).unwrap();
    drop(file);
    drop(std::mem::replace(&mut slots, self::slots()));
    assert_eq!((inode.files(), counts(&slots)), (0, before));
}
