//! What the service manager is told, keeps, and passes.

#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

mod waits;

use std::fs::File;
use std::io::Read as _;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::Stdio;

use fdpass::systemd::{Manager, ManagerError, PassedError, PushError, StoreName, Tell, take_passed};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_getfd};

use waits::{shortly, soon};

/// Set for the service's side of a test: this program, started anew for the one test.
const SERVICE: &str = "TIDEOVER_FDPASS_SERVICE";

fn file(text: &str) -> OwnedFd {
    let fd = memfd_create("t", MemfdFlags::CLOEXEC).unwrap();
    File::from(fd.try_clone().unwrap()).write_all(text.as_bytes()).unwrap();
    fd
}

fn name(text: &str) -> StoreName {
    StoreName::new(text).unwrap()
}

fn at(played: &manager::Manager) -> Manager {
    Manager::at(played.address().as_os_str()).unwrap()
}

#[test]
fn what_was_pushed_is_kept_and_the_probe_is_not() {
    let played = manager::Manager::start(3);
    let manager = at(&played);
    let fds = [file("one"), file("two")];
    let named: Vec<_> = fds.iter().zip(["a", "b"]).map(|(fd, text)| (name(text), fd.as_fd())).collect();
    manager.push(&named, 0, soon()).unwrap();
    manager.await_done(soon()).unwrap();
    assert_eq!(played.stored(), ["a", "b"]);
    manager.remove(&name("a"), soon()).unwrap();
    manager.await_done(soon()).unwrap();
    assert_eq!(played.stored(), ["b"]);
}

#[test]
fn a_push_that_does_not_fit_is_found_out() {
    for room in 0..3 {
        let played = manager::Manager::start(room);
        let fds = [file("one"), file("two")];
        let named: Vec<_> = fds.iter().zip(["a", "b"]).map(|(fd, text)| (name(text), fd.as_fd())).collect();
        assert_eq!(at(&played).push(&named, 0, soon()), Err(PushError::Refused { count: 2 }), "{room}");
    }
    // What is to fit besides counts, too, and stays free.
    let played = manager::Manager::start(3);
    let fd = file("one");
    assert_eq!(at(&played).push(&[(name("a"), fd.as_fd())], 3, soon()), Err(PushError::Refused { count: 4 }));
    assert_eq!(at(&played).push(&[(name("b"), fd.as_fd())], 1, soon()), Ok(()));
}

#[test]
fn a_manager_that_takes_its_time_is_waited_for_and_one_that_hangs_is_not() {
    let folder = manager::Manager::start(0);
    let path = folder.folder().join("silent");
    let silent = UnixDatagram::bind(&path).unwrap();
    let manager = Manager::at(path.as_os_str()).unwrap();
    assert_eq!(manager.await_done(shortly()), Err(ManagerError::TimedOut));
    drop(silent);
    assert!(matches!(manager.tell(&[Tell::Ready], soon()), Err(ManagerError::Send { .. })));
}

#[test]
fn a_service_is_given_what_it_pushed_and_takes_it_once() {
    if std::env::var_os(SERVICE).is_some() {
        let passed = take_passed().unwrap();
        assert_eq!(take_passed().unwrap_err(), PassedError::Taken);
        let mut said = String::new();
        for (name, fd) in passed {
            assert_eq!(fcntl_getfd(&fd), Ok(FdFlags::CLOEXEC));
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text).unwrap();
            said += &format!("{name}: {text}. ");
        }
        let manager = Manager::from_environment().unwrap().unwrap();
        manager.tell(&[Tell::Status(&said), Tell::MainPid(7), Tell::Ready], soon()).unwrap();
        manager.await_done(soon()).unwrap();
        return;
    }
    let played = manager::Manager::start(9);
    let fds = [file("one"), file("two")];
    let named: Vec<_> = fds.iter().zip(["a/b", "c"]).map(|(fd, text)| (name(text), fd.as_fd())).collect();
    let manager = at(&played);
    manager.push(&named, 0, soon()).unwrap();
    // The probe is taken away behind what was pushed.
    manager.await_done(soon()).unwrap();
    let mut service = played.command(&std::env::current_exe().unwrap());
    service.args(["a_service_is_given_what_it_pushed_and_takes_it_once", "--exact", "--nocapture"]);
    // What it says of itself is not this program's to say.
    assert!(service.env(SERVICE, "1").stdout(Stdio::null()).status().unwrap().success());
    assert_eq!(played.told(), ["STATUS=a/b: one. c: two. ", "MAINPID=7", "READY=1"]);
}

#[test]
fn a_process_that_nothing_was_passed_to_takes_nothing() {
    assert!(take_passed().unwrap().is_empty());
}
