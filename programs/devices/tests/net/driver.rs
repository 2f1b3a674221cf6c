//! A guest's driver for a network card, done by hand, and the host's end of the wire.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use devices::Device;
use devices::GuestMemory;
use devices::MmioDevice;
use devices::Slot;
use devices::VirtioNet;
use region::Region;
use rustix::net::AddressFamily;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

use crate::line::CountedLine;

const MEMORY_BYTES: u64 = 1 << 20;
/// Entries of each queue, and buffers.
pub(crate) const SIZE: u16 = 16;
pub(crate) const BUFFER_BYTES: u64 = 2048;
/// Bytes of header before each frame.
pub(crate) const HEADER: usize = 12;
pub(crate) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Receive and transmit: descriptors, available, used, buffers.
const QUEUES: [[u64; 4]; 2] = [[0x1000, 0x2000, 0x3000, 0x2_0000], [0x5000, 0x6000, 0x7000, 0x4_0000]];

pub(crate) struct Rig {
    memory: GuestMemory,
    /// The descriptor that goes from device to device.
    frames: OwnedFd,
    pub(crate) net: Arc<VirtioNet>,
    pub(crate) line: Arc<CountedLine>,
    /// Made available and seen used, by queue.
    made: [u16; 2],
    seen: [u16; 2],
}

/// Both ends of a wire that keeps frames apart: the device's and the host's.
pub(crate) fn wire() -> (OwnedFd, OwnedFd) {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

pub(crate) fn device(frames: &OwnedFd, memory: &GuestMemory) -> (Arc<VirtioNet>, Arc<CountedLine>) {
    let line = Arc::new(CountedLine::default());
    let frames = frames.try_clone().unwrap();
    (VirtioNet::new("net0", MAC, frames, memory.clone(), line.clone()).unwrap(), line)
}

impl Rig {
    /// A device whose driver is ready, and has given it no buffers yet.
    pub(crate) fn new(frames: OwnedFd) -> Self {
        let mapping = Arc::new(Region::create("t", MEMORY_BYTES).unwrap().map().unwrap());
        let slot = Slot { guest_address: 0, mapping, offset_bytes: 0, len_bytes: MEMORY_BYTES };
        let memory = GuestMemory::new(vec![slot]).unwrap();
        let (net, line) = device(&frames, &memory);
        net.resume().unwrap();
        let rig = Self { memory, frames, net, line, made: [0; 2], seen: [0; 2] };
        rig.start();
        rig
    }

    fn start(&self) {
        let features = 1_u64 << 32 | 1 << 5;
        for (register, value) in [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0)] {
            self.set(register, value);
        }
        self.set(0x20, u32::try_from(features & 0xffff_ffff).unwrap());
        self.set(0x70, 11);
        for (number, [descriptors, available, used, _]) in (0..).zip(QUEUES) {
            self.set(0x30, number);
            self.set(0x38, SIZE.into());
            for (register, address) in [(0x80, descriptors), (0x90, available), (0xa0, used)] {
                self.set(register, u32::try_from(address).unwrap());
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
    }

    pub(crate) fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.net.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn set(&self, offset: u64, value: u32) {
        self.net.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn notify(&self) {
        self.set(0x50, 0);
    }

    fn word(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(address, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Where the next buffer of a queue is.
    fn buffer(&self, queue: usize) -> u64 {
        QUEUES[queue][3] + u64::from(self.made[queue] % SIZE) * BUFFER_BYTES
    }

    /// Makes that buffer available, whose content has to be there by then.
    fn offer(&mut self, queue: usize, len: u64, flags: u16) {
        let [descriptors, available, ..] = QUEUES[queue];
        let index = self.made[queue] % SIZE;
        let mut bytes = self.buffer(queue).to_le_bytes().to_vec();
        bytes.extend(u32::try_from(len).unwrap().to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend([0; 2]);
        self.memory.write(descriptors + 16 * u64::from(index), &bytes).unwrap();
        self.memory.write(available + 4 + 2 * u64::from(index), &index.to_le_bytes()).unwrap();
        self.made[queue] = self.made[queue].wrapping_add(1);
        self.memory.write(available + 2, &self.made[queue].to_le_bytes()).unwrap();
    }

    /// Buffers that the driver has not given to the device.
    pub(crate) fn free(&self, queue: usize) -> u16 {
        SIZE - self.made[queue].wrapping_sub(self.seen[queue])
    }

    /// Gives the device all buffers of `len` bytes for frames of the host's.
    pub(crate) fn give_buffers(&mut self, len: u64) {
        while self.free(0) > 0 {
            self.offer(0, len, 2);
        }
        self.notify();
    }

    /// Sends a frame, behind a header that says what was not agreed on.
    pub(crate) fn send(&mut self, frame: &[u8]) {
        assert!(self.free(1) > 0);
        let len = u64::try_from(HEADER + frame.len()).unwrap();
        let mut bytes = vec![0xff; HEADER];
        bytes.extend_from_slice(frame);
        self.memory.write(self.buffer(1), &bytes).unwrap();
        self.offer(1, len, 0);
    }

    /// How many frames of the guest's the device has answered since the last look.
    pub(crate) fn take_sent(&mut self) -> u16 {
        let used = self.word(QUEUES[1][2] + 2);
        let sent = used.wrapping_sub(self.seen[1]);
        self.seen[1] = used;
        sent
    }

    /// The next frame for the guest, with its header.
    pub(crate) fn take_received(&mut self) -> Option<Vec<u8>> {
        let [_, _, used, buffers] = QUEUES[0];
        if self.word(used + 2) == self.seen[0] {
            return None;
        }
        let index = self.seen[0] % SIZE;
        let mut entry = [0; 8];
        self.memory.read(used + 4 + 8 * u64::from(index), &mut entry).unwrap();
        let [i0, i1, 0, 0, l0, l1, l2, l3] = entry else { panic!("{entry:?}") };
        assert_eq!(u16::from_le_bytes([i0, i1]), index, "buffers come back in order");
        let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap();
        let mut frame = vec![0; len];
        self.memory.read(buffers + u64::from(index) * BUFFER_BYTES, &mut frame).unwrap();
        self.seen[0] = self.seen[0].wrapping_add(1);
        Some(frame)
    }

    /// Replaces the device, which is paused, by a new one with its state.
    pub(crate) fn replace_paused(&mut self) {
        let state = self.net.save().unwrap();
        let (net, line) = device(&self.frames, &self.memory);
        net.load(&state).unwrap();
        assert_eq!(net.save().unwrap(), state);
        assert_eq!(line.raised(), 0, "an interrupt waits for the VM to be loaded");
        (self.net, self.line) = (net, line);
    }

    /// An update.
    pub(crate) fn update(&mut self) {
        self.net.pause();
        self.replace_paused();
        self.net.resume().unwrap();
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(crate) fn frames(&self) -> &OwnedFd {
        &self.frames
    }
}
