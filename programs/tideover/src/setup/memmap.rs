//! What a kernel's command line says of memory: `memmap=`, read as Linux on x86 reads it.

use std::fmt;

use crate::size;

/// The type that makes memory *soft reserved*, in the firmware's map.
const SOFT_RESERVED: u64 = 0xefff_ffff;
/// The type of memory that is said to be persistent.
const PERSISTENT: u64 = 12;

/// A piece of the host's memory: from its first byte to the one behind its last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Range {
    /// So many bytes from there on; `None` if that is more than addresses go.
    pub(crate) fn sized(start: u64, bytes: u64) -> Option<Self> {
        Some(Self { start, end: start.checked_add(bytes)? })
    }

    pub(crate) const fn bytes(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    pub(crate) const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    pub(crate) const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

/// As `/proc/iomem` has it.
impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{:08x}", self.start, self.end.saturating_sub(1))
    }
}

/// What becomes of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `@`: the kernel's own.
    Ram,
    /// `#`: tables of ACPI.
    Acpi,
    /// `$`: nobody's.
    Reserved,
    /// `!`: persistent memory.
    Persistent,
    /// `%`: what was of one type is of another one; 0 for one that is not said.
    Retyped { from: u64, to: u64 },
    /// A size alone: nothing from there on is used.
    Limit,
    /// `exactmap`: the firmware's map does not count.
    Exact,
    /// The kernel makes nothing of it.
    Unreadable,
}

/// What memory that is set aside is given out as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GivenAs {
    /// A block device for a file system, by nd_pmem.
    Pmem,
    /// A character device, by dax_hmem.
    Dax,
    /// No device.
    Nothing,
}

impl GivenAs {
    /// What `/proc/iomem` calls it.
    pub(crate) const fn in_iomem(self) -> &'static str {
        match self {
            Self::Pmem => "Persistent Memory (legacy)",
            Self::Dax => "Soft Reserved",
            Self::Nothing => "Reserved",
        }
    }
}

/// One item of `memmap=`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    /// As it stands there.
    pub(crate) text: String,
    pub(crate) kind: Kind,
    pub(crate) range: Range,
}

impl Item {
    fn read(text: &str) -> Self {
        let (kind, range) = meaning(text).unwrap_or((Kind::Unreadable, Range { start: 0, end: 0 }));
        Self { text: text.to_owned(), kind, range }
    }

    /// What the memory is set aside as; `None` if it is not.
    pub(crate) fn given_as(&self) -> Option<GivenAs> {
        match self.kind {
            Kind::Persistent | Kind::Retyped { to: PERSISTENT, .. } => Some(GivenAs::Pmem),
            Kind::Retyped { to: SOFT_RESERVED, .. } => Some(GivenAs::Dax),
            Kind::Reserved => Some(GivenAs::Nothing),
            _ => None,
        }
    }

    /// Whether it says the same, in whatever words.
    pub(crate) fn same(&self, other: &Self) -> bool {
        match self.kind {
            Kind::Unreadable => self.text == other.text,
            _ => (self.kind, self.range) == (other.kind, other.range),
        }
    }

    /// For people.
    pub(crate) fn shown(&self) -> String {
        format!("memmap={}", self.text.escape_debug())
    }

    /// Whether a kernel that boots may put itself into that memory all the same: what chooses a random place for it takes
    /// `SIZE%…` for a limit of SIZE, and not for a place to keep out of.
    pub(crate) fn kernel_may_lie_there(&self) -> bool {
        matches!(self.kind, Kind::Retyped { .. }) && may_lie_there(self.range)
    }
}

/// The same of memory that is set aside by `%`.
pub(crate) const fn may_lie_there(range: Range) -> bool {
    range.start < range.bytes()
}

/// Reads a number as the kernel does: decimal, octal or hexadecimal, with a suffix. Gives what follows, too.
fn number(text: &str) -> Option<(u64, &str)> {
    let (radix, digits) = match text.as_bytes() {
        [b'0', b'x' | b'X', digit, ..] if digit.is_ascii_hexdigit() => (16, &text[2..]),
        [b'0', ..] => (8, text),
        _ => (10, text),
    };
    let end = digits.find(|letter: char| !letter.is_digit(radix)).unwrap_or(digits.len());
    let number = u64::from_str_radix(&digits[..end], radix).ok()?;
    let rest = &digits[end..];
    let shift = match rest.bytes().next().map(|letter| letter.to_ascii_uppercase()) {
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        Some(b'T') => 40,
        Some(b'P') => 50,
        Some(b'E') => 60,
        _ => return Some((number, rest)),
    };
    Some((number.checked_mul(1 << shift)?, &rest[1..]))
}

fn meaning(text: &str) -> Option<(Kind, Range)> {
    if text.starts_with("exactmap") {
        return Some((Kind::Exact, Range { start: 0, end: 0 }));
    }
    let (bytes, rest) = number(text)?;
    let Some(sign) = rest.chars().next() else {
        return Some((Kind::Limit, Range { start: bytes, end: u64::MAX }));
    };
    let kind = match sign {
        '@' => Kind::Ram,
        '#' => Kind::Acpi,
        '$' => Kind::Reserved,
        '!' => Kind::Persistent,
        '%' => Kind::Retyped { from: 0, to: 0 },
        _ => return None,
    };
    let (start, mut rest) = number(&rest[1..])?;
    let range = Range::sized(start, bytes)?;
    let Kind::Retyped { .. } = kind else {
        return rest.is_empty().then_some((kind, range));
    };
    let (mut from, mut to) = (0, 0);
    if let Some(after) = rest.strip_prefix('-') {
        (from, rest) = number(after)?;
    }
    if let Some(after) = rest.strip_prefix('+') {
        (to, rest) = number(after)?;
    }
    rest.is_empty().then_some((Kind::Retyped { from, to }, range))
}

/// All that a command line says by `memmap=`, in its order.
pub(crate) fn told(command_line: &str) -> Vec<Item> {
    // What follows `--` is for the first process.
    let words = command_line.split_whitespace().map(|word| word.trim_matches('"'));
    let values = words.take_while(|word| *word != "--").filter_map(|word| word.strip_prefix("memmap="));
    let items = values.flat_map(|value| value.trim_matches('"').split(','));
    items.filter(|item| !item.is_empty()).map(Item::read).collect()
}

/// How the next kernel's `memmap=` differs from that of the one that runs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// In nothing.
    None,
    /// These are set aside here, and not there: the next kernel would use the memory as its own.
    Lost(Vec<String>),
    /// These are said there alone, and are about memory that is set aside here.
    Overruled(Vec<String>),
    /// Something else differs.
    Other(Vec<String>),
}

/// Compares what a kernel was told with what the next one is to be told.
pub(crate) fn compare(here: &[Item], there: &[Item]) -> Difference {
    let lacks = |of: &Item, all: &[Item]| !all.iter().any(|item| item.same(of));
    let aside: Vec<&Item> = here.iter().filter(|item| item.given_as().is_some()).collect();
    let lost: Vec<String> = aside.iter().filter(|item| lacks(item, there)).map(|item| item.shown()).collect();
    if !lost.is_empty() {
        return Difference::Lost(lost);
    }
    let new: Vec<&Item> = there.iter().filter(|item| lacks(item, here)).collect();
    let about = |item: &Item| aside.iter().any(|aside| aside.range.overlaps(item.range));
    let overruled: Vec<String> = new.iter().filter(|item| about(item)).map(|item| item.shown()).collect();
    if !overruled.is_empty() {
        return Difference::Overruled(overruled);
    }
    let old = here.iter().filter(|item| lacks(item, there));
    let others: Vec<String> = new.into_iter().chain(old).map(Item::shown).collect();
    if others.is_empty() { Difference::None } else { Difference::Other(others) }
}

/// A piece of memory for people: where, and how much.
pub(crate) fn place(range: Range) -> String {
    format!("{} at {:#x}", size::show(range.bytes()), range.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    fn one(text: &str) -> (Kind, u64, u64) {
        let item = Item::read(text);
        (item.kind, item.range.start, item.range.bytes())
    }

    #[test]
    fn each_form_is_read_as_the_kernel_reads_it() {
        assert_eq!(one("512M!1G"), (Kind::Persistent, GIB, 512 * MIB));
        assert_eq!(one("64K$0x18690000"), (Kind::Reserved, 0x1869_0000, 64 << 10));
        assert_eq!(one("100m#3g"), (Kind::Acpi, 3 * GIB, 100 * MIB));
        assert_eq!(one("1T@1P"), (Kind::Ram, 1 << 50, 1 << 40));
        let soft = Kind::Retyped { from: 1, to: SOFT_RESERVED };
        assert_eq!(one("512M%0x40000000-1+0xefffffff"), (soft, GIB, 512 * MIB));
        assert_eq!(one("0X100%010+12"), (Kind::Retyped { from: 0, to: 12 }, 8, 256));
        assert_eq!(one("1K%1M-2"), (Kind::Retyped { from: 2, to: 0 }, MIB, 1024));
        assert_eq!(one("4G").0, Kind::Limit);
        assert_eq!(one("exactmap").0, Kind::Exact);
    }

    #[test]
    fn what_the_kernel_makes_nothing_of_is_not_guessed() {
        for text in
            ["", "x", "!1G", "1G!1Gx", "1G!", "1G%1G-1+1,", "99999999999E!1G", "1G!0xffffffffffffffff"]
        {
            assert_eq!(one(text).0, Kind::Unreadable, "{text}");
        }
    }

    #[test]
    fn all_items_of_a_command_line_are_found_up_to_the_first_processs_part() {
        let told = told("quiet memmap=exactmap,1G!4G a.memmap=2G!8G \"memmap=64K$1M\" -- memmap=1G!16G");
        let texts: Vec<&str> = told.iter().map(|item| item.text.as_str()).collect();
        assert_eq!(texts, ["exactmap", "1G!4G", "64K$1M"]);
        let given: Vec<_> = told.iter().map(Item::given_as).collect();
        assert_eq!(given, [None, Some(GivenAs::Pmem), Some(GivenAs::Nothing)]);
        assert_eq!(Item::read("1G%4G-1+12").given_as(), Some(GivenAs::Pmem));
        assert_eq!(Item::read("1G%4G-1+0xefffffff").given_as(), Some(GivenAs::Dax));
        assert_eq!(Item::read("1G%4G-1+2").given_as(), None);
    }

    #[test]
    fn two_command_lines_are_compared_by_what_they_mean() {
        let of = |here: &str, there: &str| compare(&told(here), &told(there));
        assert_eq!(of("memmap=1G!4G", "x memmap=1024M!0x100000000"), Difference::None);
        assert_eq!(of("", "quiet"), Difference::None);
        assert_eq!(
            of("memmap=1G!4G,1G!8G", "memmap=1G!4G"),
            Difference::Lost(vec!["memmap=1G!8G".to_owned()])
        );
        assert_eq!(
            of("memmap=1G!4G", "memmap=1G%4G-1+12"),
            Difference::Lost(vec!["memmap=1G!4G".to_owned()])
        );
        assert_eq!(
            of("memmap=1G!4G", "memmap=1G!4G memmap=16M@4G"),
            Difference::Overruled(vec!["memmap=16M@4G".to_owned()])
        );
        // A limit below it is about it, too.
        assert_eq!(
            of("memmap=1G!4G", "memmap=1G!4G memmap=2G"),
            Difference::Overruled(vec!["memmap=2G".to_owned()])
        );
        assert_eq!(
            of("memmap=1G!4G memmap=1K#2M", "memmap=1G!4G,1G!16G"),
            Difference::Other(vec!["memmap=1G!16G".to_owned(), "memmap=1K#2M".to_owned()])
        );
    }

    #[test]
    fn the_random_place_of_a_kernel_keeps_out_of_all_but_large_soft_reserved_memory() {
        let may = |text| Item::read(text).kernel_may_lie_there();
        assert!(may("8G%4G-1+0xefffffff"));
        assert!(!may("4G%4G-1+0xefffffff") && !may("8G!4G"));
    }

    #[test]
    fn what_is_shown_obeys_nobody() {
        assert_eq!(Item::read("\u{1b}[2J").shown(), "memmap=\\u{1b}[2J");
        assert_eq!(place(Range { start: GIB, end: 3 * GIB }), "2 GiB at 0x40000000");
        assert_eq!(Range { start: GIB, end: 2 * GIB }.to_string(), "40000000-7fffffff");
    }
}
