//! What the kernel's own test of guest_memfd asks of a mapping, of the kernel's and of ours.
//!
//! What kills is done in a process of its own, which this program starts.
#![expect(unsafe_code, reason = "maps a guest_memfd in ways that ours does not")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::ptr::NonNull;

use kvm::GuestMemfdFlags;
use kvm::VmBuilder;
use kvm::guest_memfd;
use kvm::kvm_ioctls::Kvm;
use rustix::mm::Advice;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;
use tideover_region::Errno;
use tideover_region::Mapping;
use tideover_region::PageSize;
use tideover_region::Region;
use tideover_region::Store;

const PAGE: usize = 4096;
const PAGES: usize = 4;
const SIZE: usize = PAGES * PAGE;
const SHARED: GuestMemfdFlags = GuestMemfdFlags::INIT_SHARED;

fn made(flags: GuestMemfdFlags) -> OwnedFd {
    let builder = VmBuilder::create(&Kvm::new().unwrap()).unwrap();
    guest_memfd::create(builder.fd(), SIZE as u64, flags).unwrap()
}

fn ours() -> Mapping {
    let fd = made(GuestMemfdFlags::MMAP | SHARED);
    let region = Region::accept_as("t", fd, SIZE as u64, Store::GuestMemfd, PageSize::Small).unwrap();
    region.map().unwrap()
}

/// A mapping that lasts as long as the process.
struct Raw(NonNull<u8>);

impl Raw {
    fn new(fd: &OwnedFd, len: usize, flags: MapFlags) -> Result<Self, Errno> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping wherever there is room; it replaces nothing.
        let address = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, fd, 0) }?;
        Ok(Self(NonNull::new(address.cast()).unwrap()))
    }

    /// Which may kill, as that is what is asked.
    fn write(&self, at: usize, byte: u8) {
        // SAFETY: the caller keeps to what it mapped, and nothing else knows the address.
        unsafe { self.0.add(at).write_volatile(byte) };
    }

    fn read(&self, at: usize) -> u8 {
        // SAFETY: as above.
        unsafe { self.0.add(at).read_volatile() }
    }

    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        // SAFETY: memory of a test's own, all of it mapped.
        unsafe { rustix::mm::madvise(self.0.as_ptr().cast(), SIZE, advice) }
    }
}

/// Set in a process that is to be killed.
const DOOMED: &str = "TIDEOVER_REGION_DOOMED";

/// Runs `body` in a process of its own, and gives the signal that it died of.
#[track_caller]
fn killed_by(test: &str, body: impl FnOnce()) -> Option<i32> {
    if std::env::var_os(DOOMED).is_some() {
        body();
        // It lived, and says so by its success.
        std::process::exit(0);
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(DOOMED, "1");
    command.output().unwrap().status.signal()
}

/// G5.3.9, G5.3.10.
#[test]
fn a_guest_memfd_is_mapped_if_it_was_made_for_it_and_shared_only() {
    harness::need!(kvm, guest_memfd);
    for flags in [GuestMemfdFlags::NONE, SHARED] {
        let refused = Raw::new(&made(flags), SIZE, MapFlags::SHARED).err();
        assert_eq!(refused, Some(Errno::NODEV), "{flags}");
    }
    let private = Raw::new(&made(GuestMemfdFlags::MMAP | SHARED), SIZE, MapFlags::PRIVATE).err();
    assert_eq!(private, Some(Errno::INVAL));
}

/// G5.3.12, G5.4.1.
#[test]
fn who_touches_what_is_the_guests_alone_is_killed_and_ours_does_not_map_it() {
    harness::need!(kvm, guest_memfd);
    let test = "who_touches_what_is_the_guests_alone_is_killed_and_ours_does_not_map_it";
    let signal = killed_by(test, || {
        let raw = Raw::new(&made(GuestMemfdFlags::MMAP), SIZE, MapFlags::SHARED).unwrap();
        raw.read(0);
    });
    assert_eq!(signal, Some(libc::SIGBUS));
    let fd = made(GuestMemfdFlags::MMAP);
    let region = Region::accept_as("t", fd, SIZE as u64, Store::GuestMemfd, PageSize::Small).unwrap();
    assert_eq!(region.map().unwrap_err().errno(), Errno::INVAL);
}

/// G5.3.11, G5.4.1.
#[test]
fn who_writes_behind_the_end_is_killed_and_ours_answers_with_an_error() {
    harness::need!(kvm, guest_memfd);
    let test = "who_writes_behind_the_end_is_killed_and_ours_answers_with_an_error";
    let signal = killed_by(test, || {
        let fd = made(GuestMemfdFlags::MMAP | SHARED);
        let raw = Raw::new(&fd, 4 * SIZE, MapFlags::SHARED).unwrap();
        (0..SIZE).for_each(|at| raw.write(at, 0xaa));
        if (0..SIZE).any(|at| raw.read(at) != 0xaa) {
            std::process::exit(1);
        }
        raw.write(SIZE, 0xaa);
    });
    assert_eq!(signal, Some(libc::SIGBUS));
    let mapping = ours();
    mapping.write(0, &[0xaa; SIZE]).unwrap();
    mapping.write(SIZE as u64, &[0xaa]).unwrap_err();
    mapping.write(SIZE as u64 - 1, &[0xaa, 0xaa]).unwrap_err();
    let mut read = [0; SIZE];
    mapping.read(0, &mut read).unwrap();
    assert!(read.iter().all(|byte| *byte == 0xaa));
}

/// G5.3.4, G5.3.14, G5.4.2.
#[test]
fn a_page_that_was_punched_reads_as_zero_and_the_others_as_before() {
    harness::need!(kvm, guest_memfd);
    let mapping = ours();
    mapping.write(0, &[0xaa; SIZE]).unwrap();
    mapping.region().punch(0, PAGE as u64).unwrap();
    let mut read = [0; SIZE];
    mapping.read(0, &mut read).unwrap();
    assert!(read[..PAGE].iter().all(|byte| *byte == 0) && read[PAGE..].iter().all(|byte| *byte == 0xaa));
    mapping.write(0, &[0xbb; PAGE]).unwrap();
    mapping.region().punch(PAGE as u64, PAGE as u64).unwrap();
    mapping.region().allocate(PAGE as u64, PAGE as u64).unwrap();
    mapping.read(0, &mut read).unwrap();
    assert!(read[..PAGE].iter().all(|byte| *byte == 0xbb));
    assert!(read[PAGE..2 * PAGE].iter().all(|byte| *byte == 0), "allocated, and not touched yet");
}

/// G5.4.3.
#[test]
fn pages_are_not_collapsed_and_stay_when_a_mapping_lets_them_go() {
    harness::need!(kvm, guest_memfd);
    let fd = made(GuestMemfdFlags::MMAP | SHARED);
    let raw = Raw::new(&fd, SIZE, MapFlags::SHARED).unwrap();
    (0..SIZE).for_each(|at| raw.write(at, 0xaa));
    raw.advise(Advice::LinuxHugepage).unwrap();
    // MADV_COLLAPSE, for which rustix has no name.
    // SAFETY: a collapse changes no byte, and it is refused.
    let collapsed = unsafe { libc::madvise(raw.0.as_ptr().cast(), SIZE, libc::MADV_COLLAPSE) };
    let errno = Errno::from_io_error(&std::io::Error::last_os_error());
    assert_eq!((collapsed, errno), (-1, Some(Errno::INVAL)));
    raw.advise(Advice::LinuxDontNeed).unwrap();
    assert!((0..SIZE).all(|at| raw.read(at) == 0xaa), "the file's pages are where they were");
}

/// G5.7.3.
#[test]
fn a_mapping_shows_the_bytes_when_the_last_descriptor_is_closed() {
    harness::need!(kvm, guest_memfd);
    let fd = made(GuestMemfdFlags::MMAP | SHARED);
    let raw = Raw::new(&fd, SIZE, MapFlags::SHARED).unwrap();
    let again = Raw::new(&fd.as_fd().try_clone_to_owned().unwrap(), SIZE, MapFlags::SHARED).unwrap();
    raw.write(PAGE, 0xaa);
    drop(fd);
    assert_eq!(again.read(PAGE), 0xaa);
}

/// R4.8, G5.4.3.
#[test]
fn its_pages_are_never_reclaimed() {
    harness::need!(kvm, guest_memfd, pagemap);
    /// The number of `KPF_UNEVICTABLE`'s bit.
    const UNEVICTABLE: u64 = 18;
    const PAGES: u64 = 4096;
    let builder = VmBuilder::create(&Kvm::new().unwrap()).unwrap();
    let bytes = PAGES * PAGE as u64;
    let fd = guest_memfd::create(builder.fd(), bytes, GuestMemfdFlags::MMAP | SHARED).unwrap();
    let region = Region::accept_as("t", fd, bytes, Store::GuestMemfd, PageSize::Small).unwrap();
    let mapping = region.map().unwrap();
    let offsets = (0..bytes).step_by(PAGE);
    offsets.clone().for_each(|offset| mapping.store(offset, 7).unwrap());
    let flags = std::fs::File::open("/proc/kpageflags").unwrap();
    let frames = tideover_region::pagemap::frames(&mapping, offsets).unwrap();
    let is = |frame: &Option<u64>| {
        let mut bits = [0; 8];
        flags.read_exact_at(&mut bits, frame.unwrap() * 8).unwrap();
        u64::from_le_bytes(bits) >> UNEVICTABLE & 1 == 1
    };
    let unevictable = frames.iter().filter(|frame| is(frame)).count() as u64;
    // Each processor puts its last few pages on no list before it has a batch of them.
    assert!(unevictable > PAGES / 2, "{unevictable} of {PAGES}");
}
