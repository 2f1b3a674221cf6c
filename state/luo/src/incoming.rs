//! Sessions that this life received.

use std::fmt;
use std::sync::Arc;

use abi::luo as wire;
use abi::luo::Compatible;
use abi::luo::SessionName;
use kho::Kho;
use thiserror::Error;

use crate::AttachError;
use crate::Context;
use crate::Errno;
use crate::File;
use crate::FileId;
use crate::HandlerError;
use crate::Handlers;
use crate::Luo;
use crate::Token;
use crate::handler::Registered;
use crate::ordered::Ordered;

/// Why a file was not retrieved.
#[derive(Debug, Clone, Error)]
pub enum RetrieveError {
    /// No session of this name was received, or it is finished (ENOENT).
    #[error("no session {session} was received")]
    UnknownSession {
        /// The name.
        session: SessionName,
    },
    /// The session has no such file (ENOENT).
    #[error("session {session} has no {token:?}")]
    UnknownToken {
        /// The session.
        session: SessionName,
        /// The token.
        token: Token,
    },
    /// The handler refused, now or before: it is not asked again, unless it said EAGAIN.
    #[error("cannot retrieve {token:?} of session {session} ({compatible})")]
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

impl RetrieveError {
    /// The kernel's error number for the same refusal.
    pub fn errno(&self) -> Errno {
        match self {
            Self::UnknownSession { .. } | Self::UnknownToken { .. } => Errno::ENOENT,
            Self::Handler { source, .. } => source.errno(),
        }
    }
}

/// Why a session was not finished. Nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FinishError {
    /// No session of this name was received (ENOENT).
    #[error("no session {session} was received")]
    UnknownSession {
        /// The name.
        session: SessionName,
    },
    /// A file is not ready (EBUSY).
    #[error("{token:?} of session {session} ({compatible}) is not ready to be finished")]
    Busy {
        /// The session.
        session: SessionName,
        /// The file.
        token: Token,
        /// Its kind.
        compatible: Compatible,
    },
}

impl FinishError {
    /// The kernel's error number for the same refusal.
    pub fn errno(&self) -> Errno {
        match self {
            Self::UnknownSession { .. } => Errno::ENOENT,
            Self::Busy { .. } => Errno::EBUSY,
        }
    }
}

/// What a finished session leaves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Finished {
    /// Files that nobody had retrieved: they are destroyed.
    pub unclaimed: Vec<Token>,
}

enum Retrieved {
    NotTried,
    File(File, FileId),
    Failed(HandlerError),
}

/// A file that was received.
pub(crate) struct Received {
    token: Token,
    pub(crate) kind: Registered,
    data: u64,
    state: Retrieved,
}

impl Received {
    pub(crate) fn compatible(&self) -> Compatible {
        self.kind.handler.compatible()
    }

    fn file(&self) -> Option<&File> {
        match &self.state {
            Retrieved::File(file, _) => Some(file),
            Retrieved::NotTried | Retrieved::Failed(_) => None,
        }
    }
}

impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            Retrieved::NotTried => "",
            Retrieved::File(..) => " retrieved",
            Retrieved::Failed(_) => " failed",
        };
        write!(f, "{:?} {} {:#x}{state}", self.token, self.compatible(), self.data)
    }
}

/// A session that was received.
#[derive(Debug)]
pub(crate) struct Incoming {
    name: SessionName,
    pub(crate) files: Ordered<Token, Received>,
}

impl Incoming {
    pub(crate) fn new(session: &wire::Session, handlers: &Handlers) -> Result<Self, AttachError> {
        let file = |file: &wire::File| {
            let (token, compatible) = (Token(file.token), file.compatible);
            let unknown = || AttachError::UnknownHandler { session: session.name, token, compatible };
            let kind = handlers.registered(&compatible).ok_or_else(unknown)?.clone();
            Ok((token, Received { token, kind, data: file.data, state: Retrieved::NotTried }))
        };
        let files = session.files.iter().map(file).collect::<Result<_, _>>()?;
        Ok(Self { name: session.name, files })
    }

    pub(crate) fn wire(&self) -> wire::Session {
        let file = |file: &Received| wire::File {
            compatible: file.compatible(),
            data: file.data,
            token: file.token.0,
        };
        wire::Session { name: self.name, files: self.files.iter().map(file).collect() }
    }
}

impl Luo {
    /// Names of the sessions that were received and are not finished.
    pub fn incoming_sessions(&self) -> impl Iterator<Item = SessionName> + '_ {
        self.incoming.iter().map(|session| session.name)
    }

    /// Tokens of a received session, in the order in which they were preserved.
    pub fn tokens(&self, name: SessionName) -> impl Iterator<Item = Token> + '_ {
        self.incoming.get(&name).into_iter().flat_map(|session| session.files.iter().map(|file| file.token))
    }

    /// Makes a received file again. A second call gives the same file, or the same error; only a handler that refused with
    /// EAGAIN is asked again.
    ///
    /// # Errors
    /// [`RetrieveError`]
    pub fn retrieve(
        &mut self,
        kho: &mut Kho,
        name: SessionName,
        token: Token,
    ) -> Result<File, RetrieveError> {
        let session = self.incoming.get_mut(&name).ok_or(RetrieveError::UnknownSession { session: name })?;
        let file = session.files.get_mut(&token);
        let file = file.ok_or(RetrieveError::UnknownToken { session: name, token })?;
        let compatible = file.compatible();
        let failed = |source| RetrieveError::Handler { session: name, token, compatible, source };
        match &file.state {
            Retrieved::File(known, _) => return Ok(Arc::clone(known)),
            Retrieved::Failed(error) => return Err(failed(error.clone())),
            Retrieved::NotTried => {}
        }
        let mut context = Context::with(kho, name, &mut self.shared);
        match file.kind.handler.retrieve(&mut context, file.data) {
            Ok(made) => {
                let id = file.kind.handler.id(&made);
                self.held.insert(id, (name, token));
                file.state = Retrieved::File(Arc::clone(&made), id);
                Ok(made)
            }
            Err(error) => {
                if !error.is_for_now() {
                    file.state = Retrieved::Failed(error.clone());
                }
                Err(failed(error))
            }
        }
    }

    /// Ends a received session: its files live on without it, and those that were not retrieved are
    /// destroyed and named. A second call does nothing.
    ///
    /// # Errors
    /// [`FinishError`] at the first file that is not ready; then nothing was changed.
    pub fn finish(&mut self, kho: &mut Kho, name: SessionName) -> Result<Finished, FinishError> {
        let session = match self.incoming.get(&name) {
            Some(session) => session,
            None if self.finished.contains(&name) => return Ok(Finished::default()),
            None => return Err(FinishError::UnknownSession { session: name }),
        };
        if let Some(file) = session.files.iter().find(|file| !file.kind.handler.can_finish(file.file())) {
            return Err(FinishError::Busy {
                session: name,
                token: file.token,
                compatible: file.compatible(),
            });
        }
        self.finished.insert(name);
        let files = self.incoming.remove(&name).map(|session| session.files).unwrap_or_default();
        let mut finished = Finished::default();
        for file in files.into_values().rev() {
            let mut context = Context::with(kho, name, &mut self.shared);
            file.kind.handler.finish(&mut context, file.file(), file.data);
            self.shared.finish_file(kho, &file.kind.needs);
            match file.state {
                Retrieved::File(_, id) => {
                    self.held.remove(&id);
                }
                Retrieved::NotTried | Retrieved::Failed(_) => finished.unclaimed.push(file.token),
            }
        }
        self.shared.finish_unneeded(kho);
        finished.unclaimed.reverse();
        Ok(finished)
    }
}
