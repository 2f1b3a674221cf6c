//! The guest's memory stays where it is: no page of it is copied.

use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Barrier;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread;

use tideover_vmm::control::GuestKind;

use crate::for_each_guest;
use crate::processes;
use crate::rig::Rig;
use crate::rig::program;
use crate::streak::EndOf;
use crate::witness::NAME;

for_each_guest!(no_page_of_the_guest_moves[pagemap], no_memory_is_taken_twice);

const MEMORY_BYTES: u64 = 64 << 20;
const PAGE_BYTES: u64 = 4096;
/// What an update may take beside the guest's memory: metadata, and a process.
const BESIDE_BYTES: u64 = 16 << 20;
/// Of an entry of `/proc/PID/pagemap`.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// The physical page behind every page of the guest's memory, by number, in a process's own mapping of it.
fn frames(pid: u32) -> BTreeMap<u64, u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it lives");
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).expect("it lives");
    let ram = format!("/memfd:{NAME}.ram ");
    let hex = |text: &str| u64::from_str_radix(text, 16).expect("addresses are in hex");
    let mut frames = BTreeMap::new();
    for line in maps.lines().filter(|line| line.contains(&ram)) {
        let mut fields = line.split_whitespace();
        let (start, end) =
            fields.next().and_then(|range| range.split_once('-')).expect("a range comes first");
        let offset = hex(fields.nth(1).expect("the offset comes third"));
        let (start, end) = (hex(start), hex(end));
        let pages = usize::try_from((end - start) / PAGE_BYTES).expect("a guest's pages can be counted");
        let mut entries = vec![0; pages * 8];
        pagemap.read_exact_at(&mut entries, start / PAGE_BYTES * 8).expect("the range is mapped");
        for (page, entry) in (offset / PAGE_BYTES..).zip(entries.as_chunks::<8>().0) {
            let entry = u64::from_le_bytes(*entry);
            if entry & PRESENT != 0 {
                frames.insert(page, entry & FRAME);
            }
        }
    }
    frames
}

fn no_page_of_the_guest_moves(guest: GuestKind) {
    let rig = Rig::with(guest, MEMORY_BYTES, vec![program()]);
    let mut pid = rig.status().pid;
    // The kernel may move a page by itself, to make room for a larger one; that it does so in each of three updates
    // is not to be believed, while a copy moves all of them each time.
    let mut moved = Vec::new();
    for _ in 0..3 {
        let before = frames(pid);
        assert_eq!(before.len() as u64, MEMORY_BYTES / PAGE_BYTES, "every page is there from the start");
        assert!(before.values().all(|frame| *frame != 0), "page frame numbers are shown");
        pid = rig.update_well();
        let after = frames(pid);
        assert_eq!(after.len(), before.len(), "every page was entered before the guest ran");
        moved.push(before.iter().filter(|(page, frame)| after.get(page) != Some(frame)).count());
    }
    assert!(moved.contains(&0), "pages that moved, in each update: {moved:?}");
    rig.assert_runs_in(pid);
}

/// What a VMM and the successors that it started take now.
#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    /// By memory files that they have open, each counted once.
    shared_bytes: u64,
    /// By each for itself, the most of them.
    own_bytes: u64,
    processes: usize,
}

impl Taken {
    fn by(pid: u32) -> Self {
        let pids: Vec<u32> = [pid].into_iter().chain(processes::children(pid)).collect();
        let mut files = BTreeMap::new();
        let mut own_bytes = 0;
        for pid in &pids {
            own_bytes = own_bytes.max(processes::status_bytes(*pid, "RssAnon").unwrap_or_default());
            let links = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            for link in links.map(|entry| entry.path()) {
                let target = fs::read_link(&link).unwrap_or_default();
                if target.to_string_lossy().starts_with("/memfd:")
                    && let Ok(file) = fs::metadata(&link)
                {
                    files.insert((file.dev(), file.ino()), file.blocks() * 512);
                }
            }
        }
        Self { shared_bytes: files.values().sum(), own_bytes, processes: pids.len() }
    }

    fn most(self, other: Self) -> Self {
        Self {
            shared_bytes: self.shared_bytes.max(other.shared_bytes),
            own_bytes: self.own_bytes.max(other.own_bytes),
            processes: self.processes.max(other.processes),
        }
    }
}

fn no_memory_is_taken_twice(guest: GuestKind) {
    let rig = Rig::with(guest, MEMORY_BYTES, vec![program()]);
    let mut pid = rig.status().pid;
    for _ in 0..3 {
        let over = AtomicBool::new(false);
        let begun = Barrier::new(2);
        let (next, most) = thread::scope(|scope| {
            let _end = EndOf(&over);
            let looking = scope.spawn(|| {
                let mut most = Taken::by(pid);
                begun.wait();
                while !over.load(Ordering::Relaxed) {
                    most = most.most(Taken::by(pid));
                }
                most
            });
            begun.wait();
            let next = rig.update_well();
            over.store(true, Ordering::Relaxed);
            (next, looking.join().expect("it only looks"))
        });
        pid = next;
        assert!(most.processes >= 2, "it was looked while both were there: {most:?}");
        assert!(most.shared_bytes >= MEMORY_BYTES, "the guest's memory was seen: {most:?}");
        assert!(most.shared_bytes <= MEMORY_BYTES + BESIDE_BYTES, "{most:?}");
        assert!(most.own_bytes <= BESIDE_BYTES, "{most:?}");
    }
    rig.assert_runs_in(pid);
}
