use super::*;
use crate::Progress;
use crate::mailbox::Pause;
use crate::rig::{PAGE_WORDS, Rig};
use crate::{MAILBOX_OFFSET, Words};
use proptest::prelude::*;

/// Steps of a pass over 4 MiB: a chunk each, and one for the end.
const STEPS: u64 = 768 * CHUNKS + 1;

/// A guest in pass 2 that has just begun page 300.
fn rig_under_way() -> Rig {
    let mut rig = Rig::new();
    rig.steps(2 * STEPS + (300 - 256) * CHUNKS + 1);
    let progress = rig.mailbox().progress(&rig.layout);
    assert_eq!(progress, Progress { pass: 2, cursor: 300 });
    rig
}

/// Does the damage, and returns how many words the guest found wrong in the pass after, with the
/// first of them. The host's check, made before, must have found the same pages.
fn found_after(damage: impl FnOnce(&Rig), pages: &[u64]) -> (u64, BadWord) {
    let mut rig = rig_under_way();
    assert!(rig.check().is_whole());
    damage(&rig);
    let check = rig.check();
    let seen_by_host = check.first_bad.unwrap();
    assert_eq!(check.pages_lost, u64::try_from(pages.len()).unwrap());
    assert_eq!(Some(&(seen_by_host.offset_bytes / PAGE_BYTES)), pages.first());
    rig.steps(STEPS);
    let pass = rig.mailbox().first_bad_pass();
    assert!(matches!(pass, Some(2 | 3)), "found in pass {pass:?}");
    (rig.mailbox().errors(), rig.mailbox().first_bad().unwrap())
}

#[test]
fn an_undisturbed_walk_finds_nothing_in_three_passes() {
    let mut rig = Rig::new();
    rig.steps(3 * STEPS);
    let mailbox = rig.mailbox();
    assert_eq!(mailbox.errors(), 0);
    assert_eq!(mailbox.progress(&rig.layout), Progress { pass: 3, cursor: 256 });
    assert_eq!(mailbox.ticks(), 3 * 768 * CHUNKS);
    assert_eq!(mailbox.pass_cycles(), Some(768 * CHUNKS * 1000));
    assert_eq!(rig.reports, [Report::Pass; 3]);
    assert_eq!(mailbox.reports(), 3);
    assert!(rig.check().is_whole());
}

#[test]
fn every_word_of_the_work_area_is_written_in_each_pass() {
    let mut rig = Rig::new();
    rig.steps(2 * STEPS);
    let line = Line::of(2);
    for index in 256 * PAGE_WORDS..1024 * PAGE_WORDS {
        assert_eq!(rig.memory.word(index).get(), line.word(index), "word {index}");
    }
}

#[test]
fn a_changed_byte_ahead_of_the_cursor_is_found_where_it_is() {
    let word = 500 * PAGE_WORDS + 77;
    let expected = Line::of(2).word(word);
    let found = expected ^ 0x40_0000;
    let damage = |rig: &Rig| rig.memory.word(word).set(found);
    let bad = BadWord { offset_bytes: word * 8, expected, found };
    assert_eq!(found_after(damage, &[500]), (1, bad));
}

#[test]
fn a_changed_byte_behind_the_cursor_is_found_in_the_next_pass() {
    let word = 260 * PAGE_WORDS + 511;
    let expected = Line::of(3).word(word);
    let damage = |rig: &Rig| rig.memory.word(word).set(expected ^ 1);
    let (errors, bad) = found_after(damage, &[260]);
    assert_eq!((errors, bad.offset_bytes), (1, word * 8));
}

#[test]
fn a_page_that_reads_zero_is_found_in_every_word() {
    let damage = |rig: &Rig| rig.memory.set_page(700, &[0; 512]);
    let (errors, bad) = found_after(damage, &[700]);
    assert_eq!(errors, 512);
    assert_eq!(bad.found, 0);
}

#[test]
fn two_pages_in_each_others_place_are_found_in_every_word() {
    let damage = |rig: &Rig| {
        let (left, right) = (rig.memory.page(310), rig.memory.page(900));
        rig.memory.set_page(310, &right);
        rig.memory.set_page(900, &left);
    };
    assert_eq!(found_after(damage, &[310, 900]).0, 1024);
}

#[test]
fn a_page_of_an_older_generation_is_found_in_nearly_every_word() {
    let damage = |rig: &Rig| {
        let stale: Vec<u64> = (0..512).map(|word| Line::of(1).word(800 * PAGE_WORDS + word)).collect();
        rig.memory.set_page(800, &stale);
    };
    assert!(found_after(damage, &[800]).0 >= 500);
}

#[test]
fn memory_that_nobody_touched_and_is_not_zero_is_found_in_the_first_pass() {
    let mut rig = Rig::new();
    rig.memory.word(1000 * PAGE_WORDS).set(1);
    assert_eq!(rig.check().pages_lost, 1);
    rig.steps(STEPS);
    assert_eq!(rig.mailbox().errors(), 1);
    assert_eq!(rig.mailbox().first_bad_pass(), Some(0));
}

#[test]
fn mismatches_are_reported_once_per_pass() {
    let mut rig = rig_under_way();
    for page in [400, 401, 500] {
        rig.memory.set_page(page, &[0; 512]);
    }
    rig.reports.clear();
    rig.steps(STEPS);
    assert_eq!(rig.reports, [Report::Mismatch, Report::Pass]);
    assert_eq!(rig.mailbox().errors(), 3 * 512);
}

#[test]
fn a_silence_is_the_longest_gap_and_one_pause() {
    let mut rig = rig_under_way();
    assert_eq!(rig.mailbox().longest_gap().cycles, 1000);
    rig.now += 50_000_000;
    rig.steps(10);
    let gap = rig.mailbox().longest_gap();
    assert_eq!(gap.cycles, 50_001_000);
    assert_eq!(rig.mailbox().nanoseconds(gap.cycles), Some(50_001_000));
    let pause = Pause { end: gap.end, cycles: gap.cycles };
    assert_eq!(rig.mailbox().pauses_from(0), [(0, pause)]);
}

#[test]
fn a_reset_forgets_the_longest_gap() {
    let mut rig = rig_under_way();
    rig.now += 50_000_000;
    rig.step();
    let request = rig.mailbox().reset_gap();
    assert!(!rig.mailbox().gap_is_reset(request));
    rig.step();
    assert!(rig.mailbox().gap_is_reset(request));
    rig.step();
    assert_eq!(rig.mailbox().longest_gap().cycles, 1000);
}

#[test]
fn a_clock_that_goes_back_is_counted_and_makes_no_gap() {
    let mut rig = rig_under_way();
    rig.now -= 100_000;
    rig.steps(2);
    assert_eq!(rig.mailbox().time_went_back(), 1);
    assert_eq!(rig.mailbox().longest_gap().cycles, 1000);
}

#[test]
fn the_last_pauses_are_kept_and_numbered() {
    let mut rig = rig_under_way();
    for pause in 1..=40 {
        rig.now += pause * 1_000_000;
        rig.step();
    }
    let kept = rig.mailbox().pauses_from(0);
    let numbers: Vec<u64> = kept.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, (9..40).collect::<Vec<u64>>());
    for (number, pause) in kept {
        assert_eq!(pause.cycles, (number + 1) * 1_000_000 + 1000);
    }
    assert_eq!(rig.mailbox().pauses_from(38).len(), 2);
    assert_eq!(rig.mailbox().pauses_from(40), []);
}

#[test]
fn a_probe_reads_each_page_of_windows_spread_over_memory() {
    let image = crate::Image::new(20 << 20, &crate::Options::new(1_000_000)).unwrap();
    let mut rig = Rig {
        memory: crate::rig::Memory::new(&image),
        layout: image.layouts()[0],
        walk: Walk::new(&image.layouts()[0], 5_000),
        ..Rig::new()
    };
    rig.step();
    let request = rig.mailbox().request_probe(3);
    rig.step();
    let ticks = rig.mailbox().ticks();
    assert_eq!(rig.mailbox().probe(request), None);
    rig.memory.first_words_read.take();
    rig.until(Report::Probe);
    let mut read = rig.memory.first_words_read.take();
    // The mailbox and the shared word.
    read.retain(|&page| page != 8 && page != 128);
    let expected: Vec<u64> =
        [1, 4, 7].into_iter().flat_map(|window| window * 512..(window + 1) * 512).collect();
    assert_eq!(read, expected);
    let probe = rig.mailbox().probe(request).unwrap();
    assert_eq!((probe.pages, probe.cycles), (3 * 512, 3 * 512 * 1000));
    assert_eq!(rig.mailbox().ticks(), ticks + 3 * 512);
}

#[test]
fn a_probe_of_more_windows_than_there_are_touches_all_but_the_first() {
    let mut rig = rig_under_way();
    for (windows, pages) in [(0, 0), (1, 512), (u64::MAX, 512)] {
        let request = rig.mailbox().request_probe(windows);
        rig.until(Report::Probe);
        assert_eq!(rig.mailbox().probe(request).unwrap().pages, pages);
    }
}

#[test]
fn a_parked_guest_changes_nothing_and_looks_at_its_clock() {
    let mut rig = rig_under_way();
    rig.mailbox().park();
    rig.until(Report::Parked);
    assert!(rig.walk.is_parked() && rig.mailbox().is_parked());
    let before = (rig.mailbox().ticks(), rig.memory.written.get());
    rig.steps(100);
    assert_eq!((rig.mailbox().ticks(), rig.memory.written.get()), before);
    rig.now += 7_000_000;
    rig.step();
    assert_eq!(rig.mailbox().longest_gap().cycles, 7_001_000);
    let request = rig.mailbox().request_probe(1);
    rig.until(Report::Probe);
    assert!(rig.mailbox().probe(request).is_some() && rig.walk.is_parked());
    rig.mailbox().unpark();
    rig.steps(STEPS);
    assert!(!rig.mailbox().is_parked());
    assert_eq!(rig.mailbox().errors(), 0);
}

/// A world with a UART, which notes what the guest does there.
#[derive(Default)]
struct World {
    now: u64,
    received: Vec<u8>,
    /// The UART is there and takes bytes.
    takes: bool,
    busy: bool,
    done: Vec<(u16, Vec<u8>)>,
    crashes: u32,
}

impl World {
    fn sent(&mut self) -> String {
        let sent: Vec<u8> =
            self.done.drain(..).flat_map(|(port, data)| if port == 0x3f8 { data } else { vec![] }).collect();
        String::from_utf8(sent).unwrap()
    }
}

impl Outside for World {
    fn now(&mut self) -> u64 {
        self.now += 1000;
        self.now
    }

    fn output(&mut self, port: u16, data: &[u8]) {
        self.done.push((port, data.to_vec()));
    }

    fn input(&mut self, port: u16) -> u8 {
        match port {
            0x3fd if self.busy => 0,
            0x3fd if self.takes => 0x60 | u8::from(!self.received.is_empty()),
            0x3f8 if self.takes => self.received.remove(0),
            _ => 0xff,
        }
    }

    fn crash(&mut self) {
        self.crashes += 1;
    }
}

/// Ports, and what is written there.
type Expected = &'static [(u16, &'static [u8])];

#[test]
fn each_command_is_done_once_at_its_port() {
    use crate::Command;
    let mut rig = rig_under_way();
    let mut world = World { now: rig.now, ..World::default() };
    let ports: [(Command, Expected); 4] = [
        (Command::PowerOff, &[(0x604, &[0x00, 0x20])]),
        (Command::Reset, &[(0x64, &[0xfe])]),
        (Command::ResetByChipset, &[(0xcf9, &[0x02]), (0xcf9, &[0x06])]),
        (Command::Crash, &[]),
    ];
    for (command, expected) in ports {
        rig.mailbox().command(command);
        assert!(!rig.mailbox().command_is_taken());
        for _ in 0..3 {
            rig.walk.step(&rig.memory, &mut world);
        }
        assert!(rig.mailbox().command_is_taken());
        let expected: Vec<(u16, Vec<u8>)> =
            expected.iter().map(|(port, data)| (*port, data.to_vec())).collect();
        assert_eq!(std::mem::take(&mut world.done), expected);
    }
    assert_eq!(world.crashes, 1);
}

#[test]
fn a_command_that_is_none_is_taken_back_and_changes_nothing() {
    let mut rig = rig_under_way();
    rig.memory.store(MAILBOX_OFFSET + word::COMMAND, 77);
    let mut world = World { now: rig.now, ..World::default() };
    rig.walk.step(&rig.memory, &mut world);
    assert!(rig.mailbox().command_is_taken() && world.done.is_empty() && world.crashes == 0);
}

#[test]
fn a_line_with_the_count_comes_once_per_period() {
    let mut rig = rig_under_way();
    let mut world = World { now: rig.now, takes: true, ..World::default() };
    rig.mailbox().set_console(1_000_000, 0);
    let ticks = rig.mailbox().ticks();
    rig.walk.step(&rig.memory, &mut world);
    assert_eq!(world.sent(), format!("pulse {}\r\n", ticks + 1));
    for _ in 0..500 {
        rig.walk.step(&rig.memory, &mut world);
    }
    assert_eq!(world.sent(), "");
    for _ in 0..500 {
        rig.walk.step(&rig.memory, &mut world);
    }
    assert_eq!(world.sent().matches("pulse ").count(), 1);
}

#[test]
fn received_bytes_are_sent_back_and_a_return_gets_its_line_feed() {
    let mut rig = rig_under_way();
    let mut world = World { now: rig.now, takes: true, received: b"a\rb".to_vec(), ..World::default() };
    rig.walk.step(&rig.memory, &mut world);
    assert_eq!(world.sent(), "");
    rig.mailbox().set_console(0, 1);
    rig.walk.step(&rig.memory, &mut world);
    assert_eq!(world.sent(), "a\r\nb");
}

#[test]
fn a_line_is_given_up_where_nobody_takes_it_and_the_walk_goes_on() {
    for busy in [false, true] {
        let mut rig = rig_under_way();
        let mut world = World { now: rig.now, busy, ..World::default() };
        rig.mailbox().set_console(1, 1);
        let ticks = rig.mailbox().ticks();
        for _ in 0..3 {
            rig.walk.step(&rig.memory, &mut world);
        }
        assert_eq!((world.sent().as_str(), rig.mailbox().ticks()), ("", ticks + 3));
        // It has looked at its clock all the while.
        assert_eq!(rig.mailbox().longest_gap().cycles, 1000);
    }
}

#[test]
fn an_encoded_walk_of_another_length_is_refused() {
    let rig = Rig::new();
    for found_bytes in [0, ENCODED_BYTES - 1, ENCODED_BYTES + 8] {
        let refused = Walk::decode(&vec![0; found_bytes], &rig.layout);
        assert_eq!(refused, Err(WalkError::Length { found_bytes }));
    }
}

#[test]
fn an_encoded_walk_with_an_impossible_field_is_refused_by_name() {
    let rig = rig_under_way();
    let state = rig.walk.encode();
    let with = |word: usize, value: u64| {
        let mut state = state;
        state[word * 8..word * 8 + 8].copy_from_slice(&value.to_le_bytes());
        Walk::decode(&state, &rig.layout)
    };
    assert_eq!(with(0, 2), Err(WalkError::Version { found: 2 }));
    let impossible = [
        (1, 8 << 20, "memory_bytes"),
        (2, 0x9000, "mailbox_offset"),
        (3, u64::MAX, "pass"),
        (4, 255, "page"),
        (4, 1025, "page"),
        (5, CHUNKS, "chunk"),
        (9, 2, "parked"),
        (10, 2, "is_probing"),
        (11, 1, "is_probing"),
    ];
    for (word, found, field) in impossible {
        let refused = with(word, found);
        let named = match refused {
            Err(WalkError::Field { field, .. }) => field,
            other => panic!("{field}: {other:?}"),
        };
        assert_eq!(named, field);
    }
    // At the end of the work area there is no chunk.
    assert!(with(4, 1024).is_err_and(|error| error == WalkError::Field { field: "chunk", found: 1 }));
    assert_eq!(with(4, 301).map(|walk| walk.page), Ok(301));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Requests come at random too, so that a stop meets a parked and a probing guest.
    #[test]
    fn a_walk_stopped_and_encoded_anywhere_goes_on_without_errors(
        stops in prop::collection::vec((0u64..4000, 0u64..4), 1..8),
    ) {
        let mut rig = Rig::new();
        for (steps, request) in stops {
            rig.steps(steps);
            prop_assert!(rig.check().is_whole());
            let decoded = Walk::decode(&rig.walk.encode(), &rig.layout).unwrap();
            prop_assert_eq!(&decoded, &rig.walk);
            rig.walk = decoded;
            match request {
                0 => { rig.mailbox().request_probe(1); }
                1 => rig.mailbox().park(),
                _ => rig.mailbox().unpark(),
            }
            rig.steps(1);
        }
        rig.mailbox().unpark();
        rig.steps(2 * STEPS);
        prop_assert_eq!(rig.mailbox().errors(), 0);
        prop_assert!(rig.check().is_whole());
        prop_assert_eq!(rig.check_fixed().changed, vec![]);
    }

    /// Any bytes: refused, or a state that steps without harm and encodes to the same bytes.
    #[test]
    fn a_decoded_walk_is_one_that_can_be(
        words in prop::array::uniform15(prop_oneof![0u64..3, 250u64..1030, any::<u64>()]),
        keep in prop::array::uniform15(0u8..8),
    ) {
        let mut rig = rig_under_way();
        let mut state = rig.walk.encode();
        for ((place, word), keep) in state.chunks_exact_mut(8).zip(words).zip(keep) {
            if keep == 0 {
                place.copy_from_slice(&word.to_le_bytes());
            }
        }
        if let Ok(walk) = Walk::decode(&state, &rig.layout) {
            prop_assert_eq!(walk.encode(), state);
            rig.walk = walk;
            rig.steps(2000);
        }
    }
}
