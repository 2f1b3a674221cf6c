//! What was found, as plain data.
//!
//! Lengths are in bytes and addresses are physical ones, unless a field says otherwise. All of it can be serialized; the field
//! names are those of the JSON that `tideover inspect` gives.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use pages::PageRange;
use serde::Serialize;
use serde::Serializer;
use serde::ser::SerializeStruct as _;

/// A name as others gave it: any bytes.
///
/// Shown, every byte that is no printable ASCII is escaped. Serialized, it is a `name` and a `name_hex`: the name as it is,
/// and nothing, if it is UTF-8; else the name as it is shown, and its bytes in hexadecimal.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(Vec<u8>);

impl Name {
    /// The name of these bytes.
    pub fn new(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    /// The name in a field: everything up to the first NUL, or all of it.
    pub fn of_field(field: &[u8]) -> Self {
        Self::new(field.split(|byte| *byte == 0).next().unwrap_or_default())
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The name as it is, if it is UTF-8, else as it is shown. Not for a terminal.
    pub fn text(&self) -> String {
        match core::str::from_utf8(&self.0) {
            Ok(text) => String::from(text),
            Err(_) => alloc::format!("{self}"),
        }
    }

    /// Its bytes in hexadecimal, if it is not UTF-8.
    pub fn hex(&self) -> Option<String> {
        let hex = || self.0.iter().map(|byte| alloc::format!("{byte:02x}")).collect();
        core::str::from_utf8(&self.0).is_err().then(hex)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Name", 2)?;
        fields.serialize_field("name", &self.text())?;
        fields.serialize_field("name_hex", &self.hex())?;
        fields.end()
    }
}

/// All that was made out.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Survey {
    /// The arena that the rest is in, if it is one.
    pub arena: Option<Arena>,
    /// Kexec Handover: which memory stays, and the named blobs.
    pub kho: Option<Kho>,
    /// The Live Update Orchestrator: sessions and files.
    pub luo: Option<Luo>,
    /// Which kernel wrote it.
    pub kexec: Option<KexecMetadata>,
    /// Memory that was reserved by name (`reserve_mem=`).
    pub memblock: Vec<ReservedMemory>,
    /// Everything that refers to preserved memory. Ranges and cells name them by their place here.
    pub owners: Vec<Owner>,
    /// Preserved memory by address and owner, ascending.
    pub ranges: Vec<Range>,
    /// Ranges that were too many to be listed.
    pub ranges_left_out: u64,
    /// Where preserved memory lies, in cells of equal size.
    pub map: Map,
    /// What is preserved and referred to by nothing that could be read.
    pub unreferenced: Unreferenced,
    /// What may be there no more though it is told of.
    pub stale: Vec<Stale>,
    /// What could not be read for want of a reader or of memory, though nothing is wrong with it.
    pub unread: Vec<String>,
    /// What is wrong, in the order in which it was met.
    pub findings: Vec<Finding>,
    /// Findings of a rule that had many already.
    pub findings_left_out: u64,
}

/// How well a version is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Known {
    /// It is read whole.
    Current,
    /// An earlier one: what can still be read of it is.
    Older,
    /// Nothing is known of it.
    #[default]
    Unknown,
}

/// Frame 0 of an arena.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Arena {
    /// The machine's identity, in hexadecimal.
    pub identity: Option<String>,
    /// Bytes of region 0, as the header says.
    pub region0_bytes: Option<u64>,
    /// Both root slots.
    pub slots: Vec<Slot>,
    /// Who owns the machine.
    pub ownership: Option<Ownership>,
    /// The regions, region 0 first.
    pub regions: Vec<Region>,
}

/// A root slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Slot {
    /// Where it is.
    pub address: u64,
    /// Its checksum is right.
    pub valid: bool,
    /// It is the one that counts.
    pub counts: bool,
    /// Number of the change that it published.
    pub generation: u64,
    /// Address of the root FDT.
    pub fdt_address: u64,
}

/// The ownership word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ownership {
    /// Transitions since the machine was made.
    pub epoch: u32,
    /// `running`, `sealed` or `claimed`.
    pub state: String,
    /// Names the hold of the process that owns it.
    pub nonce: u32,
}

/// A region of an arena.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Region {
    /// Its base in the arena's address space.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
    /// The page size that it was made for.
    pub page_bytes: u64,
    /// What its memory comes from.
    pub store: String,
    /// Its NUMA policy.
    pub policy: String,
    /// Inode number of its file.
    pub file: u64,
    /// Its bytes could be read here: those of region 0, and of none other.
    pub readable: bool,
}

/// The root FDT and the tree of preserved memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Kho {
    /// Its compatible string, escaped.
    pub version: String,
    /// How well that is known.
    pub version_known: Known,
    /// Where the root FDT is; none of a blob that was read from a file.
    pub fdt_address: Option<u64>,
    /// Bytes of it.
    pub fdt_bytes: u64,
    /// Root node of the tree of preserved memory.
    pub map_address: Option<u64>,
    /// Preserved memory, in all. None if the tree could not be read.
    pub preserved_bytes: Option<u64>,
    /// Preserved blocks by order (0: 4 KiB, 9: 2 MiB).
    pub preserved_by_order: BTreeMap<u32, u64>,
    /// The same in more detail.
    pub orders: Vec<OrderStats>,
    /// The tree's own nodes.
    pub tree: TreeCost,
    /// Names of the subtrees, the first added first.
    pub subtrees: Vec<String>,
    /// The subtrees.
    pub blobs: Vec<Blob>,
}

/// The preserved blocks of one order.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct OrderStats {
    /// The order.
    pub order: u32,
    /// Bytes of a block of it.
    pub block_bytes: u64,
    /// How many blocks.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Runs of adjacent blocks.
    pub runs: u64,
    /// Leaves of the tree that list them.
    pub leaves: u64,
    /// Blocks that are preserved, of those that these leaves could list: 0 to 1.
    pub density: f64,
    /// Address of the first.
    pub lowest: u64,
    /// Address behind the last one, less 1.
    pub highest: u64,
}

/// What the tree itself takes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TreeCost {
    /// Nodes, each a page.
    pub nodes: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Nodes by level: 5 the root, 0 the leaves.
    pub by_level: BTreeMap<u32, u64>,
    /// The nodes are preserved themselves, as an arena's are and a kernel's are not.
    pub preserved: bool,
}

/// A named blob.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Blob {
    /// Its name.
    #[serde(flatten)]
    pub name: Name,
    /// Where it is.
    pub address: Option<u64>,
    /// Its length; none in the versions that do not say it.
    pub bytes: Option<u64>,
    /// It was made out what it says.
    pub read: bool,
    /// Its place among the owners, if it is one.
    pub owner: Option<usize>,
}

/// Sessions and files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Luo {
    /// Its compatible string, escaped.
    pub version: String,
    /// How well that is known.
    pub version_known: Known,
    /// Number of this update.
    pub liveupdate_number: Option<u64>,
    /// The sessions, the first created first.
    pub sessions: Vec<Session>,
    /// Blocks that list the sessions.
    pub blocks: Vec<u64>,
    /// Objects that files share.
    pub flbs: Vec<Flb>,
    /// Page of the objects that files share.
    pub flbs_address: Option<u64>,
    /// How many files of each handler there are.
    pub handlers: BTreeMap<String, u64>,
}

/// A session.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Session {
    /// Its name.
    #[serde(flatten)]
    pub name: Name,
    /// Files that it says it has.
    pub count: u64,
    /// Blocks that list its files.
    pub blocks: Vec<u64>,
    /// Its files, in the order in which they were preserved.
    pub files: Vec<File>,
}

/// An object that files share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Flb {
    /// Its compatible string.
    #[serde(flatten)]
    pub name: Name,
    /// What its own code knows it by, most likely an address.
    pub data: u64,
    /// Files that need it.
    pub count: u64,
}

/// A file. What its handler's format does not have is none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct File {
    /// Its handler's compatible string, escaped.
    pub handler: String,
    /// How well that is known.
    pub handler_known: Known,
    /// Names it in its session.
    pub token: u64,
    /// The same in hexadecimal, for readers whose numbers have fewer bits.
    pub token_hex: String,
    /// Address of the handler's structure.
    pub data: u64,
    /// Its structure was read.
    pub read: bool,
    /// Its place among the owners.
    pub owner: usize,
    /// Its size.
    pub size: Option<u64>,
    /// Its position.
    pub position: Option<u64>,
    /// Its seals.
    pub seals: Option<u32>,
    /// Their names.
    pub seal_names: Vec<String>,
    /// Its flags.
    pub flags: Option<u64>,
    /// Their names.
    pub flag_names: Vec<String>,
    /// Folios that were found.
    pub folios: Option<u64>,
    /// Bytes of its memory: of the folios, the extents or the state.
    pub bytes: Option<u64>,
    /// What there is of its list of folios.
    pub folio_table: Option<FolioTable>,
    /// Extents of guest memory.
    pub extents: Vec<Extent>,
    /// What it is called.
    pub name: Option<Label>,
    /// Identity of its machine, in hexadecimal.
    pub identity: Option<String>,
    /// Type of the VM.
    pub vm_type: Option<u64>,
    /// How many vCPUs the machine has.
    pub vcpus: Option<u64>,
    /// Token of the VM that guest memory belongs to.
    pub vm_token: Option<u64>,
    /// Which of several layouts of one name it has.
    pub layout: Option<String>,
    /// Epoch of the seal that a state was saved for; 0 if nothing is saved.
    pub epoch: Option<u32>,
    /// Checksum of a state's bytes.
    pub checksum: Option<u32>,
    /// The checksum is that of the bytes.
    pub checksum_right: Option<bool>,
    /// Groups that the state says it holds.
    pub groups: Option<u64>,
    /// What a descriptor is of.
    pub fd_kind: Option<String>,
    /// Its number among those that the carrier hands over.
    pub fd_index: Option<u64>,
    /// What the file's own bytes are: `arena`, region 0 of one, or `note`, what a program says to the one after it.
    pub holds: Option<String>,
    /// The note's text, escaped.
    pub note: Option<String>,
    /// The list of the pages that hold folio records, memory attributes or a state.
    pub list: Option<List>,
    /// Frames of its first pages, while it is looked at.
    #[serde(skip)]
    pub(crate) head: Vec<(u64, PageRange)>,
}

/// A name inside another structure, where the structure itself has none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Label {
    /// The name.
    #[serde(flatten)]
    pub name: Name,
}

/// A list of folios, summarised.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FolioTable {
    /// Records that the file says it has.
    pub records: u64,
    /// Folios by order.
    pub by_order: BTreeMap<u32, u64>,
    /// Folios by the names of their flags.
    pub by_flag: BTreeMap<String, u64>,
    /// Records that say that there is a hole.
    pub hole_records: u64,
    /// Records whose frames are not preserved.
    pub lost_records: u64,
    /// Pages of the file, up to its size, that are in no folio.
    pub hole_pages: u64,
    /// Runs of folios that are adjacent in the file and in memory.
    pub runs: u64,
    /// The largest of them.
    pub largest_runs: Vec<Run>,
}

/// A run of a file's pages in adjacent frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Run {
    /// First page of the file.
    pub index: u64,
    /// Where it is.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
}

/// A run of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Extent {
    /// First page of the file.
    pub index: u64,
    /// Where it is.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
}

/// A list of scattered pages (`kho_vmalloc`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct List {
    /// Address of the first chunk.
    pub first: u64,
    /// Pages that it says it has.
    pub total_pages: u64,
    /// Its flags.
    pub flags: u16,
    /// Order of each block.
    pub order: u16,
    /// Chunks that were met.
    pub chunks: u64,
    /// Blocks that were met.
    pub blocks: u64,
}

/// One folio, where they are listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FolioLine {
    /// First page of the file.
    pub index: u64,
    /// Where it is.
    pub address: u64,
    /// Its length; 0 of a record without memory.
    pub bytes: u64,
    /// Its order.
    pub order: u32,
    /// Its flags.
    pub flags: u16,
}

/// Which kernel wrote the state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct KexecMetadata {
    /// Version of the structure.
    pub version: u32,
    /// The release of the kernel before, escaped.
    pub previous_release: String,
    /// Kexecs with handover since the cold boot.
    pub kexec_count: u32,
}

/// Memory that was reserved by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ReservedMemory {
    /// Its name.
    #[serde(flatten)]
    pub name: Name,
    /// Where it is.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
}

/// What kind of thing refers to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnerKind {
    /// The root FDT and the nodes of the tree.
    Kho,
    /// A named blob.
    Subtree,
    /// Lists of sessions and of shared objects.
    Luo,
    /// A file of a session.
    File,
    /// Memory that was reserved by name.
    Reserved,
}

/// Something that refers to preserved memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Owner {
    /// What kind of thing.
    pub kind: OwnerKind,
    /// For people, escaped.
    pub label: String,
    /// The session that it is in, by its place.
    pub session: Option<usize>,
    /// The file, by its place in the session.
    pub file: Option<usize>,
    /// Preserved bytes that it refers to.
    pub bytes: u64,
    /// Those among them that only say where the others are.
    pub metadata_bytes: u64,
    /// Preserved blocks that it refers to, by order.
    pub by_order: BTreeMap<u32, u64>,
}

/// A run of preserved memory of one owner and one order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Range {
    /// Where it is.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
    /// Order of its blocks.
    pub order: u32,
    /// Who refers to it, by place; none if nothing does that could be read.
    pub owner: Option<usize>,
}

/// Where preserved memory lies.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Map {
    /// Bytes of a cell: a power of two.
    pub cell_bytes: u64,
    /// Cells from address 0 up to the end of memory.
    pub cells: u64,
    /// The cells in which something is preserved, ascending.
    pub used: Vec<Cell>,
}

/// A cell of the map.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// Its place, from 0.
    pub index: u64,
    /// Preserved bytes in it.
    pub bytes: u64,
    /// Those among them that nothing refers to that could be read.
    pub unreferenced_bytes: u64,
    /// Who has most of it, by place.
    pub owner: Option<usize>,
    /// The largest order of a block in it.
    pub order: u32,
}

/// What nothing refers to that could be read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Unreferenced {
    /// Bytes.
    pub bytes: u64,
    /// Blocks.
    pub blocks: u64,
    /// Runs of blocks.
    pub runs: u64,
    /// The first of them; the others are among the ranges.
    pub first: Vec<Run>,
    /// Something that could not be read may refer to it.
    pub perhaps_by_unread: bool,
}

/// What may be there no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stale {
    /// What.
    pub what: String,
    /// Why.
    pub why: String,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// To be known.
    Note,
    /// Odd, and no reader minds; or wrong in memory that may be used for something else by now.
    Warning,
    /// A reader refuses it, loses something by it, or should.
    Error,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The rule that is broken: its name stays for good.
    pub rule: &'static str,
    /// How bad that is.
    pub severity: Severity,
    /// What it is about, for people, escaped.
    pub subject: String,
    /// Where, if it is at one place.
    pub address: Option<u64>,
    /// Which field.
    pub field: Option<&'static str>,
    /// What is wrong, for people.
    pub words: String,
}
