//! A successor that is stopped before it runs the guest, and wakes late.

use std::time::Duration;

use machine::update::Step;
use tideover_vmm::control::GuestKind;
use tideover_vmm::control::Source;

use crate::for_each_guest;
use crate::killed::PLACES;
use crate::killed::did_not_get_to;
use crate::processes::Process;
use crate::processes::children;
use crate::rig::Rig;
use crate::rig::program;
use crate::rig::request;
use crate::roles::Fault;
use crate::roles::Place;
use crate::roles::Plan;

for_each_guest!(
    a_successor_that_is_stopped_and_wakes_late_runs_nothing,
    a_successor_that_is_stopped_is_ended_by_who_started_it,
    a_successor_that_wakes_after_another_took_over_runs_nothing,
);

/// How long a VMM waits for one that is stopped, before the pause and in it. It has to be longer than the way there
/// takes, or the stop is never reached: if a machine has much else to do, it is tried again with more.
pub(crate) const PATIENCE: [(Duration, Duration); 3] = [
    (Duration::from_secs(1), Duration::from_millis(400)),
    (Duration::from_secs(4), Duration::from_secs(2)),
    (Duration::from_secs(20), Duration::from_secs(10)),
];

/// Has a successor connect and stop at `place`, which ends the update. It is stopped still.
fn stop_at(rig: &Rig, pid: u32, place: Place, step: Step) -> Process {
    for (prepare, hand_over) in PATIENCE {
        rig.plan(&Plan::at(place, Fault::Stopped));
        let socket = rig.listen(prepare, hand_over);
        let mut successor = rig.successor(&socket);
        let report = rig.update_report();
        if !successor.stops() {
            continue;
        }
        let reason = match place {
            Place::Started => format!("no successor came to {}: nobody connected in time", socket.display()),
            _ => did_not_get_to(step) + "the other side did not send ",
        };
        rig.assert_rolled_back(&report, pid, hand_over, &[reason.as_str(), "in time"]);
        assert_eq!(report.pause_us.is_some(), step == Step::Running, "{place:?}: {report:?}");
        return successor;
    }
    panic!("the successor did not get to {place:?} in any time");
}

/// What a successor says that wakes there, after the machine was taken back.
fn last_words(place: Place) -> &'static str {
    match place {
        Place::Started => "cannot connect to the predecessor: there is no socket at",
        Place::Greeted => "the peer has closed the channel",
        // What went with the machine for that update does so no more.
        Place::At(Step::Received) => "the descriptors that go with the machine are not those of its session",
        Place::At(Step::Attached | Step::Warm) => "the update is off",
        _ => "the machine was taken back",
    }
}

fn a_successor_that_is_stopped_and_wakes_late_runs_nothing(guest: GuestKind) {
    let rig = Rig::start(guest);
    for (place, step) in PLACES {
        let pid = rig.status().pid;
        let mut late = stop_at(&rig, pid, place, step);
        rig.assert_runs_in(pid);
        let owner = rig.witness.owner();
        late.wake();
        let said = late.fails();
        assert!(said.contains(last_words(place)), "{place:?}: {said}");
        assert_eq!(rig.witness.owner(), owner, "{place:?}");
        rig.assert_runs_in(pid);
        let next = rig.update_well();
        rig.assert_runs_in(next);
    }
}

fn a_successor_that_is_stopped_is_ended_by_who_started_it(guest: GuestKind) {
    let rig = Rig::start(guest);
    let pid = rig.status().pid;
    let (prepare, hand_over) = PATIENCE[0];
    for (place, step) in [PLACES[0], PLACES[3], PLACES[6]] {
        rig.plan(&Plan::at(place, Fault::Stopped));
        // However far it gets in this time, it stays no longer than the update.
        rig.send(&request(Source::Program(program()), prepare, hand_over));
        let report = rig.update_report();
        rig.assert_rolled_back(&report, pid, hand_over, &["the successor did not get to ", "in time"]);
        assert!(children(pid).is_empty(), "{step}");
    }
    rig.assert_runs_in(pid);
    let next = rig.update_well();
    rig.assert_runs_in(next);
}

fn a_successor_that_wakes_after_another_took_over_runs_nothing(guest: GuestKind) {
    let rig = Rig::start(guest);
    let mut late = Vec::new();
    let mut pid = rig.status().pid;
    for (place, step) in &PLACES[3..] {
        late.push((place, stop_at(&rig, pid, *place, *step)));
        pid = rig.update_well();
    }
    let owner = rig.witness.owner();
    for (place, successor) in &mut late {
        successor.wake();
        let said = successor.fails();
        assert!(said.contains(last_words(**place)), "{place:?}: {said}");
    }
    assert_eq!(rig.witness.owner(), owner);
    rig.assert_runs_in(pid);
}
