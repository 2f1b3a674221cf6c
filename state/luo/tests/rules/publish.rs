//! What one life publishes and the next one finds.

use abi::Memory;
use abi::kho::SubtreeName;
use abi::luo::LuoSer;
use pages::PageRange;
use pages::Pfn;
use tideover_luo::AttachError;
use tideover_luo::Errno;
use tideover_luo::Handlers;
use tideover_luo::Luo;
use tideover_luo::PublishError;
use tideover_luo::Token;

use crate::recorder::BARE;
use crate::recorder::Life;
use crate::recorder::Record;
use crate::recorder::Script;
use crate::recorder::THING;
use crate::recorder::Thing;
use crate::recorder::bare;
use crate::recorder::handlers;
use crate::recorder::name;
use crate::recorder::published;
use crate::recorder::recorder;
use crate::recorder::thing;

const SUBTREE: SubtreeName = SubtreeName::literal(abi::luo::SUBTREE);

/// L2.5.16, L2.5.25, H3.1.5.
#[test]
fn the_next_life_sees_sessions_tokens_kinds_and_data() {
    let mut life = Life::first();
    life.session("vm-b", &[7, 3]);
    life.create("vm-a");
    life.preserve("vm-a", 0, &bare(42)).unwrap();
    life.publish();

    let kho = life.arena.attach();
    let wire = published(&kho);
    let session = |at: usize| {
        let session = &wire.sessions[at];
        let tokens: Vec<u64> = session.files.iter().map(|file| file.token).collect();
        let kinds: Vec<_> = session.files.iter().map(|file| file.compatible).collect();
        (session.name, tokens, kinds)
    };
    assert_eq!(wire.sessions.len(), 2);
    assert_eq!(session(0), (name("vm-b"), vec![7, 3], vec![THING, THING]));
    assert_eq!(session(1), (name("vm-a"), vec![0], vec![BARE]));
    assert_eq!(Record::read(&kho, wire.sessions[0].files[1].data).number, 3);
    assert_eq!(wire.sessions[1].files[0].data, 42);

    let mut life = life.then();
    assert_eq!(life.incoming(), [name("vm-b"), name("vm-a")]);
    assert_eq!((life.tokens("vm-b"), life.tokens("vm-a")), (vec![7, 3], vec![0]));
    assert_eq!(life.luo.compatibles(), [BARE, THING]);
    assert_eq!(Thing::of(&life.retrieve("vm-b", 3).unwrap()).number, 3);
    assert_eq!(Thing::of(&life.retrieve("vm-a", 0).unwrap()).number, 42);
    assert_eq!(life.luo.outgoing_sessions().count(), 0);
}

/// H3.4.9.
#[test]
fn the_first_life_writes_1_and_each_next_one_what_it_received_and_1() {
    let mut life = Life::first();
    for number in 1..5 {
        assert_eq!(life.luo.number(), number);
        life.publish();
        life.publish();
        assert_eq!(published(&life.kho).liveupdate_num, number);
        life = life.then();
    }
}

/// H3.5.1.
#[test]
fn nothing_is_seen_before_it_is_published() {
    let mut life = Life::first();
    let missing = |life: &Life| {
        matches!(Luo::attach(&mut life.arena.attach(), handlers(&life.script)), Err(AttachError::Missing))
    };
    life.session("a", &[1]);
    assert!(missing(&life));
    life.kho.commit().unwrap();
    assert!(missing(&life), "frames alone are no session");
    life.publish();
    assert!(!missing(&life));
}

/// H3.5.4, H3.5.6, H3.5.7.
#[test]
fn a_file_of_an_unknown_kind_is_named_and_nothing_is_taken_over() {
    let mut life = Life::first();
    life.create("a");
    life.preserve("a", 5, &bare(1)).unwrap();
    life.preserve("a", 9, &thing(2)).unwrap();
    life.publish();
    let mut handlers = Handlers::default();
    handlers.register(recorder(BARE, &Script::default())).unwrap();
    let error = Luo::attach(&mut life.arena.attach(), handlers).unwrap_err();
    let AttachError::UnknownHandler { session, token, compatible } = error else { panic!("{error:?}") };
    assert_eq!((session, token, compatible), (name("a"), Token(9), THING));
    assert_eq!(life.then().tokens("a"), [5, 9], "a life that knows the kind still finds all");
}

/// H3.5.2.
#[test]
fn a_broken_state_is_refused() {
    let mut life = Life::first();
    life.session("a", &[1]);
    life.publish();
    let mut subtree = *life.kho.subtree(&SUBTREE).unwrap();
    subtree.size = 31;
    life.kho.set_subtree(subtree);
    let error = Luo::attach(&mut life.kho, handlers(&life.script)).unwrap_err();
    assert!(
        matches!(&error, AttachError::Malformed(malformed) if malformed.field == "blob-size"),
        "{error:?}"
    );
}

/// Pages that hold `count` entries, as many in each.
fn blocks(count: usize, capacity: usize) -> usize {
    count.div_ceil(capacity)
}

/// H3.4.8.
#[test]
fn any_number_of_sessions_is_listed_without_an_empty_block() {
    for count in [0, 1, 50, 51, 52, 101, 102, 103] {
        let mut life = Life::first();
        let names: Vec<_> = (0..count).map(|number| name(&format!("session {number}"))).collect();
        for session in &names {
            life.luo.create_session(*session).unwrap();
        }
        // A kernel hangs an empty block on the chain here.
        if let Some(taken) = names.first() {
            life.luo.create_session(*taken).unwrap_err();
        }
        life.publish();
        // The reader refuses an empty block. Beside the blocks: the blob and the page of FLBs.
        let wire = published(&life.arena.attach());
        assert_eq!(wire.pages.len(), 2 + blocks(count, 51), "{count} sessions");
        assert!(wire.sessions.iter().all(|session| session.files.is_empty()));
        assert_eq!(life.then().incoming(), names);
    }
}

/// H3.4.8. A kernel makes room for a session before it looks for its name, and panics at the next boot.
#[test]
fn a_name_that_is_taken_leaves_no_empty_block_behind_however_full_the_last_one_is() {
    for count in [50, 51, 52, 101, 102, 103] {
        let mut life = Life::first();
        (0..count).for_each(|number| life.create(&format!("session {number}")));
        life.publish();
        let used = life.kho.used_bytes();
        let error = life.luo.create_session(name("session 7")).unwrap_err();
        assert_eq!(error.errno(), Errno::EEXIST);
        life.publish();
        assert_eq!(life.kho.used_bytes(), used, "{count} sessions");
        assert_eq!(life.then().incoming().len(), count, "the next life begins");
    }
}

/// H3.4.2.
#[test]
fn no_session_is_the_address_0() {
    let mut life = Life::first();
    life.publish();
    let subtree = life.kho.subtree(&SUBTREE).unwrap();
    assert_eq!(subtree.size, 32);
    let mut bytes = [0; 32];
    life.kho.memory().read(subtree.data, &mut bytes).unwrap();
    let ser: LuoSer = zerocopy::transmute!(bytes);
    assert_eq!(ser.sessions.get(), 0);
    assert_ne!(ser.flbs.get(), 0);
}

/// H3.4.8.
#[test]
fn any_number_of_files_is_listed_without_an_empty_block() {
    for count in [0, 1, 62, 63, 64, 126, 127] {
        let mut life = Life::first();
        life.create("a");
        let tokens: Vec<u64> = (0..count as u64).rev().collect();
        for token in &tokens {
            life.preserve("a", *token, &bare(*token + 1000)).unwrap();
        }
        life.publish();
        let wire = published(&life.arena.attach());
        assert_eq!(wire.pages.len(), 3 + blocks(count, 63), "{count} files");
        let mut life = life.then();
        assert_eq!(life.tokens("a"), tokens);
        for token in tokens {
            assert_eq!(Thing::of(&life.retrieve("a", token).unwrap()).number, token + 1000);
        }
    }
}

/// L2.7.4, L2.7.5.
#[test]
fn sessions_that_are_not_finished_go_on_from_life_to_life() {
    let mut life = Life::first();
    life.session("a", &[1, 2]);
    life.session("b", &[3]);
    life.publish();
    let mut sessions = published(&life.kho).sessions;
    for round in 0..3 {
        life = life.then();
        assert_eq!(life.tokens("a"), [1, 2]);
        // Retrieved or failed, its record is still there.
        life.retrieve("a", 1).unwrap();
        life.script.refuse("retrieve", 1);
        life.retrieve("a", 2).unwrap_err();
        life.session(&format!("new {round}"), &[10 + round]);
        life.publish();
        let now = published(&life.kho).sessions;
        assert_eq!(now[..sessions.len()], sessions, "those received come first, unchanged");
        sessions = now;
    }
    assert_eq!(life.then().incoming(), ["a", "b", "new 0", "new 1", "new 2"].map(name));
}

/// H3.5.3.
#[test]
fn without_room_the_old_state_stays_and_a_later_try_takes_no_more() {
    let mut life = Life::first();
    life.session("a", &[1]);
    life.publish();
    let used = life.kho.used_bytes();
    life.create("b");
    let mut ballast = Vec::new();
    while let Ok(page) = life.kho.allocate(1) {
        ballast.push(page);
    }
    // Room for the first page of the state, and no more.
    life.kho.commit().unwrap();
    life.kho.free(ballast.pop().unwrap());
    life.kho.commit().unwrap();
    let error = life.luo.publish(&mut life.kho).unwrap_err();
    assert!(matches!(error, PublishError::Store(_)), "{error:?}");
    assert_eq!(life.arena.copy().next_life().incoming(), [name("a")]);

    ballast.into_iter().for_each(|page: PageRange| life.kho.free(page));
    life.kho.commit().unwrap();
    assert_eq!(life.arena.copy().next_life().incoming(), [name("a")]);
    life.publish();
    assert_eq!(life.kho.used_bytes(), used, "as many pages as before hold one session more");
    assert_eq!(life.then().incoming(), [name("a"), name("b")]);
}

#[test]
fn a_switch_that_fails_leaves_the_old_state_and_can_be_tried_again() {
    let mut life = Life::first();
    life.session("a", &[1]);
    life.publish();
    let used = life.kho.used_bytes();
    let mut ballast = Vec::new();
    while let Ok(page) = life.kho.allocate(1) {
        ballast.push(page);
    }
    life.kho.commit().unwrap();
    // Room for two tries; each leaves its pages to the switch that succeeds.
    ballast.drain(..8).for_each(|page| life.kho.free(page));
    life.kho.commit().unwrap();
    life.create("b");
    // Far from each other: more new nodes than there are free frames.
    let far = |index: u64| PageRange::page(Pfn::new((index + 1) << 24).unwrap());
    (0..40).for_each(|index| life.kho.preserve(far(index)).unwrap());
    let error = life.luo.publish(&mut life.kho).unwrap_err();
    assert!(matches!(error, PublishError::Commit(_)), "{error:?}");
    assert_eq!(life.arena.copy().next_life().incoming(), [name("a")]);

    (0..40).for_each(|index| life.kho.unpreserve(far(index)).unwrap());
    life.publish();
    assert_eq!(life.arena.copy().next_life().incoming(), [name("a"), name("b")]);
    ballast.into_iter().for_each(|page| life.kho.free(page));
    life.publish();
    assert_eq!(life.kho.used_bytes(), used);
}

/// L2.4.4.
#[test]
fn a_refusal_has_the_kernels_number() {
    let mut life = Life::first();
    assert_eq!(life.retrieve("a", 1).unwrap_err().errno(), Errno::ENOENT);
    life.session("a", &[1]);
    assert_eq!(life.retrieve("a", 1).unwrap_err().errno(), Errno::ENOENT, "outgoing");
}
