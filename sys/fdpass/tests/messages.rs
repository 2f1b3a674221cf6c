//! What goes over a channel, and what is refused.

#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

mod waits;

use std::fs::File;
use std::io::{IoSlice, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::{Duration, Instant};

use fdpass::{AdoptError, Channel, Deadline, MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS, ReceiveError, SendError};
use rustix::cmsg_space;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_getfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use waits::{shortly, soon};

/// A file that can be told from all others by its name in `/proc/self/fd`, whatever else this
/// process opens meanwhile.
struct Probe {
    name: String,
    file: OwnedFd,
}

impl Probe {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), file: memfd_create(name, MemfdFlags::CLOEXEC).unwrap() }
    }

    /// How many descriptors this process has open on it. Those in messages that nobody has read do
    /// not count.
    fn open_fds(&self) -> usize {
        let name = format!("/memfd:{} (deleted)", self.name);
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .filter(|target| target.to_str() == Some(&name))
            .count()
    }
}

/// Sends without the checks of `Channel::send`, as a hostile peer would.
fn send_raw(channel: &Channel, bytes: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = sendmsg(channel, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    assert_eq!(sent, Ok(bytes.len()));
}

#[test]
fn messages_arrive_apart_and_in_order() {
    let (a, b) = Channel::pair().unwrap();
    a.send(b"one", &[], soon()).unwrap();
    a.send(b"three", &[], soon()).unwrap();
    assert_eq!(b.receive(64, 0, soon()).unwrap().bytes, b"one");
    let second = b.receive(64, 0, soon()).unwrap();
    assert_eq!(second.bytes, b"three");
    assert!(second.fds.is_empty());
}

#[test]
fn file_descriptors_arrive_in_order_and_close_on_exec() {
    let (a, b) = Channel::pair().unwrap();
    let mut files = Vec::new();
    for text in ["zero", "one"] {
        let mut file = File::from(memfd_create(text, MemfdFlags::empty()).unwrap());
        file.write_all(text.as_bytes()).unwrap();
        files.push(file);
    }
    a.send(b"x", &[files[0].as_fd(), files[1].as_fd()], soon()).unwrap();

    let message = b.receive(8, 2, soon()).unwrap();
    assert_eq!(message.fds.len(), 2);
    for (fd, want) in message.fds.into_iter().zip(["zero", "one"]) {
        assert_eq!(fcntl_getfd(&fd), Ok(FdFlags::CLOEXEC));
        let mut file = File::from(fd);
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, want);
    }
}

#[test]
fn the_longest_message_with_the_most_descriptors_arrives_whole() {
    let (a, b) = Channel::pair().unwrap();
    let probe = Probe::new("fdpass-longest");
    let bytes: Vec<u8> = (0..MAX_MESSAGE_BYTES).map(|at| u8::try_from(at % 251).unwrap()).collect();
    let fds = vec![probe.file.as_fd(); MAX_MESSAGE_FDS];
    a.send(&bytes, &fds, soon()).unwrap();
    let message = b.receive(MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS, soon()).unwrap();
    assert!(message.bytes == bytes);
    assert_eq!(message.fds.len(), MAX_MESSAGE_FDS);
    assert_eq!(probe.open_fds(), MAX_MESSAGE_FDS + 1);
    drop(message);
    assert_eq!(probe.open_fds(), 1);
}

#[test]
fn what_is_over_the_limits_is_not_sent() {
    let (a, b) = Channel::pair().unwrap();
    let probe = Probe::new("fdpass-over");
    assert_eq!(a.send(&[], &[], soon()), Err(SendError::Empty));
    assert_eq!(
        a.send(&vec![0; MAX_MESSAGE_BYTES + 1], &[], soon()),
        Err(SendError::TooLong { len: MAX_MESSAGE_BYTES + 1 })
    );
    assert_eq!(
        a.send(b"x", &vec![probe.file.as_fd(); MAX_MESSAGE_FDS + 1], soon()),
        Err(SendError::TooManyFds { count: MAX_MESSAGE_FDS + 1 })
    );
    assert_eq!(b.receive(8, 0, shortly()).unwrap_err(), ReceiveError::TimedOut);
}

#[test]
fn a_receiver_cannot_ask_for_more_than_the_limits() {
    let (_a, b) = Channel::pair().unwrap();
    for (max_bytes, max_fds) in [(MAX_MESSAGE_BYTES + 1, 0), (1, MAX_MESSAGE_FDS + 1)] {
        assert_eq!(
            b.receive(max_bytes, max_fds, soon()).unwrap_err(),
            ReceiveError::Limits { max_bytes, max_fds }
        );
    }
}

#[test]
fn a_message_that_is_too_long_is_refused_and_its_descriptors_closed() {
    let (a, b) = Channel::pair().unwrap();
    let probe = Probe::new("fdpass-too-long");
    send_raw(&a, &[7; 100], &[probe.file.as_fd(), probe.file.as_fd()]);
    assert_eq!(b.receive(99, 2, soon()).unwrap_err(), ReceiveError::TooLong { len: 100, max_bytes: 99 });
    assert_eq!(probe.open_fds(), 1);
    send_raw(&a, &[7; 1], &[]);
    assert_eq!(b.receive(0, 0, soon()).unwrap_err(), ReceiveError::TooLong { len: 1, max_bytes: 0 });
    a.send(b"next", &[], soon()).unwrap();
    assert_eq!(b.receive(99, 2, soon()).unwrap().bytes, b"next");
}

#[test]
fn a_message_with_too_many_descriptors_is_refused_and_all_are_closed() {
    let (a, b) = Channel::pair().unwrap();
    let probe = Probe::new("fdpass-too-many");
    // One more than wanted can still fit into the padding of the kernel's buffer; 253 never do.
    for max_fds in [0, 1, 2, 3, MAX_MESSAGE_FDS] {
        for sent in [max_fds + 1, max_fds + 2, max_fds + 5, 253] {
            send_raw(&a, b"x", &vec![probe.file.as_fd(); sent]);
            match b.receive(8, max_fds, soon()).unwrap_err() {
                ReceiveError::TooManyFds { count, max_fds: wanted } => {
                    assert!(count > max_fds && count <= sent, "{count} of {sent}");
                    assert_eq!(wanted, max_fds);
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(probe.open_fds(), 1, "{sent} sent, {max_fds} wanted");
        }
    }
}

#[test]
fn a_closed_peer_is_told_after_all_it_sent_was_read() {
    let (a, b) = Channel::pair().unwrap();
    a.send(b"last", &[], soon()).unwrap();
    drop(a);
    assert_eq!(b.receive(8, 0, soon()).unwrap().bytes, b"last");
    assert_eq!(b.receive(8, 0, soon()).unwrap_err(), ReceiveError::Closed);
    assert_eq!(b.receive(0, 0, soon()).unwrap_err(), ReceiveError::Closed);
    assert_eq!(b.send(b"x", &[], soon()), Err(SendError::Closed));
}

#[test]
fn a_peer_that_closed_without_reading_does_not_take_its_own_last_message_with_it() {
    let (a, b) = Channel::pair().unwrap();
    b.send(b"never read", &[], soon()).unwrap();
    a.send(b"last", &[], soon()).unwrap();
    drop(a);
    assert_eq!(b.receive(8, 0, soon()).unwrap().bytes, b"last");
    assert_eq!(b.receive(8, 0, soon()).unwrap_err(), ReceiveError::Closed);
}

#[test]
fn a_peer_that_closes_ends_a_wait() {
    let (a, b) = Channel::pair().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| b.receive(8, 0, soon()).unwrap_err());
        std::thread::sleep(Duration::from_millis(20));
        drop(a);
        assert_eq!(waiting.join().unwrap(), ReceiveError::Closed);
    });
}

#[test]
fn an_empty_message_counts_as_the_end_and_its_descriptors_are_closed() {
    let (a, b) = Channel::pair().unwrap();
    let probe = Probe::new("fdpass-empty");
    send_raw(&a, b"", &[probe.file.as_fd()]);
    assert_eq!(b.receive(8, 1, soon()).unwrap_err(), ReceiveError::Closed);
    assert_eq!(probe.open_fds(), 1);
}

#[test]
fn a_receiver_waits_as_long_as_it_was_told() {
    let (_a, b) = Channel::pair().unwrap();
    let span = Duration::from_millis(80);
    let start = Instant::now();
    assert_eq!(b.receive(8, 0, Deadline::after(span)).unwrap_err(), ReceiveError::TimedOut);
    assert!(start.elapsed() >= span);
}

#[test]
fn a_deadline_in_the_past_still_takes_what_is_there() {
    let (a, b) = Channel::pair().unwrap();
    let past = Deadline::at(Instant::now());
    a.send(b"x", &[], past).unwrap();
    assert_eq!(b.receive(8, 0, past).unwrap().bytes, b"x");
    assert_eq!(b.receive(8, 0, past).unwrap_err(), ReceiveError::TimedOut);
}

#[test]
fn a_sender_whose_peer_does_not_read_times_out_and_goes_on_when_it_does() {
    let (a, b) = Channel::pair().unwrap();
    let message = vec![1; MAX_MESSAGE_BYTES];
    let mut sent = 0;
    let refused = loop {
        match a.send(&message, &[], shortly()) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 10_000, "the socket takes everything");
    };
    assert_eq!(refused, SendError::TimedOut);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| a.send(b"end", &[], soon()));
        for _ in 0..sent {
            let got = b.receive(MAX_MESSAGE_BYTES, 0, soon()).unwrap();
            assert_eq!(got.bytes.len(), MAX_MESSAGE_BYTES);
        }
        assert_eq!(b.receive(8, 0, soon()).unwrap().bytes, b"end");
        sending.join().unwrap().unwrap();
    });
}

#[test]
fn only_a_connected_seqpacket_unix_socket_is_a_channel() {
    let adopt = |fd: OwnedFd| Channel::from_fd(fd).unwrap_err();
    assert_eq!(adopt(File::open("/dev/null").unwrap().into()), AdoptError::NotASocket);
    let (stream, _peer) = UnixStream::pair().unwrap();
    assert_eq!(adopt(stream.into()), AdoptError::NotSeqpacket { kind: 1 });
    let (datagram, _peer) = UnixDatagram::pair().unwrap();
    assert_eq!(adopt(datagram.into()), AdoptError::NotSeqpacket { kind: 2 });
    assert_eq!(adopt(TcpListener::bind("127.0.0.1:0").unwrap().into()), AdoptError::NotUnix { family: 2 });
    assert_eq!(adopt(UdpSocket::bind("127.0.0.1:0").unwrap().into()), AdoptError::NotUnix { family: 2 });
    let alone = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    assert_eq!(adopt(alone), AdoptError::NotConnected);
}

#[test]
fn a_channel_sent_over_a_channel_is_adopted() {
    let (a, b) = Channel::pair().unwrap();
    let (inner, other) = Channel::pair().unwrap();
    a.send(b"take it", &[inner.as_fd()], soon()).unwrap();
    drop(inner);
    let fd = b.receive(16, 1, soon()).unwrap().fds.pop().unwrap();
    let inner = Channel::from_fd(fd).unwrap();
    inner.send(b"hello", &[], soon()).unwrap();
    assert_eq!(other.receive(16, 0, soon()).unwrap().bytes, b"hello");
}

#[test]
fn a_message_that_waits_can_be_told_from_none_and_from_the_end() {
    let (one, other) = Channel::pair().unwrap();
    assert!(!other.has_message());
    one.send(b"x", &[], soon()).unwrap();
    assert!(other.has_message() && other.has_message());
    assert_eq!(other.receive(8, 0, soon()).unwrap().bytes, b"x");
    drop(one);
    assert!(!other.has_message());
}
