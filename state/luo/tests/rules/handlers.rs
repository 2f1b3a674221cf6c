//! Which handler is asked, and what it is told.

use std::sync::Arc;
use std::sync::Mutex;

use kho::CommitError;
use kho::Kho;
use tideover_luo::Compatible;
use tideover_luo::Context;
use tideover_luo::File;
use tideover_luo::FileId;
use tideover_luo::FinishError;
use tideover_luo::Finished;
use tideover_luo::Handler;
use tideover_luo::HandlerError;
use tideover_luo::Handlers;
use tideover_luo::Luo;
use tideover_luo::PreserveError;
use tideover_luo::PublishError;
use tideover_luo::RetrieveError;
use tideover_luo::SessionError;
use tideover_luo::SessionName;
use tideover_luo::Token;

use crate::recorder::Life;
use crate::recorder::name;

/// Verb and session of each call.
type Calls = Arc<Mutex<Vec<(&'static str, SessionName)>>>;

/// Takes every number up to its limit.
struct Numbers {
    kind: Compatible,
    limit: u64,
    calls: Calls,
}

impl Numbers {
    fn call(&self, verb: &'static str, context: &Context<'_>) {
        self.calls.lock().unwrap().push((verb, context.session));
    }
}

fn number(file: &File) -> Option<u64> {
    file.downcast_ref().copied()
}

impl Handler for Numbers {
    fn compatible(&self) -> Compatible {
        self.kind
    }

    fn can_preserve(&self, file: &File) -> bool {
        number(file).is_some_and(|number| number <= self.limit)
    }

    fn id(&self, _: &File) -> FileId {
        FileId::fresh()
    }

    fn preserve(&self, context: &mut Context<'_>, file: &File) -> Result<u64, HandlerError> {
        self.call("preserve", context);
        Ok(number(file).unwrap())
    }

    fn unpreserve(&self, context: &mut Context<'_>, _: &File, _: u64) {
        self.call("unpreserve", context);
    }

    fn freeze(&self, context: &mut Context<'_>, _: &File, data: u64) -> Result<u64, HandlerError> {
        self.call("freeze", context);
        Ok(data)
    }

    fn unfreeze(&self, context: &mut Context<'_>, _: &File, data: u64) -> u64 {
        self.call("unfreeze", context);
        data
    }

    fn retrieve(&self, context: &mut Context<'_>, data: u64) -> Result<File, HandlerError> {
        self.call("retrieve", context);
        Ok(Arc::new(data))
    }

    fn can_finish(&self, _: Option<&File>) -> bool {
        true
    }

    fn finish(&self, context: &mut Context<'_>, _: Option<&File>, _: u64) {
        self.call("finish", context);
    }
}

const ONE: Compatible = Compatible::literal("one-v1");
const OTHER: Compatible = Compatible::literal("other-v1");

fn handlers(kinds: &[(Compatible, u64)], calls: &Calls) -> Handlers {
    let mut handlers = Handlers::default();
    for (kind, limit) in kinds.iter().copied() {
        handlers.register(Numbers { kind, limit, calls: Arc::clone(calls) }).unwrap();
    }
    handlers
}

/// H3.1.2.
#[test]
fn of_two_handlers_that_take_a_file_the_first_registered_gets_it() {
    let kind = |kinds: &[(Compatible, u64)], file: u64| {
        let mut life = Life::first();
        let mut luo = Luo::new(handlers(kinds, &Calls::default()));
        luo.create_session(name("a")).unwrap();
        luo.preserve(&mut life.kho, name("a"), Token(1), Arc::new(file)).unwrap();
        luo.compatibles()
    };
    assert_eq!(kind(&[(ONE, 10), (OTHER, 10)], 7), [ONE]);
    assert_eq!(kind(&[(OTHER, 10), (ONE, 10)], 7), [OTHER]);
    assert_eq!(kind(&[(OTHER, 5), (ONE, 10)], 7), [ONE], "the first one that says yes");
}

/// H3.9.1.
#[test]
fn every_callback_is_told_the_session() {
    let calls = Calls::default();
    let seen = || std::mem::take(&mut *calls.lock().unwrap());
    let (a, b) = (name("a"), name("b"));
    let mut life = Life::first();
    let mut luo = Luo::new(handlers(&[(ONE, 10)], &calls));
    for session in [a, b] {
        luo.create_session(session).unwrap();
        // The same token and the same number: only the session tells them apart.
        luo.preserve(&mut life.kho, session, Token(1), Arc::new(7_u64)).unwrap();
    }
    assert_eq!(seen(), [("preserve", a), ("preserve", b)]);
    luo.freeze(&mut life.kho).unwrap();
    luo.unfreeze(&mut life.kho);
    assert_eq!(seen(), [("freeze", a), ("freeze", b), ("unfreeze", b), ("unfreeze", a)]);
    luo.publish(&mut life.kho).unwrap();
    luo.drop_session(&mut life.kho, b).unwrap();
    assert_eq!(seen(), [("unpreserve", b)]);

    let mut kho = life.arena.attach();
    let mut luo = Luo::attach(&mut kho, handlers(&[(ONE, 10)], &calls)).unwrap();
    for session in [b, a] {
        luo.retrieve(&mut kho, session, Token(1)).unwrap();
        luo.finish(&mut kho, session).unwrap();
    }
    assert_eq!(seen(), [("retrieve", b), ("finish", b), ("retrieve", a), ("finish", a)]);
}

/// The callbacks of a trait, as they stand in its source.
fn callbacks(source: &str, name: &str) -> Vec<String> {
    let (_, rest) = source.split_once(&format!("pub trait {name}")).unwrap();
    let (body, _) = rest.split_once("\n}").unwrap();
    let items =
        body.lines().map(str::trim).filter(|line| !line.starts_with("//")).collect::<Vec<_>>().join(" ");
    items.split("fn ").skip(1).map(str::to_owned).collect()
}

/// H3.1.1, H3.8.7. What a kernel refuses when it is registered does not compile.
#[test]
fn no_callback_has_a_default_that_one_could_forget_to_write() {
    let handler = callbacks(include_str!("../../src/handler.rs"), "Handler");
    let shared = callbacks(include_str!("../../src/shared.rs"), "SharedObject");
    assert_eq!((handler.len(), shared.len()), (10, 5), "{handler:?} {shared:?}");
    for callback in handler.iter().chain(&shared) {
        assert!(callback.trim_end().ends_with(';') && !callback.contains('{'), "{callback}");
    }
}

/// H3.7.1, L2.4.8. If one of these could be called by two at once, this would not compile.
#[test]
fn who_changes_anything_has_sessions_and_arena_to_himself() {
    let _: fn(&mut Luo, SessionName) -> Result<(), SessionError> = Luo::create_session;
    let _: fn(&mut Luo, &mut Kho, SessionName, Token, File) -> Result<(), PreserveError> = Luo::preserve;
    let _: fn(&mut Luo, &mut Kho, SessionName) -> Result<(), SessionError> = Luo::drop_session;
    let _: fn(&mut Luo, &mut Kho) -> Result<(), PreserveError> = Luo::freeze;
    let _: fn(&mut Luo, &mut Kho) = Luo::unfreeze;
    let _: fn(&mut Luo, &mut Kho) -> Result<(), PublishError> = Luo::publish;
    let _: fn(&mut Luo, &mut Kho, SessionName, Token) -> Result<File, RetrieveError> = Luo::retrieve;
    let _: fn(&mut Luo, &mut Kho, SessionName) -> Result<Finished, FinishError> = Luo::finish;
    let _: fn(&mut Kho) -> Result<(), CommitError> = Kho::commit;
    fn goes_to_another_thread_whole<T: Send>() {}
    goes_to_another_thread_whole::<(Luo, Kho)>();
}
