//! A successor that dies before it runs the guest.

use std::time::Duration;

use machine::update::Step;
use tideover_vmm::control::GuestKind;

use crate::for_each_guest;
use crate::processes::children;
use crate::rig::Rig;
use crate::rig::program;
use crate::roles::Fault;
use crate::roles::Place;
use crate::roles::Plan;

for_each_guest!(
    a_successor_killed_at_any_step_leaves_the_guest_running,
    a_successor_that_connects_and_is_killed_leaves_the_guest_running,
);

/// Every place before the point of no return, and the step that the predecessor then waits for.
pub(crate) const PLACES: [(Place, Step); 7] = [
    (Place::Started, Step::Connected),
    (Place::Greeted, Step::Offered),
    (Place::At(Step::Received), Step::Warm),
    (Place::At(Step::Attached), Step::Warm),
    (Place::At(Step::Warm), Step::Warm),
    (Place::At(Step::Claimed), Step::Running),
    (Place::At(Step::Loaded), Step::Running),
];

/// What the reason says.
pub(crate) fn did_not_get_to(step: Step) -> String {
    format!("the successor did not get to {step}: ")
}

fn a_successor_killed_at_any_step_leaves_the_guest_running(guest: GuestKind) {
    let rig = Rig::start(guest);
    for (place, step) in PLACES {
        let pid = rig.status().pid;
        rig.plan(&Plan::at(place, Fault::Killed));
        let report = rig.update(program());
        let gone = did_not_get_to(step) + "the other side is gone";
        rig.assert_rolled_back(&report, pid, Duration::ZERO, &[gone.as_str(), "signal: 9 (SIGKILL)"]);
        assert_eq!(report.pause_us.is_some(), step == Step::Running, "{place:?}: {report:?}");
        assert!(children(pid).is_empty(), "{place:?}");
        rig.assert_runs_in(pid);
        let next = rig.update_well();
        rig.assert_runs_in(next);
    }
}

fn a_successor_that_connects_and_is_killed_leaves_the_guest_running(guest: GuestKind) {
    let rig = Rig::start(guest);
    let pid = rig.status().pid;
    // One that is killed before it connects is nobody.
    for (place, step) in &PLACES[1..] {
        rig.plan(&Plan::at(*place, Fault::Killed));
        let socket = rig.listen_long();
        let mut successor = rig.successor(&socket);
        let report = rig.update_report();
        let gone = did_not_get_to(*step) + "the other side is gone";
        rig.assert_rolled_back(&report, pid, Duration::ZERO, &[&gone]);
        assert_eq!(successor.ends().0.code(), None, "{place:?}: it was killed");
    }
    rig.assert_runs_in(pid);
    // The same way with one that fares well.
    rig.plan(&Plan::well());
    let socket = rig.listen_long();
    let mut successor = rig.successor(&socket);
    assert_eq!(rig.update_report().successor_pid, Some(successor.pid()));
    rig.assert_runs_in(successor.pid());
    let next = rig.update_well();
    assert!(successor.ends().0.success(), "it ends when it is succeeded");
    rig.assert_runs_in(next);
}
