//! Starting the successor.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;

use fdpass::Channel;
use thiserror::Error;

/// Why a program was not started.
#[derive(Debug, Error)]
pub enum ProgramError {
    /// It is not on the list.
    #[error("{} is none of the programs that this machine may be updated to: {}", .path.display(), list(.allowed))]
    NotAllowed {
        /// The program.
        path: PathBuf,
        /// The list.
        allowed: Vec<PathBuf>,
    },
    /// It cannot be opened.
    #[error("cannot open the program {}", .path.display())]
    Open {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no program.
    #[error("{} is not an executable file", .path.display())]
    NotExecutable {
        /// The program.
        path: PathBuf,
    },
    /// It cannot be started.
    #[error("cannot start the program {}", .path.display())]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no socket for it.
    #[error("cannot make a socket for the program")]
    Channel(#[source] fdpass::PairError),
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// A program to update to: opened once, checked, and executed as it was opened.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    file: File,
}

impl Program {
    /// Opens the program at `path`, which has to be one of `allowed`.
    ///
    /// # Errors
    /// [`ProgramError`] if it is not allowed, not there, or no executable file.
    pub fn open(path: &Path, allowed: &[PathBuf]) -> Result<Self, ProgramError> {
        let path = path.to_owned();
        let failed = |source| ProgramError::Open { path: path.clone(), source };
        // Links are followed here, once; what runs is the file that was opened.
        let real = path.canonicalize().map_err(failed)?;
        let same =
            |allowed: &PathBuf| *allowed == path || allowed.canonicalize().is_ok_and(|other| other == real);
        if !allowed.iter().any(same) {
            return Err(ProgramError::NotAllowed { path, allowed: allowed.to_vec() });
        }
        let file = File::open(&real).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
            return Err(ProgramError::NotExecutable { path });
        }
        Ok(Self { path, file })
    }

    /// The program at the path that this process was started from: what a machine is updated to unless something
    /// else is allowed.
    ///
    /// # Errors
    /// [`ProgramError::Open`] if it is not there any more.
    pub fn this() -> Result<Self, ProgramError> {
        let path =
            std::env::current_exe().map_err(|source| ProgramError::Open { path: PathBuf::new(), source })?;
        Self::open(&path, std::slice::from_ref(&path))
    }

    /// Starts it with `arguments`, the socket to its predecessor as its standard input.
    ///
    /// # Errors
    /// [`ProgramError`]
    pub fn start<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<(Channel, Started), ProgramError> {
        let (ours, theirs) = Channel::pair().map_err(ProgramError::Channel)?;
        let child = Command::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
            .args(arguments)
            .stdin(Stdio::from(theirs.into_stdio()))
            .spawn()
            .map_err(|source| ProgramError::Start { path: self.path.clone(), source })?;
        Ok((ours, Started { child: Some(child) }))
    }
}

/// A successor that this process started. Unless it is [let go](Started::let_go), it is killed when this is
/// dropped: it has nothing that it could run.
#[derive(Debug)]
pub struct Started {
    child: Option<Child>,
}

impl Started {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// The machine is its own now: it lives on.
    pub fn let_go(mut self) {
        self.child = None;
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().ok().flatten()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_listed_executable_file_is_opened() {
        let allowed = [PathBuf::from("/bin/sleep"), PathBuf::from("/etc/passwd"), PathBuf::from("/nowhere")];
        assert!(Program::open(Path::new("/bin/sleep"), &allowed).is_ok());
        let refused = |path: &str| Program::open(Path::new(path), &allowed).unwrap_err();
        assert!(matches!(refused("/bin/true"), ProgramError::NotAllowed { .. }));
        assert!(matches!(refused("/etc/passwd"), ProgramError::NotExecutable { .. }));
        assert!(matches!(refused("/nowhere"), ProgramError::Open { .. }));
    }

    #[test]
    fn a_successor_that_is_not_let_go_is_killed() {
        let program = Program::open(Path::new("/bin/sleep"), &[PathBuf::from("/bin/sleep")]).unwrap();
        let (_channel, started) = program.start(["60"]).unwrap();
        let pid = started.pid();
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(started);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
