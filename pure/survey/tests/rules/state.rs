//! A good state, as a kernel writes one, to be broken.

use std::collections::BTreeMap;

use abi::MemoryMut as _;
use abi::block;
use abi::flb;
use abi::flb::Flb;
use abi::folio;
use abi::folio::Folio;
use abi::gmem;
use abi::gmem::GmemRecord;
use abi::kexec_metadata::KexecMetadata;
use abi::kho::RootFdt;
use abi::kho::Subtree;
use abi::kho::SubtreeName;
use abi::luo;
use abi::luo::Compatible;
use abi::luo::SessionName;
use abi::memblock;
use abi::memfd::MemfdSer;
use abi::radix;
use abi::radix::Key;
use abi::radix::Node;
use abi::record::checksum;
use abi::state::StateRecord;
use abi::vm::Identity;
use abi::vm::VmRecord;
use abi::vmalloc::Descriptor;
use pages::Order;
use pages::PageRange;
use pages::Pfn;
use tideover_survey::Options;
use tideover_survey::Root;
use tideover_survey::Survey;
use zerocopy::IntoBytes as _;

pub(crate) const PAGE: u64 = 4096;
/// Pages of memory.
const PAGES: u64 = 2048;

/// Where things are, by page.
pub(crate) const FDT: u64 = 1;
pub(crate) const LUO: u64 = 2;
pub(crate) const FLBS: u64 = 3;
pub(crate) const SESSIONS: u64 = 4;
/// A chain of two blocks of files.
pub(crate) const FILES: u64 = 5;
pub(crate) const FILES_MORE: u64 = 6;
pub(crate) const OTHER_FILES: u64 = 7;
pub(crate) const METADATA: u64 = 8;
pub(crate) const MEMBLOCK: u64 = 9;
pub(crate) const MEMFD: u64 = 10;
pub(crate) const CHUNK: u64 = 11;
pub(crate) const RECORDS: u64 = 12;
pub(crate) const GUEST: u64 = 13;
pub(crate) const GUEST_CHUNK: u64 = 14;
pub(crate) const GUEST_RECORDS: u64 = 15;
pub(crate) const VM: u64 = 16;
pub(crate) const OUR_VM: u64 = 17;
pub(crate) const OUR_GMEM: u64 = 18;
pub(crate) const STATES: [u64; 2] = [19, 20];
pub(crate) const STATE_CHUNKS: [u64; 2] = [21, 22];
pub(crate) const STATE_BYTES: [u64; 2] = [23, 24];
/// A memfd whose list is two chunks.
pub(crate) const LONG: u64 = 25;
pub(crate) const LONG_CHUNKS: [u64; 2] = [26, 27];
/// Pages that nothing has.
pub(crate) const FREE: u64 = 30;
/// Nodes of the tree.
pub(crate) const TREE: u64 = 40;
/// The memfd's folios: single pages, and one of 4.
pub(crate) const FOLIOS: u64 = 100;
pub(crate) const FOLIO_OF_4: u64 = 104;
pub(crate) const GUEST_FOLIOS: u64 = 110;
pub(crate) const RESERVED: u64 = 120;
pub(crate) const EXTENTS: u64 = 128;
/// Data pages of the long list, all zero: hole records.
pub(crate) const LONG_RECORDS: u64 = 1024;
/// Data pages of the long list.
const LONG_BLOCKS: u64 = 511;

/// A state in memory.
#[derive(Clone)]
pub(crate) struct State {
    pub(crate) memory: Vec<u8>,
    preserved: Vec<Key>,
}

pub(crate) fn folio(index: u64, frame: u64, order: u32, flags: u16) -> Folio {
    let frames = PageRange::block(Pfn::new(frame).unwrap(), Order::new(order).unwrap()).unwrap();
    Folio { index, frames, flags }
}

pub(crate) fn file(handler: &str, page: u64, token: u64) -> luo::FileSer {
    luo::File { compatible: Compatible::new(handler.as_bytes()).unwrap(), data: page * PAGE, token }.entry()
}

impl State {
    /// A good one.
    pub(crate) fn new() -> Self {
        let mut state =
            Self { memory: vec![0; usize::try_from(PAGES * PAGE).unwrap()], preserved: Vec::new() };
        state.blobs();
        state.sessions();
        state.memfds();
        state.guest();
        state.ours();
        state.plant();
        state
    }

    pub(crate) fn put(&mut self, address: u64, bytes: &[u8]) {
        self.memory.write(address, bytes).unwrap();
    }

    pub(crate) fn word(&mut self, address: u64, value: u64) {
        self.put(address, &value.to_le_bytes());
    }

    pub(crate) fn preserve(&mut self, page: u64, order: u32) {
        self.preserved.push(Key::of(Pfn::new(page).unwrap(), Order::new(order).unwrap()));
    }

    pub(crate) fn forget(&mut self, page: u64) {
        let before = self.preserved.len();
        self.preserved.retain(|key| key.range().start().get() != page);
        assert_eq!(self.preserved.len(), before - 1);
    }

    fn page(&mut self, page: u64, bytes: &[u8]) {
        self.put(page * PAGE, bytes);
        self.preserve(page, 0);
    }

    fn blobs(&mut self) {
        let subtree = |name: &'static str, page: u64, size: usize| Subtree {
            name: SubtreeName::literal(name),
            data: page * PAGE,
            size: size as u64,
        };
        let metadata = KexecMetadata { previous_release: b"7.3.4".to_vec(), kexec_count: 1 }.encode();
        let regions = memblock::encode(&[memblock::Region {
            name: b"trace".to_vec(),
            start: RESERVED * PAGE,
            size: 2 * PAGE,
        }]);
        let subtrees = vec![
            subtree("LUO", LUO, 32),
            subtree("kexec-metadata", METADATA, metadata.len()),
            subtree("memblock", MEMBLOCK, regions.len()),
        ];
        let fdt = RootFdt { map: TREE * PAGE, subtrees }.encode().unwrap();
        self.page(FDT, &fdt);
        self.page(METADATA, &metadata);
        self.page(MEMBLOCK, &regions);
        self.preserve(RESERVED, 1);
    }

    fn sessions(&mut self) {
        self.page(LUO, luo::LuoSer::new(3, SESSIONS * PAGE, FLBS * PAGE).as_bytes());
        self.page(FLBS, &flb::encode(&[Flb { name: Compatible::literal("shared"), data: 0, count: 1 }]));
        let mut files = vec![
            file("memfd-v2", MEMFD, 1),
            file("guest_memfd_luo_v1", GUEST, 2),
            file("kvm_vm_luo_v1", VM, 3),
            file("memfd-v2", LONG, 4),
        ];
        // As many as fill a block, and one.
        files.extend((0..60).map(|token| file("memfd-v2", FREE - 2, 100 + token)));
        let more = files.len();
        let empty = MemfdSer {
            pos: 0.into(),
            size: 0.into(),
            seals: 0.into(),
            flags: 0.into(),
            nr_folios: 0.into(),
            folios: Descriptor::default(),
        };
        for index in 0..60u64 {
            let page = 1600 + index;
            self.page(page, empty.as_bytes());
            files[4 + usize::try_from(index).unwrap()].data = (page * PAGE).into();
        }
        let ours = [
            file("tideover-vm-v1", OUR_VM, 1),
            file("tideover-gmem-v1", OUR_GMEM, 0x100),
            file("tideover-state-v1", STATES[0], 0x1000),
            file("tideover-state-v1", STATES[1], 0x1001),
        ];
        let session = |name: &'static str, first: u64, count: usize| luo::SessionSer {
            name: *SessionName::literal(name).field(),
            files: (first * PAGE).into(),
            count: (count as u64).into(),
        };
        let sessions =
            [session("kernel", FILES, more), session("ours", OTHER_FILES, ours.len()), session("idle", 0, 0)];
        let blocks = block::encode(&files, &[FILES * PAGE, FILES_MORE * PAGE]);
        self.page(FILES, &blocks[0]);
        self.page(FILES_MORE, &blocks[1]);
        let block = &block::encode(&ours, &[OTHER_FILES * PAGE])[0];
        self.page(OTHER_FILES, block);
        let block = &block::encode(&sessions, &[SESSIONS * PAGE])[0];
        self.page(SESSIONS, block);
    }

    fn list(&mut self, chunk: u64, records: u64, folios: &[Folio]) -> Descriptor {
        let bytes = folio::encode(folios);
        self.page(chunk, &[]);
        self.word(chunk * PAGE + 8, records * PAGE);
        self.page(records, &bytes);
        Descriptor::plain(chunk * PAGE, 1)
    }

    fn memfds(&mut self) {
        let folios = [folio(0, FOLIOS, 0, 3), folio(1, FOLIOS + 1, 0, 3), folio(4, FOLIO_OF_4, 2, 3)];
        let list = self.list(CHUNK, RECORDS, &folios);
        let ser = MemfdSer {
            pos: 5.into(),
            size: (8 * PAGE - 10).into(),
            seals: 2.into(),
            flags: 0.into(),
            nr_folios: 3.into(),
            folios: list,
        };
        self.page(MEMFD, ser.as_bytes());
        self.preserve(FOLIOS, 0);
        self.preserve(FOLIOS + 1, 0);
        self.preserve(FOLIO_OF_4, 2);
        // 511 pages of records fill a chunk, so an empty one follows. The records are folios of one page that repeat
        // no frame: only the first page has some.
        for page in 0..LONG_BLOCKS {
            self.word(LONG_CHUNKS[0] * PAGE + 8 + 8 * page, (LONG_RECORDS + page) * PAGE);
            self.preserve(LONG_RECORDS + page, 0);
        }
        self.word(LONG_CHUNKS[0] * PAGE, LONG_CHUNKS[1] * PAGE);
        LONG_CHUNKS.iter().for_each(|page| self.preserve(*page, 0));
        let records = LONG_BLOCKS * 256;
        let ser = MemfdSer {
            pos: 0.into(),
            size: (records * PAGE).into(),
            seals: 0.into(),
            flags: 0.into(),
            nr_folios: records.into(),
            folios: Descriptor::plain(LONG_CHUNKS[0] * PAGE, u32::try_from(LONG_BLOCKS).unwrap()),
        };
        self.page(LONG, ser.as_bytes());
    }

    fn guest(&mut self) {
        let folios = [folio(0, GUEST_FOLIOS, 0, 1), folio(3, GUEST_FOLIOS + 1, 0, 0)];
        let list = self.list(GUEST_CHUNK, GUEST_RECORDS, &folios);
        let ser = abi::guest_memfd::GuestMemfdSer {
            size: (8 * PAGE).into(),
            flags: 3.into(),
            nr_folios: 2.into(),
            vm_token: 3.into(),
            folios: list,
        };
        self.page(GUEST, ser.as_bytes());
        self.preserve(GUEST_FOLIOS, 0);
        self.preserve(GUEST_FOLIOS + 1, 0);
        self.page(VM, &[]);
    }

    pub(crate) fn gmem() -> GmemRecord {
        let extent = |index: u64, page: u64, count: u64| gmem::Extent {
            index,
            frames: PageRange::new(Pfn::new(page).unwrap(), count).unwrap(),
        };
        GmemRecord {
            identity: identity(),
            name: gmem::MemoryName::literal("ram"),
            size_bytes: 64 * PAGE,
            flags: 1,
            extents: vec![extent(0, EXTENTS, 16), extent(32, EXTENTS + 16, 16)],
        }
    }

    pub(crate) fn state(index: usize) -> StateRecord {
        StateRecord {
            identity: identity(),
            name: abi::state::StateName::new(format!("vcpu{index}").as_bytes()).unwrap(),
            epoch: 2,
            checksum: checksum(&[&[7; 100]]),
            len_bytes: 100,
            list: Descriptor::plain(STATE_CHUNKS[index] * PAGE, 1),
        }
    }

    fn ours(&mut self) {
        self.page(OUR_VM, &VmRecord { identity: identity(), vm_type: 0, vcpus: 2 }.encode());
        self.page(OUR_GMEM, &Self::gmem().encode());
        self.preserve(EXTENTS, 5);
        for index in 0..2 {
            self.page(STATES[index], &Self::state(index).encode());
            self.page(STATE_CHUNKS[index], &[]);
            self.word(STATE_CHUNKS[index] * PAGE + 8, STATE_BYTES[index] * PAGE);
            self.page(STATE_BYTES[index], &[7; 100]);
        }
    }

    /// Writes the tree of what is preserved.
    pub(crate) fn plant(&mut self) {
        let mut nodes: BTreeMap<(u32, u64), (u64, Node)> = BTreeMap::new();
        let mut next = TREE;
        let mut place = |nodes: &mut BTreeMap<(u32, u64), (u64, Node)>, level: u32, prefix: u64| {
            nodes
                .entry((level, prefix))
                .or_insert_with(|| {
                    next += 1;
                    ((next - 1) * PAGE, [0; radix::WORDS])
                })
                .0
        };
        place(&mut nodes, radix::LEVELS, 0);
        for key in &self.preserved {
            for level in (0..radix::LEVELS).rev() {
                let prefix = |level: u32| {
                    let bits = radix::LEAF_BITS + radix::TABLE_BITS * level;
                    key.get() >> bits
                };
                let child = place(&mut nodes, level, prefix(level));
                let above = nodes.get_mut(&(level + 1, prefix(level + 1))).unwrap();
                above.1[key.slot(level + 1)] = child;
            }
            let (word, bit) = key.leaf_bit();
            nodes.get_mut(&(0, key.get() >> radix::LEAF_BITS)).unwrap().1[word] |= 1 << bit;
        }
        for (address, node) in nodes.into_values() {
            self.put(address, &radix::node_bytes(&node));
        }
    }

    pub(crate) fn survey(&self) -> Survey {
        Survey::read(&self.memory, &Root::Fdt(FDT * PAGE), Options::default())
    }
}

pub(crate) fn identity() -> Identity {
    Identity::new([7; 16])
}
