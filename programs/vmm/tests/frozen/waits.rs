//! A vCPU that faults on a hole of frozen memory: it waits, the VMM can be told, and it goes on here or elsewhere.

use std::sync::Arc;
use std::thread;

use gmem::Freeze;
use gmem::Held;
use gmem::Inode;

use crate::rig::Guest;
use crate::rig::PAGE;
use crate::rig::SHAPES;
use crate::rig::SHORTLY;
use crate::rig::SOON;
use crate::rig::Shape;
use crate::rig::again;
use crate::rig::assert_whole;
use crate::rig::inode;
use crate::rig::is_present;
use crate::rig::present_bytes;
use crate::rig::progress;
use crate::rig::region;
use crate::rig::soon;

/// A guest that waits at a hole of its memory, in the midst of filling it.
pub(crate) struct Waiting {
    pub(crate) inode: Arc<Inode>,
    pub(crate) guest: Guest,
    pub(crate) freeze: Freeze,
    /// Where, in the memory.
    pub(crate) hole: u64,
    /// How much of the memory is there.
    pub(crate) present: u64,
}

impl Waiting {
    pub(crate) fn make(shape: Shape) -> Self {
        Self::with(inode(region(shape.interrupts)), shape, || {})
    }

    /// The same in memory that was made for it. `before` is done between the VM's making and the freeze.
    pub(crate) fn with(inode: Arc<Inode>, shape: Shape, before: impl FnOnce()) -> Self {
        let mut guest = Guest::new(&inode, shape);
        let begun = present_bytes(inode.mapping().region());
        guest.start();
        soon("the guest fills holes", || present_bytes(inode.mapping().region()) > begun + 256 * PAGE);
        before();
        let freeze = inode.freeze().unwrap();
        assert_eq!(freeze.held(), Held::Userfaultfd);
        let hole = freeze.wait_fault(SOON).unwrap().expect("the guest comes to a hole");
        let present = present_bytes(inode.mapping().region());
        Self { inode, guest, freeze, hole, present }
    }

    pub(crate) fn region(&self) -> &region::Region {
        self.inode.mapping().region()
    }

    /// Asserts that the guest waits, and nothing is added.
    #[track_caller]
    pub(crate) fn assert_waits(&self) {
        let before = progress(&self.inode);
        thread::sleep(SHORTLY);
        assert_eq!(progress(&self.inode), before, "it goes on");
        assert!(!is_present(self.region(), self.hole));
        assert_eq!(present_bytes(self.region()), self.present);
    }
}

/// Lets the guest go on until it has been through all of its memory, and stops it.
#[track_caller]
pub(crate) fn finish(inode: &Inode, guest: &mut Guest) {
    soon("the guest goes through its memory", || progress(inode).1 > 0);
    guest.stop();
    assert_whole(inode);
}

/// R2.2, R2.3, O2.4, P6.5.2.
#[test]
fn a_vcpu_that_faults_on_a_frozen_hole_waits_and_goes_on_after_the_freeze() {
    harness::need!(kvm, userfaultfd);
    for shape in SHAPES {
        let Waiting { inode, mut guest, freeze, hole, present } = {
            let waiting = Waiting::make(shape);
            waiting.assert_waits();
            waiting
        };
        drop(freeze);
        soon("the page is added", || is_present(inode.mapping().region(), hole));
        finish(&inode, &mut guest);
        assert!(present_bytes(inode.mapping().region()) > present, "{shape:?}");
    }
}

/// R2.2, R2.3, O2.4.
#[test]
fn a_vmm_that_asks_is_told_the_guest_address_and_has_its_vcpu_back() {
    harness::need!(kvm, userfaultfd);
    for shape in SHAPES {
        let mut waiting = Waiting::make(shape);
        let address = waiting.guest.file.guest_address(waiting.hole).unwrap();
        assert_eq!(waiting.guest.file.offset_bytes(address), Some(waiting.hole));
        // Refused: it is out, and stands before the access. As often as it tries again.
        let mut stands_at = None;
        for _ in 0..3 {
            waiting.guest.stop();
            waiting.assert_waits();
            let registers = waiting.guest.vcpu().fd().get_regs().unwrap();
            assert_eq!(stands_at.get_or_insert(registers.rip), &registers.rip, "{shape:?}");
            waiting.guest.start();
            // A worker of KVM that waits already is not told of again.
            let again = waiting.freeze.wait_fault(SHORTLY).unwrap();
            assert!(again.is_none_or(|hole| hole == waiting.hole), "{again:?}");
        }
        let Waiting { inode, mut guest, freeze, .. } = waiting;
        drop(freeze);
        finish(&inode, &mut guest);
    }
}

/// R2.3, P6.5.2.
#[test]
fn a_vcpu_that_waits_at_a_hole_is_kicked_out_saved_and_gets_done_in_the_successor() {
    harness::need!(kvm, userfaultfd);
    for shape in SHAPES {
        let mut waiting = Waiting::make(shape);
        let theirs = inode(again(waiting.inode.mapping()));
        let mut successor = Guest::new(&theirs, shape);
        waiting.guest.stop();
        waiting.assert_waits();
        let (ticks, state) = (progress(&theirs), waiting.guest.save());
        let Waiting { inode: ours, guest, freeze, hole, present } = waiting;
        // The order of a hand-over: the memory ends here before the freeze does.
        drop(ours.own().unwrap());
        drop((guest, freeze, ours));
        let region = theirs.mapping().region();
        assert_eq!((present_bytes(region), is_present(region, hole)), (present, false), "{shape:?}");
        assert_eq!(progress(&theirs), ticks);

        successor.load(&state);
        successor.start();
        soon("the page is added", || is_present(region, hole));
        finish(&theirs, &mut successor);
    }
}
