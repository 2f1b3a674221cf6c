//! Whatever was done in whatever order: a life that starts now finds what was published last.

use std::sync::Arc;

use abi::block;
use abi::luo::FileSer;
use abi::luo::SessionSer;
use proptest::prelude::*;
use tideover_luo::Errno;
use tideover_luo::File;
use tideover_luo::FinishError;
use tideover_luo::Luo;
use tideover_luo::PublishError;
use tideover_luo::SessionError;
use tideover_luo::SessionName;
use tideover_luo::Token;

use crate::recorder::Arena;
use crate::recorder::Life;
use crate::recorder::Record;
use crate::recorder::THING;
use crate::recorder::Thing;
use crate::recorder::handlers;
use crate::recorder::name;
use crate::recorder::published;
use crate::recorder::thing;

const NAMES: [&str; 3] = ["a", "b", "c"];

/// An operation. Sessions and tokens come from small sets, so that they meet.
#[derive(Debug, Clone)]
enum Op {
    Create(&'static str),
    /// Preserves a new file, or one that this life has seen.
    Preserve {
        session: &'static str,
        token: u64,
        known: Option<usize>,
        refuse: bool,
    },
    Drop(&'static str),
    Freeze {
        refuse_at: usize,
    },
    Unfreeze,
    Retrieve {
        session: &'static str,
        token: u64,
        refuse: bool,
    },
    Finish {
        session: &'static str,
        refuse_at: usize,
    },
    Publish,
    Crash,
}

fn op() -> impl Strategy<Value = Op> {
    let session = || proptest::sample::select(NAMES.as_slice());
    let rarely = || proptest::bool::weighted(0.2);
    let token = 0..3u64;
    prop_oneof![
        3 => session().prop_map(Op::Create),
        10 => (session(), token.clone(), proptest::option::of(any::<usize>()), rarely())
            .prop_map(|(session, token, known, refuse)| Op::Preserve { session, token, known, refuse }),
        1 => session().prop_map(Op::Drop),
        2 => (1..12usize).prop_map(|refuse_at| Op::Freeze { refuse_at }),
        1 => Just(Op::Unfreeze),
        10 => (session(), token, rarely())
            .prop_map(|(session, token, refuse)| Op::Retrieve { session, token, refuse }),
        3 => (session(), 1..8usize).prop_map(|(session, refuse_at)| Op::Finish { session, refuse_at }),
        5 => Just(Op::Publish),
        2 => Just(Op::Crash),
    ]
}

#[derive(Debug, Clone)]
enum Seen {
    No,
    File(File),
    Failed,
}

/// A file of a session, outgoing or incoming.
#[derive(Debug, Clone)]
struct Kept {
    token: u64,
    number: u64,
    version: u64,
    /// Frames of its records.
    frames: u64,
    frozen: bool,
    /// The value: what was preserved, or retrieved.
    seen: Seen,
}

type Session = (&'static str, Vec<Kept>);

/// What a session looks like from outside: name; token, number and version of each file.
type Shape = Vec<(SessionName, Vec<(u64, u64, u64)>)>;

fn shape<'a>(sessions: impl IntoIterator<Item = &'a Session>) -> Shape {
    let file = |file: &Kept| (file.token, file.number, file.version);
    sessions.into_iter().map(|(session, files)| (name(session), files.iter().map(file).collect())).collect()
}

/// The rules once more, over vectors.
#[derive(Debug)]
struct Model {
    outgoing: Vec<Session>,
    incoming: Vec<Session>,
    finished: Vec<&'static str>,
    /// Values that this life has seen.
    known: Vec<File>,
    number: u64,
    next_file: u64,
    published: Option<(u64, Vec<Session>)>,
}

fn find<'a>(sessions: &'a mut [Session], session: &str) -> Option<&'a mut Vec<Kept>> {
    sessions.iter_mut().find(|(name, _)| *name == session).map(|(_, files)| files)
}

fn unfreeze(files: &mut [Kept]) {
    for file in files.iter_mut().filter(|file| file.frozen) {
        (file.frozen, file.version, file.frames) = (false, file.version - 1, file.frames - 1);
    }
}

impl Model {
    fn new() -> Self {
        Self {
            outgoing: Vec::new(),
            incoming: Vec::new(),
            finished: Vec::new(),
            known: Vec::new(),
            number: 1,
            next_file: 1,
            published: None,
        }
    }

    fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.incoming.iter().chain(&self.outgoing)
    }

    fn holds(&self, value: &File) -> bool {
        let mut files = self.sessions().flat_map(|(_, files)| files);
        files.any(|file| matches!(&file.seen, Seen::File(other) if Arc::ptr_eq(other, value)))
    }

    fn preserve(
        &mut self,
        life: &mut Life,
        session: &'static str,
        token: u64,
        known: Option<usize>,
        refuse: bool,
    ) {
        let known = known.filter(|_| !self.known.is_empty()).map(|index| index % self.known.len());
        let value = known.map_or_else(|| thing(self.next_file), |index| Arc::clone(&self.known[index]));
        self.next_file += 1;
        let held = self.holds(&value);
        if refuse {
            life.script.refuse("preserve", 1);
        }
        let result = life.preserve(session, token, &value).map_err(|error| error.errno());
        life.script.relent();
        let Some(files) = find(&mut self.outgoing, session) else {
            return assert_eq!(result, Err(Errno::ENOENT));
        };
        if files.iter().any(|file| file.token == token) {
            return assert_eq!(result, Err(Errno::EEXIST));
        }
        if held {
            return assert_eq!(result, Err(Errno::EBUSY));
        }
        if refuse {
            return assert_eq!(result, Err(Errno::EOPNOTSUPP));
        }
        assert_eq!(result, Ok(()));
        let Thing { number, version, .. } = *Thing::of(&value);
        let seen = Seen::File(Arc::clone(&value));
        files.push(Kept { token, number, version, frames: 1, frozen: false, seen });
        self.known.push(value);
    }

    fn freeze(&mut self, life: &mut Life, refuse_at: usize) {
        life.script.refuse("freeze", refuse_at);
        let result = life.freeze();
        life.script.relent();
        let files = || self.outgoing.iter().flat_map(|(_, files)| files);
        let refused = refuse_at <= files().filter(|file| !file.frozen).count();
        assert_eq!(result.is_err(), refused);
        if refused {
            return self.outgoing.iter_mut().for_each(|(_, files)| unfreeze(files));
        }
        for file in self.outgoing.iter_mut().flat_map(|(_, files)| files).filter(|file| !file.frozen) {
            (file.frozen, file.version, file.frames) = (true, file.version + 1, file.frames + 1);
        }
    }

    fn retrieve(&mut self, life: &mut Life, session: &'static str, token: u64, refuse: bool) {
        if refuse {
            life.script.refuse("retrieve", 1);
        }
        let result = life.retrieve(session, token).map_err(|error| error.errno());
        life.script.relent();
        let files = find(&mut self.incoming, session);
        let Some(file) = files.and_then(|files| files.iter_mut().find(|file| file.token == token)) else {
            return assert_eq!(result.err(), Some(Errno::ENOENT));
        };
        match &file.seen {
            Seen::File(value) => assert!(Arc::ptr_eq(value, &result.unwrap())),
            Seen::Failed => assert_eq!(result.err(), Some(Errno::EOPNOTSUPP)),
            Seen::No if refuse => {
                assert_eq!(result.err(), Some(Errno::EOPNOTSUPP));
                file.seen = Seen::Failed;
            }
            Seen::No => {
                let value = result.unwrap();
                let Thing { number, version, .. } = *Thing::of(&value);
                assert_eq!((number, version), (file.number, file.version));
                file.seen = Seen::File(Arc::clone(&value));
                self.known.push(value);
            }
        }
    }

    fn finish(&mut self, life: &mut Life, session: &'static str, refuse_at: usize) {
        life.script.refuse("can_finish", refuse_at);
        let result = life.finish(session);
        life.script.relent();
        let Some(files) = find(&mut self.incoming, session) else {
            let expected = match self.finished.contains(&session) {
                true => Ok(Vec::new()),
                false => Err(FinishError::UnknownSession { session: name(session) }),
            };
            return assert_eq!(result.map(|finished| finished.unclaimed), expected);
        };
        if let Some(file) = files.get(refuse_at - 1) {
            let busy =
                FinishError::Busy { session: name(session), token: Token(file.token), compatible: THING };
            return assert_eq!(result, Err(busy));
        }
        let unclaimed = files.iter().filter(|file| !matches!(file.seen, Seen::File(_)));
        let unclaimed: Vec<Token> = unclaimed.map(|file| Token(file.token)).collect();
        assert_eq!(result.unwrap().unclaimed, unclaimed);
        self.incoming.retain(|(other, _)| *other != session);
        self.finished.push(session);
    }

    fn publish(&mut self, life: &mut Life, empty: u64) {
        let result = life.luo.publish(&mut life.kho);
        let clash = self.outgoing.iter().find(|(own, _)| self.incoming.iter().any(|(other, _)| other == own));
        if let Some((clash, _)) = clash {
            let unfinished = |error: &PublishError| matches!(error, PublishError::Unfinished { session } if *session == name(clash));
            return assert!(result.is_err_and(|error| unfinished(&error)));
        }
        result.unwrap();
        self.published = Some((self.number, self.sessions().cloned().collect()));
        // Not a frame is lost.
        let files = |files: &Vec<Kept>| files.iter().map(|file| file.frames).sum::<u64>();
        let records: u64 = self.sessions().map(|(_, list)| files(list)).sum();
        let lists: usize = self.sessions().map(|(_, files)| block::blocks::<FileSer>(files.len())).sum();
        let blocks = lists + block::blocks::<SessionSer>(self.sessions().count());
        assert_eq!(life.kho.used_bytes(), empty + (records + blocks as u64) * 4096);
    }

    /// The process is gone; what was published is there.
    fn crash(&mut self, life: Life) -> Life {
        let arena = life.arena.clone();
        drop(life);
        self.outgoing.clear();
        self.finished.clear();
        self.known.clear();
        let Some((number, sessions)) = &self.published else {
            let life = Life::again(arena);
            self.incoming.clear();
            self.number = 1;
            return life;
        };
        self.number = number + 1;
        self.incoming.clone_from(sessions);
        for file in self.incoming.iter_mut().flat_map(|(_, files)| files) {
            (file.frozen, file.seen) = (false, Seen::No);
        }
        arena.next_life()
    }

    fn apply(&mut self, mut life: Life, op: &Op, empty: u64) -> Life {
        match *op {
            Op::Create(session) => {
                let result = life.luo.create_session(name(session));
                let exists = Err(SessionError::Exists { session: name(session) });
                match find(&mut self.outgoing, session) {
                    Some(_) => assert_eq!(result, exists),
                    None => self.outgoing.push((session, Vec::new())),
                }
            }
            Op::Preserve { session, token, known, refuse } => {
                self.preserve(&mut life, session, token, known, refuse);
            }
            Op::Drop(session) => {
                let result = life.luo.drop_session(&mut life.kho, name(session));
                assert_eq!(result.is_ok(), find(&mut self.outgoing, session).is_some());
                self.outgoing.retain(|(other, _)| *other != session);
            }
            Op::Freeze { refuse_at } => self.freeze(&mut life, refuse_at),
            Op::Unfreeze => {
                life.unfreeze();
                self.outgoing.iter_mut().for_each(|(_, files)| unfreeze(files));
            }
            Op::Retrieve { session, token, refuse } => self.retrieve(&mut life, session, token, refuse),
            Op::Finish { session, refuse_at } => self.finish(&mut life, session, refuse_at),
            Op::Publish => self.publish(&mut life, empty),
            Op::Crash => return self.crash(life),
        }
        life
    }

    /// A look from outside: what would a life that starts now find, and what does this one say of itself?
    fn check(&self, life: &Life) {
        let names =
            |sessions: &[Session]| sessions.iter().map(|(session, _)| name(session)).collect::<Vec<_>>();
        assert_eq!(life.incoming(), names(&self.incoming));
        assert_eq!(life.luo.outgoing_sessions().collect::<Vec<_>>(), names(&self.outgoing));
        assert_eq!(life.luo.number(), self.number);
        let found = found(&life.arena);
        let expected = self.published.as_ref().map(|(number, sessions)| (*number, shape(sessions)));
        assert_eq!(found, expected);
    }
}

/// Number and sessions that a life finds that attaches now, records included.
fn found(arena: &Arena) -> Option<(u64, Shape)> {
    let mut kho = arena.attach();
    let luo = Luo::attach(&mut kho, handlers(&Default::default())).ok()?;
    let wire = published(&kho);
    assert_eq!(luo.number(), wire.liveupdate_num + 1);
    let file = |file: &abi::luo::File| {
        let Record { number, version, .. } = Record::read(&kho, file.data);
        (file.token, number, version)
    };
    let session =
        |session: &abi::luo::Session| (session.name, session.files.iter().map(file).collect::<Vec<_>>());
    Some((wire.liveupdate_num, wire.sessions.iter().map(session).collect()))
}

proptest! {
    /// L2.7.2, H3.2.2, H3.5.3.
    #[test]
    fn a_crash_after_any_operation_finds_what_was_published_last(ops in proptest::collection::vec(op(), 1..120)) {
        let mut life = Life::first();
        let mut model = Model::new();
        let empty = {
            let mut other = Life::first();
            other.publish();
            other.kho.used_bytes()
        };
        for op in &ops {
            life = model.apply(life, op, empty);
            model.check(&life);
        }
        // With all sessions gone, the arena is as small as with none ever made.
        for session in NAMES {
            let _ = life.luo.drop_session(&mut life.kho, name(session));
            let _ = life.finish(session);
        }
        life.publish();
        prop_assert_eq!(life.kho.used_bytes(), empty);
        let life = life.then();
        prop_assert!(life.incoming().is_empty());
        prop_assert_eq!(life.kho.used_bytes(), empty);
    }
}
