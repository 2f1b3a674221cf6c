//! A machine that stands still, as an ELF core: what debuggers read.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use anyhow::Context as _;
use kvm::LastRegisters;
use kvm::kvm_bindings::kvm_segment;
use kvm::kvm_bindings::kvm_sregs;
use machine::Incoming;
use machine::OfferedRegion;
use pulse::Slot;
use socket::Origin;

use crate::control::CheckReport;
use crate::control::Custody;
use crate::guest::MemoryWords;
use crate::measure;

/// Memory is read and written in pieces of so many bytes; one of zeros alone is left out of the file.
const PIECE_BYTES: usize = 64 << 10;

/// What can be seen of a machine from outside: its guest's memory, and the registers that its vCPUs left.
#[derive(Debug)]
pub struct Picture {
    incoming: Incoming,
    registers: Vec<LastRegisters>,
}

impl Picture {
    /// Takes what came with an [`Answer::Custody`](crate::control::Answer::Custody).
    ///
    /// # Errors
    /// If these are no machine's regions.
    pub fn of(custody: &Custody, mut fds: Vec<OwnedFd>) -> anyhow::Result<Self> {
        let regions = custody.note.regions.len();
        anyhow::ensure!(fds.len() == regions + custody.vcpus, "other descriptors came than were told");
        let vcpus = fds.split_off(regions);
        let offered = fds.into_iter().zip(&custody.note.regions);
        let offered = offered.map(|(fd, len_bytes)| OfferedRegion { fd, len_bytes: *len_bytes }).collect();
        let incoming = match custody.origin {
            Origin::MadeAgain => Incoming::attach_made_again(offered)?,
            Origin::LeftBehind | Origin::Handed => Incoming::attach_left_behind(offered)?,
        };
        // One whose KVM was not asked for them has none; and of some none would tell which they are.
        let registers: Option<Vec<_>> =
            vcpus.iter().map(|vcpu| LastRegisters::read(vcpu).ok().flatten()).collect();
        Ok(Self { incoming, registers: registers.unwrap_or_default() })
    }

    /// Bytes of the guest's memory.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.incoming.memories().iter().map(|memory| memory.size_bytes()).sum()
    }

    /// How many vCPUs' registers are known: all, or none.
    #[must_use]
    pub fn vcpus(&self) -> usize {
        self.registers.len()
    }

    /// Compares every word of the memory with what it should be, if the guest is pulse.
    ///
    /// # Errors
    /// If it is another guest's.
    pub fn check(&self) -> anyhow::Result<CheckReport> {
        let memory = self.incoming.memories().first().context("the machine has no memory")?;
        let (report, first_bad) = measure::compare(&MemoryWords(Arc::clone(memory.mapping())))?;
        Ok(CheckReport { first_bad, ..report })
    }

    /// Writes the core to a file that is empty. `progress` hears of bytes done and in all. Gives how many bytes of memory were not zero.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, file: &File, progress: &mut dyn FnMut(u64, u64)) -> anyhow::Result<u64> {
        let [memory] = self.incoming.memories() else {
            anyhow::bail!("the machine has more than one piece of memory")
        };
        let (of, mut done, mut written) = (memory.size_bytes(), 0, 0);
        let slots = pulse::slots(of);
        let notes = notes(&self.registers);
        let head = head(&slots, notes.len() as u64);
        file.write_all_at(&head.bytes, 0)?;
        file.write_all_at(&notes, head.notes_at)?;
        let mut piece = vec![0; PIECE_BYTES];
        for (slot, at) in slots.iter().zip(&head.memory_at) {
            let mut offset = 0;
            while offset < slot.len_bytes {
                let len = usize::try_from(slot.len_bytes - offset).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
                let piece = &mut piece[..len];
                memory.mapping().read(slot.offset_bytes + offset, piece).context("the machine's memory")?;
                if piece.iter().any(|byte| *byte != 0) {
                    file.write_all_at(piece, at + offset)?;
                    written += len as u64;
                }
                offset += len as u64;
                done += len as u64;
                progress(done, of);
            }
        }
        file.set_len(head.end)?;
        Ok(written)
    }
}

/// Bytes of an ELF header, and of an entry of its program header table.
const EHDR: u64 = 64;
const PHDR: u64 = 56;
const PAGE: u64 = 4096;

struct Head {
    bytes: Vec<u8>,
    notes_at: u64,
    /// Of each slot.
    memory_at: Vec<u64>,
    end: u64,
}

/// The file's beginning: a 64-bit little-endian core (ET_CORE) of x86-64, with its notes and a segment for each slot.
fn head(slots: &[Slot], notes_len: u64) -> Head {
    let count = slots.len() as u64 + 1;
    let notes_at = EHDR + PHDR * count;
    let mut end = (notes_at + notes_len).next_multiple_of(PAGE);
    let mut bytes = Vec::new();
    bytes.extend(b"\x7fELF\x02\x01\x01");
    bytes.resize(16, 0);
    for half in [4_u16, 62] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend(1_u32.to_le_bytes());
    for word in [0, EHDR, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(0_u32.to_le_bytes());
    let counts = [EHDR, PHDR, count, 0, 0, 0];
    counts.into_iter().for_each(|half| bytes.extend(u16::try_from(half).unwrap_or_default().to_le_bytes()));
    let mut segment = |kind: u32, flags: u32, at: u64, address: u64, len: u64, align: u64| {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        for word in [at, address, address, len, len, align] {
            bytes.extend(word.to_le_bytes());
        }
    };
    segment(4, 0, notes_at, 0, notes_len, 4);
    let mut memory_at = Vec::new();
    for slot in slots {
        segment(1, 7, end, slot.guest_address, slot.len_bytes, PAGE);
        memory_at.push(end);
        end += slot.len_bytes;
    }
    Head { bytes, notes_at, memory_at, end }
}

/// The vCPUs' registers, as gdb reads them and as crash does.
fn notes(vcpus: &[LastRegisters]) -> Vec<u8> {
    let status = vcpus.iter().zip(1..).flat_map(|(vcpu, number)| note("CORE", 1, &prstatus(vcpu, number)));
    let state = vcpus.iter().flat_map(|vcpu| note("QEMU", 0, &cpu_state(vcpu)));
    status.chain(state).collect()
}

fn note(name: &str, kind: u32, content: &[u8]) -> Vec<u8> {
    let len = |len: usize| u32::try_from(len).unwrap_or_default().to_le_bytes();
    let mut bytes = [len(name.len() + 1), len(content.len()), kind.to_le_bytes()].concat();
    for part in [&[name.as_bytes(), b"\0"].concat(), content] {
        bytes.extend(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Linux's `elf_prstatus` of x86-64: its thread number, and its registers as `user_regs_struct` has them.
fn prstatus(vcpu: &LastRegisters, number: u32) -> Vec<u8> {
    let (g, s) = (&vcpu.general, &vcpu.special);
    let segment = |segment: &kvm_segment| u64::from(segment.selector);
    let registers = [
        g.r15,
        g.r14,
        g.r13,
        g.r12,
        g.rbp,
        g.rbx,
        g.r11,
        g.r10,
        g.r9,
        g.r8,
        g.rax,
        g.rcx,
        g.rdx,
        g.rsi,
        g.rdi,
        u64::MAX,
        g.rip,
        segment(&s.cs),
        g.rflags,
        g.rsp,
        segment(&s.ss),
        s.fs.base,
        s.gs.base,
        segment(&s.ds),
        segment(&s.es),
        segment(&s.fs),
        segment(&s.gs),
    ];
    let mut bytes = vec![0; 336];
    bytes[32..36].copy_from_slice(&number.to_le_bytes());
    for (at, register) in (112..).step_by(8).zip(registers) {
        bytes[at..at + 8].copy_from_slice(&register.to_le_bytes());
    }
    bytes
}

/// What QEMU's own dumps say of a vCPU, version 1: general registers, segments, tables and control registers.
fn cpu_state(vcpu: &LastRegisters) -> Vec<u8> {
    let (g, s) = (&vcpu.general, &vcpu.special);
    let mut bytes = Vec::new();
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(CPU_STATE.to_le_bytes());
    let general = [
        g.rax, g.rbx, g.rcx, g.rdx, g.rsi, g.rdi, g.rsp, g.rbp, g.r8, g.r9, g.r10, g.r11, g.r12, g.r13,
        g.r14, g.r15, g.rip, g.rflags,
    ];
    general.into_iter().for_each(|register| bytes.extend(register.to_le_bytes()));
    for part in [&s.cs, &s.ds, &s.es, &s.fs, &s.gs, &s.ss, &s.ldt, &s.tr] {
        segment_state(&mut bytes, part.selector.into(), part.limit, flags(part), part.base);
    }
    for table in [&s.gdt, &s.idt] {
        segment_state(&mut bytes, 0, table.limit.into(), 0, table.base);
    }
    control(s).into_iter().for_each(|register| bytes.extend(register.to_le_bytes()));
    // kernel_gs_base, a model-specific register, which no exit leaves.
    bytes.extend(0_u64.to_le_bytes());
    bytes
}

/// Bytes of that.
const CPU_STATE: u32 = 8 + 18 * 8 + 10 * 24 + 5 * 8 + 8;

fn control(special: &kvm_sregs) -> [u64; 5] {
    [special.cr0, 0, special.cr2, special.cr3, special.cr4]
}

fn segment_state(bytes: &mut Vec<u8>, selector: u32, limit: u32, flags: u32, base: u64) {
    [selector, limit, flags, 0].into_iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    bytes.extend(base.to_le_bytes());
}

/// A descriptor's second word, without its part of the base and the limit.
fn flags(segment: &kvm_segment) -> u32 {
    let bits = [
        (segment.type_, 8),
        (segment.s, 12),
        (segment.dpl, 13),
        (segment.present, 15),
        (segment.avl, 20),
        (segment.l, 21),
        (segment.db, 22),
        (segment.g, 23),
    ];
    bits.into_iter().map(|(value, at)| u32::from(value) << at).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_core_lie_where_its_head_says() {
        let slots = pulse::slots(8 << 20);
        let head = head(&slots, 100);
        assert_eq!(head.bytes.len() as u64, EHDR + 2 * PHDR);
        assert_eq!(head.notes_at, head.bytes.len() as u64);
        assert_eq!((&head.memory_at[..], head.end), (&[4096][..], 4096 + (8 << 20)));
        let word = |at: usize| u64::from_le_bytes(head.bytes[at..at + 8].try_into().unwrap());
        let load = 64 + 56;
        assert_eq!((word(load + 8), word(load + 24), word(load + 32)), (4096, 0, 8 << 20));
    }

    #[test]
    fn a_note_is_padded_to_four_bytes_and_has_its_name_ended() {
        assert_eq!(note("CORE", 1, b"abc"), *b"\x05\0\0\0\x03\0\0\0\x01\0\0\0CORE\0\0\0\0abc\0");
    }

    #[test]
    fn registers_lie_where_debuggers_look_for_them() {
        let mut vcpu = LastRegisters { general: Default::default(), special: Default::default() };
        vcpu.general.rip = 0x1234_5678;
        vcpu.special.cr3 = 0x4000;
        let status = prstatus(&vcpu, 7);
        assert_eq!(
            (status.len(), status[32], &status[112 + 16 * 8..][..4]),
            (336, 7, &b"\x78\x56\x34\x12"[..])
        );
        let state = cpu_state(&vcpu);
        assert_eq!(state.len(), usize::try_from(CPU_STATE).unwrap());
        assert_eq!(state[8 + 16 * 8..][..4], *b"\x78\x56\x34\x12");
        assert_eq!(state[8 + 18 * 8 + 10 * 24 + 3 * 8..][..2], *b"\x00\x40");
    }
}
