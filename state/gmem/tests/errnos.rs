//! What the kernel's guest_memfd answers to who works on its file, and what an inode of ours answers: case by case, with
//! the reason where the two differ.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use abi::gmem::MemoryName;
use abi::gmem::flags;
use abi::vm::Identity;
use kvm::GuestMemfdFlags;
use kvm::VmBuilder;
use kvm::guest_memfd;
use kvm::kvm_ioctls::Kvm;
use pages::PageRange;
use region::Errno;
use region::PageSize;
use region::Region;
use region::Store;
use rustix::fs::FallocateFlags;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::SeekFrom;
use tideover_gmem::ChangeError;
use tideover_gmem::GuestMemfd;
use tideover_gmem::Inode;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;
const RAM: MemoryName = MemoryName::literal("ram");
const OURS: Identity = Identity::new([1; 16]);

/// A kernel's answer, or ours.
type Answer = Result<(), Errno>;

const OK: Answer = Ok(());
const INVAL: Answer = Err(Errno::INVAL);

fn builder() -> VmBuilder {
    VmBuilder::create(&Kvm::new().unwrap()).unwrap()
}

fn frames() -> PageRange {
    PageRange::of_bytes(1 << 30, SIZE).unwrap()
}

/// An inode of each store that has holes.
fn inodes(builder: &VmBuilder) -> [Arc<Inode>; 2] {
    let memfd = Arc::new(Region::create("errnos", SIZE).unwrap().map().unwrap());
    let file = GuestMemfd::create(builder.fd(), SIZE).unwrap();
    let mapping = Arc::new(file.region("errnos").unwrap().map().unwrap());
    [
        Inode::new(RAM, OURS, memfd, frames(), flags::MMAP | flags::INIT_SHARED),
        Inode::of_guest_memfd(RAM, OURS, mapping, frames(), &file),
    ]
}

fn errno(result: Result<(), ChangeError>) -> Answer {
    result.map_err(|error| error.errno())
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Allocate,
    Punch,
}

/// Bytes to change, and what comes of it.
struct Case {
    what: &'static str,
    change: Change,
    offset: u64,
    len: u64,
    kernels: Answer,
    /// Where it is another answer: which, and why.
    ours: Option<(Answer, &'static str)>,
}

const fn case(what: &'static str, change: Change, offset: u64, len: u64, kernels: Answer) -> Case {
    Case { what, change, offset, len, kernels, ours: None }
}

impl Case {
    const fn but(mut self, ours: Answer, why: &'static str) -> Self {
        self.ours = Some((ours, why));
        self
    }
}

const LAST: u64 = i64::MAX.cast_unsigned() & !4095;
const MISTAKEN: &str = "who punches what is not there is mistaken about the size";

/// Facts of the kernel's calls, and ours beside them.
const CASES: [Case; 17] = [
    case("all of it", Change::Allocate, 0, SIZE, OK),
    case("a page that is there", Change::Allocate, 0, 4096, OK),
    case("a page", Change::Punch, 4096, 4096, OK),
    case("a page that is no longer there", Change::Punch, 4096, 4096, OK),
    case("a page anew", Change::Allocate, 4096, 4096, OK),
    case("an offset of no whole pages", Change::Allocate, 1, 4096, INVAL),
    case("a length of no whole pages", Change::Allocate, 0, 4095, INVAL),
    case("an offset of no whole pages", Change::Punch, 4095, 4096, INVAL),
    case("a length of no whole pages", Change::Punch, 0, 1, INVAL),
    case("no bytes", Change::Allocate, 0, 0, INVAL),
    case("no bytes", Change::Punch, 0, 0, INVAL),
    case("from the end on", Change::Allocate, SIZE, 4096, INVAL),
    case("across the end", Change::Allocate, SIZE - 4096, 8192, INVAL),
    case("beyond the last byte of any file", Change::Allocate, LAST, 4096, Err(Errno::FBIG)),
    case("beyond the last byte of any file", Change::Punch, LAST, 4096, Err(Errno::FBIG)),
    case("from the end on", Change::Punch, SIZE, 4096, OK).but(INVAL, MISTAKEN),
    case("across the end", Change::Punch, SIZE - 4096, 8192, OK).but(INVAL, MISTAKEN),
];

fn kernels(file: impl AsFd, case: &Case) -> Answer {
    let mode = match case.change {
        Change::Allocate => FallocateFlags::KEEP_SIZE,
        Change::Punch => FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE,
    };
    rustix::fs::fallocate(file, mode, case.offset, case.len)
}

fn ours(inode: &Inode, case: &Case) -> Answer {
    errno(match case.change {
        Change::Allocate => inode.allocate(case.offset, case.len),
        Change::Punch => inode.punch(case.offset, case.len),
    })
}

/// G5.3.4, G5.3.5, G5.3.6, G5.3.8.
#[test]
fn changes_of_pages_have_the_kernels_error_numbers_or_a_reason() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    let flags = GuestMemfdFlags::MMAP | GuestMemfdFlags::INIT_SHARED;
    let real = guest_memfd::create(builder.fd(), SIZE, flags).unwrap();
    let inodes = inodes(&builder);
    for case in &CASES {
        let what = format!("{:?}: {}", case.change, case.what);
        assert_eq!(kernels(&real, case), case.kernels, "{what}: the kernel");
        let (wanted, why) = case.ours.unwrap_or((case.kernels, "as the kernel"));
        for inode in &inodes {
            let store = inode.mapping().region().store();
            assert_eq!(ours(inode, case), wanted, "{what}: ours on a {store}: {why}");
        }
    }
}

/// R2.1, O2.2.
#[test]
fn of_frozen_memory_wrong_arguments_are_told_before_the_freeze_and_all_else_is_eperm() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    for inode in inodes(&builder) {
        let _frozen = inode.freeze().unwrap();
        for case in &CASES {
            let open = case.ours.map_or(case.kernels, |(ours, _)| ours);
            let wanted = if open == OK { Err(Errno::PERM) } else { open };
            assert_eq!(ours(&inode, case), wanted, "{:?}: {}", case.change, case.what);
        }
    }
}

/// G5.3.1, G5.3.2, G5.3.3, G5.3.4.
#[test]
fn the_file_of_a_guest_memfd_does_nothing_but_allocate_punch_and_map() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    let [memfd, inode] = inodes(&builder);
    let file = inode.mapping().region();
    let mut bytes = [1; 8];
    let spipe = Err(Errno::SPIPE);
    assert_eq!(rustix::io::read(file, &mut bytes[..]).map(drop), INVAL);
    assert_eq!(rustix::io::write(file, &bytes).map(drop), INVAL);
    assert_eq!(rustix::io::pread(file, &mut bytes[..], 0).map(drop), spipe);
    assert_eq!(rustix::io::pwrite(file, &bytes, 0).map(drop), spipe);
    assert_eq!(rustix::fs::seek(file, SeekFrom::Start(0)).map(drop), spipe);
    assert_eq!(bytes, [1; 8]);
    for size in [SIZE, SIZE - 4096, SIZE + 4096, 0] {
        assert_eq!(rustix::fs::ftruncate(file, size), INVAL, "{size:#x}");
    }
    assert_eq!(rustix::fs::fchmod(file, Mode::from_raw_mode(0o600)), INVAL);
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    assert_eq!(rustix::fs::open(&path, OFlags::RDWR, Mode::empty()).map(drop), Err(Errno::NXIO));
    let others = [
        FallocateFlags::empty(),
        FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        FallocateFlags::COLLAPSE_RANGE,
        FallocateFlags::INSERT_RANGE,
        FallocateFlags::UNSHARE_RANGE | FallocateFlags::KEEP_SIZE,
    ];
    for mode in others {
        let refused = rustix::fs::fallocate(file, mode, 0, 4096);
        assert_eq!(refused, Err(Errno::OPNOTSUPP), "{mode:?}");
    }
    assert_eq!(inode.mapping().load(0).unwrap(), 0, "none of it changed a byte");

    // A memfd is more of a file: who holds its descriptor reads, writes and opens it. Its size is sealed all the same.
    let memfd = memfd.mapping().region();
    assert_eq!(rustix::io::pread(memfd, &mut bytes[..], 0), Ok(8));
    assert_eq!(rustix::fs::ftruncate(memfd, SIZE - 4096), Err(Errno::PERM));
}

/// R1.2, R1.4, G5.3.9, G5.3.12.
#[test]
fn memory_that_the_host_may_not_see_is_no_guest_memory() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    let flags = [GuestMemfdFlags::NONE, GuestMemfdFlags::MMAP, GuestMemfdFlags::INIT_SHARED];
    for flags in flags {
        let fd = guest_memfd::create(builder.fd(), SIZE, flags).unwrap();
        let region = Region::accept_as("t", fd, SIZE, Store::GuestMemfd, PageSize::Small).unwrap();
        assert_eq!(region.map().unwrap_err().errno(), Errno::INVAL, "{flags}");
    }
    let null = std::fs::File::open("/dev/null").unwrap();
    for store in [Store::Memfd, Store::GuestMemfd] {
        let fd = null.try_clone().unwrap().into();
        let refused = Region::accept_as("t", fd, SIZE, store, PageSize::Small).unwrap_err();
        assert_eq!(refused.errno(), Errno::INVAL, "{store}");
    }
}

/// R4.1, G5.3.13.
#[test]
fn two_files_of_two_sizes_have_two_inodes_and_keep_their_sizes() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    let make = |size| guest_memfd::create(builder.fd(), size, GuestMemfdFlags::MMAP).unwrap();
    let stat = |fd| rustix::fs::fstat(fd).unwrap();
    let one = make(4096);
    let first = stat(&one);
    let other = make(8192);
    let second = stat(&other);
    assert_eq!((first.st_size, second.st_size), (4096, 8192));
    assert_eq!((first.st_blksize, second.st_blksize), (4096, 4096));
    assert_ne!(first.st_ino, second.st_ino);
    rustix::fs::fallocate(&one, FallocateFlags::KEEP_SIZE, 0, 4096).unwrap();
    let again = stat(&one);
    assert_eq!((again.st_size, again.st_ino, again.st_blocks), (4096, first.st_ino, 0));
}
