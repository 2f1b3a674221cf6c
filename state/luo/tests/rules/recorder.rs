//! A handler that writes down its calls and refuses when it is told to, and an arena in a vector.

use std::sync::Arc;
use std::sync::Mutex;

use abi::Memory;
use abi::MemoryMut;
use abi::NoMemory;
use abi::kho::SubtreeName;
use abi::vm::Identity;
use kho::Kho;
use pages::PageRange;
use tideover_luo::Compatible;
use tideover_luo::Context;
use tideover_luo::Errno;
use tideover_luo::File;
use tideover_luo::FileId;
use tideover_luo::FinishError;
use tideover_luo::Finished;
use tideover_luo::Handler;
use tideover_luo::HandlerError;
use tideover_luo::Handlers;
use tideover_luo::Luo;
use tideover_luo::PreserveError;
use tideover_luo::RetrieveError;
use tideover_luo::SessionName;
use tideover_luo::Token;

/// Keeps a record in the arena.
pub(crate) const THING: Compatible = Compatible::literal("thing-v1");
/// Keeps its number in `data`.
pub(crate) const BARE: Compatible = Compatible::literal("bare-v1");

/// Frames of region 0, where a test does not say otherwise.
pub(crate) const FRAMES: u64 = 512;

/// A file: a number, and how often it was frozen.
#[derive(Debug)]
pub(crate) struct Thing {
    pub(crate) number: u64,
    pub(crate) version: u64,
    kind: Compatible,
    id: FileId,
}

impl Thing {
    fn make(kind: Compatible, number: u64, version: u64) -> File {
        Arc::new(Self { number, version, kind, id: FileId::fresh() })
    }

    pub(crate) fn of(file: &File) -> &Self {
        file.downcast_ref().expect("a thing")
    }
}

pub(crate) fn thing(number: u64) -> File {
    Thing::make(THING, number, 0)
}

pub(crate) fn bare(number: u64) -> File {
    Thing::make(BARE, number, 0)
}

/// A file of no handler's kind.
pub(crate) fn stranger() -> File {
    Arc::new("a stranger")
}

#[derive(Debug, Default)]
struct Lines {
    log: Vec<String>,
    /// Verb, and how many calls of it until the one that refuses.
    refusals: Vec<(&'static str, usize)>,
    /// What refusals say, if not EOPNOTSUPP.
    errno: Option<Errno>,
}

/// What was called, and what will refuse.
#[derive(Debug, Clone, Default)]
pub(crate) struct Script(Arc<Mutex<Lines>>);

impl Script {
    /// Makes the `nth` call of a verb from now on refuse; the next one is 1.
    pub(crate) fn refuse(&self, verb: &'static str, nth: usize) {
        self.0.lock().unwrap().refusals.push((verb, nth));
    }

    /// Makes all refusals from now on give this error.
    pub(crate) fn refuse_with(&self, errno: Errno) {
        self.0.lock().unwrap().errno = Some(errno);
    }

    /// Forgets refusals that did not happen.
    pub(crate) fn relent(&self) {
        self.0.lock().unwrap().refusals.clear();
    }

    /// The calls since the last look, but for `can_preserve`.
    pub(crate) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().log)
    }

    /// True if this call refuses.
    pub(crate) fn call(&self, verb: &'static str, number: u64) -> bool {
        let mut lines = self.0.lock().unwrap();
        if verb != "can_preserve" {
            lines.log.push(format!("{verb} {number}"));
        }
        let mut refuses = false;
        lines.refusals.retain_mut(|(other, left)| {
            *left -= usize::from(*other == verb);
            refuses |= *left == 0;
            *left > 0
        });
        refuses
    }

    pub(crate) fn refused(&self, verb: &'static str, number: u64) -> Result<(), HandlerError> {
        match self.call(verb, number) {
            true => {
                let errno = self.0.lock().unwrap().errno.unwrap_or(Errno::EOPNOTSUPP);
                Err(HandlerError::new(errno, "told to refuse"))
            }
            false => Ok(()),
        }
    }
}

/// What a [`THING`] keeps: number, version, and the record that the last freeze replaced (0 for none).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) number: u64,
    pub(crate) version: u64,
    before: u64,
}

impl Record {
    pub(crate) fn read(kho: &Kho, address: u64) -> Self {
        let word = |index: u64| {
            let mut bytes = [0; 8];
            kho.memory().read(address + 8 * index, &mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        Self { number: word(0), version: word(1), before: word(2) }
    }

    fn write(&self, kho: &mut Kho) -> Result<u64, HandlerError> {
        let words = [self.number, self.version, self.before].map(u64::to_le_bytes);
        let no_room = |error| HandlerError::new(Errno::ENOMEM, error);
        Ok(kho.store(words.as_flattened()).map_err(no_room)?.start().address())
    }
}

pub(crate) fn free(kho: &mut Kho, address: u64) {
    kho.free(PageRange::of_bytes(address, 4096).unwrap());
}

#[derive(Debug)]
struct Recorder {
    kind: Compatible,
    script: Script,
}

impl Recorder {
    fn record(&self, kho: &Kho, data: u64) -> Record {
        if self.kind == THING {
            Record::read(kho, data)
        } else {
            Record { number: data, version: 0, before: 0 }
        }
    }

    fn free_all(&self, kho: &mut Kho, mut data: u64) {
        while self.kind == THING && data != 0 {
            let record = Record::read(kho, data);
            free(kho, data);
            data = record.before;
        }
    }
}

impl Handler for Recorder {
    fn compatible(&self) -> Compatible {
        self.kind
    }

    fn can_preserve(&self, file: &File) -> bool {
        let ours = file.downcast_ref::<Thing>().filter(|thing| thing.kind == self.kind);
        ours.is_some_and(|thing| !self.script.call("can_preserve", thing.number))
    }

    fn id(&self, file: &File) -> FileId {
        Thing::of(file).id
    }

    fn preserve(&self, context: &mut Context<'_>, file: &File) -> Result<u64, HandlerError> {
        let Thing { number, version, .. } = *Thing::of(file);
        if self.kind == BARE {
            return self.script.refused("preserve", number).map(|()| number);
        }
        let data = Record { number, version, before: 0 }.write(context.kho)?;
        self.script.refused("preserve", number).inspect_err(|_| free(context.kho, data))?;
        Ok(data)
    }

    fn unpreserve(&self, context: &mut Context<'_>, file: &File, data: u64) {
        assert_eq!(self.record(context.kho, data).number, Thing::of(file).number);
        self.script.call("unpreserve", Thing::of(file).number);
        self.free_all(context.kho, data);
    }

    fn freeze(&self, context: &mut Context<'_>, file: &File, data: u64) -> Result<u64, HandlerError> {
        self.script.refused("freeze", Thing::of(file).number)?;
        if self.kind == BARE {
            return Ok(data);
        }
        let old = Record::read(context.kho, data);
        Record { version: old.version + 1, before: data, ..old }.write(context.kho)
    }

    fn unfreeze(&self, context: &mut Context<'_>, file: &File, data: u64) -> u64 {
        self.script.call("unfreeze", Thing::of(file).number);
        if self.kind == BARE {
            return data;
        }
        let before = Record::read(context.kho, data).before;
        free(context.kho, data);
        before
    }

    fn retrieve(&self, context: &mut Context<'_>, data: u64) -> Result<File, HandlerError> {
        let record = self.record(context.kho, data);
        self.script.refused("retrieve", record.number)?;
        Ok(Thing::make(self.kind, record.number, record.version))
    }

    fn can_finish(&self, file: Option<&File>) -> bool {
        !self.script.call("can_finish", file.map_or(0, |file| Thing::of(file).number))
    }

    fn finish(&self, context: &mut Context<'_>, file: Option<&File>, data: u64) {
        let number = self.record(context.kho, data).number;
        assert!(file.is_none_or(|file| Thing::of(file).number == number));
        self.script.call(if file.is_some() { "finish" } else { "destroy" }, number);
        self.free_all(context.kho, data);
    }
}

pub(crate) fn recorder(kind: Compatible, script: &Script) -> impl Handler + 'static {
    Recorder { kind, script: script.clone() }
}

/// Handlers of both kinds; that of `THING` is asked first.
pub(crate) fn handlers(script: &Script) -> Handlers {
    let mut handlers = Handlers::default();
    handlers.register(recorder(THING, script)).unwrap();
    handlers.register(recorder(BARE, script)).unwrap();
    handlers
}

/// Memory that outlives the life that writes it.
#[derive(Debug, Clone)]
pub(crate) struct Arena(Arc<Mutex<Vec<u8>>>);

impl Memory for Arena {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        self.0.lock().unwrap().read(address, into)
    }

    /// Region 0, and guest memory up to 4 TiB in which there are no bytes.
    fn runs(&self) -> Vec<PageRange> {
        let guest = PageRange::of_bytes(1 << 32, (1 << 42) - (1 << 32)).unwrap();
        self.0.lock().unwrap().runs().into_iter().chain([guest]).collect()
    }
}

impl MemoryMut for Arena {
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), NoMemory> {
        self.0.lock().unwrap().write(address, bytes)
    }

    fn order_writes(&mut self) {}
}

impl Arena {
    pub(crate) fn new(frames: u64) -> Self {
        Self(Arc::new(Mutex::new(vec![0; usize::try_from(frames * 4096).unwrap()])))
    }

    /// The memory as it is now, for a life that shall not disturb the one that runs.
    pub(crate) fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(self.0.lock().unwrap().clone())))
    }

    /// What a process finds that attaches now, whoever else is there. Nothing is written.
    pub(crate) fn attach(&self) -> Kho {
        Kho::attach(Box::new(self.clone())).unwrap()
    }

    /// A later life, after a crash or a hand-over: it has the memory and nothing else.
    pub(crate) fn next_life(&self) -> Life {
        let script = Script::default();
        let mut kho = self.attach();
        let luo = Luo::attach(&mut kho, handlers(&script)).unwrap();
        Life { arena: self.clone(), kho, luo, script }
    }
}

/// The LUO state in an arena's published tree, as `abi` reads it.
pub(crate) fn published(kho: &Kho) -> abi::luo::Luo {
    let subtree = kho.subtree(&SubtreeName::literal(abi::luo::SUBTREE)).expect("published");
    abi::luo::Luo::read(&kho.memory(), subtree.data, subtree.size).unwrap()
}

/// One process.
#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) arena: Arena,
    pub(crate) kho: Kho,
    pub(crate) luo: Luo,
    pub(crate) script: Script,
}

pub(crate) fn name(text: &str) -> SessionName {
    SessionName::new(text.as_bytes()).unwrap()
}

impl Life {
    pub(crate) fn first() -> Self {
        Self::with_frames(FRAMES)
    }

    pub(crate) fn with_frames(frames: u64) -> Self {
        let arena = Arena::new(frames);
        let kho = Kho::format(Box::new(arena.clone()), Identity::new([9; 16]), frames).unwrap();
        Self::without_sessions(arena, kho)
    }

    /// A later life of an arena that has no sessions yet.
    pub(crate) fn again(arena: Arena) -> Self {
        let kho = arena.attach();
        Self::without_sessions(arena, kho)
    }

    fn without_sessions(arena: Arena, kho: Kho) -> Self {
        let script = Script::default();
        Self { arena, kho, luo: Luo::new(handlers(&script)), script }
    }

    /// This life ends here; the next one has the memory and nothing else.
    pub(crate) fn then(self) -> Self {
        let arena = self.arena.clone();
        drop(self);
        arena.next_life()
    }

    pub(crate) fn create(&mut self, session: &str) {
        self.luo.create_session(name(session)).unwrap();
    }

    pub(crate) fn preserve(&mut self, session: &str, token: u64, file: &File) -> Result<(), PreserveError> {
        self.luo.preserve(&mut self.kho, name(session), Token(token), Arc::clone(file))
    }

    /// Makes a session of things, each under its number.
    pub(crate) fn session(&mut self, session: &str, numbers: &[u64]) {
        self.create(session);
        for number in numbers {
            self.preserve(session, *number, &thing(*number)).unwrap();
        }
    }

    pub(crate) fn drop_session(&mut self, session: &str) {
        self.luo.drop_session(&mut self.kho, name(session)).unwrap();
    }

    pub(crate) fn freeze(&mut self) -> Result<(), PreserveError> {
        self.luo.freeze(&mut self.kho)
    }

    pub(crate) fn unfreeze(&mut self) {
        self.luo.unfreeze(&mut self.kho);
    }

    pub(crate) fn publish(&mut self) {
        self.luo.publish(&mut self.kho).unwrap();
    }

    pub(crate) fn retrieve(&mut self, session: &str, token: u64) -> Result<File, RetrieveError> {
        self.luo.retrieve(&mut self.kho, name(session), Token(token))
    }

    pub(crate) fn finish(&mut self, session: &str) -> Result<Finished, FinishError> {
        self.luo.finish(&mut self.kho, name(session))
    }

    pub(crate) fn incoming(&self) -> Vec<SessionName> {
        self.luo.incoming_sessions().collect()
    }

    pub(crate) fn tokens(&self, session: &str) -> Vec<u64> {
        self.luo.tokens(name(session)).map(|token| token.0).collect()
    }
}
