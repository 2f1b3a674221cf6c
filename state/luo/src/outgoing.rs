//! Sessions that this life hands over.

use std::fmt;

use abi::luo as wire;
use abi::luo::Compatible;
use abi::luo::SessionName;
use kho::Kho;
use thiserror::Error;

use crate::Context;
use crate::Errno;
use crate::File;
use crate::FileId;
use crate::HandlerError;
use crate::Luo;
use crate::Token;
use crate::handler::Registered;
use crate::ordered::Ordered;
use crate::shared::Pool;
use crate::shared::Refused;

/// The most sessions, received and unfinished ones included: 10,000 blocks of 51.
const MAX_SESSIONS: usize = 510_000;
/// The most files of one session: 10,000 blocks of 63.
const MAX_FILES: usize = 630_000;

/// Why a session was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SessionError {
    /// An outgoing session has this name (EEXIST).
    #[error("there is an outgoing session {session} already")]
    Exists {
        /// The name.
        session: SessionName,
    },
    /// No outgoing session has this name (ENOENT).
    #[error("there is no outgoing session {session}")]
    Unknown {
        /// The name.
        session: SessionName,
    },
    /// There are as many as the format can list (ENOSPC).
    #[error("no more than {MAX_SESSIONS} sessions can be handed over")]
    TooMany,
}

impl SessionError {
    /// The kernel's error number for the same refusal.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Exists { .. } => Errno::EEXIST,
            Self::Unknown { .. } => Errno::ENOENT,
            Self::TooMany => Errno::ENOSPC,
        }
    }
}

/// Why a file was not preserved, in the order in which it is checked.
#[derive(Debug, Clone, Error)]
pub enum PreserveError {
    /// No such session.
    #[error(transparent)]
    Session(SessionError),
    /// The token is in use in this session (EEXIST).
    #[error("session {session} has {token:?} already")]
    TokenTaken {
        /// The session.
        session: SessionName,
        /// The token.
        token: Token,
    },
    /// The session has as many files as the format can list (ENOSPC).
    #[error("session {session} cannot have more than {MAX_FILES} files")]
    TooMany {
        /// The session.
        session: SessionName,
    },
    /// No handler says yes to the file (ENOENT).
    #[error("no handler preserves the file that session {session} should know by {token:?}")]
    NoHandler {
        /// The session.
        session: SessionName,
        /// The token.
        token: Token,
    },
    /// The file is preserved already, or retrieved and not finished (EBUSY).
    #[error("the file is held already: session {session}, {token:?}")]
    Held {
        /// The session that holds it.
        session: SessionName,
        /// Its token there.
        token: Token,
    },
    /// An object that files of this kind share refused.
    #[error("cannot preserve shared object {object}, which {token:?} of session {session} needs")]
    Shared {
        /// The session.
        session: SessionName,
        /// The token.
        token: Token,
        /// The object.
        object: Compatible,
        /// Why.
        #[source]
        source: HandlerError,
    },
    /// The handler refused.
    #[error("cannot preserve {token:?} of session {session} ({compatible})")]
    Handler {
        /// The session.
        session: SessionName,
        /// The token.
        token: Token,
        /// The handler's kind.
        compatible: Compatible,
        /// Why.
        #[source]
        source: HandlerError,
    },
}

impl PreserveError {
    /// The kernel's error number for the same refusal.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Session(error) => error.errno(),
            Self::TokenTaken { .. } => Errno::EEXIST,
            Self::NoHandler { .. } => Errno::ENOENT,
            Self::TooMany { .. } => Errno::ENOSPC,
            Self::Held { .. } => Errno::EBUSY,
            Self::Shared { source, .. } | Self::Handler { source, .. } => source.errno(),
        }
    }
}

/// A file that is preserved.
pub(crate) struct Preserved {
    pub(crate) token: Token,
    kind: Registered,
    file: File,
    id: FileId,
    data: u64,
    frozen: bool,
}

impl Preserved {
    pub(crate) fn compatible(&self) -> Compatible {
        self.kind.handler.compatible()
    }
}

impl fmt::Debug for Preserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frozen = if self.frozen { " frozen" } else { "" };
        write!(f, "{:?} {} {:#x}{frozen}", self.token, self.compatible(), self.data)
    }
}

/// A session that is handed over.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) name: SessionName,
    /// In the order in which they were preserved.
    pub(crate) files: Ordered<Token, Preserved>,
}

impl Outgoing {
    pub(crate) fn wire(&self) -> wire::Session {
        let file = |file: &Preserved| wire::File {
            compatible: file.compatible(),
            data: file.data,
            token: file.token.0,
        };
        wire::Session { name: self.name, files: self.files.iter().map(file).collect() }
    }

    /// Freezes the files that are not frozen, up to the first that refuses.
    fn freeze(&mut self, kho: &mut Kho, pool: &mut Pool) -> Result<(), PreserveError> {
        for file in self.files.iter_mut().filter(|file| !file.frozen) {
            let (session, token, compatible) = (self.name, file.token, file.compatible());
            let failed = |source| PreserveError::Handler { session, token, compatible, source };
            let mut context = Context::with(kho, session, pool);
            file.data = file.kind.handler.freeze(&mut context, &file.file, file.data).map_err(failed)?;
            file.frozen = true;
        }
        Ok(())
    }

    /// Unfreezes the files that are frozen.
    fn unfreeze(&mut self, kho: &mut Kho, pool: &mut Pool) {
        for file in self.files.iter_mut().filter(|file| file.frozen) {
            let mut context = Context::with(kho, self.name, pool);
            file.data = file.kind.handler.unfreeze(&mut context, &file.file, file.data);
            file.frozen = false;
        }
    }
}

impl Luo {
    /// Makes an empty outgoing session. An incoming one may have the same name: its own name space.
    ///
    /// # Errors
    /// [`SessionError`] if the name is taken, or there are too many.
    pub fn create_session(&mut self, name: SessionName) -> Result<(), SessionError> {
        if self.outgoing.contains(&name) {
            return Err(SessionError::Exists { session: name });
        }
        // Both are listed in one chain; those received can only become fewer.
        if self.outgoing.len() + self.incoming.len() >= MAX_SESSIONS {
            return Err(SessionError::TooMany);
        }
        self.outgoing.push(name, Outgoing { name, files: Ordered::default() });
        Ok(())
    }

    /// Preserves a file in an outgoing session, under a token that names it there.
    ///
    /// # Errors
    /// [`PreserveError`]; then nothing stays behind.
    pub fn preserve(
        &mut self,
        kho: &mut Kho,
        name: SessionName,
        token: Token,
        file: File,
    ) -> Result<(), PreserveError> {
        let unknown = PreserveError::Session(SessionError::Unknown { session: name });
        let session = self.outgoing.get_mut(&name).ok_or(unknown)?;
        if session.files.contains(&token) {
            return Err(PreserveError::TokenTaken { session: name, token });
        }
        if session.files.len() >= MAX_FILES {
            return Err(PreserveError::TooMany { session: name });
        }
        let kind = self.handlers.for_file(&file).cloned();
        let kind = kind.ok_or(PreserveError::NoHandler { session: name, token })?;
        let id = kind.handler.id(&file);
        if let Some((session, token)) = self.held.get(&id).copied() {
            return Err(PreserveError::Held { session, token });
        }
        let shared =
            |Refused { object, source }| PreserveError::Shared { session: name, token, object, source };
        self.shared.need(kho, &kind.needs).map_err(shared)?;
        let compatible = kind.handler.compatible();
        let failed = |source| PreserveError::Handler { session: name, token, compatible, source };
        let kept = kind.handler.preserve(&mut Context::with(kho, name, &mut self.shared), &file);
        let data = kept.map_err(failed).inspect_err(|_| self.shared.let_go(kho, &kind.needs))?;
        self.held.insert(id, (name, token));
        session.files.push(token, Preserved { token, kind, file, id, data, frozen: false });
        Ok(())
    }

    /// Drops an outgoing session: its files are unfrozen if they are frozen, then unpreserved, the last
    /// preserved first; names and tokens are free again. The only way to take a file out.
    ///
    /// # Errors
    /// [`SessionError::Unknown`]
    pub fn drop_session(&mut self, kho: &mut Kho, name: SessionName) -> Result<(), SessionError> {
        let mut session = self.outgoing.remove(&name).ok_or(SessionError::Unknown { session: name })?;
        session.unfreeze(kho, &mut self.shared);
        for file in session.files.into_values().rev() {
            let mut context = Context::with(kho, name, &mut self.shared);
            file.kind.handler.unpreserve(&mut context, &file.file, file.data);
            self.shared.let_go(kho, &file.kind.needs);
            self.held.remove(&file.id);
        }
        Ok(())
    }

    /// The last callback of every file of every outgoing session, in the order of their making. A kernel lets
    /// nothing be preserved after it; here a file that is preserved later waits for the next call, which
    /// passes over those that are frozen.
    ///
    /// # Errors
    /// The first refusal. Files that were frozen are unfrozen: those of the session at fault in order, then
    /// the sessions before it, the last first. A second try is legal.
    pub fn freeze(&mut self, kho: &mut Kho) -> Result<(), PreserveError> {
        let result = self.outgoing.iter_mut().try_for_each(|session| session.freeze(kho, &mut self.shared));
        if result.is_err() {
            self.unfreeze(kho);
        }
        result
    }

    /// There is no hand-over after all: undoes [`Luo::freeze`]. Does nothing if nothing is frozen.
    pub fn unfreeze(&mut self, kho: &mut Kho) {
        self.outgoing.iter_mut().rev().for_each(|session| session.unfreeze(kho, &mut self.shared));
    }

    /// Tokens of an outgoing session, in the order in which they were preserved.
    pub fn outgoing_tokens(&self, name: SessionName) -> impl Iterator<Item = Token> + '_ {
        self.outgoing.get(&name).into_iter().flat_map(|session| session.files.iter().map(|file| file.token))
    }

    /// Names of the outgoing sessions, the first made first.
    pub fn outgoing_sessions(&self) -> impl Iterator<Item = SessionName> + '_ {
        self.outgoing.iter().map(|session| session.name)
    }
}
