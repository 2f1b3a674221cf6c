//! Listeners, the directory they are in, and who is at the other end.

#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

mod waits;

use std::fs::{DirBuilder, Permissions, remove_dir_all, set_permissions, write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;

use fdpass::{
    AcceptError, AdoptListenerError, BindError, Channel, ConnectError, Listener, ReceiveError, connect,
};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use rustix::process::{getegid, geteuid};

use waits::{shortly, soon};

/// A private directory that goes when dropped.
struct Private(PathBuf);

impl Private {
    fn new(test: &str) -> Self {
        let name = format!("tideover-fdpass-{}-{test}", std::process::id());
        let path = std::env::temp_dir().join(name);
        DirBuilder::new().mode(0o700).create(&path).unwrap();
        Self(path)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let _ = remove_dir_all(&self.0);
    }
}

fn mode_of(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
}

/// A socket's file as a process leaves it that dies.
fn leave_stale(path: &Path) {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
}

#[test]
fn a_peer_that_connects_is_accepted_and_known() {
    let directory = Private::new("accepted");
    let path = directory.path().join("socket");
    let listener = Listener::bind(&path).unwrap();
    let near = connect(&path, soon()).unwrap();
    let far = listener.accept(soon()).unwrap();
    near.send(b"hello", &[], soon()).unwrap();
    assert_eq!(far.receive(8, 0, soon()).unwrap().bytes, b"hello");

    for channel in [&near, &far] {
        let peer = channel.require_same_user().unwrap();
        assert_eq!(peer.pid, std::process::id());
        assert_eq!(peer.uid, geteuid().as_raw());
        assert_eq!(peer.gid, getegid().as_raw());
    }
}

#[test]
fn the_socket_is_closed_to_others_and_goes_with_its_listener() {
    let directory = Private::new("mode");
    let path = directory.path().join("socket");
    let listener = Listener::bind(&path).unwrap();
    assert_eq!(mode_of(&path), 0o600);
    drop(listener);
    assert!(!path.exists());
    assert!(matches!(connect(&path, soon()).unwrap_err(), ConnectError::Absent { .. }));
}

#[test]
fn nobody_to_accept_is_a_time_out() {
    let directory = Private::new("nobody");
    let listener = Listener::bind(&directory.path().join("socket")).unwrap();
    assert_eq!(listener.accept(shortly()).unwrap_err(), AcceptError::TimedOut);
}

#[test]
fn a_listener_that_accepts_nobody_makes_connecting_time_out() {
    let directory = Private::new("full");
    let path = directory.path().join("socket");
    let _listener = Listener::bind(&path).unwrap();
    let mut waiting = Vec::new();
    let refused = loop {
        match connect(&path, shortly()) {
            Ok(channel) => waiting.push(channel),
            Err(error) => break error,
        }
        assert!(waiting.len() < 10_000, "the listener takes everybody");
    };
    assert!(matches!(refused, ConnectError::TimedOut { .. }), "{refused:?}");
}

#[test]
fn a_directory_that_others_may_enter_is_refused() {
    let directory = Private::new("open");
    let path = directory.path().join("socket");
    for mode in [0o755, 0o750, 0o701, 0o1777] {
        set_permissions(directory.path(), Permissions::from_mode(mode)).unwrap();
        match Listener::bind(&path).unwrap_err() {
            BindError::NotPrivate { directory: named, mode: seen, owner, user } => {
                assert_eq!(named, directory.path());
                assert_eq!(seen & 0o7777, mode);
                assert_eq!(owner, user);
            }
            other => panic!("{other:?}"),
        }
        assert!(!path.exists());
    }
}

#[test]
fn a_path_without_a_name_or_a_directory_is_refused() {
    let directory = Private::new("names");
    for nameless in [directory.path().join(".."), "/".into(), "".into()] {
        assert!(matches!(Listener::bind(&nameless).unwrap_err(), BindError::NoName { .. }));
        assert!(matches!(connect(&nameless, soon()).unwrap_err(), ConnectError::NoName { .. }));
    }
    let missing = directory.path().join("missing/socket");
    assert!(matches!(Listener::bind(&missing).unwrap_err(), BindError::Directory { .. }));
    let long = directory.path().join("n".repeat(108));
    assert!(matches!(Listener::bind(&long).unwrap_err(), BindError::NameTooLong { .. }));
    assert!(matches!(connect(&long, soon()).unwrap_err(), ConnectError::NameTooLong { .. }));
}

#[test]
fn a_directory_path_longer_than_a_socket_address_works() {
    let directory = Private::new("deep");
    let mut deep = directory.path().to_owned();
    for _ in 0..4 {
        deep.push("d".repeat(60));
    }
    std::fs::create_dir_all(&deep).unwrap();
    set_permissions(&deep, Permissions::from_mode(0o700)).unwrap();
    let path = deep.join("socket");
    let listener = Listener::bind(&path).unwrap();
    let _near = connect(&path, soon()).unwrap();
    listener.accept(soon()).unwrap();
}

#[test]
fn a_stale_socket_is_replaced() {
    let directory = Private::new("stale");
    let path = directory.path().join("socket");
    leave_stale(&path);
    assert!(matches!(connect(&path, soon()).unwrap_err(), ConnectError::Refused { .. }));
    let listener = Listener::bind(&path).unwrap();
    assert_eq!(mode_of(&path), 0o600);
    let _near = connect(&path, soon()).unwrap();
    listener.accept(soon()).unwrap();
}

#[test]
fn a_socket_that_is_listened_on_is_left_alone() {
    let directory = Private::new("live");
    let path = directory.path().join("socket");
    let first = Listener::bind(&path).unwrap();
    assert!(matches!(Listener::bind(&path).unwrap_err(), BindError::InUse { .. }));
    // The look whether it is stale leaves a channel that is closed, as documented.
    let probe = first.accept(soon()).unwrap();
    assert_eq!(probe.receive(1, 0, soon()).unwrap_err(), ReceiveError::Closed);
    let _near = connect(&path, soon()).unwrap();
    first.accept(soon()).unwrap();

    let other_type = directory.path().join("stream");
    let _stream = UnixListener::bind(&other_type).unwrap();
    assert!(matches!(Listener::bind(&other_type).unwrap_err(), BindError::InUse { .. }));
    assert!(other_type.exists());
}

#[test]
fn what_is_not_a_socket_is_never_removed() {
    let directory = Private::new("file");
    let path = directory.path().join("socket");
    write(&path, "dear").unwrap();
    assert!(matches!(Listener::bind(&path).unwrap_err(), BindError::NotASocket { .. }));
    assert_eq!(std::fs::read(&path).unwrap(), b"dear");

    // Nor what a symbolic link leads to, stale or not.
    let link = directory.path().join("link");
    let target = directory.path().join("target");
    leave_stale(&target);
    symlink(&target, &link).unwrap();
    assert!(matches!(Listener::bind(&link).unwrap_err(), BindError::NotASocket { .. }));
    assert!(target.exists());
}

#[test]
fn a_listener_removes_no_socket_but_its_own() {
    let directory = Private::new("own");
    let path = directory.path().join("socket");
    let first = Listener::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let second = Listener::bind(&path).unwrap();
    drop(first);
    let _near = connect(&path, soon()).unwrap();
    second.accept(soon()).unwrap();
}

#[test]
fn of_many_that_bind_at_once_over_a_stale_socket_one_wins() {
    let directory = Private::new("contended");
    let path = directory.path().join("socket");
    // Without the lock this many rounds have always shown two winners.
    for _ in 0..300 {
        let start = Barrier::new(4);
        leave_stale(&path);
        let winners: Vec<Listener> = thread::scope(|scope| {
            let tries: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        Listener::bind(&path)
                    })
                })
                .collect();
            tries
                .into_iter()
                .filter_map(|tried| match tried.join().unwrap() {
                    Ok(listener) => Some(listener),
                    Err(BindError::InUse { .. }) => None,
                    Err(other) => panic!("{other:?}"),
                })
                .collect()
        });
        assert_eq!(winners.len(), 1);
        let _near = connect(&path, soon()).unwrap();
        winners[0].accept(soon()).unwrap();
    }
}

#[test]
fn an_accepted_socket_passes_for_a_channel() {
    let directory = Private::new("adopted");
    let path = directory.path().join("socket");
    let listener = Listener::bind(&path).unwrap();
    let _near = connect(&path, soon()).unwrap();
    let accepted = listener.accept(soon()).unwrap();
    Channel::from_fd(accepted.into_stdio()).unwrap();
}

#[test]
fn a_listener_goes_to_another_owner_without_a_moment_in_which_nobody_listens() {
    let directory = Private::new("adopted");
    let path = directory.path().join("socket");
    let first = Listener::bind(&path).unwrap();
    let waiting = connect(&path, soon()).unwrap();
    let copy = first.as_fd().try_clone_to_owned().unwrap();
    drop(Listener::adopt(first.as_fd().try_clone_to_owned().unwrap(), &path).unwrap());
    let mut second = Listener::adopt(copy, &path).unwrap();
    second.own();
    first.leave();
    assert!(path.exists());
    let came = second.accept(soon()).unwrap();
    waiting.send(b"x", &[], soon()).unwrap();
    assert_eq!(came.receive(8, 0, soon()).unwrap().bytes, b"x");
    drop(connect(&path, soon()).unwrap());
    drop(second);
    assert!(!path.exists());
}

#[test]
fn only_a_listener_at_its_path_is_adopted() {
    let directory = Private::new("not-adopted");
    let (path, other) = (directory.path().join("one"), directory.path().join("other"));
    let (listener, _other) = (Listener::bind(&path).unwrap(), Listener::bind(&other).unwrap());
    let copy = || listener.as_fd().try_clone_to_owned().unwrap();
    assert!(matches!(Listener::adopt(copy(), &other), Err(AdoptListenerError::Other { .. })));
    let (channel, _end) = Channel::pair().unwrap();
    assert!(matches!(Listener::adopt(channel.into_stdio(), &path), Err(AdoptListenerError::Other { .. })));
    assert!(Listener::adopt(copy(), Path::new("/nowhere/one")).is_err());
    assert!(path.exists());
}
