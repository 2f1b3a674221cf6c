use super::*;
use crate::mailbox::word;
use crate::rig::Memory;
use crate::{Image, LayoutError, Options, Walk, Words};
use proptest::prelude::*;

const BYTES: u64 = 4 << 20;

fn image(vcpus: u32) -> Image {
    Image::new(BYTES, &Options { vcpus, ..Options::new(1_000_000) }).unwrap()
}

fn memory(vcpus: u32) -> Memory {
    Memory::new(&image(vcpus))
}

fn found(memory: &Memory) -> Mailboxes<'_, Memory> {
    Mailboxes::find(memory, BYTES).unwrap()
}

/// The walks of a guest that starts.
fn walks(memory: &Memory) -> Vec<Walk> {
    found(memory).layouts().iter().map(|layout| Walk::new(layout, 0)).collect()
}

#[test]
fn as_many_mailboxes_are_found_as_the_guest_has_vcpus() {
    for vcpus in 1..=MAX_VCPUS {
        let memory = memory(vcpus);
        let mailboxes = found(&memory);
        assert_eq!(mailboxes.vcpus(), vcpus);
        assert_eq!(mailboxes.layouts(), image(vcpus).layouts());
        assert_eq!(mailboxes.iter().count(), usize::try_from(vcpus).unwrap());
        assert!(mailboxes.get(vcpus - 1).is_some() && mailboxes.get(vcpus).is_none());
    }
}

#[test]
fn what_does_not_describe_this_memory_and_its_vcpus_is_refused_by_name() {
    let second = MAILBOX_OFFSET + PAGE_BYTES;
    let refused = |at: u64, value: u64| {
        let memory = memory(3);
        memory.store(at, value);
        Mailboxes::find(&memory, BYTES).unwrap_err()
    };
    for found in [0, 9, u64::MAX] {
        assert_eq!(refused(MAILBOX_OFFSET + word::VCPUS, found), MailboxError::Vcpus { found });
    }
    let vcpu = |expected, vcpus, vcpu, vcpus_there| MailboxError::Vcpu { expected, vcpus, vcpu, vcpus_there };
    assert_eq!(refused(MAILBOX_OFFSET + word::VCPUS, 4), vcpu(1, 4, 1, 3));
    assert_eq!(refused(MAILBOX_OFFSET + word::VCPU, 1), vcpu(0, 3, 1, 3));
    assert_eq!(refused(second + word::VCPU, 2), vcpu(1, 3, 2, 3));
    assert_eq!(
        refused(second + word::MEMORY_BYTES, 8 << 20),
        MailboxError::MemorySize { found: 8 << 20, memory_bytes: BYTES }
    );
    let share = found(&memory(3)).layouts()[1].work();
    assert_eq!(
        refused(second + word::WORK_START, share.start + PAGE_BYTES),
        MailboxError::Share { start: share.start + PAGE_BYTES, end: share.start }
    );
    let third = second + PAGE_BYTES;
    assert_eq!(
        refused(third + word::WORK_END, BYTES - PAGE_BYTES),
        MailboxError::Share { start: BYTES, end: BYTES - PAGE_BYTES }
    );
    assert_eq!(refused(third + word::VERSION, 2), MailboxError::Version { found: 2 });
    assert!(matches!(refused(second, 0), MailboxError::Magic { mailbox_offset: 0x9000, found: 0 }));
    let beyond = refused(third + word::WORK_END, BYTES + PAGE_BYTES);
    assert!(matches!(beyond, MailboxError::Layout(LayoutError::Work { .. })));
}

#[test]
fn a_memory_of_another_size_is_not_the_guests() {
    let memory = memory(1);
    let refused = Mailboxes::find(&memory, 8 << 20).unwrap_err();
    assert_eq!(refused, MailboxError::MemorySize { found: BYTES, memory_bytes: 8 << 20 });
}

#[test]
fn all_vcpus_together_write_the_whole_work_area() {
    let memory = memory(3);
    let mut walks = walks(&memory);
    // A share is 256 pages of 8 chunks, and the end of the pass.
    for walk in &mut walks {
        for _ in 0..2 * (256 * 8 + 1) {
            walk.step(&memory, &mut || 0);
        }
    }
    let mailboxes = found(&memory);
    assert_eq!((mailboxes.passes(), mailboxes.errors()), (2, 0));
    let read = |offset, bytes: &mut [u8]| memory.read(offset, bytes);
    let check = mailboxes.check_work(read).unwrap();
    assert_eq!((check.pages_checked, check.pages_lost), (768, 0));
    for layout in mailboxes.layouts() {
        let inside = layout.work().end / 8 - 3;
        memory.word(inside).set(0);
    }
    assert_eq!(mailboxes.check_work(read).unwrap().pages_lost, 3);
}

#[test]
fn the_slowest_vcpu_says_how_many_passes_there_were() {
    let memory = memory(2);
    let mut walks = walks(&memory);
    for _ in 0..2 * (384 * 8 + 1) {
        walks[0].step(&memory, &mut || 0);
    }
    assert_eq!(found(&memory).passes(), 0);
    for _ in 0..384 * 8 + 1 {
        walks[1].step(&memory, &mut || 0);
    }
    assert_eq!(found(&memory).passes(), 1);
}

#[test]
fn the_longest_gap_is_that_of_the_vcpu_that_stood_still_longest() {
    let memory = memory(2);
    let mut walks = walks(&memory);
    for (walk, silence) in walks.iter_mut().zip([5_000, 9_000]) {
        walk.step(&memory, &mut || silence);
    }
    assert_eq!(found(&memory).longest_gap(), Gap { cycles: 9_000, end: 9_000 });
}

#[test]
fn what_any_vcpu_found_wrong_is_told() {
    let memory = memory(2);
    let mut walks = walks(&memory);
    let bad = found(&memory).layouts()[1].work().start + 8;
    memory.store(bad, 7);
    walks.iter_mut().for_each(|walk| {
        walk.step(&memory, &mut || 0);
    });
    let mailboxes = found(&memory);
    assert_eq!(mailboxes.errors(), 1);
    assert_eq!(mailboxes.first_bad(), Some(BadWord { offset_bytes: bad, expected: 0, found: 7 }));
    memory.store(MAILBOX_OFFSET + PAGE_BYTES + word::FAULT_VECTOR, 15);
    assert_eq!(mailboxes.fault().unwrap().vector, 14);
}

#[test]
fn a_tick_that_is_lost_or_counted_twice_shows() {
    let miscounted = |ticks, shared| Tally { ticks, shared, vcpus: 2 }.miscounted();
    assert_eq!((miscounted(100, 100), miscounted(100, 102)), (0, 0));
    assert_eq!((miscounted(100, 103), miscounted(104, 100)), (1, 4));
    assert!(!Tally { ticks: 1, shared: 0, vcpus: 2 }.agrees());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The walks take turns; one of them is then set back to where it was, as by an update that lost a piece of it.
    #[test]
    fn the_shared_word_is_the_sum_of_all_ticks(
        turns in prop::collection::vec((0usize..4, 1u64..300), 1..20), lost in 1u64..4,
    ) {
        let memory = memory(4);
        let mut walks = walks(&memory);
        for &(walk, steps) in &turns {
            for _ in 0..steps {
                walks[walk].step(&memory, &mut || 0);
            }
        }
        let tally = found(&memory).tally();
        prop_assert_eq!(tally.shared, tally.ticks);
        // The end of a pass is a step without a tick.
        prop_assert!(tally.ticks + 20 > turns.iter().map(|turn| turn.1).sum::<u64>());
        let old = walks[0].clone();
        for _ in 0..5 + lost {
            walks[0].step(&memory, &mut || 0);
        }
        walks[0] = old;
        for _ in 0..2 {
            walks[0].step(&memory, &mut || 0);
        }
        prop_assert!(!found(&memory).tally().agrees());
    }
}
