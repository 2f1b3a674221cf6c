//! A split virtqueue (virtio 1.2, section 2.7), device's side.
//!
//! A chain is first looked at and, when its request is done, answered. Only the answer moves the place in the ring,
//! for both of its halves: so there is one index, and no state in which a chain is taken but not answered.
//!
//! The library for virtqueues ends a broken chain without a word, and follows indirect descriptors that were not offered.
//! Here each is a fault.

use std::sync::atomic::Ordering;
use std::sync::atomic::fence;

use thiserror::Error;

use crate::memory::GuestMemory;
use crate::memory::NoGuestMemory;

const DESCRIPTOR_BYTES: u64 = 16;
/// The chain goes on.
const NEXT: u16 = 1;
/// The device writes here.
const WRITE: u16 = 2;
/// In the avail ring's flags: the driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;
/// Flags and index before the entries of either ring.
const RING_HEAD_BYTES: u64 = 4;

/// What a driver did with a queue that it must not.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RingFault {
    /// A size that is no power of two up to the largest.
    #[error("the queue has {size} entries, not a power of two up to {most}")]
    Size {
        /// Its size.
        size: u16,
        /// The largest that is offered.
        most: u16,
    },
    /// A part of the queue is not aligned.
    #[error("the {part} at {address:#x} is not aligned")]
    Unaligned {
        /// Which part.
        part: &'static str,
        /// Its guest-physical address.
        address: u64,
    },
    /// Something is outside of guest memory.
    #[error("the {part} is outside of guest memory")]
    Outside {
        /// What.
        part: &'static str,
        /// Where it should be.
        #[source]
        source: NoGuestMemory,
    },
    /// More chains are made available than the queue has entries.
    #[error("{waiting} chains are available in a queue of {size}")]
    Index {
        /// Chains.
        waiting: u16,
        /// Entries.
        size: u16,
    },
    /// A descriptor that is not in the table.
    #[error("descriptor {index} of {size}")]
    NoDescriptor {
        /// Its number.
        index: u16,
        /// Entries of the table.
        size: u16,
    },
    /// A chain that has more descriptors than there are.
    #[error("the chain at descriptor {head} does not end")]
    Endless {
        /// Its first descriptor.
        head: u16,
    },
    /// A descriptor with flags that were not offered, as for an indirect table.
    #[error("descriptor {index} has flags {flags:#x}, which were not offered")]
    Flags {
        /// Its number.
        index: u16,
        /// Its flags.
        flags: u16,
    },
    /// A descriptor without bytes.
    #[error("descriptor {index} has no bytes")]
    Empty {
        /// Its number.
        index: u16,
    },
    /// What the device reads comes after what it writes.
    #[error("descriptor {index} is to be read and comes after one to be written")]
    Order {
        /// Its number.
        index: u16,
    },
    /// A chain of 4 GiB or more.
    #[error("the chain at descriptor {head} has {bytes:#x} bytes")]
    TooLong {
        /// Its first descriptor.
        head: u16,
        /// Bytes.
        bytes: u64,
    },
}

/// One buffer of a chain, which lies in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    address: u64,
    len_bytes: u32,
}

/// Buffers one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Pieces(Vec<Piece>);

impl Pieces {
    pub(crate) fn len_bytes(&self) -> u64 {
        self.0.iter().map(|piece| u64::from(piece.len_bytes)).sum()
    }

    /// What `act` is to be done with, for `len` bytes from `offset` on: guest address, and offset in those bytes.
    fn each(
        &self,
        offset: u64,
        len: usize,
        mut act: impl FnMut(u64, std::ops::Range<usize>) -> Result<(), NoGuestMemory>,
    ) -> Result<(), NoGuestMemory> {
        let (mut skip, mut done) = (offset, 0);
        for piece in &self.0 {
            let piece_len = u64::from(piece.len_bytes);
            if skip >= piece_len {
                skip -= piece_len;
                continue;
            }
            let left = usize::try_from(piece_len - skip).unwrap_or(usize::MAX);
            let part = left.min(len - done);
            act(piece.address + skip, done..done + part)?;
            (skip, done) = (0, done + part);
            if done == len {
                return Ok(());
            }
        }
        let len_bytes = u64::try_from(len - done).unwrap_or(u64::MAX);
        if len_bytes == 0 { Ok(()) } else { Err(NoGuestMemory { address: 0, len_bytes }) }
    }

    /// Copies bytes out, from `offset` bytes behind the start on.
    pub(crate) fn read(
        &self,
        memory: &GuestMemory,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), NoGuestMemory> {
        let len = into.len();
        self.each(offset, len, |address, range| memory.read(address, into.get_mut(range).unwrap_or_default()))
    }

    /// Copies bytes in, from `offset` bytes behind the start on.
    pub(crate) fn write(&self, memory: &GuestMemory, offset: u64, bytes: &[u8]) -> Result<(), NoGuestMemory> {
        self.each(offset, bytes.len(), |address, range| {
            memory.write(address, bytes.get(range).unwrap_or_default())
        })
    }
}

/// What the driver made available at once: one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    head: u16,
    /// For the device to read.
    pub(crate) readable: Pieces,
    /// For the device to write.
    pub(crate) writable: Pieces,
}

/// Where a queue is, and how far it is worked off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Queue {
    /// The most entries that it may have.
    pub(crate) most: u16,
    pub(crate) size: u16,
    pub(crate) ready: bool,
    /// Guest-physical addresses of the descriptor table, of the driver's ring and of the device's.
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    /// Number of the next chain to be answered: index in both rings. 0 unless the queue is ready.
    pub(crate) next: u16,
}

struct Descriptor {
    address: u64,
    len_bytes: u32,
    flags: u16,
    next: u16,
}

impl Queue {
    pub(crate) fn new(most: u16) -> Self {
        Self { most, size: 0, ready: false, descriptors: 0, available: 0, used: 0, next: 0 }
    }

    /// That all of it lies in guest memory, as the standard asks.
    pub(crate) fn check(&self, memory: &GuestMemory) -> Result<(), RingFault> {
        let Self { most, size, .. } = *self;
        if !size.is_power_of_two() || size > most {
            return Err(RingFault::Size { size, most });
        }
        let entries = u64::from(size);
        let parts = [
            ("descriptor table", self.descriptors, 16, DESCRIPTOR_BYTES * entries),
            ("available ring", self.available, 2, RING_HEAD_BYTES + 2 * entries + 2),
            ("used ring", self.used, 4, RING_HEAD_BYTES + 8 * entries + 2),
        ];
        for (part, address, align, len_bytes) in parts {
            if !address.is_multiple_of(align) {
                return Err(RingFault::Unaligned { part, address });
            }
            memory.check(address, len_bytes).map_err(outside(part))?;
        }
        Ok(())
    }

    /// The next chain to be answered, if there is one.
    pub(crate) fn peek(&self, memory: &GuestMemory) -> Result<Option<Chain>, RingFault> {
        let size = self.size;
        let in_ring = outside("available ring");
        let index = memory.load_u16(self.available + 2).map_err(in_ring)?;
        let waiting = index.wrapping_sub(self.next);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > size {
            return Err(RingFault::Index { waiting, size });
        }
        let entry = self.available + RING_HEAD_BYTES + 2 * u64::from(self.next % size);
        let head = memory.load_u16(entry).map_err(in_ring)?;
        self.chain(memory, head).map(Some)
    }

    fn chain(&self, memory: &GuestMemory, head: u16) -> Result<Chain, RingFault> {
        let mut chain = Chain { head, readable: Pieces::default(), writable: Pieces::default() };
        let mut index = head;
        for _ in 0..self.size {
            let Descriptor { address, len_bytes, flags, next } = self.descriptor(memory, index)?;
            let piece = Piece { address, len_bytes };
            if flags & WRITE != 0 {
                chain.writable.0.push(piece);
            } else if chain.writable.0.is_empty() {
                chain.readable.0.push(piece);
            } else {
                return Err(RingFault::Order { index });
            }
            if flags & NEXT == 0 {
                let bytes = chain.readable.len_bytes() + chain.writable.len_bytes();
                let fits = u32::try_from(bytes).is_ok();
                return if fits { Ok(chain) } else { Err(RingFault::TooLong { head, bytes }) };
            }
            index = next;
        }
        Err(RingFault::Endless { head })
    }

    fn descriptor(&self, memory: &GuestMemory, index: u16) -> Result<Descriptor, RingFault> {
        let size = self.size;
        if index >= size {
            return Err(RingFault::NoDescriptor { index, size });
        }
        let mut bytes = [0; 16];
        let place = self.descriptors + DESCRIPTOR_BYTES * u64::from(index);
        memory.read(place, &mut bytes).map_err(outside("descriptor table"))?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        let descriptor = Descriptor {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len_bytes: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        };
        let flags = descriptor.flags;
        if flags & !(NEXT | WRITE) != 0 {
            return Err(RingFault::Flags { index, flags });
        }
        if descriptor.len_bytes == 0 {
            return Err(RingFault::Empty { index });
        }
        memory.check(descriptor.address, descriptor.len_bytes.into()).map_err(outside("buffer"))?;
        Ok(descriptor)
    }

    /// Answers the chain that [`peek`](Self::peek) gave: the driver gets it back, with so many bytes written. True if the
    /// driver wants an interrupt for it.
    pub(crate) fn answer(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        written_bytes: u32,
    ) -> Result<bool, RingFault> {
        let in_ring = outside("used ring");
        let entry = self.used + RING_HEAD_BYTES + 8 * u64::from(self.next % self.size);
        let [h0, h1] = chain.head.to_le_bytes();
        let [w0, w1, w2, w3] = written_bytes.to_le_bytes();
        memory.write(entry, &[h0, h1, 0, 0, w0, w1, w2, w3]).map_err(in_ring)?;
        self.next = self.next.wrapping_add(1);
        // From here on the driver has it; the entry and what is in the chain's buffers are seen before the index.
        memory.store_u16(self.used + 2, self.next).map_err(in_ring)?;
        // The driver writes its flags and then looks at the index; we do it the other way round.
        fence(Ordering::SeqCst);
        let flags = memory.load_u16(self.available).map_err(outside("available ring"))?;
        Ok(flags & NO_INTERRUPT == 0)
    }
}

fn outside(part: &'static str) -> impl Fn(NoGuestMemory) -> RingFault + Copy {
    move |source| RingFault::Outside { part, source }
}

#[cfg(test)]
mod tests;
