//! Looks at a machine's memory from outside of every VMM, through files of its own.

use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use abi::arena::OWNERSHIP_ADDRESS;
use machine::OwnershipWord;
use pulse::Mailboxes;
use pulse::Words;

/// Name of every machine of these tests.
pub(crate) const NAME: &str = "back";
/// How long the guest may take to count on where it should.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long to look whether it counts where it should not.
const STILL: Duration = Duration::from_millis(30);

/// Sees the guest's memory and the machine's metadata, whoever runs it, and when nobody does.
#[derive(Debug)]
pub(crate) struct Witness {
    ram: Ram,
    metadata: File,
}

#[derive(Debug)]
struct Ram(File);

impl Words for Ram {
    fn load(&self, offset_bytes: u64) -> u64 {
        let mut word = [0; 8];
        self.0.read_exact_at(&mut word, offset_bytes).expect("the mailbox is in memory");
        u64::from_le_bytes(word)
    }

    fn store(&self, offset_bytes: u64, value: u64) {
        self.0.write_all_at(&value.to_le_bytes(), offset_bytes).expect("the mailbox is in memory");
    }
}

impl Witness {
    /// Of the machine that this process runs; waits until it has made it.
    pub(crate) fn of(pid: u32) -> Self {
        let begun = Instant::now();
        let open = |part: &str| loop {
            if let Some(file) = open(pid, part) {
                return file;
            }
            assert!(begun.elapsed() < PATIENCE, "process {pid} has made no machine");
            thread::sleep(Duration::from_millis(1));
        };
        let witness = Self { ram: Ram(open("ram")), metadata: open("metadata") };
        witness.assert_counts_on();
        witness
    }

    /// What the guest's vCPUs have counted together.
    pub(crate) fn ticks(&self) -> u64 {
        self.ticks_of_each().iter().sum()
    }

    /// What each vCPU has counted; nothing as long as the guest is not in its memory.
    fn ticks_of_each(&self) -> Vec<u64> {
        let memory_bytes = self.ram.0.metadata().expect("it is open").len();
        Mailboxes::find(&self.ram, memory_bytes).map_or_else(|_| Vec::new(), |found| found.ticks_of_each())
    }

    /// Who owns the machine.
    pub(crate) fn owner(&self) -> OwnershipWord {
        let mut word = [0; 8];
        self.metadata.read_exact_at(&mut word, OWNERSHIP_ADDRESS).expect("region 0 has a header");
        OwnershipWord::from_bits(u64::from_le_bytes(word)).expect("it is a word")
    }

    /// Bytes of the machine's metadata that have memory.
    pub(crate) fn metadata_bytes(&self) -> u64 {
        self.metadata.metadata().expect("it is open").blocks() * 512
    }

    /// Bytes of the guest's memory that have memory.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.ram.0.metadata().expect("it is open").blocks() * 512
    }

    /// The guest runs: each of its vCPUs.
    #[track_caller]
    pub(crate) fn assert_counts_on(&self) {
        let (mut before, begun) = (self.ticks_of_each(), Instant::now());
        loop {
            let now = self.ticks_of_each();
            if !before.is_empty() && before.iter().zip(&now).all(|(before, now)| now > before) {
                return;
            }
            if before.is_empty() {
                before = now;
            }
            assert!(begun.elapsed() < PATIENCE, "a vCPU stands still: {before:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The guest runs nowhere.
    #[track_caller]
    pub(crate) fn assert_stands_still(&self) {
        let before = self.ticks_of_each();
        thread::sleep(STILL);
        assert_eq!(self.ticks_of_each(), before, "somebody runs the guest");
    }
}

/// Opens a part of the machine that the process has open.
fn open(pid: u32, part: &str) -> Option<File> {
    let name = format!("/memfd:{NAME}.{part}");
    let named = |link: &Path| {
        let target = fs::read_link(link).ok()?;
        target.to_str()?.starts_with(&name).then_some(())
    };
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    let link = entries.map(|entry| entry.path()).find(|link| named(link).is_some())?;
    let file = File::options().read(true).write(true).open(link).ok()?;
    // Made, and not yet given its size.
    (file.metadata().ok()?.len() != 0).then_some(file)
}
