//! Region 0 of a machine: of one that runs, or in a file.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::path::PathBuf;

use ::vmm::control::Status;
use abi::Memory;
use abi::NoMemory;
use abi::arena::Header;
use anyhow::Context as _;
use anyhow::bail;
use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use survey::Options;
use survey::Root;

use super::Source;
use super::Told;
use crate::verbs;

/// A file whose bytes are memory from address 0 on.
pub(super) struct Flat {
    file: File,
    len: u64,
}

impl Flat {
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let (file, len) = super::open_file(path)?;
        if len < PAGE_SIZE {
            bail!("{} has {len} bytes, which is no region 0 of a machine", shown(path));
        }
        Ok(Self { file, len })
    }

    pub(super) const fn new(file: File, len: u64) -> Self {
        Self { file, len }
    }

    /// The pages that hold something: what the file system keeps no bytes of is zero.
    pub(super) fn data(&self) -> Vec<PageRange> {
        let whole = || self.runs();
        let mut data = Vec::new();
        let (mut at, end) = (0, self.len / PAGE_SIZE * PAGE_SIZE);
        while at < end {
            let from = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(from) => from / PAGE_SIZE * PAGE_SIZE,
                Err(Errno::NXIO) => break,
                // A file that does not tell.
                Err(_) => return whole(),
            };
            let Ok(to) = rustix::fs::seek(&self.file, SeekFrom::Hole(from.max(at))) else { return whole() };
            let to = to.next_multiple_of(PAGE_SIZE).min(end);
            if to <= from.max(at) {
                break;
            }
            data.extend(PageRange::of_bytes(from.max(at), to - from.max(at)));
            at = to;
        }
        data
    }
}

/// A path for people.
pub(super) fn shown(path: &Path) -> String {
    path.to_string_lossy().escape_debug().to_string()
}

impl Memory for Flat {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        self.file.read_exact_at(into, address).map_err(|_| NoMemory::at(address, into.len()))
    }

    fn runs(&self) -> Vec<PageRange> {
        PageRange::new(Pfn::ZERO, self.len / PAGE_SIZE).into_iter().collect()
    }
}

pub(super) fn open(text: &str, path: &str) -> anyhow::Result<Source> {
    let memory = Flat::open(Path::new(path))?;
    Ok(source("arena", text, memory, Vec::new()))
}

fn source(kind: &'static str, text: &str, memory: Flat, notes: Vec<String>) -> Source {
    let holds = "region 0: all metadata. Guest memory lies in other files and is not looked at".to_owned();
    let told = Told { kind, name: text.to_owned(), holds, notes };
    Source { memory: Box::new(memory), root: Root::Arena, options: Options::default(), told }
}

/// Region 0 of a machine that runs, among what its VMM has open.
pub(super) fn of_machine(name: &str) -> anyhow::Result<Source> {
    let status = verbs::status_to_look(name)?;
    let path = region0(&status)?;
    let memory = Flat::open(&path)?;
    let note =
        format!("it runs: what its VMM changes meanwhile may be seen half; {} is its region 0", shown(&path));
    Ok(source("machine", name, memory, vec![note]))
}

fn region0(status: &Status) -> anyhow::Result<PathBuf> {
    let directory = PathBuf::from(format!("/proc/{}/fd", status.pid));
    let entries = std::fs::read_dir(&directory).with_context(|| {
        format!("cannot see what the VMM of {} has open: its user or root may", status.name)
    })?;
    for entry in entries.flatten() {
        let path = entry.path();
        let memfd = std::fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:"));
        let is_its = |memory: Flat| {
            Header::read(&memory).is_ok_and(|header| header.identity().to_string() == status.identity)
        };
        if memfd && Flat::open(&path).is_ok_and(is_its) {
            return Ok(path);
        }
    }
    bail!("process {} has no region 0 of {} open", status.pid, status.name)
}
