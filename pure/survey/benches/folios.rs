//! How long it takes to make out a memfd of 1 GiB in single pages: 262,144 folio records, in scattered frames and in adjacent
//! ones. `cargo bench -p tideover-survey`.
#![expect(clippy::unwrap_used, reason = "a bench that fails is of no use")]

use std::time::Duration;
use std::time::Instant;

use abi::MemoryMut as _;
use abi::block;
use abi::flb;
use abi::folio;
use abi::folio::Folio;
use abi::kho::RootFdt;
use abi::kho::Subtree;
use abi::kho::SubtreeName;
use abi::luo;
use abi::memfd::MemfdSer;
use abi::radix;
use abi::radix::Key;
use abi::vmalloc::CHUNK_BLOCKS;
use abi::vmalloc::Descriptor;
use pages::Order;
use pages::PageRange;
use pages::Pfn;
use tideover_survey::Options;
use tideover_survey::Root;
use tideover_survey::Survey;
use zerocopy::IntoBytes as _;

const PAGE: u64 = 4096;
const FOLIOS: u64 = 1 << 18;
/// First page of the records, of the tree's nodes and of the folios.
const RECORDS: u64 = 16;
const NODES: u64 = 2048;
const FRAMES: u64 = 4096;
const RUNS: usize = 10;

/// Memory whose frames from [`FRAMES`] on are there and hold nothing.
struct Sparse(Vec<u8>);

impl abi::Memory for Sparse {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), abi::NoMemory> {
        if address >= FRAMES * PAGE {
            into.fill(0);
            return Ok(());
        }
        self.0.read(address, into)
    }

    fn runs(&self) -> Vec<PageRange> {
        PageRange::new(Pfn::ZERO, FRAMES + 2 * FOLIOS).into_iter().collect()
    }
}

fn state(step: u64) -> Sparse {
    let mut memory = vec![0; usize::try_from(FRAMES * PAGE).unwrap()];
    let mut preserved: Vec<u64> = vec![1, 2, 3, 4, 5, 6];
    let frame = |index: u64| FRAMES + index * step;
    let folios: Vec<Folio> = (0..FOLIOS)
        .map(|index| {
            let frames = PageRange::page(Pfn::new(frame(index)).unwrap());
            Folio { index, frames, flags: 3 }
        })
        .collect();
    let bytes = folio::encode(&folios);
    memory.write(RECORDS * PAGE, &bytes).unwrap();
    let pages = bytes.len() as u64 / PAGE;
    for page in 0..pages {
        let chunk = 6 + page / CHUNK_BLOCKS as u64;
        let slot = page % CHUNK_BLOCKS as u64;
        memory.write(chunk * PAGE + 8 + 8 * slot, &((RECORDS + page) * PAGE).to_le_bytes()).unwrap();
        preserved.push(RECORDS + page);
    }
    let chunks = pages / CHUNK_BLOCKS as u64 + 1;
    for chunk in 0..chunks - 1 {
        memory.write((6 + chunk) * PAGE, &((7 + chunk) * PAGE).to_le_bytes()).unwrap();
    }
    preserved.extend(7..6 + chunks);
    preserved.extend((0..FOLIOS).map(frame));
    let memfd = MemfdSer {
        pos: 0.into(),
        size: (FOLIOS * PAGE).into(),
        seals: 1.into(),
        flags: 0.into(),
        nr_folios: FOLIOS.into(),
        folios: Descriptor::plain(6 * PAGE, u32::try_from(pages).unwrap()),
    };
    memory.write(5 * PAGE, memfd.as_bytes()).unwrap();
    let file = luo::File { compatible: luo::Compatible::literal("memfd-v2"), data: 5 * PAGE, token: 1 };
    let session = luo::Session { name: luo::SessionName::literal("vm"), files: vec![file] };
    memory.write(4 * PAGE, &block::encode(&[file.entry()], &[4 * PAGE])[0]).unwrap();
    memory.write(3 * PAGE, &block::encode(&[session.entry(4 * PAGE)], &[3 * PAGE])[0]).unwrap();
    // The page of shared objects lies behind the chunks.
    let flbs = 15;
    preserved.push(flbs);
    memory.write(flbs * PAGE, &flb::encode(&[])).unwrap();
    memory.write(2 * PAGE, luo::LuoSer::new(1, 3 * PAGE, flbs * PAGE).as_bytes()).unwrap();
    let subtrees = vec![Subtree { name: SubtreeName::literal("LUO"), data: 2 * PAGE, size: 32 }];
    let fdt = RootFdt { map: NODES * PAGE, subtrees }.encode().unwrap();
    memory.write(PAGE, &fdt).unwrap();
    plant(&mut memory, &preserved);
    Sparse(memory)
}

/// Writes the tree of single pages.
fn plant(memory: &mut Vec<u8>, preserved: &[u64]) {
    let mut next = NODES + 1;
    for page in preserved {
        let key = Key::of(Pfn::new(*page).unwrap(), Order::PAGE);
        let mut at = NODES * PAGE;
        for level in (1..=radix::LEVELS).rev() {
            let slot = at + 8 * key.slot(level) as u64;
            let mut word = [0; 8];
            abi::Memory::read(memory, slot, &mut word).unwrap();
            at = u64::from_le_bytes(word);
            if at == 0 {
                at = next * PAGE;
                next += 1;
                memory.write(slot, &at.to_le_bytes()).unwrap();
            }
        }
        let (word, bit) = key.leaf_bit();
        let slot = at + 8 * word as u64;
        let mut word = [0; 8];
        abi::Memory::read(memory, slot, &mut word).unwrap();
        let word = u64::from_le_bytes(word) | 1 << bit;
        memory.write(slot, &word.to_le_bytes()).unwrap();
    }
}

fn main() {
    for (name, step) in [("adjacent frames", 1), ("scattered frames", 2)] {
        let memory = state(step);
        let mut took: Vec<Duration> = (0..RUNS)
            .map(|_| {
                let begin = Instant::now();
                let survey = Survey::read(&memory, &Root::Fdt(PAGE), Options::default());
                let took = begin.elapsed();
                assert_eq!(survey.findings, []);
                assert_eq!(survey.luo.unwrap().sessions[0].files[0].folios, Some(FOLIOS));
                took
            })
            .collect();
        took.sort_unstable();
        println!(
            "{FOLIOS} folios, {name}: median {:?}, best {:?}, worst {:?}",
            took[RUNS / 2],
            took[0],
            took[RUNS - 1]
        );
    }
}
