//! Frames over a wire whose other end is a test's.

use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use devices::Device;
use devices::DeviceFault;
use rustix::event::PollFd;
use rustix::event::PollFlags;

use crate::driver::BUFFER_BYTES;
use crate::driver::HEADER;
use crate::driver::MAC;
use crate::driver::Rig;
use crate::driver::SIZE;
use crate::driver::wire;

/// Far longer than anything takes; a test that waits for it has failed.
const LONG: Duration = Duration::from_secs(60);

/// What a header says when nothing but one buffer is meant.
const PLAIN: [u8; HEADER] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

fn with_header(header: [u8; HEADER], frame: &[u8]) -> Vec<u8> {
    [&header[..], frame].concat()
}

/// A frame of a length that varies with its number.
fn frame(number: u32) -> Vec<u8> {
    let mut frame = vec![u8::try_from(number % 251).unwrap(); 14 + usize::try_from(number % 1400).unwrap()];
    frame[..4].copy_from_slice(&number.to_le_bytes());
    frame
}

/// Takes a frame from the wire, waiting for it.
fn take(host: &OwnedFd) -> Vec<u8> {
    let mut polled = [PollFd::new(host, PollFlags::IN)];
    let long = rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 };
    assert_ne!(rustix::event::poll(&mut polled, Some(&long)).unwrap(), 0, "no frame for the host");
    let mut bytes = vec![0; 4096];
    let len = rustix::io::read(host, &mut bytes[..]).unwrap();
    bytes.truncate(len);
    bytes
}

fn has_frame(wire: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(wire, PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut polled, Some(&now)).unwrap() > 0
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < LONG, "{what}");
        thread::yield_now();
    }
}

fn receive(rig: &mut Rig) -> Vec<u8> {
    let mut received = None;
    until("no frame for the guest", || {
        received = rig.take_received();
        received.is_some()
    });
    received.unwrap()
}

#[test]
fn the_driver_finds_a_virtio_1_card() {
    let (frames, _host) = wire();
    let rig = Rig::new(frames);
    assert_eq!((rig.get(4), rig.get(8), rig.get(0x70)), (2, 1, 15));
    assert_eq!(rig.get(0x100), u32::from_le_bytes([MAC[0], MAC[1], MAC[2], MAC[3]]));
    assert_eq!(rig.get(0x104), u32::from_le_bytes([MAC[4], MAC[5], 1, 0]), "the link is up");
}

#[test]
fn a_frame_goes_each_way_with_a_header_that_says_what_was_agreed() {
    let (frames, host) = wire();
    let mut rig = Rig::new(frames);
    rig.give_buffers(BUFFER_BYTES);
    rig.send(&frame(7));
    rig.notify();
    assert_eq!(take(&host), with_header(PLAIN, &frame(7)));
    until("not answered", || rig.take_sent() == 1);
    rustix::io::write(&host, &with_header([0xff; HEADER], &frame(8))).unwrap();
    assert_eq!(receive(&mut rig), with_header(PLAIN, &frame(8)));
    rig.net.pause();
    assert_eq!(rig.line.raised(), 2);
    assert_eq!(rig.get(0x60), 1);
}

#[test]
fn each_of_many_frames_arrives_once_and_in_order_over_many_updates() {
    const FRAMES: u32 = 4000;
    let (frames, host) = wire();
    let mut rig = Rig::new(frames);
    let sender = {
        let host = host.try_clone().unwrap();
        thread::spawn(move || {
            for number in 0..FRAMES {
                rustix::io::write(&host, &with_header(PLAIN, &frame(number))).unwrap();
            }
        })
    };
    let receiver = thread::spawn(move || {
        for number in 0..FRAMES {
            assert_eq!(take(&host), with_header(PLAIN, &frame(number)), "frame {number}");
        }
        host
    });
    let (mut sent, mut answered, mut received, mut updates) = (0, 0, 0, 0);
    let begun = Instant::now();
    while answered < FRAMES || received < FRAMES {
        assert!(begun.elapsed() < LONG, "{answered} answered, {received} received");
        rig.give_buffers(BUFFER_BYTES);
        while sent < FRAMES && rig.free(1) > 0 {
            rig.send(&frame(sent));
            sent += 1;
        }
        rig.notify();
        if (sent + received) % 3 == 0 {
            rig.update();
            updates += 1;
        }
        while let Some(bytes) = rig.take_received() {
            assert_eq!(bytes, with_header(PLAIN, &frame(received)), "frame {received}");
            received += 1;
        }
        answered += u32::from(rig.take_sent());
    }
    sender.join().unwrap();
    let host = receiver.join().unwrap();
    rig.net.pause();
    assert!(!has_frame(&host), "none is sent twice");
    assert!(rig.take_received().is_none() && !has_frame(rig.frames()), "none is received twice");
    assert_eq!((rig.net.dropped(), answered, received), (0, FRAMES, FRAMES));
    assert_ne!(updates, 0);
}

#[test]
fn a_frame_for_a_guest_without_buffers_waits_with_the_descriptor() {
    let (frames, host) = wire();
    let mut rig = Rig::new(frames);
    rustix::io::write(&host, &with_header(PLAIN, &frame(1))).unwrap();
    rig.update();
    assert!(has_frame(rig.frames()), "nobody took it");
    rig.net.pause();
    // The driver gives buffers to a device that is paused.
    rig.give_buffers(BUFFER_BYTES);
    rustix::io::write(&host, &with_header(PLAIN, &frame(2))).unwrap();
    rig.replace_paused();
    assert!(rig.take_received().is_none());
    rig.net.resume().unwrap();
    assert_eq!(receive(&mut rig), with_header(PLAIN, &frame(1)));
    assert_eq!(receive(&mut rig), with_header(PLAIN, &frame(2)));
}

#[test]
fn a_frame_that_the_host_does_not_take_yet_stays_in_the_ring() {
    let (frames, host) = wire();
    // The wire takes few frames before it is full.
    rustix::net::sockopt::set_socket_send_buffer_size(&frames, 4096).unwrap();
    let mut rig = Rig::new(frames);
    for number in 0..u32::from(SIZE) {
        rig.send(&frame(1390 + number % 8));
    }
    rig.notify();
    rig.update();
    rig.net.pause();
    let first = rig.take_sent();
    assert!(first < SIZE, "the wire is full, and {} frames wait", SIZE - first);
    rig.replace_paused();
    rig.net.resume().unwrap();
    for number in 0..u32::from(SIZE) {
        assert_eq!(take(&host), with_header(PLAIN, &frame(1390 + number % 8)), "frame {number}");
    }
    let mut answered = first;
    until("not answered", || {
        answered += rig.take_sent();
        answered == SIZE
    });
    assert!(!has_frame(&host));
}

#[test]
fn what_no_one_can_take_is_dropped_and_counted_and_the_rest_goes_on() {
    let (frames, host) = wire();
    let mut rig = Rig::new(frames);
    rig.give_buffers(64);
    rustix::io::write(&host, &with_header(PLAIN, &[1; 53])).unwrap();
    rustix::io::write(&host, &[1; HEADER - 1]).unwrap();
    rustix::io::write(&host, &with_header(PLAIN, &[2; 52])).unwrap();
    assert_eq!(receive(&mut rig), with_header(PLAIN, &[2; 52]));
    assert_eq!(rig.net.dropped(), 2);
    assert!(rig.take_received().is_none());
}

#[test]
fn a_host_that_is_gone_is_told_and_the_guest_can_still_be_stopped() {
    let (frames, host) = wire();
    let mut rig = Rig::new(frames);
    rig.give_buffers(BUFFER_BYTES);
    drop(host);
    let mut fault = None;
    until("no fault", || {
        fault = rig.net.take_fault();
        fault.is_some()
    });
    assert!(matches!(fault, Some(DeviceFault::Frames(_))), "{fault:?}");
    rig.send(&frame(1));
    rig.notify();
    until("not answered", || rig.take_sent() == 1);
    assert_eq!(rig.net.dropped(), 1);
    rig.net.pause();
}
