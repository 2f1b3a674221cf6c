//! VMs and VMMs that end while a vCPU waits at a hole.

use std::fs::File;
use std::io::BufRead as _;
use std::io::BufReader;
use std::os::fd::AsFd;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use region::Region;

use crate::rig::MEMORY_BYTES;
use crate::rig::PAGE;
use crate::rig::SHAPES;
use crate::rig::SHORTLY;
use crate::rig::again;
use crate::rig::ends;
use crate::rig::inode;
use crate::rig::is_present;
use crate::rig::present_bytes;
use crate::rig::region;
use crate::rig::soon;
use crate::waits::Waiting;

/// P6.5.2.
#[test]
fn a_vm_that_ends_with_a_fault_parked_ends_and_adds_nothing() {
    harness::need!(kvm, userfaultfd);
    for shape in SHAPES {
        let mut waiting = Waiting::make(shape);
        let owner = waiting.inode.own().unwrap();
        let left = again(waiting.inode.mapping());
        waiting.guest.stop();
        let Waiting { inode, guest, freeze, hole, present } = waiting;
        ends("the VM ends", move || drop((owner, guest, freeze, inode)));
        thread::sleep(SHORTLY);
        assert_eq!((present_bytes(&left), is_present(&left, hole)), (present, false), "{shape:?}");
    }
}

/// Set for the other side of a test: this program, started anew for the one test, with the guest's memory as its standard
/// input, to be the VMM that is killed. Its value is the shape of the VM.
const VICTIM: &str = "TIDEOVER_FROZEN_VICTIM";

/// Runs this test's other side, and waits until its guest waits at a hole. Gives that, and how much of the memory is there.
fn victim(test: &str, shape: usize, memory: &Region) -> (Child, u64, u64) {
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(VICTIM, shape.to_string())
        .stdin(Stdio::from(memory.as_fd().try_clone_to_owned().unwrap()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(victim.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut said = lines.filter_map(|line| line.strip_prefix(PARKED).map(str::to_owned));
    let said = said.next().expect("the guest waits");
    let (hole, present) = said.split_once(' ').unwrap();
    (victim, hole.parse().unwrap(), present.parse().unwrap())
}

const PARKED: &str = "parked at ";

/// The other side: has a guest wait at a hole, says so, and waits for its end.
fn be_victim(shape: &str) {
    let shape = SHAPES[shape.parse::<usize>().unwrap()];
    let fd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let memory = Region::accept("frozen", fd, MEMORY_BYTES).unwrap();
    // Numbers lower than those of the VM and its vCPU, one of which the userfaultfd would get.
    let low: Vec<_> = (0..8).map(|_| File::open("/dev/null").unwrap()).collect();
    let waiting = Waiting::with(inode(memory), shape, move || drop(low));
    println!("\n{PARKED}{} {}", waiting.hole, waiting.present);
    thread::sleep(Duration::from_secs(3600));
}

/// P6.5.2.
#[test]
fn a_vmm_that_is_killed_with_a_fault_parked_is_gone_and_adds_nothing_of_its_own() {
    harness::need!(kvm, userfaultfd);
    if let Ok(shape) = std::env::var(VICTIM) {
        return be_victim(&shape);
    }
    for (index, shape) in SHAPES.into_iter().enumerate() {
        let memory = region(shape.interrupts);
        let name = "ended::a_vmm_that_is_killed_with_a_fault_parked_is_gone_and_adds_nothing_of_its_own";
        let (mut victim, hole, present) = victim(name, index, &memory);
        assert_eq!((present_bytes(&memory), is_present(&memory, hole)), (present, false), "{shape:?}");
        victim.kill().unwrap();
        soon("its process ends", || victim.try_wait().unwrap().is_some());
        thread::sleep(SHORTLY);
        let added = present_bytes(&memory) - present;
        if shape.interrupts {
            // KVM's worker is let go when its VMM is dead, and gets the page that it was at. That is one of zeros, as the
            // hole was, and the only one.
            assert!(added <= PAGE && is_present(&memory, hole) == (added == PAGE), "{shape:?}: {added}");
            let mut page = [1; 4096];
            memory.map().unwrap().read(hole, &mut page).unwrap();
            assert_eq!(page, [0; 4096], "{shape:?}");
        } else {
            assert_eq!((added, is_present(&memory, hole)), (0, false), "{shape:?}");
        }
    }
}
