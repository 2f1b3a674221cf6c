//! `liveupdate`: what can be seen without an update.

use std::fs::File as OsFile;
use std::sync::Arc;

use tideover_luo::Errno;
use tideover_luo::File;
use tideover_luo::SessionError;
use tideover_luo::SessionName;

use crate::lives::Life;
use crate::lives::empty_bytes;
use crate::lives::lives;
use crate::lives::name;
use crate::memfd::Memfd;

/// `basic_open_close`.
#[test]
fn an_arena_is_opened_and_closed_any_number_of_times() {
    let memory = lives("", &[|_| ()]);
    let used: Vec<u64> = (0..3).map(|_| memory.attach().used_bytes()).collect();
    assert_eq!(used, [empty_bytes(); 3]);
}

/// `create_duplicate_session`. L2.5.3.
#[test]
fn a_session_of_a_name_that_is_taken_is_refused() {
    let mut life = Life::first();
    life.create("session");
    let refused = life.luo.create_session(name("session")).unwrap_err();
    assert_eq!(
        (refused, refused.errno()),
        (SessionError::Exists { session: name("session") }, Errno::EEXIST)
    );
}

/// `create_distinct_sessions`.
#[test]
fn sessions_of_two_names_are_made_and_closed() {
    let mut life = Life::first();
    life.create("session 1");
    life.create("session 2");
    life.close("session 1");
    life.close("session 2");
    assert_eq!(life.luo.outgoing_sessions().count(), 0);
}

/// `preserve_memfd`. L2.7.1.
#[test]
fn a_memfd_is_as_it_was_when_its_session_is_closed() {
    let mut life = Life::first();
    life.create("session");
    let file = Memfd::with("hello liveupdate");
    life.try_preserve("session", 0x1234, &file).unwrap();
    life.close("session");
    assert_eq!(Memfd::of(&file).read(16), b"hello liveupdate");
}

/// `preserve_multiple_memfds`.
#[test]
fn two_memfds_of_a_session_can_be_read_meanwhile_and_keep_their_texts() {
    let mut life = Life::first();
    life.create("session");
    let files =
        [(0xAAAA, "text a"), (0xBBBB, "text b")].map(|(token, text)| (token, text, Memfd::with(text)));
    for (token, _, file) in &files {
        life.try_preserve("session", *token, file).unwrap();
    }
    for (_, text, file) in &files {
        assert_eq!(Memfd::of(file).read(6), text.as_bytes());
    }
}

/// `preserve_complex_scenario`.
#[test]
fn two_sessions_have_a_memfd_with_bytes_and_an_empty_one_each() {
    let mut life = Life::first();
    for session in ["one", "other"] {
        life.create(session);
        let (file, empty) = (Memfd::with(session), Memfd::empty());
        life.try_preserve(session, 1, &file).unwrap();
        life.try_preserve(session, 2, &empty).unwrap();
        assert_eq!(Memfd::of(&file).read(session.len()), session.as_bytes());
        assert_eq!(Memfd::of(&empty).read(16), b"");
    }
}

/// `preserve_unsupported_fd`. L2.5.10.
#[test]
fn dev_null_has_no_handler() {
    let mut life = Life::first();
    life.create("session");
    let null: File = Arc::new(OsFile::open("/dev/null").unwrap());
    assert_eq!(life.try_preserve("session", 1, &null), Err(Errno::ENOENT));
}

/// `prevent_double_preservation`. L2.5.11.
#[test]
fn a_memfd_is_not_preserved_twice_neither_there_nor_elsewhere() {
    let mut life = Life::first();
    life.create("one");
    life.create("other");
    let file = Memfd::with("text");
    life.try_preserve("one", 1, &file).unwrap();
    assert_eq!(life.try_preserve("other", 1, &file), Err(Errno::EBUSY));
    assert_eq!(life.try_preserve("one", 2, &file), Err(Errno::EBUSY));
}

/// `create_session_no_null_termination` and `create_session_empty_name`. L2.5.2.
#[test]
fn no_session_has_a_name_of_64_bytes_or_of_none() {
    for text in [&[b'X'; 64][..], b""] {
        let refused = SessionName::new(text).unwrap_err();
        assert_eq!(refused.len, text.len(), "EINVAL in a kernel; here there is no such name");
    }
    assert_eq!(SessionName::read(&[b'X'; 64]), None, "nor is one read");
    assert_eq!(SessionName::read(&[0; 64]), None);
}

/// `get_session_name` and `get_session_name_max_length`. L2.5.2, L2.5.25.
#[test]
fn a_session_says_its_whole_name_be_it_as_long_as_can_be() {
    let mut life = Life::first();
    let names = ["session".to_owned(), "A".repeat(63)];
    names.iter().for_each(|name| life.create(name));
    let told: Vec<String> = life.luo.outgoing_sessions().map(|name| name.to_string()).collect();
    assert_eq!(told, names);
}

/// `preserve_many_sessions`.
#[test]
fn two_thousand_sessions_are_made_and_closed_in_the_order_of_their_making() {
    let mut life = Life::first();
    let names: Vec<String> = (0..2000).map(|number| format!("session {number}")).collect();
    names.iter().for_each(|name| life.create(name));
    life.publish();
    // 40 blocks of 51.
    assert_eq!(life.kho.used_bytes(), empty_bytes() + 40 * 4096);
    names.iter().for_each(|name| life.close(name));
    life.publish();
    assert_eq!(life.kho.used_bytes(), empty_bytes());
}

/// `preserve_many_files`. L2.5.14, L2.5.15.
#[test]
fn five_hundred_memfds_are_preserved_and_let_go_before_their_session() {
    let mut life = Life::first();
    life.create("session");
    let files: Vec<File> = (0..500).map(|token| Memfd::with(&format!("memfd {token}"))).collect();
    for (token, file) in (0..).zip(&files) {
        life.try_preserve("session", token, file).unwrap();
    }
    let weak: Vec<_> = files.iter().map(Arc::downgrade).collect();
    drop(files);
    assert!(weak.iter().all(|file| file.strong_count() == 1), "the session has them");
    life.publish();
    // A block of sessions and 8 of files; a page, a record, a list and its chunk for each.
    assert_eq!(life.kho.used_bytes(), empty_bytes() + (1 + 8 + 500 * 4) * 4096);
    life.close("session");
    assert!(weak.iter().all(|file| file.strong_count() == 0));
    life.publish();
    assert_eq!(life.kho.used_bytes(), empty_bytes());
}
