//! The kernel's formats of files: the worked examples byte for byte, round trips, and each way to be broken.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use pages::Order;
use pages::PageRange;
use pages::Pfn;
use proptest::prelude::*;
use tideover_abi::MemoryMut as _;
use tideover_abi::Problem;
use tideover_abi::folio;
use tideover_abi::folio::Folio;
use tideover_abi::guest_memfd;
use tideover_abi::guest_memfd::GuestMemfd;
use tideover_abi::kvm_vm::KvmVm;
use tideover_abi::memfd;
use tideover_abi::memfd::Memfd;
use tideover_abi::vmalloc::Descriptor;
use zerocopy::IntoBytes as _;

const PAGE: u64 = 4096;
/// Pages of the memory that the tests write to: the structure, a chunk, pages of records, and the files' frames.
const PAGES: u64 = 1024;
const STRUCTURE: u64 = PAGE;
const CHUNK: u64 = 2 * PAGE;
const RECORDS: u64 = 3 * PAGE;
/// The first frame that is a file's.
const FRAMES: u64 = 64;

fn folio(index: u64, frame: u64, order: u32, flags: u16) -> Folio {
    let frames = PageRange::block(Pfn::new(frame).unwrap(), Order::new(order).unwrap()).unwrap();
    Folio { index, frames, flags }
}

fn hex(bytes: &[u8]) -> String {
    let word = |word: &[u8]| word.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    bytes.chunks(8).map(word).collect::<Vec<_>>().join(" ")
}

/// Writes a list of folios as the kernel does: a chunk that names pages, and records in those.
fn write_list(memory: &mut Vec<u8>, folios: &[Folio]) -> Descriptor {
    let bytes = folio::encode(folios);
    let pages = (bytes.len() as u64).div_ceil(PAGE);
    for page in 0..pages {
        memory.write(CHUNK + 8 + 8 * page, &(RECORDS + page * PAGE).to_le_bytes()).unwrap();
    }
    memory.write(RECORDS, &bytes).unwrap();
    if pages == 0 { Descriptor::default() } else { Descriptor::plain(CHUNK, u32::try_from(pages).unwrap()) }
}

fn empty() -> Vec<u8> {
    vec![0; usize::try_from(PAGES * PAGE).unwrap()]
}

fn with_guest_memfd(file: &GuestMemfd) -> Vec<u8> {
    let mut memory = empty();
    let list = write_list(&mut memory, &file.folios);
    memory.write(STRUCTURE, file.ser(list).as_bytes()).unwrap();
    memory
}

fn with_memfd(file: &Memfd) -> Vec<u8> {
    let mut memory = empty();
    let list = write_list(&mut memory, &file.folios);
    memory.write(STRUCTURE, file.ser(list).as_bytes()).unwrap();
    memory
}

/// O1.7, R1.1.
#[test]
fn the_worked_examples_have_the_kernels_bytes() {
    let file = GuestMemfd { size_bytes: 16 << 20, flags: 3, vm_token: 0x1001, folios: Vec::new() };
    let mut ser = file.ser(Descriptor::plain(0x1_0700_0000, 5));
    ser.nr_folios = 1280.into();
    assert_eq!(
        hex(ser.as_bytes()),
        "0000000100000000 0300000000000000 0005000000000000 0110000000000000 0000000701000000 0500000001000000"
    );
    assert_eq!(
        hex(&folio::encode(&[folio(7, 0x12_3456, 0, guest_memfd::UPTODATE)])),
        "5634120000001000 0700000000000000"
    );
    let both = memfd::flags::DIRTY | memfd::flags::UPTODATE;
    assert_eq!(hex(&folio::encode(&[folio(7, 0x12_3456, 0, both)])), "5634120000003000 0700000000000000");
    assert_eq!(KvmVm { vm_type: 5 }.encode(), [5, 0, 0, 0, 0, 0, 0, 0]);
}

/// R1.15.
#[test]
fn a_file_without_folios_has_no_list() {
    let file = GuestMemfd { size_bytes: 8 * PAGE, flags: 0, vm_token: 0, folios: Vec::new() };
    assert_eq!(GuestMemfd::read(&with_guest_memfd(&file), STRUCTURE).unwrap(), file);
    let mut memory = with_guest_memfd(&file);
    // A list that nobody counts is no list.
    memory.write(STRUCTURE + 32, Descriptor::plain(CHUNK, 1).as_bytes()).unwrap();
    assert_eq!(GuestMemfd::read(&memory, STRUCTURE).unwrap_err().field, "folios");
}

/// R1.4, O1.9, O1.14.
#[test]
fn each_way_to_be_broken_is_refused_by_field() {
    let folios = vec![folio(0, FRAMES, 0, 1), folio(3, FRAMES + 2, 0, 0), folio(4, FRAMES + 1, 0, 1)];
    let file = GuestMemfd { size_bytes: 8 * PAGE, flags: 3, vm_token: 7, folios };
    let broken = |address: u64, bytes: &[u8]| {
        let mut memory = with_guest_memfd(&file);
        memory.write(address, bytes).unwrap();
        GuestMemfd::read(&memory, STRUCTURE).unwrap_err().field
    };
    let word = |value: u64| value.to_le_bytes();
    assert_eq!(broken(STRUCTURE, &word(0)), "size");
    assert_eq!(broken(STRUCTURE, &word(8 * PAGE + 1)), "size");
    assert_eq!(broken(STRUCTURE + 8, &word(4)), "flags");
    assert_eq!(broken(STRUCTURE + 8, &word(1 << 63)), "flags");
    assert_eq!(broken(STRUCTURE + 16, &word(9)), "nr_folios");
    assert_eq!(broken(STRUCTURE + 16, &word(u64::MAX)), "nr_folios");
    assert_eq!(broken(STRUCTURE + 16, &word(0)), "folios");
    assert_eq!(broken(STRUCTURE + 40, &2u32.to_le_bytes()), "total_pages");
    // More folios than the list has room for.
    let large = GuestMemfd { size_bytes: 600 * PAGE, ..file.clone() };
    let mut memory = with_guest_memfd(&large);
    memory.write(STRUCTURE + 16, &word(257)).unwrap();
    assert_eq!(GuestMemfd::read(&memory, STRUCTURE).unwrap_err().field, "nr_folios, in pages of records");
    // The first record's frame and flags; the second one's index.
    assert_eq!(broken(RECORDS, &word(1 << 52)), "folio pfn");
    assert_eq!(broken(RECORDS, &word(PAGES | 1 << 52)), "folio pfn");
    assert_eq!(broken(RECORDS, &word((FRAMES + 1) | 1 << 52)), "folio pfn");
    assert_eq!(broken(RECORDS, &word(FRAMES | 2 << 52)), "folio flags");
    assert_eq!(broken(RECORDS + 24, &word(0)), "folio index");
    assert_eq!(broken(RECORDS + 24, &word(8)), "folio index");
    assert_eq!(broken(RECORDS + 24, &word(5)), "folio index");
}

#[test]
fn a_memfds_seals_and_flags_are_those_that_there_are() {
    let file = Memfd { pos: 5, size_bytes: 12_297, seals: 2, folios: vec![folio(0, FRAMES, 2, 3)] };
    let order = |_| Order::new(2).ok();
    let read = |address: u64, bytes: &[u8]| {
        let mut memory = with_memfd(&file);
        memory.write(address, bytes).unwrap();
        Memfd::read(&memory, STRUCTURE, &order)
    };
    assert_eq!(read(STRUCTURE, &[5]).unwrap(), file);
    assert_eq!(read(STRUCTURE + 16, &[0x40]).unwrap_err().field, "seals");
    assert_eq!(read(STRUCTURE + 20, &[1]).unwrap_err().field, "flags");
    // A hole has a record of its own, as the kernel writes it, and none here.
    assert_eq!(read(RECORDS, &[0; 8]).unwrap().folios, []);
    let none = Memfd::read(&with_memfd(&file), STRUCTURE, &|_| None).unwrap_err();
    assert_eq!((none.field, none.problem), ("folio pfn", Problem::Unknown { found: FRAMES }));
}

/// O1.14.
#[test]
fn large_folios_overlap_by_all_of_their_pages() {
    let order = |_| Order::new(2).ok();
    let read = |folios: Vec<Folio>| {
        let file = Memfd { pos: 0, size_bytes: 64 * PAGE, seals: 0, folios };
        Memfd::read(&with_memfd(&file), STRUCTURE, &order)
    };
    assert!(read(vec![folio(0, FRAMES, 2, 3), folio(4, FRAMES + 4, 2, 3)]).is_ok());
    let inside = read(vec![folio(0, FRAMES, 2, 3), folio(3, FRAMES + 4, 2, 3)]).unwrap_err();
    assert_eq!((inside.field, inside.problem), ("folio index", Problem::Repeated { found: 3 }));
    let askew = read(vec![folio(1, FRAMES, 2, 3)]).unwrap_err();
    assert_eq!((askew.field, askew.problem), ("folio index", Problem::Misaligned { found: 1 }));
    let shared = read(vec![folio(0, FRAMES, 2, 3), folio(4, FRAMES, 2, 3)]).unwrap_err();
    assert_eq!((shared.field, shared.problem), ("folio pfn", Problem::Repeated { found: FRAMES }));
    let mut memory =
        with_memfd(&Memfd { pos: 0, size_bytes: PAGE, seals: 0, folios: vec![folio(0, FRAMES, 2, 3)] });
    memory.write(RECORDS, &(FRAMES + 1).to_le_bytes()).unwrap();
    let askew = Memfd::read(&memory, STRUCTURE, &order).unwrap_err();
    assert_eq!(askew.problem, Problem::Misaligned { found: FRAMES + 1 });
}

#[test]
fn the_other_layouts_of_a_vms_name_are_refused_by_name() {
    let read = |words: [u64; 4]| {
        let mut memory = empty();
        memory.write(STRUCTURE, words.as_bytes()).unwrap();
        KvmVm::read(&memory, STRUCTURE).map_err(|error| error.to_string())
    };
    assert_eq!(read([1, 0, 0, 0]), Ok(KvmVm { vm_type: 1 }));
    assert!(read([0, 0x1_0000_0000, 0, 0]).unwrap_err().contains("`layout` is the one of 16 bytes"));
    assert!(read([0, 2, 0x1_0000_0000, 0x1_0000_0001]).unwrap_err().contains("memory attributes"));
    assert!(read([0, 0, 1, 0]).unwrap_err().contains("none of the three"));
    assert!(KvmVm::read(&empty(), PAGES * PAGE - 8).is_err());
}

/// Folios of single pages anywhere in a file of `pages` pages, in frames of their own.
fn folios(pages: u64, flags: u16) -> impl Strategy<Value = Vec<Folio>> {
    let present = prop::collection::vec(prop::option::of(0..=flags), usize::try_from(pages).unwrap());
    let frames: Vec<u64> = (FRAMES..FRAMES + pages).collect();
    (present, Just(frames).prop_shuffle()).prop_map(|(present, frames)| {
        let page = |(index, (flags, frame)): (usize, (Option<u16>, u64))| {
            flags.map(|flags| folio(index as u64, frame, 0, flags))
        };
        present.into_iter().zip(frames).enumerate().filter_map(page).collect()
    })
}

proptest! {
    /// R1.1.
    #[test]
    fn a_guest_memfd_that_is_written_is_read(
        folios in (1u64..=700).prop_flat_map(|pages| folios(pages, 1)), extra in 0u64..5, flags in 0u64..4, token: u64
    ) {
        let pages = folios.last().map_or(0, |last| last.index + 1) + extra.max(u64::from(folios.is_empty()));
        let file = GuestMemfd { size_bytes: pages * PAGE, flags, vm_token: token, folios };
        prop_assert_eq!(GuestMemfd::read(&with_guest_memfd(&file), STRUCTURE).unwrap(), file);
    }

    #[test]
    fn a_memfd_that_is_written_is_read(
        folios in (1u64..=700).prop_flat_map(|pages| folios(pages, 3)), pos: u64, cut in 0u64..4096, seals in 0u32..64
    ) {
        let pages = folios.last().map_or(1, |last| last.index + 1);
        let file = Memfd { pos, size_bytes: pages * PAGE - cut, seals, folios };
        prop_assert_eq!(Memfd::read(&with_memfd(&file), STRUCTURE, &|_| Some(Order::PAGE)).unwrap(), file);
    }

    /// Whatever the bytes are, the answer is a file that keeps to the rules, or an error.
    #[test]
    fn damaged_bytes_are_an_error_or_a_file_that_keeps_to_the_rules(
        folios in (1u64..=700).prop_flat_map(|pages| folios(pages, 1)),
        hits in prop::collection::vec((0u64..6 * PAGE, any::<u8>()), 1..12)
    ) {
        let pages = folios.last().map_or(1, |last| last.index + 1);
        let mut memory = with_guest_memfd(&GuestMemfd { size_bytes: pages * PAGE, flags: 1, vm_token: 0, folios });
        for (at, byte) in hits {
            memory.write(at, &[byte]).unwrap();
        }
        if let Ok(file) = GuestMemfd::read(&memory, STRUCTURE) {
            let pages = file.size_bytes / PAGE;
            prop_assert!(file.folios.windows(2).all(|pair| pair[0].index < pair[1].index));
            prop_assert!(file.folios.iter().all(|folio| folio.index < pages && folio.frames.end() <= PAGES));
            prop_assert!(file.folios.iter().all(|folio| folio.frames.start().get() != 0));
        }
        let _ = KvmVm::read(&memory, STRUCTURE);
        let _ = Memfd::read(&memory, STRUCTURE, &|_| Order::new(1).ok());
    }
}
