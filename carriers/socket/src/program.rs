//! Starting the successor.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use fdpass::Channel;
use fdpass::Deadline;
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

    /// The program at the path that this process was started from, which may be a newer one by now: what a machine
    /// is updated to unless something else is allowed.
    ///
    /// # Errors
    /// [`ProgramError::Open`] if there is none any more.
    pub fn this() -> Result<Self, ProgramError> {
        let path = Self::this_path().map_err(|source| ProgramError::Open { path: PathBuf::new(), source })?;
        Self::open(&path, std::slice::from_ref(&path))
    }

    /// The path that this process was started from.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn this_path() -> io::Result<PathBuf> {
        let path = std::env::current_exe()?;
        // Of a program whose file was replaced the kernel says so behind its path.
        let replaced = path.to_str().and_then(|path| path.strip_suffix(" (deleted)")).map(PathBuf::from);
        Ok(replaced.filter(|_| !path.exists()).unwrap_or(path))
    }

    /// Starts it with `arguments`, the socket to its predecessor as its standard input.
    ///
    /// # Errors
    /// [`ProgramError`]
    pub fn start<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<(Channel, Started), ProgramError> {
        self.start_with(arguments, Stdio::inherit(), Stdio::inherit())
    }

    /// As [`start`](Self::start), with what it says going to `stdout` and what it complains of to `stderr`.
    ///
    /// # Errors
    /// [`ProgramError`]
    pub fn start_with<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        stdout: Stdio,
        stderr: Stdio,
    ) -> Result<(Channel, Started), ProgramError> {
        let (ours, theirs) = Channel::pair().map_err(ProgramError::Channel)?;
        let child = Command::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
            // What a list of processes shows is the program's path, not the descriptor.
            .arg0(&self.path)
            .args(arguments)
            .stdin(Stdio::from(theirs.into_stdio()))
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .map_err(|source| ProgramError::Start { path: self.path.clone(), source })?;
        Ok((ours, Started { child: Some(child) }))
    }

    /// Has this process execute it with `arguments`. Returns only if that fails.
    pub fn execute<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> ProgramError {
        self.to_execute().now(arguments)
    }

    /// What it takes to execute it as long as it is open, without owning it.
    pub fn to_execute(&self) -> Execute {
        Execute { number: self.file.as_raw_fd(), path: self.path.clone() }
    }

    /// The program that this process executes now, whatever lies at its path meanwhile.
    ///
    /// # Errors
    /// [`ProgramError::Open`] if the kernel does not give it.
    pub fn running() -> Result<Self, ProgramError> {
        let path = Self::this_path().unwrap_or_default();
        match File::open("/proc/self/exe") {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(ProgramError::Open { path, source }),
        }
    }

    /// The program that was opened as `file` by another process or program.
    pub fn opened(file: OwnedFd) -> Self {
        let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default();
        Self { path, file: file.into() }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl From<Program> for OwnedFd {
    fn from(program: Program) -> Self {
        program.file.into()
    }
}

/// A program that is open in this process, by its number.
#[derive(Debug)]
pub struct Execute {
    number: RawFd,
    path: PathBuf,
}

impl Execute {
    /// Has this process execute it with `arguments`. Returns only if that fails.
    pub fn now<A: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = A>) -> ProgramError {
        let source =
            Command::new(format!("/proc/self/fd/{}", self.number)).arg0(&self.path).args(arguments).exec();
        ProgramError::Start { path: self.path, source }
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

    /// How it ended, if it does so by itself within `patience`.
    pub fn ended(&mut self, patience: Duration) -> Option<ExitStatus> {
        let child = self.child.as_mut()?;
        let until = Deadline::after(patience);
        loop {
            match child.try_wait() {
                Ok(None) if !until.has_passed() => thread::sleep(Duration::from_millis(1)),
                ended => return ended.ok().flatten(),
            }
        }
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
    fn a_successor_that_ends_by_itself_says_how() {
        let paths = ["/bin/false", "/bin/sleep"].map(PathBuf::from);
        let start = |path: &PathBuf| Program::open(path, &paths).unwrap().start(["60"]).unwrap();
        let (_channel, mut ended) = start(&paths[0]);
        assert_eq!(ended.ended(Duration::from_secs(10)).and_then(|status| status.code()), Some(1));
        let (_channel, mut runs) = start(&paths[1]);
        assert_eq!(runs.ended(Duration::from_millis(5)), None);
    }

    #[test]
    fn the_path_of_this_program_is_its_file() {
        assert!(Program::this_path().unwrap().is_file());
        assert!(Program::this().is_ok());
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
