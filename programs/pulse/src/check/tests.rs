use super::*;
use crate::pattern::Line;
use crate::rig::{PAGE_WORDS, Rig};
use crate::{Image, Options, Words};
use proptest::prelude::*;

const CHUNKS: u64 = 8;
const STEPS: u64 = 768 * CHUNKS + 1;

#[test]
fn a_guest_that_never_ran_is_whole() {
    let rig = Rig::new();
    let whole = Check { pages_checked: 768, ..Check::default() };
    assert_eq!(rig.check(), whole);
    let fixed = rig.check_fixed();
    assert_eq!((fixed.pages_checked, fixed.changed), (256 - 8 - 16 - 1, vec![]));
}

#[test]
fn a_hole_is_told_from_a_changed_page() {
    let mut rig = Rig::new();
    rig.steps(STEPS + 100 * CHUNKS);
    rig.memory.set_page(300, &[0; 512]);
    rig.memory.set_page(310, &[0; 512]);
    rig.memory.word(900 * PAGE_WORDS + 5).set(7);
    let check = rig.check();
    assert_eq!((check.pages_lost, check.pages_zero), (3, 2));
    let first =
        BadWord { offset_bytes: 300 * PAGE_BYTES, expected: Line::of(2).word(300 * PAGE_WORDS), found: 0 };
    assert_eq!(check.first_bad, Some(first));
}

#[test]
fn the_page_in_progress_may_be_split_at_any_word_but_only_once() {
    let rig = Rig::new();
    let progress = Progress { pass: 5, cursor: 300 };
    let (new, old) = (Line::of(6), Line::of(5));
    let write = |split: u64| {
        let page: Vec<u64> = (0..512)
            .map(|word| {
                let line = if word < split { new } else { old };
                line.word(300 * PAGE_WORDS + word)
            })
            .collect();
        rig.memory.set_page(300, &page);
    };
    let check = || {
        let read = |offset, bytes: &mut [u8]| rig.memory.read(offset, bytes);
        pages(&rig.layout, progress, 300..301, read).unwrap()
    };
    for split in 0..=512 {
        write(split);
        assert!(check().is_whole(), "split at {split}");
    }
    write(200);
    rig.memory.word(300 * PAGE_WORDS + 201).set(new.word(300 * PAGE_WORDS + 201));
    let bad = check().first_bad.unwrap();
    assert_eq!(bad.offset_bytes, (300 * PAGE_WORDS + 201) * 8);
    assert_eq!(bad.expected, old.word(300 * PAGE_WORDS + 201));
}

#[test]
fn pages_outside_of_the_work_area_are_not_compared() {
    let rig = Rig::new();
    let progress = Progress { pass: 0, cursor: 256 };
    let read = |offset, bytes: &mut [u8]| rig.memory.read(offset, bytes);
    let check = pages(&rig.layout, progress, 0..u64::MAX, read).unwrap();
    assert_eq!(check.pages_checked, 768);
    let check = pages(&rig.layout, progress, 2000..3000, read).unwrap();
    assert_eq!(check.pages_checked, 0);
}

#[test]
fn what_the_reader_answers_ends_the_check() {
    let rig = Rig::new();
    let progress = Progress { pass: 0, cursor: 256 };
    let refuse = |offset: u64, _: &mut [u8]| Err(offset);
    assert_eq!(work_area(&rig.layout, progress, refuse), Err(1 << 20));
    assert_eq!(fixed_pages(&[], refuse), Err(0));
}

#[test]
fn a_changed_bit_in_any_fixed_page_is_found() {
    let rig = Rig::new();
    for page in (0..LOW_PAGES).filter(|&page| is_fixed(page)) {
        // Bit 12 is none of those that a processor sets.
        let word = rig.memory.word(page * PAGE_WORDS + page % 512);
        word.set(word.get() ^ 1 << 12);
        assert_eq!(rig.check_fixed().changed, [page * PAGE_BYTES]);
        word.set(word.get() ^ 1 << 12);
    }
    assert_eq!(rig.check_fixed().changed, []);
}

#[test]
fn two_fixed_pages_in_each_others_place_are_found() {
    let rig = Rig::new();
    let gdt = rig.memory.page(1);
    rig.memory.set_page(1, &rig.memory.page(2));
    rig.memory.set_page(2, &gdt);
    assert_eq!(rig.check_fixed().changed, [0x1000, 0x2000]);
}

#[test]
fn bits_that_a_processor_sets_are_no_change() {
    let rig = Rig::new();
    let flip = |offset: u64, bits: u64| {
        rig.memory.store(offset, rig.memory.load(offset) ^ bits);
    };
    flip(PML4_OFFSET, 0x60);
    flip(PD_OFFSET, 0x60);
    flip(GDT_OFFSET + 8, 1 << 40);
    flip(GDT_OFFSET + 5 * 8, 1 << 41);
    flip(GDT_OFFSET + 19 * 8, 1 << 41);
    assert_eq!(rig.check_fixed().changed, []);
    flip(GDT_OFFSET + 5 * 8, 1 << 40);
    assert_eq!(rig.check_fixed().changed, [GDT_OFFSET]);
}

#[test]
fn sums_of_another_length_pass_nothing_that_they_do_not_cover() {
    let rig = Rig::new();
    let sums = rig.mailbox().fixed_sums();
    let read = |offset, bytes: &mut [u8]| rig.memory.read(offset, bytes);
    let check = fixed_pages(&sums[..200], read).unwrap();
    let expected: Vec<u64> = (200..256).map(|page| page * PAGE_BYTES).collect();
    assert_eq!(check.changed, expected);
}

#[test]
fn mailboxes_stacks_and_the_shared_page_are_not_fixed() {
    let image = Image::new(4 << 20, &Options::new(0)).unwrap();
    let zero: Vec<u64> = (0..LOW_PAGES).filter(|&page| !is_fixed(page)).collect();
    assert_eq!(zero, (8..32).chain([128]).collect::<Vec<u64>>());
    assert_eq!(image.layouts()[0].mailbox_offset(), 8 * PAGE_BYTES);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_check_agrees_at_any_stop_and_sees_any_flipped_bit(
        steps in 0u64..3 * STEPS,
        page in 256u64..1024,
        word in 0u64..512,
        bit in 0u32..64,
    ) {
        let mut rig = Rig::new();
        rig.steps(steps);
        prop_assert!(rig.check().is_whole());
        let word = rig.memory.word(page * PAGE_WORDS + word);
        word.set(word.get() ^ 1 << bit);
        let check = rig.check();
        prop_assert_eq!(check.pages_lost, 1);
        prop_assert_eq!(check.first_bad.unwrap().offset_bytes / PAGE_BYTES, page);
    }

    /// However the pages are shared out.
    #[test]
    fn checks_of_parts_add_up_to_the_check_of_all(cut in 256u64..1024, bad in 256u64..1024) {
        let mut rig = Rig::new();
        rig.steps(STEPS + 1000);
        rig.memory.set_page(bad, &[1; 512]);
        let progress = rig.mailbox().progress(&rig.layout);
        let part = |range| {
            let read = |offset, bytes: &mut [u8]| rig.memory.read(offset, bytes);
            pages(&rig.layout, progress, range, read).unwrap()
        };
        prop_assert_eq!(part(256..cut).and(part(cut..1024)), rig.check());
    }
}
