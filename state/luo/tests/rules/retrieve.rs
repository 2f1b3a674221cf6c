//! Making received files again.

use std::sync::Arc;

use tideover_luo::Errno;
use tideover_luo::PreserveError;
use tideover_luo::RetrieveError;
use tideover_luo::Token;

use crate::recorder::Life;
use crate::recorder::Thing;
use crate::recorder::name;

/// A life that received session `a` with the things 1, 2 and 3.
fn received() -> Life {
    let mut life = Life::first();
    life.session("a", &[1, 2, 3]);
    life.publish();
    life.then()
}

/// O1.13, L2.5.18.
#[test]
fn an_error_is_sticky_and_the_handler_is_asked_once() {
    let mut life = received();
    life.script.refuse("retrieve", 1);
    for _ in 0..3 {
        let error = life.retrieve("a", 2).unwrap_err();
        assert!(matches!(error, RetrieveError::Handler { token: Token(2), .. }), "{error:?}");
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
    }
    assert_eq!(life.script.calls(), ["retrieve 2"]);
    life.retrieve("a", 1).unwrap();
    // A later life may try again.
    life.publish();
    assert_eq!(Thing::of(&life.then().retrieve("a", 2).unwrap()).number, 2);
}

/// O1.13, L2.5.18. The series has a handler say EAGAIN whose VM is not retrieved yet, and a kernel keeps that for ever.
#[test]
fn a_handler_that_says_try_again_is_asked_again() {
    let mut life = received();
    life.script.refuse_with(Errno::EAGAIN);
    (1..=2).for_each(|nth| life.script.refuse("retrieve", nth));
    for _ in 0..2 {
        assert_eq!(life.retrieve("a", 2).unwrap_err().errno(), Errno::EAGAIN);
    }
    assert_eq!(Thing::of(&life.retrieve("a", 2).unwrap()).number, 2);
    assert_eq!(life.script.calls(), ["retrieve 2"; 3]);
    life.script.refuse("retrieve", 1);
    life.retrieve("a", 3).unwrap_err();
    assert!(
        life.finish("a").unwrap().unclaimed.contains(&Token(3)),
        "who never asked again is finished all the same"
    );
}

/// L2.5.19.
#[test]
fn a_second_call_gives_the_same_file() {
    let mut life = received();
    let first = life.retrieve("a", 1).unwrap();
    let second = life.retrieve("a", 1).unwrap();
    assert!(Arc::ptr_eq(&first, &second));
    assert_eq!(life.script.calls(), ["retrieve 1"]);
}

/// L2.5.20, H3.9.3.
#[test]
fn files_are_retrieved_in_any_order() {
    for order in [[1, 2, 3], [3, 2, 1], [2, 3, 1]] {
        let mut life = received();
        for token in order {
            assert_eq!(Thing::of(&life.retrieve("a", token).unwrap()).number, token);
        }
        assert_eq!(life.script.calls(), order.map(|token| format!("retrieve {token}")));
    }
}

/// L2.5.5, L2.5.6, L2.5.17.
#[test]
fn an_unknown_session_or_token_is_named() {
    let mut life = received();
    let error = life.retrieve("b", 1).unwrap_err();
    assert!(matches!(error, RetrieveError::UnknownSession { session } if session == name("b")), "{error:?}");
    assert_eq!(error.errno(), Errno::ENOENT);
    let error = life.retrieve("a", 4).unwrap_err();
    assert!(matches!(error, RetrieveError::UnknownToken { token: Token(4), .. }), "{error:?}");
    assert_eq!(error.errno(), Errno::ENOENT);
    life.finish("a").unwrap();
    let error = life.retrieve("a", 1).unwrap_err();
    assert!(matches!(error, RetrieveError::UnknownSession { .. }), "finished: {error:?}");
    assert!(life.luo.tokens(name("b")).next().is_none());
}

/// L2.5.11, L2.7.7.
#[test]
fn a_retrieved_file_is_preserved_again_only_after_finish() {
    let mut life = received();
    let file = life.retrieve("a", 1).unwrap();
    life.create("next");
    let error = life.preserve("next", 9, &file).unwrap_err();
    let PreserveError::Held { session, token } = error else { panic!("{error:?}") };
    assert_eq!((session, token), (name("a"), Token(1)));
    assert_eq!(error.errno(), Errno::EBUSY);
    life.finish("a").unwrap();
    life.preserve("next", 9, &file).unwrap();
    life.publish();
    let mut life = life.then();
    assert_eq!(life.incoming(), [name("next")]);
    assert_eq!(Thing::of(&life.retrieve("next", 9).unwrap()).number, 1);
}
