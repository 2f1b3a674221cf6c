//! The KHO subtree `kexec-metadata`: which kernel handed over. 73 bytes, packed.

use alloc::vec::Vec;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;

use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::Place;
use crate::memory::Problem;

/// Name of the KHO subtree, and of the format in errors.
pub const SUBTREE: &str = "kexec-metadata";
/// The version that is read.
pub const VERSION: u32 = 1;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct MetadataSer {
    version: U32,
    previous_release: [u8; 65],
    kexec_count: U32,
}

const _: () = assert!(size_of::<MetadataSer>() == 73);

/// What it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KexecMetadata {
    /// The release of the kernel that handed over, as `uname -r` says it: up to 64 bytes.
    pub previous_release: Vec<u8>,
    /// Kexecs with handover since the cold boot; the first one hands over 1.
    pub kexec_count: u32,
}

impl KexecMetadata {
    /// Reads the blob of `size` bytes at `address`.
    ///
    /// # Errors
    /// [`Malformed`] for another version, and a blob that is too short or holds no text.
    pub fn read(memory: &(impl Memory + ?Sized), address: u64, size: u64) -> Result<Self, Malformed> {
        let place = Place::new(SUBTREE, address);
        if size < size_of::<U32>() as u64 {
            return Err(place.bad("blob-size", Problem::Truncated));
        }
        let version: U32 = place.get(memory)?;
        if version != VERSION {
            return Err(place.bad("version", Problem::Unknown { found: version.get().into() }));
        }
        if size < size_of::<MetadataSer>() as u64 {
            return Err(place.bad("blob-size", Problem::Truncated));
        }
        let ser: MetadataSer = place.get(memory)?;
        let len = ser.previous_release.iter().position(|byte| *byte == 0);
        let release = len.and_then(|len| ser.previous_release.get(..len));
        let release = release.ok_or_else(|| place.bad("previous_release", Problem::NotTerminated))?;
        Ok(Self { previous_release: release.to_vec(), kexec_count: ser.kexec_count.get() })
    }

    /// The blob's bytes. Of a release of more than 64 bytes the first 64.
    pub fn encode(&self) -> Vec<u8> {
        let mut previous_release = [0; 65];
        let room = previous_release.iter_mut().take(64);
        room.zip(&self.previous_release).for_each(|(to, from)| *to = *from);
        let (version, kexec_count) = (VERSION.into(), self.kexec_count.into());
        MetadataSer { version, previous_release, kexec_count }.as_bytes().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn memory(bytes: &[u8]) -> Vec<u8> {
        let mut memory = vec![0; 8192];
        memory[4096..][..bytes.len()].copy_from_slice(bytes);
        memory
    }

    fn field(bytes: &[u8], size: u64) -> &'static str {
        KexecMetadata::read(&memory(bytes), 4096, size).unwrap_err().field
    }

    #[test]
    fn what_is_written_is_read() {
        let metadata = KexecMetadata { previous_release: b"7.3.4".to_vec(), kexec_count: 3 };
        let bytes = metadata.encode();
        assert_eq!((bytes.len(), &bytes[69..]), (73, &[3, 0, 0, 0][..]));
        assert_eq!(KexecMetadata::read(&memory(&bytes), 4096, 73).unwrap(), metadata);
    }

    #[test]
    fn what_the_kernel_ignores_is_refused_by_field() {
        let mut bytes = KexecMetadata { previous_release: b"7.3.4".to_vec(), kexec_count: 3 }.encode();
        assert_eq!(field(&bytes, 3), "blob-size");
        assert_eq!(field(&bytes, 72), "blob-size");
        bytes[4..69].fill(b'x');
        assert_eq!(field(&bytes, 73), "previous_release");
        bytes[0] = 2;
        assert_eq!(field(&bytes, 4), "version");
    }
}
