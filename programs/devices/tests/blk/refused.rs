//! What a driver may get wrong, and what a disk may answer.

use devices::Device;
use devices::DeviceFault;
use devices::RingFault;

use crate::driver::DESCRIPTORS;
use crate::driver::MEMORY_BYTES;
use crate::driver::Request;
use crate::driver::Rig;
use crate::driver::VERSION_1;
use crate::store::Done;
use crate::store::Step;
use crate::store::Store;

const NEEDS_RESET: u32 = 0x40;

#[test]
fn the_driver_finds_a_virtio_1_disk() {
    let rig = Rig::bare(Store::new(8));
    assert_eq!((rig.get(0), rig.get(4), rig.get(8)), (u32::from_le_bytes(*b"virt"), 2, 2));
    rig.set(0x14, 1);
    assert_eq!(rig.get(0x10), 1, "VERSION_1");
    rig.set(0x14, 0);
    assert_eq!(rig.get(0x10), 1 << 9 | 1 << 6 | 1 << 2 | 1 << 1);
    assert_eq!((rig.get(0x100), rig.get(0x104)), (8, 0), "sectors");
    assert_eq!((rig.get(0x108), rig.get(0x10c), rig.get(0x114)), (32768, 126, 512));
    assert_eq!((rig.get(0x200), rig.get(0xffc)), (0, 0));
    assert_eq!(rig.get(0x34), 128);
    rig.set(0x30, 1);
    assert_eq!(rig.get(0x34), 0, "there is one queue");
    assert_eq!(rig.get(0xb0), u32::MAX, "no shared memory");
}

#[test]
fn only_features_that_were_offered_are_agreed_on() {
    let rig = Rig::bare(Store::new(8));
    for features in [0, 1 << 9, VERSION_1 | 1 << 28, VERSION_1 | 1 << 5] {
        rig.negotiate(features);
        assert_eq!(rig.get(0x70), 3, "{features:#x}");
        rig.set(0x70, 15);
        assert_eq!(rig.get(0x70), 3, "not ready without an agreement");
    }
    rig.negotiate(VERSION_1);
    assert_eq!(rig.get(0x70), 11);
}

#[test]
fn a_queue_that_cannot_be_needs_a_reset() {
    let rig = Rig::bare(Store::new(8));
    for (register, value) in
        [(0x38, 3), (0x38, 256), (0x38, 0x1_0000), (0x80, 8), (0x84, 1), (0xa4, u32::MAX)]
    {
        rig.negotiate(VERSION_1);
        rig.set(0x30, 0);
        rig.set(0x38, 16);
        for (low, address) in [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)] {
            rig.set(low, address);
            rig.set(low + 4, 0);
        }
        rig.set(register, value);
        rig.set(0x44, 1);
        assert_eq!((rig.get(0x44), rig.get(0x70)), (0, 11 | NEEDS_RESET), "{register:#x} {value:#x}");
    }
}

#[test]
fn requests_that_cannot_be_done_are_answered_so_and_the_disk_goes_on() {
    let mut rig = Rig::ready(Store::new(8));
    let failed = [
        Request::Read { sector: 8, sectors: 1 },
        Request::Read { sector: 7, sectors: 2 },
        Request::Read { sector: u64::MAX, sectors: 1 },
        Request::Read { sector: u64::MAX / 512, sectors: 1 },
        Request::Write { sector: 8, bytes: vec![1; 512] },
        Request::Write { sector: 0, bytes: vec![1; 511] },
    ];
    for request in &failed {
        assert_eq!(rig.ask(request).status, 1, "{request:?}");
    }
    assert_eq!(rig.ask(&Request::Unknown).status, 2);
    for step in [Step::Fail, Step::Zero] {
        rig.store.script([Step::Short(100), step]);
        assert_eq!(rig.ask(&Request::Read { sector: 0, sectors: 1 }).status, 1);
        rig.store.script([step]);
        assert_eq!(rig.ask(&Request::Write { sector: 0, bytes: vec![1; 512] }).status, 1);
    }
    rig.store.script([Step::Fail]);
    assert_eq!(rig.ask(&Request::Flush).status, 1);
    assert_eq!(rig.ask(&Request::Flush).status, 0);
    assert_eq!(rig.ask(&Request::Id).data[..7], *b"serial\0");
    assert!(rig.store.writes().is_empty());
}

#[test]
fn a_disk_that_is_read_only_is_not_written() {
    let mut store = Store::new(8);
    store.read_only = true;
    let mut rig = Rig::bare(store);
    rig.set(0x14, 0);
    assert_ne!(rig.get(0x10) & 1 << 5, 0);
    rig.negotiate(VERSION_1 | 1 << 5);
    rig.set_queue();
    rig.set(0x70, 15);
    assert_eq!(rig.ask(&Request::Write { sector: 0, bytes: vec![1; 512] }).status, 1);
    assert_eq!(rig.ask(&Request::Read { sector: 0, sectors: 1 }).status, 0);
    assert!(rig.store.writes().is_empty());
}

#[test]
fn a_write_is_durable_for_a_driver_that_cannot_flush() {
    let mut rig = Rig::bare(Store::new(8));
    rig.negotiate(VERSION_1);
    rig.set_queue();
    rig.set(0x70, 15);
    assert_eq!(rig.ask(&Request::Write { sector: 0, bytes: vec![1; 512] }).status, 0);
    assert_eq!(rig.store.done().last(), Some(&Done::Sync));
}

/// What the device says of a chain made by hand, and that it works again after a reset.
fn fault(make: impl FnOnce(&mut Rig)) -> DeviceFault {
    let mut rig = Rig::ready(Store::new(8));
    make(&mut rig);
    rig.notify();
    while rig.get(0x70) & NEEDS_RESET == 0 {
        std::thread::yield_now();
    }
    assert_eq!(rig.get(0x60), 2, "the driver is told");
    assert_eq!(rig.answered(), 0);
    // It stays so over an update.
    let fault = rig.blk.take_fault().unwrap();
    rig.update();
    assert_eq!(rig.get(0x70) & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(rig.line.raised(), 1);
    rig.memory.write(crate::driver::AVAILABLE, &[0; 64]).unwrap();
    (rig.made, rig.seen) = (0, 0);
    rig.negotiate(VERSION_1);
    rig.set_queue();
    rig.set(0x70, 15);
    assert_eq!(rig.ask(&Request::Flush).status, 0);
    fault
}

#[test]
fn a_driver_that_breaks_its_ring_is_told_to_reset_the_disk() {
    let ring = |fault| match fault {
        DeviceFault::Ring { queue: 0, source } => source,
        other => panic!("{other:?}"),
    };
    let endless = ring(fault(|rig| {
        rig.put_descriptor(0, 0x4000, 16, 1, 0);
        rig.offer(0);
    }));
    assert_eq!(endless, RingFault::Endless { head: 0 });
    let outside = ring(fault(|rig| {
        rig.put_descriptor(0, MEMORY_BYTES - 8, 16, 0, 0);
        rig.offer(0);
    }));
    assert!(matches!(outside, RingFault::Outside { part: "buffer", .. }), "{outside:?}");
    let indirect = ring(fault(|rig| {
        rig.put_descriptor(0, DESCRIPTORS, 16, 4, 0);
        rig.offer(0);
    }));
    assert_eq!(indirect, RingFault::Flags { index: 0, flags: 4 });
}

#[test]
fn a_request_without_room_for_its_answer_stops_the_disk() {
    let why = |fault| match fault {
        DeviceFault::Request { queue: 0, why } => why,
        other => panic!("{other:?}"),
    };
    let short = fault(|rig| {
        rig.put_descriptor(0, 0x4000, 15, 1, 1);
        rig.put_descriptor(1, 0x5000, 1, 2, 0);
        rig.offer(0);
    });
    assert_eq!(why(short), "ends within its head");
    let mute = fault(|rig| {
        rig.put_descriptor(0, 0x4000, 16, 0, 0);
        rig.offer(0);
    });
    assert_eq!(why(mute), "has no place for its status");
}

#[test]
fn a_store_that_panics_stops_the_disk_and_not_the_pause() {
    struct Broken;
    impl devices::BlockStore for Broken {
        fn len_bytes(&self) -> u64 {
            4096
        }
        fn is_read_only(&self) -> bool {
            false
        }
        fn read_at(&self, _: &mut [u8], _: u64) -> std::io::Result<usize> {
            panic!("as the test wants it")
        }
        fn write_at(&self, _: &[u8], _: u64) -> std::io::Result<usize> {
            panic!("as the test wants it")
        }
        fn sync(&self) -> std::io::Result<()> {
            panic!("as the test wants it")
        }
    }
    let mut rig = Rig::ready(Store::new(8));
    rig.blk.pause();
    let state = rig.blk.save().unwrap();
    let line = std::sync::Arc::new(crate::line::CountedLine::default());
    let store = std::sync::Arc::new(Broken);
    let blk = devices::VirtioBlk::new("disk0", "serial", store, rig.memory.clone(), line.clone()).unwrap();
    devices::Device::load(&*blk, &state).unwrap();
    (rig.blk, rig.line) = (blk, line);
    devices::Device::resume(&*rig.blk).unwrap();
    rig.make(&Request::Flush);
    rig.notify();
    while rig.get(0x70) & NEEDS_RESET == 0 {
        std::thread::yield_now();
    }
    devices::Device::pause(&*rig.blk);
    assert!(matches!(rig.blk.take_fault(), Some(DeviceFault::Panic { queue: 0 })));
}
