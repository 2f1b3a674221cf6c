//! The machine code of the KVM guest, made at run time.
//!
//! The program never leaves privilege level 3 by itself but for the OUT of a report, and what the host
//! asks it to do at other ports. All vCPUs run the same code. All of the program's live
//! state is in registers on purpose, and each page ends with a comparison of some of them against
//! others:
//!
//! | register | holds |
//! | --- | --- |
//! | GS base | the mailbox |
//! | rdi, rsi | the chunk in progress, the end of its page |
//! | r8, r9 | start and end of the work area |
//! | r10, r11 | start and step of the line being verified |
//! | r12 | its generation: passes done |
//! | r13 | the clock at the last look |
//! | r14 | ticks |
//! | r15, mm0 | pages done |
//! | rbx | the clock when the pass began |
//! | vectors 0 to 3 | the next words to verify |
//! | vectors 4 to 7 | the next words to write |
//! | vectors 8, 9 | what both add |
//! | MXCSR | [`MXCSR`], which is not what a reset gives |
//!
//! rax, rcx, rdx, rbp and vectors 10 and 11 hold nothing between two chunks.

mod handlers;
mod lanes;
mod outside;
mod walk;

use iced_x86::IcedError;
use iced_x86::code_asm::registers::{dx, eax, edx};
use iced_x86::code_asm::{AsmMemoryOperand, CodeAssembler, CodeLabel, qword_ptr};

pub use lanes::Vectors;

use crate::layout::CODE_OFFSET;
use crate::mailbox::word;
use crate::report::{REPORT_PORT, Report};

/// Flush to zero on top of the value after reset: exceptions masked, round to nearest.
const MXCSR: u32 = 0x9f80;

/// The code of a guest, at its place.
#[derive(Debug)]
pub(crate) struct Program {
    /// To be written at `CODE_OFFSET`.
    pub(crate) bytes: Vec<u8>,
    /// Where the program starts, at privilege level 3.
    pub(crate) entry: u64,
    /// Where each vector's handler starts, at privilege level 0.
    pub(crate) handlers: Vec<u64>,
}

impl Program {
    pub(crate) fn assemble(vectors: Vectors) -> Result<Self, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let entry = walk::emit(&mut a, vectors)?;
        let handlers = handlers::emit(&mut a)?;
        let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let result = a.assemble_options(CODE_OFFSET, options)?;
        Ok(Self {
            entry: result.label_ip(&entry)?,
            handlers: handlers.iter().map(|handler| result.label_ip(handler)).collect::<Result<_, _>>()?,
            bytes: result.inner.code_buffer,
        })
    }
}

/// A label at the next instruction.
fn here(a: &mut CodeAssembler) -> Result<CodeLabel, IcedError> {
    let mut label = a.create_label();
    a.set_label(&mut label)?;
    Ok(label)
}

/// A word of the mailbox as an operand.
fn mail(word: u64) -> AsmMemoryOperand {
    qword_ptr(word).gs()
}

/// Sends a report. Clobbers rax and rdx.
fn report(a: &mut CodeAssembler, report: Report) -> Result<(), IcedError> {
    a.inc(mail(word::REPORTS))?;
    a.mov(edx, u32::from(REPORT_PORT))?;
    a.mov(eax, report.code())?;
    a.out(dx, eax)
}
