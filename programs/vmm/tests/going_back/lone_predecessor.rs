//! A predecessor that dies or stalls. Up to the seal the guest is its own; from then on the successor needs it no
//! more.

use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use machine::update::Step;
use tideover_vmm::control::GuestKind;
use tideover_vmm::control::UpdateOutcome;

use crate::for_each_guest;
use crate::processes::Process;
use crate::rig::Rig;
use crate::rig::program;
use crate::roles::Fault;
use crate::roles::Place;
use crate::roles::Plan;

for_each_guest!(
    one_that_dies_is_succeeded_from_the_seal_on,
    one_that_stalls_runs_on_or_finds_its_successor_running,
    who_asked_one_that_dies_is_answered_by_its_successor,
);

/// The predecessor's steps before the seal, and the step that the successor then waits for.
const BEFORE_SEAL: [(Step, Step); 5] = [
    (Step::Connected, Step::Offered),
    (Step::Offered, Step::Received),
    (Step::Warm, Step::Sealed),
    (Step::Paused, Step::Sealed),
    (Step::Saved, Step::Sealed),
];

fn did_not_get_here(step: Step) -> String {
    format!("the predecessor did not get this process to {step}: the other side ")
}

fn one_that_dies_is_succeeded_from_the_seal_on(guest: GuestKind) {
    for (step, awaited) in BEFORE_SEAL {
        let mut rig = Rig::alone(guest, Plan::at(Place::At(step), Fault::Killed));
        let owner = rig.witness.owner();
        let mut successor = rig.successor(rig.lone_socket());
        let said = successor.fails();
        assert!(said.contains(&(did_not_get_here(awaited) + "is gone")), "{step}: {said}");
        assert_eq!(rig.first.ends().0.signal(), Some(9), "{step}");
        assert_eq!(rig.witness.owner(), owner, "{step}");
        rig.assert_lost();
    }
    // It dies before it can tell of the seal; then while the successor has it in hand.
    for step in [Step::Sealed, Step::Claimed, Step::Loaded, Step::Running] {
        let mut rig = match step {
            Step::Sealed => Rig::alone(guest, Plan::at(Place::At(step), Fault::Killed)),
            _ => Rig::alone(guest, Plan::well()),
        };
        if step != Step::Sealed {
            rig.plan(&Plan::at(Place::At(step), Fault::Kills(rig.first.pid())));
        }
        let before = rig.witness.ticks();
        let successor = rig.successor(rig.lone_socket());
        assert_eq!(rig.first.ends().0.signal(), Some(9), "{step}");
        rig.assert_runs_in(successor.pid());
        assert!(rig.witness.ticks() > before, "{step}");
        let next = rig.update_well();
        rig.assert_runs_in(next);
    }
}

/// Has a predecessor stop at a step, with a successor that will not wait for long.
fn stop_at(guest: GuestKind, step: Step) -> (Rig, Process) {
    // Longer than the way there takes, or it is not reached.
    for patience in [700, 4_000, 20_000] {
        let rig = Rig::alone(guest, Plan::at(Place::At(step), Fault::Stopped));
        rig.plan(&Plan::well().with_patience(Duration::from_millis(patience)));
        let mut successor = rig.successor(rig.lone_socket());
        if rig.first.stops_before(&mut successor) {
            return (rig, successor);
        }
    }
    panic!("the predecessor did not get to {step} in any time");
}

fn one_that_stalls_runs_on_or_finds_its_successor_running(guest: GuestKind) {
    // It has not told of the seal: nobody has claimed the machine, since it lives.
    let not_told = (Step::Sealed, Step::Sealed);
    for (step, awaited) in BEFORE_SEAL.into_iter().chain([not_told]) {
        let (rig, mut successor) = stop_at(guest, step);
        let said = successor.fails();
        assert!(said.contains(&did_not_get_here(awaited)) && said.contains(" in time"), "{step}: {said}");
        rig.first.wake();
        rig.assert_runs_in(rig.first.pid());
        assert!(rig.said().contains(" rolled back: "), "{step}");
        let next = rig.update_well();
        rig.assert_runs_in(next);
    }
    for step in [Step::Running, Step::Settled] {
        let mut rig = Rig::alone(guest, Plan::at(Place::At(step), Fault::Stopped));
        let successor = rig.successor(rig.lone_socket());
        assert!(rig.first.stops(), "{step}");
        rig.assert_runs_in(successor.pid());
        rig.first.wake();
        assert!(rig.first.ends().0.success(), "{step}: {}", rig.said());
        rig.assert_runs_in(successor.pid());
    }
}

/// The steps at which it dies, and the successor goes on.
const FROM_THE_SEAL: [Step; 4] = [Step::Claimed, Step::Loaded, Step::Running, Step::Settled];

fn who_asked_one_that_dies_is_answered_by_its_successor(guest: GuestKind) {
    for step in FROM_THE_SEAL {
        let mut rig = Rig::start(guest);
        let pid = rig.first.pid();
        rig.plan(&Plan::at(Place::At(step), Fault::Kills(pid)));
        let report = rig.update(program());
        assert_eq!(rig.first.ends().0.signal(), Some(9), "{step}");
        let successor = report.successor_pid.expect("it is updated");
        assert_eq!((report.outcome, report.predecessor_pid), (UpdateOutcome::Updated, pid), "{step}");
        let reason = report.reason.as_deref().unwrap_or_default();
        assert!(reason.contains("died before it could say"), "{step}: {report:?}");
        assert_eq!(report.pause_us, None, "{step}");
        assert!(report.ticks_after > Some(report.ticks_before), "{step}: {report:?}");
        rig.assert_runs_in(successor);
        // Nobody answers twice: the next answer is the next update's.
        let next = rig.update_well();
        rig.assert_runs_in(next);
    }
}
