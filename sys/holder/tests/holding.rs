//! A process that executes another program, and what is left of the one before.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::fs::File;
use std::io::Read as _;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

/// Says to this program that it is to hold something and execute `cat`.
const ROLE: &str = "TIDEOVER_HOLDER_TEST";

/// Not a test of its own: what the tests start. It maps memory, holds it, and executes `cat`.
#[test]
fn executes_cat_if_it_is_told_to() {
    let Ok(keep) = std::env::var(ROLE) else { return };
    let memory = File::options().read(true).write(true).create_new(true).open(&keep).unwrap();
    memory.set_len(4096).unwrap();
    std::fs::remove_file(&keep).unwrap();
    let lease = tideover_holder::start(|link| link.starts_with(&keep)).unwrap();
    tideover_holder::inherit(&lease, true).unwrap();
    // What was not kept, and the lease's own copy, are closed in the holder: the pipe ends with cat.
    let error = Command::new("/bin/cat").exec();
    panic!("{error}");
}

fn start(name: &str) -> (Child, String) {
    let keep = std::env::temp_dir().join(format!("tideover-holder-{}-{name}", std::process::id()));
    let keep = keep.to_str().unwrap().to_owned();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "executes_cat_if_it_is_told_to", "--nocapture"])
        .env(ROLE, &keep)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    (child, keep)
}

/// Processes that have a descriptor of this file, which has no name any more.
fn holders(keep: &str) -> Vec<u32> {
    let processes =
        std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let has = |pid: &u32| {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd"));
        fds.is_ok_and(|mut fds| {
            fds.any(|fd| {
                let link = fd.and_then(|fd| std::fs::read_link(fd.path()));
                link.is_ok_and(|link| link.to_string_lossy().starts_with(keep))
            })
        })
    };
    processes.filter_map(|name| name.parse().ok()).filter(has).collect()
}

fn await_that(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_holder_keeps_what_it_is_told_until_the_next_program_lets_go() {
    let (mut child, keep) = start("keeps");
    let comm = format!("/proc/{}/comm", child.id());
    await_that("cat does not come", || std::fs::read_to_string(&comm).is_ok_and(|name| name.trim() == "cat"));
    let holder = match holders(&keep)[..] {
        [holder] => holder,
        ref other => panic!("{other:?}"),
    };
    assert_ne!(holder, child.id());
    // It has the old program's memory, and nothing of its input and output.
    let maps = std::fs::read_to_string(format!("/proc/{holder}/maps")).unwrap();
    assert!(maps.contains(std::env::current_exe().unwrap().to_str().unwrap()));
    child.stdin.take().unwrap().write_all(b"still here").unwrap();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.ends_with("still here"), "{said}");
    assert!(child.wait().unwrap().success());
    await_that("the holder does not end", || holders(&keep).is_empty());
}

#[test]
fn a_holder_ends_when_the_next_program_is_killed() {
    let (mut child, keep) = start("killed");
    await_that("the holder does not come", || matches!(holders(&keep)[..], [holder] if holder != child.id()));
    child.kill().unwrap();
    child.wait().unwrap();
    await_that("the holder does not end", || holders(&keep).is_empty());
}

#[test]
fn a_lease_that_is_dropped_ends_its_holder() {
    let keep = std::env::temp_dir().join(format!("tideover-holder-{}-dropped", std::process::id()));
    let file = File::create_new(&keep).unwrap();
    std::fs::remove_file(&keep).unwrap();
    let keep = keep.to_str().unwrap();
    let lease = tideover_holder::start(|link| link.starts_with(keep)).unwrap();
    drop(file);
    assert_eq!(holders(keep).len(), 1);
    drop(lease);
    await_that("the holder does not end", || holders(keep).is_empty());
}

#[test]
fn a_descriptor_is_taken_over_once_and_only_if_it_was_inherited() {
    use std::os::fd::AsRawFd as _;
    use std::os::fd::IntoRawFd as _;
    let errno = |number| tideover_holder::inherited(number).unwrap_err().raw_os_error();
    let file = File::open("/proc/self/exe").unwrap();
    assert_eq!(errno(file.as_raw_fd()), Some(1));
    tideover_holder::inherit(&file, true).unwrap();
    // As if another program had opened it: nobody here owns it any more.
    let number = file.into_raw_fd();
    let taken = tideover_holder::inherited(number).unwrap();
    assert_eq!(errno(taken.as_raw_fd()), Some(1));
    assert_eq!([errno(0), errno(1 << 20)], [Some(1), Some(9)]);
}
