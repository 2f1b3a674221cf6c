//! Outgoing sessions: names, tokens, and what a refusal leaves.

use std::error::Error;
use std::sync::Arc;

use tideover_luo::Errno;
use tideover_luo::PreserveError;
use tideover_luo::PublishError;
use tideover_luo::RegisterError;
use tideover_luo::SessionError;
use tideover_luo::Token;

use crate::recorder::BARE;
use crate::recorder::Life;
use crate::recorder::Script;
use crate::recorder::THING;
use crate::recorder::bare;
use crate::recorder::handlers;
use crate::recorder::name;
use crate::recorder::published;
use crate::recorder::recorder;
use crate::recorder::stranger;
use crate::recorder::thing;

/// L2.5.7, L2.5.10, L2.5.11, L2.5.13, H3.2.1.
#[test]
fn a_taken_token_comes_before_no_handler_before_a_held_file_before_the_handlers_refusal() {
    let mut life = Life::first();
    life.create("a");
    let held = thing(1);
    life.preserve("a", 1, &held).unwrap();
    life.script.calls();

    for file in [stranger(), Arc::clone(&held)] {
        let error = life.preserve("a", 1, &file).unwrap_err();
        assert!(matches!(error, PreserveError::TokenTaken { token: Token(1), .. }), "{error:?}");
        assert_eq!(error.errno(), Errno::EEXIST);
    }

    let error = life.preserve("a", 2, &stranger()).unwrap_err();
    assert!(matches!(error, PreserveError::NoHandler { token: Token(2), .. }), "{error:?}");
    assert_eq!(error.errno(), Errno::ENOENT);
    life.script.refuse("can_preserve", 1);
    let error = life.preserve("a", 2, &held).unwrap_err();
    assert!(matches!(error, PreserveError::NoHandler { .. }), "held, and its handler says no: {error:?}");

    life.script.refuse("preserve", 1);
    let error = life.preserve("a", 2, &held).unwrap_err();
    assert!(matches!(error, PreserveError::Held { token: Token(1), .. }), "{error:?}");
    assert_eq!(error.errno(), Errno::EBUSY);
    assert!(life.script.calls().is_empty(), "no handler was asked to preserve");

    let error = life.preserve("a", 2, &thing(2)).unwrap_err();
    assert!(matches!(error, PreserveError::Handler { compatible: THING, .. }), "{error:?}");
    assert_eq!(error.errno(), Errno::EOPNOTSUPP);
    assert_eq!(error.source().unwrap().source().unwrap().to_string(), "told to refuse");
}

#[test]
fn an_unknown_session_takes_no_file_and_is_not_dropped() {
    let mut life = Life::first();
    let error = life.preserve("a", 1, &thing(1)).unwrap_err();
    assert!(matches!(error, PreserveError::Session(SessionError::Unknown { .. })), "{error:?}");
    assert_eq!(error.errno(), Errno::ENOENT);
    assert_eq!(
        life.luo.drop_session(&mut life.kho, name("a")),
        Err(SessionError::Unknown { session: name("a") })
    );
}

/// L2.5.3, L2.5.25.
#[test]
fn an_outgoing_name_is_taken_once() {
    let mut life = Life::first();
    life.create("a");
    let exists = SessionError::Exists { session: name("a") };
    assert_eq!(life.luo.create_session(name("a")), Err(exists));
    assert_eq!(PreserveError::Session(exists).errno(), Errno::EEXIST);
    life.create("b");
    assert_eq!(life.luo.outgoing_sessions().collect::<Vec<_>>(), [name("a"), name("b")]);
}

/// L2.5.3.
#[test]
fn a_received_name_can_be_outgoing_but_is_published_only_after_finish() {
    let mut life = Life::first();
    life.session("a", &[1]);
    life.publish();
    let mut life = life.then();
    life.session("b", &[]);
    life.session("a", &[2]);
    let before = published(&life.arena.attach());
    let error = life.luo.publish(&mut life.kho).unwrap_err();
    assert!(matches!(error, PublishError::Unfinished { session } if session == name("a")), "{error:?}");
    assert_eq!(published(&life.arena.attach()), before);

    life.finish("a").unwrap();
    life.publish();
    assert_eq!(life.script.calls(), ["preserve 2", "can_finish 0", "destroy 1"]);
    let life = life.then();
    assert_eq!(life.incoming(), [name("b"), name("a")]);
    assert_eq!(life.tokens("a"), [2]);
}

/// L2.5.7, L2.5.11, H3.1.3.
#[test]
fn sessions_share_tokens_but_not_files() {
    let mut life = Life::first();
    life.session("a", &[1]);
    life.create("b");
    let file = thing(2);
    life.preserve("b", 1, &file).unwrap();
    let error = life.preserve("a", 2, &file).unwrap_err();
    let PreserveError::Held { session, token } = error else { panic!("{error:?}") };
    assert_eq!((session, token), (name("b"), Token(1)));
}

/// L2.5.15.
#[test]
fn any_number_is_a_token() {
    let mut life = Life::first();
    life.session("a", &[u64::MAX, 0, 1]);
    life.publish();
    assert_eq!(life.then().tokens("a"), [u64::MAX, 0, 1]);
}

/// H3.1.4, H3.1.6.
#[test]
fn the_first_handler_that_says_yes_gets_the_file_and_a_kind_has_one_handler() {
    let mut life = Life::first();
    life.create("a");
    life.preserve("a", 1, &bare(1)).unwrap();
    life.preserve("a", 2, &thing(2)).unwrap();
    life.publish();
    let files = published(&life.kho).sessions.remove(0).files;
    assert_eq!(files.iter().map(|file| file.compatible).collect::<Vec<_>>(), [BARE, THING]);
    assert_eq!(life.luo.compatibles(), [BARE, THING]);

    let script = Script::default();
    let handlers = handlers(&script);
    assert_eq!(handlers.compatibles(), [THING, BARE]);
    let mut again = handlers.clone();
    let refused = again.register(recorder(BARE, &script));
    assert_eq!(refused, Err(RegisterError { compatible: BARE }));
    assert_eq!(again.compatibles(), handlers.compatibles());
}

/// H3.2.2.
#[test]
fn a_refused_preserve_leaves_nothing_behind() {
    let mut life = Life::first();
    life.session("a", &[1]);
    life.publish();
    let (before, used) = (published(&life.kho), life.kho.used_bytes());
    let file = thing(2);
    life.script.refuse("preserve", 1);
    life.preserve("a", 2, &file).unwrap_err();
    life.publish();
    assert_eq!(published(&life.kho).sessions, before.sessions);
    assert_eq!(life.kho.used_bytes(), used);

    life.preserve("a", 2, &file).unwrap();
    life.publish();
    assert_eq!(life.then().tokens("a"), [1, 2]);
}

/// L2.7.1, H3.3.1.
#[test]
fn a_dropped_session_is_unpreserved_last_file_first() {
    let mut life = Life::first();
    life.session("a", &[3, 1, 2]);
    life.session("b", &[4]);
    life.script.calls();
    life.drop_session("a");
    assert_eq!(life.script.calls(), ["unpreserve 2", "unpreserve 1", "unpreserve 3"]);
    assert_eq!(life.luo.outgoing_sessions().collect::<Vec<_>>(), [name("b")]);
}

/// L2.7.1, H3.3.1, H3.3.2.
#[test]
fn a_dropped_session_frees_its_name_its_tokens_and_its_files() {
    let mut life = Life::first();
    life.publish();
    let used = life.kho.used_bytes();
    let file = thing(1);
    life.session("b", &[]);
    life.create("a");
    life.preserve("a", 1, &file).unwrap();
    life.publish();
    life.drop_session("a");
    life.create("a");
    life.preserve("a", 1, &file).unwrap();
    life.publish();
    // Made anew, it is the youngest.
    assert_eq!(life.arena.next_life().incoming(), [name("b"), name("a")]);
    life.drop_session("a");
    life.drop_session("b");
    life.publish();
    assert_eq!(life.kho.used_bytes(), used);
    assert!(life.then().incoming().is_empty());
}

/// L2.5.1, L2.5.17, H3.4.3.
#[test]
fn a_session_without_files_is_handed_over_and_finished() {
    let mut life = Life::first();
    life.create("empty");
    life.freeze().unwrap();
    life.publish();
    let mut life = life.then();
    assert_eq!(life.incoming(), [name("empty")]);
    assert!(life.tokens("empty").is_empty());
    assert_eq!(life.retrieve("empty", 0).unwrap_err().errno(), Errno::ENOENT);
    assert!(life.finish("empty").unwrap().unclaimed.is_empty());
    assert!(life.incoming().is_empty());
    assert!(life.script.calls().is_empty());
}

/// L2.5.8, H3.2.1.
#[test]
fn a_session_lists_630000_files_and_no_more() {
    let mut life = Life::first();
    life.create("a");
    let file = |number| life.luo.preserve(&mut life.kho, name("a"), Token(number), bare(number));
    assert!((0..630_000).map(file).all(|result| result.is_ok()));
    let error = life.preserve("a", 630_000, &bare(0)).unwrap_err();
    assert!(matches!(error, PreserveError::TooMany { .. }), "{error:?}");
    assert_eq!(error.errno(), Errno::ENOSPC);
    let error = life.preserve("a", 7, &bare(0)).unwrap_err();
    assert!(matches!(error, PreserveError::TokenTaken { .. }), "{error:?}");
}

/// L2.5.4.
#[test]
fn the_format_lists_510000_sessions_received_ones_included() {
    let session = |number: u64| name(&number.to_string());
    let mut life = Life::with_frames(21_000);
    for number in 0..509_999 {
        life.luo.create_session(session(number)).unwrap();
    }
    life.publish();
    let mut life = life.then();
    life.create("last");
    assert_eq!(life.luo.create_session(name("one more")), Err(SessionError::TooMany));
    assert_eq!(PreserveError::Session(SessionError::TooMany).errno(), Errno::ENOSPC);
    life.publish();
    let mut life = life.then();
    assert_eq!(life.luo.incoming_sessions().count(), 510_000);
    life.finish("7").unwrap();
    life.create("one more");
}
