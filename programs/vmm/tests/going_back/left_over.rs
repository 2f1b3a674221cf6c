//! Nothing stays behind of an update that failed.

use std::time::Duration;

use machine::update::Step;
use tideover_vmm::control::GuestKind;

use crate::fake::Fake;
use crate::for_each_guest;
use crate::processes::children;
use crate::processes::holdings;
use crate::rig::Rig;
use crate::rig::program;
use crate::roles::Fault;
use crate::roles::Place;
use crate::roles::Plan;

for_each_guest!(nothing_is_left_of_twenty_failed_updates);

/// Five updates that fail, each in another way.
fn fail(rig: &Rig, pid: u32) {
    for place in [Place::Started, Place::At(Step::Attached), Place::At(Step::Loaded)] {
        rig.plan(&Plan::at(place, Fault::Killed));
        let report = rig.update(program());
        rig.assert_rolled_back(&report, pid, Duration::ZERO, &["signal: 9 (SIGKILL)"]);
    }
    for turns in [2, 3] {
        let (fake, heard) = Fake::after(&rig.listen_long(), turns);
        drop((fake, heard));
        rig.assert_rolled_back(&rig.update_report(), pid, Duration::ZERO, &["the other side is gone"]);
    }
}

fn nothing_is_left_of_twenty_failed_updates(guest: GuestKind) {
    let rig = Rig::start(guest);
    let pid = rig.status().pid;
    // What is made once and kept is there after the first ones.
    fail(&rig, pid);
    let (held, metadata_bytes) = (holdings(pid), rig.witness.metadata_bytes());
    for _ in 0..4 {
        fail(&rig, pid);
    }
    assert_eq!(holdings(pid), held);
    assert!(children(pid).is_empty());
    assert_eq!(rig.witness.metadata_bytes(), metadata_bytes, "the machine's metadata grows");
    rig.assert_runs_in(pid);
    let next = rig.update_well();
    rig.assert_runs_in(next);
}
