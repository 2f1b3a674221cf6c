//! A card on an interface of the host's.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use devices::tap::Tap;

use crate::driver::Rig;

#[test]
fn the_host_gets_each_frame_of_the_guest_once_over_updates() {
    harness::need!(tap);
    let tap = Tap::open(&format!("tdn{}", std::process::id() % 100_000)).unwrap();
    let interface = PathBuf::from("/sys/class/net").join(tap.name());
    // Up.
    std::fs::write(interface.join("flags"), "0x1003").unwrap();
    let mut rig = Rig::new(tap.as_fd().try_clone_to_owned().unwrap());
    let begun = Instant::now();
    for number in 0_u8..50 {
        // To all, of a type that nobody takes.
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
        frame.resize(100, number);
        rig.send(&frame);
        rig.notify();
        if number % 2 == 0 {
            rig.update();
        }
        while rig.take_sent() == 0 {
            assert!(begun.elapsed() < Duration::from_secs(60), "frame {number} is not taken");
            thread::yield_now();
        }
    }
    let counted = std::fs::read_to_string(interface.join("statistics/rx_packets")).unwrap();
    assert_eq!((counted.trim(), rig.net.dropped()), ("50", 0));
}
