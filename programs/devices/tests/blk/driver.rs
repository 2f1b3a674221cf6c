//! What a guest's driver does, done by hand: registers, rings, and a count of interrupts.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use region::Region;

use devices::Device;
use devices::GuestMemory;
use devices::MmioDevice;
use devices::Slot;
use devices::VirtioBlk;

use crate::line::CountedLine;
use crate::store::Store;

pub(crate) const MEMORY_BYTES: u64 = 1 << 20;
pub(crate) const DESCRIPTORS: u64 = 0x1000;
pub(crate) const AVAILABLE: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;
/// Entries of the queue.
pub(crate) const SIZE: u16 = 16;
/// Each request has room of its own, by its number modulo `ROOMS`.
const ROOMS: u64 = 5;
const ROOM: u64 = 0x1_0000;
const ROOM_BYTES: u64 = 0x2_0000;
/// Descriptors of a request.
const EACH: u16 = 3;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const FLUSH: u64 = 1 << 9;

/// Far longer than anything takes; a test that waits for it has failed.
const LONG: Duration = Duration::from_secs(60);

pub(crate) fn memory() -> GuestMemory {
    let mapping = Arc::new(Region::create("t", MEMORY_BYTES).unwrap().map().unwrap());
    let slot = Slot { guest_address: 0, mapping, offset_bytes: 0, len_bytes: MEMORY_BYTES };
    GuestMemory::new(vec![slot]).unwrap()
}

/// A request as the driver means it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read {
        sector: u64,
        sectors: u64,
    },
    Write {
        sector: u64,
        bytes: Vec<u8>,
    },
    Flush,
    Id,
    /// A type that there is not.
    Unknown,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Number of the request.
    pub(crate) number: u16,
    pub(crate) status: u8,
    pub(crate) written_bytes: u32,
    pub(crate) data: Vec<u8>,
}

/// A device, its line, and the guest with its driver, which outlives the device.
pub(crate) struct Rig {
    pub(crate) memory: GuestMemory,
    pub(crate) store: Arc<Store>,
    pub(crate) line: Arc<CountedLine>,
    pub(crate) blk: Arc<VirtioBlk>,
    /// Requests made, and answers seen.
    pub(crate) made: u16,
    pub(crate) seen: u16,
    /// Interrupts of all devices that there were.
    pub(crate) interrupts: usize,
}

pub(crate) fn device(store: &Arc<Store>, memory: &GuestMemory) -> (Arc<VirtioBlk>, Arc<CountedLine>) {
    let line = Arc::new(CountedLine::default());
    let blk = VirtioBlk::new("disk0", "serial", store.clone(), memory.clone(), line.clone()).unwrap();
    (blk, line)
}

impl Rig {
    /// A device that its driver has just found.
    pub(crate) fn bare(store: Store) -> Self {
        let (memory, store) = (memory(), Arc::new(store));
        let (blk, line) = device(&store, &memory);
        blk.resume().unwrap();
        Self { memory, store, line, blk, made: 0, seen: 0, interrupts: 0 }
    }

    /// A device that its driver has made ready.
    pub(crate) fn ready(store: Store) -> Self {
        let rig = Self::bare(store);
        rig.negotiate(VERSION_1 | FLUSH);
        rig.set_queue();
        rig.set(0x70, 15);
        rig
    }

    pub(crate) fn get(&self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.blk.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn set(&self, offset: u64, value: u32) {
        self.blk.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn negotiate(&self, features: u64) {
        self.set(0x70, 0);
        self.set(0x70, 1);
        self.set(0x70, 3);
        for select in [0, 1] {
            self.set(0x24, select);
            self.set(0x20, u32::try_from(features >> (32 * select) & 0xffff_ffff).unwrap());
        }
        self.set(0x70, 11);
    }

    pub(crate) fn set_queue(&self) {
        self.set(0x30, 0);
        self.set(0x38, SIZE.into());
        for (register, address) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)] {
            self.set(register, u32::try_from(address).unwrap());
            self.set(register + 4, 0);
        }
        self.set(0x44, 1);
    }

    fn room(number: u16) -> u64 {
        ROOM + u64::from(number) % ROOMS * ROOM_BYTES
    }

    fn word(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(address, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    pub(crate) fn put_word(&self, address: u64, value: u16) {
        self.memory.write(address, &value.to_le_bytes()).unwrap();
    }

    pub(crate) fn put_descriptor(&self, index: u16, address: u64, len: u64, flags: u16, next: u16) {
        let place = DESCRIPTORS + 16 * u64::from(index);
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(u32::try_from(len).unwrap().to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write(place, &bytes).unwrap();
    }

    /// How many requests may be made before an answer is taken.
    pub(crate) fn has_room(&self) -> bool {
        u64::from(self.made.wrapping_sub(self.seen)) < ROOMS
    }

    /// Makes a request available, without a word to the device.
    pub(crate) fn make(&mut self, request: &Request) -> u16 {
        assert!(self.has_room());
        let number = self.made;
        let (room, first) = (Self::room(number), number % 5 * EACH);
        let (kind, sector, data, to_device): (u32, u64, u64, bool) = match request {
            Request::Read { sector, sectors } => (0, *sector, sectors * 512, false),
            Request::Write { sector, bytes } => {
                self.memory.write(room + 32, bytes).unwrap();
                (1, *sector, u64::try_from(bytes.len()).unwrap(), true)
            }
            Request::Flush => (4, 0, 0, true),
            Request::Id => (8, 0, 20, false),
            Request::Unknown => (77, 0, 0, true),
        };
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.memory.write(room, &header).unwrap();
        self.memory.write(room + 16, &[0xee]).unwrap();
        let last = if data == 0 { first + 1 } else { first + 2 };
        self.put_descriptor(first, room, 16, 1, first + 1);
        if data > 0 {
            self.put_descriptor(first + 1, room + 32, data, if to_device { 1 } else { 3 }, last);
        }
        self.put_descriptor(last, room + 16, 1, 2, 0);
        self.offer(first);
        number
    }

    /// Makes the chain at a descriptor available.
    pub(crate) fn offer(&mut self, head: u16) {
        self.put_word(AVAILABLE + 4 + 2 * u64::from(self.made % SIZE), head);
        self.made = self.made.wrapping_add(1);
        self.put_word(AVAILABLE + 2, self.made);
    }

    pub(crate) fn notify(&self) {
        self.set(0x50, 0);
    }

    /// How many answers there are that were not taken.
    pub(crate) fn answered(&self) -> u16 {
        self.word(USED + 2).wrapping_sub(self.seen)
    }

    /// Takes the next answer, if there is one.
    pub(crate) fn take(&mut self, request: &Request) -> Option<Answer> {
        if self.answered() == 0 {
            return None;
        }
        let number = self.seen;
        let mut entry = [0; 8];
        self.memory.read(USED + 4 + 8 * u64::from(number % SIZE), &mut entry).unwrap();
        let [h0, h1, 0, 0, w0, w1, w2, w3] = entry else { panic!("{entry:?}") };
        assert_eq!(u16::from_le_bytes([h0, h1]), number % 5 * EACH, "answers come in order");
        let room = Self::room(number);
        let mut status = [0];
        self.memory.read(room + 16, &mut status).unwrap();
        let len = match request {
            Request::Read { sectors, .. } => sectors * 512,
            Request::Id => 20,
            _ => 0,
        };
        let mut data = vec![0; usize::try_from(len).unwrap()];
        self.memory.read(room + 32, &mut data).unwrap();
        self.seen = self.seen.wrapping_add(1);
        let written_bytes = u32::from_le_bytes([w0, w1, w2, w3]);
        Some(Answer { number, status: status[0], written_bytes, data })
    }

    /// Waits for the next answer.
    pub(crate) fn await_answer(&mut self, request: &Request) -> Answer {
        let begun = Instant::now();
        loop {
            if let Some(answer) = self.take(request) {
                return answer;
            }
            assert!(begun.elapsed() < LONG, "no answer to {request:?}");
            std::thread::yield_now();
        }
    }

    /// Makes a request and waits for its answer.
    pub(crate) fn ask(&mut self, request: &Request) -> Answer {
        let number = self.make(request);
        self.notify();
        let answer = self.await_answer(request);
        assert_eq!(answer.number, number);
        answer
    }

    /// Reads why there is an interrupt, and says that it was seen.
    pub(crate) fn acknowledge(&self) -> u32 {
        let status = self.get(0x60);
        self.set(0x64, status);
        status
    }

    /// Replaces the device, which is paused, by a new one with its state. It is not resumed yet.
    pub(crate) fn replace_paused(&mut self) {
        let state = self.blk.save().unwrap();
        let (blk, line) = device(&self.store, &self.memory);
        blk.load(&state).unwrap();
        assert_eq!(blk.save().unwrap(), state);
        assert_eq!(line.raised(), 0, "an interrupt waits for the VM to be loaded");
        self.interrupts += self.line.raised();
        (self.blk, self.line) = (blk, line);
    }

    /// An update.
    pub(crate) fn update(&mut self) {
        self.blk.pause();
        self.replace_paused();
        self.blk.resume().unwrap();
    }
}
