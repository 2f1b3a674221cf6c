//! A channel given to a child as its standard input, and the child's life as seen from outside.

#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

mod waits;

use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Command, Stdio};

use fdpass::{Channel, Pidfd, PidfdError, ReceiveError, StdinError, WaitExitError};
use rustix::io::{FdFlags, dup, fcntl_getfd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use waits::{shortly, soon};

/// Set for the child's side of a test: this program, started anew for the one test.
const CHILD: &str = "TIDEOVER_FDPASS_CHILD";

fn start(test: &str, stdin: Stdio) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(CHILD, "1")
        .stdin(stdin)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

#[test]
fn a_child_started_with_the_channel_as_its_standard_input_answers() {
    if is_child() {
        let channel = Channel::from_stdin().unwrap();
        assert!(channel.as_fd().as_raw_fd() >= 3);
        assert_eq!(fcntl_getfd(&channel), Ok(FdFlags::CLOEXEC));
        let peer = channel.require_same_user().unwrap();
        let asked = channel.receive(64, 1, soon()).unwrap();
        let stdin = std::fs::read_link("/proc/self/fd/0").unwrap();
        let answer = format!(
            "{} from {} with {}, stdin {}",
            String::from_utf8(asked.bytes).unwrap(),
            peer.pid,
            asked.fds.len(),
            stdin.display()
        );
        channel.send(answer.as_bytes(), &[], soon()).unwrap();
        return;
    }
    let (ours, theirs) = Channel::pair().unwrap();
    let mut child =
        start("a_child_started_with_the_channel_as_its_standard_input_answers", theirs.into_stdio().into());
    let file = std::fs::File::open("/dev/null").unwrap();
    ours.send(b"hello", &[file.as_fd()], soon()).unwrap();
    let answer = ours.receive(128, 0, soon()).unwrap().bytes;
    assert_eq!(
        String::from_utf8(answer).unwrap(),
        format!("hello from {} with 1, stdin /dev/null", std::process::id())
    );
    // The child's end was the last: nothing of it was left behind in this process.
    assert_eq!(ours.receive(1, 0, soon()).unwrap_err(), ReceiveError::Closed);
    assert!(child.wait().unwrap().success());
}

#[test]
fn standard_input_that_is_no_channel_is_refused_and_stays() {
    if is_child() {
        let before = std::fs::read_link("/proc/self/fd/0").unwrap();
        assert!(matches!(Channel::from_stdin().unwrap_err(), StdinError::NotAChannel { .. }));
        assert_eq!(std::fs::read_link("/proc/self/fd/0").unwrap(), before);
        return;
    }
    let mut child = start("standard_input_that_is_no_channel_is_refused_and_stays", Stdio::piped());
    assert!(child.wait().unwrap().success());
}

#[test]
fn descriptors_without_room_are_an_error_and_those_taken_are_closed() {
    if is_child() {
        let channel = Channel::from_stdin().unwrap();
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = open();
        let full = getrlimit(Resource::Nofile);
        let lowest_free = u64::try_from(dup(&channel).unwrap().as_raw_fd()).unwrap();
        setrlimit(Resource::Nofile, Rlimit { current: Some(lowest_free + 3), ..full }).unwrap();
        let error = channel.receive(8, 5, soon()).unwrap_err();
        setrlimit(Resource::Nofile, full).unwrap();
        assert_eq!(error, ReceiveError::FdsLost { count: 3 });
        assert_eq!(open(), before);
        return;
    }
    let (ours, theirs) = Channel::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    ours.send(b"x", &[file.as_fd(); 5], soon()).unwrap();
    let mut child =
        start("descriptors_without_room_are_an_error_and_those_taken_are_closed", theirs.into_stdio().into());
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_pidfd_tells_when_the_child_ends_and_not_before() {
    let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let pidfd = Pidfd::of_child(&child).unwrap();
    assert_eq!(fcntl_getfd(&pidfd), Ok(FdFlags::CLOEXEC));
    assert_eq!(pidfd.wait_exit(shortly()).unwrap_err(), WaitExitError::TimedOut);
    drop(child.stdin.take());
    pidfd.wait_exit(soon()).unwrap();
    // It is told as often as one asks, and also when the child has been waited for.
    assert!(child.wait().unwrap().success());
    pidfd.wait_exit(soon()).unwrap();
    assert_eq!(Pidfd::of_child(&child).unwrap_err(), PidfdError::Gone { pid: child.id() });
}

#[test]
fn the_pidfd_of_a_peer_is_that_of_the_maker_of_a_pair() {
    if is_child() {
        let channel = Channel::from_stdin().unwrap();
        // The parent is at the other end, and outlives this message.
        let parent = Pidfd::of_peer(&channel).unwrap();
        assert_eq!(parent.wait_exit(shortly()).unwrap_err(), WaitExitError::TimedOut);
        channel.send(b"seen", &[], soon()).unwrap();
        assert_eq!(channel.receive(1, 0, soon()).unwrap_err(), ReceiveError::Closed);
        // Its end is closed, and it lives all the same: the two are not one.
        match Pidfd::of_peer(&channel) {
            Ok(parent) => assert_eq!(parent.wait_exit(shortly()).unwrap_err(), WaitExitError::TimedOut),
            // A kernel before 6.5, which names a number alone.
            Err(error) => assert!(matches!(error, PidfdError::Gone { .. })),
        }
        return;
    }
    let (ours, theirs) = Channel::pair().unwrap();
    let mut child = start("the_pidfd_of_a_peer_is_that_of_the_maker_of_a_pair", theirs.into_stdio().into());
    assert_eq!(ours.receive(8, 0, soon()).unwrap().bytes, b"seen");
    drop(ours);
    assert!(child.wait().unwrap().success());
}
