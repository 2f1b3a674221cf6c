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
use crate::Object;
use crate::ShareError;
use crate::SharedError;
use crate::SharedObject;
use crate::shared::MAX_SHARED;
use crate::shared::Pool;

/// The error number that a kernel gives for the same refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the kernel's own names")]
pub enum Errno {
    EPERM,
    ENOENT,
    EIO,
    EAGAIN,
    ENOMEM,
    EBUSY,
    EEXIST,
    EINVAL,
    ENOSPC,
    ENODATA,
    EOPNOTSUPP,
}

/// A callback refused: the kernel's error number, and why.
///
/// It can be kept and given again: an error of `retrieve` is sticky, but for [`Errno::EAGAIN`], which says that the handler
/// is to be asked again.
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

    /// True if the same call may succeed later.
    pub(crate) fn is_for_now(&self) -> bool {
        self.errno == Errno::EAGAIN
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
    shared: Option<&'a mut Pool>,
}

impl<'a> Context<'a> {
    /// What a handler is given that is called by itself, without a [`Luo`](crate::Luo): it knows no shared object.
    pub fn new(kho: &'a mut Kho, session: SessionName) -> Self {
        Self { kho, session, shared: None }
    }

    pub(crate) fn with(kho: &'a mut Kho, session: SessionName, shared: &'a mut Pool) -> Self {
        Self { kho, session, shared: Some(shared) }
    }

    /// The [shared object](crate::SharedObject) of this name that this life preserves. One that the handler needs is
    /// there whenever a file of the handler's is preserved.
    ///
    /// # Errors
    /// [`SharedError`] if it is not preserved.
    pub fn outgoing_shared(&mut self, object: &Compatible) -> Result<Object, SharedError> {
        let unknown = SharedError::Unknown { object: *object };
        self.shared.as_mut().ok_or(unknown)?.outgoing(object)
    }

    /// The [shared object](crate::SharedObject) of this name that this life received. It is retrieved when it is first
    /// asked for.
    ///
    /// # Errors
    /// [`SharedError`] if it was not received, is finished, or cannot be retrieved.
    pub fn incoming_shared(&mut self, object: &Compatible) -> Result<Object, SharedError> {
        let unknown = SharedError::Unknown { object: *object };
        self.shared.as_mut().ok_or(unknown)?.incoming(self.kho, object)
    }
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
    /// [`HandlerError`], which is then given for every later try, unless it is [`Errno::EAGAIN`]. What was kept must stay
    /// until `finish`; with [`Errno::EAGAIN`] nothing else may stay behind.
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

impl RegisterError {
    /// The kernel's error number for the same refusal.
    pub fn errno(&self) -> Errno {
        Errno::EEXIST
    }
}

/// A handler, and what its files need.
#[derive(Clone)]
pub(crate) struct Registered {
    pub(crate) handler: Arc<dyn Handler>,
    /// Places of the shared objects, in the order of their registration for it.
    pub(crate) needs: Arc<[usize]>,
}

/// The handlers of one life, in the order in which they are asked, and the objects that their files share.
#[derive(Clone, Default)]
pub struct Handlers {
    list: Vec<Registered>,
    shared: Vec<Arc<dyn SharedObject>>,
}

impl Handlers {
    /// Adds one.
    ///
    /// # Errors
    /// [`RegisterError`] if there is one of the same kind.
    pub fn register(&mut self, handler: impl Handler + 'static) -> Result<(), RegisterError> {
        let compatible = handler.compatible();
        if self.registered(&compatible).is_some() {
            return Err(RegisterError { compatible });
        }
        self.list.push(Registered { handler: Arc::new(handler), needs: Arc::default() });
        Ok(())
    }

    /// Says that files of `kind` need a shared object. The same one may be registered for several kinds.
    ///
    /// # Errors
    /// [`ShareError`]; then nothing was changed.
    pub fn register_shared(
        &mut self,
        kind: &Compatible,
        object: &Arc<dyn SharedObject>,
    ) -> Result<(), ShareError> {
        let (kind, name) = (*kind, object.compatible());
        let known = self.shared.iter().position(|other| Arc::ptr_eq(other, object));
        let handler = self.list.iter_mut().find(|registered| registered.handler.compatible() == kind);
        let handler = handler.ok_or(ShareError::UnknownHandler { kind, object: name })?;
        if known.is_some_and(|place| handler.needs.contains(&place)) {
            return Err(ShareError::Twice { kind, object: name });
        }
        if known.is_none() && self.shared.len() >= MAX_SHARED {
            return Err(ShareError::TooMany);
        }
        if known.is_none() && self.shared.iter().any(|other| other.compatible() == name) {
            return Err(ShareError::Exists { object: name });
        }
        let place = known.unwrap_or(self.shared.len());
        handler.needs = handler.needs.iter().copied().chain([place]).collect();
        if known.is_none() {
            self.shared.push(Arc::clone(object));
        }
        Ok(())
    }

    /// The handler of this kind.
    pub fn of(&self, compatible: &Compatible) -> Option<&Arc<dyn Handler>> {
        self.registered(compatible).map(|registered| &registered.handler)
    }

    pub(crate) fn registered(&self, compatible: &Compatible) -> Option<&Registered> {
        self.list.iter().find(|registered| registered.handler.compatible() == *compatible)
    }

    /// The first handler that says yes to this file.
    pub(crate) fn for_file(&self, file: &File) -> Option<&Registered> {
        self.list.iter().find(|registered| registered.handler.can_preserve(file))
    }

    /// All shared objects, in the order of their registration.
    pub(crate) fn shared(&self) -> &[Arc<dyn SharedObject>] {
        &self.shared
    }

    /// The kinds that can be read, of files first and then of shared objects.
    pub fn compatibles(&self) -> Vec<Compatible> {
        let files = self.list.iter().map(|registered| registered.handler.compatible());
        files.chain(self.shared.iter().map(|object| object.compatible())).collect()
    }
}

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.compatibles()).finish()
    }
}
