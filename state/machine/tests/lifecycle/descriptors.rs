//! Descriptors that go with a machine.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use tideover_machine::AttachError;
use tideover_machine::FdError;
use tideover_machine::FdName;
use tideover_machine::Incoming;
use tideover_machine::KeepError;
use tideover_machine::Machine;
use tideover_machine::update::Capabilities;

use crate::rig::freeze;
use crate::rig::inodes;
use crate::rig::machine;
use crate::rig::offered;
use crate::rig::spec;
use crate::rig::states;
use crate::used_bytes;

const CARRIES: Capabilities =
    Capabilities { other_descriptors: true, overlap: true, survives_crash: false, survives_kexec: false };

const CONTROL: FdName = FdName::literal("control");
const DISK: FdName = FdName::literal("disk0");

fn small() -> Machine {
    machine(&spec("fds", &[4], &["vcpu0"]))
}

fn disk() -> File {
    File::open("/proc/self/exe").unwrap()
}

fn keep(machine: &mut Machine, fds: &[(FdName, BorrowedFd<'_>)]) {
    machine.keep_fds(fds, &CARRIES).unwrap();
}

/// What a carrier brings: the regions, and the rest.
fn brought(machine: &Machine) -> Vec<OwnedFd> {
    let all = machine.descriptors().unwrap();
    all.into_iter().skip(machine.regions().count()).collect()
}

fn refused(machine: &Machine, fds: Vec<OwnedFd>) -> FdError {
    match Incoming::attach(offered(machine), fds) {
        Err(AttachError::Fds(error)) => error,
        other => panic!("{other:?}"),
    }
}

fn number(fd: impl AsFd) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_ino
}

#[test]
fn descriptors_cross_by_name_and_not_into_the_next_update() {
    let mut predecessor = small();
    let (socket, _peer) = UnixStream::pair().unwrap();
    keep(&mut predecessor, &[(CONTROL, socket.as_fd()), (DISK, disk().as_fd())]);
    let mut incoming = Incoming::attach(offered(&predecessor), brought(&predecessor)).unwrap();
    assert_eq!(incoming.fds().names().collect::<Vec<_>>(), [CONTROL, DISK]);
    let taken = incoming.fds().take(CONTROL).unwrap();
    assert_eq!(number(&taken), number(&socket));
    assert!(incoming.fds().take(CONTROL).is_none());

    let _frozen = freeze(&inodes(&predecessor));
    let states = states(predecessor.state_names(), 100, 1);
    let epoch = predecessor.seal(states).unwrap();
    let mut successor = incoming.claim(epoch).unwrap().run().unwrap();
    assert_eq!(successor.settle().unwrap().unclaimed, []);
    assert_eq!(successor.fd_count(), 0);
    let next = Incoming::attach(offered(&successor), Vec::new()).unwrap();
    drop(next);
}

#[test]
fn what_an_update_kept_is_released_without_a_trace() {
    let mut machine = small();
    let before = used_bytes(&machine);
    let socket = UnixStream::pair().unwrap();
    for _ in 0..3 {
        keep(&mut machine, &[(CONTROL, socket.0.as_fd()), (DISK, disk().as_fd())]);
        assert!(used_bytes(&machine) > before);
        keep(&mut machine, &[(DISK, disk().as_fd())]);
        assert_eq!(machine.descriptors().unwrap().len(), 3);
        machine.release_fds().unwrap();
        assert_eq!(used_bytes(&machine), before);
        assert_eq!(machine.descriptors().unwrap().len(), 2);
    }
}

/// O1.12.
#[test]
fn a_way_that_cannot_carry_descriptors_is_refused_while_the_guest_runs() {
    let mut machine = small();
    let cannot = Capabilities { other_descriptors: false, ..CARRIES };
    let error = machine.keep_fds(&[(DISK, disk().as_fd()), (CONTROL, disk().as_fd())], &cannot).unwrap_err();
    assert!(matches!(&error, KeepError::Carrier { names } if *names == [DISK, CONTROL]), "{error}");
    machine.keep_fds(&[], &cannot).unwrap();
    assert_eq!(machine.fd_count(), 0);
}

#[test]
fn descriptors_that_cannot_be_kept_are_refused_by_name() {
    let mut machine = small();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let error = machine.keep_fds(&[(DISK, epoll.as_fd())], &CARRIES).unwrap_err();
    assert!(matches!(&error, KeepError::Kind { name: DISK, what } if what.contains("eventpoll")), "{error}");
    let error = machine.keep_fds(&[(DISK, disk().as_fd()), (DISK, disk().as_fd())], &CARRIES).unwrap_err();
    assert!(matches!(error, KeepError::Repeated { name: DISK }), "{error}");
    assert!(brought(&machine).is_empty());
}

#[test]
fn what_comes_has_to_be_what_the_session_names() {
    let mut machine = small();
    let (socket, _peer) = UnixStream::pair().unwrap();
    keep(&mut machine, &[(CONTROL, socket.as_fd()), (DISK, disk().as_fd())]);
    assert!(matches!(refused(&machine, Vec::new()), FdError::Count { told: 2, came: 0 }));
    let mut swapped = brought(&machine);
    swapped.reverse();
    assert!(matches!(refused(&machine, swapped), FdError::Kind { name: CONTROL, .. }));
    let mut more = brought(&machine);
    more.push(disk().into());
    assert!(matches!(refused(&machine, more), FdError::Count { told: 2, came: 3 }));
}
