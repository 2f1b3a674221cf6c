//! What is present gets an entry, and nothing else changes.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::fs::{MemfdFlags, fstatfs, ftruncate, memfd_create};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use uffd::{
    Activity, CallError, Continued, Mapped, Method, Mode, PopulateError, Populated, RangeError, Refusal,
    Stopped, Uffd, populate, populate_by_seek,
};

use crate::memory::{Memory, Numbers, PAGE, View};

/// Some 10 MiB: a few steps, the last one not full.
const PAGES: usize = 2600;

const METHODS: [Method; 3] = [Method::Guarded, Method::Continue, Method::Seek];

fn by(method: Method, view: &View, memory: &Memory) -> Populated {
    let file = memory.file.as_fd();
    let quiet = &mut |_, _| {};
    match method {
        Method::Guarded => populate(view, file, Activity::Idle, quiet),
        Method::Continue => populate(view, file, Activity::Busy, quiet),
        Method::Seek => populate_by_seek(view, file, quiet),
        Method::Touched | Method::Whole => unreachable!("the kind of the memory chooses them"),
    }
    .unwrap()
}

/// Runs of data and of holes, of lengths from one page to several steps.
fn runs(seed: u64, pages: usize) -> Vec<bool> {
    let mut numbers = Numbers::from_seed(seed);
    let mut present = vec![false; pages];
    let mut at = 0;
    let mut data = seed.is_multiple_of(2);
    while at < pages {
        let longest = [2, 40, 1500][numbers.below(3)];
        let end = pages.min(at + 1 + numbers.below(longest));
        present[at..end].fill(data);
        data = !data;
        at = end;
    }
    present
}

fn check_only_what_is_present(present: &[bool]) {
    let memory = Memory::new(present.len());
    memory.fill(|page| present[page]);
    assert!(memory.data() == present);
    let allocated = memory.allocated();

    for method in METHODS {
        let view = memory.map();
        let populated = by(method, &view, &memory);
        assert!(view.entries() == present, "{method:?}");
        assert!(memory.data() == present, "{method:?}");
        assert_eq!(memory.allocated(), allocated, "{method:?}");
        let count = present.iter().filter(|&&present| present).count();
        assert_eq!(
            populated,
            Populated {
                method,
                refusal: None,
                bytes_mapped: count * PAGE,
                bytes_total: present.len() * PAGE
            }
        );
        for (page, _) in present.iter().enumerate().filter(|(_, present)| **present) {
            assert_eq!(view.read(page), page as u64 + 1);
        }
    }
}

/// R1.5.
#[test]
fn only_present_pages_get_an_entry_and_holes_stay_holes() {
    harness::need!(userfaultfd);
    for seed in 0..24 {
        check_only_what_is_present(&runs(seed, PAGES));
    }
}

#[test]
fn memory_that_is_all_hole_or_all_data_or_one_page_is_no_exception() {
    harness::need!(userfaultfd);
    check_only_what_is_present(&[false; PAGES]);
    check_only_what_is_present(&[true; PAGES]);
    check_only_what_is_present(&[true]);
    check_only_what_is_present(&[false]);
    let mut last = [false; PAGES];
    last[PAGES - 1] = true;
    check_only_what_is_present(&last);
}

#[test]
fn entries_that_were_there_are_kept_and_counted() {
    harness::need!(userfaultfd);
    let present = runs(6, PAGES);
    let memory = Memory::new(PAGES);
    memory.fill(|page| present[page]);
    let count = present.iter().filter(|&&present| present).count();
    for method in METHODS {
        let view = memory.map();
        for page in (0..PAGES).step_by(7).filter(|&page| present[page]) {
            view.read(page);
        }
        assert_eq!(by(method, &view, &memory).bytes_mapped, count * PAGE);
        assert!(view.entries() == present, "{method:?}");
        // And once more, over all of them.
        assert_eq!(by(method, &view, &memory).bytes_mapped, count * PAGE);
    }
}

/// Populates while another thread gives pages back, over and over: none of them may come back.
fn check_against_punches(method: Method, hole_every: usize) {
    for seed in 0..30 {
        let memory = Memory::new(PAGES);
        memory.fill(|page| page % hole_every != 0);
        let view = memory.map();
        let done = AtomicBool::new(false);
        let mut punched = vec![false; PAGES];
        thread::scope(|scope| {
            let puncher = scope.spawn(|| {
                let mut numbers = Numbers::from_seed(seed);
                let mut pages = Vec::new();
                while !done.load(Ordering::Acquire) && pages.len() < PAGES {
                    let page = numbers.below(PAGES);
                    memory.punch(page);
                    pages.push(page);
                }
                pages
            });
            by(method, &view, &memory);
            done.store(true, Ordering::Release);
            for page in puncher.join().unwrap() {
                punched[page] = true;
            }
        });
        let want: Vec<bool> = (0..PAGES).map(|page| page % hole_every != 0 && !punched[page]).collect();
        assert!(memory.data() == want, "{method:?}, seed {seed}");
        let entries = view.entries();
        let wrong = entries.iter().zip(&want).position(|(&entry, &want)| entry && !want);
        assert_eq!(wrong, None, "{method:?}, seed {seed}");
        // The kernel itself takes an entry of a page in use away now and then while others are punched
        // (one in some 10^7 punches); the next access makes it anew.
        let lost = entries.iter().zip(&want).filter(|&(&entry, &want)| want && !entry).count();
        assert!(lost <= PAGES / 100, "{method:?}, seed {seed}: {lost}");
        assert_eq!(memory.allocated(), want.iter().filter(|&&present| present).count());
    }
}

#[test]
fn a_page_that_is_given_back_meanwhile_is_not_made_anew() {
    harness::need!(userfaultfd);
    for hole_every in [5, 500] {
        check_against_punches(Method::Guarded, hole_every);
        check_against_punches(Method::Continue, hole_every);
    }
}

#[test]
fn threads_that_use_busy_memory_meanwhile_notice_nothing() {
    harness::need!(userfaultfd);
    let memory = Memory::new(PAGES);
    memory.fill(|page| page % 3 != 0);
    let view = memory.map();
    thread::scope(|scope| {
        for seed in 0..2 {
            let view = &view;
            scope.spawn(move || {
                let mut numbers = Numbers::from_seed(seed);
                for _ in 0..3 * PAGES {
                    let page = numbers.below(PAGES);
                    let want = if page.is_multiple_of(3) { 0 } else { page as u64 + 1 };
                    assert_eq!(view.read(page), want);
                }
            });
        }
        by(Method::Continue, &view, &memory);
    });
    let entries = view.entries();
    assert!((0..PAGES).all(|page| page % 3 == 0 || entries[page]));
}

#[test]
fn nothing_stays_registered() {
    harness::need!(userfaultfd);
    for method in METHODS {
        let memory = Memory::new(PAGES);
        memory.fill(|page| page % 2 == 0);
        let view = memory.map();
        by(method, &view, &memory);
        // Another userfaultfd could not have it otherwise.
        let other = Uffd::open().unwrap();
        other.register(&view, 0..view.len_bytes(), Mode::MissingAndMinor).unwrap();
        assert_eq!(Uffd::open().unwrap().register(&view, 0..PAGE, Mode::Missing), Err(CallError::Busy));
        drop(other);
        view.write(1, 7);
        assert_eq!(view.read(1), 7);
    }
}

#[test]
fn progress_grows_to_the_end() {
    harness::need!(userfaultfd);
    for (seed, activity) in [(0, Activity::Idle), (1, Activity::Busy)] {
        let memory = Memory::new(PAGES);
        let present = runs(seed, PAGES);
        memory.fill(|page| present[page]);
        let view = memory.map();
        let mut told = Vec::new();
        let progress = &mut |done, total| {
            assert_eq!(total, PAGES * PAGE);
            told.push(done);
        };
        populate(&view, memory.file.as_fd(), activity, progress).unwrap();
        assert!(told.is_sorted(), "{told:?}");
        assert_eq!(told.last(), Some(&(PAGES * PAGE)));
        assert!(told.len() > 2);
    }
}

#[test]
fn huge_pages_are_mapped_whole_unless_the_memory_is_busy() {
    harness::need!(userfaultfd);
    const HUGE: usize = 2 << 20;
    let memory = Memory::new(4 * HUGE / PAGE);
    memory.fill(|page| page < 2 * HUGE / PAGE || page % 8 == 1);
    let present = memory.data();
    let before = memory.map();
    // Only what is present, so that it stays as many pages. Not every machine has them to give.
    let huge = match before.collapse(0..2 * HUGE) {
        Ok(()) => before.huge_bytes(),
        Err(_) => 0,
    };
    drop(before);
    for (method, whole) in [(Method::Guarded, huge), (Method::Seek, huge), (Method::Continue, 0)] {
        let view = memory.map();
        by(method, &view, &memory);
        assert!(view.entries() == present, "{method:?}");
        assert!(memory.data() == present, "{method:?}");
        assert_eq!(view.huge_bytes(), whole, "{method:?}");
    }
}

#[test]
fn of_hugetlb_memory_only_present_pages_get_an_entry() {
    harness::need!(userfaultfd, hugetlb);
    const HUGE: usize = 2 << 20;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = memfd_create("uffd-test-huge", flags).unwrap();
    ftruncate(&file, 3 * HUGE as u64).unwrap();
    let memory = Memory { file, pages: 3 * HUGE / PAGE };
    memory.map().write(HUGE / PAGE, 5);
    let want: Vec<bool> = (0..memory.pages).map(|page| page * PAGE / HUGE == 1).collect();
    for method in [Method::Guarded, Method::Continue] {
        let view = memory.map();
        assert_eq!(by(method, &view, &memory).bytes_mapped, HUGE);
        assert!(view.entries() == want, "{method:?}");
        assert_eq!(memory.allocated(), HUGE / PAGE);
        assert_eq!(view.read(HUGE / PAGE), 5);
    }
    assert_eq!(
        populate_by_seek(&memory.map(), memory.file.as_fd(), &mut |_, _| {}),
        Err(PopulateError::NoHoles { refusal: None })
    );
}

/// Set for the other side of a test: this program, started anew for the one test.
const ALONE: &str = "TIDEOVER_UFFD_ALONE";

/// Runs one of this program's tests in a process of its own, and answers true in the one that did so. In the other
/// one it may change what counts for all of a process.
fn ran_alone(test: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return false;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    true
}

/// Populates while no userfaultfd can be opened, whatever the rights of this process are.
fn populate_without_userfaultfd(view: &View, memory: &Memory) -> Result<Populated, PopulateError> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..limit }).unwrap();
    let populated = populate(view, memory.file.as_fd(), Activity::Idle, &mut |_, _| {});
    setrlimit(Resource::Nofile, limit).unwrap();
    populated
}

#[test]
fn without_a_userfaultfd_the_holes_are_asked_for() {
    if ran_alone("populate::without_a_userfaultfd_the_holes_are_asked_for") {
        return;
    }
    let present = runs(3, PAGES);
    let memory = Memory::new(PAGES);
    memory.fill(|page| present[page]);
    let view = memory.map();
    let populated = populate_without_userfaultfd(&view, &memory).unwrap();
    assert_eq!(populated.method, Method::Seek);
    assert!(matches!(populated.refusal, Some(Refusal::Open(_))), "{populated:?}");
    assert_eq!(populated.bytes_mapped, present.iter().filter(|&&present| present).count() * PAGE);
    assert!(view.entries() == present);
    assert!(memory.data() == present);
}

/// A device answers `lseek` with where it is, wherever it is asked for data from: who believes that never ends.
#[test]
fn a_device_is_not_asked_for_its_holes_and_is_populated_whole() {
    if ran_alone("populate::a_device_is_not_asked_for_its_holes_and_is_populated_whole") {
        return;
    }
    let file = OpenOptions::new().read(true).write(true).open("/dev/zero").unwrap().into();
    let memory = Memory { file, pages: PAGES };
    let view = memory.map();
    let sought = populate_by_seek(&view, memory.file.as_fd(), &mut |_, _| {});
    assert_eq!(sought, Err(PopulateError::NoHoles { refusal: None }));
    let populated = populate_without_userfaultfd(&view, &memory).unwrap();
    assert_eq!((populated.method, populated.bytes_mapped), (Method::Whole, PAGES * PAGE));
    assert!(view.entries().iter().all(|&entry| entry));
}

#[test]
fn without_a_userfaultfd_hugetlb_memory_is_populated_if_it_is_whole() {
    harness::need!(hugetlb);
    if ran_alone("populate::without_a_userfaultfd_hugetlb_memory_is_populated_if_it_is_whole") {
        return;
    }
    const HUGE: usize = 2 << 20;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = memfd_create("uffd-test-huge", flags).unwrap();
    ftruncate(&file, 3 * HUGE as u64).unwrap();
    let memory = Memory { file, pages: 3 * HUGE / PAGE };
    let maker = memory.map();
    maker.write(0, 1);
    maker.write(2 * HUGE / PAGE, 3);
    let view = memory.map();
    let refused = populate_without_userfaultfd(&view, &memory).unwrap_err();
    assert!(matches!(refused, PopulateError::NoHoles { refusal: Some(_) }), "{refused:?}");
    assert_eq!(memory.allocated(), 2 * HUGE / PAGE);
    assert!(view.entries().iter().all(|entry| !entry));

    maker.write(HUGE / PAGE, 2);
    let populated = populate_without_userfaultfd(&view, &memory).unwrap();
    assert_eq!((populated.method, populated.bytes_mapped), (Method::Whole, 3 * HUGE));
    assert!(view.entries().iter().all(|&entry| entry));
    assert_eq!([0, 1, 2].map(|page| view.read(page * HUGE / PAGE)), [1, 2, 3]);
}

#[test]
fn of_a_guest_memfd_what_was_touched_gets_an_entry() {
    harness::need!(kvm, guest_memfd);
    let builder = kvm::VmBuilder::create(&kvm::kvm_ioctls::Kvm::new().unwrap()).unwrap();
    let flags = kvm::GuestMemfdFlags::MMAP | kvm::GuestMemfdFlags::INIT_SHARED;
    for seed in 0..4 {
        let file = kvm::guest_memfd::create(builder.fd(), (PAGES * PAGE) as u64, flags).unwrap();
        let memory = Memory { file, pages: PAGES };
        let present = runs(seed, PAGES);
        let touched: Vec<usize> = (0..PAGES).filter(|&page| present[page]).collect();
        let maker = memory.map();
        touched.iter().for_each(|&page| maker.write(page, page as u64 + 1));

        // Twice: had the first one filled a hole, the second would find it.
        for activity in [Activity::Idle, Activity::Busy] {
            let view = memory.map();
            let mut told = Vec::new();
            let progress = &mut |done, _| told.push(done);
            let populated = populate(&view, memory.file.as_fd(), activity, progress).unwrap();
            assert_eq!(populated.method, Method::Touched);
            assert_eq!(populated.bytes_mapped, touched.len() * PAGE);
            assert_eq!(populated.bytes_total, PAGES * PAGE);
            assert!(populated.refusal.is_some());
            assert!(view.entries() == present);
            assert!(touched.iter().all(|&page| view.read(page) == page as u64 + 1));
            assert!(told.is_sorted() && told.last() == Some(&(PAGES * PAGE)), "{told:?}");
        }
    }
}

#[test]
fn continuing_stops_at_a_hole_at_an_entry_and_at_the_end() {
    harness::need!(userfaultfd);
    let memory = Memory::new(16);
    memory.fill(|page| page != 10);
    let view = memory.map();
    view.read(12);
    // The kernel may have mapped neighbours along with it.
    let first = view.entries().iter().position(|&entry| entry).unwrap();
    let uffd = Uffd::open().unwrap();
    uffd.register(&view, 0..16 * PAGE, Mode::Minor).unwrap();
    assert_eq!(
        uffd.continue_range(&view, first * PAGE..16 * PAGE),
        Ok(Continued { bytes_mapped: 0, stopped: Stopped::AtMapped })
    );
    assert_eq!(
        uffd.continue_range(&view, 10 * PAGE..11 * PAGE),
        Ok(Continued { bytes_mapped: 0, stopped: Stopped::AtHole })
    );
    uffd.unregister(&view, 0..16 * PAGE).unwrap();

    let fresh = memory.map();
    uffd.register(&fresh, 0..16 * PAGE, Mode::Minor).unwrap();
    assert_eq!(
        uffd.continue_range(&fresh, 0..16 * PAGE),
        Ok(Continued { bytes_mapped: 10 * PAGE, stopped: Stopped::AtHole })
    );
    assert_eq!(
        uffd.continue_range(&fresh, 11 * PAGE..16 * PAGE),
        Ok(Continued { bytes_mapped: 5 * PAGE, stopped: Stopped::AtEnd })
    );
}

#[test]
fn a_range_outside_the_mapping_or_within_a_page_is_refused() {
    harness::need!(userfaultfd);
    let memory = Memory::new(4);
    let view = memory.map();
    let uffd = Uffd::open().unwrap();
    let end = 4 * PAGE;
    #[expect(clippy::reversed_empty_ranges, reason = "a caller may well pass one")]
    let ranges = [0..0, end..end + PAGE, 0..end + PAGE, 1..PAGE, 0..PAGE + 1, PAGE..0, 0..usize::MAX];
    for range in ranges {
        let cause = RangeError { start: range.start, end: range.end, mapping_len: end };
        let error = Err(CallError::Range { cause });
        assert_eq!(uffd.register(&view, range.clone(), Mode::Missing), error);
        assert_eq!(uffd.unregister(&view, range.clone()), error);
        assert_eq!(uffd.wake(&view, range.clone()), error);
        assert_eq!(uffd.continue_range(&view, range).map(|_| ()), error);
    }
}

#[test]
fn a_file_on_a_disk_is_populated_by_its_holes() {
    harness::need!(userfaultfd);
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tideover-uffd-{}", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    ftruncate(&file, 64 * PAGE as u64).unwrap();
    let memory = Memory { file: file.into(), pages: 64 };
    memory.fill(|page| page >= 32);
    let view = memory.map();
    let populated = by(Method::Guarded, &view, &memory);
    // The target directory may itself be memory.
    let memfs = fstatfs(&memory.file).unwrap().f_type == libc::TMPFS_MAGIC;
    let refusal = (!memfs).then_some(Refusal::Register(CallError::Unsupported));
    assert_eq!(populated.refusal, refusal);
    assert_eq!(populated.method, if memfs { Method::Guarded } else { Method::Seek });
    assert!(view.entries()[32..].iter().all(|&entry| entry));
    assert_eq!(view.read(40), 41);
}
