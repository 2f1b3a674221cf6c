//! How long guest memory lasts: longer than a VM object, and not longer than its machine.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

#[path = "shared/asleep.rs"]
mod asleep;
#[path = "shared/vcpu.rs"]
mod vcpu;

use std::fs;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use abi::gmem::MemoryName;
use abi::gmem::flags;
use abi::vm::Identity;
use asleep::sleeps;
use kvm::MemorySlots;
use kvm::Vcpu;
use kvm::Vm;
use kvm::VmBuilder;
use kvm::kvm_ioctls::Kvm;
use kvm::kvm_ioctls::VmFd;
use pages::PageRange;
use region::Errno;
use region::Mapping;
use region::Region;
use tideover_gmem::BindError;
use tideover_gmem::Binding;
use tideover_gmem::ChangeError;
use tideover_gmem::End;
use tideover_gmem::FreezeError;
use tideover_gmem::GmemFile;
use tideover_gmem::GuestMemfd;
use tideover_gmem::Held;
use tideover_gmem::Inode;
use tideover_gmem::OpenError;
use tideover_gmem::Owner;
use vcpu::vcpu_at;

const MIB: u64 = 1 << 20;
const OURS: Identity = Identity::new([1; 16]);
const WHOLE: Binding = Binding { slot: 0, guest_address: 0, offset_bytes: 0, len_bytes: 4 * MIB };
const LONGEST: Duration = Duration::from_secs(30);

/// Where the guest's code is, and what it counts. In real mode: inc dword [0x2000]; mov eax, [0x2000]; out 0x10, eax;
/// from the start.
const CODE: u64 = 0x1000;
const COUNTER: u64 = 0x2000;
const OUT_EACH_COUNT: [u8; 14] =
    [0x66, 0xff, 0x06, 0x00, 0x20, 0x66, 0xa1, 0x00, 0x20, 0x66, 0xe7, 0x10, 0xeb, 0xf2];

fn inode(name: &str) -> Arc<Inode> {
    let mapping = Arc::new(Region::create(name, 4 * MIB).unwrap().map().unwrap());
    let frames = PageRange::of_bytes(1 << 30, 4 * MIB).unwrap();
    Inode::new(MemoryName::literal("ram"), OURS, mapping, frames, flags::MMAP)
}

/// Memory, its owner, and a descriptor by which its file is looked at from outside.
fn owned(name: &str) -> (Arc<Inode>, Owner, Region) {
    let inode = inode(name);
    let fd = inode.mapping().region().as_fd().try_clone_to_owned().unwrap();
    let outside = Region::accept("outside", fd, 4 * MIB).unwrap();
    let owner = inode.own().unwrap();
    (inode, owner, outside)
}

/// A VM object, with a vCPU at the guest's code.
struct Object {
    vcpu: Vcpu,
    slots: MemorySlots<Arc<Mapping>>,
    file: GmemFile,
    _vm: Vm,
}

fn builder() -> VmBuilder {
    VmBuilder::create(&Kvm::new().unwrap()).unwrap()
}

fn object(open: impl FnOnce(&Arc<VmFd>) -> GmemFile) -> Object {
    object_of(builder(), open)
}

fn object_of(builder: VmBuilder, open: impl FnOnce(&Arc<VmFd>) -> GmemFile) -> Object {
    let mut slots = builder.memory_slots();
    let file = open(builder.fd());
    file.bind(&mut slots, WHOLE).unwrap();
    let (vm, vcpu) = vcpu_at(builder, CODE);
    Object { vcpu, slots, file, _vm: vm }
}

fn first_object(inode: &Arc<Inode>) -> Object {
    object(|vm| GmemFile::open(Arc::clone(inode), OURS, vm).unwrap())
}

impl Object {
    /// Runs the guest for a count; gives its value, or what else came.
    fn count(&mut self) -> Result<u32, String> {
        let stopped = self.vcpu.run(|exit| {
            ControlFlow::Break(match exit {
                kvm::kvm_ioctls::VcpuExit::IoOut(0x10, bytes) => {
                    Ok(u32::from_le_bytes(bytes.try_into().unwrap()))
                }
                other => Err(format!("{other:?}")),
            })
        });
        match stopped {
            Ok(kvm::Stopped::Broke(counted)) => counted,
            Ok(other) => Err(format!("{other:?}")),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// How many of this process's descriptors and mappings are of the region of this name.
fn held(name: &str) -> (usize, usize) {
    let ours = format!("/memfd:{name}");
    let fds = fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    let links = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
    let fds = links.filter(|link| link.to_string_lossy().starts_with(&ours)).count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    (fds, maps.lines().filter(|line| line.contains(&ours)).count())
}

/// R3.1, R3.4.
#[test]
fn memory_outlives_every_vm_object_of_its_machine() {
    harness::need!(kvm);
    let (inode, _owner, _) = owned("outlives");
    inode.mapping().write(CODE, &OUT_EACH_COUNT).unwrap();
    let mut first = first_object(&inode);
    assert_eq!(first.count(), Ok(1));
    let mut second = object(|vm| first.file.link(OURS, vm).unwrap());
    assert_eq!((second.count(), first.count(), second.count()), (Ok(2), Ok(3), Ok(4)));
    drop(first);
    assert_eq!(second.count(), Ok(5));
    drop(second);
    assert_eq!(first_object(&inode).count(), Ok(6));
}

/// R4.2, G5.7.1.
#[test]
fn a_punch_takes_the_page_from_the_guest_of_every_file() {
    harness::need!(kvm, guest_memfd);
    let maker = builder();
    let file = GuestMemfd::create(maker.fd(), 4 * MIB).unwrap();
    let mapping = Arc::new(file.region("ram").unwrap().map().unwrap());
    let frames = PageRange::of_bytes(1 << 30, 4 * MIB).unwrap();
    let bound = Inode::of_guest_memfd(MemoryName::literal("ram"), OURS, mapping, frames, &file);
    for (maker, inode) in [(maker, bound), (builder(), inode("punched"))] {
        inode.mapping().write(CODE, &OUT_EACH_COUNT).unwrap();
        let mut first = object_of(maker, |vm| GmemFile::open(Arc::clone(&inode), OURS, vm).unwrap());
        let mut others = [(); 2].map(|()| object(|vm| first.file.link(OURS, vm).unwrap()));
        assert_eq!((first.count(), others[0].count(), others[1].count()), (Ok(1), Ok(2), Ok(3)));
        inode.punch(COUNTER, 4096).unwrap();
        // Each of them would go on from 3, were it left with the page.
        assert_eq!((others[1].count(), others[0].count(), first.count()), (Ok(1), Ok(2), Ok(3)));
        inode.punch(COUNTER, 4096).unwrap();
        assert_eq!((first.count(), others[1].count()), (Ok(1), Ok(2)));
    }
}

/// R3.2, R3.5, O3.1.
#[test]
fn when_the_machine_ends_no_handle_leads_to_its_memory() {
    harness::need!(kvm);
    const NAME: &str = "machine-ends";
    let (inode, owner, outside) = owned(NAME);
    inode.mapping().write(CODE, &OUT_EACH_COUNT).unwrap();
    let mut helper = first_object(&inode);
    assert_eq!(helper.count(), Ok(1));
    let present = outside.allocated_bytes().unwrap();
    let mapping = Arc::clone(inode.mapping());
    drop(outside);
    assert_eq!(held(NAME), (1, 1));

    drop(owner);
    assert!(inode.has_ended());
    assert_eq!(held(NAME), (0, 0), "all of {present:?} bytes are gone, whoever knows the inode");
    assert_eq!(helper.slots.iter().count(), 0);
    assert_eq!(helper.file.bindings(), []);
    let end = helper.count();
    assert!(end.is_err(), "the helper's guest has no memory: {end:?}");
    assert_eq!(mapping.load(COUNTER).unwrap(), 0, "other memory");

    let name = inode.name();
    let refused = helper.file.bind(&mut helper.slots, WHOLE).unwrap_err();
    assert!(matches!(refused, BindError::Ended { .. }), "{refused:?}");
    assert_eq!(refused.errno(), Errno::IO);
    let refused = helper.file.link(OURS, builder().fd()).unwrap_err();
    assert_eq!((refused, refused.errno()), (OpenError::Ended { name }, Errno::IO));
    let refused = [inode.allocate(0, 4096), inode.punch(0, 4096), inode.clear()];
    for refused in refused.map(Result::unwrap_err) {
        assert!(matches!(refused, ChangeError::Ended { .. }), "{refused:?}");
        assert_eq!(refused.errno(), Errno::IO);
    }
    let refused = inode.freeze().unwrap_err();
    assert!(matches!(refused, FreezeError::Ended { .. }), "{refused:?}");
    assert!(inode.own().is_none(), "it had its owner");
}

/// R3.2, R3.5.
#[test]
fn a_helper_whose_file_was_dropped_loses_its_slots_too() {
    harness::need!(kvm);
    let (inode, owner, _) = owned("file-dropped");
    let builder = builder();
    let mut slots = builder.memory_slots();
    let file = GmemFile::open(Arc::clone(&inode), OURS, builder.fd()).unwrap();
    file.bind(&mut slots, WHOLE).unwrap();
    drop(file);
    assert_eq!(slots.iter().count(), 1);
    assert_eq!(inode.files(), 1, "its slot is left");
    let refused = GmemFile::open(Arc::clone(&inode), OURS, builder.fd()).unwrap_err();
    assert_eq!(refused, OpenError::Taken { name: inode.name() }, "a page would have two places");
    drop(owner);
    assert_eq!(slots.iter().count(), 0);
}

/// R3.2, R3.3.
#[test]
fn another_holder_of_the_region_keeps_it_when_the_machine_ends_here() {
    let (inode, owner, outside) = owned("handed-over");
    inode.mapping().write(MIB, b"goes on").unwrap();
    drop(owner);
    assert_eq!(outside.allocated_bytes().unwrap(), Some(4096));
    let successor = outside.map().unwrap();
    let mut read = [0; 7];
    successor.read(MIB, &mut read).unwrap();
    assert_eq!(&read, b"goes on");
    inode.mapping().write(MIB, b"written").unwrap();
    successor.read(MIB, &mut read).unwrap();
    assert_eq!(&read, b"goes on", "the predecessor's writes go nowhere");
}

/// R3.3.
#[test]
fn memory_has_one_owner() {
    let inode = inode("one-owner");
    let owner = inode.own().unwrap();
    assert!(inode.own().is_none());
    drop(owner);
    assert!(inode.own().is_none());
}

/// R3.2, R3.5, G5.2.8.
#[test]
fn a_guest_memfd_ends_with_its_machine_and_lets_its_vm_object_go() {
    harness::need!(kvm, guest_memfd);
    let maker = builder();
    let file = GuestMemfd::create(maker.fd(), 4 * MIB).unwrap();
    let mapping = Arc::new(file.region("ram").unwrap().map().unwrap());
    let frames = PageRange::of_bytes(1 << 30, 4 * MIB).unwrap();
    let inode = Inode::of_guest_memfd(MemoryName::literal("ram"), OURS, mapping, frames, &file);
    let owner = inode.own().unwrap();
    inode.mapping().write(CODE, &OUT_EACH_COUNT).unwrap();
    let mut bound = object_of(maker, |vm| GmemFile::open(Arc::clone(&inode), OURS, vm).unwrap());
    let mut helper = object(|vm| bound.file.link(OURS, vm).unwrap());
    assert_eq!((bound.count(), helper.count()), (Ok(1), Ok(2)));

    let number = inode.mapping().region().file_number().unwrap();
    assert_eq!(descriptors_of(number), 2, "the maker's and the region's");
    drop(owner);
    assert_eq!(descriptors_of(number), 0);
    assert!(bound.count().is_err() && helper.count().is_err());
    let refused = file.region("ram").unwrap_err();
    assert_eq!(refused.errno(), Errno::BADF);
}

/// How many descriptors of this process are of the guest_memfd of this inode number.
fn descriptors_of(number: u64) -> usize {
    let fds = fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    let is = |entry: &fs::DirEntry| {
        let link = fs::read_link(entry.path()).unwrap_or_default();
        let same = fs::metadata(entry.path()).is_ok_and(|file| file.ino() == number);
        link.to_string_lossy().contains("gmem") && same
    };
    fds.filter(is).count()
}

/// R4.4.
#[test]
fn memory_is_evicted_destroyed_and_freed_once_and_in_this_order() {
    const NAME: &str = "steps";
    const ALL: [End; 3] = [End::Evicted, End::Destroyed, End::Freed];
    let told = Arc::new(Mutex::new(Vec::new()));
    let watched = |name: &'static str| {
        let inode = inode(name);
        let told = Arc::clone(&told);
        inode.on_end(move |step| told.lock().unwrap().push((step, held(name))));
        inode
    };
    let steps = || told.lock().unwrap().drain(..).collect::<Vec<_>>();

    // With its machine; then the last handle goes.
    let inode = watched(NAME);
    let owner = inode.own().unwrap();
    drop(owner);
    assert_eq!(steps(), [(End::Evicted, (0, 0)), (End::Destroyed, (0, 0))]);
    drop(inode);
    assert_eq!(steps(), [(End::Freed, (0, 0))]);

    // Without a machine: all at once, with the last handle.
    let inode = watched(NAME);
    let other = Arc::clone(&inode);
    drop(inode);
    assert_eq!(steps(), []);
    drop(other);
    assert_eq!(steps(), ALL.map(|step| (step, (0, 0))));
}

/// R2.2, R3.2, G5.7.5.
#[test]
fn who_waits_at_a_hole_when_the_machine_ends_adds_no_page() {
    harness::need!(userfaultfd);
    let (inode, owner, outside) = owned("waits");
    inode.allocate(0, MIB).unwrap();
    let freeze = inode.freeze().unwrap();
    assert_eq!(freeze.held(), Held::Userfaultfd);
    let (say, hear) = mpsc::channel();
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let name = fs::read_link("/proc/thread-self").unwrap().to_string_lossy().into_owned();
            say.send(name).unwrap();
            inode.mapping().write(2 * MIB, b"parked").unwrap();
        });
        let thread = hear.recv().unwrap();
        let end = Instant::now() + LONGEST;
        while !sleeps(&thread) {
            assert!(Instant::now() < end, "it does not wait");
            thread::sleep(Duration::from_micros(100));
        }
        drop(owner);
        while !writer.is_finished() {
            assert!(Instant::now() < end, "it waits for ever");
            thread::sleep(Duration::from_micros(100));
        }
    });
    assert_eq!(outside.allocated_bytes().unwrap(), Some(MIB), "the page is other memory's");
    drop(freeze);
}
