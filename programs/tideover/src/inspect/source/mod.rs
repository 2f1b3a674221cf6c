//! Where a state is read from.

mod arena;
mod debugfs;
mod elf;
mod image;
mod search;
mod unpack;

use abi::Memory;
use anyhow::bail;
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

impl Source {
    /// Opens the source that a text names. `fdt` is the address of the root FDT, if it was given.
    pub(crate) fn open(text: &str, fdt: Option<u64>) -> anyhow::Result<Self> {
        let source = match text.split_once(':') {
            Some(("memory", path)) => return image::open(text, path, fdt),
            Some(("arena", path)) => arena::open(text, path),
            Some(("debugfs", path)) => debugfs::open(text, path),
            Some((other, _)) => bail!(
                "`{}` is no kind of source: a machine's name, arena:PATH, debugfs:DIR or memory:FILE",
                other.escape_debug()
            ),
            None => arena::of_machine(text),
        };
        if fdt.is_some() {
            bail!("--fdt-address is for memory:FILE: of every other source it is known where it begins");
        }
        source
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
