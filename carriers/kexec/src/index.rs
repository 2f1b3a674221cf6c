//! Which machines go through a kexec: a session of its own, since the kernel does not list those that there are.

use std::os::fd::AsFd as _;

use custody::NoteError;
use custody::NoteFile;
use custody::When;
use liveupdate::CreateError;
use liveupdate::Device;
use liveupdate::FindError;
use liveupdate::Name;
use liveupdate::Outgoing;
use liveupdate::PreserveError;
use liveupdate::RetrieveError;
use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;

use crate::NOTE_TOKEN;

/// What the session is called.
const NAME: &[u8] = b"tideover";

/// The machines that go through a kexec together.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Listed {
    /// Their names.
    pub machines: Vec<String>,
    /// When what was done for all of them.
    pub when: When,
}

/// Why the list of machines was not preserved or read.
#[derive(Debug, Error)]
pub enum IndexError {
    /// There is no session for it.
    #[error("cannot make a session for the list of machines")]
    Create(#[source] CreateError),
    /// It cannot be written or read.
    #[error("the list of machines")]
    Note(#[source] NoteError),
    /// The kernel does not preserve it.
    #[error("cannot preserve the list of machines")]
    Preserve(#[source] PreserveError),
    /// The kernel before left none.
    #[error("cannot find the list of machines")]
    Find(#[source] FindError),
    /// The kernel does not give it back.
    #[error("cannot retrieve the list of machines")]
    Retrieve(#[source] RetrieveError),
}

/// The list, preserved as long as this lives.
#[derive(Debug)]
pub struct Index {
    _session: Outgoing,
    file: NoteFile,
    /// What it says.
    listed: Listed,
}

impl Index {
    /// Preserves a list of these machines.
    ///
    /// # Errors
    /// [`IndexError`]
    pub fn preserve(device: &Device, machines: Vec<String>) -> Result<Self, IndexError> {
        let listed = Listed { machines, when: When::default() };
        // Moments are still to come: the room for them is there.
        let file = NoteFile::make(&listed).map_err(IndexError::Note)?;
        let mut session = device.create(&name()).map_err(IndexError::Create)?;
        session.preserve(NOTE_TOKEN, file.as_fd()).map_err(IndexError::Preserve)?;
        Ok(Self { _session: session, file, listed })
    }

    /// Notes that this happens now.
    ///
    /// # Errors
    /// [`IndexError::Note`]
    pub fn note(&mut self, what: &str) -> Result<(), IndexError> {
        self.listed.when.now(what);
        self.file.write(&self.listed).map_err(IndexError::Note)
    }

    /// Reads the list that the kernel before left, and ends its session: it is not to be had twice.
    ///
    /// # Errors
    /// [`IndexError`]
    pub fn retrieve(device: &Device) -> Result<Listed, IndexError> {
        let mut session = device.retrieve(&name()).map_err(IndexError::Find)?;
        let file = session.retrieve(NOTE_TOKEN).map_err(IndexError::Retrieve)?;
        let listed = NoteFile::from_fd(file).and_then(|file| file.read()).map_err(IndexError::Note)?;
        // It is read: should the session not end now, it does so with its descriptor.
        let _ = session.finish();
        Ok(listed)
    }
}

fn name() -> Name {
    Name::new(NAME).unwrap_or_else(|_| unreachable!("it is short, and has no NUL"))
}
