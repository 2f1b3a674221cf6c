//! Guest memory of huge pages from the host's pool, and of a guest_memfd: frozen, and given to VM objects of this and
//! of another process.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

#[path = "shared/vcpu.rs"]
mod vcpu;

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;

use abi::gmem::MemoryName;
use abi::gmem::flags;
use abi::vm::Identity;
use kvm::MemorySlots;
use kvm::Stopped;
use kvm::Vcpu;
use kvm::Vm;
use kvm::VmBuilder;
use kvm::kvm_ioctls::Kvm;
use pages::PageRange;
use region::Mapping;
use region::PageSize;
use region::Region;
use region::RegionError;
use region::Store;
use tideover_gmem::Binding;
use tideover_gmem::ChangeError;
use tideover_gmem::GmemFile;
use tideover_gmem::GuestMemfd;
use tideover_gmem::Held;
use tideover_gmem::Inode;
use vcpu::vcpu_at;

const MIB: u64 = 1 << 20;
const OURS: Identity = Identity::new([1; 16]);
const RAM: MemoryName = MemoryName::literal("ram");
const WHOLE: Binding = Binding { slot: 0, guest_address: 0, offset_bytes: 0, len_bytes: MIB };

/// Where the guest's code is, and what it counts.
const CODE: u64 = 0x1000;
const COUNTER: u64 = 0x2000;
/// In real mode: inc dword [0x2000]; mov eax, [0x2000]; out 0x10, eax; from the start.
const OUT_EACH_COUNT: [u8; 14] =
    [0x66, 0xff, 0x06, 0x00, 0x20, 0x66, 0xa1, 0x00, 0x20, 0x66, 0xe7, 0x10, 0xeb, 0xf2];

fn frames(bytes: u64) -> PageRange {
    PageRange::of_bytes(1 << 30, bytes).unwrap()
}

fn plain(region: Region) -> Arc<Inode> {
    let bytes = region.len_bytes();
    Inode::new(RAM, OURS, Arc::new(region.map().unwrap()), frames(bytes), flags::MMAP)
}

fn builder() -> VmBuilder {
    VmBuilder::create(&Kvm::new().unwrap()).unwrap()
}

/// Guest memory of a guest_memfd of this VM object.
fn made_by(builder: &VmBuilder, bytes: u64) -> Arc<Inode> {
    let file = GuestMemfd::create(builder.fd(), bytes).unwrap();
    let mapping = Arc::new(file.region("ram").unwrap().map().unwrap());
    Inode::of_guest_memfd(RAM, OURS, mapping, frames(bytes), &file)
}

/// A VM on all of the memory.
struct Machine {
    vcpu: Vcpu,
    slots: MemorySlots<Arc<Mapping>>,
    _vm: Vm,
}

fn machine(builder: VmBuilder, inode: &Arc<Inode>) -> Machine {
    let mut slots = builder.memory_slots();
    let file = GmemFile::open(Arc::clone(inode), OURS, builder.fd()).unwrap();
    file.bind(&mut slots, WHOLE).unwrap();
    let (vm, vcpu) = vcpu_at(builder, CODE);
    Machine { vcpu, slots, _vm: vm }
}

impl Machine {
    /// Runs the guest for five counts.
    fn count_to_five(&mut self) {
        let mut outs = 0;
        let stopped = self.vcpu.run(|_| {
            outs += 1;
            if outs == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(stopped.unwrap(), Stopped::Broke(()));
    }

    /// Whether its one slot is bound to the guest_memfd: KVM then refuses to bind the same bytes to another.
    fn is_bound(&mut self, inode: &Inode) -> bool {
        let mapping = inode.mapping();
        let file = kvm::Binding { guest_memfd: mapping.region().as_fd(), offset_bytes: 0 };
        self.slots.add_bound(1, 1 << 32, mapping, 0, MIB, file).is_err()
    }
}

fn counter(inode: &Inode) -> u64 {
    inode.mapping().load(COUNTER).unwrap()
}

/// R3.1, G5.2.8, G5.5.7, G5.6.3.
#[test]
fn a_guest_goes_on_counting_in_the_guest_memfd_that_another_vm_object_made() {
    harness::need!(kvm, guest_memfd);
    let first = builder();
    let inode = made_by(&first, MIB);
    inode.mapping().write(CODE, &OUT_EACH_COUNT).unwrap();
    let mut first = machine(first, &inode);
    first.count_to_five();
    assert_eq!(counter(&inode), 5);
    assert!(first.is_bound(&inode), "to the one that made it");

    // The first one still lives; then it is gone.
    let mut second = machine(builder(), &inode);
    second.count_to_five();
    assert_eq!(counter(&inode), 10);
    drop(first);
    second.count_to_five();
    drop(second);
    let mut third = machine(builder(), &inode);
    third.count_to_five();
    assert_eq!(counter(&inode), 20);
}

/// R0.7, R0.8, R0.9, R3.6, O3.1.
#[test]
fn the_vm_object_that_made_a_guest_memfd_is_not_mistaken_for_another() {
    harness::need!(kvm, guest_memfd);
    let first = builder();
    let inode = made_by(&first, MIB);
    assert!(inode.is_made_by(first.fd()));
    drop(first);
    for _ in 0..20 {
        let other = builder();
        assert!(!inode.is_made_by(other.fd()), "though it may lie where the first one lay");
        machine(other, &inode);
    }
    let memfd = plain(Region::create("ram", MIB).unwrap());
    assert!(!memfd.is_made_by(builder().fd()));
}

/// R0.6.
#[test]
fn memory_does_not_keep_the_vm_object_that_made_it() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    let kept = Arc::strong_count(builder.fd());
    let inode = made_by(&builder, MIB);
    assert_eq!(Arc::strong_count(builder.fd()), kept);
    let vm = Arc::downgrade(builder.fd());
    drop(builder);
    assert!(vm.upgrade().is_none());
    inode.mapping().store(0, 7).unwrap();
    assert_eq!(inode.mapping().load(0).unwrap(), 7, "the kernel keeps what the file needs");
}

/// G5.7.1.
#[test]
fn a_guest_finds_zeroes_where_its_memory_was_punched() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    let bound = made_by(&builder, MIB);
    let memfd = plain(Region::create("ram", MIB).unwrap());
    for (builder, inode) in [(builder, bound), (self::builder(), memfd)] {
        inode.mapping().write(CODE, &OUT_EACH_COUNT).unwrap();
        let mut machine = machine(builder, &inode);
        machine.count_to_five();
        machine.count_to_five();
        assert_eq!(counter(&inode), 10);
        inode.punch(COUNTER, 4096).unwrap();
        machine.count_to_five();
        assert_eq!(counter(&inode), 5, "{}", inode.mapping().region().store());
    }
}

/// Set for the other side of a test: this program, started anew for the one test, with the guest_memfd as its standard
/// input.
const SUCCESSOR: &str = "TIDEOVER_GMEM_SUCCESSOR";

/// P6.5.1.
#[test]
fn a_guest_goes_on_counting_in_another_process() {
    harness::need!(kvm, guest_memfd);
    if std::env::var_os(SUCCESSOR).is_some() {
        let fd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
        let inode = plain(Region::accept_as("ram", fd, MIB, Store::GuestMemfd, PageSize::Small).unwrap());
        assert_eq!(counter(&inode), 5);
        let mut successor = machine(builder(), &inode);
        successor.count_to_five();
        assert_eq!(counter(&inode), 10);
        return;
    }
    let first = builder();
    let inode = made_by(&first, MIB);
    inode.mapping().write(CODE, &OUT_EACH_COUNT).unwrap();
    let mut first = machine(first, &inode);
    first.count_to_five();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["a_guest_goes_on_counting_in_another_process", "--exact", "--nocapture"])
        .env(SUCCESSOR, "1")
        .stdin(Stdio::from(inode.mapping().region().as_fd().try_clone_to_owned().unwrap()))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(counter(&inode), 10, "the same memory");
    first.count_to_five();
    assert_eq!(counter(&inode), 15, "taken back");
}

/// O1.7, G5.2.3.
#[test]
fn a_guest_memfd_goes_with_the_flags_that_it_was_made_with() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    assert_eq!(made_by(&builder, MIB).flags(), flags::MMAP | flags::INIT_SHARED);
    assert!(GuestMemfd::create(builder.fd(), MIB + 1).is_err());
}

/// R2.2, G5.3.14, G5.4.2.
#[test]
fn a_freeze_of_a_guest_memfd_fills_its_holes() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    let inode = made_by(&builder, 4 * MIB);
    inode.mapping().write(MIB, b"kept").unwrap();
    let freeze = inode.freeze().unwrap();
    assert_eq!(freeze.held(), Held::Prefaulted);
    assert!(inode.mapping().region().is_whole().unwrap());
    assert!(matches!(inode.punch(0, MIB), Err(ChangeError::Frozen { .. })));
    let mut read = [0; 4];
    inode.mapping().read(MIB, &mut read).unwrap();
    assert_eq!(&read, b"kept");
    assert_eq!(inode.mapping().load(3 * MIB).unwrap(), 0, "a page that nobody has touched yet");
    drop(freeze);

    assert_eq!(inode.freeze().unwrap().held(), Held::Whole, "there is nothing to fill any more");
    inode.punch(MIB, MIB).unwrap();
    assert_eq!(inode.mapping().load(MIB).unwrap(), 0);
    assert_eq!(inode.freeze().unwrap().held(), Held::Prefaulted);
}

#[test]
fn a_guest_memfd_that_was_warmed_up_is_whole() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    let inode = made_by(&builder, 4 * MIB);
    inode.mapping().warm(PageSize::Small, &mut |_, _| {}).unwrap();
    assert_eq!(inode.freeze().unwrap().held(), Held::Whole);
}

#[test]
fn hugetlb_memory_is_whole_and_stays_so() {
    harness::need!(hugetlb);
    let inode = plain(Region::create_hugetlb("ram", 4 * MIB, PageSize::Huge).unwrap());
    assert_eq!(inode.freeze().unwrap().held(), Held::Whole);
    match inode.punch(0, 2 * MIB) {
        Err(ChangeError::Region { source: RegionError::Whole { .. }, .. }) => {}
        other => panic!("{other:?}"),
    }
    inode.allocate(0, 4096).unwrap();
    assert_eq!(inode.freeze().unwrap().held(), Held::Whole);
}

/// O2.1.
#[test]
fn memory_of_every_store_is_cleared_unless_it_is_frozen() {
    harness::need!(kvm, guest_memfd, hugetlb);
    let builder = builder();
    let inodes = [
        plain(Region::create("ram", 4 * MIB).unwrap()),
        plain(Region::create_hugetlb("ram", 4 * MIB, PageSize::Huge).unwrap()),
        made_by(&builder, 4 * MIB),
    ];
    for inode in inodes {
        let store = inode.mapping().region().store();
        let words = [0, MIB, 4 * MIB - 8];
        words.iter().for_each(|at| inode.mapping().store(*at, 7).unwrap());
        let freeze = inode.freeze().unwrap();
        assert!(matches!(inode.clear(), Err(ChangeError::Frozen { .. })), "{store}");
        assert_eq!(inode.mapping().load(MIB).unwrap(), 7);
        drop(freeze);
        inode.clear().unwrap();
        assert!(words.iter().all(|at| inode.mapping().load(*at).unwrap() == 0), "{store}");
        assert_eq!(inode.mapping().region().is_whole().unwrap(), store == Store::Hugetlb);
    }
}

#[test]
fn a_guest_runs_in_hugetlb_memory() {
    harness::need!(kvm, hugetlb);
    let inode = plain(Region::create_hugetlb("ram", 2 * MIB, PageSize::Huge).unwrap());
    inode.mapping().write(CODE, &OUT_EACH_COUNT).unwrap();
    machine(builder(), &inode).count_to_five();
    assert_eq!(counter(&inode), 5);
}
