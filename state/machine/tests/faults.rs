//! A process that runs out of descriptors, at each place where it needs one: nothing of what it tried stays behind.
//!
//! The limit is a process's, so each test runs in one of its own, which this program starts.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

#[expect(dead_code, reason = "there is more in it than is needed here")]
mod rig;

use std::fs;
use std::fs::File;
use std::process::Command;

use gmem::FreezeError;
use gmem::Held;
use gmem::Inode;
use region::Errno;
use rig::assert_filled;
use rig::inodes;
use rig::machine;
use rig::offered;
use rig::spec;
use rustix::process::Resource;
use rustix::process::Rlimit;
use rustix::process::getrlimit;
use rustix::process::setrlimit;
use tideover_machine::Incoming;
use tideover_machine::Machine;

/// Set in a process of a test's own.
const ALONE: &str = "TIDEOVER_MACHINE_ALONE";

/// Runs `body` in a process in which nothing else runs.
fn alone(test: &str, body: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some() {
        return body();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(ALONE, "1");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "it did not run");
}

fn allow(descriptors: u64) {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(descriptors), ..limit }).unwrap();
}

/// What `act` gives with `left` descriptors left.
fn with_descriptors<T>(left: u64, act: impl FnOnce() -> T) -> T {
    // No number is free below this one, and none can be had from there on.
    let mut fillers: Vec<File> = (0..64).map(|_| File::open("/dev/null").unwrap()).collect();
    let next = File::open("/dev/null").unwrap();
    let number = u64::try_from(std::os::fd::AsRawFd::as_raw_fd(&next)).unwrap();
    drop(next);
    allow(number + left);
    let result = act();
    allow(1024);
    fillers.clear();
    result
}

/// Descriptors and mappings of the process: how many there are, and which of them are of memory files.
fn held() -> (Vec<String>, Vec<String>) {
    let fds = fs::read_dir("/proc/self/fd").unwrap();
    let links = fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    let mut links: Vec<String> = links.map(|link| link.to_string_lossy().into_owned()).collect();
    links.sort_unstable();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let memory = maps.lines().filter_map(|line| line.split_once("/memfd:")).map(|(_, name)| name.to_owned());
    (links, memory.collect())
}

/// R0.2, R1.7.
#[test]
fn a_machine_that_cannot_be_made_for_want_of_a_descriptor_leaves_nothing() {
    alone("a_machine_that_cannot_be_made_for_want_of_a_descriptor_leaves_nothing", || {
        let spec = spec("none-left", &[4, 8], &["vcpu0"]);
        let before = held();
        let mut failed = 0;
        let machine = loop {
            match with_descriptors(failed, || Machine::create(&spec, &mut |_, _| {})) {
                Ok(machine) => break machine,
                Err(_) => failed += 1,
            }
            assert_eq!(held(), before, "with {failed} descriptors");
        };
        assert!(failed >= 4, "a descriptor for each region, and the lock's: {failed}");
        drop(machine);
        assert_eq!(held(), before);
    });
}

/// R1.12, O1.13.
#[test]
fn an_attach_that_fails_for_want_of_a_descriptor_leaves_the_machine_as_it_was() {
    alone("an_attach_that_fails_for_want_of_a_descriptor_leaves_the_machine_as_it_was", || {
        let machine = machine(&spec("attached", &[4, 8], &["vcpu0"]));
        let word = machine.ownership().unwrap();
        let generation = || kho::Tree::read(machine.arena()).unwrap().slot.generation();
        let (before, published) = (held(), generation());
        let mut failed = 0;
        loop {
            let regions = offered(&machine);
            match with_descriptors(failed, || Incoming::attach(regions, Vec::new())) {
                Ok(incoming) => {
                    assert_filled(incoming.memories());
                    break;
                }
                Err(_) => failed += 1,
            }
            assert_eq!(held(), before, "with {failed} descriptors");
            assert_eq!((machine.ownership().unwrap(), generation()), (word, published));
        }
        assert!(failed >= 1, "the lock's");
        assert_eq!(held(), before);
        assert_filled(&inodes(&machine));
    });
}

/// R1.7, R2.2.
#[test]
fn a_freeze_that_fails_for_want_of_a_descriptor_fills_no_hole_and_leaves_the_memory_free() {
    let test = "a_freeze_that_fails_for_want_of_a_descriptor_fills_no_hole_and_leaves_the_memory_free";
    harness::need!(userfaultfd);
    alone(test, || {
        let machine = Machine::create(&spec("not-frozen", &[4], &[]), &mut |_, _| {}).unwrap();
        let [inode] = inodes(&machine).try_into().unwrap();
        inode.mapping().store(0, 7).unwrap();
        let look =
            |inode: &Inode| (format!("{inode:?}"), inode.mapping().region().allocated_bytes().unwrap());
        let (before, state) = (held(), look(&inode));
        for left in 0.. {
            match with_descriptors(left, || inode.freeze()) {
                Ok(freeze) => {
                    assert_eq!(freeze.held(), Held::Userfaultfd);
                    assert!(left > 0, "it takes one at least");
                    break;
                }
                Err(error) => {
                    let for_faults =
                        matches!(error, FreezeError::Open { .. } | FreezeError::Userfaultfd { .. });
                    assert!(for_faults, "{error:?}");
                    assert_eq!(error.errno(), Errno::MFILE);
                }
            }
            assert_eq!((held(), look(&inode)), (before.clone(), state.clone()));
            inode.allocate(0, 4096).unwrap();
        }
        assert_eq!((held(), look(&inode)), (before, state));
    });
}
