//! What a freeze of guest memory ends, what it waits for, and what it leaves alone.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

#[path = "shared/asleep.rs"]
mod asleep;

use std::fs;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use abi::gmem::MemoryName;
use abi::gmem::flags;
use abi::vm::Identity;
use asleep::sleeps;
use pages::PageRange;
use region::Region;
use tideover_gmem::ChangeError;
use tideover_gmem::Held;
use tideover_gmem::Inode;

const MIB: u64 = 1 << 20;
/// Long enough in the making that a thread which allocates it is caught at it.
const LARGE_BYTES: u64 = 512 * MIB;
const LONGEST: Duration = Duration::from_secs(20);

fn inode(size_bytes: u64) -> Arc<Inode> {
    let mapping = Arc::new(Region::create("frozen", size_bytes).unwrap().map().unwrap());
    let frames = PageRange::of_bytes(1 << 30, size_bytes).unwrap();
    Inode::new(MemoryName::literal("ram"), Identity::new([1; 16]), mapping, frames, flags::MMAP)
}

fn present_bytes(inode: &Inode) -> u64 {
    inode.mapping().region().allocated_bytes().unwrap().unwrap()
}

/// Waits until `is` says so.
#[track_caller]
fn wait_until(mut is: impl FnMut() -> bool) {
    let end = Instant::now() + LONGEST;
    while !is() {
        assert!(Instant::now() < end, "it does not come");
        thread::sleep(Duration::from_micros(100));
    }
}

/// G5.3.4.
#[test]
fn pages_are_allocated_and_punched() {
    let inode = inode(4 * MIB);
    inode.allocate(MIB, 2 * MIB).unwrap();
    assert_eq!(present_bytes(&inode), 2 * MIB);
    inode.mapping().write(MIB, &[7]).unwrap();
    inode.punch(MIB, 4096).unwrap();
    assert_eq!(present_bytes(&inode), 2 * MIB - 4096);
    let mut read = [1];
    inode.mapping().read(MIB, &mut read).unwrap();
    assert_eq!(read, [0]);
}

/// R2.1, R2.5, R2.6, O1.5, O2.1, O2.3.
#[test]
fn frozen_memory_is_neither_allocated_nor_punched() {
    let inode = inode(4 * MIB);
    inode.allocate(0, MIB).unwrap();
    let freeze = inode.freeze().unwrap();
    assert!(inode.is_frozen());
    assert_eq!(inode.flags(), flags::MMAP, "none of them says frozen");
    let name = inode.name();
    for refused in [inode.allocate(MIB, 4096), inode.allocate(0, MIB), inode.punch(0, 4096)] {
        assert!(matches!(refused, Err(ChangeError::Frozen { name: of }) if of == name), "{refused:?}");
    }
    drop(freeze);
    assert!(!inode.is_frozen());
    inode.punch(0, 2 * MIB).unwrap();
    let left = present_bytes(&inode);
    inode.allocate(MIB, 4096).unwrap();
    assert_eq!(present_bytes(&inode), left + 4096);
}

/// R2.1, O2.2, G5.3.5, G5.3.6, G5.3.8.
#[test]
fn bad_arguments_are_the_same_error_frozen_or_not() {
    let inode = inode(4 * MIB);
    let size = inode.size_bytes();
    let bad = [(0, 0), (1, 4096), (0, 4095), (size, 4096), (size - 4096, 8192), (u64::MAX - 4095, 4096)];
    let assert_refused = || {
        for (offset, len) in bad {
            for refused in [inode.allocate(offset, len), inode.punch(offset, len)] {
                assert!(
                    matches!(refused, Err(ChangeError::Range { size_bytes, offset_bytes, len_bytes, .. })
                        if (size_bytes, offset_bytes, len_bytes) == (size, offset, len)),
                    "{offset:#x} {len:#x}: {refused:?}"
                );
            }
        }
    };
    assert_refused();
    let _frozen = inode.freeze().unwrap();
    assert_refused();
}

/// O1.11, O2.7.
#[test]
fn freezes_nest_and_the_last_one_ends_it() {
    let inode = inode(4 * MIB);
    let freezes: Vec<_> = (0..3).map(|_| inode.freeze().unwrap()).collect();
    assert!(freezes.iter().all(|freeze| freeze.held() == freezes[0].held()));
    for freeze in freezes {
        assert!(matches!(inode.allocate(0, 4096), Err(ChangeError::Frozen { .. })));
        drop(freeze);
    }
    inode.allocate(0, 4096).unwrap();
    let again = inode.freeze().unwrap();
    assert!(matches!(inode.allocate(0, 4096), Err(ChangeError::Frozen { .. })));
    drop(again);
}

#[test]
fn memory_without_holes_needs_nothing_to_hold_its_faults() {
    let inode = inode(4 * MIB);
    inode.allocate(0, 4 * MIB).unwrap();
    let freeze = inode.freeze().unwrap();
    assert_eq!(freeze.held(), Held::Whole);
    inode.mapping().write(3 * MIB, b"goes on").unwrap();
    assert!(matches!(inode.punch(0, 4096), Err(ChangeError::Frozen { .. })));
}

/// R2.2, R2.7, O1.10, L2.8.4.
#[test]
fn pages_that_are_there_are_read_and_written_while_frozen() {
    let inode = inode(4 * MIB);
    inode.allocate(0, 2 * MIB).unwrap();
    inode.mapping().write(MIB, b"before").unwrap();
    let _frozen = inode.freeze().unwrap();
    let mut read = [0; 6];
    inode.mapping().read(MIB, &mut read).unwrap();
    assert_eq!(&read, b"before");
    // Allocated and never touched: a page like any other.
    inode.mapping().write(MIB + 8192, b"within").unwrap();
    inode.mapping().read(MIB + 8192, &mut read).unwrap();
    assert_eq!(&read, b"within");
}

/// R2.2, R2.3.
#[test]
fn a_fault_on_a_hole_parks_until_the_freeze_ends() {
    harness::need!(userfaultfd);
    let inode = inode(4 * MIB);
    inode.allocate(0, MIB).unwrap();
    let first = inode.freeze().unwrap();
    let second = inode.freeze().unwrap();
    assert_eq!((first.held(), second.held()), (Held::Userfaultfd, Held::Userfaultfd));
    let (say, hear) = mpsc::channel();
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let name = fs::read_link("/proc/thread-self").unwrap().to_string_lossy().into_owned();
            say.send(name).unwrap();
            inode.mapping().write(2 * MIB, b"parked").unwrap();
        });
        let thread = hear.recv().unwrap();
        wait_until(|| sleeps(&thread));
        thread::sleep(Duration::from_millis(20));
        assert!(sleeps(&thread) && !writer.is_finished());
        assert_eq!(present_bytes(&inode), MIB);
        drop(first);
        thread::sleep(Duration::from_millis(20));
        assert!(sleeps(&thread) && !writer.is_finished(), "one freeze stands");
        drop(second);
        wait_until(|| writer.is_finished());
    });
    assert_eq!(present_bytes(&inode), MIB + 4096);
    let mut read = [0; 6];
    inode.mapping().read(2 * MIB, &mut read).unwrap();
    assert_eq!(&read, b"parked");
}

/// What `smaps` says of the memory's mapping on the line that begins so.
fn said_of_mapping(inode: &Inode, line: &str) -> String {
    let address = inode.mapping().host_address();
    let holds = |line: &str| {
        let range = line.split(' ').next()?.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        Some((number(range.0)?..number(range.1)?).contains(&address))
    };
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let ours = maps.lines().skip_while(|line| holds(line) != Some(true));
    ours.into_iter().find_map(|found| found.strip_prefix(line)).unwrap().trim().to_owned()
}

/// True if the kernel hands faults on holes of the memory to a userfaultfd.
fn faults_are_looked_at(inode: &Inode) -> bool {
    said_of_mapping(inode, "VmFlags:").split_whitespace().any(|flag| flag == "um")
}

/// R2.9.
#[test]
fn every_page_that_is_touched_is_counted_to_its_process_until_it_is_given_back() {
    let inode = inode(8 * MIB);
    let counted = || said_of_mapping(&inode, "Rss:");
    assert_eq!(counted(), "0 kB");
    inode.mapping().write_zeros(MIB, 2 * MIB).unwrap();
    assert_eq!(counted(), "2048 kB");
    let freeze = inode.freeze().unwrap();
    let frozen = if freeze.held() == Held::Prefaulted { "8192 kB" } else { "2048 kB" };
    assert_eq!(counted(), frozen, "a freeze takes none but to fill holes");
    drop(freeze);
    inode.punch(0, 8 * MIB).unwrap();
    assert_eq!(counted(), "0 kB");
}

/// R2.8.
#[test]
fn faults_are_looked_at_only_while_a_freeze_stands() {
    harness::need!(userfaultfd);
    let inode = inode(4 * MIB);
    inode.mapping().write(0, b"touched").unwrap();
    assert!(!faults_are_looked_at(&inode));
    for _ in 0..2 {
        let freeze = inode.freeze().unwrap();
        assert!(faults_are_looked_at(&inode));
        drop(freeze);
        assert!(!faults_are_looked_at(&inode));
    }
}

/// Calls `freeze` at a moment when another thread is in the midst of allocating all of `large`. Tries anew
/// if the thread was too fast.
fn while_allocating(large: &Arc<Inode>, mut freeze: impl FnMut()) {
    for _ in 0..20 {
        let caught = thread::scope(|scope| {
            let allocation = scope.spawn(|| large.allocate(0, LARGE_BYTES).unwrap());
            wait_until(|| present_bytes(large) > 0);
            let caught = present_bytes(large) < LARGE_BYTES / 2;
            if caught {
                freeze();
            }
            allocation.join().unwrap();
            caught
        });
        if caught {
            return;
        }
        large.punch(0, LARGE_BYTES).unwrap();
    }
    panic!("no allocation was caught at work");
}

/// R2.4, O1.4.
#[test]
fn a_freeze_waits_for_an_allocation_that_is_running() {
    // One page more, so that a hole is left.
    let large = inode(LARGE_BYTES + 4096);
    while_allocating(&large, || {
        let freeze = large.freeze().unwrap();
        let present = present_bytes(&large);
        // Without userfaultfd the hole was filled.
        let held = if freeze.held() == Held::Prefaulted { LARGE_BYTES + 4096 } else { LARGE_BYTES };
        assert_eq!(present, held);
    });
}

/// O2.5.
#[test]
fn a_freeze_does_not_wait_for_other_memory() {
    let (large, other) = (inode(LARGE_BYTES), inode(4 * MIB));
    let mut overtaken = false;
    for _ in 0..20 {
        while_allocating(&large, || {
            let _frozen = other.freeze().unwrap();
            overtaken = present_bytes(&large) < LARGE_BYTES;
        });
        if overtaken {
            return;
        }
        large.punch(0, LARGE_BYTES).unwrap();
    }
    panic!("it waited each time");
}

/// R2.4, O1.4, O2.6.
#[test]
fn changes_and_freezes_from_many_threads_never_meet() {
    let inode = inode(4 * MIB);
    inode.allocate(0, 4 * MIB).unwrap();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for page in 0..3000 {
                    let offset = page % 1024 * 4096;
                    for change in [inode.punch(offset, 4096), inode.allocate(offset, 4096)] {
                        assert!(matches!(change, Ok(()) | Err(ChangeError::Frozen { .. })), "{change:?}");
                    }
                }
            });
        }
        for _ in 0..300 {
            let freeze = inode.freeze().unwrap();
            let present = present_bytes(&inode);
            thread::yield_now();
            assert_eq!(present_bytes(&inode), present);
            drop(freeze);
        }
    });
}
