//! Looks for the root FDT in memory of which nothing is known.

use abi::Memory;
use abi::fdt;
use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use pages::PageRange;

use super::unpack::Patience;

/// How much is looked at at a time.
const CHUNK: usize = 1 << 20;
/// Candidates whose addresses are kept. The others are counted.
const MOST: usize = 1 << 16;
/// Addresses that are kept of what boot parameters name.
const MOST_NAMED: usize = 16;
/// Type and length of the node by which a boot loader on x86 tells the next kernel of the root FDT.
const SETUP_DATA: [u32; 2] = [10, 32];

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Addresses of pages that begin with a device tree of some version of Kexec Handover.
    pub(super) candidates: Vec<u64>,
    /// How many there are.
    pub(super) count: u64,
    /// Addresses that the parameters of a kernel name as one.
    pub(super) named: Vec<u64>,
}

/// Looks at all of these runs of the memory.
pub(super) fn search(memory: &dyn Memory, runs: Vec<PageRange>) -> Found {
    let mut found = Found::default();
    let all: u64 = runs.iter().map(|run| run.len_bytes()).sum();
    let (mut patience, mut done) = (Patience::new(), 0);
    let mut chunk = vec![0; CHUNK];
    for run in runs {
        let (mut at, end) = (run.start().address(), run.start().address().saturating_add(run.len_bytes()));
        while at < end {
            let len = usize::try_from(end - at).map_or(CHUNK, |left| left.min(CHUNK));
            let part = &mut chunk[..len];
            match memory.read(at, part) {
                Ok(()) => look(at, part, &mut found),
                Err(_) => by_page(memory, at, part, &mut found),
            }
            at += len as u64;
            done += len as u64;
            patience.at("looking for the root FDT", done, all);
        }
    }
    found
}

/// A part of which not every page can be read.
fn by_page(memory: &dyn Memory, at: u64, part: &mut [u8], found: &mut Found) {
    for (page, address) in part.chunks_mut(PAGE_BYTES).zip((at..).step_by(PAGE_BYTES)) {
        if memory.read(address, page).is_ok() {
            look(address, page, found);
        }
    }
}

fn look(at: u64, part: &[u8], found: &mut Found) {
    for (page, address) in part.chunks(PAGE_BYTES).zip((at..).step_by(PAGE_BYTES)) {
        let magic = page.starts_with(&fdt::MAGIC.to_be_bytes());
        let is_root = magic && fdt::compatible(page).is_some_and(|name| name.starts_with(b"kho-v"));
        if is_root {
            found.count += 1;
            if found.candidates.len() < MOST {
                found.candidates.push(address);
            }
        }
        name(page, found);
    }
}

/// Notes what a node of boot parameters in the page names.
fn name(page: &[u8], found: &mut Found) {
    let (cells, _) = page.as_chunks::<4>();
    let wanted = SETUP_DATA.map(u32::to_le_bytes);
    for (index, _) in cells.windows(2).enumerate().filter(|(_, pair)| **pair == wanted) {
        let number = |offset: usize| {
            let bytes = page.get(index * 4 + offset..)?.first_chunk::<8>()?;
            Some(u64::from_le_bytes(*bytes))
        };
        if let (Some(address), Some(PAGE_SIZE)) = (number(8), number(16))
            && found.named.len() < MOST_NAMED
            && !found.named.contains(&address)
        {
            found.named.push(address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_fdt_is_found_and_one_that_a_kernel_is_told_of_is_known() {
        let mut memory = vec![0; 5 << 20];
        let page = abi::kho::RootFdt { map: 4096, subtrees: Vec::new() }.encode().unwrap();
        for at in [3 * 4096, (4 << 20) + 8192] {
            memory[at..at + page.len()].copy_from_slice(&page);
        }
        // Not at the beginning of a page.
        memory[(2 << 20) + 64..][..page.len()].copy_from_slice(&page);
        let mut node = SETUP_DATA.map(u32::to_le_bytes).concat();
        node.extend(((4u64 << 20) + 8192).to_le_bytes());
        node.extend(4096u64.to_le_bytes());
        memory[(1 << 20) + 8..][..node.len()].copy_from_slice(&node);
        let found = search(&memory, memory.runs());
        assert_eq!(found.candidates, [3 * 4096, (4 << 20) + 8192]);
        assert_eq!(found.named, [(4 << 20) + 8192]);
    }
}
