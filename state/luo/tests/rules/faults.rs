//! Each callback that may refuse, each write, and each frame that an operation needs fails once: nothing of the
//! operation stays behind, and a second try succeeds.

use std::fmt::Debug;
use std::sync::Arc;

use abi::vm::Identity;
use faults::Fault;
use faults::FaultyHandler;
use faults::FaultyMemory;
use faults::FaultyShared;
use faults::at_every_step;
use faults::in_every_room;
use faults::look;
use kho::Books;
use kho::Kho;
use kho::Tree;
use pages::PageRange;
use pages::Pfn;
use tideover_luo::AttachError;
use tideover_luo::Compatible;
use tideover_luo::File;
use tideover_luo::Handlers;
use tideover_luo::Luo;
use tideover_luo::SharedObject;

use crate::recorder::Arena;
use crate::recorder::BARE;
use crate::recorder::FRAMES;
use crate::recorder::Life;
use crate::recorder::Script;
use crate::recorder::THING;
use crate::recorder::bare;
use crate::recorder::handlers;
use crate::recorder::recorder;
use crate::recorder::thing;
use crate::shared::ledger;

const A: Compatible = Compatible::literal("ledger-a");
const B: Compatible = Compatible::literal("ledger-b");

/// Things share two objects, bare ones share one of them.
fn faulty(script: &Script, fault: &Fault) -> Handlers {
    let mut handlers = Handlers::default();
    for kind in [THING, BARE] {
        handlers.register(FaultyHandler::new(recorder(kind, script), fault)).unwrap();
    }
    let shared = |name, number| -> Arc<dyn SharedObject> {
        Arc::new(FaultyShared::new(ledger(name, number, script), fault))
    };
    let [a, b] = [shared(A, 100), shared(B, 200)];
    for (kind, object) in [(THING, &a), (THING, &b), (BARE, &b)] {
        handlers.register_shared(&kind, object).unwrap();
    }
    handlers
}

/// A first life without sessions.
fn first(fault: &Fault) -> Life {
    let (arena, script) = (Arena::new(FRAMES), Script::default());
    let memory = FaultyMemory::new(arena.clone(), fault);
    let kho = Kho::format(Box::new(memory), Identity::new([9; 16]), FRAMES).unwrap();
    let luo = Luo::new(faulty(&script, fault));
    Life { arena, kho, luo, script }
}

/// Sessions `a` (1, 2) and `b` (3), published; then `c` (4, and a bare 5), which is not.
fn outgoing(fault: &Fault) -> Life {
    let mut life = first(fault);
    life.session("a", &[1, 2]);
    life.session("b", &[3]);
    life.publish();
    life.session("c", &[4]);
    life.preserve("c", 5, &bare(5)).unwrap();
    life
}

/// The life after, which received `a` and `b`.
fn incoming(fault: &Fault) -> Life {
    let arena = outgoing(fault).arena;
    let script = Script::default();
    let mut kho = Kho::attach(Box::new(FaultyMemory::new(arena.clone(), fault))).unwrap();
    let luo = Luo::attach(&mut kho, faulty(&script, fault)).unwrap();
    Life { arena, kho, luo, script }
}

/// All that LUO knows, all that the arena's writer knows, and all that a reader finds.
fn seen(life: &Life) -> (String, Books, Tree) {
    let (books, tree) = look(&life.kho, &life.arena);
    (format!("{:?}", life.luo), books, tree)
}

fn told<T, E: Debug>(result: Result<T, E>) -> Result<(), String> {
    result.map(drop).map_err(|error| format!("{error:?}"))
}

/// Fails an operation at each step and with too few frames; gives how many of each it takes.
fn fail_everywhere(
    make: fn(&Fault) -> Life,
    operation: impl Fn(&mut Life) -> Result<(), String>,
) -> (u64, usize) {
    let steps = at_every_step(make, seen, &operation, |life| operation(life).unwrap());
    let make = || make(&Fault::default());
    let frames = in_every_room(make, |life| &mut life.kho, |_| (), seen, &operation);
    (steps, frames)
}

/// H3.2.2, H3.8.1.
#[test]
fn a_preserve_that_fails_anywhere_leaves_everything_as_it_was() {
    let first_of_its_kind = |fault: &Fault| {
        let mut life = first(fault);
        life.create("a");
        life
    };
    let preserve = |file: &dyn Fn() -> File| {
        let file = file();
        move |life: &mut Life| told(life.preserve("a", 9, &file))
    };
    // Two objects and the file: a callback, a write and a frame for each.
    assert_eq!(fail_everywhere(first_of_its_kind, preserve(&|| thing(9))), (6, 3));
    assert_eq!(fail_everywhere(first_of_its_kind, preserve(&|| bare(9))), (3, 1));
    assert_eq!(fail_everywhere(outgoing, preserve(&|| thing(9))), (2, 1));
    assert_eq!(fail_everywhere(outgoing, preserve(&|| bare(9))), (1, 0));
}

/// H3.4.4, H3.4.5.
#[test]
fn a_freeze_that_fails_anywhere_leaves_everything_as_it_was() {
    // A callback for each of five files; a write and a frame for each of four that have a record.
    assert_eq!(fail_everywhere(outgoing, |life| told(life.freeze())), (9, 4));
}

/// H3.4.5, H3.5.3.
#[test]
fn a_publish_that_fails_anywhere_leaves_everything_as_it_was() {
    let publish = |life: &mut Life| told(life.luo.publish(&mut life.kho));
    let (steps, frames) = fail_everywhere(outgoing, publish);
    assert_eq!(frames, 6, "files of three sessions, sessions, shared objects, the blob");
    assert!(steps > 6 + 3, "the same, new nodes, the FDT and the slot: {steps}");
    let (steps_of_the_first, frames) = fail_everywhere(first, publish);
    assert_eq!(frames, 2, "shared objects and the blob");
    assert_eq!(steps_of_the_first, steps - 4);
    assert_eq!(fail_everywhere(incoming, publish).1, 5);
}

/// A frame too few for the new tree, at each of its nodes. H3.5.3.
#[test]
fn a_publish_whose_switch_finds_no_frame_leaves_everything_as_it_was() {
    let far = |index: u64| PageRange::page(Pfn::new((index + 1) << 24).unwrap());
    let prepare = |life: &mut Life| (0..30).for_each(|index| life.kho.preserve(far(index)).unwrap());
    let publish = |life: &mut Life| told(life.luo.publish(&mut life.kho));
    let frames = in_every_room(|| outgoing(&Fault::default()), |life| &mut life.kho, prepare, seen, publish);
    assert!(frames > 30, "a leaf for each page at least: {frames}");
}

/// As [`seen`], but for the error of a retrieve, which by the rules is final.
fn seen_but_for_the_error(life: &Life) -> (String, Books, Tree) {
    let (luo, books, tree) = seen(life);
    (luo.replace(" failed", ""), books, tree)
}

/// L2.5.18.
#[test]
fn a_retrieve_that_fails_keeps_everything_but_its_error() {
    let steps = at_every_step(
        incoming,
        seen_but_for_the_error,
        |life| told(life.retrieve("a", 2)),
        |life| {
            life.retrieve("a", 2).unwrap_err();
            life.retrieve("a", 1).unwrap();
            life.publish();
            let mut later = life.arena.attach();
            let luo = Luo::attach(&mut later, faulty(&Script::default(), &Fault::default()));
            luo.unwrap().retrieve(&mut later, crate::recorder::name("a"), tideover_luo::Token(2)).unwrap();
        },
    );
    assert_eq!(steps, 1, "nothing is written for it");
}

/// L2.5.21, H3.6.1.
#[test]
fn a_finish_that_fails_anywhere_leaves_everything_as_it_was() {
    let retrieved = |fault: &Fault| {
        let mut life = incoming(fault);
        life.retrieve("a", 1).unwrap();
        for object in [A, B] {
            life.luo.retrieve_shared(&mut life.kho, &object).unwrap();
        }
        life
    };
    assert_eq!(fail_everywhere(retrieved, |life| told(life.finish("a"))), (2, 0), "each file is asked");
}

/// L2.7.1, H3.3.1, H3.4.6.
#[test]
fn to_drop_a_session_or_to_unfreeze_takes_no_step_that_can_fail_and_no_frame() {
    let fault = Fault::default();
    let mut life = outgoing(&fault);
    let before = seen(&life);
    life.freeze().unwrap();
    fault.arm(1);
    life.unfreeze();
    assert!(!fault.disarm(), "no step was taken");
    assert_eq!(seen(&life), before);

    life.freeze().unwrap();
    life.publish();
    faults::exhaust(&mut life.kho);
    let used = life.kho.used_bytes();
    fault.arm(1);
    ["c", "a", "b"].into_iter().for_each(|session| life.drop_session(session));
    assert!(!fault.disarm(), "no step was taken");
    life.kho.commit().unwrap();
    // A page for each of four things and two objects; the old records of the frozen ones.
    assert_eq!(life.kho.used_bytes(), used - 10 * 4096);
}

/// H3.5.6, H3.5.7.
#[test]
fn an_attach_that_is_refused_leaves_everything_as_it_was_and_can_be_tried_again() {
    let arena = outgoing(&Fault::default()).arena;
    let mut kho = arena.attach();
    let before = look(&kho, &arena);
    let script = Script::default();
    let mut one_kind = Handlers::default();
    one_kind.register(recorder(BARE, &script)).unwrap();
    let error = Luo::attach(&mut kho, one_kind).unwrap_err();
    assert!(matches!(error, AttachError::UnknownHandler { .. }), "{error:?}");
    assert_eq!(look(&kho, &arena), before);
    let error = Luo::attach(&mut kho, handlers(&script)).unwrap_err();
    assert!(matches!(error, AttachError::UnknownShared { .. }), "{error:?}");
    assert_eq!(look(&kho, &arena), before);
    let luo = Luo::attach(&mut kho, faulty(&script, &Fault::default())).unwrap();
    assert_eq!(luo.incoming_sessions().count(), 2);
}

/// L2.7.1, H3.3.2.
#[test]
fn ten_thousand_preserved_and_unpreserved_files_leave_nothing() {
    let mut life = first(&Fault::default());
    life.publish();
    let (used, luo) = (life.kho.used_bytes(), format!("{:?}", life.luo));
    let files = [thing(1), thing(2), bare(3)];
    for round in 0..10_000 / files.len() + 1 {
        life.create("a");
        for (token, file) in (0..).zip(&files) {
            life.preserve("a", token, file).unwrap();
        }
        if round % 10 == 0 {
            life.freeze().unwrap();
            life.publish();
        }
        life.drop_session("a");
        life.script.calls();
    }
    assert!(files.iter().all(|file| Arc::strong_count(file) == 1), "nobody else has them");
    life.publish();
    assert_eq!(life.kho.used_bytes(), used);
    let pages = |luo: &str| luo.rsplit_once("pages").unwrap().0.to_owned();
    assert_eq!(pages(&format!("{:?}", life.luo)), pages(&luo), "no session, token or object is left");
}

/// L2.7.7, H3.6.2, H3.8.5.
#[test]
fn a_thousand_hand_overs_leave_nothing() {
    let mut life = first(&Fault::default());
    life.session("even", &[1, 2]);
    life.preserve("even", 3, &bare(3)).unwrap();
    life.publish();
    let used = life.kho.used_bytes();
    for round in 1..=1000 {
        let (old, new) = if round % 2 == 0 { ("odd", "even") } else { ("even", "odd") };
        life.freeze().unwrap();
        life.publish();
        let (arena, script) = (life.arena.clone(), Script::default());
        drop(life);
        let mut kho = arena.attach();
        let luo = Luo::attach(&mut kho, faulty(&script, &Fault::default())).unwrap();
        life = Life { arena, kho, luo, script };
        let files = [1, 2, 3].map(|token| life.retrieve(old, token).unwrap());
        assert!(life.finish(old).unwrap().unclaimed.is_empty());
        life.create(new);
        for (token, file) in (1..).zip(&files) {
            life.preserve(new, token, file).unwrap();
        }
        life.publish();
        assert_eq!(life.kho.used_bytes(), used, "round {round}");
    }
    assert_eq!(life.luo.number(), 1001);
}
