//! What a hold keeps out, what it lets through, and how it ends.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::io::{FdFlags, fcntl_getfd};
use rustix::process::{Resource, getrlimit};
use uffd::{CallError, Fault, FaultKind, Hold, Mapped, Mode, OnHole, Uffd};

use crate::memory::{Memory, Numbers, PAGE, View};

const PAGES: usize = 512;

/// Long enough on any machine for what is bound to happen.
const SOON: Duration = Duration::from_secs(30);

/// Enough to see that nothing happens.
const SHORTLY: Duration = Duration::from_millis(100);

/// Half data, half holes: the odd pages are present.
fn half() -> Memory {
    let memory = Memory::new(PAGES);
    memory.fill(|page| page % 2 == 1);
    memory
}

/// Has the kernel read a page, as it does for KVM, and answers what `write` did.
fn kernel_reads(pipe: BorrowedFd<'_>, view: &View, page: usize) -> Result<usize, Errno> {
    // SAFETY: eight bytes at an address that is only given to the kernel, which checks it.
    let written = unsafe { libc::write(pipe.as_raw_fd(), view.word(page).cast(), 8) };
    usize::try_from(written)
        .map_err(|_negative| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap())
}

#[test]
fn a_fault_on_a_hole_parks_until_the_release_and_adds_nothing() {
    harness::need!(userfaultfd);
    let memory = half();
    let view = memory.map();
    let hold = Hold::new(Uffd::open().unwrap(), &view).unwrap();
    let passed = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            view.write(4, 99);
            passed.fetch_add(1, Ordering::Release);
        });
        assert_eq!(hold.wait_fault(SOON).unwrap(), Some(4 * PAGE));
        // Told once.
        assert_eq!(hold.wait_fault(SHORTLY).unwrap(), None);
        // Woken, it tries again and parks again.
        hold.wake().unwrap();
        assert_eq!(hold.wait_fault(SOON).unwrap(), Some(4 * PAGE));
        assert_eq!(passed.load(Ordering::Acquire), 0);
        assert_eq!(memory.allocated(), PAGES / 2);
        hold.release().unwrap();
    });
    assert_eq!(passed.load(Ordering::Acquire), 1);
    assert_eq!(view.read(4), 99);
    assert_eq!(memory.allocated(), PAGES / 2 + 1);
}

#[test]
fn present_pages_are_read_and_written_while_held() {
    harness::need!(userfaultfd);
    let memory = half();
    let view = memory.map();
    view.read(1);
    let hold = Hold::new(Uffd::open().unwrap(), &view).unwrap();
    for page in (1..PAGES).step_by(2) {
        assert_eq!(view.read(page), page as u64 + 1);
        view.write(page, 7);
        assert_eq!(view.read(page), 7);
    }
    assert_eq!(hold.wait_fault(Duration::ZERO).unwrap(), None);
    assert_eq!(memory.allocated(), PAGES / 2);
    assert!(memory.data().iter().enumerate().all(|(page, &data)| data == (page % 2 == 1)));
}

/// R2.3.
#[test]
fn threads_that_fill_holes_add_nothing_from_when_the_hold_is_made() {
    harness::need!(userfaultfd);
    for seed in 0..20 {
        let memory = Memory::new(16 * PAGES);
        let view = memory.map();
        let filled = AtomicUsize::new(0);
        thread::scope(|scope| {
            for thread in 0..3 {
                let (view, filled) = (&view, &filled);
                scope.spawn(move || {
                    for page in (thread..16 * PAGES).step_by(3) {
                        view.write(page, page as u64 + 1);
                        filled.fetch_add(1, Ordering::Release);
                    }
                });
            }
            // Somewhere in the midst of it.
            let some = Numbers::from_seed(seed).below(8 * PAGES);
            while filled.load(Ordering::Acquire) < some {
                std::hint::spin_loop();
            }
            let hold = Hold::new(Uffd::open().unwrap(), &view).unwrap();
            let frozen = memory.allocated();
            let data = memory.data();
            thread::sleep(Duration::from_millis(5));
            assert_eq!(memory.allocated(), frozen);
            assert!(memory.data() == data);
            drop(hold);
        });
        // Let go, they have finished what they were at.
        assert!((0..16 * PAGES).all(|page| view.read(page) == page as u64 + 1));
        assert_eq!(memory.allocated(), 16 * PAGES);
    }
}

/// R2.3, O2.4, P6.5.2.
#[test]
fn a_fault_of_the_kernel_parks_too() {
    harness::need!(userfaultfd);
    let memory = half();
    let view = memory.map();
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    let hold = Hold::new(Uffd::open().unwrap(), &view).unwrap();
    thread::scope(|scope| {
        let reading = scope.spawn(|| kernel_reads(writer.as_fd(), &view, 6));
        assert_eq!(hold.wait_fault(SOON).unwrap(), Some(6 * PAGE));
        assert_eq!(memory.allocated(), PAGES / 2);
        hold.release().unwrap();
        assert_eq!(reading.join().unwrap(), Ok(8));
    });
}

#[test]
fn where_faults_are_refused_nothing_parks_and_nothing_is_added() {
    harness::need!(userfaultfd);
    let memory = half();
    let view = memory.map();
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    let hold = Hold::new(Uffd::open_refusing().unwrap(), &view).unwrap();
    assert_eq!(kernel_reads(writer.as_fd(), &view, 6), Err(Errno::FAULT));
    assert_eq!(kernel_reads(writer.as_fd(), &view, 7), Ok(8));
    assert_eq!(hold.wait_fault(Duration::ZERO).unwrap(), None);
    assert_eq!(memory.allocated(), PAGES / 2);
    hold.release().unwrap();
    assert_eq!(kernel_reads(writer.as_fd(), &view, 6), Ok(8));
}

/// P6.5.2.
#[test]
fn at_the_end_what_is_parked_finds_nothing_mapped_and_adds_nothing() {
    harness::need!(userfaultfd);
    let memory = half();
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    let view = Arc::new(memory.map());
    let hold = Hold::new(Uffd::open().unwrap(), Arc::clone(&view)).unwrap();
    // The vCPU's part: an access by the kernel whose address outlives the mapping.
    let reading = thread::spawn({
        let address = view.word(8).expose_provenance();
        move || {
            let word = std::ptr::with_exposed_provenance(address);
            // SAFETY: the address is only given to the kernel, which checks it.
            let written = unsafe { libc::write(writer.as_raw_fd(), word, 8) };
            (written, std::io::Error::last_os_error().raw_os_error())
        }
    });
    assert_eq!(hold.wait_fault(SOON).unwrap(), Some(8 * PAGE));
    let (ours, parked) = hold.end();
    drop(ours);
    // While one owner is left it is still mapped, and still held.
    thread::sleep(SHORTLY);
    assert!(!reading.is_finished());
    assert_eq!(memory.allocated(), PAGES / 2);

    drop(view);
    assert!(!reading.is_finished());
    parked.wake().unwrap();
    assert_eq!(reading.join().unwrap(), (-1, Some(libc::EFAULT)));
    assert_eq!(memory.allocated(), PAGES / 2);
    assert!(!memory.data()[8]);
}

#[test]
fn another_thread_is_told_of_what_parks_for_as_long_as_the_hold_stands() {
    harness::need!(userfaultfd);
    let memory = half();
    let view = memory.map();
    let hold = Hold::new(Uffd::open().unwrap(), &view).unwrap();
    let faults = hold.faults().unwrap();
    thread::scope(|scope| {
        let told = scope.spawn(|| faults.wait(SOON).unwrap());
        scope.spawn(|| view.write(4, 99));
        assert_eq!(told.join().unwrap(), Some(4 * PAGE));
        assert_eq!(faults.wait(SHORTLY).unwrap(), None, "told once");
        // What still tells of faults keeps nobody from going on.
        drop(hold);
    });
    assert_eq!(view.read(4), 99);
    assert_eq!(view.read(6), 0);
    assert_eq!(faults.wait(Duration::ZERO).unwrap(), None);
}

#[test]
fn a_userfaultfd_has_a_number_above_those_of_other_files() {
    harness::need!(userfaultfd);
    let uffd = Uffd::open().unwrap();
    let other = std::fs::File::open("/dev/null").unwrap();
    let (number, limit) = (uffd.as_fd().as_raw_fd(), getrlimit(Resource::Nofile).current);
    let high = [4096, 512].into_iter().find(|high| limit.is_none_or(|limit| limit > *high));
    assert!(high.is_none_or(|high| u64::try_from(number).unwrap() >= high), "{number} of {limit:?}");
    assert!(number > other.as_raw_fd());
    assert_eq!(fcntl_getfd(&uffd), Ok(FdFlags::CLOEXEC));
}

#[test]
fn collapsing_into_huge_pages_fills_no_hole_that_is_held() {
    harness::need!(userfaultfd);
    const HUGE: usize = 2 << 20;
    let fresh = || {
        let memory = Memory::new(HUGE / PAGE);
        memory.fill(|page| page % 2 == 1);
        let view = memory.map();
        (memory, view)
    };
    let (memory, view) = fresh();
    let before = memory.allocated();
    let hold = Hold::new(Uffd::open().unwrap(), &view).unwrap();
    let refused = view.collapse(0..HUGE);
    assert_eq!(memory.allocated(), before);
    // Without the hold the same call fills them, where the kernel has huge pages to give. Where it has
    // not, it fails both times.
    drop(hold);
    if view.collapse(0..HUGE).is_ok() {
        assert_eq!(memory.allocated(), HUGE / PAGE);
        assert!(refused.is_err());
    }
}

#[test]
fn a_mapping_is_held_once() {
    harness::need!(userfaultfd);
    let memory = half();
    let view = memory.map();
    let hold = Hold::new(Uffd::open().unwrap(), &view).unwrap();
    assert_eq!(Hold::new(Uffd::open().unwrap(), &view).unwrap_err(), CallError::Busy);
    // That it was refused leaves the first as it was.
    thread::scope(|scope| {
        scope.spawn(|| view.read(0));
        assert_eq!(hold.wait_fault(SOON).unwrap(), Some(0));
        assert_eq!(hold.mapped().len_bytes(), PAGES * PAGE);
        drop(hold);
    });
    Hold::new(Uffd::open().unwrap(), &view).unwrap();
}

#[test]
fn faults_tell_where_and_how() {
    harness::need!(userfaultfd);
    let memory = half();
    let view = memory.map();
    let uffd = Uffd::open().unwrap();
    assert_eq!(uffd.on_hole(), OnHole::Park);
    assert_eq!(fcntl_getfd(&uffd), Ok(FdFlags::CLOEXEC));
    uffd.register(&view, 0..PAGES * PAGE, Mode::MissingAndMinor).unwrap();
    let expect = |page: usize, write, kind| {
        let fault = uffd.wait_fault(SOON).unwrap().unwrap();
        let host_address = (view.host_address() + page * PAGE) as u64;
        assert_eq!(fault, Fault { host_address, write, kind });
        assert_eq!(fault.offset_in(&view), Some(page * PAGE));
    };
    thread::scope(|scope| {
        scope.spawn(|| view.read(2));
        expect(2, false, FaultKind::Missing);
        scope.spawn(|| view.write(4, 1));
        expect(4, true, FaultKind::Missing);
        scope.spawn(|| view.read(5));
        expect(5, false, FaultKind::Minor);
        uffd.continue_range(&view, 5 * PAGE..6 * PAGE).unwrap();
        uffd.unregister(&view, 0..PAGES * PAGE).unwrap();
    });
    let elsewhere = memory.map();
    let fault = Fault { host_address: view.host_address() as u64, write: false, kind: FaultKind::Minor };
    assert_eq!(fault.offset_in(&view), Some(0));
    assert_eq!(fault.offset_in(&elsewhere), None);
}

#[test]
fn waiting_for_a_fault_ends_in_time() {
    harness::need!(userfaultfd);
    let uffd = Uffd::open().unwrap();
    let start = Instant::now();
    assert_eq!(uffd.wait_fault(SHORTLY), Ok(None));
    assert!(start.elapsed() >= SHORTLY);
}

#[test]
fn a_userfaultfd_that_refuses_takes_no_minor_faults() {
    harness::need!(userfaultfd);
    let memory = half();
    let view = memory.map();
    let uffd = Uffd::open_refusing().unwrap();
    assert_eq!(uffd.on_hole(), OnHole::Refuse);
    for mode in [Mode::Minor, Mode::MissingAndMinor] {
        assert_eq!(uffd.register(&view, 0..PAGE, mode), Err(CallError::MinorRefused));
    }
}

#[test]
fn the_kernel_has_what_was_asked_for() {
    harness::need!(userfaultfd);
    let features = Uffd::open().unwrap().features();
    assert!(features.minor(), "{features}");
    assert!(Uffd::open_refusing().unwrap().features().to_string().contains("SIGBUS"));
}
