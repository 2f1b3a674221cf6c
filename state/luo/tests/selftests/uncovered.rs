//! What the kernel's tests do not cover.

use std::sync::Arc;

use kho::Kho;
use tideover_luo::Errno;

use crate::lives::Life;
use crate::lives::empty_bytes;
use crate::lives::lives;
use crate::memfd::Memfd;

/// Takes all frames; gives them back when asked.
fn starve(kho: &mut Kho) -> Vec<pages::PageRange> {
    std::iter::from_fn(|| kho.allocate(1).ok()).collect()
}

/// A failure in freeze. H3.4.5.
#[test]
fn an_update_that_failed_in_freeze_succeeds_at_the_second_try() {
    let first: fn(&mut Life) = |life| {
        life.create("session");
        (0..3).for_each(|token| life.preserve("session", token, "text"));
        let taken = starve(&mut life.kho);
        let error = life.luo.freeze(&mut life.kho).unwrap_err();
        assert_eq!(error.errno(), Errno::ENOMEM);
        taken.into_iter().for_each(|frame| life.kho.free(frame));
    };
    let second: fn(&mut Life) = |life| {
        (0..3).for_each(|token| assert_eq!(life.text("session", token), "text"));
        life.finish("session");
    };
    let test = "uncovered::an_update_that_failed_in_freeze_succeeds_at_the_second_try";
    assert_eq!(lives(test, &[first, second]).attach().used_bytes(), empty_bytes());
}

/// Unpreserve, then use; double preserve. L2.7.1.
#[test]
fn a_memfd_that_was_unpreserved_is_used_and_preserved_again() {
    let first: fn(&mut Life) = |life| {
        life.create("session");
        let file = Memfd::with("hello liveupdate");
        life.try_preserve("session", 1, &file).unwrap();
        assert_eq!(life.try_preserve("session", 2, &file), Err(Errno::EBUSY));
        life.close("session");
        assert_eq!(Memfd::of(&file).read(6), b"hello ");
        life.create("session");
        life.try_preserve("session", 2, &file).unwrap();
        // The position at the update counts, not that at preserve.
        assert_eq!(Memfd::of(&file).read(4), b"live");
    };
    let second: fn(&mut Life) = |life| {
        assert_eq!(life.retrieve("session", 1).unwrap_err().errno(), Errno::ENOENT);
        assert_eq!(Memfd::of(&life.retrieve("session", 2).unwrap()).read(6), b"update");
        life.finish("session");
    };
    let test = "uncovered::a_memfd_that_was_unpreserved_is_used_and_preserved_again";
    assert_eq!(lives(test, &[first, second]).attach().used_bytes(), empty_bytes());
}

/// Retrieve of one file only; finish without retrieve. L2.5.22, H3.6.2.
#[test]
fn what_nobody_retrieved_is_freed_by_the_finish_and_the_rest_lives_on() {
    let first: fn(&mut Life) = |life| {
        for session in ["one of three", "none"] {
            life.create(session);
            (0..3).for_each(|token| life.preserve(session, token, "text"));
        }
    };
    let second: fn(&mut Life) = |life| {
        let file = life.retrieve("one of three", 1).unwrap();
        life.finish("one of three");
        life.finish("none");
        assert_eq!(Memfd::of(&file).text(), "text");
    };
    let test = "uncovered::what_nobody_retrieved_is_freed_by_the_finish_and_the_rest_lives_on";
    assert_eq!(lives(test, &[first, second]).attach().used_bytes(), empty_bytes());
}

/// A sparse file.
#[test]
fn holes_arrive_as_holes() {
    let first: fn(&mut Life) = |life| {
        life.create("session");
        let file = Memfd::sparse(1000 * 4096 + 5, &[(0, "first"), (7, "gap"), (1000, "last")]);
        life.try_preserve("session", 1, &file).unwrap();
        life.try_preserve("session", 2, &Memfd::sparse(1 << 20, &[])).unwrap();
    };
    let second: fn(&mut Life) = |life| {
        let file = life.retrieve("session", 1).unwrap();
        assert_eq!(Memfd::of(&file).present(), [0, 7, 1000]);
        let bytes = Memfd::of(&file).read(usize::MAX / 2);
        assert_eq!(bytes.len(), 1000 * 4096 + 5);
        assert_eq!((&bytes[7 * 4096..7 * 4096 + 3], &bytes[1000 * 4096..]), (&b"gap"[..], &b"last\0"[..]));
        assert!(bytes[8 * 4096..1000 * 4096].iter().all(|byte| *byte == 0));
        let hole = life.retrieve("session", 2).unwrap();
        assert!(Memfd::of(&hole).present().is_empty());
        assert_eq!(Memfd::of(&hole).read(usize::MAX / 2), vec![0; 1 << 20]);
        life.finish("session");
    };
    let memory = lives("uncovered::holes_arrive_as_holes", &[first, second]);
    assert_eq!(memory.attach().used_bytes(), empty_bytes());
}

/// A second and a third update. L2.7.4, L2.7.7.
#[test]
fn a_memfd_goes_through_three_updates_one_of_them_without_being_retrieved() {
    let first: fn(&mut Life) = |life| {
        life.create("session");
        life.preserve("session", 1, "text");
    };
    // Nobody looks at it; a kernel would not hand it over again.
    let second: fn(&mut Life) = |_| ();
    let third: fn(&mut Life) = |life| {
        let file = life.retrieve("session", 1).unwrap();
        life.create("next");
        assert_eq!(life.try_preserve("next", 9, &file), Err(Errno::EBUSY), "not finished");
        life.finish("session");
        life.try_preserve("next", 9, &file).unwrap();
    };
    let fourth: fn(&mut Life) = |life| {
        assert_eq!(life.retrieve("session", 1).unwrap_err().errno(), Errno::ENOENT);
        assert_eq!(life.text("next", 9), "text");
        life.finish("next");
    };
    let test = "uncovered::a_memfd_goes_through_three_updates_one_of_them_without_being_retrieved";
    assert_eq!(lives(test, &[first, second, third, fourth]).attach().used_bytes(), empty_bytes());
}

/// The wrong session; the same token in two. L2.5.7, L2.5.17.
#[test]
fn a_token_names_a_file_of_its_own_session_only() {
    let first: fn(&mut Life) = |life| {
        life.create("one");
        life.create("other");
        life.preserve("one", 1, "in one");
        life.preserve("other", 1, "in the other");
        life.preserve("other", 2, "in the other, too");
    };
    let second: fn(&mut Life) = |life| {
        assert_eq!(life.retrieve("one", 2).unwrap_err().errno(), Errno::ENOENT);
        assert_eq!(life.retrieve("none", 1).unwrap_err().errno(), Errno::ENOENT);
        assert_eq!((life.text("one", 1), life.text("other", 1)), ("in one".into(), "in the other".into()));
        life.finish("one");
        assert_eq!(life.retrieve("one", 1).unwrap_err().errno(), Errno::ENOENT, "finished");
        assert_eq!(life.text("other", 2), "in the other, too");
        life.finish("other");
    };
    let test = "uncovered::a_token_names_a_file_of_its_own_session_only";
    assert_eq!(lives(test, &[first, second]).attach().used_bytes(), empty_bytes());
}

/// The file is closed early. L2.5.9, L2.5.14.
#[test]
fn a_memfd_that_its_maker_let_go_is_open_until_its_session_is_closed() {
    let mut life = Life::first();
    life.create("session");
    let file = Memfd::with("text");
    let weak = Arc::downgrade(&file);
    life.try_preserve("session", 1, &file).unwrap();
    drop(file);
    assert!(weak.upgrade().is_some(), "a file that is preserved cannot be one that is closed");
    life.close("session");
    assert!(weak.upgrade().is_none());
}
