//! Faults that no userfaultfd holds: without the right to one, of a guest_memfd, and of others who have the memory.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;

use gmem::ChangeError;
use gmem::Held;
use gmem::Inode;
use region::Region;
use seccompiler::SeccompAction;
use seccompiler::SeccompCmpArgLen;
use seccompiler::SeccompCmpOp;
use seccompiler::SeccompCondition;
use seccompiler::SeccompFilter;
use seccompiler::SeccompRule;

use crate::rig::Guest;
use crate::rig::MEMORY_BYTES;
use crate::rig::PAGE;
use crate::rig::SHAPES;
use crate::rig::builder;
use crate::rig::guest_memfd;
use crate::rig::inode;
use crate::rig::is_present;
use crate::rig::present_bytes;
use crate::rig::progress;
use crate::rig::region;
use crate::rig::soon;
use crate::waits::Waiting;
use crate::waits::finish;

/// Set for the other side of a test: this program, started anew for the one test.
const OTHER_SIDE: &str = "TIDEOVER_FROZEN_OTHER_SIDE";

/// Runs a test's other side, with the memory as its standard input.
#[track_caller]
fn run_other_side(test: &str, memory: &Region) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(OTHER_SIDE, "1")
        .stdin(Stdio::from(memory.as_fd().try_clone_to_owned().unwrap()))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn is_other_side() -> bool {
    std::env::var_os(OTHER_SIDE).is_some()
}

fn passed_memory() -> Region {
    let fd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    Region::accept("frozen", fd, MEMORY_BYTES).unwrap()
}

/// From now on this process, as one without the right, is given no userfaultfd.
fn give_up_userfaultfd() {
    const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
    let is_new = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, USERFAULTFD_IOC_NEW);
    let rules = BTreeMap::from([
        (libc::SYS_userfaultfd, vec![]),
        (libc::SYS_ioctl, vec![SeccompRule::new(vec![is_new.unwrap()]).unwrap()]),
    ]);
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter =
        SeccompFilter::new(rules, SeccompAction::Allow, refuse, std::env::consts::ARCH.try_into().unwrap());
    let program: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    seccompiler::apply_filter_all_threads(&program).unwrap();
}

/// Freezes memory that a guest is filling, and asserts that it does not wait: there is no hole any more.
fn assert_filled_by_the_freeze(inode: &Arc<Inode>, guest: &mut Guest) {
    let begun = inode.mapping().touched_bytes().unwrap();
    guest.start();
    soon("the guest fills holes", || inode.mapping().touched_bytes().unwrap() > begun + 256 * PAGE);
    assert!(!inode.mapping().region().is_whole().unwrap());
    let freeze = inode.freeze().unwrap();
    assert_eq!(freeze.held(), Held::Prefaulted);
    assert!(inode.mapping().region().is_whole().unwrap());
    assert_eq!(freeze.wait_fault(crate::rig::SOON).unwrap(), None, "nobody can wait");
    let before = progress(inode).0;
    soon("the guest goes on while the freeze stands", || progress(inode).0 > before);
    assert!(matches!(inode.punch(0, MEMORY_BYTES), Err(ChangeError::Frozen { .. })));
    finish(inode, guest);
    drop(freeze);
}

/// R2.2, R2.3, P6.5.2.
#[test]
fn without_a_right_to_userfaultfd_no_vcpu_waits_and_no_hole_is_left() {
    harness::need!(kvm);
    if !is_other_side() {
        let test = "unheld::without_a_right_to_userfaultfd_no_vcpu_waits_and_no_hole_is_left";
        return run_other_side(test, &region(false));
    }
    let inode = inode(passed_memory());
    let mut guest = Guest::new(&inode, SHAPES[1]);
    give_up_userfaultfd();
    assert_filled_by_the_freeze(&inode, &mut guest);
    assert_eq!(present_bytes(inode.mapping().region()), MEMORY_BYTES);
}

/// R2.2, R2.3.
#[test]
fn of_a_guest_memfd_no_vcpu_waits_and_no_hole_is_left() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    let inode = guest_memfd(&builder);
    let mut guest = Guest::in_vm(builder, &inode, SHAPES[1]);
    assert_filled_by_the_freeze(&inode, &mut guest);
}

/// A page that the guest never touches.
const NOBODYS: u64 = 0x9_0000;
const WRITTEN: u64 = 0x5eed;

/// R2.4.
#[test]
fn another_process_that_has_the_memory_is_not_bound_and_what_it_adds_is_there() {
    harness::need!(kvm, userfaultfd);
    if is_other_side() {
        return passed_memory().map().unwrap().store(NOBODYS, WRITTEN).unwrap();
    }
    let waiting = Waiting::make(SHAPES[1]);
    assert!(!is_present(waiting.region(), NOBODYS));
    let test = "unheld::another_process_that_has_the_memory_is_not_bound_and_what_it_adds_is_there";
    run_other_side(test, waiting.region());
    assert!(is_present(waiting.region(), NOBODYS));
    assert_eq!(present_bytes(waiting.region()), waiting.present + PAGE);
    // Here it is a page like any other, for who takes the memory over as well; and the guest waits on.
    let word = waiting.inode.mapping().load(NOBODYS).unwrap();
    assert_eq!(word, WRITTEN);
    Waiting { present: waiting.present + PAGE, ..waiting }.assert_waits();
}
