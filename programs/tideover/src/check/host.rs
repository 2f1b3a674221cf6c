//! The host that is looked at: files below a folder, and what only calls tell.

use std::fs;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::path::PathBuf;

use ::vmm::control::Status;
use rustix::fs::Mode;
use rustix::fs::OFlags;

use super::device::Device;
use super::live::Live;

/// More than any file has that is read whole here.
const MOST_BYTES: u64 = 32 << 20;

/// What only calls tell.
pub(super) trait Calls {
    /// What comes of opening `/dev/liveupdate`.
    fn device(&self) -> Device;
    /// Whether a kernel could be loaded by kexec_file_load.
    fn file_load(&self) -> Result<(), ::liveupdate::kexec::LoadError>;
    /// The machines of this user.
    fn machines(&self) -> anyhow::Result<Vec<String>>;
    /// How a machine is.
    fn status(&self, machine: &str) -> anyhow::Result<Status>;
}

/// A host.
pub(crate) struct Host {
    root: PathBuf,
    pub(super) calls: Box<dyn Calls>,
}

impl Host {
    /// The one that this process runs on.
    pub(crate) fn this() -> Self {
        Self { root: PathBuf::from("/"), calls: Box::new(Live) }
    }

    #[cfg(test)]
    pub(super) fn made(root: &Path, calls: Box<dyn Calls>) -> Self {
        Self { root: root.canonicalize().unwrap(), calls }
    }

    /// One below a folder, whose calls are nevertheless those of this one.
    #[cfg(test)]
    pub(crate) fn below(root: &Path) -> Self {
        Self::made(root, Box::new(Live))
    }

    /// Where a file is that has this absolute path on the host.
    pub(crate) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The path on the host of what is here, all links followed.
    pub(crate) fn real(&self, path: &Path) -> Option<PathBuf> {
        let real = self.path(path).canonicalize().ok()?;
        Some(Path::new("/").join(real.strip_prefix(&self.root).ok()?))
    }

    pub(crate) fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// A file's text, without the white space around it.
    pub(crate) fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let bytes = self.bytes(path)?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// A file's text as it is, with the white space that its first line begins with.
    pub(crate) fn lines(&self, path: impl AsRef<Path>) -> Option<String> {
        Some(String::from_utf8_lossy(&self.bytes(path)?).into_owned())
    }

    pub(crate) fn bytes(&self, path: impl AsRef<Path>) -> Option<Vec<u8>> {
        read(File::open(self.path(path)).ok()?)
    }

    pub(crate) fn number(&self, path: impl AsRef<Path>) -> Option<i64> {
        self.text(path)?.parse().ok()
    }

    /// What is in a folder, by name.
    pub(crate) fn names(&self, folder: &str) -> Vec<String> {
        let all = entries(&self.path(folder)).into_iter();
        all.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect()
    }

    /// The kernel's log, record by record, as far as it goes now; `None` if this process may not read it.
    pub(super) fn kernel_log(&self) -> Option<String> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::open(self.path("/dev/kmsg"), flags, Mode::empty()).ok()?);
        let (mut all, mut record) = (Vec::new(), [0; 1 << 14]);
        // Each read gives one record; EPIPE says that some were overwritten before.
        while all.len() < 1 << 24 {
            match file.read(&mut record) {
                Ok(read @ 1..) => all.extend_from_slice(&record[..read]),
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
                Ok(0) | Err(_) => break,
            }
        }
        Some(String::from_utf8_lossy(&all).into_owned())
    }

    /// What the processes have open, as far as this process may know.
    pub(crate) fn open_files(&self) -> Vec<OpenFile> {
        let processes = entries(&self.path("/proc")).into_iter().filter_map(|process| {
            let pid: u32 = process.file_name()?.to_str()?.parse().ok()?;
            Some((pid, process))
        });
        processes.flat_map(|(pid, process)| open_files(pid, &process)).collect()
    }

    /// What a process has open; `None` if this one may not know.
    pub(crate) fn open_files_of(&self, pid: u32) -> Option<Vec<OpenFile>> {
        let process = self.path(format!("/proc/{pid}"));
        fs::read_dir(process.join("fd")).ok()?;
        Some(open_files(pid, &process))
    }

    /// What a process is called.
    pub(crate) fn process_name(&self, pid: u32) -> String {
        let name = self.text(format!("/proc/{pid}/comm"));
        name.unwrap_or_else(|| "?".to_owned()).escape_debug().to_string()
    }
}

fn read(file: File) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MOST_BYTES).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// A file that a process has open.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) pid: u32,
    /// Leads to the file itself.
    pub(crate) link: PathBuf,
    /// What the kernel calls it.
    pub(crate) name: String,
}

fn open_files(pid: u32, process: &Path) -> Vec<OpenFile> {
    let links = entries(&process.join("fd")).into_iter();
    let named = links.filter_map(|link| Some((fs::read_link(&link).ok()?, link)));
    named.map(|(name, link)| OpenFile { pid, link, name: name.to_string_lossy().into_owned() }).collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let found = fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut all: Vec<PathBuf> = found.collect();
    all.sort_unstable();
    all
}
