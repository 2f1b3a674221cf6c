//! After the point of no return the guest is the successor's, whatever becomes of it.

use std::time::Duration;

use machine::update::Step;
use tideover_vmm::control::Answer;
use tideover_vmm::control::GuestKind;
use tideover_vmm::control::Source;
use tideover_vmm::control::UpdateOutcome;
use tideover_vmm::control::UpdateReport;

use crate::for_each_guest;
use crate::processes;
use crate::processes::Process;
use crate::rig::Rig;
use crate::rig::program;
use crate::rig::request;
use crate::roles::Fault;
use crate::roles::Place;
use crate::roles::Plan;
use crate::stalled::PATIENCE;

for_each_guest!(
    a_guest_dies_with_the_successor_that_runs_it,
    a_successor_stopped_while_it_runs_the_guest_goes_on_with_it,
);

fn a_guest_dies_with_the_successor_that_runs_it(guest: GuestKind) {
    for step in [Step::Running, Step::Settled] {
        let mut rig = Rig::start(guest);
        let before = rig.witness.owner();
        rig.plan(&Plan::at(Place::At(step), Fault::Killed));
        rig.send(&request(Source::Program(program()), Duration::from_secs(20), Duration::from_secs(20)));
        let Some(Answer::Error(error)) = rig.answer() else { panic!("{step}: no error\n{}", rig.said()) };
        let lost = "the guest is lost: the successor took the machine over, and died: the other side is gone";
        assert_eq!(error, lost, "{step}");
        // It was not taken back, and who could have done so says that it failed.
        assert_eq!(rig.witness.owner().epoch(), before.epoch() + 3, "{step}");
        assert_ne!(rig.witness.owner().nonce(), before.nonce(), "{step}");
        assert_eq!(rig.first.ends().0.code(), Some(1), "{step}");
        rig.assert_lost();
    }
}

/// Has a successor take the machine over and stop, one that connects or one that the VMM starts. It is stopped still.
fn stop_at(rig: &Rig, step: Step, connects: bool) -> (UpdateReport, Option<Process>) {
    for (prepare, hand_over) in PATIENCE {
        rig.plan(&Plan::at(Place::At(step), Fault::Stopped));
        let successor = connects.then(|| rig.successor(&rig.listen(prepare, hand_over)));
        if !connects {
            rig.send(&request(Source::Program(program()), prepare, hand_over));
        }
        let report = rig.update_report();
        if report.outcome == UpdateOutcome::Updated {
            return (report, successor);
        }
    }
    panic!("the successor did not get to {step} in any time\n{}", rig.said());
}

fn a_successor_stopped_while_it_runs_the_guest_goes_on_with_it(guest: GuestKind) {
    for (step, connects) in [(Step::Running, true), (Step::Running, false), (Step::Settled, true)] {
        let mut rig = Rig::start(guest);
        let (report, successor) = stop_at(&rig, step, connects);
        let reason = report.reason.expect("the successor is silent");
        assert!(reason.contains("is silent: the other side did not send "), "{reason}");
        let now = report.successor_pid.expect("an update has a successor");
        assert!(successor.as_ref().is_none_or(|successor| successor.pid() == now));
        assert!(rig.first.ends().0.success(), "{step}: it has nothing left to do");
        // The guest is nobody else's: as long as its VMM is stopped it stands still.
        assert_eq!(processes::state(now), Some('T'), "{step}");
        rig.witness.assert_stands_still();
        processes::wake(now);
        rig.assert_runs_in(now);
        let next = rig.update_well();
        rig.assert_runs_in(next);
    }
}
