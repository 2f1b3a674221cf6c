//! Pauses at every call that a request makes to the disk, and before the first and after the last.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use devices::Device;

use crate::driver::Request;
use crate::driver::Rig;
use crate::store::Step;
use crate::store::Store;

fn pattern(seed: u8, sectors: usize) -> Vec<u8> {
    (0..sectors * 512).map(|at| u8::try_from(at % 251).unwrap().wrapping_add(seed)).collect()
}

/// Three requests: one of two calls (as it is longer than a part), one that is done in three steps, and a flush.
fn requests() -> Vec<Request> {
    vec![
        Request::Write { sector: 3, bytes: pattern(1, 160) },
        Request::Write { sector: 200, bytes: pattern(2, 2) },
        Request::Flush,
        Request::Read { sector: 3, sectors: 160 },
    ]
}

/// What the calls do: the second request is interrupted and cut short.
const SCRIPT: [Step; 6] =
    [Step::Whole, Step::Whole, Step::Interrupted, Step::Short(700), Step::Short(1), Step::Whole];
/// Calls in all: two for 160 sectors in parts of 64 KiB, four by the script, one flush, two to read.
const CALLS: usize = 9;
/// Requests that are answered when so many calls have ended.
const ANSWERED: [u16; CALLS + 1] = [0, 0, 1, 1, 1, 1, 2, 3, 3, 4];

fn made() -> Rig {
    let mut rig = Rig::ready(Store::gated(400));
    rig.store.script(SCRIPT);
    for request in requests() {
        rig.make(&request);
    }
    rig
}

/// Pauses from another thread, while the disk is in the middle of call `call`, and lets the calls up to the end of its
/// request go on only after the pause was asked for.
fn pause_in_call(rig: &Rig, call: usize) {
    rig.store.allow(call - 1);
    rig.store.await_begun(call);
    let paused = Arc::new(AtomicBool::new(false));
    let pauser = {
        let (blk, paused) = (Arc::clone(&rig.blk), Arc::clone(&paused));
        thread::spawn(move || {
            blk.pause();
            paused.store(true, Ordering::SeqCst);
        })
    };
    // However long it is given, it cannot return: the request is under way.
    thread::sleep(Duration::from_millis(5));
    assert!(!paused.load(Ordering::SeqCst), "paused in the middle of call {call}");
    assert_eq!(rig.answered(), ANSWERED[call - 1]);
    let end = (call..=CALLS).find(|ended| ANSWERED[*ended] > ANSWERED[call - 1]).unwrap();
    // More may end than there are: those of the next request must not begin.
    rig.store.allow(usize::MAX);
    pauser.join().unwrap();
    // The next request may have been begun before the pause was asked for, but not be left unfinished.
    assert_between_requests(rig);
    assert!(rig.store.begun() >= end);
}

fn assert_between_requests(rig: &Rig) {
    let begun = rig.store.begun();
    assert_eq!(rig.answered(), ANSWERED[begun]);
    assert!(begun == 0 || ANSWERED[begun] > ANSWERED[begun - 1], "in the middle, after {begun} calls");
}

/// What must be true in the end, however often the device was replaced.
fn finish(mut rig: Rig) {
    rig.store.allow(usize::MAX);
    let requests = requests();
    for request in &requests {
        let answer = rig.await_answer(request);
        assert_eq!(answer.status, 0, "{request:?}");
        if let Request::Read { .. } = request {
            assert_eq!(answer.data, pattern(1, 160));
            assert_eq!(answer.written_bytes, 160 * 512 + 1);
        } else {
            assert_eq!(answer.written_bytes, 1);
        }
    }
    assert_eq!(rig.answered(), 0, "no request is answered twice");
    rig.blk.pause();
    assert_eq!(rig.store.begun(), CALLS, "nothing is done twice");
    let mut written = Vec::new();
    for (offset, bytes) in rig.store.writes() {
        written.push((offset, bytes.len()));
    }
    let second = 200 * 512;
    assert_eq!(
        written,
        [
            (1536, 65536),
            (1536 + 65536, 160 * 512 - 65536),
            (second, 700),
            (second + 700, 1),
            (second + 701, 323)
        ]
    );
    assert_eq!(rig.store.bytes()[200 * 512..][..1024], pattern(2, 2));
}

#[test]
fn a_pause_in_any_call_waits_for_its_request_and_the_successor_does_the_rest_once() {
    for call in 1..=CALLS {
        let mut rig = made();
        rig.notify();
        pause_in_call(&rig, call);
        rig.replace_paused();
        rig.blk.resume().unwrap();
        finish(rig);
    }
}

#[test]
fn a_predecessor_that_goes_on_after_a_pause_in_any_call_does_the_rest_once() {
    for call in 1..=CALLS {
        let rig = made();
        rig.notify();
        pause_in_call(&rig, call);
        rig.blk.save().unwrap();
        rig.blk.resume().unwrap();
        finish(rig);
    }
}

#[test]
fn a_request_that_was_made_but_not_told_of_is_found_by_the_successor() {
    let mut rig = Rig::ready(Store::gated(400));
    rig.blk.pause();
    rig.store.script(SCRIPT);
    for request in requests() {
        rig.make(&request);
    }
    // The notification goes to the predecessor, which is paused: it may be lost with it.
    rig.notify();
    assert_eq!(rig.store.begun(), 0);
    rig.replace_paused();
    rig.blk.resume().unwrap();
    finish(rig);
}

#[test]
fn a_device_replaced_before_and_after_each_request_does_everything_once() {
    let mut rig = Rig::ready(Store::new(400));
    rig.store.script(SCRIPT);
    let mut answers = 0;
    for request in requests() {
        rig.update();
        rig.make(&request);
        rig.update();
        answers += 1;
        // Without a notification: who resumes looks.
        while rig.answered() < answers {
            thread::yield_now();
        }
    }
    finish(rig);
}

#[test]
fn the_successor_raises_an_interrupt_that_was_not_acknowledged_and_no_other() {
    let mut rig = Rig::ready(Store::new(8));
    rig.ask(&Request::Flush);
    rig.update();
    assert_eq!(rig.line.raised(), 1, "not acknowledged");
    assert_eq!(rig.acknowledge(), 1);
    assert_eq!(rig.line.lowered(), 1);
    rig.update();
    assert_eq!(rig.line.raised(), 0, "acknowledged");
    assert_eq!(rig.acknowledge(), 0);
    rig.ask(&Request::Flush);
    rig.blk.pause();
    assert_eq!(rig.line.raised(), 1);
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let mut rig = Rig::ready(Store::new(8));
    rig.put_word(crate::driver::AVAILABLE, 1);
    rig.ask(&Request::Flush);
    rig.update();
    assert_eq!((rig.interrupts, rig.line.raised(), rig.get(0x60)), (0, 0, 0));
}

#[test]
fn a_paused_device_touches_nothing() {
    let mut rig = Rig::ready(Store::new(8));
    rig.blk.pause();
    rig.make(&Request::Write { sector: 0, bytes: pattern(1, 1) });
    rig.notify();
    rig.blk.notify();
    // Its thread has had every chance when another device, on the same processor, did a request.
    let mut other = Rig::ready(Store::new(8));
    other.ask(&Request::Flush);
    assert_eq!((rig.store.begun(), rig.answered(), rig.line.raised()), (0, 0, 0));
    rig.blk.resume().unwrap();
    assert_eq!(rig.await_answer(&Request::Flush).status, 0);
}

#[test]
fn a_reset_waits_for_the_request_under_way_and_touches_nothing_afterwards() {
    let mut rig = made();
    rig.notify();
    rig.store.await_begun(1);
    let blk = Arc::clone(&rig.blk);
    let resetter = thread::spawn(move || devices::MmioDevice::write(&*blk, 0x70, &[0; 4]));
    thread::sleep(Duration::from_millis(50));
    assert!(!resetter.is_finished());
    rig.store.allow(usize::MAX);
    resetter.join().unwrap();
    assert_eq!(rig.get(0x70), 0);
    assert_between_requests(&rig);
    let begun = rig.store.begun();
    rig.store.clear_script();
    rig.notify();
    let answered = rig.answered();
    // A new driver starts from the beginning of the rings.
    rig.memory.write(crate::driver::AVAILABLE, &[0; 64]).unwrap();
    rig.memory.write(crate::driver::USED, &[0; 64]).unwrap();
    (rig.made, rig.seen) = (0, 0);
    rig.negotiate(crate::driver::VERSION_1 | crate::driver::FLUSH);
    rig.set_queue();
    rig.set(0x70, 15);
    assert_eq!(rig.ask(&Request::Flush).status, 0);
    assert_eq!(rig.store.begun(), begun + 1, "{answered} were answered before");
}

#[test]
fn several_vcpus_may_use_a_disk_at_once() {
    let mut rig = Rig::ready(Store::new(400));
    let done = Arc::new(AtomicBool::new(false));
    let others: Vec<_> = (0..3)
        .map(|_| {
            let (blk, done) = (Arc::clone(&rig.blk), Arc::clone(&done));
            thread::spawn(move || {
                while !done.load(Ordering::SeqCst) {
                    let mut status = [0; 4];
                    devices::MmioDevice::read(&*blk, 0x60, &mut status);
                    devices::MmioDevice::write(&*blk, 0x64, &status);
                    devices::MmioDevice::write(&*blk, 0x50, &[0; 4]);
                }
            })
        })
        .collect();
    for round in 0..200 {
        let bytes = pattern(round, 2);
        let sector = u64::from(round);
        assert_eq!(rig.ask(&Request::Write { sector, bytes: bytes.clone() }).status, 0);
        assert_eq!(rig.ask(&Request::Read { sector, sectors: 2 }).data, bytes);
    }
    done.store(true, Ordering::SeqCst);
    others.into_iter().for_each(|other| other.join().unwrap());
    rig.blk.pause();
    assert_eq!(rig.line.raised(), 400);
}
