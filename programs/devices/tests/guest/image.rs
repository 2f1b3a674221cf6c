//! A bzImage made by hand, and memory to load it into.

use std::io::Cursor;
use std::sync::Arc;

use devices::GuestMemory;
use devices::Slot;
use devices::linux;
use devices::linux::LoadError;
use devices::linux::Loaded;
use region::Mapping;
use region::Region;

pub(crate) const MIB: u64 = 1 << 20;
/// Bytes of an image before the kernel.
pub(crate) const SETUP: usize = 1024;
/// Where the 64-bit entry is in the kernel.
pub(crate) const ENTRY: usize = 0x200;
/// Where the image wants its kernel, and how much memory from there on.
pub(crate) const PREFERRED: u64 = 2 * MIB;
pub(crate) const INIT_BYTES: u64 = MIB;

pub(crate) fn put(image: &mut [u8], place: usize, bytes: &[u8]) {
    image[place..place + bytes.len()].copy_from_slice(bytes);
}

/// An image whose kernel is this code, at the entry.
pub(crate) fn image(code: &[u8]) -> Vec<u8> {
    let kernel_bytes = (ENTRY + code.len().max(1)).next_multiple_of(16);
    let mut image = vec![0; SETUP + kernel_bytes];
    put(&mut image, SETUP + ENTRY, code);
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1f4, &u32::try_from(kernel_bytes / 16).unwrap().to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020f_u16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x214, &0x10_0000_u32.to_le_bytes());
    put(&mut image, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000_u32.to_le_bytes());
    put(&mut image, 0x234, &[1]);
    put(&mut image, 0x236, &1_u16.to_le_bytes());
    put(&mut image, 0x238, &2047_u32.to_le_bytes());
    put(&mut image, 0x258, &PREFERRED.to_le_bytes());
    put(&mut image, 0x260, &u32::try_from(INIT_BYTES).unwrap().to_le_bytes());
    image
}

/// Memory of these slots: guest address and length. Pages come at first touch.
pub(crate) fn memory(slots: &[(u64, u64)]) -> GuestMemory {
    let len = slots.iter().map(|(_, len)| len).sum();
    let mapping = Arc::new(Region::create("ram", len).unwrap().map().unwrap());
    GuestMemory::new(slots_of(&mapping, slots)).unwrap()
}

/// The slots in the mapping, one behind the other.
pub(crate) fn slots_of(mapping: &Arc<Mapping>, slots: &[(u64, u64)]) -> Vec<Slot> {
    let mut offset_bytes = 0;
    let mut all = Vec::new();
    for &(guest_address, len_bytes) in slots {
        all.push(Slot { guest_address, mapping: Arc::clone(mapping), offset_bytes, len_bytes });
        offset_bytes += len_bytes;
    }
    all
}

pub(crate) fn load(
    memory: &GuestMemory,
    image: &[u8],
    initrd: Option<&[u8]>,
    command_line: &str,
) -> Result<Loaded, LoadError> {
    let mut initrd = initrd.map(Cursor::new);
    linux::load(memory, &mut Cursor::new(image), initrd.as_mut(), command_line)
}

pub(crate) fn bytes<const N: usize>(memory: &GuestMemory, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.read(address, &mut bytes).unwrap();
    bytes
}

pub(crate) fn dword(memory: &GuestMemory, address: u64) -> u32 {
    u32::from_le_bytes(bytes(memory, address))
}

pub(crate) fn qword(memory: &GuestMemory, address: u64) -> u64 {
    u64::from_le_bytes(bytes(memory, address))
}
