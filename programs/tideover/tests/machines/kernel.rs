//! A kernel of a few hundred bytes, started as Linux is.
//!
//! It says `boot`, its command line, `|` and the first four bytes of its initial RAM disk. Then, in rounds, it says `line` and
//! the round's number, and looks for a key: `p` switches the machine off, `r` and `R` reset it (by the keyboard
//! controller, by the chipset), `c` crashes it, `B` breaks the ring of the disk and does no more, and any other is said back.
//!
//! With a disk, round `n` also writes sector [`sector`]`(n)`, which gets 64 words of [`word`]`(n, place)`, and reads
//! the sector of the round before, sleeping until the interrupt of each. If a word is wrong, it says `lost` and crashes.

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use iced_x86::code_asm::CodeLabel;
use iced_x86::code_asm::byte_ptr;
use iced_x86::code_asm::dword_ptr;
use iced_x86::code_asm::ptr;
use iced_x86::code_asm::qword_ptr;
use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::word_ptr;

use crate::disk_driver;
use crate::disk_driver::AVAILABLE;
use crate::disk_driver::DATA;
use crate::disk_driver::DESCRIPTORS;
use crate::disk_driver::HEADER;
use crate::disk_driver::USED;

/// Sectors that are written.
pub(crate) const SECTORS: u64 = 64;
pub(crate) const WORDS: u64 = 64;

/// Where the image wants its kernel, and how much memory from there on.
const PREFERRED: u64 = 2 << 20;
const INIT_BYTES: u32 = 1 << 20;
/// Bytes of an image before the kernel, and from its first byte to the entry.
const SETUP: usize = 1024;
const ENTRY: usize = 0x200;

/// The disk's window, interrupt and vector.
const WINDOW: u64 = 0xd000_0000;
const INTERRUPT: u32 = 5;
const VECTOR: u64 = 0x20 + INTERRUPT as u64;

/// The kernel's own memory, behind the disk driver's.
const IDT: u64 = 0x40_5000;
const IDT_POINTER: u64 = 0x40_6000;

/// What makes words of different rounds differ.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// How long a round is drawn out, in cycles.
const CYCLES: i32 = 1_000_000;

pub(crate) fn sector(round: u64) -> u64 {
    round % SECTORS
}

pub(crate) fn word(round: u64, place: u64) -> u64 {
    round.wrapping_mul(STEP).wrapping_add(place)
}

/// The image, a bzImage.
pub(crate) fn image(disk: bool) -> Vec<u8> {
    let code = assemble(disk).unwrap();
    let kernel_bytes = (ENTRY + code.len()).next_multiple_of(16);
    let mut image = vec![0; SETUP + kernel_bytes];
    let mut put = |place: usize, bytes: &[u8]| image[place..place + bytes.len()].copy_from_slice(bytes);
    put(SETUP + ENTRY, &code);
    put(0x1f1, &[1]);
    put(0x1f4, &u32::try_from(kernel_bytes / 16).unwrap().to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &PREFERRED.to_le_bytes());
    put(0x260, &INIT_BYTES.to_le_bytes());
    image
}

/// Routines that are called.
#[derive(Clone, Copy)]
struct Routines {
    /// Says al.
    say: CodeLabel,
    /// Has the disk do a request for the sector in rax, and sleeps meanwhile.
    request: CodeLabel,
    lost: CodeLabel,
}

/// Registers: r12 round, r13 the answers of the disk that there should be, r14 its window.
fn assemble(disk: bool) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut to = Routines { say: a.create_label(), request: a.create_label(), lost: a.create_label() };
    let (mut handler, mut again) = (a.create_label(), a.create_label());
    a.mov(r14, WINDOW)?;
    a.xor(r12, r12)?;
    a.xor(r13, r13)?;
    say_boot(&mut a, to)?;
    if disk {
        set_up_interrupts(&mut a, handler)?;
        set_up_disk(&mut a)?;
    }
    a.set_label(&mut again)?;
    if disk {
        write_round(&mut a, to)?;
        read_back(&mut a, to)?;
    }
    say_line(&mut a, to)?;
    obey(&mut a, to)?;
    draw_out(&mut a)?;
    a.inc(r12)?;
    a.jmp(again)?;
    a.set_label(&mut to.lost)?;
    say_text(&mut a, to, b"lost\n")?;
    crash(&mut a)?;
    a.set_label(&mut to.say)?;
    say(&mut a)?;
    a.set_label(&mut to.request)?;
    disk_driver::request(&mut a, to.lost)?;
    a.set_label(&mut handler)?;
    handle(&mut a)?;
    a.assemble(PREFERRED + u64::try_from(ENTRY).unwrap_or_default())
}

fn say_text(a: &mut CodeAssembler, to: Routines, text: &[u8]) -> Result<(), IcedError> {
    for byte in text {
        a.mov(eax, u32::from(*byte))?;
        a.call(to.say)?;
    }
    Ok(())
}

/// rsi: boot parameters.
fn say_boot(a: &mut CodeAssembler, to: Routines) -> Result<(), IcedError> {
    say_text(a, to, b"boot ")?;
    let (mut next, mut done) = (a.create_label(), a.create_label());
    a.mov(edi, dword_ptr(rsi + 0x228))?;
    a.set_label(&mut next)?;
    a.movzx(eax, byte_ptr(rdi))?;
    a.test(al, al)?;
    a.jz(done)?;
    a.call(to.say)?;
    a.inc(rdi)?;
    a.jmp(next)?;
    a.set_label(&mut done)?;
    say_text(a, to, b"|")?;
    let mut without = a.create_label();
    a.cmp(dword_ptr(rsi + 0x21c), 4)?;
    a.jb(without)?;
    a.mov(edi, dword_ptr(rsi + 0x218))?;
    for place in 0..4 {
        a.movzx(eax, byte_ptr(rdi + place))?;
        a.call(to.say)?;
    }
    a.set_label(&mut without)?;
    say_text(a, to, b"\n")
}

fn say_line(a: &mut CodeAssembler, to: Routines) -> Result<(), IcedError> {
    say_text(a, to, b"line ")?;
    let (mut digit, mut small) = (a.create_label(), a.create_label());
    a.mov(ebx, r12d)?;
    a.mov(ecx, 8)?;
    a.set_label(&mut digit)?;
    a.rol(ebx, 4)?;
    a.mov(eax, ebx)?;
    a.and(eax, 15)?;
    a.add(eax, i32::from(b'0'))?;
    a.cmp(eax, i32::from(b'9'))?;
    a.jbe(small)?;
    a.add(eax, i32::from(b'a' - b'9' - 1))?;
    a.set_label(&mut small)?;
    a.call(to.say)?;
    a.dec(ecx)?;
    a.jnz(digit)?;
    say_text(a, to, b"\n")
}

/// Says al, as soon as the transmitter is empty.
fn say(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut wait = a.create_label();
    a.push(rax)?;
    a.mov(edx, 0x3fd)?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, 0x20)?;
    a.jz(wait)?;
    a.pop(rax)?;
    a.mov(edx, 0x3f8)?;
    a.out(dx, al)?;
    a.ret()
}

fn out(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(edx, port)?;
    a.mov(eax, value)?;
    a.out(dx, al)
}

fn crash(a: &mut CodeAssembler) -> Result<(), IcedError> {
    // A table without entries.
    a.mov(rdi, IDT_POINTER + 64)?;
    a.mov(word_ptr(rdi), 0)?;
    a.lidt(ptr(rdi))?;
    a.int3()
}

fn obey(a: &mut CodeAssembler, to: Routines) -> Result<(), IcedError> {
    let mut done = a.create_label();
    a.mov(edx, 0x3fd)?;
    a.in_(al, dx)?;
    a.test(al, 1)?;
    a.jz(done)?;
    a.mov(edx, 0x3f8)?;
    a.in_(al, dx)?;
    a.movzx(ebp, al)?;
    for key in *b"prRBc" {
        let mut other = a.create_label();
        a.cmp(ebp, i32::from(key))?;
        a.jne(other)?;
        match key {
            b'p' => {
                say_text(a, to, b"off\n")?;
                a.mov(edx, 0x604)?;
                a.mov(eax, 0x2000)?;
                a.out(dx, ax)?;
            }
            b'r' => out(a, 0x64, 0xfe)?,
            b'R' => {
                out(a, 0xcf9, 2)?;
                out(a, 0xcf9, 6)?;
            }
            b'B' => {
                // More requests than the ring has places.
                a.mov(rdi, AVAILABLE)?;
                a.add(word_ptr(rdi + 2), 0x4000)?;
                a.mov(dword_ptr(r14 + 0x50), 0)?;
                // Another round would mend it, perhaps before the disk has looked.
                let mut stay = a.create_label();
                a.set_label(&mut stay)?;
                a.hlt()?;
                a.jmp(stay)?;
            }
            _ => crash(a)?,
        }
        a.set_label(&mut other)?;
    }
    say_text(a, to, b"key ")?;
    a.mov(eax, ebp)?;
    a.call(to.say)?;
    say_text(a, to, b"\n")?;
    a.set_label(&mut done)?;
    a.nop()
}

fn draw_out(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut wait = a.create_label();
    let now = |a: &mut CodeAssembler| {
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)
    };
    now(a)?;
    a.mov(rbx, rax)?;
    a.set_label(&mut wait)?;
    a.pause()?;
    now(a)?;
    a.sub(rax, rbx)?;
    a.cmp(rax, CYCLES)?;
    a.jb(wait)
}

/// One gate, and the first PIC with all masked but the disk's line.
fn set_up_interrupts(a: &mut CodeAssembler, handler: CodeLabel) -> Result<(), IcedError> {
    a.lea(rax, ptr(handler))?;
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
    a.lidt(ptr(rdi))?;
    let mask = 0xff & !(1 << INTERRUPT);
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, mask)] {
        out(a, port, value)?;
    }
    Ok(())
}

fn set_up_disk(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    // Reset, driver, VERSION_1 alone, features are good, one queue of 8, go.
    let registers = [
        (0x70, 0),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x24, 0),
        (0x20, 0),
        (0x70, 11),
        (0x30, 0),
        (0x38, 8),
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

/// Sets the request's type, and whether the disk writes the data.
fn set_type(a: &mut CodeAssembler, kind: u32, flags: u32) -> Result<(), IcedError> {
    a.mov(rdi, HEADER)?;
    a.mov(dword_ptr(rdi), kind)?;
    a.mov(rdi, DESCRIPTORS + 28)?;
    a.mov(dword_ptr(rdi), flags | 2 << 16)
}

fn write_round(a: &mut CodeAssembler, to: Routines) -> Result<(), IcedError> {
    let mut fill = a.create_label();
    a.mov(rax, STEP)?;
    a.imul_2(rax, r12)?;
    a.mov(rdi, DATA)?;
    a.lea(rcx, ptr(rdi + 512))?;
    a.set_label(&mut fill)?;
    a.mov(qword_ptr(rdi), rax)?;
    a.inc(rax)?;
    a.add(rdi, 8)?;
    a.cmp(rdi, rcx)?;
    a.jb(fill)?;
    set_type(a, 1, 1)?;
    a.mov(rax, r12)?;
    a.and(eax, i32::try_from(SECTORS - 1).unwrap_or_default())?;
    a.call(to.request)
}

/// Reads the sector of the round before, and checks each word.
fn read_back(a: &mut CodeAssembler, to: Routines) -> Result<(), IcedError> {
    let (mut first, mut check) = (a.create_label(), a.create_label());
    a.test(r12, r12)?;
    a.jz(first)?;
    a.mov(rdi, DATA)?;
    a.mov(qword_ptr(rdi), 0)?;
    set_type(a, 0, 3)?;
    a.lea(rax, ptr(r12 - 1))?;
    a.and(eax, i32::try_from(SECTORS - 1).unwrap_or_default())?;
    a.call(to.request)?;
    a.lea(rbx, ptr(r12 - 1))?;
    a.mov(rax, STEP)?;
    a.imul_2(rax, rbx)?;
    a.mov(rdi, DATA)?;
    a.lea(rcx, ptr(rdi + 512))?;
    a.set_label(&mut check)?;
    a.cmp(qword_ptr(rdi), rax)?;
    a.jne(to.lost)?;
    a.inc(rax)?;
    a.add(rdi, 8)?;
    a.cmp(rdi, rcx)?;
    a.jb(check)?;
    a.set_label(&mut first)?;
    a.nop()
}

fn handle(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.push(rax)?;
    a.mov(eax, dword_ptr(r14 + 0x60))?;
    a.mov(dword_ptr(r14 + 0x64), eax)?;
    a.mov(al, 0x20)?;
    a.out(0x20, al)?;
    a.pop(rax)?;
    a.iretq()
}
