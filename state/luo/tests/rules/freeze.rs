//! The last callback, and taking it back.

use tideover_luo::Errno;
use tideover_luo::PreserveError;
use tideover_luo::Token;

use crate::recorder::Life;
use crate::recorder::Record;
use crate::recorder::Thing;
use crate::recorder::name;
use crate::recorder::published;
use crate::recorder::thing;

fn calls(verb: &str, numbers: &[u64]) -> Vec<String> {
    numbers.iter().map(|number| format!("{verb} {number}")).collect()
}

/// Sessions `c` (1, 2, 3), `a` (4, 5) and `b` (6, 7): made in this order, filled in another.
fn three_sessions() -> Life {
    let mut life = Life::first();
    ["c", "a", "b"].into_iter().for_each(|session| life.create(session));
    for (session, number) in [("b", 6), ("c", 1), ("a", 4), ("c", 2), ("b", 7), ("a", 5), ("c", 3)] {
        // Tokens fall as numbers rise: they do not say the order.
        life.preserve(session, 100 - number, &thing(number)).unwrap();
    }
    life.script.calls();
    life
}

/// The version of each file, as published.
fn versions(life: &Life) -> Vec<u64> {
    let kho = life.arena.attach();
    let sessions = published(&kho).sessions;
    let files = sessions.iter().flat_map(|session| &session.files);
    files.map(|file| Record::read(&kho, file.data).version).collect()
}

/// L2.5.14, H3.4.1.
#[test]
fn freeze_goes_by_sessions_made_and_files_preserved() {
    let mut life = three_sessions();
    life.freeze().unwrap();
    assert_eq!(life.script.calls(), calls("freeze", &[1, 2, 3, 4, 5, 6, 7]));
    life.freeze().unwrap();
    assert!(life.script.calls().is_empty(), "all are frozen");
}

/// L2.8.1, H3.4.4, H3.4.5.
#[test]
fn a_refused_freeze_unfreezes_its_session_then_those_before_it_each_from_its_first_file() {
    let cases: [(usize, &str, &[u64], &[u64]); 7] = [
        (1, "c", &[1], &[]),
        (2, "c", &[1, 2], &[1]),
        (3, "c", &[1, 2, 3], &[1, 2]),
        (4, "a", &[1, 2, 3, 4], &[1, 2, 3]),
        (5, "a", &[1, 2, 3, 4, 5], &[4, 1, 2, 3]),
        (6, "b", &[1, 2, 3, 4, 5, 6], &[4, 5, 1, 2, 3]),
        (7, "b", &[1, 2, 3, 4, 5, 6, 7], &[6, 4, 5, 1, 2, 3]),
    ];
    for (nth, at, frozen, unfrozen) in cases {
        let mut life = three_sessions();
        life.script.refuse("freeze", nth);
        let error = life.freeze().unwrap_err();
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
        let PreserveError::Handler { session, token, .. } = error else { panic!("{error:?}") };
        assert_eq!((session, token), (name(at), Token(100 - nth as u64)));
        assert_eq!(life.script.calls(), [calls("freeze", frozen), calls("unfreeze", unfrozen)].concat());

        life.publish();
        assert_eq!(versions(&life), [0; 7], "the files are as before");
        life.freeze().unwrap();
        assert_eq!(life.script.calls(), calls("freeze", &[1, 2, 3, 4, 5, 6, 7]), "a second try is legal");
        life.publish();
        assert_eq!(versions(&life), [1; 7]);
    }
}

/// L2.7.3, H3.4.6.
#[test]
fn unfreeze_undoes_all_and_only_once() {
    let mut life = three_sessions();
    life.unfreeze();
    assert!(life.script.calls().is_empty(), "nothing is frozen");
    life.publish();
    let used = life.kho.used_bytes();
    life.freeze().unwrap();
    life.script.calls();
    life.unfreeze();
    assert_eq!(life.script.calls(), calls("unfreeze", &[6, 7, 4, 5, 1, 2, 3]));
    life.unfreeze();
    assert!(life.script.calls().is_empty());
    life.publish();
    assert_eq!((versions(&life), life.kho.used_bytes()), (vec![0; 7], used));
    life.freeze().unwrap();
    assert_eq!(life.script.calls().len(), 7);
}

/// H3.1.5.
#[test]
fn what_freeze_gives_is_what_the_next_life_gets() {
    let mut life = Life::first();
    life.session("a", &[1]);
    life.publish();
    life.freeze().unwrap();
    assert_eq!(versions(&life), [0], "until it is published");
    life.publish();
    let mut life = life.then();
    assert_eq!(Thing::of(&life.retrieve("a", 1).unwrap()).version, 1);
}

/// L2.7.3.
#[test]
fn a_file_preserved_after_freeze_is_frozen_by_the_next() {
    let mut life = Life::first();
    life.session("a", &[1]);
    life.freeze().unwrap();
    life.preserve("a", 2, &thing(2)).unwrap();
    life.session("b", &[3]);
    life.script.calls();
    life.script.refuse("freeze", 2);
    life.freeze().unwrap_err();
    assert_eq!(life.script.calls(), ["freeze 2", "freeze 3", "unfreeze 1", "unfreeze 2"], "all or none");
    life.freeze().unwrap();
    life.publish();
    assert_eq!(versions(&life), [1; 3]);
}

/// H3.4.6.
#[test]
fn a_frozen_session_is_unfrozen_before_it_is_unpreserved() {
    let mut life = Life::first();
    life.publish();
    let used = life.kho.used_bytes();
    life.session("a", &[1, 2]);
    life.freeze().unwrap();
    life.publish();
    life.script.calls();
    life.drop_session("a");
    assert_eq!(life.script.calls(), ["unfreeze 1", "unfreeze 2", "unpreserve 2", "unpreserve 1"]);
    life.publish();
    assert_eq!(life.kho.used_bytes(), used);
}
