//! A guest's driver of a virtio disk: where its queue lies, and one request.

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use iced_x86::code_asm::CodeLabel;
use iced_x86::code_asm::byte_ptr;
use iced_x86::code_asm::dword_ptr;
use iced_x86::code_asm::qword_ptr;
use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::word_ptr;

pub(crate) const DESCRIPTORS: u64 = 0x40_0000;
pub(crate) const AVAILABLE: u64 = 0x40_1000;
pub(crate) const USED: u64 = 0x40_2000;
pub(crate) const HEADER: u64 = 0x40_3000;
const STATUS: u64 = 0x40_3010;
pub(crate) const DATA: u64 = 0x40_4000;

/// Asks for the sector in rax, sleeps until the answer is there, and goes to `failed` unless its status is good. The
/// device's registers are at r14; r13 counts requests. Clobbers rax and rdi.
pub(crate) fn request(a: &mut CodeAssembler, failed: CodeLabel) -> Result<(), IcedError> {
    a.mov(rdi, HEADER)?;
    a.mov(qword_ptr(rdi + 8), rax)?;
    a.mov(rdi, STATUS)?;
    a.mov(byte_ptr(rdi), 0xff)?;
    let descriptors = [(HEADER, 16, Some(1 | 1 << 16)), (DATA, 512, None), (STATUS, 1, Some(2))];
    for (place, (address, len, flags)) in (DESCRIPTORS..).step_by(16).zip(descriptors) {
        a.mov(rdi, place)?;
        a.mov(rax, address)?;
        a.mov(qword_ptr(rdi), rax)?;
        a.mov(dword_ptr(rdi + 8), len)?;
        if let Some(flags) = flags {
            a.mov(dword_ptr(rdi + 12), flags)?;
        }
    }
    // Descriptor 0 is the head of each; the ring's entries are zero.
    a.inc(r13)?;
    a.mov(rdi, AVAILABLE)?;
    a.mov(word_ptr(rdi + 2), r13w)?;
    a.mov(dword_ptr(r14 + 0x50), 0)?;
    let (mut look, mut done) = (a.create_label(), a.create_label());
    a.set_label(&mut look)?;
    a.cli()?;
    a.mov(rdi, USED)?;
    a.cmp(word_ptr(rdi + 2), r13w)?;
    a.je(done)?;
    // An interrupt that is due comes after the next instruction: it ends the sleep.
    a.sti()?;
    a.hlt()?;
    a.jmp(look)?;
    a.set_label(&mut done)?;
    a.mov(rdi, STATUS)?;
    a.cmp(byte_ptr(rdi), 0)?;
    a.jne(failed)?;
    a.ret()
}
