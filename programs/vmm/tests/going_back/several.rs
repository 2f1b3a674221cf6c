//! Guests with several vCPUs, which stop, are saved and go on together.

use std::time::Duration;

use machine::update::Step;
use tideover_vmm::control::GuestKind;

use crate::executed::execute;
use crate::executed::execute_well;
use crate::for_each_guest;
use crate::rig::Rig;
use crate::rig::program;
use crate::roles::Executed;
use crate::roles::Fault;
use crate::roles::Place;
use crate::roles::Plan;

for_each_guest!(
    all_vcpus_go_on_after_updates_by_each_carrier,
    all_vcpus_go_on_where_they_were_if_an_update_fails,
);

const AMPLE: Duration = Duration::from_secs(20);

fn all_vcpus_go_on_after_updates_by_each_carrier(guest: GuestKind) {
    for vcpus in [2, 3] {
        let rig = Rig::with_vcpus(guest, vcpus);
        assert_eq!(rig.status().vcpus, u64::from(vcpus));
        for _ in 0..3 {
            let pid = rig.update_well();
            rig.assert_runs_in(pid);
            execute_well(&rig, pid);
            rig.assert_runs_in(pid);
        }
        let status = rig.status();
        assert_eq!((status.vcpus, status.updates), (u64::from(vcpus), 6));
    }
}

fn all_vcpus_go_on_where_they_were_if_an_update_fails(guest: GuestKind) {
    let rig = Rig::with_vcpus(guest, 2);
    let pid = rig.status().pid;
    for step in [Step::Warm, Step::Claimed, Step::Loaded] {
        rig.plan(&Plan::at(Place::At(step), Fault::Killed));
        let report = rig.update(program());
        rig.assert_rolled_back(&report, pid, AMPLE, &[]);
        rig.assert_runs_in(pid);
    }
    rig.plan(&Plan::well());
    for failure in [Executed::FailsAtOnce, Executed::FailsWhenClaimed] {
        rig.execution(failure);
        let report = execute(&rig);
        rig.assert_rolled_back(&report, pid, AMPLE, &["it was told to fail"]);
        rig.assert_runs_in(pid);
    }
    execute_well(&rig, pid);
    let next = rig.update_well();
    rig.assert_runs_in(next);
}
