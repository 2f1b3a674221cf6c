//! Frame 0 of an arena: the header of region 0, the two root slots, and the word that says who owns the machine.
//!
//! | offset | bytes | what | who writes it |
//! | --- | --- | --- | --- |
//! | 0 | 64 | [`Header`] | the maker, once, before anyone else sees the region |
//! | 64 | 8 | [`OwnershipWord`] | by compare-and-swap only |
//! | 128 | 32 | [`RootSlot`] 0 | the owner; generations of even number |
//! | 192 | 32 | [`RootSlot`] 1 | the owner; generations of odd number |
//!
//! A change to the tree is built in free frames and published by one slot: the one with the older
//! generation. A crash in the midst of that leaves a slot whose checksum is wrong, and the other is valid.

use core::fmt;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::Place;
use crate::memory::Problem;
use crate::record::checksum;
use crate::vm::Identity;

/// First bytes of every arena.
pub const MAGIC: [u8; 8] = *b"TIDEOVER";
/// The header's version that is written and read.
pub const VERSION: u32 = 1;
/// Physical address of the [`OwnershipWord`].
pub const OWNERSHIP_ADDRESS: u64 = 64;
/// Physical addresses of the root slots.
pub const SLOT_ADDRESSES: [u64; 2] = [128, 192];
/// The most frames in region 0: one leaf of the tree of preserved memory covers them all.
pub const MAX_FRAMES: u64 = 1 << crate::radix::LEAF_BITS;

/// The highest generation of a [`RootSlot`]. A writer that commits a million times in a second gets there in
/// 292,000 years; one that says that it did would leave the next no number to go on with.
pub const MAX_GENERATION: u64 = u64::MAX / 2;

const FORMAT: &str = "tideover-arena-v1";

/// First 64 bytes of an arena. They never change; what grows goes into the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    magic: [u8; 8],
    version: U32,
    checksum: U32,
    identity: [u8; 16],
    frames: U64,
    reserved: [u8; 24],
}

const _: () = assert!(size_of::<Header>() == 64);

impl Header {
    /// The header of an arena whose region 0 has `frames` frames.
    pub fn new(identity: Identity, frames: u64) -> Self {
        let mut header = Self {
            magic: MAGIC,
            version: VERSION.into(),
            checksum: 0.into(),
            identity: identity.bytes(),
            frames: frames.into(),
            reserved: [0; 24],
        };
        header.checksum = checksum(&[header.as_bytes()]).into();
        header
    }

    /// Reads the header.
    ///
    /// # Errors
    /// [`Malformed`] for another magic, version or checksum, a count of frames that cannot be, or something in what is
    /// reserved.
    pub fn read(memory: &(impl Memory + ?Sized)) -> Result<Self, Malformed> {
        let place = Place::new(FORMAT, 0);
        let header: Self = place.get(memory)?;
        place.expect("magic", u64::from_le_bytes(header.magic), u64::from_le_bytes(MAGIC))?;
        if header.version != VERSION {
            return Err(place.bad("version", Problem::Unknown { found: header.version.get().into() }));
        }
        let stored = header.checksum.get();
        let computed = checksum(&[Self { checksum: 0.into(), ..header }.as_bytes()]);
        if stored != computed {
            return Err(place.bad("checksum", Problem::Checksum { stored, computed }));
        }
        if header.reserved != [0; 24] {
            return Err(place.bad("reserved", Problem::Structure("is not zero")));
        }
        match header.frames() {
            0 => Err(place.bad("frames", Problem::Zero)),
            1..=MAX_FRAMES => Ok(header),
            found => Err(place.bad("frames", Problem::TooLarge { found, limit: MAX_FRAMES })),
        }
    }

    /// Whose memory this is.
    pub fn identity(&self) -> Identity {
        Identity::new(self.identity)
    }

    /// Frames of region 0, this one included.
    pub fn frames(&self) -> u64 {
        self.frames.get()
    }
}

/// One of two places that name the tree's root; the valid one with the higher generation counts.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct RootSlot {
    generation: U64,
    fdt: U64,
    checksum: U32,
    reserved: U32,
    padding: [u8; 8],
}

const _: () = assert!(size_of::<RootSlot>() == 32);

impl RootSlot {
    /// The slot of this generation (from 1 on), naming the root FDT at `fdt`.
    pub fn new(generation: u64, fdt: u64) -> Self {
        let mut slot = Self { generation: generation.into(), fdt: fdt.into(), ..Self::default() };
        slot.checksum = slot.sum().into();
        slot
    }

    fn sum(&self) -> u32 {
        checksum(&[Self { checksum: 0.into(), ..*self }.as_bytes()])
    }

    /// True if its checksum is that of its bytes, and it was ever written.
    pub fn is_valid(&self) -> bool {
        self.generation != 0 && self.checksum == self.sum()
    }

    /// Number of the change that this slot published.
    pub fn generation(&self) -> u64 {
        self.generation.get()
    }

    /// Physical address of the root FDT.
    pub fn fdt(&self) -> u64 {
        self.fdt.get()
    }

    /// Physical address of the slot that generation `generation` is written to.
    pub const fn address(generation: u64) -> u64 {
        SLOT_ADDRESSES[if generation.is_multiple_of(2) { 0 } else { 1 }]
    }

    /// Reads the slot at one of the [places](SLOT_ADDRESSES), valid or not.
    ///
    /// # Errors
    /// [`Malformed`] if nothing is there.
    pub fn read_at(memory: &(impl Memory + ?Sized), address: u64) -> Result<Self, Malformed> {
        Place::new(FORMAT, address).get(memory)
    }

    /// Reads the slot that counts.
    ///
    /// # Errors
    /// [`Malformed`] if neither is valid, or its generation is over [`MAX_GENERATION`]: no crash of a writer can
    /// bring that about.
    pub fn read(memory: &(impl Memory + ?Sized)) -> Result<Self, Malformed> {
        let mut newest: Option<Self> = None;
        for address in SLOT_ADDRESSES {
            let place = Place::new(FORMAT, address);
            let slot = Self::read_at(memory, address)?;
            let (found, limit) = (slot.generation(), MAX_GENERATION);
            if slot.is_valid() && found > limit {
                return Err(place.bad("generation", Problem::TooLarge { found, limit }));
            }
            if slot.is_valid() && newest.is_none_or(|other| other.generation() < slot.generation()) {
                newest = Some(slot);
            }
        }
        let none = || {
            Place::new(FORMAT, SLOT_ADDRESSES[0])
                .bad("root slot", Problem::Structure("is valid in neither place"))
        };
        newest.ok_or_else(none)
    }
}

/// Who may run the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum OwnershipState {
    /// The holder of the nonce runs the guest, and writes the tree.
    Running = 1,
    /// The holder of the nonce has written everything and gives the machine up.
    Sealed = 2,
    /// The holder of the nonce loads the machine's state; it does not run the guest yet.
    Claimed = 3,
    /// The process that ran the machine is dead, and no state that was saved belongs to its memory any more. The holder of the nonce makes
    /// a guest from the beginning; it does not run it yet.
    Recovering = 4,
}

/// `{epoch: 32 bits, state: 8 bits, nonce: 24 bits}`, highest first, in one word.
///
/// The epoch grows at every transition, those that go back included, so no swap succeeds twice and a
/// process that wakes late fails. The nonce names a process's hold on the machine; it is never 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct OwnershipWord(u64);

const NONCE_BITS: u32 = 24;
const STATE_BITS: u32 = 8;

impl OwnershipWord {
    /// The word of these parts.
    pub fn new(epoch: u32, state: OwnershipState, nonce: Nonce) -> Self {
        Self(
            u64::from(epoch) << (NONCE_BITS + STATE_BITS)
                | (state as u64) << NONCE_BITS
                | u64::from(nonce.get()),
        )
    }

    /// Reads a word as it was found.
    ///
    /// # Errors
    /// [`Malformed`] for an unknown state or a nonce of 0.
    pub fn from_bits(bits: u64) -> Result<Self, Malformed> {
        let place = Place::new(FORMAT, OWNERSHIP_ADDRESS);
        let word = Self(bits);
        if word.known_state().is_none() {
            return Err(place.bad("state", Problem::Unknown { found: bits >> NONCE_BITS & 0xFF }));
        }
        if word.known_nonce().is_none() {
            return Err(place.bad("nonce", Problem::Zero));
        }
        Ok(word)
    }

    /// The word.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Transitions since the machine was made. It wraps to 0 after 2³² of them.
    pub const fn epoch(self) -> u32 {
        (self.0 >> (NONCE_BITS + STATE_BITS)) as u32
    }

    fn known_state(self) -> Option<OwnershipState> {
        match self.0 >> NONCE_BITS & 0xFF {
            1 => Some(OwnershipState::Running),
            2 => Some(OwnershipState::Sealed),
            3 => Some(OwnershipState::Claimed),
            4 => Some(OwnershipState::Recovering),
            _ => None,
        }
    }

    fn known_nonce(self) -> Option<Nonce> {
        Nonce::new((self.0 & ((1 << NONCE_BITS) - 1)) as u32)
    }

    /// The state.
    pub fn state(self) -> OwnershipState {
        self.known_state().unwrap_or(OwnershipState::Running)
    }

    /// Whose turn it is.
    pub fn nonce(self) -> Nonce {
        self.known_nonce().unwrap_or(Nonce(1))
    }

    /// The word after a transition: the next epoch.
    #[must_use]
    pub fn next(self, state: OwnershipState, nonce: Nonce) -> Self {
        Self::new(self.epoch().wrapping_add(1), state, nonce)
    }
}

impl fmt::Debug for OwnershipWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{epoch {}, {:?}, nonce {:#x}}}", self.epoch(), self.state(), self.nonce().get())
    }
}

/// Names one process's hold on a machine: 24 random bits, not 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nonce(u32);

impl Nonce {
    /// The nonce of this number; `None` for 0 and for more than 24 bits.
    pub const fn new(number: u32) -> Option<Self> {
        if number == 0 || number >> NONCE_BITS != 0 { None } else { Some(Self(number)) }
    }

    /// Its number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;
    use crate::MemoryMut;

    fn arena() -> Vec<u8> {
        let mut memory = vec![0; 4096];
        memory.write(0, Header::new(Identity::new([7; 16]), 16).as_bytes()).unwrap();
        memory
    }

    #[test]
    fn the_header_is_these_bytes() {
        let mut expected = [0; 64];
        expected[..12].copy_from_slice(b"TIDEOVER\x01\0\0\0");
        expected[16..32].fill(7);
        expected[32] = 16;
        let sum = checksum(&[&expected]);
        expected[12..16].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(arena()[..64], expected);
    }

    #[test]
    fn every_changed_bit_of_the_header_is_refused() {
        for bit in 0..64 * 8 {
            let mut memory = arena();
            memory[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::read(&memory).is_err(), "bit {bit}");
        }
    }

    /// One header has one encoding: found by fuzzing.
    #[test]
    fn what_is_reserved_in_the_header_is_zero() {
        let mut memory = arena();
        memory[40] = 1;
        memory[12..16].fill(0);
        let sum = checksum(&[&memory[..64]]);
        memory[12..16].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Header::read(&memory).unwrap_err().field, "reserved");
    }

    #[test]
    fn a_torn_slot_leaves_the_other() {
        let mut memory = arena();
        for generation in 1..=2 {
            let slot = RootSlot::new(generation, 0x1000 * generation);
            memory.write(RootSlot::address(generation), slot.as_bytes()).unwrap();
        }
        assert_eq!(RootSlot::read(&memory).unwrap().generation(), 2);
        let next = RootSlot::new(3, 0x5000);
        for torn in 1..20 {
            let mut memory = memory.clone();
            memory.write(RootSlot::address(3), &next.as_bytes()[..torn]).unwrap();
            let read = RootSlot::read(&memory).unwrap();
            assert!(read.generation() == 2 || read == next, "{torn} bytes: {read:?}");
        }
    }

    #[test]
    fn an_arena_without_a_valid_slot_is_refused() {
        assert_eq!(RootSlot::read(&arena()).unwrap_err().field, "root slot");
    }

    #[test]
    fn a_generation_that_leaves_none_to_follow_is_refused() {
        let mut memory = arena();
        memory.write(RootSlot::address(2), RootSlot::new(2, 0x1000).as_bytes()).unwrap();
        for (generation, is_read) in [(MAX_GENERATION, true), (MAX_GENERATION + 2, false), (u64::MAX, false)]
        {
            let slot = RootSlot::new(generation, 0x2000);
            memory.write(RootSlot::address(generation), slot.as_bytes()).unwrap();
            match RootSlot::read(&memory) {
                Ok(read) => assert!(is_read && read == slot, "{generation:#x}"),
                Err(error) => assert!(!is_read && error.field == "generation", "{generation:#x}"),
            }
        }
    }

    #[test]
    fn an_ownership_word_holds_its_parts() {
        let nonce = Nonce::new(0xABCDEF).unwrap();
        let word = OwnershipWord::new(u32::MAX, OwnershipState::Sealed, nonce);
        assert_eq!(word.bits(), 0xFFFF_FFFF_02AB_CDEF);
        assert_eq!(OwnershipWord::from_bits(word.bits()).unwrap(), word);
        assert_eq!(word.next(OwnershipState::Claimed, nonce).epoch(), 0);
        assert_eq!(OwnershipWord::from_bits(0x05AB_CDEF).unwrap_err().field, "state");
        assert_eq!(OwnershipWord::from_bits(0x0100_0000).unwrap_err().field, "nonce");
    }
}
