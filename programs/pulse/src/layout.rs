//! Where things lie in the guest's memory.
//!
//! The guest sees its memory as one flat range from linear address 0, and a linear address is the
//! *offset* of the byte in the guest's memory file. Guest-physical addresses follow the PC: what
//! does not fit below 3 GiB lies from 4 GiB on, in a second [`Slot`]. The page tables join the two.
//!
//! | offset | what |
//! | --- | --- |
//! | `0x00000` | unused, zero: a lost pointer lands here |
//! | `0x01000` | GDT |
//! | `0x02000` | IDT, 256 gates |
//! | `0x03000` | TSSs with the I/O permission bitmap, one per vCPU |
//! | `0x08000` | mailboxes, one page per vCPU (room for eight) |
//! | `0x10000` | stacks, two pages per vCPU: privilege level 3, then 0 |
//! | `0x20000` | code |
//! | `0x30000` | page tables: PML4, PDPT, one PD per GiB |
//! | `0x80000` | the shared page: one word that all vCPUs count up |
//! | `0x100000` | work area, to the end of memory |
//!
//! All of the first MiB but mailboxes, stacks and the shared page is *fixed*: it never changes while the guest lives.
//!
//! Each vCPU walks a share of the work area of its own: whole pages, one share after the other.

use core::ops::Range;

use thiserror::Error;

/// The small page, in bytes: the unit of the cursor and of all checks.
pub const PAGE_BYTES: u64 = 4096;
/// The page that the guest's page tables use, in bytes. Every memory size is a multiple of it.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// Words in a chunk: what the guest verifies, and then writes, between two looks at the clock.
pub const CHUNK_WORDS: u64 = 64;
/// A chunk in bytes.
pub const CHUNK_BYTES: u64 = CHUNK_WORDS * 8;
/// The smallest memory, in bytes.
pub const MIN_MEMORY_BYTES: u64 = 4 << 20;
/// The largest memory, in bytes.
pub const MAX_MEMORY_BYTES: u64 = 64 << 30;
/// Where the mailbox of vCPU 0 lies.
pub const MAILBOX_OFFSET: u64 = 0x8000;

/// The most vCPUs that a guest can have.
pub const MAX_VCPUS: u32 = 8;
/// Where the word lies that all vCPUs count up, each at each of its ticks.
pub const SHARED_OFFSET: u64 = 0x8_0000;

/// Mailboxes that the fixed layout has room for.
const MAILBOXES: u64 = MAX_VCPUS as u64;
pub(crate) const GDT_OFFSET: u64 = 0x1000;
pub(crate) const IDT_OFFSET: u64 = 0x2000;
pub(crate) const TSS_OFFSET: u64 = 0x3000;
/// From one TSS to the next.
pub(crate) const TSS_STRIDE: u64 = 0x400;
pub(crate) const STACKS_OFFSET: u64 = 0x1_0000;
pub(crate) const CODE_OFFSET: u64 = 0x2_0000;
/// Room for code, in bytes.
pub(crate) const CODE_ROOM_BYTES: u64 = 0x1_0000;
pub(crate) const PML4_OFFSET: u64 = 0x3_0000;
pub(crate) const PDPT_OFFSET: u64 = 0x3_1000;
pub(crate) const PD_OFFSET: u64 = 0x3_2000;
pub(crate) const WORK_OFFSET: u64 = 0x10_0000;
/// Pages below the work area.
pub(crate) const LOW_PAGES: u64 = WORK_OFFSET / PAGE_BYTES;

const LOW_END: u64 = 3 << 30;
const HIGH_ADDRESS: u64 = 4 << 30;

/// One piece of guest-physical memory: what one KVM memory slot maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Guest-physical address of the first byte.
    pub guest_address: u64,
    /// Offset of the first byte in the guest's memory file.
    pub offset_bytes: u64,
    /// Length in bytes.
    pub len_bytes: u64,
}

/// The slots of a memory of this size: up to 3 GiB at address 0, the rest from 4 GiB on. The gap
/// leaves room for the interrupt controllers and devices of a PC.
#[must_use]
pub fn slots(memory_bytes: u64) -> Vec<Slot> {
    let low = memory_bytes.min(LOW_END);
    let high = memory_bytes - low;
    let all = [
        Slot { guest_address: 0, offset_bytes: 0, len_bytes: low },
        Slot { guest_address: HIGH_ADDRESS, offset_bytes: low, len_bytes: high },
    ];
    all.into_iter().filter(|slot| slot.len_bytes != 0).collect()
}

/// Why a memory cannot hold this guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// The size is out of range or no whole number of 2 MiB pages.
    #[error(
        "a memory of {memory_bytes} bytes does not fit this guest: \
         it takes multiples of 2 MiB from 4 MiB to 64 GiB"
    )]
    MemorySize {
        /// The size asked for, in bytes.
        memory_bytes: u64,
    },
    /// There are no vCPUs, or too many.
    #[error("{vcpus} vCPUs do not fit this guest: it takes 1 to {MAX_VCPUS}")]
    Vcpus {
        /// The number asked for.
        vcpus: u32,
    },
    /// The mailbox lies outside the pages set aside for mailboxes, or is no whole page.
    #[error(
        "no mailbox can lie at offset {mailbox_offset:#x}: \
         the mailbox pages are 0x8000 to 0x10000"
    )]
    Mailbox {
        /// The offset asked for, in bytes.
        mailbox_offset: u64,
    },
    /// The work area is not a range of whole pages behind the fixed part of the memory.
    #[error("{start:#x} to {end:#x} is no work area in a memory of {memory_bytes} bytes")]
    Work {
        /// First byte, as an offset.
        start: u64,
        /// One past the last byte, as an offset.
        end: u64,
        /// The memory's size in bytes.
        memory_bytes: u64,
    },
}

/// Where things lie in a guest's memory, as one of its vCPUs sees it. All values have been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Multiple of [`HUGE_PAGE_BYTES`] within the limits.
    memory_bytes: u64,
    /// One of the mailbox pages.
    mailbox_offset: u64,
    /// Whole pages, not empty, from `WORK_OFFSET` at the earliest to the memory's end at the latest.
    work_start: u64,
    work_end: u64,
}

impl Layout {
    /// The layout of a guest with one vCPU: its mailbox at [`MAILBOX_OFFSET`], its work area from
    /// 1 MiB to the end.
    ///
    /// # Errors
    ///
    /// [`LayoutError::MemorySize`].
    pub fn new(memory_bytes: u64) -> Result<Self, LayoutError> {
        Self::with_parts(memory_bytes, MAILBOX_OFFSET, WORK_OFFSET..memory_bytes)
    }

    /// The layouts of all vCPUs of a guest with so many, in their order: the work area from 1 MiB to the
    /// end is shared out among them.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Vcpus`], [`LayoutError::MemorySize`].
    pub fn split(memory_bytes: u64, vcpus: u32) -> Result<Vec<Self>, LayoutError> {
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(LayoutError::Vcpus { vcpus });
        }
        let all = Self::new(memory_bytes)?.work_pages();
        let pages = all.end - all.start;
        let bound = |vcpu: u64| (all.start + pages * vcpu / u64::from(vcpus)) * PAGE_BYTES;
        (0..u64::from(vcpus))
            .map(|vcpu| {
                let mailbox = MAILBOX_OFFSET + vcpu * PAGE_BYTES;
                Self::with_parts(memory_bytes, mailbox, bound(vcpu)..bound(vcpu + 1))
            })
            .collect()
    }

    /// A layout with these parts: for one of several vCPUs, each with a mailbox and a share of the
    /// work area of its own, or as read from a mailbox.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] names the first part that does not fit.
    pub fn with_parts(memory_bytes: u64, mailbox_offset: u64, work: Range<u64>) -> Result<Self, LayoutError> {
        let fits = (MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory_bytes);
        if !fits || !memory_bytes.is_multiple_of(HUGE_PAGE_BYTES) {
            return Err(LayoutError::MemorySize { memory_bytes });
        }
        let mailboxes = MAILBOX_OFFSET..MAILBOX_OFFSET + MAILBOXES * PAGE_BYTES;
        if !mailboxes.contains(&mailbox_offset) || !mailbox_offset.is_multiple_of(PAGE_BYTES) {
            return Err(LayoutError::Mailbox { mailbox_offset });
        }
        let whole = work.start.is_multiple_of(PAGE_BYTES) && work.end.is_multiple_of(PAGE_BYTES);
        let inside = WORK_OFFSET <= work.start && work.end <= memory_bytes;
        if !whole || !inside || work.is_empty() {
            return Err(LayoutError::Work { start: work.start, end: work.end, memory_bytes });
        }
        Ok(Self { memory_bytes, mailbox_offset, work_start: work.start, work_end: work.end })
    }

    /// Size of the guest's memory in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Offset of the mailbox page.
    #[must_use]
    pub fn mailbox_offset(&self) -> u64 {
        self.mailbox_offset
    }

    /// The work area: offsets in bytes, whole pages, not empty.
    #[must_use]
    pub fn work(&self) -> Range<u64> {
        self.work_start..self.work_end
    }

    /// The work area in pages: indexes of 4 KiB pages counted from offset 0.
    #[must_use]
    pub fn work_pages(&self) -> Range<u64> {
        self.work_start / PAGE_BYTES..self.work_end / PAGE_BYTES
    }

    /// The slots of this memory, as [`slots`] gives them.
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        slots(self.memory_bytes)
    }

    /// Number of the vCPU, from 0.
    #[must_use]
    pub fn vcpu(&self) -> u32 {
        // One of the mailbox pages, of which there are few.
        u32::try_from((self.mailbox_offset - MAILBOX_OFFSET) / PAGE_BYTES).unwrap_or_default()
    }

    /// Where its TSS lies.
    pub(crate) fn tss_offset(&self) -> u64 {
        TSS_OFFSET + u64::from(self.vcpu()) * TSS_STRIDE
    }

    /// Top of the stack of privilege level 3.
    pub(crate) fn user_stack_top(&self) -> u64 {
        self.stacks() + PAGE_BYTES
    }

    /// Top of the stack of privilege level 0.
    pub(crate) fn kernel_stack_top(&self) -> u64 {
        self.stacks() + 2 * PAGE_BYTES
    }

    fn stacks(&self) -> u64 {
        STACKS_OFFSET + (self.mailbox_offset - MAILBOX_OFFSET) * 2
    }
}

/// Whether the page with this index never changes while the guest lives.
pub(crate) fn is_fixed(page: u64) -> bool {
    let offset = page * PAGE_BYTES;
    let mailboxes = MAILBOX_OFFSET..MAILBOX_OFFSET + MAILBOXES * PAGE_BYTES;
    let stacks = STACKS_OFFSET..STACKS_OFFSET + 2 * MAILBOXES * PAGE_BYTES;
    let moves = mailboxes.contains(&offset) || stacks.contains(&offset) || offset == SHARED_OFFSET;
    page < LOW_PAGES && !moves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_up_to_three_gib_is_one_slot() {
        for bytes in [4 << 20, 64 << 20, 3 << 30] {
            let whole = Slot { guest_address: 0, offset_bytes: 0, len_bytes: bytes };
            assert_eq!(slots(bytes), [whole]);
        }
        assert_eq!(slots(0), []);
    }

    #[test]
    fn memory_over_three_gib_goes_on_at_four_gib() {
        let bytes = (3 << 30) + HUGE_PAGE_BYTES;
        let high = Slot { guest_address: 4 << 30, offset_bytes: 3 << 30, len_bytes: HUGE_PAGE_BYTES };
        assert_eq!(slots(bytes)[1], high);
        assert_eq!(slots(u64::MAX)[1].len_bytes, u64::MAX - (3 << 30));
    }

    #[test]
    fn a_size_outside_the_limits_is_refused_by_value() {
        for memory_bytes in [0, 2 << 20, (4 << 20) + 4096, (64 << 30) + (2 << 20), u64::MAX] {
            let refused = Layout::new(memory_bytes);
            assert_eq!(refused, Err(LayoutError::MemorySize { memory_bytes }));
        }
        for memory_bytes in [4 << 20, 6 << 20, 64 << 30] {
            assert!(Layout::new(memory_bytes).is_ok());
        }
    }

    #[test]
    fn parts_that_overlap_the_fixed_pages_are_refused() {
        let bytes = 8 << 20;
        let work = 1 << 20..bytes;
        for mailbox_offset in [0, 0x7000, 0x8008, 0x1_0000] {
            assert_eq!(
                Layout::with_parts(bytes, mailbox_offset, work.clone()),
                Err(LayoutError::Mailbox { mailbox_offset })
            );
        }
        for (start, end) in [(0, bytes), (1 << 20, bytes + 4096), (bytes, bytes), ((1 << 20) + 8, bytes)] {
            let refused = Layout::with_parts(bytes, MAILBOX_OFFSET, start..end);
            assert!(matches!(refused, Err(LayoutError::Work { .. })));
        }
    }

    #[test]
    fn the_vcpus_share_the_work_area_out_and_leave_nothing() {
        for memory_bytes in [4 << 20, 6 << 20, 64 << 30] {
            for vcpus in 1..=MAX_VCPUS {
                let layouts = Layout::split(memory_bytes, vcpus).unwrap();
                let numbers: Vec<u32> = layouts.iter().map(Layout::vcpu).collect();
                assert_eq!(numbers, (0..vcpus).collect::<Vec<u32>>());
                let mut end = WORK_OFFSET;
                for layout in &layouts {
                    assert_eq!(layout.work().start, end);
                    end = layout.work().end;
                }
                assert_eq!(end, memory_bytes);
                let lens = layouts.iter().map(|layout| layout.work_pages().count());
                assert!(lens.clone().max().unwrap() - lens.min().unwrap() <= 1);
            }
        }
        assert_eq!(Layout::split(8 << 20, 1), Layout::new(8 << 20).map(|layout| vec![layout]));
    }

    #[test]
    fn a_number_of_vcpus_that_does_not_fit_is_refused_by_value() {
        for vcpus in [0, 9, u32::MAX] {
            assert_eq!(Layout::split(8 << 20, vcpus), Err(LayoutError::Vcpus { vcpus }));
        }
    }

    #[test]
    fn each_mailbox_has_stacks_of_its_own() {
        let tops: Vec<u64> = Layout::split(8 << 20, MAX_VCPUS)
            .unwrap()
            .iter()
            .flat_map(|layout| [layout.user_stack_top(), layout.kernel_stack_top()])
            .collect();
        let expected: Vec<u64> = (1..=16).map(|page| STACKS_OFFSET + page * PAGE_BYTES).collect();
        assert_eq!(tops, expected);
        assert_eq!(tops.last(), Some(&CODE_OFFSET));
    }
}
