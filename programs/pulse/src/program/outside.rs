//! What the program does at its ports when the host asks for it: commands, and the console.
//!
//! Both are looked at between two chunks. While the console is slow the guest goes on to look at its
//! clock, so that it does not take its own waiting for a pause.

use iced_x86::IcedError;
use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{CodeAssembler, CodeLabel, byte_ptr, dword_ptr, word_ptr};

use super::{here, mail};
use crate::layout::IDT_OFFSET;
use crate::mailbox::word;
use crate::ports::{
    CAN_SEND, Command, DATA_READY, ECHO_AT_ONCE, KEYBOARD_PORT, LINE_BEGINS, LINE_STATUS_PORT, NOBODY,
    POWER_OFF, POWER_PORT, PULSE_RESET, RESET_ARM, RESET_NOW, RESET_PORT, SEND_TRIES, SERIAL_PORT,
};

type Emitted = Result<(), IcedError>;

/// Gates in the IDT, of two words each.
const IDT_GATES: u32 = 256;
/// End of the line that is put together in the scratch words, as an offset in the mailbox.
const LINE_END: u64 = word::SCRATCH + 64;

/// Where [`look`] jumps to, and where it goes on after.
pub(super) struct Asked {
    command: CodeLabel,
    command_done: CodeLabel,
    line: CodeLabel,
    line_done: CodeLabel,
    echo: CodeLabel,
    echo_done: CodeLabel,
}

/// Looks whether a command or something at the console is due. Clobbers rax, rcx, rdx and rbp.
pub(super) fn look(a: &mut CodeAssembler) -> Result<Asked, IcedError> {
    let mut asked = Asked {
        command: a.create_label(),
        command_done: a.create_label(),
        line: a.create_label(),
        line_done: a.create_label(),
        echo: a.create_label(),
        echo_done: a.create_label(),
    };
    a.mov(rax, mail(word::COMMAND))?;
    a.test(rax, rax)?;
    a.jne(asked.command)?;
    a.set_label(&mut asked.command_done)?;
    a.cmp(mail(word::CONSOLE_LINES), 0)?;
    a.jne(asked.line)?;
    a.set_label(&mut asked.line_done)?;
    a.cmp(mail(word::CONSOLE_POLL), 0)?;
    a.jne(asked.echo)?;
    a.set_label(&mut asked.echo_done)?;
    a.zero_bytes()?;
    Ok(asked)
}

/// Emits what [`look`] jumps to.
pub(super) fn answer(a: &mut CodeAssembler, mut asked: Asked, moment: CodeLabel) -> Emitted {
    let mut put = a.create_label();
    command(a, &mut asked)?;
    a.set_label(&mut asked.line)?;
    if_due(a, word::CONSOLE_LINES, word::CONSOLE_LINE_LAST, asked.line_done)?;
    line(a, put)?;
    a.jmp(asked.line_done)?;
    a.set_label(&mut asked.echo)?;
    if_due(a, word::CONSOLE_POLL, word::CONSOLE_POLL_LAST, asked.echo_done)?;
    echo(a, put)?;
    a.jmp(asked.echo_done)?;
    a.set_label(&mut put)?;
    put_byte(a, moment)
}

/// Takes the command in rax back, so that it is not done twice, and does it.
fn command(a: &mut CodeAssembler, asked: &mut Asked) -> Emitted {
    a.set_label(&mut asked.command)?;
    a.mov(mail(word::COMMAND), 0)?;
    let all = [Command::PowerOff, Command::Reset, Command::ResetByChipset, Command::Crash];
    for command in all {
        let mut other = a.create_label();
        a.cmp(eax, u32::try_from(command.code()).unwrap_or_default())?;
        a.jne(other)?;
        match command {
            Command::PowerOff => {
                a.mov(edx, u32::from(POWER_PORT))?;
                a.mov(eax, u32::from(POWER_OFF))?;
                a.out(dx, ax)?;
            }
            Command::Reset => out_byte(a, KEYBOARD_PORT, PULSE_RESET)?,
            Command::ResetByChipset => {
                // It is the bit that goes up that resets.
                out_byte(a, RESET_PORT, RESET_ARM)?;
                out_byte(a, RESET_PORT, RESET_NOW)?;
            }
            Command::Crash => crash(a)?,
        }
        a.jmp(asked.command_done)?;
        a.set_label(&mut other)?;
    }
    a.jmp(asked.command_done)
}

/// Takes all gates away and raises an exception: it cannot be delivered, nor the one that this is, nor the one that
/// that is.
fn crash(a: &mut CodeAssembler) -> Emitted {
    a.mov(edi, u32::try_from(IDT_OFFSET).unwrap_or_default())?;
    a.mov(ecx, IDT_GATES * 2)?;
    a.xor(eax, eax)?;
    a.cld()?;
    a.rep().stosq()?;
    a.ud2()
}

/// Clobbers rax and rdx.
fn out_byte(a: &mut CodeAssembler, port: u16, value: u8) -> Emitted {
    a.mov(edx, u32::from(port))?;
    a.mov(eax, u32::from(value))?;
    a.out(dx, al)
}

/// Goes on if the period has passed since it did so last, by the clock at the last look; a clock that went back counts
/// as that. Else jumps away. Clobbers rax.
fn if_due(a: &mut CodeAssembler, period: u64, last: u64, not_yet: CodeLabel) -> Emitted {
    a.mov(rax, r13)?;
    a.sub(rax, mail(last))?;
    a.cmp(rax, mail(period))?;
    a.jb(not_yet)?;
    a.mov(mail(last), r13)
}

/// Sends a line with the ticks, in decimal. Clobbers rax, rcx, rdx and rbp.
fn line(a: &mut CodeAssembler, put: CodeLabel) -> Emitted {
    let mut end = a.create_label();
    a.push(rbx)?;
    // Put together from its end on; rbp is where it begins.
    a.mov(word_ptr(LINE_END - 2).gs(), u32::from(u16::from_le_bytes(*b"\r\n")))?;
    a.mov(ebp, u32::try_from(LINE_END - 2).unwrap_or_default())?;
    a.mov(rax, r14)?;
    a.mov(ecx, 10)?;
    let digit = here(a)?;
    a.dec(rbp)?;
    a.xor(edx, edx)?;
    a.div(rcx)?;
    a.add(dl, u32::from(b'0'))?;
    a.mov(byte_ptr(rbp).gs(), dl)?;
    a.test(rax, rax)?;
    a.jne(digit)?;
    let [first @ .., second_low, second_high] = LINE_BEGINS;
    a.sub(rbp, 6)?;
    a.mov(dword_ptr(rbp).gs(), u32::from_le_bytes(first))?;
    a.mov(word_ptr(rbp + 4).gs(), u32::from(u16::from_le_bytes([second_low, second_high])))?;
    let next = here(a)?;
    a.movzx(ebx, byte_ptr(rbp).gs())?;
    a.call(put)?;
    a.jb(end)?;
    a.inc(rbp)?;
    a.cmp(rbp, i32::try_from(LINE_END).unwrap_or_default())?;
    a.jb(next)?;
    a.set_label(&mut end)?;
    a.pop(rbx)
}

/// Sends received bytes back, a line feed after each carriage return. Clobbers rax, rcx, rdx and rbp.
fn echo(a: &mut CodeAssembler, put: CodeLabel) -> Emitted {
    let mut end = a.create_label();
    let mut sent = a.create_label();
    a.push(rbx)?;
    a.mov(ebp, ECHO_AT_ONCE)?;
    let next = here(a)?;
    a.mov(edx, u32::from(LINE_STATUS_PORT))?;
    a.in_(al, dx)?;
    a.cmp(al, u32::from(NOBODY))?;
    a.je(end)?;
    a.test(al, u32::from(DATA_READY))?;
    a.je(end)?;
    a.mov(edx, u32::from(SERIAL_PORT))?;
    a.in_(al, dx)?;
    a.movzx(ebx, al)?;
    a.call(put)?;
    a.jb(end)?;
    a.cmp(ebx, u32::from(b'\r'))?;
    a.jne(sent)?;
    a.mov(ebx, u32::from(b'\n'))?;
    a.call(put)?;
    a.jb(end)?;
    a.set_label(&mut sent)?;
    a.dec(ebp)?;
    a.jne(next)?;
    a.set_label(&mut end)?;
    a.pop(rbx)
}

/// Called: sends the byte in bl once the line is free. Carry says that it never was. Clobbers rax, rcx and rdx.
fn put_byte(a: &mut CodeAssembler, moment: CodeLabel) -> Emitted {
    let mut free = a.create_label();
    let mut given_up = a.create_label();
    a.mov(ecx, SEND_TRIES)?;
    let look = here(a)?;
    a.mov(edx, u32::from(LINE_STATUS_PORT))?;
    a.in_(al, dx)?;
    a.push(rax)?;
    a.call(moment)?;
    a.pop(rax)?;
    a.cmp(al, u32::from(NOBODY))?;
    a.je(given_up)?;
    a.test(al, u32::from(CAN_SEND))?;
    a.jne(free)?;
    a.dec(ecx)?;
    a.jne(look)?;
    a.set_label(&mut given_up)?;
    a.stc()?;
    a.ret()?;
    a.set_label(&mut free)?;
    a.mov(eax, ebx)?;
    a.mov(edx, u32::from(SERIAL_PORT))?;
    a.out(dx, al)?;
    a.call(moment)?;
    a.clc()?;
    a.ret()
}

const _: () = assert!(LINE_BEGINS.len() == 6);
// The longest count and the line's end.
const _: () = assert!(LINE_BEGINS.len() + 20 + 2 <= 64);
