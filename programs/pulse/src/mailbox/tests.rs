use super::*;
use crate::MAILBOX_OFFSET;
use crate::rig::Rig;

/// All words with their lengths in bytes, in the order of the offsets. A change here is a new
/// [`VERSION`].
const ALL: [(&str, u64, u64, u64); 48] = [
    ("MAGIC", word::MAGIC, 0x000, 8),
    ("VERSION", word::VERSION, 0x008, 8),
    ("MEMORY_BYTES", word::MEMORY_BYTES, 0x010, 8),
    ("WORK_START", word::WORK_START, 0x018, 8),
    ("WORK_END", word::WORK_END, 0x020, 8),
    ("CYCLES_PER_MS", word::CYCLES_PER_MS, 0x028, 8),
    ("VECTOR_BYTES", word::VECTOR_BYTES, 0x030, 8),
    ("TICKS", word::TICKS, 0x040, 8),
    ("PAGES_DONE", word::PAGES_DONE, 0x048, 8),
    ("PASSES", word::PASSES, 0x050, 8),
    ("PASS_CYCLES", word::PASS_CYCLES, 0x058, 8),
    ("REPORTS", word::REPORTS, 0x060, 8),
    ("ERRORS", word::ERRORS, 0x080, 8),
    ("FIRST_OFFSET", word::FIRST_OFFSET, 0x088, 8),
    ("FIRST_EXPECTED", word::FIRST_EXPECTED, 0x090, 8),
    ("FIRST_FOUND", word::FIRST_FOUND, 0x098, 8),
    ("FIRST_PASS", word::FIRST_PASS, 0x0a0, 8),
    ("REGISTERS_LOST", word::REGISTERS_LOST, 0x0a8, 8),
    ("MISMATCH_REPORTED", word::MISMATCH_REPORTED, 0x0b0, 8),
    ("REGISTERS_REPORTED", word::REGISTERS_REPORTED, 0x0b8, 8),
    ("GAP_LONGEST", word::GAP_LONGEST, 0x0c0, 8),
    ("GAP_END", word::GAP_END, 0x0c8, 8),
    ("GAP_REQUEST", word::GAP_REQUEST, 0x0d0, 8),
    ("GAP_ANSWER", word::GAP_ANSWER, 0x0d8, 8),
    ("TIME_WENT_BACK", word::TIME_WENT_BACK, 0x0e0, 8),
    ("PAUSE_THRESHOLD", word::PAUSE_THRESHOLD, 0x0e8, 8),
    ("PAUSES", word::PAUSES, 0x0f0, 8),
    ("PROBE_REQUEST", word::PROBE_REQUEST, 0x100, 8),
    ("PROBE_ANSWER", word::PROBE_ANSWER, 0x108, 8),
    ("PROBE_WINDOWS", word::PROBE_WINDOWS, 0x110, 8),
    ("PROBE_CYCLES", word::PROBE_CYCLES, 0x118, 8),
    ("PROBE_PAGES", word::PROBE_PAGES, 0x120, 8),
    ("PARK_REQUEST", word::PARK_REQUEST, 0x140, 8),
    ("PARKED", word::PARKED, 0x148, 8),
    ("COMMAND", word::COMMAND, 0x150, 8),
    ("FAULT_VECTOR", word::FAULT_VECTOR, 0x180, 8),
    ("FAULT_ERROR_CODE", word::FAULT_ERROR_CODE, 0x188, 8),
    ("FAULT_RIP", word::FAULT_RIP, 0x190, 8),
    ("FAULT_CR2", word::FAULT_CR2, 0x198, 8),
    ("CONSOLE_LINES", word::CONSOLE_LINES, 0x1a0, 8),
    ("CONSOLE_LINE_LAST", word::CONSOLE_LINE_LAST, 0x1a8, 8),
    ("CONSOLE_POLL", word::CONSOLE_POLL, 0x1b0, 8),
    ("CONSOLE_POLL_LAST", word::CONSOLE_POLL_LAST, 0x1b8, 8),
    ("VCPU", word::VCPU, 0x1c0, 8),
    ("VCPUS", word::VCPUS, 0x1c8, 8),
    ("SCRATCH", word::SCRATCH, 0x200, 128),
    ("PAUSE_RING", word::PAUSE_RING, 0x400, 512),
    ("FIXED_SUMS", word::FIXED_SUMS, 0x800, 2048),
];

#[test]
fn every_word_is_where_version_1_has_it() {
    for (name, found, expected, _) in ALL {
        assert_eq!(found, expected, "{name}");
    }
    assert_eq!((MAGIC, VERSION), (0x6573_6c75_7064_6974, 1));
}

#[test]
fn no_two_words_overlap_and_all_lie_in_the_page() {
    for pair in ALL.windows(2) {
        let ((name, at, _, len), (next, from, ..)) = (pair[0], pair[1]);
        assert!(at + len <= from, "{name} reaches into {next}");
        assert!(at.is_multiple_of(8));
    }
    let (_, at, _, len) = ALL[ALL.len() - 1];
    assert_eq!(at + len, PAGE_BYTES);
}

#[test]
fn a_fresh_mailbox_tells_the_layout_and_nothing_else() {
    let rig = Rig::new();
    let mailbox = rig.mailbox();
    assert_eq!(mailbox.layout(), Ok(rig.layout));
    assert_eq!(mailbox.cycles_per_ms(), Some(1_000_000));
    assert_eq!(mailbox.vector_bytes(), 16);
    assert_eq!(mailbox.pass_cycles(), None);
    assert_eq!(mailbox.first_bad(), None);
    assert_eq!(mailbox.fault(), None);
    assert_eq!(mailbox.pauses_from(0), []);
}

#[test]
fn a_page_without_the_magic_or_of_another_version_is_no_mailbox() {
    let rig = Rig::new();
    let refused = Mailbox::new(&rig.memory, 0x9000).layout();
    let expected = MailboxError::Magic { mailbox_offset: 0x9000, found: 0 };
    assert_eq!(refused, Err(expected));
    rig.memory.store(MAILBOX_OFFSET + word::VERSION, 2);
    let refused = rig.mailbox().layout();
    assert_eq!(refused, Err(MailboxError::Version { found: 2 }));
}

#[test]
fn a_mailbox_that_describes_no_possible_memory_is_refused() {
    for (word, value) in [(word::MEMORY_BYTES, u64::MAX), (word::WORK_START, 0), (word::WORK_END, 4 << 30)] {
        let rig = Rig::new();
        rig.memory.store(MAILBOX_OFFSET + word, value);
        let refused = rig.mailbox().layout();
        assert!(matches!(refused, Err(MailboxError::Layout(_))));
    }
}

#[test]
fn one_word_tells_pass_and_cursor_together() {
    let rig = Rig::new();
    let pages = rig.layout.work_pages();
    for (done, pass, cursor) in [(0, 0, 256), (767, 0, 1023), (768, 1, 256), (2000, 2, 720)] {
        rig.memory.store(MAILBOX_OFFSET + word::PAGES_DONE, done);
        let progress = rig.mailbox().progress(&rig.layout);
        assert_eq!(progress, Progress { pass, cursor });
        assert!(pages.contains(&progress.cursor));
    }
}

#[test]
fn times_are_told_only_if_the_clocks_rate_is_known() {
    let rig = Rig::new();
    let mailbox = rig.mailbox();
    mailbox.set_cycles_per_ms(2_600_000);
    assert_eq!(mailbox.nanoseconds(2_600), Some(1_000));
    assert_eq!(mailbox.nanoseconds(u64::MAX), Some(7_094_901_566_811_366_005));
    mailbox.set_cycles_per_ms(1);
    assert_eq!(mailbox.nanoseconds(u64::MAX), Some(u64::MAX));
    mailbox.set_cycles_per_ms(0);
    assert_eq!(mailbox.nanoseconds(2_600), None);
}

#[test]
fn a_fault_is_told_once_its_vector_stands_there() {
    let rig = Rig::new();
    for (word, value) in [
        (word::FAULT_ERROR_CODE, 4),
        (word::FAULT_RIP, 0x2_0042),
        (word::FAULT_CR2, 1 << 40),
        (word::FAULT_VECTOR, 15),
    ] {
        assert_eq!(rig.mailbox().fault(), None);
        rig.memory.store(MAILBOX_OFFSET + word, value);
    }
    let fault = Fault { vector: 14, error_code: 4, rip: 0x2_0042, cr2: 1 << 40 };
    assert_eq!(rig.mailbox().fault(), Some(fault));
}

#[test]
fn two_vcpus_talk_through_pages_of_their_own() {
    let rig = Rig::new();
    let second = Mailbox::new(&rig.memory, MAILBOX_OFFSET + PAGE_BYTES);
    second.park();
    assert_eq!(rig.memory.load(MAILBOX_OFFSET + word::PARK_REQUEST), 0);
}
