//! Sessions of preserved files, by the rules of Linux's Live Update Orchestrator.
//!
//! A *session* is a named set of *files*; a *token* names a file in it; a [`Handler`] preserves one kind of
//! file. An *outgoing* session is what this life hands over, an *incoming* one is what it received. What a
//! file is here: any value that a handler knows, behind an [`Arc`]. What many files need together is a [`SharedObject`].
//!
//! [`Luo`] keeps the rules (`docs/requirements.md`, those with L and H): the order of checks, of callbacks and of
//! rollback, sticky retrieve errors, finish in two phases. Its state is published into an arena by
//! [`Luo::publish`], in the kernel's `luo-v5` format. Unlike a kernel, which writes it only inside kexec, it
//! can be published at any time: what a session keeps is then standing, and is found after a crash.
//!
//! Not here: what a file's own record looks like (its handler), how it gets to another process (carriers).
#![forbid(unsafe_code)]

mod handler;
mod incoming;
mod ordered;
mod outgoing;
mod shared;

use std::any::Any;
use std::collections::HashMap;
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use abi::Malformed;
use abi::block;
use abi::flb;
use abi::flb::Flb;
use abi::kho::Subtree;
use abi::kho::SubtreeName;
use abi::luo as wire;
pub use abi::luo::Compatible;
pub use abi::luo::SessionName;
pub use handler::Context;
pub use handler::Errno;
pub use handler::Handler;
pub use handler::HandlerError;
pub use handler::Handlers;
pub use handler::RegisterError;
pub use incoming::FinishError;
pub use incoming::Finished;
use incoming::Incoming;
pub use incoming::RetrieveError;
use kho::CommitError;
use kho::Kho;
use kho::StoreError;
use ordered::Ordered;
use outgoing::Outgoing;
pub use outgoing::PreserveError;
pub use outgoing::SessionError;
use pages::PAGE_SIZE;
use pages::PageRange;
pub use shared::Hold;
pub use shared::Object;
use shared::Pool;
pub use shared::ShareError;
pub use shared::SharedError;
pub use shared::SharedObject;
use thiserror::Error;
use zerocopy::IntoBytes;

/// A file: any value that a handler knows.
pub type File = Arc<dyn Any + Send + Sync>;

/// Name of the KHO subtree.
const SUBTREE: SubtreeName = SubtreeName::literal(wire::SUBTREE);

/// Names a file within its session. Any number is legal, 0 included.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "token {:#x}", self.0)
    }
}

/// Says which files are the same thing: of one, only one view can be preserved (objection O1.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(u64);

impl FileId {
    /// An identity that nothing else in this process has, or ever had.
    pub fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Why the state could not be taken over.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The arena has no LUO state.
    #[error("the arena holds no sessions")]
    Missing,
    /// It is not what it should be.
    #[error("the arena's sessions cannot be read")]
    Malformed(#[source] Malformed),
    /// A file's kind is not known here.
    #[error("no handler for {compatible} (session {session}, {token:?})")]
    UnknownHandler {
        /// The session.
        session: SessionName,
        /// The file.
        token: Token,
        /// Its kind.
        compatible: Compatible,
    },
    /// An object that files share is not known here.
    #[error("no shared object {object} is registered")]
    UnknownShared {
        /// Its name.
        object: Compatible,
    },
}

impl AttachError {
    /// The kernel's error number: what the first open of its device answers, where it does not stop the boot.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Missing => Errno::ENOENT,
            Self::Malformed(_) | Self::UnknownHandler { .. } | Self::UnknownShared { .. } => Errno::EIO,
        }
    }
}

/// Why the state could not be published. What was published before still is.
#[derive(Debug, Error)]
pub enum PublishError {
    /// An incoming session is not finished, and an outgoing one has its name.
    #[error("session {session} was received and is not finished yet: its name is taken")]
    Unfinished {
        /// The session.
        session: SessionName,
    },
    /// A shared object was received and is not finished, and another one of its name is preserved.
    #[error("shared object {object} was received and is not finished yet: its name is taken")]
    UnfinishedShared {
        /// The object.
        object: Compatible,
    },
    /// No room.
    #[error("cannot keep the sessions")]
    Store(#[source] StoreError),
    /// The switch failed.
    #[error("cannot publish the sessions")]
    Commit(#[source] CommitError),
}

impl PublishError {
    /// The kernel's error number for a like refusal: what its serialisation inside reboot(2) answers.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Unfinished { .. } | Self::UnfinishedShared { .. } => Errno::EBUSY,
            Self::Store(_) | Self::Commit(_) => Errno::ENOMEM,
        }
    }
}

/// The sessions of one arena.
pub struct Luo {
    handlers: Handlers,
    shared: Pool,
    number: u64,
    outgoing: Ordered<SessionName, Outgoing>,
    /// What was received and is not finished.
    incoming: Ordered<SessionName, Incoming>,
    finished: HashSet<SessionName>,
    /// What is preserved, or retrieved and not finished: a second time is refused.
    held: HashMap<FileId, (SessionName, Token)>,
    /// Frames that the published state lies in.
    pages: Vec<PageRange>,
}

/// All that it knows, in an order that does not change by itself.
impl fmt::Debug for Luo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { handlers, shared, number, outgoing, incoming, finished, held, pages } = self;
        let (mut finished, mut held) = (Vec::from_iter(finished), Vec::from_iter(held));
        finished.sort_unstable();
        held.sort_unstable();
        f.debug_struct("Luo")
            .field("handlers", handlers)
            .field("shared", shared)
            .field("number", number)
            .field("outgoing", outgoing)
            .field("incoming", incoming)
            .field("finished", &finished)
            .field("held", &held)
            .field("pages", pages)
            .finish()
    }
}

impl Luo {
    /// No sessions: the first life of an arena.
    pub fn new(handlers: Handlers) -> Self {
        Self {
            shared: Pool::new(&handlers),
            handlers,
            number: 1,
            outgoing: Ordered::default(),
            incoming: Ordered::default(),
            finished: HashSet::new(),
            held: HashMap::new(),
            pages: Vec::new(),
        }
    }

    /// Takes over what the life before published: its sessions are incoming here. Their pages are
    /// [adopted](Kho::adopt); the files' own structures are so once they are retrieved.
    ///
    /// # Errors
    /// [`AttachError`] if there is none, it is malformed, or a file is of an unknown kind.
    pub fn attach(kho: &mut Kho, handlers: Handlers) -> Result<Self, AttachError> {
        let subtree = kho.subtree(&SUBTREE).ok_or(AttachError::Missing)?;
        let read =
            wire::Luo::read(&kho.memory(), subtree.data, subtree.size).map_err(AttachError::Malformed)?;
        let page = |address: &u64| PageRange::of_bytes(*address, PAGE_SIZE).ok();
        let pages: Vec<PageRange> = read.pages.iter().filter_map(page).collect();
        let incoming =
            read.sessions.iter().map(|session| Ok((session.name, Incoming::new(session, &handlers)?)));
        let incoming: Ordered<SessionName, Incoming> = incoming.collect::<Result<_, _>>()?;
        let mut shared = Pool::new(&handlers);
        let files = incoming.iter().flat_map(|session| session.files.iter());
        let needs = files.map(|file| Arc::clone(&file.kind.needs));
        shared.receive(&read.flbs, needs).map_err(|object| AttachError::UnknownShared { object })?;
        // Last, so that who fails above can try again. The first is the subtree's own.
        kho.adopt_all(wire::COMPATIBLE, pages.get(1..).unwrap_or_default())
            .map_err(AttachError::Malformed)?;
        // "Each next one writes what it received and 1."
        let number = read.liveupdate_num.wrapping_add(1);
        Ok(Self { number, incoming, pages, shared, ..Self::new(handlers) })
    }

    /// Number of the update that this life prepares: 1 in the first life.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The [shared object](SharedObject) of this name that this life preserves, and a hold on it: it stays preserved until
    /// the hold is given back, even if no file needs it any more.
    ///
    /// # Errors
    /// [`SharedError`] if it is not preserved.
    pub fn hold_shared(&mut self, object: &Compatible) -> Result<Hold, SharedError> {
        self.shared.hold(object)
    }

    /// Gives a hold back. If it was the last that kept the object, the object is unpreserved.
    pub fn release_shared(&mut self, kho: &mut Kho, hold: Hold) {
        self.shared.release(kho, &hold);
    }

    /// The [shared object](SharedObject) of this name that was received. It is retrieved when it is first asked for; who
    /// has it keeps the value, also when the object is finished.
    ///
    /// # Errors
    /// [`SharedError`] if it was not received, is finished, or could not be retrieved, now or at the first try.
    pub fn retrieve_shared(&mut self, kho: &mut Kho, object: &Compatible) -> Result<Object, SharedError> {
        self.shared.incoming(kho, object)
    }

    /// Kinds of all files in all sessions, and of the objects that they share, each once.
    pub fn compatibles(&self) -> Vec<Compatible> {
        let outgoing =
            self.outgoing.iter().flat_map(|session| session.files.iter().map(|file| file.compatible()));
        let incoming =
            self.incoming.iter().flat_map(|session| session.files.iter().map(|file| file.compatible()));
        let mut all: Vec<Compatible> = outgoing.chain(incoming).chain(self.shared.names()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Writes all sessions into the arena and commits, so that they are what a later life finds. With them
    /// every other change to `kho` since its last commit becomes visible, at the same instant.
    ///
    /// Incoming sessions are written, too, until they are finished.
    ///
    /// # Errors
    /// [`PublishError`]; then all is as it was before, in the arena and of what is pending.
    pub fn publish(&mut self, kho: &mut Kho) -> Result<(), PublishError> {
        let sessions = self.sessions()?;
        let flbs = self.shared.wire().map_err(|object| PublishError::UnfinishedShared { object })?;
        let mut pages = Vec::new();
        let blob = self.write(kho, &sessions, &flbs, &mut pages);
        let blob = match blob {
            Ok(blob) => blob,
            Err(error) => {
                pages.into_iter().for_each(|range| kho.free(range));
                return Err(PublishError::Store(error));
            }
        };
        let before = kho.subtree(&SUBTREE).copied();
        // The old pages stay as they are until the commit.
        self.pages.iter().for_each(|range| kho.free(*range));
        kho.set_subtree(Subtree { name: SUBTREE, data: blob, size: size_of::<wire::LuoSer>() as u64 });
        let committed = kho.commit();
        if committed.is_ok() {
            self.pages = pages;
        } else {
            pages.into_iter().for_each(|range| kho.free(range));
            self.pages.iter().for_each(|range| {
                kho.keep(*range);
            });
            match before {
                Some(before) => kho.set_subtree(before),
                None => kho.remove_subtree(&SUBTREE),
            }
        }
        committed.map_err(PublishError::Commit)
    }

    fn sessions(&self) -> Result<Vec<wire::Session>, PublishError> {
        match self.outgoing.iter().find(|own| self.incoming.contains(&own.name)) {
            Some(own) => Err(PublishError::Unfinished { session: own.name }),
            None => {
                let received = self.incoming.iter().map(Incoming::wire);
                Ok(received.chain(self.outgoing.iter().map(Outgoing::wire)).collect())
            }
        }
    }

    fn write(
        &self,
        kho: &mut Kho,
        sessions: &[wire::Session],
        flbs: &[Flb],
        pages: &mut Vec<PageRange>,
    ) -> Result<u64, StoreError> {
        let mut entries = Vec::new();
        for session in sessions {
            let files: Vec<wire::FileSer> = session.files.iter().map(wire::File::entry).collect();
            entries.push(session.entry(write_chain(kho, &files, pages)?));
        }
        let first = write_chain(kho, &entries, pages)?;
        // No more can be registered than one page lists.
        let flbs = kho.store(&flb::encode(flbs))?;
        pages.push(flbs);
        let ser = wire::LuoSer::new(self.number, first, flbs.start().address());
        let blob = kho.store(ser.as_bytes())?;
        pages.push(blob);
        Ok(blob.start().address())
    }
}

/// Writes a chain of blocks; gives the first one's address, or 0 for no entries: an empty block is never
/// written.
fn write_chain<E>(kho: &mut Kho, entries: &[E], pages: &mut Vec<PageRange>) -> Result<u64, StoreError>
where
    E: IntoBytes + zerocopy::Immutable,
{
    let count = block::blocks::<E>(entries.len());
    if count == 0 {
        return Ok(0);
    }
    let len_bytes = count.saturating_mul(pages::PAGE_BYTES);
    let no_frames = |source| StoreError::NoFrames { len_bytes, source };
    let range = kho.allocate(count as u64).map_err(no_frames)?;
    pages.push(range);
    let addresses: Vec<u64> = range.pages().map(|page| page.address()).collect();
    for (block, page) in block::encode(entries, &addresses).iter().zip(range.pages()) {
        kho.fill(page, block).map_err(StoreError::NoMemory)?;
    }
    Ok(range.start().address())
}
