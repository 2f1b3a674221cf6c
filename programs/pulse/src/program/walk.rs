//! The program itself: passes, pages, chunks, and what is done between two chunks.

use iced_x86::IcedError;
use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{
    AsmMemoryOperand, AsmRegister64, CodeAssembler, CodeLabel, dword_ptr, ptr, qword_ptr,
};

use super::lanes::{Lane, Vectors};
use super::{MXCSR, here, mail, outside, report};
use crate::layout::{CHUNK_BYTES, HUGE_PAGE_BYTES, PAGE_BYTES, SHARED_OFFSET};
use crate::mailbox::{PAUSE_RING_LEN, word};
use crate::pattern::{MIX_FIRST, MIX_SECOND};
use crate::report::Report;

/// Vectors that are worked on side by side.
const ABREAST: usize = 4;
const OLD: usize = 0;
const NEW: usize = 4;
const OLD_STEP: Lane = Lane(8);
const NEW_STEP: Lane = Lane(9);
const AGREE: Lane = Lane(10);
const SPARE: Lane = Lane(11);

type Emitted = Result<(), IcedError>;

/// Labels that are jumped to or called from afar.
struct Places {
    begin_pass: CodeLabel,
    write: CodeLabel,
    mismatch: CodeLabel,
    lost: CodeLabel,
    checked: CodeLabel,
    moment: CodeLabel,
    serve: CodeLabel,
    parked: CodeLabel,
    resume: CodeLabel,
}

/// Emits the program. Returns the label of its first instruction.
pub(super) fn emit(a: &mut CodeAssembler, vectors: Vectors) -> Result<CodeLabel, IcedError> {
    let mut places = Places {
        begin_pass: a.create_label(),
        write: a.create_label(),
        mismatch: a.create_label(),
        lost: a.create_label(),
        checked: a.create_label(),
        moment: a.create_label(),
        serve: a.create_label(),
        parked: a.create_label(),
        resume: a.create_label(),
    };
    let entry = here(a)?;
    start(a)?;
    a.call(places.begin_pass)?;
    a.movq(mm0, r15)?;
    let page = here(a)?;
    a.lea(rsi, qword_ptr(rdi + PAGE_BYTES))?;
    let chunk = here(a)?;
    walk_chunk(a, vectors, &mut places)?;
    between_chunks(a, &mut places)?;
    a.cmp(rdi, rsi)?;
    a.jb(chunk)?;
    check_registers(a, vectors, &mut places)?;
    a.inc(r15)?;
    a.movq(mm0, r15)?;
    a.mov(mail(word::PAGES_DONE), r15)?;
    a.cmp(rdi, r9)?;
    a.jb(page)?;
    end_pass(a)?;
    // First the next pass, then the report of this one: the guest stops at reports more than
    // anywhere else, and all of its registers must be live there.
    a.call(places.begin_pass)?;
    report(a, Report::Pass)?;
    a.jmp(page)?;

    begin_pass(a, vectors, &mut places)?;
    mismatch(a, &mut places)?;
    lost(a, &mut places)?;
    park(a, &mut places)?;
    moment(a, &mut places)?;
    serve(a, &mut places)?;
    Ok(entry)
}

fn start(a: &mut CodeAssembler) -> Emitted {
    a.mov(r8, mail(word::WORK_START))?;
    a.mov(r9, mail(word::WORK_END))?;
    a.xor(r12d, r12d)?;
    a.xor(r14d, r14d)?;
    a.xor(r15d, r15d)?;
    clock(a)?;
    a.mov(r13, rax)
}

/// Reads the clock into rax. Clobbers rdx.
fn clock(a: &mut CodeAssembler) -> Emitted {
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)
}

/// The line of the generation in rax: its start into `start`, its step into `step`. Clobbers rax,
/// rcx and rdx. See `crate::pattern`.
fn line(a: &mut CodeAssembler, start: AsmRegister64, step: AsmRegister64) -> Emitted {
    a.xor(edx, edx)?;
    a.test(rax, rax)?;
    a.setne(dl)?;
    mix(a)?;
    a.mov(start, rax)?;
    mix(a)?;
    a.or(rax, rdx)?;
    a.mov(step, rax)
}

/// `crate::pattern::mix` on rax. Clobbers rcx.
fn mix(a: &mut CodeAssembler) -> Emitted {
    for (shift, factor) in [(30, Some(MIX_FIRST)), (27, Some(MIX_SECOND)), (31, None)] {
        a.mov(rcx, rax)?;
        a.shr(rcx, shift)?;
        a.xor(rax, rcx)?;
        if let Some(factor) = factor {
            a.mov(rcx, factor)?;
            a.imul_2(rax, rcx)?;
        }
    }
    Ok(())
}

/// Called: loads all registers of a pass from the generation in r12. Clobbers rax, rcx and rdx.
fn begin_pass(a: &mut CodeAssembler, vectors: Vectors, places: &mut Places) -> Emitted {
    a.set_label(&mut places.begin_pass)?;
    a.mov(dword_ptr(word::SCRATCH).gs(), MXCSR)?;
    a.ldmxcsr(dword_ptr(word::SCRATCH).gs())?;
    a.mov(rbx, r13)?;
    a.mov(rdi, r8)?;
    // The line to write first, by way of the registers that will keep the line to verify.
    for (next, first, by) in [(1, NEW, NEW_STEP), (0, OLD, OLD_STEP)] {
        a.lea(rax, qword_ptr(r12 + next))?;
        line(a, r10, r11)?;
        expected_at_rdi(a)?;
        load_vectors(a, vectors, first, by)?;
    }
    a.ret()
}

/// Loads the vectors from `first` on with the words from rax on, r11 apart, and `by` with what each
/// of them has to add to get to its next words. Clobbers rax.
fn load_vectors(a: &mut CodeAssembler, vectors: Vectors, first: usize, by: Lane) -> Emitted {
    let words = (0..vectors.bytes()).step_by(8);
    let scratch = word::SCRATCH;
    for lane in first..first + ABREAST {
        for offset in words.clone() {
            a.mov(mail(scratch + offset), rax)?;
            a.add(rax, r11)?;
        }
        vectors.load(a, Lane(lane), ptr(scratch).gs())?;
    }
    a.imul_3(rax, r11, words_abreast(vectors))?;
    for offset in words {
        a.mov(mail(scratch + offset), rax)?;
    }
    vectors.load(a, by, ptr(scratch).gs())
}

/// Words in the vectors that are worked on side by side.
fn words_abreast(vectors: Vectors) -> i32 {
    match vectors {
        Vectors::Sse2 => 8,
        Vectors::Avx2 => 16,
    }
}

/// The vectors of a chunk: pairs of the place in it and the number among those side by side.
fn places_in_chunk(vectors: Vectors) -> impl Iterator<Item = (AsmMemoryOperand, usize)> {
    let width = vectors.bytes();
    (0..CHUNK_BYTES / width)
        .zip((0..ABREAST).cycle())
        .map(move |(number, lane)| (ptr(rdi + number * width), lane))
}

/// Verifies the chunk at rdi, writes it, and goes on to the next.
fn walk_chunk(a: &mut CodeAssembler, vectors: Vectors, places: &mut Places) -> Emitted {
    vectors.compare(a, AGREE, AGREE)?;
    for (memory, lane) in places_in_chunk(vectors) {
        vectors.load(a, SPARE, memory)?;
        vectors.compare(a, SPARE, Lane(OLD + lane))?;
        vectors.and(a, AGREE, SPARE)?;
        vectors.add(a, Lane(OLD + lane), OLD_STEP)?;
    }
    vectors.mask(a, eax, AGREE)?;
    a.cmp(eax, vectors.full_mask())?;
    a.jne(places.mismatch)?;
    a.set_label(&mut places.write)?;
    for (memory, lane) in places_in_chunk(vectors) {
        vectors.store(a, memory, Lane(NEW + lane))?;
        vectors.add(a, Lane(NEW + lane), NEW_STEP)?;
    }
    a.add(rdi, CHUNK_BYTES_I32)?;
    Ok(())
}

/// Counts a tick: in the word that all vCPUs share, and in this one's own.
fn tick(a: &mut CodeAssembler) -> Emitted {
    a.lock().inc(qword_ptr(SHARED_OFFSET))?;
    a.inc(r14)?;
    a.mov(mail(word::TICKS), r14)
}

/// Counts a tick, looks at the clock and at the requests.
fn between_chunks(a: &mut CodeAssembler, places: &mut Places) -> Emitted {
    tick(a)?;
    a.call(places.moment)?;
    a.call(places.serve)?;
    a.cmp(mail(word::PARK_REQUEST), 0)?;
    a.jne(places.parked)?;
    a.set_label(&mut places.resume)
}

/// At the end of a page: registers against each other.
fn check_registers(a: &mut CodeAssembler, vectors: Vectors, places: &mut Places) -> Emitted {
    a.movq(rax, mm0)?;
    a.cmp(rax, r15)?;
    a.jne(places.lost)?;
    a.stmxcsr(dword_ptr(word::SCRATCH).gs())?;
    a.cmp(dword_ptr(word::SCRATCH).gs(), MXCSR)?;
    a.jne(places.lost)?;
    // The next word to verify must be the line's word at rdi.
    expected_at_rdi(a)?;
    vectors.lowest(a, rcx, Lane(OLD))?;
    a.cmp(rax, rcx)?;
    a.jne(places.lost)?;
    a.set_label(&mut places.checked)
}

/// What the word at rdi should hold, into rax.
fn expected_at_rdi(a: &mut CodeAssembler) -> Emitted {
    a.mov(rax, rdi)?;
    a.shr(rax, 3)?;
    a.imul_2(rax, r11)?;
    a.add(rax, r10)
}

fn end_pass(a: &mut CodeAssembler) -> Emitted {
    a.mov(rax, r13)?;
    a.sub(rax, rbx)?;
    a.mov(mail(word::PASS_CYCLES), rax)?;
    a.inc(r12)?;
    a.mov(mail(word::PASSES), r12)
}

/// A chunk whose vectors did not agree, before it is written: counts the wrong words one by one.
fn mismatch(a: &mut CodeAssembler, places: &mut Places) -> Emitted {
    a.set_label(&mut places.mismatch)?;
    let mut next = a.create_label();
    let mut counted = a.create_label();
    let mut memory_is_wrong = a.create_label();
    expected_at_rdi(a)?;
    a.mov(rdx, rdi)?;
    a.push(mail(word::ERRORS))?;
    let scan = here(a)?;
    a.mov(rcx, qword_ptr(rdx))?;
    a.cmp(rcx, rax)?;
    a.je(next)?;
    a.cmp(mail(word::ERRORS), 0)?;
    a.jne(counted)?;
    a.mov(mail(word::FIRST_OFFSET), rdx)?;
    a.mov(mail(word::FIRST_EXPECTED), rax)?;
    a.mov(mail(word::FIRST_FOUND), rcx)?;
    a.mov(mail(word::FIRST_PASS), r12)?;
    a.set_label(&mut counted)?;
    a.inc(mail(word::ERRORS))?;
    a.set_label(&mut next)?;
    a.add(rax, r11)?;
    a.add(rdx, 8)?;
    a.lea(rcx, qword_ptr(rdi + CHUNK_BYTES))?;
    a.cmp(rdx, rcx)?;
    a.jb(scan)?;
    // Word by word nothing was wrong: then the vectors were.
    a.pop(rcx)?;
    a.cmp(rcx, mail(word::ERRORS))?;
    a.jne(memory_is_wrong)?;
    report_lost(a)?;
    a.jmp(places.write)?;
    a.set_label(&mut memory_is_wrong)?;
    report_once(a, word::MISMATCH_REPORTED, Report::Mismatch)?;
    a.jmp(places.write)
}

fn lost(a: &mut CodeAssembler, places: &mut Places) -> Emitted {
    a.set_label(&mut places.lost)?;
    report_lost(a)?;
    a.jmp(places.checked)
}

fn report_lost(a: &mut CodeAssembler) -> Emitted {
    a.inc(mail(word::REGISTERS_LOST))?;
    report_once(a, word::REGISTERS_REPORTED, Report::Registers)
}

/// Sends a report unless this pass has sent it already. Clobbers rax and rdx.
fn report_once(a: &mut CodeAssembler, mark: u64, what: Report) -> Emitted {
    let mut done = a.create_label();
    a.lea(rax, qword_ptr(r12 + 1))?;
    a.cmp(mail(mark), rax)?;
    a.je(done)?;
    a.mov(mail(mark), rax)?;
    report(a, what)?;
    a.set_label(&mut done)?;
    a.zero_bytes()
}

/// Stands still between two chunks until the request is taken back.
fn park(a: &mut CodeAssembler, places: &mut Places) -> Emitted {
    a.set_label(&mut places.parked)?;
    a.mov(mail(word::PARKED), 1)?;
    report(a, Report::Parked)?;
    let still = here(a)?;
    a.pause()?;
    a.call(places.moment)?;
    a.call(places.serve)?;
    a.cmp(mail(word::PARK_REQUEST), 0)?;
    a.jne(still)?;
    a.mov(mail(word::PARKED), 0)?;
    a.jmp(places.resume)
}

/// Called: one look at the clock. Clobbers rax and rdx.
fn moment(a: &mut CodeAssembler, places: &mut Places) -> Emitted {
    let mut back = a.create_label();
    let mut longest = a.create_label();
    let mut judged = a.create_label();
    let mut pause = a.create_label();
    a.set_label(&mut places.moment)?;
    clock(a)?;
    a.mov(rdx, rax)?;
    a.sub(rdx, r13)?;
    a.mov(r13, rax)?;
    a.jb(back)?;
    a.cmp(rdx, mail(word::GAP_LONGEST))?;
    a.ja(longest)?;
    a.set_label(&mut judged)?;
    a.cmp(rdx, mail(word::PAUSE_THRESHOLD))?;
    a.jae(pause)?;
    a.ret()?;

    a.set_label(&mut longest)?;
    a.mov(mail(word::GAP_LONGEST), rdx)?;
    a.mov(mail(word::GAP_END), rax)?;
    a.jmp(judged)?;

    a.set_label(&mut back)?;
    a.inc(mail(word::TIME_WENT_BACK))?;
    a.ret()?;

    a.set_label(&mut pause)?;
    a.push(rcx)?;
    a.mov(rcx, mail(word::PAUSES))?;
    a.and(ecx, PAUSE_RING_MASK)?;
    a.shl(ecx, 4)?;
    a.mov(qword_ptr(rcx + word::PAUSE_RING).gs(), rax)?;
    a.mov(qword_ptr(rcx + word::PAUSE_RING + 8).gs(), rdx)?;
    a.inc(mail(word::PAUSES))?;
    a.pop(rcx)?;
    a.ret()
}

/// Called: looks at the requests but the one to park. Clobbers rax, rcx, rdx and rbp.
fn serve(a: &mut CodeAssembler, places: &mut Places) -> Emitted {
    let mut gap = a.create_label();
    let mut gap_done = a.create_label();
    let mut probe_asked = a.create_label();
    a.set_label(&mut places.serve)?;
    let asked = outside::look(a)?;
    a.mov(rax, mail(word::GAP_REQUEST))?;
    a.cmp(rax, mail(word::GAP_ANSWER))?;
    a.jne(gap)?;
    a.set_label(&mut gap_done)?;
    a.mov(rax, mail(word::PROBE_REQUEST))?;
    a.cmp(rax, mail(word::PROBE_ANSWER))?;
    a.jne(probe_asked)?;
    a.ret()?;

    a.set_label(&mut gap)?;
    a.mov(mail(word::GAP_LONGEST), 0)?;
    a.mov(mail(word::GAP_END), 0)?;
    a.mov(mail(word::GAP_ANSWER), rax)?;
    a.jmp(gap_done)?;

    a.set_label(&mut probe_asked)?;
    probe(a, places.moment)?;
    outside::answer(a, asked, places.moment)
}

/// Answers the probe request in rax, and returns to the caller of [`serve`].
fn probe(a: &mut CodeAssembler, moment: CodeLabel) -> Emitted {
    let mut fewer = a.create_label();
    let mut done = a.create_label();
    a.push(rdi)?;
    a.push(rsi)?;
    a.push(rbx)?;
    a.push(rax)?;
    a.call(moment)?;
    a.push(r13)?;
    // rbp: windows in memory but the first; rcx: those to touch; rsi: the one in progress;
    // rbx: pages touched.
    a.mov(rbp, mail(word::MEMORY_BYTES))?;
    a.shr(rbp, HUGE_PAGE_BYTES.trailing_zeros())?;
    a.dec(rbp)?;
    a.mov(rcx, mail(word::PROBE_WINDOWS))?;
    a.cmp(rcx, rbp)?;
    a.jbe(fewer)?;
    a.mov(rcx, rbp)?;
    a.set_label(&mut fewer)?;
    a.xor(esi, esi)?;
    a.xor(ebx, ebx)?;
    let window = here(a)?;
    a.cmp(rsi, rcx)?;
    a.jae(done)?;
    a.mov(rax, rbp)?;
    a.mul(rsi)?;
    a.div(rcx)?;
    a.inc(rax)?;
    a.shl(rax, HUGE_PAGE_BYTES.trailing_zeros())?;
    a.mov(rdi, rax)?;
    let page = here(a)?;
    a.mov(rax, qword_ptr(rdi))?;
    a.inc(rbx)?;
    tick(a)?;
    a.call(moment)?;
    a.add(rdi, PAGE_BYTES_I32)?;
    a.test(rdi, HUGE_PAGE_MASK)?;
    a.jne(page)?;
    a.inc(rsi)?;
    a.jmp(window)?;
    a.set_label(&mut done)?;
    a.pop(rcx)?;
    a.mov(rax, r13)?;
    a.sub(rax, rcx)?;
    a.mov(mail(word::PROBE_CYCLES), rax)?;
    a.mov(mail(word::PROBE_PAGES), rbx)?;
    a.pop(rax)?;
    a.mov(mail(word::PROBE_ANSWER), rax)?;
    a.pop(rbx)?;
    a.pop(rsi)?;
    a.pop(rdi)?;
    report(a, Report::Probe)?;
    a.ret()
}

// The same sizes as immediate operands.
const CHUNK_BYTES_I32: i32 = 512;
const PAGE_BYTES_I32: i32 = 4096;
const HUGE_PAGE_MASK: i32 = (2 << 20) - 1;
const PAUSE_RING_MASK: i32 = 31;
const _: () = assert!(CHUNK_BYTES == CHUNK_BYTES_I32.unsigned_abs() as u64);
const _: () = assert!(PAGE_BYTES == PAGE_BYTES_I32.unsigned_abs() as u64);
const _: () = assert!(HUGE_PAGE_BYTES == HUGE_PAGE_MASK.unsigned_abs() as u64 + 1);
const _: () = assert!(PAUSE_RING_LEN == PAUSE_RING_MASK.unsigned_abs() as u64 + 1);
