//! Frame 0 of an arena, and its table of regions.

use alloc::format;
use alloc::string::ToString as _;
use alloc::vec::Vec;

use abi::Malformed;
use abi::Memory;
use abi::NoMemory;
use abi::Problem;
use abi::arena::Header;
use abi::arena::OWNERSHIP_ADDRESS;
use abi::arena::OwnershipState;
use abi::arena::OwnershipWord;
use abi::arena::RootSlot;
use abi::arena::SLOT_ADDRESSES;
use abi::kho;
use abi::regions;
use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;

use crate::findings::Findings;
use crate::model::Arena;
use crate::model::Ownership;
use crate::model::Region;
use crate::model::Slot;
use crate::view::View;

const SUBJECT: &str = "arena";

/// Reads frame 0; also gives the address of the root FDT that counts.
pub(crate) fn read(memory: &impl Memory, findings: &mut Findings) -> (Arena, Option<u64>) {
    let mut arena = Arena::default();
    match Header::read(memory) {
        Ok(header) => {
            arena.identity = Some(header.identity().to_string());
            arena.region0_bytes = Some(header.frames() * PAGE_SIZE);
            let there = memory.runs().first().map_or(0, |run| run.len_pages());
            let found = header.frames();
            if found > there {
                let problem = Problem::TooLarge { found, limit: there };
                let (format, field) = ("tideover-arena-v1", "frames");
                findings.fault(SUBJECT, &Malformed { format, address: 0, field, problem });
            }
        }
        Err(fault) => findings.fault(SUBJECT, &fault),
    }
    let counts = RootSlot::read(memory);
    if let Err(fault) = &counts {
        findings.fault(SUBJECT, fault);
    }
    let counts = counts.ok();
    for address in SLOT_ADDRESSES {
        if let Ok(slot) = RootSlot::read_at(memory, address) {
            arena.slots.push(Slot {
                address,
                valid: slot.is_valid(),
                counts: counts == Some(slot),
                generation: slot.generation(),
                fdt_address: slot.fdt(),
            });
        }
    }
    let mut word = [0; 8];
    let unreadable = |none: NoMemory| Malformed {
        format: "tideover-arena-v1",
        address: OWNERSHIP_ADDRESS,
        field: "state",
        problem: Problem::Unreadable(none),
    };
    let word = memory.read(OWNERSHIP_ADDRESS, &mut word).map_err(unreadable).map(|()| word);
    match word.and_then(|word| OwnershipWord::from_bits(u64::from_le_bytes(word))) {
        Ok(word) => {
            let state = match word.state() {
                OwnershipState::Running => "running",
                OwnershipState::Sealed => "sealed",
                OwnershipState::Claimed => "claimed",
                OwnershipState::Recovering => "recovering",
            };
            let (epoch, nonce) = (word.epoch(), word.nonce().get());
            arena.ownership = Some(Ownership { epoch, state: state.to_string(), nonce });
        }
        Err(fault) => findings.fault(SUBJECT, &fault),
    }
    (arena, counts.map(|slot| slot.fdt()))
}

/// Reads the table of regions, and gives the memory that it says is there.
pub(crate) fn regions<'a, M: Memory>(
    memory: &'a M,
    arena: &mut Arena,
    draft: &kho::Draft,
    findings: &mut Findings,
) -> View<'a, M> {
    const TABLE: &str = "table of regions";
    let table = draft.subtrees.iter().find(|subtree| subtree.name == regions::SUBTREE.bytes());
    let unknown = format!("{TABLE}: without it, it is not known where guest memory lies");
    let Some(address) = table.and_then(|table| table.data) else {
        findings.unread(unknown);
        return View::with_runs(memory, anywhere());
    };
    let mut on_fault = |fault| {
        findings.fault(TABLE, &fault);
        Ok(())
    };
    match regions::read_on(memory, address, &mut on_fault) {
        Ok(table) => {
            arena.regions = table
                .entries
                .iter()
                .enumerate()
                .map(|(index, entry)| Region {
                    address: entry.range.start().address(),
                    bytes: entry.range.len_bytes(),
                    page_bytes: entry.page_bytes,
                    store: entry.store.to_string(),
                    policy: entry.policy.to_string(),
                    file: entry.file,
                    readable: index == 0,
                })
                .collect();
        }
        Err(fault) => {
            findings.fault(TABLE, &fault);
            findings.unread(unknown);
            return View::with_runs(memory, anywhere());
        }
    }
    View::with_runs(memory, runs_of(memory, arena))
}

/// All of the address space: what is to be taken for memory where it is not known what is.
fn anywhere() -> Vec<PageRange> {
    PageRange::new(Pfn::ZERO, 1 << pages::PFN_BITS).into_iter().collect()
}

/// Region 0 as the header has it, or as it is there.
fn runs_of(memory: &impl Memory, arena: &Arena) -> Vec<PageRange> {
    let there = memory.runs().first().map_or(0, |run| run.len_pages());
    let said = arena.region0_bytes.map_or(there, |bytes| bytes / PAGE_SIZE);
    let region0 = PageRange::new(Pfn::ZERO, said.min(there)).into_iter();
    region0.chain(guest_memory(arena)).collect()
}

/// The pages of all regions.
pub(crate) fn runs(arena: &Arena) -> Vec<PageRange> {
    let region0 = PageRange::of_bytes(0, arena.region0_bytes.unwrap_or_default()).into_iter();
    region0.chain(guest_memory(arena)).collect()
}

fn guest_memory(arena: &Arena) -> impl Iterator<Item = PageRange> + '_ {
    arena.regions.iter().skip(1).filter_map(|region| PageRange::of_bytes(region.address, region.bytes).ok())
}
