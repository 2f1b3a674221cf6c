//! Records of our own, all at page 1.

use abi::Malformed;
use abi::foreign::FdKind;
use abi::foreign::FdName;
use abi::foreign::FdRecord;
use abi::gmem::Extent;
use abi::gmem::GmemRecord;
use abi::gmem::MemoryName;
use abi::note;
use abi::numa::Nodes;
use abi::numa::Policy;
use abi::record::checksum;
use abi::regions;
use abi::regions::RegionEntry;
use abi::regions::Store;
use abi::state::StateName;
use abi::state::StateRecord;
use abi::vm::Identity;
use abi::vm::VmRecord;
use custody::Note;
use liveupdate::moment::TscRate;
use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use pages::PageRange;

use crate::memory::Flags;
use crate::memory::Pages;
use crate::targets::kernel::ending;
use crate::targets::kernel::listed;

const IDENTITY: Identity = Identity::new([7; 16]);

/// Reads a record, and reads it again as it would be written.
fn twice<T: PartialEq + std::fmt::Debug>(
    input: &[u8],
    read: impl Fn(&Pages) -> Result<T, Malformed>,
    encode: impl Fn(&T) -> Vec<u8>,
) -> bool {
    let (_, memory) = Pages::of(input);
    let Ok(record) = read(&memory) else { return false };
    let again = Pages::default().page(1, &encode(&record));
    assert_eq!(read(&again).as_ref(), Ok(&record), "what is written is read");
    true
}

/// A record's bytes, as they are and as what has its checksum put right.
fn both(record: &[u8]) -> [Vec<u8>; 2] {
    [0, Flags::MEND].map(|flags| Pages::default().page(1, record).input(flags))
}

fn range(address: u64, bytes: u64) -> Option<PageRange> {
    PageRange::of_bytes(address, bytes).ok()
}

/// Guest memory.
pub(crate) fn gmem(input: &[u8]) -> bool {
    twice(input, |memory| GmemRecord::read(memory, PAGE_SIZE), GmemRecord::encode)
}

pub(crate) fn gmem_seeds() -> Vec<Vec<u8>> {
    let extent = |index, address, bytes| Some(Extent { index, frames: range(address, bytes)? });
    let record = |extents: &[Option<Extent>]| {
        let extents = extents.iter().copied().flatten().collect();
        let name = MemoryName::literal("ram");
        GmemRecord { identity: IDENTITY, name, size_bytes: 1 << 30, flags: 1, extents }.encode()
    };
    let two = [extent(0, 1 << 30, 1 << 20), extent(1 << 10, 2 << 30, 1 << 21)];
    [record(&[extent(0, 1 << 30, 1 << 30)]), record(&two), record(&[])]
        .iter()
        .flat_map(|seed| both(seed))
        .collect()
}

/// The table of regions, with their NUMA policies.
pub(crate) fn regions(input: &[u8]) -> bool {
    twice(
        input,
        |memory| regions::read(memory, PAGE_SIZE).map(|table| table.entries),
        |entries| regions::encode(entries),
    )
}

pub(crate) fn regions_seeds() -> Vec<Vec<u8>> {
    let nodes = Nodes::one(0).zip(Nodes::one(65)).map_or(Nodes::NONE, |(one, other)| one.with(other));
    let entry = |base, bytes, store, policy| {
        Some(RegionEntry { range: range(base, bytes)?, page_bytes: 2 << 20, store, file: 9, policy })
    };
    let table = |second: Option<RegionEntry>| {
        let first = entry(0, 1 << 16, Store::Memfd, Policy::Default);
        regions::encode(&first.into_iter().chain(second).collect::<Vec<_>>())
    };
    let at_path = [(0, 1 << 23), (1 << 30, 2 << 20)];
    let at_path = at_path.map(|(base, bytes)| entry(base, bytes, Store::Path, Policy::Default));
    let tables = [
        regions::encode(&at_path.into_iter().flatten().collect::<Vec<_>>()),
        table(None),
        table(entry(1 << 30, 2 << 20, Store::Memfd, Policy::Default)),
        table(entry(1 << 30, 2 << 20, Store::Hugetlb, Policy::Bind(nodes))),
        table(entry(1 << 30, 2 << 20, Store::GuestMemfd, Policy::Interleave(nodes))),
        table(entry(1 << 30, 2 << 20, Store::Memfd, Policy::Preferred(nodes))),
    ];
    tables.iter().flat_map(|seed| both(seed)).collect()
}

/// The machine.
pub(crate) fn vm(input: &[u8]) -> bool {
    twice(input, |memory| VmRecord::read(memory, PAGE_SIZE), VmRecord::encode)
}

pub(crate) fn vm_seeds() -> Vec<Vec<u8>> {
    both(&VmRecord { identity: IDENTITY, vm_type: 0, vcpus: 8 }.encode()).to_vec()
}

/// A descriptor that goes with the machine.
pub(crate) fn foreign(input: &[u8]) -> bool {
    twice(input, |memory| FdRecord::read(memory, PAGE_SIZE), FdRecord::encode)
}

pub(crate) fn foreign_seeds() -> Vec<Vec<u8>> {
    let kinds = [FdKind::Tap, FdKind::Eventfd, FdKind::Stream];
    let record =
        |kind| FdRecord { identity: IDENTITY, name: FdName::literal("tap0"), kind, index: 3 }.encode();
    kinds.into_iter().flat_map(|kind| both(&record(kind))).collect()
}

/// A saved state: the record, its list, and its bytes.
pub(crate) fn state(input: &[u8]) -> bool {
    let (flags, memory) = Pages::of(input);
    let Ok(mut record) = StateRecord::read(&memory, PAGE_SIZE) else { return false };
    let Ok(list) = record.read_list(&memory, PAGE_SIZE) else { return false };
    // Of the bytes, not of the record: put right unless the input says otherwise.
    if let Some(bytes) = list.read_bytes(&memory, record.len_bytes).ok().filter(|_| flags.rest() & 1 == 0) {
        record.checksum = checksum(&[&bytes]);
    }
    let Ok(bytes) = record.read_bytes(&memory, PAGE_SIZE, &list) else { return false };
    assert_eq!(bytes.len() as u64, record.len_bytes);
    true
}

pub(crate) fn state_seeds() -> Vec<Vec<u8>> {
    let seed = |len: usize| {
        let bytes = ending(len);
        let (list, pages) = if len == 0 { Default::default() } else { listed(2, &bytes) };
        let name = StateName::literal("vcpu0");
        let (epoch, checksum) = (2, checksum(&[&bytes]));
        let count = (pages.len() / PAGE_BYTES) as u64 + 1;
        let record = StateRecord { identity: IDENTITY, name, epoch, checksum, len_bytes: len as u64, list };
        Pages::default().page(1, &record.encode()).blank(2..2 + count).page(2, &pages).input(Flags::MEND | 2)
    };
    vec![seed(0), seed(1), seed(5000)]
}

/// A note, and what `resume` takes from it.
pub(crate) fn note(input: &[u8]) -> bool {
    let (_, memory) = Pages::of(input);
    let Ok(text) = note::read(&memory) else { return false };
    let Ok(note) = serde_json::from_str::<Note>(&text) else { return false };
    let Some(sealed) = &note.sealed else { return true };
    if let Some((earlier, later)) = sealed.when.at("stopped").zip(sealed.when.at("sealed"))
        && let Ok(rate) = TscRate::between(&earlier, &later)
    {
        let _ = (rate.khz(), rate.elapsed(&earlier, &later), later.boot_start(&rate));
        let _ = later.at_monotonic(earlier.monotonic_ns.min(later.monotonic_ns), &rate);
    }
    true
}

pub(crate) fn note_seeds() -> Vec<Vec<u8>> {
    let moment = |what: &str, ns: u64| {
        let boot = [1; 16];
        serde_json::json!({ "what": what, "boot": boot, "tsc": ns * 3, "monotonic_ns": ns, "realtime_ns": ns, "spread_ns": 9 })
    };
    let when = [moment("stopped", 5), moment("sealed", 1 << 30)];
    let texts = [
        serde_json::json!({
            "machine": "a", "identity": "07", "formats": ["tideover-gmem-v1"], "regions": [8_388_608, 4096],
            "program": "/p", "cgroup": "/c", "vmm": { "disk": [1, null, true] }, "sealed": { "epoch": 2, "when": when },
        }),
        serde_json::json!({ "machine": "", "identity": "", "formats": [], "regions": [], "program": "", "vmm": null }),
    ];
    texts.iter().flat_map(|text| both(&note::encode(&text.to_string()))).collect()
}
