//! The state that a real kernel handed over is read, and would have been written, byte for byte.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::collections::BTreeMap;
use std::io::Read as _;
use std::sync::OnceLock;

use ruzstd::decoding::StreamingDecoder;
use tideover_abi::Memory as _;
use tideover_abi::block;
use tideover_abi::flb;
use tideover_abi::kho::RootFdt;
use tideover_abi::kho::SubtreeName;
use tideover_abi::luo;
use tideover_abi::luo::Luo;
use tideover_abi::luo::LuoSer;
use tideover_abi::memfd::Memfd;
use tideover_abi::radix;
use tideover_abi::radix::Found;
use tideover_abi::vmalloc::Descriptor;
use zerocopy::FromBytes as _;
use zerocopy::IntoBytes as _;

/// Physical address of the root FDT.
const FDT: u64 = 0x4f_3000;

fn memory() -> &'static Vec<u8> {
    static MEMORY: OnceLock<Vec<u8>> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let packed = include_bytes!("../testdata/kho-linux-7.3.raw.zst");
        let mut memory = Vec::with_capacity(256 << 20);
        StreamingDecoder::new(packed.as_slice()).unwrap().read_to_end(&mut memory).unwrap();
        memory
    })
}

fn read(address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory().read(address, &mut bytes).unwrap();
    bytes
}

fn luo() -> Luo {
    let fdt = RootFdt::read(memory(), FDT).unwrap();
    let subtree = fdt.subtree(&SubtreeName::literal(luo::SUBTREE)).unwrap();
    Luo::read(memory(), subtree.data, subtree.size).unwrap()
}

#[test]
fn the_root_fdt_is_the_one_that_the_kernel_wrote() {
    let fdt = RootFdt::read(memory(), FDT).unwrap();
    let names: Vec<String> = fdt.subtrees.iter().map(|subtree| subtree.name.to_string()).collect();
    assert!(names.contains(&"LUO".to_owned()) && names.contains(&"kexec-metadata".to_owned()), "{names:?}");
    assert_eq!(names.len(), 2);
    let ours = fdt.encode().unwrap();
    assert_eq!(ours, read(FDT, ours.len()));
}

#[test]
fn the_tree_of_preserved_memory_holds_what_the_kernel_preserved() {
    let fdt = RootFdt::read(memory(), FDT).unwrap();
    let mut by_order: BTreeMap<u32, u64> = BTreeMap::new();
    let mut bytes = 0;
    radix::walk(memory(), fdt.map, |found| {
        if let Found::Block(key) = found {
            *by_order.entry(key.order().get()).or_default() += 1;
            bytes += key.range().len_bytes();
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(by_order, BTreeMap::from([(0, 52), (9, 2)]));
    assert_eq!(bytes, 4_407_296);
}

#[test]
fn the_sessions_and_files_are_those_that_were_preserved() {
    let luo = luo();
    assert_eq!(luo.liveupdate_num, 1);
    let sessions: Vec<(String, Vec<u64>)> = luo
        .sessions
        .iter()
        .map(|session| (session.name.to_string(), session.files.iter().map(|file| file.token).collect()))
        .collect();
    let expected = [("web-1", vec![8194, 7]), ("db", vec![0, 500, 501, 502]), ("idle-session", vec![])];
    assert_eq!(sessions, expected.map(|(name, tokens)| (name.to_owned(), tokens)));
    let mut files = luo.sessions.iter().flat_map(|session| &session.files);
    assert!(files.all(|file| file.compatible.to_string() == "memfd-v2" && file.data != 0));
}

#[test]
fn the_luo_blob_and_blocks_are_those_that_the_kernel_wrote() {
    let fdt = RootFdt::read(memory(), FDT).unwrap();
    let blob = fdt.subtree(&SubtreeName::literal(luo::SUBTREE)).unwrap();
    let theirs = read(blob.data, size_of::<LuoSer>());
    let word = |at: usize| u64::from_le_bytes(theirs[at..at + 8].try_into().unwrap());
    let (first, flbs) = (word(16), word(24));
    assert_eq!(LuoSer::new(1, first, flbs).as_bytes(), theirs);
    assert_eq!(flb::encode(&luo().flbs).as_slice(), read(flbs, 4096), "the page of shared objects");
    let luo = luo();
    // The block's header and its entries; what follows them is not said to be anything.
    let entry = |index: usize| read(first + 16 + 80 * index as u64, 80);
    for (index, session) in luo.sessions.iter().enumerate() {
        let theirs = entry(index);
        let files = u64::from_le_bytes(theirs[64..72].try_into().unwrap());
        assert_eq!(session.entry(files).as_bytes(), theirs);
        let entries: Vec<luo::FileSer> = session.files.iter().map(luo::File::entry).collect();
        if !entries.is_empty() {
            let len = 16 + 64 * entries.len();
            assert_eq!(block::encode(&entries, &[files])[0][..len], read(files, len));
        }
    }
}

/// The order of each block of preserved memory, by its first frame.
fn orders() -> BTreeMap<u64, pages::Order> {
    let fdt = RootFdt::read(memory(), FDT).unwrap();
    let mut orders = BTreeMap::new();
    radix::walk(memory(), fdt.map, |found| {
        if let Found::Block(key) = found {
            orders.insert(key.range().start().get(), key.order());
        }
        Ok(())
    })
    .unwrap();
    orders
}

#[test]
fn the_memfds_are_those_that_were_preserved() {
    let orders = orders();
    let order = |frame: pages::Pfn| orders.get(&frame.get()).copied();
    let luo = luo();
    let files = luo.sessions.iter().flat_map(|session| &session.files);
    let found: Vec<_> = files
        .map(|file| {
            let memfd = Memfd::read(memory(), file.data, &order).unwrap();
            let bytes: u64 = memfd.folios.iter().map(|folio| folio.frames.len_bytes()).sum();
            assert_eq!(memfd.ser(list(file.data)).as_bytes(), read(file.data, 48));
            let first = memfd.folios[0].frames.start().address();
            (file.token, memfd.pos, memfd.size_bytes, memfd.seals, memfd.folios.len(), bytes, read(first, 6))
        })
        .collect();
    let expected = [
        (8194, 5, 12_297, 2, 4, 16_384, vec![0x41; 6]),
        (7, 0, 4 << 20, 1, 2, 4 << 20, vec![0xc3; 6]),
        (0, 0, 81_920, 1, 20, 81_920, vec![0; 6]),
        (500, 6, 6, 1, 1, 4096, b"file 0".to_vec()),
        (501, 6, 6, 1, 1, 4096, b"file 1".to_vec()),
        (502, 6, 6, 1, 1, 4096, b"file 2".to_vec()),
    ];
    assert_eq!(found, expected);
}

/// The descriptor of a memfd's list, as the kernel wrote it.
fn list(address: u64) -> Descriptor {
    Descriptor::read_from_bytes(&read(address + 32, 16)).unwrap()
}
