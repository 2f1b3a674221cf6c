//! An ELF core, as a crashed kernel's memory is kept (vmcore) and a running one's is shown (/proc/kcore).

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use abi::Memory;
use abi::NoMemory;
use anyhow::Context as _;
use anyhow::bail;
use pages::PAGE_SIZE;
use pages::PageRange;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const CORE: u16 = 4;
const LOAD: u32 = 1;
/// The count of program headers stands elsewhere.
const MANY: u16 = 0xffff;
/// More than any machine's memory has holes.
const MOST_HEADERS: u32 = 1 << 16;

/// A piece of memory in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    address: u64,
    len: u64,
    offset: u64,
}

/// Memory by the physical addresses of a core's segments.
pub(super) struct Core {
    file: File,
    /// By ascending address, without overlap.
    segments: Vec<Segment>,
    /// Bytes that the headers tell of, and that the file has not.
    missing: u64,
}

/// A number of the header.
fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

impl Core {
    pub(super) fn open(file: File) -> anyhow::Result<Self> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).context("it has no whole ELF header")?;
        if header[4..6] != [2, 1] || u16::from_le_bytes(number(&header, 16)) != CORE {
            bail!("it is an ELF file, and no core of a 64-bit little-endian machine");
        }
        let table = u64::from_le_bytes(number(&header, 32));
        let count = match u16::from_le_bytes(number(&header, 56)) {
            MANY => {
                let mut section = [0; HEADER];
                let at = u64::from_le_bytes(number(&header, 40));
                file.read_exact_at(&mut section, at).context("cannot read its section header")?;
                u32::from_le_bytes(number(&section, 44))
            }
            count => count.into(),
        };
        if usize::from(u16::from_le_bytes(number(&header, 54))) != PROGRAM_HEADER || count > MOST_HEADERS {
            bail!("its program headers are of another size, or too many");
        }
        let mut segments = Vec::new();
        for index in 0..u64::from(count) {
            let mut program = [0; PROGRAM_HEADER];
            let at = table.checked_add(index * PROGRAM_HEADER as u64).context("its headers have no place")?;
            file.read_exact_at(&mut program, at).context("cannot read its program headers")?;
            let [offset, address, len] = [8, 24, 32].map(|at| u64::from_le_bytes(number(&program, at)));
            let is_memory = u32::from_le_bytes(number(&program, 0)) == LOAD && address != u64::MAX;
            let whole = Segment { address, len: len & !(PAGE_SIZE - 1), offset };
            let fits = address.checked_add(len).is_some() && offset.checked_add(len).is_some();
            if is_memory && fits && whole.len > 0 && address.is_multiple_of(PAGE_SIZE) {
                segments.push(whole);
            }
        }
        let told: u64 = segments.iter().fold(0, |sum, segment: &Segment| sum.saturating_add(segment.len));
        // What lies behind the file's end would be looked for page by page.
        let end = file.metadata().context("cannot look at it")?.len();
        for segment in &mut segments {
            segment.len = segment.len.min(end.saturating_sub(segment.offset) & !(PAGE_SIZE - 1));
        }
        segments.retain(|segment| segment.len > 0);
        let missing = told - segments.iter().map(|segment| segment.len).sum::<u64>();
        let segments = apart(segments);
        if segments.is_empty() {
            bail!("it has no memory with physical addresses in it");
        }
        Ok(Self { file, segments, missing })
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.len).sum()
    }

    /// Bytes of memory that its headers tell of and that are not in it: it was cut short.
    pub(super) const fn missing_bytes(&self) -> u64 {
        self.missing
    }

    pub(super) fn segments(&self) -> usize {
        self.segments.len()
    }
}

/// By ascending address; of those that overlap, as the kernel's text and all memory do, the largest.
fn apart(mut segments: Vec<Segment>) -> Vec<Segment> {
    segments.sort_unstable_by_key(|segment| std::cmp::Reverse(segment.len));
    let mut kept: Vec<Segment> = Vec::new();
    for segment in segments {
        let after = kept.partition_point(|other| other.address < segment.address);
        let before = after.checked_sub(1).and_then(|at| kept.get(at));
        let free = before.is_none_or(|other| other.address + other.len <= segment.address)
            && kept.get(after).is_none_or(|other| segment.address + segment.len <= other.address);
        if free {
            kept.insert(after, segment);
        }
    }
    kept
}

impl Memory for Core {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        let none = NoMemory::at(address, into.len());
        let (mut at, mut rest) = (address, into);
        // What is asked for may go on in the segment that follows.
        while !rest.is_empty() {
            let after = self.segments.partition_point(|segment| segment.address <= at);
            let segment = after.checked_sub(1).and_then(|index| self.segments.get(index)).ok_or(none)?;
            let inside = at - segment.address;
            let left = segment.len.checked_sub(inside).filter(|left| *left > 0).ok_or(none)?;
            let here = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
            let (part, behind) = rest.split_at_mut(here);
            self.file.read_exact_at(part, segment.offset + inside).map_err(|_| none)?;
            at += here as u64;
            rest = behind;
        }
        Ok(())
    }

    fn runs(&self) -> Vec<PageRange> {
        let mut runs: Vec<PageRange> = Vec::new();
        for segment in &self.segments {
            let Ok(range) = PageRange::of_bytes(segment.address, segment.len) else { continue };
            let longer = runs.last().and_then(|last| {
                let adjacent = last.end() == range.start().get();
                adjacent.then(|| PageRange::new(last.start(), last.len_pages() + range.len_pages()).ok())?
            });
            match (longer, runs.last_mut()) {
                (Some(longer), Some(last)) => *last = longer,
                _ => runs.push(range),
            }
        }
        runs
    }
}
