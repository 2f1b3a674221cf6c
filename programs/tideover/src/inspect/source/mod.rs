//! Where a state is read from.

mod arena;
mod candidates;
mod debugfs;
mod elf;
mod image;
mod search;
mod unpack;

use std::fs::File;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::str::FromStr;

use abi::Memory;
use anyhow::Context as _;
use anyhow::bail;
use rustix::fs::OFlags;
use rustix::fs::SeekFrom;
use serde::Serialize;
use survey::Options;
use survey::Root;
use survey::Survey;

/// A source: its memory, where the state begins in it, and what is to be known of it.
pub(crate) struct Source {
    memory: Box<dyn Memory>,
    root: Root,
    options: Options,
    /// For people and for JSON.
    pub(crate) told: Told,
}

/// What a source is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Told {
    /// `machine`, `arena`, `debugfs` or `memory`.
    pub(crate) kind: &'static str,
    /// As it was given.
    pub(crate) name: String,
    /// What of it can be read.
    pub(crate) holds: String,
    /// Else what is to be known of it.
    pub(crate) notes: Vec<String>,
}

/// What is told of a source by who names it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Hints {
    /// The address of the root FDT.
    pub(crate) fdt: Option<u64>,
    /// The kernel in it had read its state, and ran.
    pub(crate) booted: bool,
}

/// Opens a file that can be read by offset, and gives its length. Nothing else is waited for or read without end.
fn open_file(path: &Path) -> anyhow::Result<(File, u64)> {
    if path.as_os_str().is_empty() {
        bail!("no file is named");
    }
    let cannot = |what: &str| format!("cannot {what} {}", arena::shown(path));
    // A pipe would be waited for.
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file =
        File::options().read(true).custom_flags(nonblocking).open(path).with_context(|| cannot("open"))?;
    let metadata = file.metadata().with_context(|| cannot("look at"))?;
    match metadata.file_type() {
        kind if kind.is_file() => Ok((file, metadata.len())),
        kind if kind.is_block_device() => {
            let len =
                rustix::fs::seek(&file, SeekFrom::End(0)).with_context(|| cannot("tell the length of"))?;
            Ok((file, len))
        }
        _ => bail!("{} is no file that memory could be in", arena::shown(path)),
    }
}

/// A source as the command line names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    kind: Kind,
    text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Machine,
    Arena,
    Debugfs,
    Memory,
}

impl Named {
    /// As it was given.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// It is a whole machine's memory, of which something can be told besides.
    pub(crate) fn is_memory(&self) -> bool {
        self.kind == Kind::Memory
    }
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kinds = "a machine's name, arena:PATH, debugfs:DIR or memory:FILE";
        let kind = match text.split_once(':').map(|(kind, _)| kind) {
            None if text.is_empty() => return Err(format!("a source is {kinds}, and not empty")),
            None => Kind::Machine,
            Some("arena") => Kind::Arena,
            Some("debugfs") => Kind::Debugfs,
            Some("memory") => Kind::Memory,
            Some(other) => return Err(format!("`{}` is no kind of source: {kinds}", other.escape_debug())),
        };
        Ok(Self { kind, text: text.to_owned() })
    }
}

impl Source {
    /// Opens the source that was named.
    pub(crate) fn open(named: &Named, hints: Hints) -> anyhow::Result<Self> {
        let text = named.text.as_str();
        let path = text.split_once(':').map_or("", |(_, path)| path);
        match named.kind {
            Kind::Machine => arena::of_machine(text),
            Kind::Arena => arena::open(text, path),
            Kind::Debugfs => debugfs::open(text, path),
            Kind::Memory => image::open(text, path, hints),
        }
    }

    /// Makes out what is there.
    pub(crate) fn survey(&self) -> Survey {
        Survey::read(&self.memory.as_ref(), &self.root, self.options)
    }

    /// What a survey was made of.
    pub(crate) fn memory(&self) -> &dyn Memory {
        self.memory.as_ref()
    }
}
