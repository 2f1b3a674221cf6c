//! A guest that writes a disk and reads it back, sleeping for each interrupt, and prints what it has done.
//!
//! It runs as a kernel: 64-bit, at privilege level 0, addresses as they are. In round `n` it writes to sector
//! [`sector`]`(n)` 64 words of [`word`]`(n, place)`, waits for the interrupt, reads the sector of the round before, checks each word, notes
//! the round in its table of sectors, and prints a letter. When it is told to stop it powers off.

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use iced_x86::code_asm::CodeLabel;
use iced_x86::code_asm::dword_ptr;
use iced_x86::code_asm::qword_ptr;
use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::word_ptr;

use crate::disk_driver;
use crate::disk_driver::AVAILABLE;
use crate::disk_driver::DATA;
use crate::disk_driver::DESCRIPTORS;
use crate::disk_driver::HEADER;
use crate::disk_driver::USED;

/// The disk's window and interrupt.
pub(crate) const WINDOW: u64 = 0xd000_0000;
pub(crate) const INTERRUPT: u32 = 5;
/// Sectors that are written.
pub(crate) const SECTORS: u64 = 64;
/// Where a failure is reported, as the number of the check.
pub(crate) const FAILURES: u16 = 0x11;
/// Where each round is reported.
pub(crate) const ROUNDS: u16 = 0x10;

/// The guest's own memory, behind the disk driver's.
const IDT: u64 = 0x40_5000;
const IDT_POINTER: u64 = 0x40_6000;
/// Interrupts seen.
pub(crate) const INTERRUPTS: u64 = 0x40_7000;
/// Not zero: stop after this round.
pub(crate) const STOP: u64 = 0x40_7008;
/// By sector, the last round that wrote it, plus 1.
pub(crate) const TABLE: u64 = 0x40_8000;

const VECTOR: u64 = 0x20 + INTERRUPT as u64;
const QUEUE_SIZE: u32 = 8;
/// What makes words of different rounds differ.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

pub(crate) fn sector(round: u64) -> u64 {
    (round * 7 + 3) % SECTORS
}

pub(crate) fn word(round: u64, place: u64) -> u64 {
    (round + 1).wrapping_mul(STEP).wrapping_add(place)
}

pub(crate) fn letter(round: u64) -> u8 {
    b'a' + u8::try_from(round % 16).unwrap()
}

/// Registers: r12 round, r13 the answers that there should be, r14 the window.
pub(crate) fn assemble() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut handler, mut again) = (a.create_label(), a.create_label());
    let (mut request, mut failed) = (a.create_label(), a.create_label());
    a.mov(r14, WINDOW)?;
    set_up_interrupts(&mut a, handler)?;
    set_up_disk(&mut a)?;
    a.xor(r12, r12)?;
    a.xor(r13, r13)?;
    a.set_label(&mut again)?;
    write_round(&mut a, request)?;
    read_back(&mut a, request, failed)?;
    note_and_print(&mut a)?;
    a.inc(r12)?;
    a.mov(rdi, STOP)?;
    a.cmp(qword_ptr(rdi), 0)?;
    a.je(again)?;
    a.mov(edx, 0x604)?;
    a.mov(eax, 0x2034)?;
    a.out(dx, ax)?;
    a.hlt()?;
    a.set_label(&mut failed)?;
    a.mov(edx, u32::from(FAILURES))?;
    a.mov(eax, ebx)?;
    a.out(dx, eax)?;
    a.hlt()?;
    a.set_label(&mut request)?;
    // What it ends with if the status is not good.
    a.mov(ebx, 1)?;
    disk_driver::request(&mut a, failed)?;
    a.set_label(&mut handler)?;
    handle(&mut a)?;
    a.assemble(ENTRY_ADDRESS)
}

/// Where the code comes to stand.
const ENTRY_ADDRESS: u64 = crate::image::PREFERRED + 0x200;

fn store(a: &mut CodeAssembler, address: u64, value: u32) -> Result<(), IcedError> {
    a.mov(rdi, address)?;
    a.mov(dword_ptr(rdi), value)
}

fn out(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(edx, port)?;
    a.mov(eax, value)?;
    a.out(dx, al)
}

/// One gate, and the first PIC with all masked but the disk's line.
fn set_up_interrupts(a: &mut CodeAssembler, handler: CodeLabel) -> Result<(), IcedError> {
    a.lea(rax, iced_x86::code_asm::ptr(handler))?;
    a.mov(rdi, IDT + 16 * VECTOR)?;
    a.mov(word_ptr(rdi), ax)?;
    a.mov(word_ptr(rdi + 2), 0x10)?;
    a.mov(word_ptr(rdi + 4), 0x8e00)?;
    a.shr(rax, 16)?;
    a.mov(word_ptr(rdi + 6), ax)?;
    a.mov(rdi, IDT_POINTER)?;
    a.mov(word_ptr(rdi), 0xfff)?;
    a.mov(rax, IDT)?;
    a.mov(qword_ptr(rdi + 2), rax)?;
    a.lidt(iced_x86::code_asm::ptr(rdi))?;
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xff & !(1 << INTERRUPT))]
    {
        out(a, port, value)?;
    }
    Ok(())
}

fn set_up_disk(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    let registers = [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x24, 0),
        (0x20, 1 << 9),
        (0x70, 11),
        (0x30, 0),
        (0x38, QUEUE_SIZE),
        (0x80, low(DESCRIPTORS)),
        (0x90, low(AVAILABLE)),
        (0xa0, low(USED)),
        (0x44, 1),
        (0x70, 15),
    ];
    for (register, value) in registers {
        a.mov(dword_ptr(r14 + register), value)?;
    }
    Ok(())
}

/// rax: the sector of the round in rcx.
fn sector_of(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.lea(rax, iced_x86::code_asm::ptr(rcx + rcx * 2))?;
    a.lea(rax, iced_x86::code_asm::ptr(rax * 2 + rcx + 3))?;
    a.and(eax, i32::try_from(SECTORS - 1).unwrap_or_default())
}

/// rax: the first word of the round in rcx.
fn word_of(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.lea(rax, iced_x86::code_asm::ptr(rcx + 1))?;
    a.mov(rdx, STEP)?;
    a.imul_2(rax, rdx)
}

fn write_round(a: &mut CodeAssembler, request: CodeLabel) -> Result<(), IcedError> {
    a.mov(rcx, r12)?;
    word_of(a)?;
    a.mov(rdi, DATA)?;
    a.lea(rsi, iced_x86::code_asm::ptr(rdi + 512))?;
    let mut fill = a.create_label();
    a.set_label(&mut fill)?;
    a.mov(qword_ptr(rdi), rax)?;
    a.inc(rax)?;
    a.add(rdi, 8)?;
    a.cmp(rdi, rsi)?;
    a.jb(fill)?;
    // Type and flags of the data's descriptor: to be read by the disk.
    store(a, HEADER, 1)?;
    store(a, DESCRIPTORS + 28, 1 | 2 << 16)?;
    sector_of(a)?;
    a.call(request)
}

/// Reads the sector of the round before, and checks each word.
fn read_back(a: &mut CodeAssembler, request: CodeLabel, failed: CodeLabel) -> Result<(), IcedError> {
    let mut first = a.create_label();
    a.test(r12, r12)?;
    a.jz(first)?;
    a.mov(rdi, DATA)?;
    a.mov(qword_ptr(rdi), 0)?;
    store(a, HEADER, 0)?;
    store(a, DESCRIPTORS + 28, 3 | 2 << 16)?;
    a.lea(rcx, iced_x86::code_asm::ptr(r12 - 1))?;
    sector_of(a)?;
    a.call(request)?;
    a.lea(rcx, iced_x86::code_asm::ptr(r12 - 1))?;
    word_of(a)?;
    a.mov(rdi, DATA)?;
    a.lea(rsi, iced_x86::code_asm::ptr(rdi + 512))?;
    a.mov(ebx, 2)?;
    let mut check = a.create_label();
    a.set_label(&mut check)?;
    a.cmp(qword_ptr(rdi), rax)?;
    a.jne(failed)?;
    a.inc(rax)?;
    a.add(rdi, 8)?;
    a.cmp(rdi, rsi)?;
    a.jb(check)?;
    a.set_label(&mut first)?;
    a.nop()
}

fn note_and_print(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rcx, r12)?;
    sector_of(a)?;
    a.mov(rdi, TABLE)?;
    a.lea(rcx, iced_x86::code_asm::ptr(r12 + 1))?;
    a.mov(qword_ptr(rdi + rax * 8), rcx)?;
    // As soon as the transmitter is empty.
    let mut wait = a.create_label();
    a.mov(edx, 0x3fd)?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, 0x20)?;
    a.jz(wait)?;
    a.mov(edx, 0x3f8)?;
    a.mov(eax, r12d)?;
    a.and(eax, 15)?;
    a.add(eax, i32::from(b'a'))?;
    a.out(dx, al)?;
    a.mov(edx, u32::from(ROUNDS))?;
    a.mov(eax, r12d)?;
    a.out(dx, eax)
}

fn handle(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.push(rax)?;
    a.push(rdi)?;
    a.mov(eax, dword_ptr(r14 + 0x60))?;
    a.mov(dword_ptr(r14 + 0x64), eax)?;
    a.mov(rdi, INTERRUPTS)?;
    a.inc(qword_ptr(rdi))?;
    a.mov(al, 0x20)?;
    a.out(0x20, al)?;
    a.pop(rdi)?;
    a.pop(rax)?;
    a.iretq()
}
