//! Many updates of one guest.

use std::hint::black_box;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use tideover_vmm::control::GuestKind;

use crate::for_each_guest;
use crate::rig::Rig;
use crate::witness::Witness;

for_each_guest!(ten_updates_under_load);

/// What an update adds to the ownership word's epoch: sealed, claimed, run.
const TRANSITIONS: u32 = 3;

/// Ends what goes on beside a test, also when that fails.
pub(crate) struct EndOf<'a>(pub(crate) &'a AtomicBool);

impl Drop for EndOf<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Looks at the guest's ticks all the time; gives how often it looked.
fn watch(witness: &Witness, over: &AtomicBool) -> u64 {
    let (mut looks, mut last) = (0, 0);
    while !over.load(Ordering::Relaxed) {
        let ticks = witness.ticks();
        assert!(ticks >= last, "the guest's ticks went back from {last} to {ticks}");
        (looks, last) = (looks + 1, ticks);
        thread::sleep(Duration::from_micros(200));
    }
    looks
}

fn ten_updates_under_load(guest: GuestKind) {
    let rig = Rig::start(guest);
    let over = AtomicBool::new(false);
    let processors = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let _end = EndOf(&over);
        for _ in 0..processors {
            scope.spawn(|| while !black_box(over.load(Ordering::Relaxed)) {});
        }
        let watch = scope.spawn(|| watch(&rig.witness, &over));
        for number in 1..=10 {
            let before = rig.witness.owner();
            rig.update_well();
            let now = rig.witness.owner();
            assert_eq!(now.epoch(), before.epoch() + TRANSITIONS, "update {number}");
            assert_ne!(now.nonce(), before.nonce(), "update {number}");
        }
        rig.assert_whole();
        over.store(true, Ordering::Relaxed);
        let looks = watch.join().expect("the guest's ticks went on");
        assert!(looks > 100, "{looks}");
    });
}
