//! A disk: virtio-blk with one queue.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread;
use std::thread::JoinHandle;

use abi::record::Format;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::core::Core;
use super::core::DeviceFault;
use super::registers::VERSION_1;
use super::registers::WINDOW_BYTES;
use super::request::BlockStore;
use super::request::FLUSH;
use super::request::ID_BYTES;
use super::request::MOST_BYTES;
use super::request::SECTOR_BYTES;
use super::request::Target;
use crate::bus::MmioDevice;
use crate::device::Device;
use crate::device::ResumeError;
use crate::interrupt::InterruptLine;
use crate::memory::GuestMemory;
use crate::state::Reader;
use crate::state::StateError;

const DEVICE_ID: u32 = 2;
const QUEUE_ENTRIES: u16 = 128;
/// Segments of one request: the queue's entries less head and status.
const SEGMENTS: u16 = QUEUE_ENTRIES - 2;
/// Bytes of a segment, such that no request is longer than is taken.
const SEGMENT_BYTES: u32 = 32 << 10;
const _: () = assert!(SEGMENTS as u64 * SEGMENT_BYTES as u64 <= MOST_BYTES);

const SIZE_MAX: u64 = 1 << 1;
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;

pub(crate) const FORMAT: Format = Format {
    compatible: "tideover-virtio-blk-v1",
    kind: *b"DBLK",
    version: 1,
    oldest: 1,
    max_payload_bytes: 4096,
};

/// What is the disk's own in a state: it is compared, not loaded.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Wire {
    capacity_sectors: U64,
    read_only: U32,
    id: [u8; ID_BYTES],
}

/// What the driver reads of the disk.
#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Config {
    capacity_sectors: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
}

/// A disk behind virtio-mmio. Requests are done one after the other, in the order in which the driver made them
/// available, by a thread of the device's own.
pub struct VirtioBlk {
    core: Arc<Core>,
    store: Arc<dyn BlockStore>,
    id: [u8; ID_BYTES],
    // Taken when dropped.
    worker: Option<JoinHandle<()>>,
}

impl fmt::Debug for VirtioBlk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioBlk").field("name", &self.core.name).finish_non_exhaustive()
    }
}

impl VirtioBlk {
    /// Bytes of its window.
    pub const WINDOW_BYTES: u64 = WINDOW_BYTES;

    /// A disk on this store. `id` is what the guest sees as its serial number; bytes beyond the 20th are not shown.
    ///
    /// # Errors
    /// If its thread cannot be started.
    pub fn new(
        name: &str,
        id: &str,
        store: Arc<dyn BlockStore>,
        memory: GuestMemory,
        line: Arc<dyn InterruptLine>,
    ) -> io::Result<Arc<Self>> {
        let mut features = VERSION_1 | FLUSH | SIZE_MAX | SEG_MAX | BLK_SIZE;
        if store.is_read_only() {
            features |= READ_ONLY;
        }
        let core = Arc::new(Core::new(name, DEVICE_ID, features, &[QUEUE_ENTRIES], memory, line));
        let mut shown = [0; ID_BYTES];
        shown.iter_mut().zip(id.bytes()).for_each(|(byte, value)| *byte = value);
        let worker = {
            let (core, store) = (Arc::clone(&core), Arc::clone(&store));
            thread::Builder::new().name(name.to_owned()).spawn(move || {
                core.work(0, |chain, features| {
                    let target = Target { memory: &core.memory, store: &*store, id: &shown, features };
                    target.serve(chain)
                });
            })?
        };
        Ok(Arc::new(Self { core, store, id: shown, worker: Some(worker) }))
    }

    /// Has it look for requests: for a VMM that hears of the driver's notifications by another way than a write to the
    /// window, as an ioeventfd.
    pub fn notify(&self) {
        self.core.notify();
    }

    /// Makes durable what the guest wrote. Before the host's kernel is replaced, a paused disk needs it: what the guest
    /// takes for written but not flushed is in memory of the old kernel. An update of the VMM alone does not.
    ///
    /// # Errors
    /// As the store's `sync`.
    pub fn sync(&self) -> io::Result<()> {
        self.store.sync()
    }

    /// What went wrong last, once.
    pub fn take_fault(&self) -> Option<DeviceFault> {
        self.core.lock().fault.take()
    }

    fn wire(&self) -> Wire {
        Wire {
            capacity_sectors: (self.store.len_bytes() / SECTOR_BYTES).into(),
            read_only: u32::from(self.store.is_read_only()).into(),
            id: self.id,
        }
    }

    fn config(&self) -> Config {
        Config {
            capacity_sectors: self.wire().capacity_sectors,
            size_max: SEGMENT_BYTES.into(),
            seg_max: u32::from(SEGMENTS).into(),
            geometry: [0; 4],
            blk_size: u32::try_from(SECTOR_BYTES).unwrap_or(u32::MAX).into(),
        }
    }
}

impl Drop for VirtioBlk {
    fn drop(&mut self) {
        self.core.end();
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

impl MmioDevice for VirtioBlk {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.core.read(offset, data, self.config().as_bytes());
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.core.write(offset, data);
    }
}

impl Device for VirtioBlk {
    fn name(&self) -> &str {
        &self.core.name
    }

    fn format(&self) -> &'static str {
        FORMAT.compatible
    }

    fn pause(&self) {
        self.core.pause();
    }

    fn resume(&self) -> Result<(), ResumeError> {
        self.core.resume()
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let mut payload = Vec::new();
        self.core.encode(&mut payload)?;
        payload.extend_from_slice(self.wire().as_bytes());
        Ok(FORMAT.encode(&payload))
    }

    fn load(&self, bytes: &[u8]) -> Result<(), StateError> {
        let mut reader = Reader::new(&self.core.name, &FORMAT, bytes)?;
        let loaded = self.core.decode(&mut reader)?;
        let (saved, here): (Wire, Wire) = (reader.take("disk")?, self.wire());
        let differs = "is not this disk's";
        let sectors = saved.capacity_sectors;
        reader.check(sectors == here.capacity_sectors, "capacity_sectors", sectors.get(), differs)?;
        let read_only = saved.read_only;
        reader.check(read_only == here.read_only, "read_only", read_only.get().into(), differs)?;
        let [first, ..] = saved.id;
        reader.check(saved.id == here.id, "id", first.into(), differs)?;
        reader.end("disk")?;
        self.core.take_over(loaded)
    }
}
