//! How each rule is broken.

use abi::MemoryMut as _;
use abi::block;
use abi::kho::RootFdt;
use abi::kho::Subtree;
use abi::kho::SubtreeName;
use abi::radix;
use pages::PageRange;
use pages::Pfn;

use crate::state::*;

type Break = fn(&mut State);

/// Where a text stands in a page.
fn find(state: &State, page: u64, text: &[u8]) -> u64 {
    let from = usize::try_from(page * PAGE).unwrap();
    let bytes = &state.memory[from..from + 4096];
    page * PAGE + bytes.windows(text.len()).position(|window| window == text).unwrap() as u64
}

/// Where an entry of a block of files is.
const fn entry(page: u64, index: u64) -> u64 {
    page * PAGE + 16 + 64 * index
}

/// Where a session's entry is.
const fn session(index: u64) -> u64 {
    SESSIONS * PAGE + 16 + 80 * index
}

/// With another root FDT.
fn with_fdt(state: &mut State, change: impl FnOnce(&mut RootFdt)) {
    let mut fdt = RootFdt::read(&state.memory, FDT * PAGE).unwrap();
    change(&mut fdt);
    let bytes = fdt.encode().unwrap();
    state.put(FDT * PAGE, &[0; 4096]);
    state.put(FDT * PAGE, &bytes);
}

fn with_gmem(state: &mut State, change: impl FnOnce(&mut abi::gmem::GmemRecord)) {
    let mut record = State::gmem();
    change(&mut record);
    state.put(OUR_GMEM * PAGE, &record.encode());
}

fn extent(index: u64, page: u64, count: u64) -> abi::gmem::Extent {
    abi::gmem::Extent { index, frames: PageRange::new(Pfn::new(page).unwrap(), count).unwrap() }
}

/// Changes a record and gives it the checksum of what it says then.
fn patch(state: &mut State, page: u64, payload_bytes: usize, at: usize, bytes: &[u8]) {
    let from = usize::try_from(page * PAGE).unwrap();
    let record = &mut state.memory[from..from + 32 + payload_bytes];
    record[at..at + bytes.len()].copy_from_slice(bytes);
    record[24..28].fill(0);
    let sum = abi::record::checksum(&[record]);
    record[24..28].copy_from_slice(&sum.to_le_bytes());
}

/// The first leaf of order 0, and the node above it.
fn leaf(state: &State) -> (u64, u64) {
    let (mut leaf, mut table) = (0, 0);
    radix::walk(&state.memory, TREE * PAGE, |found| {
        if let radix::Found::Node { level, address, prefix } = found {
            match level {
                0 if prefix == 1 << 37 => leaf = address,
                1 if prefix == 1 << 28 => table = address,
                _ => {}
            }
        }
        Ok(())
    })
    .unwrap();
    (leaf, table)
}

/// The rules and how they are broken.
pub(crate) const ALL: &[(&str, Break)] = &[
    ("address-in-range", |state| state.word(entry(OTHER_FILES, 0) + 48, 1 << 40)),
    ("address-not-zero", |state| state.word(LUO * PAGE + 24, 0)),
    ("page-alignment", |state| state.word(entry(OTHER_FILES, 0) + 48, OUR_VM * PAGE + 8)),
    ("referred-twice", |state| {
        // Two folios of one frame.
        state.put(RECORDS * PAGE + 16, &abi::folio::encode(&[folio(1, FOLIOS, 0, 3)]));
        state.forget(FOLIOS + 1);
        replant(state);
    }),
    ("referred-preserved", |state| {
        state.forget(OUR_VM);
        replant(state);
    }),
    ("preserved-referred", |state| {
        state.preserve(FREE, 0);
        replant(state);
    }),
    ("fdt-structure", |state| state.put(FDT * PAGE + 24, &18u32.to_be_bytes())),
    ("fdt-size", |state| state.put(FDT * PAGE + 4, &4097u32.to_be_bytes())),
    ("kho-version", |state| {
        let at = find(state, FDT, b"kho-v4\0");
        state.put(at + 5, b"9");
    }),
    ("kho-version", |state| {
        let at = find(state, FDT, b"kho-v4\0");
        state.put(at + 5, b"3");
    }),
    ("kho-map", |state| {
        let at = find(state, FDT, b"preserved-memory-map\0");
        state.put(at, b"x");
    }),
    ("kho-subtree", |state| {
        let at = find(state, FDT, b"blob-size\0");
        state.put(at, b"x");
    }),
    ("kho-subtree-name", |state| {
        // Longer than a node's name may be: in the place of the one that was added last.
        with_fdt(state, |fdt| {
            let last = fdt.subtrees.last_mut().unwrap();
            last.name = SubtreeName::new(&[b'x'; 31]).unwrap();
        });
        let at = find(state, FDT, &[b'x'; 31]);
        state.put(at + 31, b"x");
        let from = usize::try_from(at).unwrap();
        let page = usize::try_from(FDT * PAGE).unwrap();
        // Four bytes more, for the NUL.
        let rest = state.memory[from + 32..page + 4000].to_vec();
        state.memory[from + 32..from + 36].fill(0);
        state.put(at + 36, &rest[..rest.len() - 4]);
        fix_offsets(state);
    }),
    ("kho-subtree-twice", |state| {
        with_fdt(state, |fdt| {
            let (name, last) = (fdt.subtrees[1].name, fdt.subtrees.len());
            fdt.subtrees.push(Subtree { name, data: FREE * PAGE, size: 73 });
            assert_eq!(fdt.subtrees.len(), last + 1);
        });
        let metadata = state.memory[usize::try_from(METADATA * PAGE).unwrap()..][..73].to_vec();
        state.put(FREE * PAGE, &metadata);
        state.preserve(FREE, 0);
        replant(state);
    }),
    ("kho-subtree-known", |state| {
        with_fdt(state, |fdt| {
            fdt.subtrees.push(Subtree {
                name: SubtreeName::literal("kho_test"),
                data: FREE * PAGE,
                size: 64,
            });
        });
        state.preserve(FREE, 0);
        replant(state);
    }),
    ("tree-node-once", |state| {
        let (leaf, table) = leaf(state);
        state.word(table + 8 * 9, leaf);
    }),
    ("tree-key-width", |state| state.word(TREE * PAGE + 8 * 511, FREE * PAGE)),
    ("tree-key-order", |state| {
        // Key 0, in a leaf of its own on the way of zeros.
        state.plant_zero_key();
    }),
    ("tree-no-overlap", |state| {
        state.preserve(FOLIO_OF_4 + 1, 0);
        replant(state);
    }),
    ("tree-in-range", |state| {
        state.preserve(1 << 20, 0);
        replant(state);
    }),
    ("vmalloc-total", |state| state.put(MEMFD * PAGE + 40, &2u32.to_le_bytes())),
    ("vmalloc-order", |state| state.put(MEMFD * PAGE + 46, &52u16.to_le_bytes())),
    ("vmalloc-flags", |state| state.put(MEMFD * PAGE + 44, &5u16.to_le_bytes())),
    ("vmalloc-no-cycle", |state| state.word(LONG_CHUNKS[1] * PAGE, LONG_CHUNKS[0] * PAGE)),
    ("vmalloc-chunk-full", |state| {
        state.word(CHUNK * PAGE, FREE * PAGE);
        state.preserve(FREE, 0);
        replant(state);
    }),
    ("vmalloc-trailing-chunk", |state| {
        state.word(LONG_CHUNKS[0] * PAGE, 0);
        state.forget(LONG_CHUNKS[1]);
        replant(state);
    }),
    ("block-once", |state| state.word(FILES_MORE * PAGE, FILES * PAGE)),
    ("block-count", |state| state.word(SESSIONS * PAGE + 8, 52)),
    ("block-chain", |state| state.long_chain()),
    ("block-filled", |state| {
        // One entry of the first block goes to the second.
        let last = usize::try_from(entry(FILES, 62)).unwrap();
        let moved = state.memory[last..last + 64].to_vec();
        state.put(entry(FILES, 62), &[0; 64]);
        state.word(FILES * PAGE + 8, 62);
        state.put(entry(FILES_MORE, 1), &moved);
        state.word(FILES_MORE * PAGE + 8, 2);
    }),
    ("luo-size", |state| with_fdt(state, |fdt| fdt.subtrees[0].size = 31)),
    ("luo-version", |state| state.put(LUO * PAGE, b"luo-v9")),
    ("luo-version", |state| state.put(LUO * PAGE, b"luo-v4")),
    ("flb-pages", |state| state.word(FLBS * PAGE, 2)),
    ("flb-count", |state| state.word(FLBS * PAGE + 8, 64)),
    ("flb-name", |state| state.put(FLBS * PAGE + 16, &[b'x'; 48])),
    ("flb-users", |state| state.word(FLBS * PAGE + 16 + 56, 0)),
    ("session-name", |state| state.put(session(2), &[0; 64])),
    ("session-name", |state| state.put(session(2), &[b'x'; 64])),
    ("session-name-once", |state| state.put(session(2), b"ours\0")),
    ("session-file-count", |state| state.word(session(1) + 72, 5)),
    ("token-once", |state| state.word(entry(FILES, 10) + 56, 1)),
    ("handler-name", |state| state.put(entry(FILES, 10), &[0; 48])),
    ("handler-known", |state| state.put(entry(OTHER_FILES, 0), b"vfio-pci-v1\0\0\0")),
    ("memfd-seals", |state| state.put(MEMFD * PAGE + 16, &[0x42])),
    ("memfd-flags", |state| state.put(MEMFD * PAGE + 20, &[1])),
    ("memfd-size", |state| state.word(MEMFD * PAGE + 8, 1 << 45)),
    ("memfd-no-holes", |_| {}),
    ("folio-count", |state| state.word(MEMFD * PAGE + 24, 9)),
    ("folio-count", |state| state.word(GUEST * PAGE + 16, 0)),
    ("folio-flags", |state| {
        state.put(RECORDS * PAGE, &abi::folio::encode(&[folio(0, FOLIOS, 0, 7)]));
    }),
    ("folio-ascends", |state| state.word(RECORDS * PAGE + 24, 0)),
    ("folio-alignment", |state| state.word(RECORDS * PAGE + 40, 5)),
    ("folio-in-file", |state| state.word(RECORDS * PAGE + 40, 8)),
    ("folio-preserved", |state| {
        state.forget(FOLIOS);
        replant(state);
    }),
    ("guest-memfd-size", |state| state.word(GUEST * PAGE, 8 * PAGE + 1)),
    ("guest-memfd-flags", |state| state.word(GUEST * PAGE + 8, 7)),
    ("guest-memfd-frame", |state| {
        state.word(GUEST_RECORDS * PAGE, 1 << 52);
        state.forget(GUEST_FOLIOS);
        replant(state);
    }),
    ("guest-memfd-order", |state| {
        state.forget(GUEST_FOLIOS);
        state.forget(GUEST_FOLIOS + 1);
        state.preserve(GUEST_FOLIOS, 1);
        state.put(GUEST_RECORDS * PAGE, &abi::folio::encode(&[folio(0, GUEST_FOLIOS, 1, 1)]));
        state.word(GUEST * PAGE + 16, 1);
        replant(state);
    }),
    ("guest-memfd-vm", |state| state.word(GUEST * PAGE + 24, 1)),
    ("kvm-vm-layout", |state| state.word(VM * PAGE + 8, 1 << 30)),
    ("kexec-metadata", |state| state.put(METADATA * PAGE, &[2])),
    ("memblock", |state| {
        let at = find(state, MEMBLOCK, b"memblock-v1\0");
        state.put(at, b"x");
    }),
    ("record-kind", |state| state.put(OUR_VM * PAGE + 8, b"GMEM")),
    ("record-version", |state| patch(state, OUR_VM, 32, 12, &[9])),
    ("record-size", |state| state.word(OUR_VM * PAGE + 16, 1 << 40)),
    ("record-checksum", |state| state.put(OUR_VM * PAGE + 24, &[0; 4])),
    ("record-fields", |state| patch(state, OUR_VM, 32, 28, &[1])),
    ("gmem-size", |state| with_gmem(state, |record| record.size_bytes += 1)),
    ("gmem-flags", |state| with_gmem(state, |record| record.flags = 4)),
    ("extent-fields", |state| {
        with_gmem(state, |record| record.extents.push(extent(50, EXTENTS, 0)));
    }),
    ("extent-ascends", |state| with_gmem(state, |record| record.extents.reverse())),
    ("extent-in-file", |state| with_gmem(state, |record| record.extents[1].index = 60)),
    ("extent-once", |state| {
        // Of frames that the other has too, and that are no block's beginning.
        with_gmem(state, |record| record.extents[1] = extent(32, EXTENTS + 8, 24));
    }),
    ("state-checksum", |state| state.put(STATE_BYTES[0] * PAGE, &[8])),
    ("state-list", |state| {
        let list = abi::vmalloc::Descriptor::plain(STATE_CHUNKS[0] * PAGE, 2);
        let record = abi::state::StateRecord { list, ..State::state(0) };
        state.put(STATES[0] * PAGE, &record.encode());
    }),
    ("state-epoch", |state| {
        let record = abi::state::StateRecord { epoch: 4, ..State::state(0) };
        state.put(STATES[0] * PAGE, &record.encode());
    }),
];

/// Writes the tree anew.
fn replant(state: &mut State) {
    let from = usize::try_from(TREE * PAGE).unwrap();
    let to = usize::try_from(FOLIOS * PAGE).unwrap();
    state.memory[from..to].fill(0);
    state.plant();
}

/// Says where the blocks of the root FDT are after its structure block has grown by four bytes.
fn fix_offsets(state: &mut State) {
    let cell = |state: &State, index: usize| {
        let at = usize::try_from(FDT * PAGE).unwrap() + index * 4;
        u32::from_be_bytes(state.memory[at..at + 4].try_into().unwrap())
    };
    for index in [1, 3, 9] {
        let grown = cell(state, index) + 4;
        state.memory.write(FDT * PAGE + index as u64 * 4, &grown.to_be_bytes()).unwrap();
    }
}

impl State {
    /// A leaf for the keys from 0 on, of which the first means no block.
    fn plant_zero_key(&mut self) {
        let mut at = TREE * PAGE;
        for level in (0..radix::LEVELS).rev() {
            let mut word = [0; 8];
            abi::Memory::read(&self.memory, at, &mut word).unwrap();
            let next = match u64::from_le_bytes(word) {
                0 => (FREE + u64::from(level)) * PAGE,
                there => there,
            };
            self.word(at, next);
            at = next;
        }
        self.put(at, &[1]);
    }

    /// A session whose files are listed in more blocks than a chain may have, one in each.
    fn long_chain(&mut self) {
        let (first, blocks) = (self.memory.len() as u64 / PAGE, block::MAX_BLOCKS as u64 + 1);
        self.memory.resize(self.memory.len() + usize::try_from(2 * blocks * PAGE).unwrap(), 0);
        for index in 0..blocks {
            let (block, structure) = (first + index, first + blocks + index);
            let next = if index + 1 < blocks { (block + 1) * PAGE } else { 0 };
            self.word(block * PAGE, next);
            self.word(block * PAGE + 8, 1);
            let one = file("memfd-v2", structure, index);
            self.put(block * PAGE + 16, zerocopy::IntoBytes::as_bytes(&one));
            self.preserve(block, 0);
            self.preserve(structure, 0);
        }
        self.word(session(2) + 64, first * PAGE);
        self.word(session(2) + 72, block::MAX_BLOCKS as u64);
        replant(self);
    }
}
