//! What preserves one kind of file.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use abi::luo::Compatible;
use abi::luo::SessionName;
use kho::Kho;
use thiserror::Error;

use crate::File;
use crate::FileId;

/// The error number that a kernel gives for the same refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the kernel's own names")]
pub enum Errno {
    EPERM,
    ENOENT,
    EIO,
    ENOMEM,
    EBUSY,
    EEXIST,
    EINVAL,
    ENOSPC,
    EOPNOTSUPP,
}

/// A callback refused: the kernel's error number, and why.
///
/// It can be kept and given again: an error of `retrieve` is sticky.
#[derive(Debug, Clone)]
pub struct HandlerError {
    errno: Errno,
    source: Arc<dyn StdError + Send + Sync>,
}

impl HandlerError {
    /// A refusal.
    pub fn new(errno: Errno, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { errno, source: Arc::from(source.into()) }
    }

    /// The error number.
    pub fn errno(&self) -> Errno {
        self.errno
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the handler refuses ({:?})", self.errno)
    }
}

impl StdError for HandlerError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(self.source.as_ref())
    }
}

/// What a callback may use.
#[derive(Debug)]
pub struct Context<'a> {
    /// The arena's metadata: where records and marks go.
    pub kho: &'a mut Kho,
    /// The session of the file.
    pub session: SessionName,
}

/// Preserves one kind of file, in the kernel's verbs.
///
/// None has a default: what a kernel makes optional is an explicit line here, so that forgetting does not
/// compile. `data` is the physical address of the handler's own record, or any number that it likes; it is
/// what the later life gets.
pub trait Handler: Send + Sync {
    /// The kind's name on the wire. The later life finds its handler by it, exactly.
    fn compatible(&self) -> Compatible;

    /// Is this file of the kind, and in a state to be preserved? Called with files of every kind: check the
    /// type before anything else.
    fn can_preserve(&self, file: &File) -> bool;

    /// What the file is, so that it is not preserved twice. Called with files of the kind.
    fn id(&self, file: &File) -> FileId;

    /// Keeps what the later life needs; gives `data`.
    ///
    /// # Errors
    /// [`HandlerError`]; then nothing may stay behind, in the arena or in the file.
    fn preserve(&self, context: &mut Context<'_>, file: &File) -> Result<u64, HandlerError>;

    /// Undoes `preserve`: the session is dropped.
    fn unpreserve(&self, context: &mut Context<'_>, file: &File, data: u64);

    /// The last call before the hand-over: keeps what changed since `preserve`; gives the new `data`.
    ///
    /// # Errors
    /// [`HandlerError`]; then the file is as before the call.
    fn freeze(&self, context: &mut Context<'_>, file: &File, data: u64) -> Result<u64, HandlerError>;

    /// Undoes `freeze`: there is no hand-over. Gives the `data` that counts again.
    fn unfreeze(&self, context: &mut Context<'_>, file: &File, data: u64) -> u64;

    /// Makes the file again.
    ///
    /// # Errors
    /// [`HandlerError`], which is then given for every later try. What was kept must stay until `finish`.
    fn retrieve(&self, context: &mut Context<'_>, data: u64) -> Result<File, HandlerError>;

    /// May the session be finished as far as this file goes? `file` is `None` if it was not retrieved.
    fn can_finish(&self, file: Option<&File>) -> bool;

    /// The session is done with. A file that was retrieved lives on without its record; one that was not is
    /// destroyed with everything that was kept for it.
    fn finish(&self, context: &mut Context<'_>, file: Option<&File>, data: u64);
}

/// A handler was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("there is a handler for {compatible} already (EEXIST)")]
pub struct RegisterError {
    /// The kind.
    pub compatible: Compatible,
}

/// The handlers of one life, in the order in which they are asked.
#[derive(Clone, Default)]
pub struct Handlers {
    list: Vec<Arc<dyn Handler>>,
}

impl Handlers {
    /// Adds one.
    ///
    /// # Errors
    /// [`RegisterError`] if there is one of the same kind.
    pub fn register(&mut self, handler: impl Handler + 'static) -> Result<(), RegisterError> {
        let compatible = handler.compatible();
        if self.of(&compatible).is_some() {
            return Err(RegisterError { compatible });
        }
        self.list.push(Arc::new(handler));
        Ok(())
    }

    /// The handler of this kind.
    pub fn of(&self, compatible: &Compatible) -> Option<&Arc<dyn Handler>> {
        self.list.iter().find(|handler| handler.compatible() == *compatible)
    }

    /// The first handler that says yes to this file.
    pub(crate) fn for_file(&self, file: &File) -> Option<&Arc<dyn Handler>> {
        self.list.iter().find(|handler| handler.can_preserve(file))
    }

    /// The kinds that can be read.
    pub fn compatibles(&self) -> Vec<Compatible> {
        self.list.iter().map(|handler| handler.compatible()).collect()
    }
}

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.compatibles()).finish()
    }
}
