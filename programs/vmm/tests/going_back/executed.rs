//! A VMM that executes the next one's program, and what becomes of the guest if that fails.

use std::time::Duration;

use machine::update::Step;
use tideover_vmm::control::Carrier;
use tideover_vmm::control::GuestKind;
use tideover_vmm::control::Request;
use tideover_vmm::control::Source;
use tideover_vmm::control::UpdateOutcome;
use tideover_vmm::control::UpdateReport;

use crate::for_each_guest;
use crate::processes::await_that;
use crate::processes::children;
use crate::processes::holdings;
use crate::processes::state;
use crate::processes::wake;
use crate::rig::Rig;
use crate::rig::program;
use crate::rig::request;
use crate::roles::Executed;
use crate::roles::Fault;
use crate::roles::Place;
use crate::roles::Plan;

for_each_guest!(
    a_process_that_executes_the_next_program_stays_the_same,
    a_program_that_fails_after_execve_leaves_the_guest_to_the_one_before,
    a_program_that_fails_in_the_rehearsal_is_not_executed,
    a_process_that_dies_after_execve_leaves_the_guest_to_one_that_shares_its_memory,
    a_program_that_hangs_after_execve_and_wakes_late_runs_nothing,
    a_thousand_updates_leave_nothing_behind,
);

const AMPLE: Duration = Duration::from_secs(20);

pub(crate) fn execute(rig: &Rig) -> UpdateReport {
    execute_within(rig, AMPLE, AMPLE)
}

fn execute_within(rig: &Rig, prepare: Duration, hand_over: Duration) -> UpdateReport {
    match request(Source::Program(program()), prepare, hand_over) {
        Request::Update(update) => {
            rig.send(&Request::Update(tideover_vmm::control::UpdateRequest {
                carrier: Carrier::Exec,
                ..update
            }));
        }
        other => panic!("{other:?}"),
    }
    rig.update_report()
}

#[track_caller]
pub(crate) fn execute_well(rig: &Rig, pid: u32) {
    rig.execution(Executed::Well);
    let report = execute(rig);
    let said = || format!("{report:?}\n{}", rig.said());
    assert_eq!(report.outcome, UpdateOutcome::Updated, "{}", said());
    assert_eq!((report.predecessor_pid, report.successor_pid), (pid, Some(pid)), "{}", said());
    assert!(report.pause_us > Some(0.0) && report.aside_us > Some(0.0), "{}", said());
    assert!(report.ticks_after > Some(report.ticks_before), "{}", said());
}

fn a_process_that_executes_the_next_program_stays_the_same(guest: GuestKind) {
    let rig = Rig::start(guest);
    let pid = rig.status().pid;
    let identity = rig.status().identity;
    for updates in 1..=3 {
        execute_well(&rig, pid);
        rig.assert_runs_in(pid);
        assert_eq!((rig.status().updates, rig.status().identity), (updates, identity.clone()));
    }
    // The two ways follow each other as one likes.
    let next = rig.update_well();
    execute_well(&rig, next);
    rig.assert_runs_in(next);
}

fn a_program_that_fails_after_execve_leaves_the_guest_to_the_one_before(guest: GuestKind) {
    let rig = Rig::start(guest);
    let pid = rig.status().pid;
    for failure in [Executed::FailsAtOnce, Executed::FailsWhenClaimed] {
        rig.execution(failure);
        let report = execute(&rig);
        rig.assert_rolled_back(&report, pid, AMPLE, &["it was told to fail"]);
        assert!(report.ticks_after > Some(report.ticks_before), "{report:?}");
        rig.assert_runs_in(pid);
        assert_eq!(rig.status().updates, 0);
    }
    execute_well(&rig, pid);
    rig.assert_runs_in(pid);
}

fn a_process_that_dies_after_execve_leaves_the_guest_to_one_that_shares_its_memory(guest: GuestKind) {
    let rig = Rig::start(guest);
    for place in
        [Place::Started, Place::At(Step::Attached), Place::At(Step::Claimed), Place::At(Step::Loaded)]
    {
        let pid = rig.status().pid;
        rig.execution(Executed::Fares(Plan::at(place, Fault::Killed)));
        let report = execute(&rig);
        let words =
            ["the other side is gone", "the guest runs on in process", &format!("no longer in {pid}")];
        let aside = rig.status().pid;
        rig.assert_rolled_back(&report, aside, AMPLE, &words);
        assert_ne!(aside, pid);
        rig.assert_runs_in(aside);
        assert_eq!(rig.status().updates, 0);
    }
    let pid = rig.status().pid;
    execute_well(&rig, pid);
    rig.assert_runs_in(pid);
    let next = rig.update_well();
    rig.assert_runs_in(next);
}

fn a_program_that_hangs_after_execve_and_wakes_late_runs_nothing(guest: GuestKind) {
    let (prepare, hand_over) = (Duration::from_secs(4), Duration::from_secs(2));
    let rig = Rig::start(guest);
    for step in [Step::Attached, Step::Loaded] {
        let pid = rig.status().pid;
        rig.execution(Executed::Fares(Plan::at(Place::At(step), Fault::Stopped)));
        let report = execute_within(&rig, prepare, hand_over);
        let aside = rig.status().pid;
        let words = ["in time", "the guest runs on in process", &format!("no longer in {pid}")];
        rig.assert_rolled_back(&report, aside, hand_over, &words);
        assert_eq!(state(pid), Some('T'), "{step}");
        wake(pid);
        // Neither it nor the program before, which it executes again, gets the machine.
        await_that("it ends", || state(pid).is_none_or(|state| state == 'Z').then_some(()));
        rig.assert_runs_in(aside);
    }
    execute_well(&rig, rig.status().pid);
}

fn a_program_that_fails_in_the_rehearsal_is_not_executed(guest: GuestKind) {
    let rig = Rig::start(guest);
    let pid = rig.status().pid;
    for fault in [Fault::Killed, Fault::Ends(3)] {
        rig.plan(&Plan::at(Place::At(Step::Attached), fault));
        let report = execute(&rig);
        rig.assert_rolled_back(&report, pid, Duration::ZERO, &["the successor did not get to warm"]);
        assert_eq!(report.pause_us, None);
        rig.assert_runs_in(pid);
    }
    rig.plan(&Plan::well());
    execute_well(&rig, pid);
}

/// The last one has as much as the second: the first VMM is another program's child, and has a log.
fn a_thousand_updates_leave_nothing_behind(guest: GuestKind) {
    let rig = Rig::start(guest);
    rig.execution(Executed::Well);
    let mut pid = rig.status().pid;
    let mut held = None;
    for round in 0..250 {
        for _ in 0..2 {
            rig.send(&request(Source::Program(program()), AMPLE, AMPLE));
            let report = rig.update_report();
            pid = report.successor_pid.unwrap_or_else(|| panic!("{round}: {report:?}\n{}", rig.said()));
        }
        for _ in 0..2 {
            let report = execute(&rig);
            assert_eq!(report.successor_pid, Some(pid), "{round}: {report:?}\n{}", rig.said());
        }
        // The holder of the last execve, and what the kernel does at leisure, end a moment later.
        if round == 1 {
            rig.assert_runs_in(pid);
            held = Some((holdings(pid), rig.witness.metadata_bytes()));
        }
    }
    rig.assert_runs_in(pid);
    assert_eq!(Some((holdings(pid), rig.witness.metadata_bytes())), held);
    assert!(children(pid).is_empty());
    assert_eq!(rig.status().updates, 1000);
}
