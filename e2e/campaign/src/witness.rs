//! Looks at a machine's memory from outside of every VMM, through files of its own.

use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use abi::arena::OWNERSHIP_ADDRESS;
use anyhow::Context as _;
use machine::OwnershipWord;
use pulse::Mailboxes;
use pulse::Words;
use pulse::check;

/// Sees the guest's memory and the machine's metadata, whoever runs it, and when nobody does.
#[derive(Debug)]
pub struct Witness {
    name: String,
    ram: Ram,
    memory_bytes: u64,
    metadata: File,
}

#[derive(Debug)]
struct Ram(File);

impl Words for Ram {
    fn load(&self, offset_bytes: u64) -> u64 {
        let mut word = [0; 8];
        // A word that cannot be read is none of the guest's: whoever compares finds it wrong.
        let _ = self.0.read_exact_at(&mut word, offset_bytes);
        u64::from_le_bytes(word)
    }

    fn store(&self, _offset_bytes: u64, _value: u64) {
        // A witness changes nothing; its file is open for reading alone.
    }
}

/// What a comparison from outside found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Pages compared.
    pub pages_checked: u64,
    /// Pages that do not hold what they should.
    pub pages_lost: u64,
    /// Wrong words that the guest had found.
    pub guest_errors: u64,
    /// Times that the guest had found registers lost.
    pub registers_lost: u64,
    /// Ticks lost, or counted twice.
    pub ticks_miscounted: u64,
}

impl Comparison {
    /// Both together.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self {
            pages_checked: self.pages_checked + other.pages_checked,
            pages_lost: self.pages_lost + other.pages_lost,
            guest_errors: self.guest_errors + other.guest_errors,
            registers_lost: self.registers_lost + other.registers_lost,
            ticks_miscounted: self.ticks_miscounted + other.ticks_miscounted,
        }
    }
}

impl Witness {
    /// Of the machine of this name, which that process runs.
    ///
    /// # Errors
    /// If it does not have the machine's files.
    pub fn of(pid: u32, name: &str) -> anyhow::Result<Self> {
        let open = |part: &str| open(pid, name, part);
        let ram = open("ram").context("no guest memory")?;
        let memory_bytes = ram.metadata()?.len();
        let metadata = open("metadata").context("no metadata")?;
        Ok(Self { name: name.to_owned(), ram: Ram(ram), memory_bytes, metadata })
    }

    fn mailboxes(&self) -> anyhow::Result<Mailboxes<'_, impl Words>> {
        Mailboxes::find(&self.ram, self.memory_bytes).context("the guest is not in its memory")
    }

    /// What each vCPU has counted; nothing as long as the guest is not in its memory.
    #[must_use]
    pub fn ticks_of_each(&self) -> Vec<u64> {
        self.mailboxes().map_or_else(|_| Vec::new(), |found| found.ticks_of_each())
    }

    /// What all vCPUs have counted.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        self.ticks_of_each().iter().sum()
    }

    /// Who owns the machine.
    ///
    /// # Errors
    /// If the word is destroyed.
    pub fn owner(&self) -> anyhow::Result<OwnershipWord> {
        let mut word = [0; 8];
        self.metadata.read_exact_at(&mut word, OWNERSHIP_ADDRESS)?;
        OwnershipWord::from_bits(u64::from_le_bytes(word)).context("the ownership word is destroyed")
    }

    /// Whether these are the machine's metadata and memory.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn are_same(&self, files: &[File]) -> anyhow::Result<bool> {
        let [metadata, ram] = files else { return Ok(false) };
        let number = |file: &File| anyhow::Ok((file.metadata()?.dev(), file.metadata()?.ino()));
        Ok(number(metadata)? == number(&self.metadata)? && number(ram)? == number(&self.ram.0)?)
    }

    /// Which of these processes hold the nonce of the word, by the kernel's list of the locks of their files.
    #[must_use]
    pub fn holders(&self, word: OwnershipWord, pids: &[u32]) -> Vec<u32> {
        let byte = word.nonce().get().to_string();
        pids.iter().copied().filter(|pid| holds(*pid, &self.name, &byte)).collect()
    }

    /// Compares every word of the memory of a guest that stands still with what it should be.
    ///
    /// # Errors
    /// If it cannot be read, or the guest is not in it.
    pub fn compare(&self) -> anyhow::Result<Comparison> {
        let mailboxes = self.mailboxes()?;
        let read = |offset: u64, into: &mut [u8]| self.ram.0.read_exact_at(into, offset);
        let work = mailboxes.check_work(read)?;
        let fixed = check::fixed_pages(&mailboxes.first().fixed_sums(), read)?;
        let changed = u64::try_from(fixed.changed.len()).unwrap_or(u64::MAX);
        Ok(Comparison {
            pages_checked: work.pages_checked + fixed.pages_checked,
            pages_lost: work.pages_lost + changed,
            guest_errors: mailboxes.errors(),
            registers_lost: mailboxes.registers_lost(),
            ticks_miscounted: mailboxes.tally().miscounted(),
        })
    }
}

/// Whether the process has locked that byte of the machine's metadata. Each of its files tells of the locks that it bears.
fn holds(pid: u32, name: &str, byte: &str) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let ours = format!("/memfd:{name}.metadata");
    let files = entries.flatten().filter(|entry| leads_to(&entry.path(), &ours));
    let numbers = files.filter_map(|entry| entry.file_name().into_string().ok());
    let infos = numbers.filter_map(|number| fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok());
    infos.into_iter().any(|info| info.lines().any(|line| is_lock(line, byte)))
}

/// As `lock: 1: OFDLCK ADVISORY  WRITE -1 00:01:2064 12345 12345`.
fn is_lock(line: &str, byte: &str) -> bool {
    line.starts_with("lock:") && line.split_whitespace().rev().take(2).all(|word| word == byte)
}

fn leads_to(link: &Path, start: &str) -> bool {
    fs::read_link(link).is_ok_and(|target| target.to_str().is_some_and(|target| target.starts_with(start)))
}

/// Opens a part of the machine that the process has open.
fn open(pid: u32, name: &str, part: &str) -> Option<File> {
    let start = format!("/memfd:{name}.{part}");
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    let link = entries.map(|entry| entry.path()).find(|link| leads_to(link, &start))?;
    File::options().read(true).open(link).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_of_the_byte_that_its_line_ends_with() {
        let line = "lock:\t1: OFDLCK ADVISORY  WRITE -1 00:01:2064 77 77";
        assert!(is_lock(line, "77"));
        assert!(!is_lock(line, "7"));
        assert!(!is_lock("lock:\t1: OFDLCK ADVISORY  WRITE -1 00:01:77 0 EOF", "77"));
        assert!(!is_lock("pos:\t77 77", "77"));
    }
}
