//! The tests of two boots. A session beside the others holds the text `2`: that is how theirs know that they have booted
//! twice.

use tideover_luo::Errno;

use crate::lives::Life;
use crate::lives::empty_bytes;
use crate::lives::lives;

fn begin(life: &mut Life) {
    assert_eq!(life.retrieve("state", 0).unwrap_err().errno(), Errno::ENOENT, "the first boot");
    life.create("state");
    life.preserve("state", 0, "2");
}

fn check(life: &mut Life) {
    assert_eq!(life.text("state", 0), "2");
}

/// `luo_kexec_simple`. L2.7.8, L2.5.20.
#[test]
fn a_memfd_arrives_with_its_text() {
    let first: fn(&mut Life) = |life| {
        begin(life);
        life.create("test-session");
        life.preserve("test-session", 0x1A, "hello kexec");
    };
    let second: fn(&mut Life) = |life| {
        check(life);
        assert_eq!(life.text("test-session", 0x1A), "hello kexec");
        life.finish("test-session");
        life.finish("state");
    };
    let memory = lives("two_lives::a_memfd_arrives_with_its_text", &[first, second]);
    assert_eq!(memory.attach().used_bytes(), empty_bytes(), "nothing is left");
}

/// `luo_multi_session`. H3.4.3.
#[test]
fn sessions_with_no_memfd_one_and_two_arrive() {
    const TEXTS: [(&str, u64, &str); 3] =
        [("one", 0x1001, "in one"), ("two", 0x2002, "in two"), ("two", 0x3003, "in two, too")];
    const NAMES: [&str; 4] = ["empty", "one", "empty, too", "two"];
    let first: fn(&mut Life) = |life| {
        begin(life);
        NAMES.into_iter().for_each(|name| life.create(name));
        TEXTS.into_iter().for_each(|(session, token, text)| life.preserve(session, token, text));
    };
    let second: fn(&mut Life) = |life| {
        check(life);
        let names: Vec<String> = life.luo.incoming_sessions().map(|name| name.to_string()).collect();
        assert_eq!(names[1..], NAMES);
        for (session, token, text) in TEXTS {
            assert_eq!(life.text(session, token), text);
        }
        NAMES.into_iter().chain(["state"]).for_each(|name| life.finish(name));
    };
    let memory = lives("two_lives::sessions_with_no_memfd_one_and_two_arrive", &[first, second]);
    assert_eq!(memory.attach().used_bytes(), empty_bytes(), "nothing is left");
}

/// `luo_stress_files`.
#[test]
fn five_hundred_memfds_arrive_with_their_texts() {
    let first: fn(&mut Life) = |life| {
        begin(life);
        life.create("files");
        (0..500).for_each(|token| life.preserve("files", token, &format!("memfd {token}")));
    };
    let second: fn(&mut Life) = |life| {
        check(life);
        for token in 0..500 {
            assert_eq!(life.text("files", token), format!("memfd {token}"));
        }
        life.finish("files");
        life.finish("state");
    };
    let memory = lives("two_lives::five_hundred_memfds_arrive_with_their_texts", &[first, second]);
    assert_eq!(memory.attach().used_bytes(), empty_bytes(), "nothing is left");
}

/// `luo_stress_sessions`.
#[test]
fn two_thousand_sessions_arrive_and_are_finished() {
    let first: fn(&mut Life) = |life| {
        begin(life);
        (0..2000).for_each(|number| life.create(&format!("session {number}")));
    };
    let second: fn(&mut Life) = |life| {
        check(life);
        assert_eq!(life.luo.incoming_sessions().count(), 2001);
        (0..2000).for_each(|number| life.finish(&format!("session {number}")));
        life.finish("state");
    };
    let memory = lives("two_lives::two_thousand_sessions_arrive_and_are_finished", &[first, second]);
    assert_eq!(memory.attach().used_bytes(), empty_bytes(), "nothing is left");
}
