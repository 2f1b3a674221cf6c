//! Objects that many files share.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use abi::Memory;
use kho::Kho;
use proptest::prelude::*;
use tideover_luo::AttachError;
use tideover_luo::Compatible;
use tideover_luo::Context;
use tideover_luo::Errno;
use tideover_luo::File;
use tideover_luo::FileId;
use tideover_luo::Handler;
use tideover_luo::HandlerError;
use tideover_luo::Handlers;
use tideover_luo::Hold;
use tideover_luo::Luo;
use tideover_luo::Object;
use tideover_luo::PreserveError;
use tideover_luo::PublishError;
use tideover_luo::ShareError;
use tideover_luo::SharedError;
use tideover_luo::SharedObject;
use tideover_luo::Token;

use crate::recorder::Arena;
use crate::recorder::BARE;
use crate::recorder::Life;
use crate::recorder::Script;
use crate::recorder::THING;
use crate::recorder::bare;
use crate::recorder::free;
use crate::recorder::handlers;
use crate::recorder::name;
use crate::recorder::published;
use crate::recorder::thing;

/// An object that keeps its number in a frame of its own.
struct Ledger {
    name: Compatible,
    number: u64,
    script: Script,
}

impl SharedObject for Ledger {
    fn compatible(&self) -> Compatible {
        self.name
    }

    fn preserve(&self, kho: &mut Kho) -> Result<(Object, u64), HandlerError> {
        self.script.refused("share", self.number)?;
        let no_room = |error| HandlerError::new(Errno::ENOMEM, error);
        let page = kho.store(&self.number.to_le_bytes()).map_err(no_room)?;
        Ok((Arc::new(self.number), page.start().address()))
    }

    fn unpreserve(&self, kho: &mut Kho, object: &Object, data: u64) {
        assert_eq!(number(object), self.number);
        self.script.call("unshare", self.number);
        free(kho, data);
    }

    fn retrieve(&self, kho: &mut Kho, data: u64) -> Result<Object, HandlerError> {
        self.script.refused("retrieve", self.number)?;
        let mut bytes = [0; 8];
        kho.memory().read(data, &mut bytes).map_err(|error| HandlerError::new(Errno::EINVAL, error))?;
        Ok(Arc::new(u64::from_le_bytes(bytes)))
    }

    fn finish(&self, kho: &mut Kho, object: Option<&Object>, data: u64) {
        assert!(object.is_none_or(|object| number(object) == self.number));
        self.script.call(if object.is_some() { "finish" } else { "destroy" }, self.number);
        free(kho, data);
    }
}

fn number(object: &Object) -> u64 {
    *object.downcast_ref().expect("a number")
}

const A: Compatible = Compatible::literal("ledger-a");
const B: Compatible = Compatible::literal("ledger-b");
const C: Compatible = Compatible::literal("ledger-c");

pub(crate) fn ledger(name: Compatible, number: u64, script: &Script) -> Arc<dyn SharedObject> {
    Arc::new(Ledger { name, number, script: script.clone() })
}

/// Things need `A` (100), `C` (300) and `B` (200), bare ones need `C`.
fn sharing(script: &Script) -> Handlers {
    let mut handlers = handlers(script);
    let [a, b, c] = [(A, 100), (B, 200), (C, 300)].map(|(name, number)| ledger(name, number, script));
    for (kind, object) in [(THING, &a), (BARE, &c), (THING, &c), (THING, &b)] {
        handlers.register_shared(&kind, object).unwrap();
    }
    handlers
}

/// A first life with such handlers, whose state is published.
fn first() -> Life {
    let mut life = Life::first();
    life.luo = Luo::new(sharing(&life.script));
    life.publish();
    life
}

fn try_next(arena: &Arena, handlers: impl FnOnce(&Script) -> Handlers) -> Result<Life, AttachError> {
    let script = Script::default();
    let mut kho = arena.attach();
    let luo = Luo::attach(&mut kho, handlers(&script))?;
    Ok(Life { arena: arena.clone(), kho, luo, script })
}

fn next(life: Life) -> Life {
    let arena = life.arena.clone();
    drop(life);
    try_next(&arena, sharing).unwrap()
}

/// Name and count of each object that is published.
fn listed(life: &Life) -> Vec<(Compatible, u64)> {
    published(&life.arena.attach()).flbs.iter().map(|flb| (flb.name, flb.count)).collect()
}

/// H3.8.1.
#[test]
fn the_first_file_that_needs_an_object_preserves_it_and_later_ones_do_not() {
    let mut life = first();
    life.create("a");
    life.preserve("a", 1, &bare(1)).unwrap();
    assert_eq!(life.script.calls(), ["share 300", "preserve 1"], "before the file itself");
    life.preserve("a", 2, &thing(2)).unwrap();
    assert_eq!(life.script.calls(), ["share 100", "share 200", "preserve 2"], "in the order of registration");
    life.session("b", &[3]);
    life.preserve("b", 4, &bare(4)).unwrap();
    assert_eq!(life.script.calls(), ["preserve 3", "preserve 4"]);
}

/// H3.4.7.
#[test]
fn objects_in_use_are_listed_with_the_number_of_files_that_need_them() {
    let mut life = first();
    assert_eq!(listed(&life), []);
    life.create("a");
    life.preserve("a", 1, &bare(1)).unwrap();
    life.publish();
    assert_eq!(listed(&life), [(C, 1)]);
    life.session("b", &[2, 3]);
    life.publish();
    assert_eq!(listed(&life), [(A, 2), (C, 3), (B, 2)], "in the order of registration");
    let kho = life.arena.attach();
    let numbers = published(&kho).flbs.into_iter().map(|flb| {
        let mut bytes = [0; 8];
        kho.memory().read(flb.data, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    });
    assert_eq!(numbers.collect::<Vec<_>>(), [100, 300, 200], "each with what it gave");
    assert_eq!(life.luo.compatibles(), [BARE, A, B, C, THING], "who shall read it has to know them");
}

/// L2.5.12, H3.2.1, H3.8.1.
#[test]
fn an_object_that_refuses_is_asked_behind_the_held_file_and_before_the_handler() {
    for (nth, refuses, calls) in [
        (1, A, vec!["share 100"]),
        (2, C, vec!["share 100", "share 300", "unshare 100"]),
        (3, B, vec!["share 100", "share 300", "share 200", "unshare 300", "unshare 100"]),
    ] {
        let mut life = first();
        life.create("a");
        life.publish();
        let used = life.kho.used_bytes();
        let file = thing(1);
        life.script.refuse("share", nth);
        let error = life.preserve("a", 1, &file).unwrap_err();
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
        let PreserveError::Shared { object, token, .. } = error else { panic!("{error:?}") };
        assert_eq!((object, token), (refuses, Token(1)));
        assert_eq!(life.script.calls(), calls, "the handler is not asked");
        life.publish();
        assert_eq!((listed(&life), life.kho.used_bytes()), (vec![], used));

        life.preserve("a", 1, &file).unwrap();
        life.script.calls();
        let error = life.preserve("a", 2, &file).unwrap_err();
        assert!(matches!(error, PreserveError::Held { .. }), "{error:?}");
        assert!(life.script.calls().is_empty(), "no object is asked for a file that is held");
    }
}

/// H3.8.1, H3.2.2.
#[test]
fn objects_are_rolled_back_with_the_file_that_the_handler_refuses() {
    let mut life = first();
    life.create("a");
    life.publish();
    let used = life.kho.used_bytes();
    life.script.refuse("preserve", 1);
    life.preserve("a", 1, &thing(1)).unwrap_err();
    let all =
        ["share 100", "share 300", "share 200", "preserve 1", "unshare 200", "unshare 300", "unshare 100"];
    assert_eq!(life.script.calls(), all);
    life.publish();
    assert_eq!((listed(&life), life.kho.used_bytes()), (vec![], used));

    life.preserve("a", 2, &bare(2)).unwrap();
    life.script.calls();
    life.script.refuse("preserve", 1);
    life.preserve("a", 1, &thing(1)).unwrap_err();
    assert_eq!(life.script.calls(), ["share 100", "share 200", "preserve 1", "unshare 200", "unshare 100"]);
    life.publish();
    assert_eq!(listed(&life), [(C, 1)], "what another file needs stays, with its count");
}

/// H3.8.2.
#[test]
fn the_last_file_unpreserves_the_objects_last_registered_first() {
    let mut life = first();
    let used = life.kho.used_bytes();
    life.session("a", &[1, 2]);
    life.session("b", &[3]);
    life.create("c");
    life.preserve("c", 4, &bare(4)).unwrap();
    life.script.calls();
    life.drop_session("a");
    assert_eq!(life.script.calls(), ["unpreserve 2", "unpreserve 1"]);
    life.drop_session("b");
    assert_eq!(life.script.calls(), ["unpreserve 3", "unshare 200", "unshare 100"]);
    life.drop_session("c");
    assert_eq!(life.script.calls(), ["unpreserve 4", "unshare 300"]);
    life.publish();
    assert_eq!((listed(&life), life.kho.used_bytes()), (vec![], used));
}

/// H3.8.3.
#[test]
fn who_holds_an_object_keeps_it_preserved_and_counts() {
    let mut life = first();
    let used = life.kho.used_bytes();
    let error = life.luo.hold_shared(&A).unwrap_err();
    assert!(matches!(error, SharedError::NotPreserved { object: A }), "{error:?}");
    assert_eq!(error.errno(), Errno::ENOENT);
    life.session("a", &[1]);
    let holds = [(); 2].map(|()| life.luo.hold_shared(&A).unwrap());
    assert_eq!(number(holds[0].object()), 100);
    life.publish();
    assert_eq!(listed(&life), [(A, 3), (C, 1), (B, 1)]);
    life.script.calls();
    life.drop_session("a");
    assert_eq!(life.script.calls(), ["unpreserve 1", "unshare 200", "unshare 300"], "one is held");
    life.publish();
    assert_eq!(listed(&life), [(A, 2)]);
    let [first, last] = holds;
    life.luo.release_shared(&mut life.kho, first);
    assert!(life.script.calls().is_empty());
    life.luo.release_shared(&mut life.kho, last);
    assert_eq!(life.script.calls(), ["unshare 100"], "to give it back may be what unpreserves it");
    life.publish();
    assert_eq!((listed(&life), life.kho.used_bytes()), (vec![], used));
}

/// H3.8.3, H3.8.6.
#[test]
fn a_hold_of_another_arenas_object_lets_nothing_go() {
    let (mut life, mut other) = (first(), first());
    life.session("a", &[1]);
    other.session("a", &[1]);
    let hold = other.luo.hold_shared(&A).unwrap();
    life.script.calls();
    life.luo.release_shared(&mut life.kho, hold);
    assert!(life.script.calls().is_empty());
    life.publish();
    assert_eq!(listed(&life), [(A, 1), (C, 1), (B, 1)]);
}

/// H3.8.4.
#[test]
fn an_object_is_retrieved_when_it_is_first_asked_for_and_once() {
    let mut life = first();
    let error = life.luo.retrieve_shared(&mut life.kho, &A).unwrap_err();
    assert!(matches!(error, SharedError::NoData { object: A }), "the first life: {error:?}");
    assert_eq!(error.errno(), Errno::ENODATA);
    life.create("a");
    life.preserve("a", 1, &bare(1)).unwrap();
    life.publish();
    let mut life = next(life);
    life.retrieve("a", 1).unwrap();
    assert_eq!(life.script.calls(), ["retrieve 1"], "nobody asked for it");
    let [one, other] = [(); 2].map(|()| life.luo.retrieve_shared(&mut life.kho, &C).unwrap());
    assert!(Arc::ptr_eq(&one, &other) && number(&one) == 300);
    assert_eq!(life.script.calls(), ["retrieve 300"]);
    let error = life.luo.retrieve_shared(&mut life.kho, &A).unwrap_err();
    assert!(matches!(error, SharedError::NotReceived { object: A }), "{error:?}");
    assert_eq!(error.errno(), Errno::ENOENT);
    let error = life.luo.retrieve_shared(&mut life.kho, &THING).unwrap_err();
    assert!(matches!(error, SharedError::Unknown { object: THING }), "{error:?}");
    assert_eq!(error.errno(), Errno::ENOENT);
}

/// H3.8.4.
#[test]
fn an_object_that_cannot_be_retrieved_stays_so_and_is_destroyed_with_the_last_file() {
    let mut life = first();
    let used = life.kho.used_bytes();
    life.create("a");
    life.preserve("a", 1, &bare(1)).unwrap();
    life.publish();
    let mut life = next(life);
    life.script.refuse("retrieve", 1);
    for _ in 0..3 {
        let error = life.luo.retrieve_shared(&mut life.kho, &C).unwrap_err();
        assert!(matches!(error, SharedError::Refused { object: C, .. }), "{error:?}");
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
    }
    assert_eq!(life.script.calls(), ["retrieve 300"], "it is asked once");
    life.finish("a").unwrap();
    assert_eq!(life.script.calls(), ["can_finish 0", "destroy 1", "destroy 300"]);
    life.publish();
    assert_eq!(life.kho.used_bytes(), used, "a kernel would not finish it, and keep its memory");
}

/// H3.8.4.
#[test]
fn an_object_that_says_try_again_is_asked_again() {
    let mut life = first();
    life.create("a");
    life.preserve("a", 1, &bare(1)).unwrap();
    life.publish();
    let mut life = next(life);
    life.script.refuse_with(Errno::EAGAIN);
    life.script.refuse("retrieve", 1);
    assert_eq!(life.luo.retrieve_shared(&mut life.kho, &C).unwrap_err().errno(), Errno::EAGAIN);
    assert_eq!(number(&life.luo.retrieve_shared(&mut life.kho, &C).unwrap()), 300);
    assert_eq!(life.script.calls(), ["retrieve 300"; 2]);
}

/// H3.8.5, H3.6.2.
#[test]
fn the_last_file_that_needs_it_finishes_an_object_once() {
    let mut life = first();
    let used = life.kho.used_bytes();
    life.session("a", &[1, 2]);
    life.session("b", &[3]);
    life.publish();
    let mut life = next(life);
    for name in [A, B, C] {
        life.luo.retrieve_shared(&mut life.kho, &name).unwrap();
    }
    life.script.calls();
    life.finish("b").unwrap();
    assert_eq!(life.script.calls(), ["can_finish 0", "destroy 3"]);
    life.finish("a").unwrap();
    let ends = ["destroy 2", "destroy 1", "finish 200", "finish 300", "finish 100"];
    assert_eq!(life.script.calls()[2..], ends, "the last registered first");
    life.finish("a").unwrap();
    assert!(life.script.calls().is_empty());
    let error = life.luo.retrieve_shared(&mut life.kho, &A).unwrap_err();
    assert!(matches!(error, SharedError::NoData { .. }), "finished: {error:?}");
    life.publish();
    assert_eq!((listed(&life), life.kho.used_bytes()), (vec![], used));
}

/// H3.8.6. A kernel's count falls below zero here, and the object is never finished.
#[test]
fn an_object_that_nobody_asked_for_is_finished_with_the_last_file_and_not_before() {
    let mut life = first();
    let used = life.kho.used_bytes();
    life.session("a", &[1]);
    life.session("b", &[2]);
    // What is held when it is published is one more than the files, and nobody who is left gives it back.
    let hold = life.luo.hold_shared(&B).unwrap();
    life.publish();
    assert_eq!(listed(&life), [(A, 2), (C, 2), (B, 3)]);
    let mut life = next(life);
    drop(hold);
    life.finish("a").unwrap();
    assert_eq!(life.script.calls(), ["can_finish 0", "destroy 1"]);
    life.publish();
    assert_eq!(listed(&life), [(A, 1), (C, 1), (B, 1)]);
    life.finish("b").unwrap();
    let ends = ["retrieve 200", "finish 200", "retrieve 300", "finish 300", "retrieve 100", "finish 100"];
    assert_eq!(life.script.calls()[2..], ends, "retrieved on demand");
    life.publish();
    assert_eq!((listed(&life), life.kho.used_bytes()), (vec![], used));
}

/// H3.8.6.
#[test]
fn an_object_that_only_a_hold_kept_goes_with_the_first_session_that_is_finished() {
    let mut life = first();
    let used = life.kho.used_bytes();
    life.session("a", &[1]);
    let hold = life.luo.hold_shared(&A).unwrap();
    life.drop_session("a");
    life.create("empty");
    life.publish();
    drop(hold);
    let mut life = next(next(life));
    assert_eq!(listed(&life), [(A, 1)]);
    life.publish();
    assert_eq!(listed(&life), [(A, 1)], "until then it goes on from life to life");
    life.finish("empty").unwrap();
    assert_eq!(life.script.calls(), ["retrieve 100", "finish 100"]);
    life.publish();
    assert_eq!((listed(&life), life.kho.used_bytes()), (vec![], used));
}

/// H3.8.7.
#[test]
fn an_object_is_registered_once_for_a_handler_that_is_there_and_its_name_is_its_own() {
    let script = Script::default();
    let mut handlers = sharing(&script);
    let kinds = handlers.compatibles();
    let (other, a) = (ledger(A, 1, &script), ledger(Compatible::literal("new"), 2, &script));
    let stranger = Compatible::literal("stranger");
    let refused = handlers.register_shared(&stranger, &a).unwrap_err();
    assert_eq!((refused, refused.errno()), (unknown(stranger), Errno::EINVAL));
    let refused = handlers.register_shared(&THING, &other).unwrap_err();
    assert_eq!((refused, refused.errno()), (ShareError::Exists { object: A }, Errno::EEXIST));
    handlers.register_shared(&THING, &a).unwrap();
    let refused = handlers.register_shared(&THING, &a).unwrap_err();
    let twice = ShareError::Twice { kind: THING, object: a.compatible() };
    assert_eq!((refused, refused.errno()), (twice, Errno::EEXIST));
    handlers.register_shared(&BARE, &a).unwrap();
    assert_eq!(handlers.compatibles(), [kinds, vec![a.compatible()]].concat(), "one for both kinds");
}

fn unknown(kind: Compatible) -> ShareError {
    ShareError::UnknownHandler { kind, object: Compatible::literal("new") }
}

/// H3.8.7.
#[test]
fn there_are_63_objects_at_most_and_all_of_them_are_listed() {
    let script = Script::default();
    let mut all = handlers(&script);
    let named = |number: u64| Compatible::new(format!("ledger {number}").as_bytes()).unwrap();
    for number in 0..63 {
        all.register_shared(&THING, &ledger(named(number), number, &script)).unwrap();
    }
    let more = ledger(named(63), 63, &script);
    let refused = all.register_shared(&THING, &more).unwrap_err();
    assert_eq!((refused, refused.errno()), (ShareError::TooMany, Errno::ENOSPC));
    let mut life = Life::first();
    life.luo = Luo::new(all);
    life.session("a", &[1]);
    life.publish();
    let names: Vec<Compatible> = listed(&life).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, (0..63).map(named).collect::<Vec<_>>());
}

/// H3.8.4, H3.5.4.
#[test]
fn an_object_that_nobody_knows_is_named_and_nothing_is_taken_over() {
    let mut life = first();
    life.create("a");
    life.preserve("a", 1, &bare(1)).unwrap();
    life.publish();
    let error = try_next(&life.arena, handlers).unwrap_err();
    assert!(matches!(error, AttachError::UnknownShared { object: C }), "{error:?}");
    assert_eq!(error.errno(), Errno::EIO);
    assert_eq!(next(life).tokens("a"), [1]);
}

/// L2.5.3, H3.8.5.
#[test]
fn a_name_that_was_received_is_published_again_only_once_it_is_finished() {
    let mut life = first();
    life.create("a");
    life.preserve("a", 1, &bare(1)).unwrap();
    life.publish();
    let mut life = next(life);
    life.create("b");
    life.preserve("b", 2, &bare(2)).unwrap();
    let error = life.luo.publish(&mut life.kho).unwrap_err();
    assert!(matches!(error, PublishError::UnfinishedShared { object: C }), "{error:?}");
    assert_eq!(error.errno(), Errno::EBUSY);
    life.finish("a").unwrap();
    life.publish();
    assert_eq!(listed(&life), [(C, 1)]);
    assert_eq!(next(life).tokens("b"), [2]);
}

/// Counts its files in the shared object `A`, and says what it finds there.
struct Counting {
    script: Script,
}

impl Counting {
    fn note(&self, verb: &'static str, found: Result<Object, SharedError>) {
        self.script.call(verb, found.map_or(0, |object| number(&object)));
    }
}

impl Handler for Counting {
    fn compatible(&self) -> Compatible {
        THING
    }

    fn can_preserve(&self, _: &File) -> bool {
        true
    }

    fn id(&self, _: &File) -> FileId {
        FileId::fresh()
    }

    fn preserve(&self, context: &mut Context<'_>, _: &File) -> Result<u64, HandlerError> {
        self.note("preserve", context.outgoing_shared(&A));
        Ok(0)
    }

    fn unpreserve(&self, context: &mut Context<'_>, _: &File, _: u64) {
        self.note("unpreserve", context.outgoing_shared(&A));
    }

    fn freeze(&self, context: &mut Context<'_>, _: &File, _: u64) -> Result<u64, HandlerError> {
        self.note("freeze", context.outgoing_shared(&A));
        Ok(0)
    }

    fn unfreeze(&self, context: &mut Context<'_>, _: &File, _: u64) -> u64 {
        self.note("unfreeze", context.outgoing_shared(&A));
        0
    }

    fn retrieve(&self, context: &mut Context<'_>, data: u64) -> Result<File, HandlerError> {
        self.note("retrieve", context.incoming_shared(&A));
        Ok(Arc::new(data))
    }

    fn can_finish(&self, _: Option<&File>) -> bool {
        true
    }

    fn finish(&self, context: &mut Context<'_>, _: Option<&File>, _: u64) {
        self.note("finish", context.incoming_shared(&A));
    }
}

fn counting(script: &Script) -> Handlers {
    let mut handlers = Handlers::default();
    handlers.register(Counting { script: script.clone() }).unwrap();
    handlers.register_shared(&THING, &ledger(A, 100, script)).unwrap();
    handlers
}

/// H3.8.3, H3.8.4.
#[test]
fn every_callback_of_a_handler_finds_the_object_that_its_file_needs() {
    let mut life = Life::first();
    life.luo = Luo::new(counting(&life.script));
    life.session("a", &[1]);
    life.freeze().unwrap();
    life.unfreeze();
    life.publish();
    let outgoing = ["share 100", "preserve 100", "freeze 100", "unfreeze 100"];
    assert_eq!(life.script.calls(), outgoing);
    let mut later = try_next(&life.arena.copy(), counting).unwrap();
    later.retrieve("a", 1).unwrap();
    later.finish("a").unwrap();
    let incoming = ["retrieve 100", "retrieve 100", "finish 100", "finish 100"];
    assert_eq!(later.script.calls(), incoming, "the object itself first, then the file");
    life.drop_session("a");
    assert_eq!(life.script.calls(), ["unpreserve 100", "unshare 100"]);
    let error = Context::new(&mut life.kho, name("a")).outgoing_shared(&A).unwrap_err();
    assert!(matches!(error, SharedError::Unknown { .. }), "a handler alone: {error:?}");
}

/// An operation on sessions `a` and `b`.
#[derive(Debug, Clone)]
enum Op {
    Preserve { session: &'static str, bare: bool, refuse: Option<&'static str> },
    Drop(&'static str),
    Hold(Compatible),
    Release,
    Ask(Compatible),
    Finish(&'static str),
    Publish,
    NextLife,
}

fn op() -> impl Strategy<Value = Op> {
    let session = || proptest::sample::select(vec!["a", "b"]);
    let object = || proptest::sample::select(vec![A, B, C]);
    let refuse = proptest::option::weighted(0.3, proptest::sample::select(vec!["share", "preserve"]));
    prop_oneof![
        6 => (session(), any::<bool>(), refuse)
            .prop_map(|(session, bare, refuse)| Op::Preserve { session, bare, refuse }),
        1 => session().prop_map(Op::Drop),
        1 => object().prop_map(Op::Hold),
        1 => Just(Op::Release),
        1 => object().prop_map(Op::Ask),
        2 => session().prop_map(Op::Finish),
        4 => Just(Op::Publish),
        2 => Just(Op::NextLife),
    ]
}

/// For each session, of each file whether it is a bare one.
type Sessions = BTreeMap<&'static str, Vec<bool>>;

/// What is needed, by counting: kinds of the files in each session, who holds what, and what was published.
#[derive(Debug, Default)]
struct Needs {
    outgoing: Sessions,
    incoming: Sessions,
    /// Received, and needed by no file: only a hold of the life before kept it.
    unneeded: BTreeSet<Compatible>,
    holds: Vec<Hold>,
    held: Vec<Compatible>,
    published: (Sessions, Vec<(Compatible, u64)>),
}

fn files_that_need(sessions: &Sessions, object: Compatible) -> u64 {
    let needs = |bare: &&bool| !**bare || object == C;
    sessions.values().flatten().filter(needs).count() as u64
}

impl Needs {
    fn preserved(&self, object: Compatible) -> u64 {
        files_that_need(&self.outgoing, object)
            + self.held.iter().filter(|held| **held == object).count() as u64
    }

    fn received(&self, object: Compatible) -> u64 {
        files_that_need(&self.incoming, object).max(u64::from(self.unneeded.contains(&object)))
    }

    fn preserve(
        &mut self,
        life: &mut Life,
        session: &'static str,
        is_bare: bool,
        refuse: Option<&'static str>,
    ) {
        let _ = life.luo.create_session(name(session));
        let files = self.outgoing.entry(session).or_default();
        let file = if is_bare { bare(7) } else { thing(7) };
        if let Some(verb) = refuse {
            life.script.refuse(verb, 1);
        }
        if life.preserve(session, files.len() as u64, &file).is_ok() {
            files.push(is_bare);
        } else {
            assert!(refuse.is_some());
        }
        life.script.relent();
    }

    fn publish(&mut self, life: &mut Life) {
        let same_name = self.outgoing.keys().any(|session| self.incoming.contains_key(session));
        let same_object =
            [A, C, B].into_iter().any(|name| self.preserved(name) > 0 && self.received(name) > 0);
        let published = life.luo.publish(&mut life.kho);
        assert_eq!(published.is_err(), same_name || same_object, "{published:?}");
        if published.is_ok() {
            let all = [A, C, B].map(|name| (name, self.preserved(name).max(self.received(name))));
            let both = self.incoming.clone().into_iter().chain(self.outgoing.clone()).collect();
            self.published = (both, all.into_iter().filter(|(_, count)| *count > 0).collect());
        }
    }

    fn next_life(&mut self, life: Life) -> Life {
        let (sessions, objects) = self.published.clone();
        *self = Self { incoming: sessions, published: self.published.clone(), ..Self::default() };
        let unneeded = objects.iter().map(|(name, _)| *name);
        self.unneeded = unneeded.filter(|name| files_that_need(&self.incoming, *name) == 0).collect();
        next(life)
    }

    fn finish(&mut self, life: &mut Life, session: &'static str) {
        if life.finish(session).is_ok() && self.incoming.remove(session).is_some() {
            self.unneeded.clear();
        }
    }

    fn apply(&mut self, mut life: Life, op: &Op) -> Life {
        match *op {
            Op::Preserve { session, bare, refuse } => self.preserve(&mut life, session, bare, refuse),
            Op::Drop(session) => {
                let _ = life.luo.drop_session(&mut life.kho, name(session));
                self.outgoing.remove(session);
            }
            Op::Hold(object) => {
                let hold = life.luo.hold_shared(&object);
                assert_eq!(hold.is_ok(), self.preserved(object) > 0);
                self.held.extend(hold.is_ok().then_some(object));
                self.holds.extend(hold);
            }
            Op::Release => {
                self.held.pop();
                self.holds.pop().into_iter().for_each(|hold| life.luo.release_shared(&mut life.kho, hold));
            }
            Op::Ask(object) => {
                let found = life.luo.retrieve_shared(&mut life.kho, &object);
                assert_eq!(found.is_ok(), self.received(object) > 0, "{found:?}");
            }
            Op::Finish(session) => self.finish(&mut life, session),
            Op::Publish => self.publish(&mut life),
            Op::NextLife => return self.next_life(life),
        }
        life
    }

    fn check(&self, life: &Life) {
        let in_use = |name: &Compatible| self.preserved(*name) + self.received(*name) > 0;
        let told = life.luo.compatibles();
        for name in [A, B, C] {
            assert_eq!(told.contains(&name), in_use(&name), "{name}");
        }
        assert_eq!(listed(life), self.published.1);
    }
}

proptest! {
    /// H3.8.1, H3.8.2, H3.8.3, H3.8.5, H3.8.6.
    #[test]
    fn an_object_is_there_as_long_as_somebody_needs_it_whatever_is_done(ops in proptest::collection::vec(op(), 1..80)) {
        let mut life = first();
        let empty = life.kho.used_bytes();
        let mut needs = Needs::default();
        for op in &ops {
            life = needs.apply(life, op);
            needs.check(&life);
        }
        for session in ["a", "b"] {
            let _ = life.luo.drop_session(&mut life.kho, name(session));
            needs.finish(&mut life, session);
        }
        needs.holds.drain(..).for_each(|hold| life.luo.release_shared(&mut life.kho, hold));
        if needs.unneeded.is_empty() {
            life.publish();
            prop_assert_eq!((listed(&life), life.kho.used_bytes()), (vec![], empty));
        }
    }
}
