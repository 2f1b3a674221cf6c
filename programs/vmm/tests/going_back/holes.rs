//! A guest whose memory has holes: a guest that cannot be stopped while it waits at one fills them before an update,
//! the other's stay holes.

use std::thread;
use std::time::Duration;

use tideover_vmm::control::GuestKind;

use crate::fake::Fake;
use crate::for_each_guest;
use crate::rig::Rig;

for_each_guest!(a_guest_that_has_not_touched_all_memory_is_updated_and_taken_back[userfaultfd]);

/// So much that the guest does not touch all of it before the update is under way.
const MEMORY_BYTES: u64 = 256 << 20;

fn a_guest_that_has_not_touched_all_memory_is_updated_and_taken_back(guest: GuestKind) {
    for turns in [2, 3] {
        let rig = Rig::with_holes(guest, MEMORY_BYTES);
        let pid = rig.status().pid;
        let (fake, heard) = Fake::after(&rig.listen_long(), turns);
        let there = rig.witness.memory_bytes();
        assert_eq!(there == MEMORY_BYTES, guest == GuestKind::Thread, "{there} bytes are there");
        if turns == 2 {
            // The successor has the memory, and gets ready for as long as it likes: the guest does not wait for it.
            rig.witness.assert_counts_on();
        } else {
            thread::sleep(Duration::from_millis(50));
            assert_eq!(rig.witness.memory_bytes(), there, "a hole was filled while the guest stood still");
        }
        drop((fake, heard));
        rig.assert_rolled_back(&rig.update_report(), pid, Duration::ZERO, &["the other side is gone"]);
        let next = rig.update_well();
        rig.assert_runs_in(next);
    }
}
