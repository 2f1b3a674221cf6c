//! Descriptors that go with a machine and are none of its memory: sockets, taps, disks.
//!
//! The machine keeps a record of each in its session; the descriptor itself goes by the carrier, if that can carry
//! it. What comes is an allegation: each record has to find a descriptor of its kind, and no descriptor may come
//! without a record.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use abi::foreign::FORMAT;
use abi::foreign::FdKind;
use abi::foreign::FdName;
use abi::foreign::FdRecord;
use fdpass::Kind;
use luo::Compatible;
use luo::Context;
use luo::Errno;
use luo::File;
use luo::FileId;
use luo::Handler;
use luo::HandlerError;
use thiserror::Error;

use crate::handlers::check_identity;
use crate::machine::Machine;
use crate::machine::SettleError;
use crate::update::Capabilities;

/// The most descriptors that go with one machine.
pub const MAX_FDS: usize = 1024;

/// Why descriptors do not go with the machine. Nothing changed.
#[derive(Debug, Error)]
pub enum KeepError {
    /// They cannot go by this carrier.
    #[error("this way of updating cannot carry {}: close them first, or take another way", list(.names))]
    Carrier {
        /// Their names.
        names: Vec<FdName>,
    },
    /// A descriptor is of no kind that can be kept.
    #[error("{name} is {what}, which cannot go with a machine")]
    Kind {
        /// Its name.
        name: FdName,
        /// What it is of.
        what: String,
    },
    /// Two have one name.
    #[error("two descriptors are called {name}")]
    Repeated {
        /// The name.
        name: FdName,
    },
    /// More than a machine can have.
    #[error("{count} descriptors are to go with the machine, and at most {MAX_FDS} can")]
    TooMany {
        /// How many.
        count: usize,
    },
    /// The kernel gives no second descriptor, or does not say what one is of.
    #[error("cannot keep {name}")]
    Call {
        /// Its name.
        name: FdName,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// They could not be preserved.
    #[error("cannot preserve the descriptors")]
    Preserve(#[source] SettleError),
}

/// What was handed over is not what the records say.
#[derive(Debug, Error)]
pub enum FdError {
    /// Descriptors came that no record names, or the other way round.
    #[error("{came} descriptors came beside the machine's memory, its session names {told}")]
    Count {
        /// In the session.
        told: usize,
        /// Handed over.
        came: usize,
    },
    /// Two records name one descriptor, or have one name.
    #[error("the session names {name} twice")]
    Repeated {
        /// The name.
        name: FdName,
    },
    /// The number is none of a descriptor that came.
    #[error("{name} is to be descriptor {index}, and {came} came")]
    Index {
        /// Its name.
        name: FdName,
        /// Its number.
        index: u64,
        /// Handed over.
        came: usize,
    },
    /// It is of another kind.
    #[error("{name} should be {told}, and is {came}")]
    Kind {
        /// Its name.
        name: FdName,
        /// What the record says.
        told: FdKind,
        /// What it is.
        came: Kind,
    },
    /// The kernel does not say what it is.
    #[error("cannot tell what {name} is")]
    Call {
        /// Its name.
        name: FdName,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn list(names: &[FdName]) -> String {
    names.iter().map(FdName::to_string).collect::<Vec<_>>().join(", ")
}

/// A descriptor as a preserved file.
pub(crate) struct FdFile {
    id: FileId,
    record: FdRecord,
    fd: Mutex<Option<OwnedFd>>,
}

impl fmt::Debug for FdFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.record.fmt(f)
    }
}

impl FdFile {
    fn new(record: FdRecord, fd: Option<OwnedFd>) -> Arc<Self> {
        Arc::new(Self { id: FileId::fresh(), record, fd: Mutex::new(fd) })
    }

    pub(crate) fn record(&self) -> &FdRecord {
        &self.record
    }
}

fn fd_of(file: &File) -> Option<Arc<FdFile>> {
    Arc::clone(file).downcast().ok()
}

/// Preserves an [`FdFile`]: `tideover-fd-v1`.
pub(crate) struct FdHandler;

impl Handler for FdHandler {
    fn compatible(&self) -> Compatible {
        Compatible::literal(FORMAT.compatible)
    }

    fn can_preserve(&self, file: &File) -> bool {
        fd_of(file).is_some()
    }

    fn id(&self, file: &File) -> FileId {
        fd_of(file).map_or_else(FileId::fresh, |file| file.id)
    }

    fn preserve(&self, context: &mut Context<'_>, file: &File) -> Result<u64, HandlerError> {
        let file = fd_of(file).ok_or_else(|| HandlerError::new(Errno::EINVAL, "not of this kind"))?;
        check_identity(context, file.record.identity)?;
        let stored = context.kho.store(&file.record.encode());
        Ok(stored.map_err(|error| HandlerError::new(Errno::ENOMEM, error))?.start().address())
    }

    fn unpreserve(&self, context: &mut Context<'_>, _: &File, data: u64) {
        context.kho.free_record(&FORMAT, data);
    }

    fn freeze(&self, _: &mut Context<'_>, _: &File, data: u64) -> Result<u64, HandlerError> {
        Ok(data)
    }

    fn unfreeze(&self, _: &mut Context<'_>, _: &File, data: u64) -> u64 {
        data
    }

    fn retrieve(&self, context: &mut Context<'_>, data: u64) -> Result<File, HandlerError> {
        let record = FdRecord::read(&context.kho.memory(), data);
        let record = record.map_err(|error| HandlerError::new(Errno::EINVAL, error))?;
        let adopted = context.kho.adopt_record(&FORMAT, data);
        adopted.map_err(|error| HandlerError::new(Errno::EINVAL, error))?;
        check_identity(context, record.identity)?;
        Ok(FdFile::new(record, None))
    }

    fn can_finish(&self, _: Option<&File>) -> bool {
        true
    }

    fn finish(&self, context: &mut Context<'_>, _: Option<&File>, data: u64) {
        context.kho.free_record(&FORMAT, data);
    }
}

/// The descriptors that came with a machine, by name. What is not taken is closed with it.
#[derive(Debug, Default)]
pub struct Fds {
    list: Vec<(FdRecord, OwnedFd)>,
}

impl Fds {
    /// Joins the session's records with what came.
    pub(crate) fn join(files: &[Arc<FdFile>], came: Vec<OwnedFd>) -> Result<Self, FdError> {
        if files.len() != came.len() {
            return Err(FdError::Count { told: files.len(), came: came.len() });
        }
        let count = came.len();
        let mut came: Vec<Option<OwnedFd>> = came.into_iter().map(Some).collect();
        let mut list: Vec<(FdRecord, OwnedFd)> = Vec::new();
        for file in files {
            let record = file.record;
            let name = record.name;
            let place = usize::try_from(record.index).ok().and_then(|index| came.get_mut(index));
            let place = place.ok_or(FdError::Index { name, index: record.index, came: count })?;
            let repeated = list.iter().any(|(other, _)| other.name == name);
            let fd = place.take().filter(|_| !repeated).ok_or(FdError::Repeated { name })?;
            let kind = fdpass::kind(&fd).map_err(|source| FdError::Call { name, source })?;
            if kind != Kind::Known(record.kind) {
                return Err(FdError::Kind { name, told: record.kind, came: kind });
            }
            list.push((record, fd));
        }
        Ok(Self { list })
    }

    /// Takes the descriptor of this name.
    pub fn take(&mut self, name: FdName) -> Option<OwnedFd> {
        let at = self.list.iter().position(|(record, _)| record.name == name)?;
        Some(self.list.swap_remove(at).1)
    }

    /// Names of those that were not taken yet.
    pub fn names(&self) -> impl Iterator<Item = FdName> + '_ {
        self.list.iter().map(|(record, _)| record.name)
    }
}

impl Machine {
    /// Has these descriptors go with the machine from now on, in place of those that did before: the session gets a
    /// record of each, and this process keeps a second descriptor of its own. `carrier` is how they are to go.
    ///
    /// # Errors
    /// [`KeepError`]: what cannot go is refused now, while the guest runs.
    pub fn keep_fds(
        &mut self,
        fds: &[(FdName, BorrowedFd<'_>)],
        carrier: &Capabilities,
    ) -> Result<(), KeepError> {
        let files = self.fd_files(fds, carrier)?;
        self.settle().map_err(KeepError::Preserve)?;
        self.refill(files).map_err(|error| {
            // Should that fail, too, the session that was published stands until the next seal has made it anew.
            let _ = self.refill(Vec::new());
            KeepError::Preserve(error)
        })
    }

    /// No descriptor goes with the machine any more.
    ///
    /// # Errors
    /// [`SettleError`] if that could not be published: the next change does.
    pub fn release_fds(&mut self) -> Result<(), SettleError> {
        if self.fds.is_empty() { Ok(()) } else { self.refill(Vec::new()) }
    }

    /// A session's files go only all at once, so it is made anew, and replaces the published one in one step.
    fn refill(&mut self, fds: Vec<Arc<FdFile>>) -> Result<(), SettleError> {
        self.settled = false;
        self.fds = fds;
        // It is there: the machine was settled.
        let _ = self.luo.drop_session(&mut self.kho, self.name);
        self.settle().map(drop)
    }

    fn fd_files(
        &self,
        fds: &[(FdName, BorrowedFd<'_>)],
        carrier: &Capabilities,
    ) -> Result<Vec<Arc<FdFile>>, KeepError> {
        if !fds.is_empty() && !carrier.other_descriptors {
            return Err(KeepError::Carrier { names: fds.iter().map(|(name, _)| *name).collect() });
        }
        if fds.len() > MAX_FDS {
            return Err(KeepError::TooMany { count: fds.len() });
        }
        let identity = self.identity();
        let mut files: Vec<Arc<FdFile>> = Vec::new();
        for ((name, fd), index) in fds.iter().zip(0..) {
            let name = *name;
            if files.iter().any(|file| file.record.name == name) {
                return Err(KeepError::Repeated { name });
            }
            let call = |source| KeepError::Call { name, source };
            let kind = match fdpass::kind(fd).map_err(call)? {
                Kind::Known(kind) => kind,
                Kind::Other(what) => return Err(KeepError::Kind { name, what }),
            };
            let own = fd.try_clone_to_owned().map_err(call)?;
            files.push(FdFile::new(FdRecord { identity, name, kind, index }, Some(own)));
        }
        Ok(files)
    }

    /// Everything that a carrier hands over, in this order: the regions' descriptors, region 0's first, then those
    /// that go with the machine.
    ///
    /// # Errors
    /// If the kernel gives no second descriptor.
    pub fn descriptors(&self) -> io::Result<Vec<OwnedFd>> {
        let regions = self.regions().map(|region| region.as_fd().try_clone_to_owned());
        let fds = self.fds.iter().filter_map(|file| {
            let fd = file.fd.lock().unwrap_or_else(PoisonError::into_inner);
            fd.as_ref().map(OwnedFd::try_clone)
        });
        regions.chain(fds).collect()
    }

    /// How many descriptors go with the machine beside its regions'.
    pub fn fd_count(&self) -> usize {
        self.fds.len()
    }
}
