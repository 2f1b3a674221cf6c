//! What the VMM writes and sets so that a vCPU starts in the program.
//!
//! An [`Image`] is all that must be in memory (*pieces*; everything else must read zero) and all that
//! must be in the vCPUs ([`Start`]). Each starts in 64-bit mode at privilege level 3, at the first
//! instruction of the program; no vCPU starts another. Accessed, dirty and busy bits are set from the start, so that neither the processor
//! nor KVM has a reason to write to a fixed page.

use iced_x86::IcedError;
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, kvm_cpuid_entry2, kvm_dtable, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs,
    kvm_xcr, kvm_xcrs,
};
use thiserror::Error;

use crate::check::page_sum;
use crate::layout::{
    CODE_OFFSET, CODE_ROOM_BYTES, GDT_OFFSET, HUGE_PAGE_BYTES, IDT_OFFSET, LOW_PAGES, Layout, LayoutError,
    MAX_VCPUS, PAGE_BYTES, PD_OFFSET, PDPT_OFFSET, PML4_OFFSET, Slot, TSS_STRIDE, is_fixed,
};
use crate::mailbox::{first_words, word};
use crate::ports::PORTS;
use crate::program::{Program, Vectors};

/// Present, writable, user, accessed, dirty.
const TABLE_ENTRY: u64 = 0x67;
/// A leaf of 2 MiB.
const HUGE_LEAF: u64 = 0x80;

const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const USER_CODE: u16 = 0x18 | 3;
const USER_DATA: u16 = 0x20 | 3;
/// The first vCPU's; each has the next.
const TSS_SELECTOR: u16 = 0x28;
/// A TSS descriptor takes two entries.
const TSS_SELECTORS: u16 = 0x10;
/// Null, four segments, and the TSS descriptors.
const GDT_ENTRIES: u16 = 21;

/// Where the I/O permission bitmap begins in the TSS.
const BITMAP_OFFSET: u16 = 0x68;
/// Bytes of the bitmap: up to the last port that the guest uses, and the byte of ones that ends it.
const BITMAP_BYTES: u16 = last_port() / 8 + 2;
const TSS_BYTES: u16 = BITMAP_OFFSET + BITMAP_BYTES;

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set. The I/O privilege level is the guest's own: QEMU's emulation of SVM does not find
/// the bitmap of a TSS that is busy, and a busy one is all that KVM takes. PVM in turn drops the level, and finds the bitmap.
const RFLAGS: u64 = 2 | 3 << 12;
const RFLAGS_IF: u64 = 1 << 9;
/// x87, SSE and AVX state.
const XCR0_AVX: u64 = 7;

/// What can be chosen about a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How many vCPUs it has: 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// The vectors its code works with.
    pub vectors: Vectors,
    /// Cycles of its clock in a millisecond (the TSC's frequency in kHz), or 0 if not known.
    pub cycles_per_ms: u64,
    /// Gaps at least this long, in cycles, are recorded as pauses.
    pub pause_threshold_cycles: u64,
    /// Whether interrupts are on (RFLAGS.IF). The guest expects none, and one that comes stops it;
    /// but KVM resolves missing pages in the background only for a vCPU that could take an interrupt.
    pub interrupts: bool,
}

impl Options {
    /// One vCPU, SSE2, pauses from half a millisecond on (none, if the clock's rate is 0), no interrupts.
    #[must_use]
    pub fn new(cycles_per_ms: u64) -> Self {
        Self {
            vcpus: 1,
            vectors: Vectors::Sse2,
            cycles_per_ms,
            pause_threshold_cycles: if cycles_per_ms == 0 { u64::MAX } else { cycles_per_ms.div_ceil(2) },
            interrupts: false,
        }
    }
}

impl Vectors {
    /// The widest vectors that a vCPU with this CPUID can work with.
    #[must_use]
    pub fn widest(cpuid: &[kvm_cpuid_entry2]) -> Self {
        let leaf = |function| cpuid.iter().find(|entry| entry.function == function && entry.index == 0);
        let xsave_and_avx = 1 << 26 | 1 << 28;
        let has_avx = leaf(1).is_some_and(|leaf| leaf.ecx & xsave_and_avx == xsave_and_avx);
        let has_avx2 = leaf(7).is_some_and(|leaf| leaf.ebx & 1 << 5 != 0);
        let has_state = leaf(0xd).is_some_and(|leaf| u64::from(leaf.eax) & XCR0_AVX == XCR0_AVX);
        if has_avx && has_avx2 && has_state { Self::Avx2 } else { Self::Sse2 }
    }
}

/// Why [`Image::new`] refused.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The memory does not fit the guest.
    #[error("the guest cannot be laid out")]
    Layout(#[source] LayoutError),
    /// The assembler refused an instruction.
    #[error("the guest's code could not be assembled")]
    Assemble(#[source] IcedError),
    /// The code is longer than the room for it.
    #[error("the guest's code takes {code_bytes} bytes, and there is room for {room_bytes}")]
    CodeTooLong {
        /// Length of the code in bytes.
        code_bytes: usize,
        /// Room for it in bytes.
        room_bytes: u64,
    },
}

/// A guest, ready to be written into memory and its vCPUs.
#[derive(Clone, Debug)]
pub struct Image {
    /// One per vCPU, not empty.
    layouts: Vec<Layout>,
    options: Options,
    entry: u64,
    pieces: Vec<(u64, Vec<u8>)>,
}

/// What one vCPU starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    layout: Layout,
    options: Options,
    entry: u64,
}

impl Image {
    /// A guest in a memory of this size, which must be a multiple of 2 MiB from 4 MiB to 64 GiB.
    ///
    /// # Errors
    ///
    /// [`ImageError::Layout`] for another size or number of vCPUs; the others would be faults of this crate.
    pub fn new(memory_bytes: u64, options: &Options) -> Result<Self, ImageError> {
        let layouts = Layout::split(memory_bytes, options.vcpus).map_err(ImageError::Layout)?;
        let program = Program::assemble(options.vectors).map_err(ImageError::Assemble)?;
        let code_bytes = program.bytes.len();
        if u64::try_from(code_bytes).is_ok_and(|len| len > CODE_ROOM_BYTES) {
            return Err(ImageError::CodeTooLong { code_bytes, room_bytes: CODE_ROOM_BYTES });
        }
        let mut pieces = vec![
            (GDT_OFFSET, words(&gdt(&layouts))),
            (IDT_OFFSET, words(&idt(&program.handlers))),
            (CODE_OFFSET, program.bytes),
        ];
        pieces.extend(layouts.iter().map(|layout| (layout.tss_offset(), tss(layout))));
        pieces.extend(page_tables(&crate::slots(memory_bytes)));
        let sums = fixed_sums(&pieces);
        let mailbox = |layout: &Layout| (layout.mailbox_offset(), mailbox_page(layout, options, &sums));
        pieces.extend(layouts.iter().map(mailbox));
        Ok(Self { layouts, options: *options, entry: program.entry, pieces })
    }

    /// Where things lie: one layout per vCPU.
    #[must_use]
    pub fn layouts(&self) -> &[Layout] {
        &self.layouts
    }

    /// What each vCPU starts with, in their order.
    pub fn starts(&self) -> impl ExactSizeIterator<Item = Start> {
        let (options, entry) = (self.options, self.entry);
        self.layouts.iter().map(move |&layout| Start { layout, options, entry })
    }

    /// What must stand in memory before a vCPU runs: offset in the memory and bytes. Memory outside
    /// of the pieces must read zero.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.pieces.iter().map(|(offset, bytes)| (*offset, bytes.as_slice()))
    }
}

impl Start {
    /// Where things lie for this vCPU.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The state of activity to start with: it runs. A vCPU with an interrupt controller would wait to be
    /// started by another if this were not set.
    #[must_use]
    pub fn mp_state(&self) -> kvm_mp_state {
        kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }
    }

    /// The general registers to start with.
    #[must_use]
    pub fn regs(&self) -> kvm_regs {
        kvm_regs {
            rip: self.entry,
            rsp: self.layout.user_stack_top(),
            rflags: if self.options.interrupts { RFLAGS | RFLAGS_IF } else { RFLAGS },
            ..kvm_regs::default()
        }
    }

    /// The special registers to start with, made from those the vCPU has. The vCPU's CPUID must be
    /// set before.
    #[must_use]
    pub fn sregs(&self, current: kvm_sregs) -> kvm_sregs {
        let mut sregs = current;
        sregs.cs = segment(USER_CODE, 0xb);
        sregs.cs.l = 1;
        sregs.cs.db = 0;
        let data = segment(USER_DATA, 3);
        sregs.ss = data;
        sregs.ds = data;
        sregs.es = data;
        sregs.fs = data;
        sregs.gs = data;
        sregs.gs.base = self.layout.mailbox_offset();
        sregs.tr = kvm_segment {
            base: self.layout.tss_offset(),
            limit: u32::from(TSS_BYTES) - 1,
            selector: tss_selector(&self.layout),
            type_: 0xb,
            present: 1,
            ..kvm_segment::default()
        };
        sregs.ldt = kvm_segment { unusable: 1, ..kvm_segment::default() };
        sregs.gdt = kvm_dtable { base: GDT_OFFSET, limit: 8 * GDT_ENTRIES - 1, ..kvm_dtable::default() };
        sregs.idt = kvm_dtable { base: IDT_OFFSET, limit: 0xfff, ..kvm_dtable::default() };
        sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
        sregs.cr2 = 0;
        sregs.cr3 = PML4_OFFSET;
        sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
        if self.options.vectors == Vectors::Avx2 {
            sregs.cr4 |= CR4_OSXSAVE;
        }
        sregs.cr8 = 0;
        sregs.efer = EFER_LME | EFER_LMA;
        sregs
    }

    /// The extended control registers to start with, made from those the vCPU has. Only a guest with
    /// [`Vectors::Avx2`] needs them set; for another they come back as they are.
    #[must_use]
    pub fn xcrs(&self, current: kvm_xcrs) -> kvm_xcrs {
        let mut xcrs = current;
        if self.options.vectors == Vectors::Avx2 {
            xcrs.nr_xcrs = 1;
            xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: XCR0_AVX, ..kvm_xcr::default() };
        }
        xcrs
    }
}

/// A flat segment for privilege level 3.
fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..kvm_segment::default()
    }
}

/// One vCPU's: a TSS is busy as long as one has it.
fn tss_selector(layout: &Layout) -> u16 {
    TSS_SELECTOR + TSS_SELECTORS * u16::try_from(layout.vcpu()).unwrap_or_default()
}

fn gdt(layouts: &[Layout]) -> Vec<u64> {
    let kernel_code = 0x00af_9b00_0000_ffff;
    let kernel_data = 0x00cf_9300_0000_ffff;
    let user_code = 0x00af_fb00_0000_ffff;
    let user_data = 0x00cf_f300_0000_ffff;
    let mut gdt = vec![0; usize::from(GDT_ENTRIES)];
    gdt[usize::from(KERNEL_CODE / 8)] = kernel_code;
    gdt[usize::from(KERNEL_DATA / 8)] = kernel_data;
    gdt[usize::from(USER_CODE / 8)] = user_code;
    gdt[usize::from(USER_DATA / 8)] = user_data;
    for layout in layouts {
        // Present, 64-bit TSS, busy.
        let tss = u64::from(TSS_BYTES - 1) | layout.tss_offset() << 16 | 0x8b << 40;
        gdt[usize::from(tss_selector(layout) / 8)] = tss;
    }
    gdt
}

/// Interrupt gates to privilege level 0 for these handlers, which lie below 4 GiB.
fn idt(handlers: &[u64]) -> Vec<u64> {
    let gate = |handler: &u64| {
        let low = handler & 0xffff;
        let high = (handler >> 16) & 0xffff;
        let selector = u64::from(KERNEL_CODE) << 16;
        [low | selector | 0x8e << 40 | high << 48, 0]
    };
    handlers.iter().flat_map(gate).collect()
}

const fn last_port() -> u16 {
    let mut last = 0;
    let mut index = 0;
    while index < PORTS.len() {
        let (port, len) = PORTS[index];
        if port + len - 1 > last {
            last = port + len - 1;
        }
        index += 1;
    }
    last
}

/// A TSS with the stack for privilege level 0, and a bitmap that allows the guest's ports alone.
fn tss(layout: &Layout) -> Vec<u8> {
    let mut tss = vec![0; usize::from(TSS_BYTES)];
    tss[4..12].copy_from_slice(&layout.kernel_stack_top().to_le_bytes());
    tss[0x66..0x68].copy_from_slice(&BITMAP_OFFSET.to_le_bytes());
    let bitmap = &mut tss[usize::from(BITMAP_OFFSET)..];
    bitmap.fill(0xff);
    for port in PORTS.into_iter().flat_map(|(port, len)| port..port + len) {
        bitmap[usize::from(port / 8)] &= !(1 << (port % 8));
    }
    tss
}

/// Tables that map every linear address below the memory's size to the guest-physical address at
/// which the slots have that offset.
fn page_tables(slots: &[Slot]) -> Vec<(u64, Vec<u8>)> {
    let leaves: Vec<u64> = slots
        .iter()
        .flat_map(|slot| {
            let end = slot.guest_address + slot.len_bytes;
            (slot.guest_address..end).step_by(1 << 21)
        })
        .map(|address| address | TABLE_ENTRY | HUGE_LEAF)
        .collect();
    let directories = leaves.chunks(512);
    let pdpt: Vec<u64> =
        (0..).take(directories.len()).map(|gib: u64| (PD_OFFSET + gib * PAGE_BYTES) | TABLE_ENTRY).collect();
    let mut pieces = vec![(PML4_OFFSET, words(&[PDPT_OFFSET | TABLE_ENTRY])), (PDPT_OFFSET, words(&pdpt))];
    let offsets = (PD_OFFSET..).step_by(4096);
    pieces.extend(offsets.zip(directories.map(words)));
    pieces
}

fn mailbox_page(layout: &Layout, options: &Options, sums: &[u64]) -> Vec<u8> {
    let mut page = vec![0; 4096];
    let chosen = [
        (word::VCPUS, options.vcpus.into()),
        (word::CYCLES_PER_MS, options.cycles_per_ms),
        (word::VECTOR_BYTES, options.vectors.bytes()),
        (word::PAUSE_THRESHOLD, options.pause_threshold_cycles),
    ];
    for (offset, value) in first_words(layout, sums).into_iter().chain(chosen) {
        put(&mut page, offset, &value.to_le_bytes());
    }
    page
}

/// The sums of all pages below the work area, of a memory that holds these pieces.
fn fixed_sums(pieces: &[(u64, Vec<u8>)]) -> Vec<u64> {
    let mut low = vec![0; 1 << 20];
    for (offset, bytes) in pieces {
        put(&mut low, *offset, bytes);
    }
    (0..LOW_PAGES)
        .zip(low.chunks_exact(4096))
        .map(|(page, bytes)| if is_fixed(page) { page_sum(page, bytes) } else { 0 })
        .collect()
}

fn put(into: &mut [u8], offset: u64, bytes: &[u8]) {
    let room = usize::try_from(offset).ok().and_then(|offset| into.get_mut(offset..offset + bytes.len()));
    if let Some(room) = room {
        room.copy_from_slice(bytes);
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

const _: () = assert!(GDT_ENTRIES as u32 == 5 + 2 * MAX_VCPUS);
const _: () = assert!(TSS_BYTES as u64 <= TSS_STRIDE);
const _: () = assert!(HUGE_PAGE_BYTES == 1 << 21 && PAGE_BYTES == 4096);
const _: () = assert!(crate::layout::WORK_OFFSET == 1 << 20);

#[cfg(test)]
mod tests;
