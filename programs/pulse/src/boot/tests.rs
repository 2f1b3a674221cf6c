use super::*;
use std::collections::BTreeMap;

const GIB: u64 = 1 << 30;

fn image(memory_bytes: u64) -> Image {
    Image::new(memory_bytes, &Options::new(2_600_000)).unwrap()
}

/// One with as many vCPUs as there can be.
fn full_image(memory_bytes: u64) -> Image {
    Image::new(memory_bytes, &Options { vcpus: MAX_VCPUS, ..Options::new(2_600_000) }).unwrap()
}

/// The first vCPU's.
fn first(image: &Image) -> Start {
    image.starts().next().unwrap()
}

/// Reads words of the image's low part by guest-physical address; there offset and address are one.
struct Low(BTreeMap<u64, u64>);

impl Low {
    fn of(image: &Image) -> Self {
        let words = image.pieces().flat_map(|(offset, bytes)| {
            let places = (offset..).step_by(8);
            places.zip(bytes.chunks(8)).map(|(place, bytes)| {
                let mut word = [0; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                (place, u64::from_le_bytes(word))
            })
        });
        Self(words.collect())
    }

    fn word(&self, address: u64) -> u64 {
        self.0.get(&address).copied().unwrap_or(0)
    }

    /// Walks the tables as a processor does: the guest-physical address, if the user may write there.
    fn translate(&self, cr3: u64, linear: u64) -> Option<u64> {
        let mut table = cr3;
        for shift in [39, 30, 21] {
            let entry = self.word(table + ((linear >> shift) & 511) * 8);
            if entry & 7 != 7 {
                return None;
            }
            let address = entry & 0x000f_ffff_ffff_f000;
            if shift == 21 {
                assert_ne!(entry & HUGE_LEAF, 0);
                return Some(address + (linear & (HUGE_PAGE_BYTES - 1)));
            }
            table = address;
        }
        None
    }

    fn bits(&self, address: u64, from: u32, len: u32) -> u64 {
        (self.word(address) >> from) & ((1 << len) - 1)
    }

    /// Base, limit and access byte of a descriptor, with the flags above the limit.
    fn descriptor(&self, gdt: u64, selector: u16) -> (u64, u64, u64, u64) {
        let at = gdt + u64::from(selector & !7);
        let base = self.bits(at, 16, 24) | self.bits(at, 56, 8) << 24;
        let limit = self.bits(at, 0, 16) | self.bits(at, 48, 4) << 16;
        (base, limit, self.bits(at, 40, 8), self.bits(at, 52, 4))
    }
}

#[test]
fn page_tables_map_every_offset_to_the_slot_that_holds_it() {
    for memory_bytes in
        [4 << 20, 64 << 20, GIB, GIB + (2 << 20), 3 * GIB, 3 * GIB + (2 << 20), 4 * GIB + GIB / 2, 64 * GIB]
    {
        let image = image(memory_bytes);
        let low = Low::of(&image);
        let cr3 = first(&image).sregs(kvm_sregs::default()).cr3;
        let mut covered = 0;
        for slot in crate::slots(memory_bytes) {
            for offset in (0..slot.len_bytes).step_by(1 << 21) {
                let found = low.translate(cr3, slot.offset_bytes + offset + 0x1234);
                assert_eq!(found, Some(slot.guest_address + offset + 0x1234));
                covered += HUGE_PAGE_BYTES;
            }
        }
        assert_eq!(covered, memory_bytes);
        assert_eq!(low.translate(cr3, memory_bytes), None);
    }
}

#[test]
fn pieces_lie_below_the_work_area_and_apart() {
    for memory_bytes in [4 << 20, 64 * GIB] {
        let image = full_image(memory_bytes);
        let mut ranges: Vec<(u64, u64)> = image
            .pieces()
            .map(|(offset, bytes)| (offset, offset + u64::try_from(bytes.len()).unwrap()))
            .collect();
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{pair:x?}");
        }
        assert!(ranges.last().unwrap().1 <= 1 << 20);
    }
}

#[test]
fn the_registers_start_the_program_at_privilege_level_three() {
    let image = image(64 << 20);
    let regs = first(&image).regs();
    let sregs = first(&image).sregs(kvm_sregs::default());
    let (code, bytes) = image.pieces().find(|&(offset, _)| offset == CODE_OFFSET).unwrap();
    assert_eq!(regs.rip, code);
    assert!(bytes.len() > 1000);
    assert_eq!(regs.rsp, 0x1_1000);
    assert_eq!(regs.rflags, 0x3002);
    assert_eq!((sregs.cs.dpl, sregs.ss.dpl, sregs.cs.l), (3, 3, 1));
    assert_eq!(sregs.gs.base, crate::MAILBOX_OFFSET);
}

#[test]
fn each_vcpu_starts_with_places_of_its_own_and_runs_from_the_start() {
    let image = full_image(64 << 20);
    let starts: Vec<Start> = image.starts().collect();
    assert_eq!(starts.len(), 8);
    for (start, vcpu) in starts.iter().zip(0..) {
        let sregs = start.sregs(kvm_sregs::default());
        assert_eq!(start.layout(), &image.layouts()[usize::try_from(vcpu).unwrap()]);
        assert_eq!(start.regs().rip, starts[0].regs().rip);
        assert_eq!(start.regs().rsp, 0x1_1000 + vcpu * 0x2000);
        assert_eq!(sregs.gs.base, 0x8000 + vcpu * 0x1000);
        assert_eq!(sregs.tr.base, 0x3000 + vcpu * 0x400);
        assert_eq!(u64::from(sregs.tr.selector), 0x28 + vcpu * 0x10);
        assert_eq!(start.mp_state().mp_state, KVM_MP_STATE_RUNNABLE);
    }
}

#[test]
fn cached_segments_agree_with_the_descriptors_in_memory() {
    let image = full_image(64 << 20);
    let low = Low::of(&image);
    let sregs = first(&image).sregs(kvm_sregs::default());
    let task_states = image.starts().map(|start| start.sregs(kvm_sregs::default()).tr);
    for segment in task_states.chain([sregs.cs, sregs.ss, sregs.ds]) {
        assert!(segment.selector < sregs.gdt.limit);
        let (base, limit, access, flags) = low.descriptor(sregs.gdt.base, segment.selector);
        let limit = if flags & 8 != 0 { limit << 12 | 0xfff } else { limit };
        assert_eq!((base, limit), (segment.base, u64::from(segment.limit)));
        let expected = segment.type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7;
        assert_eq!(access, u64::from(expected));
        assert_eq!(flags, u64::from(segment.l << 1 | segment.db << 2 | segment.g << 3));
    }
    // A 64-bit code segment for the handlers.
    let (_, _, access, flags) = low.descriptor(sregs.gdt.base, KERNEL_CODE);
    assert_eq!((access, flags), (0x9b, 0xa));
}

#[test]
fn the_tss_allows_the_guests_ports_and_no_other() {
    let layout = Layout::new(64 << 20).unwrap();
    let tss = tss(&layout);
    let bitmap = usize::from(u16::from_le_bytes([tss[0x66], tss[0x67]]));
    let allowed: Vec<usize> =
        (0..(tss.len() - bitmap) * 8).filter(|port| tss[bitmap + port / 8] & 1 << (port % 8) == 0).collect();
    assert_eq!(allowed, [0x64, 0x3f8, 0x3fd, 0x5f0, 0x5f1, 0x5f2, 0x5f3, 0x604, 0x605, 0xcf9]);
    assert_eq!(tss.last(), Some(&0xff));
    assert_eq!(tss[4..12], 0x1_2000_u64.to_le_bytes());
}

#[test]
fn each_vector_has_a_gate_to_a_stub_of_its_own() {
    let image = image(64 << 20);
    let low = Low::of(&image);
    let sregs = first(&image).sregs(kvm_sregs::default());
    assert_eq!(sregs.idt.limit, 256 * 16 - 1);
    let (code, bytes) = image.pieces().find(|&(offset, _)| offset == CODE_OFFSET).unwrap();
    let end = code + u64::try_from(bytes.len()).unwrap();
    let mut stubs: Vec<u64> = (0..256)
        .map(|vector| {
            let gate = sregs.idt.base + vector * 16;
            // Present, privilege level 0, interrupt gate, no stack of its own.
            assert_eq!(low.bits(gate, 32, 16), 0x8e00);
            assert_eq!(low.bits(gate, 16, 16), u64::from(KERNEL_CODE));
            low.bits(gate, 0, 16) | low.bits(gate, 48, 16) << 16 | low.word(gate + 8) << 32
        })
        .collect();
    assert!(stubs.iter().all(|stub| (code..end).contains(stub)));
    assert!(stubs.is_sorted());
    stubs.dedup();
    assert_eq!(stubs.len(), 256);
}

#[test]
fn a_size_or_a_number_of_vcpus_that_does_not_fit_is_told() {
    let refused = Image::new(3 << 20, &Options::new(0));
    assert!(matches!(
        refused,
        Err(ImageError::Layout(LayoutError::MemorySize { memory_bytes })) if memory_bytes == 3 << 20
    ));
    let refused = Image::new(4 << 20, &Options { vcpus: 9, ..Options::new(0) });
    assert!(matches!(refused, Err(ImageError::Layout(LayoutError::Vcpus { vcpus: 9 }))));
}

#[test]
fn wide_vectors_need_avx2_xsave_and_its_state() {
    let leaf =
        |function, ebx, ecx, eax| kvm_cpuid_entry2 { function, eax, ebx, ecx, ..kvm_cpuid_entry2::default() };
    let all = [leaf(1, 0, 1 << 26 | 1 << 28, 0), leaf(7, 1 << 5, 0, 0), leaf(0xd, 0, 0, 0xe7)];
    assert_eq!(Vectors::widest(&all), Vectors::Avx2);
    assert_eq!(Vectors::widest(&[]), Vectors::Sse2);
    for missing in 0..3 {
        let mut some = all;
        some[missing] = leaf(some[missing].function, 0, 0, 0);
        assert_eq!(Vectors::widest(&some), Vectors::Sse2);
    }
}

#[test]
fn only_wide_vectors_ask_for_xsave() {
    let narrow = image(4 << 20);
    assert_eq!(first(&narrow).sregs(kvm_sregs::default()).cr4 & CR4_OSXSAVE, 0);
    assert_eq!(first(&narrow).xcrs(kvm_xcrs::default()), kvm_xcrs::default());
    let options = Options { vectors: Vectors::Avx2, interrupts: true, ..Options::new(1000) };
    let wide = Image::new(4 << 20, &options).unwrap();
    assert_ne!(first(&wide).sregs(kvm_sregs::default()).cr4 & CR4_OSXSAVE, 0);
    let xcrs = first(&wide).xcrs(kvm_xcrs::default());
    assert_eq!((xcrs.nr_xcrs, xcrs.xcrs[0].value), (1, 7));
    assert_eq!(first(&wide).regs().rflags, 0x3202);
}

#[test]
fn pauses_count_from_half_a_millisecond_if_the_clock_is_known() {
    assert_eq!(Options::new(2_600_001).pause_threshold_cycles, 1_300_001);
    assert_eq!(Options::new(0).pause_threshold_cycles, u64::MAX);
}
