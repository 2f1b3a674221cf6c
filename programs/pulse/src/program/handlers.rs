//! What runs at privilege level 0: a guest that gets here has failed.
//!
//! Every vector has a stub, also those of interrupts: nothing is expected, so everything is reported.

use iced_x86::IcedError;
use iced_x86::code_asm::registers::{dx, eax, edx, rax, rsp};
use iced_x86::code_asm::{CodeAssembler, CodeLabel, qword_ptr};

use super::{here, mail};
use crate::mailbox::word;
use crate::report::{FAULT_CODE, REPORT_PORT};

/// Exceptions for which the processor pushes an error code.
const WITH_ERROR_CODE: [i32; 10] = [8, 10, 11, 12, 13, 14, 17, 21, 29, 30];

/// Emits 256 stubs and what they share. Returns the stubs' labels in the order of the vectors.
pub(super) fn emit(a: &mut CodeAssembler) -> Result<Vec<CodeLabel>, IcedError> {
    let mut shared = a.create_label();
    let mut stubs = Vec::with_capacity(256);
    for vector in 0..256 {
        stubs.push(here(a)?);
        if !WITH_ERROR_CODE.contains(&vector) {
            a.push(0)?;
        }
        a.push(vector)?;
        a.jmp(shared)?;
    }
    a.set_label(&mut shared)?;
    // The stack now: vector, error code, rip, cs, ...
    a.mov(rax, qword_ptr(rsp + 8))?;
    a.mov(mail(word::FAULT_ERROR_CODE), rax)?;
    a.mov(rax, qword_ptr(rsp + 16))?;
    a.mov(mail(word::FAULT_RIP), rax)?;
    a.mov(rax, iced_x86::code_asm::registers::cr2)?;
    a.mov(mail(word::FAULT_CR2), rax)?;
    a.mov(rax, qword_ptr(rsp))?;
    a.inc(rax)?;
    a.mov(mail(word::FAULT_VECTOR), rax)?;
    a.inc(mail(word::REPORTS))?;
    let stop = here(a)?;
    a.mov(rax, qword_ptr(rsp))?;
    a.add(eax, FAULT_CODE)?;
    a.mov(edx, u32::from(REPORT_PORT))?;
    a.out(dx, eax)?;
    // A VMM that goes on all the same gets a halted machine, and the report again.
    a.cli()?;
    a.hlt()?;
    a.jmp(stop)?;
    Ok(stubs)
}
