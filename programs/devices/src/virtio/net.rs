//! A network card: virtio-net with a queue for each direction, between the guest and a descriptor.
//!
//! A frame is moved under the device's lock: taken from the one side and given to the other, or not taken. A
//! frame of the host's is read only when the guest has a buffer for it; one of the guest's is answered only when the
//! host took it. So none is in between when the device is paused, and none is part of its state: frames wait in
//! the kernel with the descriptor, or in the guest's ring.

use std::fmt;
use std::io;
use std::io::PipeReader;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::thread;
use std::thread::JoinHandle;

use abi::record::Format;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::io::Errno;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U16;

use super::core::Core;
use super::core::DeviceFault;
use super::core::Inner;
use super::registers::VERSION_1;
use super::registers::WINDOW_BYTES;
use crate::bus::MmioDevice;
use crate::device::Device;
use crate::device::ResumeError;
use crate::interrupt::InterruptLine;
use crate::memory::GuestMemory;
use crate::state::Reader;
use crate::state::StateError;

const DEVICE_ID: u32 = 1;
const QUEUE_ENTRIES: u16 = 256;
/// Frames for the guest, and frames of the guest's.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

const MAC: u64 = 1 << 5;
const STATUS: u64 = 1 << 16;
const LINK_UP: u16 = 1;

const HEADER_BYTES: usize = tap::HEADER_BYTES;
/// The largest frame, with its header: what an IP packet can have, and Ethernet's head with a tag.
const MOST_BYTES: usize = HEADER_BYTES + 18 + 65535;
/// The header's number of buffers, which is one.
const BUFFERS: std::ops::Range<usize> = 10..12;
/// Frames that are moved before the lock is given to others.
const BATCH: usize = 32;

pub(crate) const FORMAT: Format = Format {
    compatible: "tideover-virtio-net-v1",
    kind: *b"DNET",
    version: 1,
    oldest: 1,
    max_payload_bytes: 4096,
};

/// What the driver reads of the card. In a state it is compared, not loaded.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Config {
    mac: [u8; 6],
    status: U16,
}

/// What the worker shares with the device.
struct Card {
    core: Core,
    frames: OwnedFd,
    wake: PipeReader,
    dropped: AtomicU64,
}

/// A network card behind virtio-mmio.
pub struct VirtioNet {
    card: Arc<Card>,
    config: Config,
    // Taken when dropped.
    worker: Option<JoinHandle<()>>,
}

impl fmt::Debug for VirtioNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioNet").field("name", &self.card.core.name).finish_non_exhaustive()
    }
}

impl VirtioNet {
    /// Bytes of its window.
    pub const WINDOW_BYTES: u64 = WINDOW_BYTES;

    /// A card with this address, whose frames go to and come from `frames`: a [`tap::Tap`], or a socket that keeps
    /// messages apart; before each frame stand 12 bytes of header. It is made non-blocking.
    ///
    /// # Errors
    /// If its thread or its event cannot be made.
    pub fn new(
        name: &str,
        mac: [u8; 6],
        frames: OwnedFd,
        memory: GuestMemory,
        line: Arc<dyn InterruptLine>,
    ) -> io::Result<Arc<Self>> {
        rustix::io::ioctl_fionbio(&frames, true)?;
        let (wake, waker) = io::pipe()?;
        rustix::io::ioctl_fionbio(&wake, true)?;
        rustix::io::ioctl_fionbio(&waker, true)?;
        let features = VERSION_1 | MAC | STATUS;
        let queues = [QUEUE_ENTRIES; 2];
        let core = Core::new(name, DEVICE_ID, features, &queues, memory, line);
        let core = core.with_wake(waker);
        let card = Arc::new(Card { core, frames, wake, dropped: AtomicU64::new(0) });
        let worker = {
            let card = Arc::clone(&card);
            thread::Builder::new().name(name.to_owned()).spawn(move || card.work())?
        };
        let config = Config { mac, status: LINK_UP.into() };
        Ok(Arc::new(Self { card, config, worker: Some(worker) }))
    }

    /// Has it look for frames: for a VMM that hears of the driver's notifications by another way than a write to the
    /// window, as an ioeventfd.
    pub fn notify(&self) {
        self.card.core.notify();
    }

    /// Frames that were dropped: the guest's if the host does not take them at all (as of an interface that is down), the
    /// host's if they are longer than the guest's buffer. An update drops none.
    pub fn dropped(&self) -> u64 {
        self.card.dropped.load(Ordering::Relaxed)
    }

    /// What went wrong last, once.
    pub fn take_fault(&self) -> Option<DeviceFault> {
        self.card.core.lock().fault.take()
    }
}

impl Drop for VirtioNet {
    fn drop(&mut self) {
        self.card.core.end();
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

/// What came of one direction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moved {
    /// There may be more.
    Some,
    /// The guest has none, or no buffer, or the device may not work: until it is told.
    Nothing,
    /// The host has none, or does not take any now: until its descriptor is ready.
    WaitForHost,
    /// The host's side has failed for good.
    Gone,
}

impl Card {
    fn work(&self) {
        let mut gone = false;
        let mut frame = vec![0; MOST_BYTES];
        loop {
            let (received, sent) = {
                let mut inner = self.core.lock_last();
                if inner.ending {
                    return;
                }
                let received =
                    if gone { Moved::Gone } else { self.some(&mut inner, &mut frame, Self::receive) };
                (received, self.some(&mut inner, &mut frame, Self::send))
            };
            gone |= received == Moved::Gone;
            if received != Moved::Some && sent != Moved::Some {
                self.wait(received, sent);
            }
        }
    }

    /// Moves frames in one direction, as long as there are any, but not for ever.
    fn some(
        &self,
        inner: &mut Inner,
        frame: &mut [u8],
        act: impl Fn(&Self, &mut Inner, &mut [u8]) -> Moved,
    ) -> Moved {
        let moved = (0..BATCH).map(|_| act(self, inner, frame)).find(|moved| *moved != Moved::Some);
        moved.unwrap_or(Moved::Some)
    }

    /// Waits until there may be something to do.
    fn wait(&self, received: Moved, sent: Moved) {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, received == Moved::WaitForHost);
        flags.set(PollFlags::OUT, sent == Moved::WaitForHost);
        let mut both = [PollFd::new(&self.wake, PollFlags::IN), PollFd::new(&self.frames, flags)];
        // A descriptor in error is always ready: it is left out unless something is wanted of it.
        let wanted = if flags.is_empty() { &mut both[..1] } else { &mut both[..] };
        let _ = rustix::event::poll(wanted, None);
        // What was told before this is seen by the look at the queues that follows.
        let mut told = [0; 64];
        while matches!((&self.wake).read(&mut told), Ok(len) if len == told.len()) {}
    }

    /// One frame from the host to the guest.
    fn receive(&self, inner: &mut Inner, frame: &mut [u8]) -> Moved {
        let Some(chain) = self.core.next(inner, RECEIVE) else { return Moved::Nothing };
        let len = match rustix::io::read(&self.frames, &mut *frame) {
            Ok(0) => return self.gone(inner, io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => len,
            Err(Errno::AGAIN) => return Moved::WaitForHost,
            Err(Errno::INTR) => return Moved::Some,
            Err(errno) => return self.gone(inner, errno.into()),
        };
        let frame = frame.get_mut(..len).unwrap_or_default();
        let room = chain.writable.len_bytes();
        let fits = u64::try_from(len).is_ok_and(|len| len <= room);
        if !fits || !clear_header(frame) || chain.writable.write(&self.core.memory, 0, frame).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return Moved::Some;
        }
        self.core.answer(inner, RECEIVE, &chain, u32::try_from(len).unwrap_or(u32::MAX));
        Moved::Some
    }

    /// One frame from the guest to the host.
    fn send(&self, inner: &mut Inner, frame: &mut [u8]) -> Moved {
        let Some(chain) = self.core.next(inner, TRANSMIT) else { return Moved::Nothing };
        let len = usize::try_from(chain.readable.len_bytes()).unwrap_or(usize::MAX);
        let mut written = Err(Errno::MSGSIZE);
        if let Some(frame) = frame.get_mut(..len)
            && chain.readable.read(&self.core.memory, 0, frame).is_ok()
            && clear_header(frame)
        {
            written = rustix::io::write(&self.frames, frame);
        }
        match written {
            Ok(_) => {}
            Err(Errno::AGAIN) => return Moved::WaitForHost,
            Err(Errno::INTR) => return Moved::Some,
            Err(_) => drop(self.dropped.fetch_add(1, Ordering::Relaxed)),
        }
        self.core.answer(inner, TRANSMIT, &chain, 0);
        Moved::Some
    }

    fn gone(&self, inner: &mut Inner, error: io::Error) -> Moved {
        inner.fault = Some(DeviceFault::Frames(error));
        Moved::Gone
    }
}

/// Makes the header say what was agreed: no offloads, one buffer. False if there is none.
fn clear_header(frame: &mut [u8]) -> bool {
    let Some(header) = frame.get_mut(..HEADER_BYTES) else { return false };
    header.fill(0);
    header.get_mut(BUFFERS).unwrap_or_default().copy_from_slice(&1_u16.to_le_bytes());
    true
}

impl MmioDevice for VirtioNet {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.card.core.read(offset, data, self.config.as_bytes());
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.card.core.write(offset, data);
    }
}

impl Device for VirtioNet {
    fn name(&self) -> &str {
        &self.card.core.name
    }

    fn format(&self) -> &'static str {
        FORMAT.compatible
    }

    fn pause(&self) {
        self.card.core.pause();
    }

    fn resume(&self) -> Result<(), ResumeError> {
        self.card.core.resume()
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let mut payload = Vec::new();
        self.card.core.encode(&mut payload)?;
        payload.extend_from_slice(self.config.as_bytes());
        Ok(FORMAT.encode(&payload))
    }

    fn load(&self, bytes: &[u8]) -> Result<(), StateError> {
        let core = &self.card.core;
        let mut reader = Reader::new(&core.name, &FORMAT, bytes)?;
        let loaded = core.decode(&mut reader)?;
        let saved: Config = reader.take("mac")?;
        let [first, ..] = saved.mac;
        reader.check(saved.mac == self.config.mac, "mac", first.into(), "is not this card's")?;
        let status = saved.status;
        reader.check(status == self.config.status, "link", status.get().into(), "is not that of a link")?;
        reader.end("link")?;
        core.take_over(loaded)
    }
}
