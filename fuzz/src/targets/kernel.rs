//! The kernel's formats.

use std::collections::BTreeSet;

use abi::Malformed;
use abi::block;
use abi::flb;
use abi::flb::Flb;
use abi::folio;
use abi::folio::Folio;
use abi::guest_memfd::GuestMemfd;
use abi::kexec_metadata::KexecMetadata;
use abi::kho::RootFdt;
use abi::kho::Subtree;
use abi::kho::SubtreeName;
use abi::kvm_vm::KvmVm;
use abi::luo::Compatible;
use abi::luo::File;
use abi::luo::FileSer;
use abi::luo::Luo;
use abi::luo::LuoSer;
use abi::luo::Session;
use abi::luo::SessionName;
use abi::luo::SessionSer;
use abi::memblock;
use abi::memfd::Memfd;
use abi::radix;
use abi::radix::Found;
use abi::radix::Key;
use abi::vmalloc::Chunk;
use abi::vmalloc::Descriptor;
use abi::vmalloc::List;
use pages::Order;
use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;
use zerocopy::FromZeros as _;
use zerocopy::IntoBytes as _;

use crate::memory::Pages;

/// The root FDT: its page's bytes.
pub(crate) fn fdt(input: &[u8]) -> bool {
    let memory = Pages::default().blank(1..2).page(1, input.get(..PAGE_BYTES).unwrap_or(input));
    let Ok(fdt) = RootFdt::read(&memory, PAGE_SIZE) else { return false };
    // It may say what fits only because names of properties are shared.
    if let Ok(bytes) = fdt.encode() {
        let again = RootFdt::read(&Pages::default().blank(1..2).page(1, &bytes), PAGE_SIZE);
        assert_eq!(again.as_ref(), Ok(&fdt), "what is written is read");
    }
    true
}

pub(crate) fn fdt_seeds() -> Vec<Vec<u8>> {
    let subtree = |name, at: u64| Subtree { name: SubtreeName::literal(name), data: at << 12, size: at };
    let encode = |subtrees: Vec<Subtree>| RootFdt { map: 0x1000, subtrees }.encode().unwrap_or_default();
    vec![
        encode(vec![]),
        encode(vec![subtree("LUO", 2)]),
        encode(vec![subtree("LUO", 2), subtree("memblock", 3), subtree("kexec-metadata", 4)]),
    ]
}

/// The tree of preserved memory, whose root is page 1.
pub(crate) fn radix(input: &[u8]) -> bool {
    let (_, memory) = Pages::of(input);
    let (mut last, mut nodes, mut blocks) = (0, BTreeSet::new(), 0u64);
    let walked = radix::walk(&memory, PAGE_SIZE, |found| {
        match found {
            Found::Node { address, .. } => assert!(nodes.insert(address), "each node once"),
            Found::Block(key) => {
                assert!(key.get() > last, "keys ascend");
                last = key.get();
                blocks += 1;
                assert_eq!(Key::of(key.range().start(), key.order()), key, "a key is its block's");
            }
        }
        Ok(())
    });
    walked.is_ok() && blocks > 0
}

pub(crate) fn radix_seeds() -> Vec<Vec<u8>> {
    let tree = |blocks: &[(u64, u32)]| {
        let mut nodes = vec![[0u64; radix::WORDS]];
        for (pfn, order) in blocks {
            let (Ok(pfn), Ok(order)) = (Pfn::new(*pfn), Order::new(*order)) else { continue };
            let (key, mut at) = (Key::of(pfn, order), 0);
            for level in (1..=radix::LEVELS).rev() {
                let next = nodes.len();
                let child = &mut nodes[at][key.slot(level)];
                // Page 1 is node 0.
                at = if *child == 0 { next } else { usize::try_from(*child / PAGE_SIZE).unwrap_or(1) - 1 };
                *child = (at as u64 + 1) * PAGE_SIZE;
                if at == next {
                    nodes.push([0; radix::WORDS]);
                }
            }
            let (word, bit) = key.leaf_bit();
            nodes[at][word] |= 1 << bit;
        }
        let bytes: Vec<u8> = nodes.iter().flat_map(radix::node_bytes).collect();
        Pages::default().page(1, &bytes).input(0)
    };
    vec![
        tree(&[(5, 0)]),
        tree(&[(5, 0), (6, 0), (0x12_3400, 9), (1 << 18, 18)]),
        tree(&[((1 << 52) - 1, 0), (0, 51), (1 << 51, 51)]),
    ]
}

/// A list of scattered pages: the descriptor is the first 16 bytes of page 1.
pub(crate) fn vmalloc(input: &[u8]) -> bool {
    let (_, memory) = Pages::of(input);
    let Ok(descriptor) = descriptor(&memory, PAGE_SIZE) else { return false };
    let Ok(list) = List::read(&memory, &descriptor) else { return false };
    let pages: u64 = list.blocks.iter().map(|block| block.len_pages()).sum();
    assert_eq!(pages, u64::from(descriptor.total_pages.get()), "as many pages as are counted");
    let len = (pages * PAGE_SIZE).saturating_sub(1);
    if let Ok(bytes) = list.read_bytes(&memory, len) {
        assert_eq!(bytes.len() as u64, len);
    }
    true
}

fn descriptor(memory: &Pages, address: u64) -> Result<Descriptor, abi::NoMemory> {
    let mut descriptor = Descriptor::default();
    abi::Memory::read(memory, address, descriptor.as_mut_bytes()).map(|()| descriptor)
}

/// Pages from page `at` on: chunks, then the blocks with these bytes. With the descriptor that names them.
pub(crate) fn listed(at: u64, bytes: &[u8]) -> (Descriptor, Vec<u8>) {
    let pages = bytes.len().div_ceil(PAGE_BYTES);
    let chunks = Descriptor::chunks(pages);
    let address = |index: usize| (at + index as u64) * PAGE_SIZE;
    let mut all = Vec::new();
    for index in 0..chunks {
        let mut chunk = Chunk::new_zeroed();
        let here = (index * 511..pages).take(511);
        chunk.blocks.iter_mut().zip(here).for_each(|(to, page)| *to = address(chunks + page).into());
        chunk.next = if index + 1 < chunks { address(index + 1) } else { 0 }.into();
        all.extend_from_slice(chunk.as_bytes());
    }
    all.extend_from_slice(bytes);
    (Descriptor::plain(address(0), u32::try_from(pages).unwrap_or_default()), all)
}

/// So many bytes, of which the last is not zero.
pub(crate) fn ending(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes.iter_mut().last().into_iter().for_each(|last| *last = 7);
    bytes
}

pub(crate) fn vmalloc_seeds() -> Vec<Vec<u8>> {
    let seed = |descriptor: Descriptor, bytes: &[u8]| {
        let pages = u64::try_from(bytes.len().div_ceil(PAGE_BYTES)).unwrap_or_default();
        Pages::default().page(1, descriptor.as_bytes()).blank(2..2 + pages).page(2, bytes).input(0)
    };
    let lists = [1, 5000].map(|len| listed(2, &ending(len))).map(|(list, bytes)| seed(list, &bytes));
    let (mut large, bytes) = listed(2, &ending(4 * PAGE_BYTES));
    large.order = 1.into();
    let mut chunk = Chunk::new_zeroed();
    chunk.blocks[0] = (4 * PAGE_SIZE).into();
    chunk.blocks[1] = (6 * PAGE_SIZE).into();
    let large = seed(large, &[chunk.as_bytes(), &bytes[..5 * PAGE_BYTES]].concat());
    // A chunk that is full, and one that is empty behind it.
    let mut full = Chunk::new_zeroed();
    full.blocks.fill((4 * PAGE_SIZE).into());
    full.next = (3 * PAGE_SIZE).into();
    let full = seed(Descriptor::plain(2 * PAGE_SIZE, 0), &[full.as_bytes(), &[0; 2 * PAGE_BYTES]].concat());
    lists.into_iter().chain([large, full, seed(Descriptor::default(), &[])]).collect()
}

/// The Live Update Orchestrator's state, at page 1: sessions, files, shared objects, and the blocks that they lie in.
pub(crate) fn luo(input: &[u8]) -> bool {
    let (flags, memory) = Pages::of(input);
    // One in two is cut.
    let size = if flags.rest() & 1 == 0 { 32 } else { u64::from(flags.rest()) };
    let Ok(luo) = Luo::read(&memory, PAGE_SIZE, size) else { return false };
    let pages: BTreeSet<u64> = luo.pages.iter().copied().collect();
    assert_eq!(pages.len(), luo.pages.len(), "each page once");
    let names: BTreeSet<_> = luo.sessions.iter().map(|session| session.name).collect();
    assert_eq!(names.len(), luo.sessions.len(), "each name once");
    !luo.sessions.is_empty() || !luo.flbs.is_empty()
}

pub(crate) fn luo_seeds() -> Vec<Vec<u8>> {
    let file = |token| File { compatible: Compatible::literal("memfd-v2"), data: 0x6000, token };
    let flb = |name| Flb { name: Compatible::literal(name), data: 1, count: 2 };
    let state = |sessions: &[(&'static str, u64)], flbs: &[Flb]| {
        let mut pages = Pages::default().page(2, &flb::encode(flbs));
        let (mut entries, mut at) = (Vec::<SessionSer>::new(), 8);
        for (name, count) in sessions {
            let files: Vec<File> = (0..*count).map(file).collect();
            let session = Session { name: SessionName::literal(name), files };
            let files: Vec<FileSer> = session.files.iter().map(File::entry).collect();
            let addresses: Vec<u64> =
                (at..).take(block::blocks::<FileSer>(files.len())).map(|page| page * PAGE_SIZE).collect();
            entries.push(session.entry(addresses.first().copied().unwrap_or_default()));
            pages = pages.page(at, block::encode(&files, &addresses).as_flattened());
            at += addresses.len() as u64;
        }
        let addresses: Vec<u64> =
            (3..).take(block::blocks::<SessionSer>(entries.len())).map(|page| page * PAGE_SIZE).collect();
        pages = pages.page(3, block::encode(&entries, &addresses).as_flattened());
        let ser = LuoSer::new(1, addresses.first().copied().unwrap_or_default(), 2 * PAGE_SIZE);
        pages.page(1, ser.as_bytes()).input(0)
    };
    vec![
        state(&[("vm-a", 1)], &[]),
        state(&[("vm-a", 2), ("vm-b", 0), ("vm-c", 64)], &[flb("x"), flb("y")]),
        state(&[], &[flb("x")]),
    ]
}

/// A memfd, at page 1. The order of a folio, which the tree of preserved memory says, follows from its number.
pub(crate) fn memfd(input: &[u8]) -> bool {
    let (flags, memory) = Pages::of(input);
    let order = |pfn: Pfn| match pfn.get() & 7 {
        7 if flags.rest() & 1 != 0 => None,
        0 if flags.rest() & 2 != 0 => Order::new(3).ok(),
        0 if flags.rest() & 4 != 0 => Some(Order::MAX),
        _ => Some(Order::PAGE),
    };
    let Ok(memfd) = Memfd::read(&memory, PAGE_SIZE, &order) else { return false };
    sound(&memfd.folios, memfd.size_bytes);
    true
}

/// Folios ascend in their file, and no frame is in two of them.
fn sound(folios: &[Folio], size_bytes: u64) {
    let mut end = 0;
    for folio in folios {
        assert!(folio.index >= end && folio.index < size_bytes.div_ceil(PAGE_SIZE), "{folio:?}");
        end = folio.index + folio.frames.len_pages();
    }
    let frames: BTreeSet<u64> = folios.iter().map(|folio| folio.frames.start().get()).collect();
    assert_eq!(frames.len(), folios.len(), "no frame twice");
}

fn folios(count: u64) -> Vec<Folio> {
    let frames = |index| Pfn::new(16 + index).ok().map(PageRange::page);
    (0..count).filter_map(|index| Some(Folio { index, frames: frames(index)?, flags: 1 })).collect()
}

/// A structure at page 1 that names folios, their list from page 2 on, and their pages from page 16 on.
fn with_folios(ser: &dyn Fn(Descriptor) -> Vec<u8>, folios: &[Folio], flags: u8) -> Vec<u8> {
    let records = folio::encode(folios);
    let (list, bytes) = if records.is_empty() { Default::default() } else { listed(2, &records) };
    let pages = Pages::default().page(1, &ser(list)).page(2, &bytes);
    let pages =
        folios.iter().fold(pages, |pages, folio| pages.blank(folio.frames.start().get()..folio.frames.end()));
    pages.input(flags)
}

pub(crate) fn memfd_seeds() -> Vec<Vec<u8>> {
    let seed = |size_bytes, folios: Vec<Folio>, flags| {
        let memfd = Memfd { pos: 0, size_bytes, seals: 0x27, folios };
        with_folios(&|list| memfd.ser(list).as_bytes().to_vec(), &memfd.folios, flags)
    };
    let large = Pfn::new(16).ok().zip(Order::new(3).ok());
    let large = large.and_then(|(pfn, order)| PageRange::block(pfn, order).ok());
    let large = large.map(|frames| Folio { index: 8, frames, flags: 3 });
    vec![
        seed(2 * PAGE_SIZE + 1, folios(3), 0),
        seed(0, vec![], 0),
        seed(1 << 40, folios(1), 0),
        // The flags of the input: folios of 8 pages.
        seed(16 * PAGE_SIZE, large.into_iter().collect(), 2 << 1),
    ]
}

/// A VM, at page 1.
pub(crate) fn kvm_vm(input: &[u8]) -> bool {
    let (_, memory) = Pages::of(input);
    let Ok(vm) = KvmVm::read(&memory, PAGE_SIZE) else { return false };
    let again = Pages::default().page(1, &vm.encode());
    assert_eq!(KvmVm::read(&again, PAGE_SIZE), Ok(vm), "what is written is read");
    true
}

pub(crate) fn kvm_vm_seeds() -> Vec<Vec<u8>> {
    [0, 2].map(|vm_type| Pages::default().page(1, &KvmVm { vm_type }.encode()).blank(1..2).input(0)).to_vec()
}

/// What a kernel says of itself, at page 1; one in two is cut.
pub(crate) fn kexec_metadata(input: &[u8]) -> bool {
    let (flags, memory) = Pages::of(input);
    let size = if flags.rest() & 1 == 0 { PAGE_SIZE } else { u64::from(flags.rest()) };
    let Ok(metadata) = KexecMetadata::read(&memory, PAGE_SIZE, size) else { return false };
    let bytes = metadata.encode();
    let again = KexecMetadata::read(&Pages::default().page(1, &bytes), PAGE_SIZE, bytes.len() as u64);
    assert_eq!(again, Ok(metadata), "what is written is read");
    true
}

pub(crate) fn kexec_metadata_seeds() -> Vec<Vec<u8>> {
    let seed = |release: &str| {
        let metadata = KexecMetadata { previous_release: release.as_bytes().to_vec(), kexec_count: 3 };
        Pages::default().page(1, &metadata.encode()).input(0)
    };
    vec![seed("7.3.4"), seed("")]
}

/// Reserved memory, as the bytes of its blob: both by who stops at a fault, and by who goes on.
pub(crate) fn memblock(input: &[u8]) -> bool {
    let memory = Pages::default().blank(1..2).page(1, input.get(..PAGE_BYTES).unwrap_or(input));
    let size = input.len() as u64;
    let strict = memblock::read_on(&memory, PAGE_SIZE, size, &mut Err);
    let past = memblock::read_on(&memory, PAGE_SIZE, size, &mut |_| Ok(()));
    assert!(
        past.is_ok_and(|regions| regions.len() <= memblock::MAX_REGIONS),
        "faults that do not stop it stop nothing"
    );
    strict.is_ok()
}

pub(crate) fn memblock_seeds() -> Vec<Vec<u8>> {
    let region =
        |name: &str| memblock::Region { name: name.as_bytes().to_vec(), start: 1 << 30, size: 1 << 20 };
    vec![memblock::encode(&[region("trace")]), memblock::encode(&[region("a"), region("fifteen-letters")])]
}

/// A guest_memfd, at page 1.
pub(crate) fn guest_memfd(input: &[u8]) -> bool {
    let (_, memory) = Pages::of(input);
    let read: Result<GuestMemfd, Malformed> = GuestMemfd::read(&memory, PAGE_SIZE);
    let Ok(guest) = read else { return false };
    sound(&guest.folios, guest.size_bytes);
    true
}

pub(crate) fn guest_memfd_seeds() -> Vec<Vec<u8>> {
    let seed = |size_bytes, folios: Vec<Folio>| {
        let guest = GuestMemfd { size_bytes, flags: 3, vm_token: 1, folios };
        with_folios(&|list| guest.ser(list).as_bytes().to_vec(), &guest.folios, 0)
    };
    vec![seed(4 * PAGE_SIZE, folios(3)), seed(PAGE_SIZE, vec![]), seed(1 << 40, folios(1))]
}
