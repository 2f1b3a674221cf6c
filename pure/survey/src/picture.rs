//! Who has which preserved memory: summed up by owner, by run and by cell of a map, however much it is.

use alloc::collections::BTreeMap;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::mem;

use abi::NoMemory;
use abi::holds;
use abi::radix::Key;
use pages::Order;
use pages::PAGE_SIZE;
use pages::PageRange;

use crate::findings::Findings;
use crate::marks::Marks;
use crate::model::Cell;
use crate::model::Map;
use crate::model::Owner;
use crate::model::OwnerKind;
use crate::model::Range;
use crate::model::Run;
use crate::model::Unreferenced;

/// Ranges that are listed.
const RANGES: usize = 4096;
/// Steps that claims may take beside four for each page.
const SPARE_STEPS: u64 = 1 << 20;
/// Steps that they may take at most, as of memory whose length is not known.
const MOST_STEPS: u64 = 1 << 34;
/// Cells of the map, at most.
const CELLS: u64 = 1024;
/// Unreferenced runs that are listed apart.
const FIRST: usize = 16;
/// Owners whose share of a cell is counted; the first ones that have some of it.
const SHARES: usize = 8;

/// A run that may grow.
#[derive(Clone, Copy)]
struct Growing {
    owner: Option<usize>,
    order: Order,
    range: PageRange,
}

#[derive(Default)]
struct CellSum {
    bytes: u64,
    unreferenced: u64,
    order: u32,
    shares: Vec<(usize, u64)>,
}

pub(crate) struct Picture {
    pub(crate) marks: Marks,
    /// The tree was read, so that it is known what is preserved.
    pub(crate) known: bool,
    runs: Vec<PageRange>,
    pub(crate) owners: Vec<Owner>,
    ranges: Vec<Range>,
    left_out: u64,
    growing: Option<Growing>,
    cell_bytes: u64,
    cells: BTreeMap<u64, CellSum>,
    /// Steps that claims may still take in all: a good state takes one for each block.
    steps: u64,
    /// Pages of lists that may still be read: no page is in two lists, so a good state has no more than memory.
    list_pages: u64,
    /// Pages of structures that were read.
    read: BTreeSet<u64>,
}

impl Picture {
    /// Says that a structure at this address is to be read, and what it names; false if one in this page was. No two
    /// structures share a page, and a state whose structures do could have a reader go through one list a million times.
    pub(crate) fn enter(&mut self, findings: &mut Findings, owner: usize, address: u64) -> bool {
        let first = self.read.insert(address / PAGE_SIZE);
        if !first {
            let words = "the structure's page is another file's, too: it is not read again";
            findings.add("referred-twice", &self.label(owner), Some(address), Some("data"), words);
        }
        first
    }

    /// Says that so many pages of a list were met; false if that is more than there can be.
    pub(crate) fn spend(&mut self, findings: &mut Findings, owner: usize, pages: u64) -> bool {
        let can = self.can_spend(findings, owner, pages);
        self.list_pages = self.list_pages.saturating_sub(pages);
        can
    }

    /// False if so many pages of a list are more than there can be.
    pub(crate) fn can_spend(&mut self, findings: &mut Findings, owner: usize, pages: u64) -> bool {
        let can = pages <= self.list_pages;
        if !can {
            let label = self.label(owner);
            findings
                .unread(format!("{label}: lists have more pages than there is memory; the rest is not read"));
        }
        can
    }

    pub(crate) fn new(runs: Vec<PageRange>) -> Self {
        let end = runs.last().map_or(0, |run| run.end()).max(1);
        let pages = end.div_ceil(CELLS).next_power_of_two();
        let all: u64 = runs.iter().map(|run| run.len_pages()).fold(0, u64::saturating_add);
        Self {
            steps: all.saturating_mul(4).saturating_add(SPARE_STEPS).min(MOST_STEPS),
            list_pages: all,
            read: BTreeSet::new(),
            marks: Marks::default(),
            known: false,
            runs,
            owners: Vec::new(),
            ranges: Vec::new(),
            left_out: 0,
            growing: None,
            cell_bytes: pages.saturating_mul(PAGE_SIZE),
            cells: BTreeMap::new(),
        }
    }

    pub(crate) fn owner(&mut self, kind: OwnerKind, label: String) -> usize {
        let by_order = BTreeMap::new();
        let owner = Owner { kind, label, session: None, file: None, bytes: 0, metadata_bytes: 0, by_order };
        self.owners.push(owner);
        self.owners.len() - 1
    }

    /// What the owner is called.
    pub(crate) fn label(&self, owner: usize) -> String {
        self.owners.get(owner).map_or_else(String::new, |owner| owner.label.clone())
    }

    /// An owner refers to the page that this address lies in.
    pub(crate) fn claim_page(&mut self, findings: &mut Findings, owner: usize, address: u64) {
        if let Ok(range) = PageRange::of_bytes(address & !(PAGE_SIZE - 1), PAGE_SIZE) {
            self.claim(findings, owner, range, true);
        }
    }

    /// An owner refers to the pages that these bytes lie in.
    pub(crate) fn claim_bytes(&mut self, findings: &mut Findings, owner: usize, address: u64, len: u64) {
        let first = address / PAGE_SIZE;
        let last = address.checked_add(len.max(1) - 1).map(|last| last / PAGE_SIZE);
        let range = last.and_then(|last| {
            let start = pages::Pfn::new(first).ok()?;
            PageRange::new(start, last - first + 1).ok()
        });
        match range {
            Some(range) => self.claim(findings, owner, range, true),
            None => self.absent(findings, owner, address, len),
        }
    }

    fn absent(&self, findings: &mut Findings, owner: usize, address: u64, len_bytes: u64) {
        let words = format!("{}", NoMemory { address, len_bytes });
        findings.add("address-in-range", &self.label(owner), Some(address), None, &words);
    }

    /// An owner refers to these pages; `metadata` if they only say where others are.
    pub(crate) fn claim(&mut self, findings: &mut Findings, owner: usize, range: PageRange, metadata: bool) {
        if !self.known {
            return;
        }
        if !holds(&self.runs, range) {
            self.absent(findings, owner, range.start().address(), range.len_bytes());
            return;
        }
        let (mut at, mut missing, mut twice) = (range.start().get(), None, None);
        while let Some(pfn) = pages::Pfn::new(at).ok().filter(|pfn| pfn.get() < range.end()) {
            self.steps = self.steps.saturating_sub(1);
            if self.steps == 0 {
                findings.unread(String::from(
                    "more is referred to than there can be: the rest is not accounted for",
                ));
                return;
            }
            let Some(key) = self.marks.covering(pfn) else {
                let next = self.marks.next(pfn).min(range.end());
                let (_, pages) = missing.get_or_insert((pfn.address(), 0));
                *pages += next - at;
                at = next;
                continue;
            };
            if self.marks.claim(key) {
                // Several may have a part of one block each.
                if range.covers(key.range()) {
                    twice.get_or_insert(key);
                }
            } else {
                self.count(owner, key, metadata);
            }
            at = key.range().end();
        }
        let label = self.label(owner);
        if let Some((address, pages)) = missing {
            let words = format!("{} bytes from {address:#x} on are not preserved", pages * PAGE_SIZE);
            findings.add("referred-preserved", &label, Some(address), None, &words);
        }
        if let Some(key) = twice {
            let (range, order) = (key.range(), key.order().get());
            let words = format!("the block of order {order} is referred to by something else, too");
            findings.add("referred-twice", &label, Some(range.start().address()), None, &words);
        }
    }

    fn count(&mut self, owner: usize, key: Key, metadata: bool) {
        let (range, order) = (key.range(), key.order());
        if let Some(owner) = self.owners.get_mut(owner) {
            owner.bytes = owner.bytes.saturating_add(range.len_bytes());
            owner.metadata_bytes += if metadata { range.len_bytes() } else { 0 };
            *owner.by_order.entry(order.get()).or_default() += 1;
        }
        self.grow(Some(owner), order, range);
    }

    /// Adds to the run that is growing, or begins another one.
    fn grow(&mut self, owner: Option<usize>, order: Order, range: PageRange) {
        if let Some(growing) = &mut self.growing {
            let adjacent = growing.range.end() == range.start().get();
            if growing.owner == owner && growing.order == order && adjacent {
                let pages = growing.range.len_pages().saturating_add(range.len_pages());
                if let Ok(longer) = PageRange::new(growing.range.start(), pages) {
                    growing.range = longer;
                    return;
                }
            }
        }
        self.flush();
        self.growing = Some(Growing { owner, order, range });
    }

    /// Ends the run that is growing.
    fn flush(&mut self) {
        let Some(Growing { owner, order, range }) = self.growing.take() else { return };
        self.paint(owner, order, range);
        if self.ranges.len() == RANGES {
            self.left_out += 1;
            return;
        }
        let (address, bytes) = (range.start().address(), range.len_bytes());
        self.ranges.push(Range { address, bytes, order: order.get(), owner });
    }

    fn paint(&mut self, owner: Option<usize>, order: Order, range: PageRange) {
        let (mut at, end) =
            (range.start().address(), range.start().address().saturating_add(range.len_bytes()));
        // What a hostile tree preserves beyond memory has no place on the map.
        let last = self.runs.last().map_or(0, |run| run.end().saturating_mul(PAGE_SIZE));
        let end = end.min(last);
        while at < end {
            let index = at / self.cell_bytes;
            let next = (index + 1).saturating_mul(self.cell_bytes).min(end);
            let cell = self.cells.entry(index).or_default();
            let bytes = next - at;
            cell.bytes += bytes;
            cell.order = cell.order.max(order.get());
            match owner {
                None => cell.unreferenced += bytes,
                Some(owner) => {
                    let known = cell.shares.iter().any(|(other, _)| *other == owner);
                    if !known && cell.shares.len() < SHARES {
                        cell.shares.push((owner, 0));
                    }
                    let share = cell.shares.iter_mut().find(|(other, _)| *other == owner);
                    share.into_iter().for_each(|(_, share)| *share += bytes);
                }
            }
            at = next;
        }
    }

    /// What nothing refers to. Call it when everything was claimed.
    pub(crate) fn unreferenced(&mut self, findings: &mut Findings) -> Unreferenced {
        let mut found = Unreferenced { perhaps_by_unread: findings.lost, ..Unreferenced::default() };
        let mut run: Option<(Order, PageRange)> = None;
        // It is asked for nothing any more.
        for key in mem::take(&mut self.marks).unclaimed() {
            let (order, range) = (key.order(), key.range());
            if let Some((last_order, last)) = &mut run {
                let pages = last.len_pages().saturating_add(range.len_pages());
                let adjacent = *last_order == order && last.end() == range.start().get();
                if let (true, Ok(longer)) = (adjacent, PageRange::new(last.start(), pages)) {
                    *last = longer;
                    continue;
                }
            }
            if let Some((order, range)) = run.replace((order, range)) {
                self.leave(findings, &mut found, order, range);
            }
        }
        if let Some((order, range)) = run {
            self.leave(findings, &mut found, order, range);
        }
        found
    }

    fn leave(&mut self, findings: &mut Findings, found: &mut Unreferenced, order: Order, range: PageRange) {
        let (address, bytes) = (range.start().address(), range.len_bytes());
        found.bytes = found.bytes.saturating_add(bytes);
        found.blocks += range.len_pages() / order.len_pages();
        found.runs += 1;
        if found.first.len() < FIRST {
            found.first.push(Run { index: 0, address, bytes });
        }
        if !found.perhaps_by_unread {
            let words = format!("{bytes} bytes are preserved, and nothing refers to them");
            findings.add("preserved-referred", "preserved memory", Some(address), None, &words);
        }
        self.grow(None, order, range);
    }

    /// What the picture has come to.
    pub(crate) fn finish(mut self) -> (Vec<Owner>, Vec<Range>, u64, Map) {
        self.flush();
        self.ranges.sort_unstable_by_key(|range| (range.address, range.bytes));
        let used = self.cells.iter().map(|(index, sum)| Cell {
            index: *index,
            bytes: sum.bytes,
            unreferenced_bytes: sum.unreferenced,
            owner: sum.shares.iter().max_by_key(|(_, bytes)| *bytes).map(|(owner, _)| *owner),
            order: sum.order,
        });
        let end = self.runs.last().map_or(0, |run| run.end());
        let cells = end.div_ceil(self.cell_bytes / PAGE_SIZE);
        let map = Map { cell_bytes: self.cell_bytes, cells, used: used.collect() };
        (self.owners, self.ranges, self.left_out, map)
    }
}
