//! The host's memory as `/proc/iomem` has it, and which of it can be set aside.

use super::memmap::Range;
use crate::check::Host;
use crate::size;

/// What memory is set aside in: what ndctl asks of a region.
pub(crate) const UNIT_BYTES: u64 = 16 << 20;
/// What is left of a piece of memory above what is set aside: kexec_load(2) puts what it boots as far up as it can, and knows nothing
/// of memory that is set aside.
pub(crate) const ABOVE_BYTES: u64 = 128 << 20;
const GIB: u64 = 1 << 30;
/// Below this lies what a kernel cannot do without.
const LOWEST: u64 = GIB;
/// Above this lies memory that nothing needs for its address.
const HIGH: u64 = 4 * GIB;
/// As whole as these the memory begins, if there is room: 1 GiB for the largest pages, 128 MiB for a section of the kernel's.
const WHOLE_BYTES: [u64; 3] = [GIB, 128 << 20, UNIT_BYTES];

/// A line of the map.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// In how many others it lies.
    depth: usize,
    range: Range,
    name: String,
}

/// The map.
#[derive(Debug, Clone, Default)]
pub(crate) struct Map(Vec<Entry>);

/// Why there is no map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unseen {
    /// There is no `/proc/iomem`.
    #[error("there is no /proc/iomem to be read")]
    Absent,
    /// It is all zeros.
    #[error("/proc/iomem shows addresses to root alone: run this as root")]
    Hidden,
    /// Nothing in it is memory.
    #[error("/proc/iomem has no System RAM")]
    NoMemory,
}

/// Why memory cannot be set aside.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("{} is not a whole number of 16 MiB: take {}", size::show(*.0), size::show((*.0).next_multiple_of(UNIT_BYTES).max(UNIT_BYTES)))]
    Size(u64),
    #[error("{0:#x} is not a whole number of 16 MiB")]
    Unaligned(u64),
    #[error("{0:#x} is below 1 GiB, where a kernel needs memory of its own")]
    Low(u64),
    #[error("{0} is not all in one range of System RAM")]
    NotMemory(Range),
    #[error("{wanted} is in use: {busy} is {name}")]
    Busy { wanted: Range, busy: Range, name: String },
    #[error(
        "{0} leaves less than 128 MiB of its System RAM above it, and kexec_load puts what it boots there"
    )]
    Top(Range),
    #[error("no {} in one piece above 1 GiB: the largest that can be set aside is {}", size::show(*.wanted), size::show(*.largest))]
    NoRoom { wanted: u64, largest: u64 },
}

impl Map {
    pub(crate) fn of_host(host: &Host) -> Result<Self, Unseen> {
        let map = Self::read(&host.lines("/proc/iomem").ok_or(Unseen::Absent)?);
        let memory: Vec<Range> = map.memory().collect();
        if memory.is_empty() {
            return Err(Unseen::NoMemory);
        }
        if memory.iter().all(|range| range.bytes() <= 1) {
            return Err(Unseen::Hidden);
        }
        Ok(map)
    }

    fn read(text: &str) -> Self {
        let lines = text.lines().filter_map(|line| {
            let (range, name) = line.split_once(" : ")?;
            let depth = (range.len() - range.trim_start().len()) / 2;
            let (start, last) = range.trim().split_once('-')?;
            let [start, last] = [start, last].map(|number| u64::from_str_radix(number, 16));
            let range = Range { start: start.ok()?, end: last.ok()?.saturating_add(1) };
            Some(Entry { depth, range, name: name.to_owned() })
        });
        Self(lines.collect())
    }

    /// The kernel's own memory.
    fn memory(&self) -> impl Iterator<Item = Range> {
        self.0.iter().filter(|entry| entry.depth == 0 && entry.name == "System RAM").map(|entry| entry.range)
    }

    /// How much of it there is, in bytes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory().map(Range::bytes).fold(0, u64::saturating_add)
    }

    /// Whether all of this is memory of the kernel's own.
    pub(crate) fn is_memory(&self, range: Range) -> bool {
        self.memory().any(|memory| memory.contains(range))
    }

    /// All that has this name.
    pub(crate) fn named(&self, name: &str) -> Vec<Range> {
        self.0.iter().filter(|entry| entry.name == name).map(|entry| entry.range).collect()
    }

    /// What this memory is, if the kernel uses some of it as its own.
    pub(crate) fn used_as_memory(&self, range: Range) -> Option<&str> {
        let is_memory = |entry: &&Entry| entry.name.starts_with("System RAM") && entry.range.overlaps(range);
        self.0.iter().find(is_memory).map(|entry| entry.name.as_str())
    }

    /// What lies in System RAM and is not free.
    fn busy(&self) -> impl Iterator<Item = &Entry> {
        self.0.iter().filter(|entry| entry.depth > 0)
    }

    /// The pieces of one range of System RAM that nothing lies in, without what has to stay above.
    fn free(&self, memory: Range) -> Vec<Range> {
        let last = memory.end.saturating_sub(ABOVE_BYTES);
        let mut busy: Vec<Range> = self.busy().map(|entry| entry.range).collect();
        busy.sort_unstable_by_key(|range| range.start);
        let (mut free, mut from) = (Vec::new(), memory.start);
        for range in busy.into_iter().filter(|range| range.overlaps(memory)) {
            if range.start > from {
                free.push(Range { start: from, end: range.start.min(last) });
            }
            from = from.max(range.end);
        }
        free.push(Range { start: from, end: last });
        free.retain(|range| range.start < range.end);
        free
    }

    /// The lowest place for so many bytes at or above an address, as whole as asked.
    fn lowest(&self, bytes: u64, floor: u64, whole: u64) -> Option<Range> {
        let mut pieces: Vec<Range> = self.memory().flat_map(|memory| self.free(memory)).collect();
        pieces.sort_unstable_by_key(|piece| piece.start);
        pieces.into_iter().find_map(|piece| {
            let start = piece.start.max(floor).checked_next_multiple_of(whole)?;
            let range = Range::sized(start, bytes)?;
            piece.contains(range).then_some(range)
        })
    }

    /// Chooses memory to be set aside. If `clear`, rather where a kernel's random place cannot be, though it is set aside by `%`.
    pub(crate) fn choose(&self, bytes: u64, clear: bool) -> Result<Range, Refusal> {
        check_size(bytes)?;
        let floors: &[u64] = match clear {
            true => &[HIGH.max(bytes), LOWEST.max(bytes), HIGH, LOWEST],
            false => &[HIGH, LOWEST],
        };
        let wholes = || WHOLE_BYTES.into_iter().filter(|whole| *whole <= bytes);
        let places = floors.iter().flat_map(|floor| wholes().map(|whole| (*floor, whole)));
        let mut found = places.filter_map(|(floor, whole)| self.lowest(bytes, floor, whole));
        found.next().ok_or_else(|| Refusal::NoRoom { wanted: bytes, largest: self.largest() })
    }

    /// The most that could be set aside in one piece, in bytes.
    fn largest(&self) -> u64 {
        let pieces = self.memory().flat_map(|memory| self.free(memory)).map(|piece| {
            let start = piece.start.max(LOWEST).next_multiple_of(UNIT_BYTES);
            piece.end.saturating_sub(start) / UNIT_BYTES * UNIT_BYTES
        });
        pieces.max().unwrap_or_default()
    }

    /// Whether this memory can be set aside.
    pub(crate) fn take(&self, start: u64, bytes: u64) -> Result<Range, Refusal> {
        check_size(bytes)?;
        if !start.is_multiple_of(UNIT_BYTES) {
            return Err(Refusal::Unaligned(start));
        }
        if start < LOWEST {
            return Err(Refusal::Low(start));
        }
        let end = start.saturating_add(bytes);
        let wanted = Range { start, end };
        let memory =
            self.memory().find(|memory| memory.contains(wanted)).ok_or(Refusal::NotMemory(wanted))?;
        if let Some(entry) = self.busy().find(|entry| entry.range.overlaps(wanted)) {
            let name = entry.name.escape_debug().to_string();
            return Err(Refusal::Busy { wanted, busy: entry.range, name });
        }
        if memory.end - end < ABOVE_BYTES {
            return Err(Refusal::Top(wanted));
        }
        Ok(wanted)
    }
}

fn check_size(bytes: u64) -> Result<(), Refusal> {
    match bytes > 0 && bytes.is_multiple_of(UNIT_BYTES) {
        true => Ok(()),
        false => Err(Refusal::Size(bytes)),
    }
}

#[cfg(test)]
pub(in crate::setup) mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    /// A host with 24 GiB, 3 of them below 4 GiB, and a memory for crashes.
    pub(in crate::setup) const HOST: &str = "\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
000a0000-000fffff : Reserved
  000f0000-000fffff : System ROM
00100000-bffd9fff : System RAM
  01000000-0220bb07 : Kernel code
  02400000-02e09fff : Kernel rodata
  a0000000-afffffff : Crash kernel
bffda000-bfffffff : Reserved
feffc000-feffffff : Reserved
100000000-63fffffff : System RAM
  200000000-2017fffff : Kernel data
  201800000-2027fffff : Kernel bss
";

    fn map(text: &str) -> Map {
        Map::read(text)
    }

    fn chosen(text: &str, bytes: u64, clear: bool) -> Result<u64, Refusal> {
        let range = map(text).choose(bytes, clear)?;
        assert_eq!(map(text).take(range.start, bytes), Ok(range));
        Ok(range.start)
    }

    #[test]
    fn memory_above_4_gib_is_chosen_as_low_and_as_whole_as_can_be() {
        assert_eq!(chosen(HOST, GIB, false), Ok(4 * GIB));
        assert_eq!(chosen(HOST, 16 * MIB, true), Ok(4 * GIB));
        // It would lie over the kernel at 8 GiB.
        assert_eq!(chosen(HOST, 6 * GIB, false), Ok(9 * GIB));
        // Where nothing as whole as 1 GiB is free, less will do.
        let gap = "100000000-1ffffffff : System RAM\n  100000000-109ffffff : Reserved\n";
        assert_eq!(chosen(gap, 3 * GIB, false), Ok(0x1_1000_0000));
    }

    #[test]
    fn soft_reserved_memory_is_put_where_no_kernel_puts_itself_at_random() {
        assert_eq!(chosen(HOST, 6 * GIB, true), Ok(9 * GIB));
        assert_eq!(chosen(HOST, 10 * GIB, true), Ok(10 * GIB));
        // Above 12 GiB are no 13, so it is put where a kernel has to be told to keep out.
        assert_eq!(chosen(HOST, 13 * GIB, true), Ok(9 * GIB));
    }

    #[test]
    fn a_host_with_little_memory_gives_what_is_above_1_gib() {
        let small = "00100000-7ffdcfff : System RAM\n  01000000-02000000 : Kernel code\n7ffdd000-7fffffff : Reserved\n";
        assert_eq!(chosen(small, 512 * MIB, false), Ok(GIB));
        // What lies up to 128 MiB below the end is where kexec_load puts a kernel.
        assert_eq!(chosen(small, 880 * MIB, false), Ok(GIB));
        assert_eq!(
            chosen(small, 896 * MIB, false),
            Err(Refusal::NoRoom { wanted: 896 * MIB, largest: 880 * MIB })
        );
        // The crash kernel's is not given.
        assert_eq!(chosen("00100000-bffd9fff : System RAM\n", GIB, false), Ok(GIB));
        let (taken, _) = HOST.split_once("feffc000").unwrap();
        assert_eq!(
            chosen(taken, 2 * GIB, false),
            Err(Refusal::NoRoom { wanted: 2 * GIB, largest: 0xa000_0000 - GIB })
        );
    }

    #[test]
    fn memory_in_pieces_gives_the_first_that_is_large_enough() {
        let text = "\
100000000-10fffffff : System RAM
110000000-110000fff : Reserved
110001000-12fffffff : System RAM
130000000-15fffffff : System RAM
";
        assert_eq!(chosen(text, 128 * MIB, false), Ok(0x1_0000_0000));
        assert_eq!(chosen(text, 256 * MIB, false), Ok(0x1_1800_0000));
        assert_eq!(chosen(text, 512 * MIB, false), Ok(0x1_3000_0000));
        assert_eq!(
            chosen(text, 656 * MIB, false),
            Err(Refusal::NoRoom { wanted: 656 * MIB, largest: 640 * MIB })
        );
    }

    #[test]
    fn sizes_are_whole_units() {
        let error = chosen(HOST, GIB + 1, false).unwrap_err();
        assert!(error.to_string().contains("take 1040 MiB"), "{error}");
        assert_eq!(chosen(HOST, 0, false), Err(Refusal::Size(0)));
    }

    #[test]
    fn an_address_that_is_asked_for_is_looked_at() {
        let take = |start, bytes| map(HOST).take(start, bytes);
        assert_eq!(take(5 * GIB, GIB).unwrap(), Range { start: 5 * GIB, end: 6 * GIB });
        assert_eq!(take(5 * GIB + 1, GIB), Err(Refusal::Unaligned(5 * GIB + 1)));
        assert_eq!(take(512 * MIB, GIB), Err(Refusal::Low(512 * MIB)));
        assert!(matches!(take(3 * GIB, GIB), Err(Refusal::NotMemory(_))));
        assert!(matches!(take(24 * GIB, 2 * GIB), Err(Refusal::NotMemory(_))));
        assert!(matches!(take(u64::MAX - GIB + 1, 2 * GIB), Err(Refusal::NotMemory(_))));
        let crash = take(2 * GIB, GIB - 16 * MIB).unwrap_err().to_string();
        assert!(crash.ends_with("is in use: a0000000-afffffff is Crash kernel"), "{crash}");
        assert!(matches!(take(24 * GIB, GIB), Err(Refusal::Top(_))));
        assert!(take(24 * GIB, GIB - 128 * MIB).is_ok());
    }

    #[test]
    fn what_is_set_aside_and_what_the_kernel_took_back_are_told_apart() {
        let text = "\
100000000-13fffffff : Soft Reserved
  100000000-13fffffff : dax0.0
    100000000-13fffffff : System RAM (kmem)
140000000-17fffffff : Persistent Memory (legacy)
";
        let range = |start: u64| Range { start: start * GIB, end: (start + 1) * GIB };
        assert_eq!(map(text).named("Soft Reserved"), [range(4)]);
        assert_eq!(map(text).used_as_memory(range(4)), Some("System RAM (kmem)"));
        assert_eq!(map(text).used_as_memory(range(5)), None);
        assert_eq!(map(text).memory_bytes(), 0);
    }

    #[test]
    fn lines_that_are_none_are_left_out() {
        assert_eq!(map("x\n- : y\nffffffffffffffff-ffffffffffffffff : z\n10-5 : w\n").0.len(), 2);
        assert!(map("10-5 : System RAM\n").choose(16 * MIB, true).is_err());
    }
}
