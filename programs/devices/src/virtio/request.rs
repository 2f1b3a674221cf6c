//! What a disk is asked for (virtio 1.2, section 5.2.6), done in one go.

use std::io;

use super::queue::Chain;
use crate::memory::GuestMemory;
use crate::memory::NoGuestMemory;

/// Where a disk's sectors are.
pub trait BlockStore: Send + Sync {
    /// Its size in bytes. What is beyond the last whole sector is not used.
    fn len_bytes(&self) -> u64;

    /// True if the guest may only read it.
    fn is_read_only(&self) -> bool;

    /// Reads at an offset, perhaps less than asked.
    ///
    /// # Errors
    /// As `pread`. One that is `Interrupted` is tried again.
    fn read_at(&self, into: &mut [u8], offset_bytes: u64) -> io::Result<usize>;

    /// Writes at an offset, perhaps less than asked.
    ///
    /// # Errors
    /// As `pwrite`. One that is `Interrupted` is tried again.
    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<usize>;

    /// Makes durable what was written.
    ///
    /// # Errors
    /// As `fdatasync`. One that is `Interrupted` is tried again.
    fn sync(&self) -> io::Result<()>;
}

impl BlockStore for disk::DiskFile {
    fn len_bytes(&self) -> u64 {
        Self::len_bytes(self)
    }

    fn is_read_only(&self) -> bool {
        self.access() == disk::Access::ReadOnly
    }

    fn read_at(&self, into: &mut [u8], offset_bytes: u64) -> io::Result<usize> {
        Self::read_at(self, into, offset_bytes)
    }

    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<usize> {
        Self::write_at(self, bytes, offset_bytes)
    }

    fn sync(&self) -> io::Result<()> {
        Self::sync(self)
    }
}

/// Bytes of a sector.
pub(crate) const SECTOR_BYTES: u64 = disk::SECTOR_BYTES;
/// Bytes of a disk's name for itself.
pub(crate) const ID_BYTES: usize = 20;
/// The most bytes of one request, as a pause waits for it.
pub(crate) const MOST_BYTES: u64 = 4 << 20;
/// Bytes that are copied at a time.
const PART_BYTES: usize = 64 << 10;

/// The driver may ask for a flush.
pub(crate) const FLUSH: u64 = 1 << 9;

const HEADER_BYTES: usize = 16;
const IN: u32 = 0;
const OUT: u32 = 1;
const SYNC: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Why a request was not done: the driver is told so, and the device goes on.
enum Refused {
    Unsupported,
    Failed,
}

impl From<NoGuestMemory> for Refused {
    fn from(_: NoGuestMemory) -> Self {
        Self::Failed
    }
}

impl From<io::Error> for Refused {
    fn from(_: io::Error) -> Self {
        Self::Failed
    }
}

/// A disk that requests are done on.
pub(crate) struct Target<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(crate) store: &'a dyn BlockStore,
    pub(crate) id: &'a [u8; ID_BYTES],
    /// What driver and device agreed to.
    pub(crate) features: u64,
}

/// A request's buffers but for head and status.
struct Data<'a> {
    chain: &'a Chain,
    /// For the disk.
    out_bytes: u64,
    /// For the guest.
    in_bytes: u64,
}

impl Target<'_> {
    /// Does the request, and answers how many bytes it wrote into the chain: all that may be written, as the status is
    /// the last of them.
    ///
    /// # Errors
    /// If there is no place for the status, and so no way to answer.
    pub(crate) fn serve(&self, chain: &Chain) -> Result<u32, &'static str> {
        let header_bytes = u64::try_from(HEADER_BYTES).unwrap_or(u64::MAX);
        let writable = chain.writable.len_bytes();
        let out_bytes = chain.readable.len_bytes().checked_sub(header_bytes).ok_or("ends within its head")?;
        let in_bytes = writable.checked_sub(1).ok_or("has no place for its status")?;
        let status = match self.act(&Data { chain, out_bytes, in_bytes }) {
            Ok(()) => OK,
            Err(Refused::Failed) => IO_ERROR,
            Err(Refused::Unsupported) => UNSUPPORTED,
        };
        let failed = |_| "has a status outside of guest memory";
        chain.writable.write(self.memory, in_bytes, &[status]).map_err(failed)?;
        u32::try_from(writable).map_err(|_| "is too long")
    }

    fn act(&self, data: &Data<'_>) -> Result<(), Refused> {
        let mut header = [0; HEADER_BYTES];
        data.chain.readable.read(self.memory, 0, &mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            IN => self.read(data, self.range(sector, data.in_bytes)?),
            OUT => self.write(data, self.range(sector, data.out_bytes)?),
            SYNC => Ok(again(|| self.store.sync())?),
            GET_ID => {
                let len = usize::try_from(data.in_bytes).unwrap_or(ID_BYTES).min(ID_BYTES);
                Ok(data.chain.writable.write(self.memory, 0, self.id.get(..len).unwrap_or_default())?)
            }
            _ => Err(Refused::Unsupported),
        }
    }

    /// The offset in the store of `len` bytes from a sector on.
    fn range(&self, sector: u64, len_bytes: u64) -> Result<u64, Refused> {
        let whole = self.store.len_bytes() / SECTOR_BYTES * SECTOR_BYTES;
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Refused::Failed)?;
        let end = offset.checked_add(len_bytes).ok_or(Refused::Failed)?;
        let good = end <= whole && len_bytes.is_multiple_of(SECTOR_BYTES) && len_bytes <= MOST_BYTES;
        if good { Ok(offset) } else { Err(Refused::Failed) }
    }

    fn read(&self, data: &Data<'_>, offset: u64) -> Result<(), Refused> {
        in_parts(data.in_bytes, |done, part| {
            read_exact(self.store, part, offset + done)?;
            Ok(data.chain.writable.write(self.memory, done, part)?)
        })
    }

    fn write(&self, data: &Data<'_>, offset: u64) -> Result<(), Refused> {
        if self.store.is_read_only() {
            return Err(Refused::Failed);
        }
        in_parts(data.out_bytes, |done, part| {
            let header_bytes = u64::try_from(HEADER_BYTES).unwrap_or(u64::MAX);
            data.chain.readable.read(self.memory, header_bytes + done, part)?;
            Ok(write_all(self.store, part, offset + done)?)
        })?;
        // A driver that cannot ask for a flush relies on every write being durable.
        if self.features & FLUSH == 0 { Ok(again(|| self.store.sync())?) } else { Ok(()) }
    }
}

/// Has `act` handle `len_bytes` in parts: it gets the bytes done and a buffer for the part.
fn in_parts(
    len_bytes: u64,
    mut act: impl FnMut(u64, &mut [u8]) -> Result<(), Refused>,
) -> Result<(), Refused> {
    let len = usize::try_from(len_bytes).map_err(|_| Refused::Failed)?;
    let mut buffer = vec![0; len.min(PART_BYTES)];
    let mut done = 0;
    while done < len {
        let part = (len - done).min(PART_BYTES);
        let at = u64::try_from(done).map_err(|_| Refused::Failed)?;
        act(at, buffer.get_mut(..part).unwrap_or_default())?;
        done += part;
    }
    Ok(())
}

fn read_exact(store: &dyn BlockStore, mut into: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !into.is_empty() {
        let done = again(|| store.read_at(into, offset))?;
        let (_, rest) = into.split_at_mut_checked(done).ok_or(io::ErrorKind::InvalidData)?;
        if done == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        into = rest;
        offset += u64::try_from(done).unwrap_or(u64::MAX);
    }
    Ok(())
}

fn write_all(store: &dyn BlockStore, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let done = again(|| store.write_at(bytes, offset))?;
        let (_, rest) = bytes.split_at_checked(done).ok_or(io::ErrorKind::InvalidData)?;
        if done == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = rest;
        offset += u64::try_from(done).unwrap_or(u64::MAX);
    }
    Ok(())
}

fn again<T>(mut act: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match act() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
