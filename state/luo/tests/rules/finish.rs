//! Ending a received session.

use tideover_luo::FinishError;
use tideover_luo::Finished;
use tideover_luo::Token;

use crate::recorder::Life;
use crate::recorder::THING;
use crate::recorder::Thing;
use crate::recorder::name;
use crate::recorder::published;

/// A life that received session `a` with the things 1 to 4, and an arena's bytes in use without it.
fn received() -> (Life, u64) {
    let mut life = Life::first();
    life.publish();
    let used = life.kho.used_bytes();
    life.session("a", &[1, 2, 3, 4]);
    life.publish();
    (life.then(), used)
}

/// L2.5.20, L2.5.21, L2.7.6, H3.6.1.
#[test]
fn one_file_that_is_not_ready_changes_nothing() {
    for nth in 1..=4u64 {
        let (mut life, _) = received();
        (1..=4).for_each(|token| drop(life.retrieve("a", token).unwrap()));
        life.script.calls();
        life.script.refuse("can_finish", usize::try_from(nth).unwrap());
        let busy = FinishError::Busy { session: name("a"), token: Token(nth), compatible: THING };
        assert_eq!(life.finish("a"), Err(busy));
        let asked: Vec<String> = (1..=nth).map(|number| format!("can_finish {number}")).collect();
        assert_eq!(life.script.calls(), asked, "in order, up to the refusal, and nothing else");

        assert_eq!(life.incoming(), [name("a")]);
        assert_eq!(Thing::of(&life.retrieve("a", 1).unwrap()).number, 1);
        life.publish();
        assert_eq!(life.arena.copy().next_life().tokens("a"), [1, 2, 3, 4]);
        life.script.calls();
        life.finish("a").unwrap();
        assert_eq!(life.script.calls().len(), 8, "a second try is legal");
    }
}

/// H3.6.2.
#[test]
fn files_are_finished_last_first() {
    let (mut life, used) = received();
    for token in [2, 4, 1, 3] {
        life.retrieve("a", token).unwrap();
    }
    life.script.calls();
    assert_eq!(life.finish("a").unwrap(), Finished { unclaimed: vec![] });
    assert_eq!(life.script.calls()[4..], ["finish 4", "finish 3", "finish 2", "finish 1"]);
    life.publish();
    assert_eq!(life.kho.used_bytes(), used);
}

/// R1.12, R3.9, L2.5.22, L2.5.23.
#[test]
fn what_nobody_retrieved_is_destroyed_and_named_in_the_order_of_preservation() {
    let (mut life, used) = received();
    life.retrieve("a", 3).unwrap();
    life.script.refuse("retrieve", 1);
    life.retrieve("a", 1).unwrap_err();
    life.script.calls();
    let finished = life.finish("a").unwrap();
    assert_eq!(finished.unclaimed, [1, 2, 4].map(Token), "a failed retrieve is none");
    assert_eq!(life.script.calls()[4..], ["destroy 4", "finish 3", "destroy 2", "destroy 1"]);
    life.publish();
    assert_eq!(life.kho.used_bytes(), used);
}

/// L2.5.24.
#[test]
fn a_second_finish_does_nothing() {
    let (mut life, _) = received();
    assert_eq!(life.finish("a").unwrap().unclaimed.len(), 4);
    life.script.calls();
    assert_eq!(life.finish("a").unwrap(), Finished::default());
    assert!(life.script.calls().is_empty());
    assert_eq!(life.finish("b"), Err(FinishError::UnknownSession { session: name("b") }));
}

/// L2.5.6.
#[test]
fn a_finished_session_is_gone_from_the_next_publish_on() {
    let (mut life, _) = received();
    life.finish("a").unwrap();
    assert!(life.incoming().is_empty() && life.tokens("a").is_empty());
    assert!(life.luo.compatibles().is_empty());
    assert_eq!(life.arena.copy().next_life().tokens("a"), [1, 2, 3, 4], "a crash before takes it back");
    life.publish();
    assert!(published(&life.kho).sessions.is_empty());
    let mut life = life.then();
    assert_eq!(life.finish("a"), Err(FinishError::UnknownSession { session: name("a") }));
}
