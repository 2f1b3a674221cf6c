//! The rules that a state has to keep to, by name.

use abi::Malformed;
use abi::Problem;

use crate::model::Severity;

/// A rule. Its name stays for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// What it is called.
    pub name: &'static str,
    /// How bad it is if it is broken.
    pub severity: Severity,
    /// What it says.
    pub says: &'static str,
    /// Whose rule it is: the format that has it.
    pub source: &'static str,
}

const fn error(name: &'static str, source: &'static str, says: &'static str) -> Rule {
    Rule { name, severity: Severity::Error, says, source }
}

const fn warning(name: &'static str, source: &'static str, says: &'static str) -> Rule {
    Rule { name, severity: Severity::Warning, says, source }
}

const fn note(name: &'static str, source: &'static str, says: &'static str) -> Rule {
    Rule { name, severity: Severity::Note, says, source }
}

/// All rules, by what they are about.
pub const RULES: &[Rule] = &[
    error("address-in-range", "all formats", "an address leads to memory that is there"),
    error("address-not-zero", "all formats", "an address that has to be set is not 0"),
    error(
        "page-alignment",
        "all formats",
        "the address of a page, a node, a chunk or a block is a multiple of 4096",
    ),
    error("referred-twice", "all formats", "preserved memory is one thing: nothing else refers to it"),
    error("referred-preserved", "all formats", "what is referred to is preserved"),
    warning("preserved-referred", "all formats", "what is preserved is referred to by something"),
    error(
        "fdt-structure",
        "device tree",
        "the device tree is one, of version 16 or 17, whole and nested right",
    ),
    error("fdt-size", "kho-v4", "the root FDT is no longer than its page"),
    error("kho-version", "kho-v4", "the root FDT is of a version that is read"),
    error("kho-map", "kho-v4", "preserved-memory-map is there and 8 bytes long"),
    error("kho-subtree", "kho-v4", "a subtree has preserved-data and blob-size, 8 bytes each"),
    error("kho-subtree-name", "kho-v4", "a subtree's name has 1 to 31 bytes"),
    error("kho-subtree-twice", "kho-v4", "no two subtrees have one name"),
    note("kho-subtree-known", "kho-v4", "a subtree is one that can be read"),
    error("tree-node-once", "radix tree", "a node stands in the tree once: the tree has no cycle"),
    error("tree-key-width", "radix tree", "keys have 53 bits"),
    error("tree-key-order", "radix tree", "a key names a block of order 0 to 51"),
    error("tree-no-overlap", "radix tree", "no block lies in a larger one that is preserved, too"),
    error("tree-in-range", "radix tree", "a preserved block is memory that is there"),
    error("vmalloc-total", "kho_vmalloc", "the blocks are exactly as many pages as the descriptor says"),
    error("vmalloc-order", "kho_vmalloc", "the order of a list's blocks is 0 to 51"),
    warning("vmalloc-flags", "kho_vmalloc", "a list's flags are those that are known: bits 0 and 1"),
    error("vmalloc-no-cycle", "kho_vmalloc", "no chunk comes again"),
    error("vmalloc-chunk-full", "kho_vmalloc", "a chunk that another one follows names 511 blocks"),
    warning(
        "vmalloc-trailing-chunk",
        "kho_vmalloc",
        "a full chunk is followed by another, if by an empty one",
    ),
    error("block-once", "kho block", "a block stands in one chain, once: no chain has a cycle"),
    error("block-count", "kho block", "a block has one entry at least, and no more than it holds"),
    error("block-chain", "kho block", "a chain has 10,000 blocks at most"),
    warning("block-filled", "kho block", "a block that another one follows is full"),
    error("luo-size", "luo-v5", "the blob has 32 bytes at least"),
    error("luo-version", "luo-v5", "the blob is of a version that is read"),
    error("flb-pages", "luo-v5", "the table of shared objects is one page"),
    error("flb-count", "luo-v5", "there are 63 shared objects at most"),
    error("flb-name", "luo-v5", "a shared object has a name of 1 to 47 bytes, which no other has"),
    error("flb-users", "luo-v5", "a shared object is used by a file at least"),
    error("session-name", "luo-v5", "a session has a name of 1 to 63 bytes"),
    error("session-name-once", "luo-v5", "no two sessions have one name"),
    error("session-file-count", "luo-v5", "a session has as many files as it says"),
    error("token-once", "luo-v5", "no two files of a session have one token"),
    error("handler-name", "luo-v5", "a file has a handler's name of 1 to 47 bytes"),
    warning("handler-known", "luo-v5", "a file's handler is one whose format is read"),
    error("memfd-seals", "memfd-v2", "a memfd's seals are among the six that there are"),
    error("memfd-flags", "memfd-v2", "a memfd has no flags"),
    error("memfd-size", "memfd-v2", "a memfd has less than 2^32 pages"),
    note("memfd-no-holes", "memfd-v2", "a memfd's list has no record without memory: its writer fills holes"),
    error(
        "folio-count",
        "folio list",
        "a file has no more folios than pages, and as many as its list has room for",
    ),
    error("folio-flags", "folio list", "a folio's flags are those of its format"),
    error("folio-ascends", "folio list", "folios ascend in the file and do not overlap there"),
    error("folio-alignment", "folio list", "a folio is aligned to its size, in the file and in memory"),
    error("folio-in-file", "folio list", "a folio begins in its file"),
    error("folio-preserved", "folio list", "a folio's frames are a preserved block"),
    error("guest-memfd-size", "guest_memfd_luo_v1", "a guest_memfd has whole pages, one at least"),
    error("guest-memfd-flags", "guest_memfd_luo_v1", "a guest_memfd's flags are bits 0 and 1"),
    error(
        "guest-memfd-frame",
        "guest_memfd_luo_v1",
        "a guest_memfd's record has a frame: holes have no record",
    ),
    error("guest-memfd-order", "guest_memfd_luo_v1", "a guest_memfd's folios are single pages"),
    error("guest-memfd-vm", "guest_memfd_luo_v1", "a guest_memfd's vm_token names a VM of the same session"),
    warning(
        "kvm-vm-layout",
        "kvm_vm_luo_v1",
        "a VM has the layout of 8 bytes, which is the only one that is agreed on",
    ),
    error("kexec-metadata", "kexec-metadata", "the blob has version 1, 73 bytes and a release"),
    error(
        "memblock",
        "memblock-v1",
        "the blob is a page's device tree of eight named regions at most, each with start and size",
    ),
    error("record-kind", "tideover records", "a record is of the kind that it is listed as"),
    error("record-version", "tideover records", "a record is of a version that is read"),
    error("record-size", "tideover records", "a record is no longer than its format allows"),
    error("record-checksum", "tideover records", "a record's checksum is that of its bytes"),
    error("record-fields", "tideover records", "a record's fields are what its format allows"),
    error("machine-identity", "tideover records", "all records are of the arena's machine"),
    error("gmem-size", "tideover-gmem-v1", "guest memory has whole pages, one at least"),
    error("gmem-flags", "tideover-gmem-v1", "guest memory's flags are bits 0 and 1"),
    error("extent-fields", "tideover-gmem-v1", "an extent has a frame, a length and no flags"),
    error("extent-ascends", "tideover-gmem-v1", "extents ascend in the file and do not overlap there"),
    error("extent-in-file", "tideover-gmem-v1", "an extent lies in its file"),
    error("extent-once", "tideover-gmem-v1", "no frame is in two extents"),
    error("state-checksum", "tideover-state-v1", "a state's checksum is that of its bytes"),
    error("state-list", "tideover-state-v1", "a state's list has as many pages as its bytes take"),
    error("state-epoch", "tideover-state-v1", "all states were saved for one seal"),
    error(
        "regions",
        "tideover-regions-v3",
        "regions ascend, do not overlap, and have sizes that fit their stores",
    ),
    error(
        "arena-header",
        "tideover-arena-v1",
        "the header has its magic, version, checksum and a size that is there",
    ),
    error("arena-root-slot", "tideover-arena-v1", "one of two root slots is valid"),
    error("arena-ownership", "tideover-arena-v1", "the ownership word has a state and a nonce"),
    error(
        "arena-blocks",
        "tideover-arena-v1",
        "in region 0 preserved blocks are single frames, and the first is none",
    ),
];

/// The rule of this name.
pub fn rule(name: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.name == name)
}

/// The rule that what a decoder found breaks.
pub(crate) fn broken_by(fault: &Malformed) -> &'static str {
    let Malformed { format, field, problem, .. } = fault;
    if matches!(problem, Problem::Unreadable(_)) {
        return "address-in-range";
    }
    match *format {
        abi::kho::COMPATIBLE => kho(field, problem),
        "kho radix tree" => tree(field, problem),
        "kho_vmalloc" => vmalloc(field, problem),
        "kho block" => block(field, problem),
        abi::luo::COMPATIBLE => luo(field, problem),
        "luo flb" => match *field {
            "pgcnt" => "flb-pages",
            "count" => "flb-count",
            "files" => "flb-users",
            _ => "flb-name",
        },
        abi::memfd::COMPATIBLE | abi::memfd::COMPATIBLE_V1 => match *field {
            "seals" => "memfd-seals",
            "flags" => "memfd-flags",
            _ => folio(field, problem),
        },
        abi::guest_memfd::COMPATIBLE => match (*field, problem) {
            ("size", _) => "guest-memfd-size",
            ("flags", _) => "guest-memfd-flags",
            ("folio pfn", Problem::Zero) => "guest-memfd-frame",
            _ => folio(field, problem),
        },
        abi::kvm_vm::COMPATIBLE => "kvm-vm-layout",
        abi::kexec_metadata::SUBTREE => "kexec-metadata",
        abi::memblock::COMPATIBLE => "memblock",
        "tideover-arena-v1" | "kho tree of an arena" => match *field {
            "root slot" | "generation" => "arena-root-slot",
            "state" | "nonce" => "arena-ownership",
            _ => "arena-header",
        },
        _ => record(format, field, problem),
    }
}

fn kho(field: &str, problem: &Problem) -> &'static str {
    match (field, problem) {
        ("compatible", _) => "kho-version",
        ("totalsize", _) => "fdt-size",
        ("preserved-memory-map", Problem::Zero) => "address-not-zero",
        ("preserved-memory-map" | "fdt", Problem::Misaligned { .. }) => "page-alignment",
        ("preserved-memory-map", _) => "kho-map",
        ("subtree", Problem::Repeated { .. }) => "kho-subtree-twice",
        ("subtree", _) => "kho-subtree-name",
        ("preserved-data" | "blob-size" | "fdt", _) => "kho-subtree",
        _ => "fdt-structure",
    }
}

fn tree(field: &str, problem: &Problem) -> &'static str {
    match (field, problem) {
        (_, Problem::Misaligned { .. }) => "page-alignment",
        (_, Problem::Zero) => "address-not-zero",
        (_, Problem::Repeated { .. }) => "tree-node-once",
        ("slot", _) => "tree-key-width",
        _ => "tree-key-order",
    }
}

fn vmalloc(field: &str, problem: &Problem) -> &'static str {
    match (field, problem) {
        (_, Problem::Misaligned { .. }) => "page-alignment",
        ("order", _) => "vmalloc-order",
        ("next", Problem::Repeated { .. }) => "vmalloc-no-cycle",
        ("next", _) => "vmalloc-chunk-full",
        _ => "vmalloc-total",
    }
}

fn block(field: &str, problem: &Problem) -> &'static str {
    match (field, problem) {
        (_, Problem::Misaligned { .. }) => "page-alignment",
        (_, Problem::Repeated { .. }) => "block-once",
        ("next", _) => "block-chain",
        _ => "block-count",
    }
}

fn luo(field: &str, problem: &Problem) -> &'static str {
    match (field, problem) {
        (_, Problem::Misaligned { .. }) => "page-alignment",
        ("flbs_pa", Problem::Zero) => "address-not-zero",
        ("flbs_pa", _) => "block-once",
        ("blob-size", _) => "luo-size",
        ("compatible", _) => "luo-version",
        ("session name", Problem::Repeated { .. }) => "session-name-once",
        ("session name", _) => "session-name",
        ("file count", _) => "session-file-count",
        ("token", _) => "token-once",
        _ => "handler-name",
    }
}

fn folio(field: &str, problem: &Problem) -> &'static str {
    match (field, problem) {
        ("folio flags", _) => "folio-flags",
        ("folio index" | "folio pfn", Problem::Misaligned { .. }) => "folio-alignment",
        ("folio index", Problem::TooLarge { .. }) => "folio-in-file",
        ("folio index", _) => "folio-ascends",
        ("folio pfn", _) => "folio-preserved",
        _ => "folio-count",
    }
}

fn record(format: &str, field: &str, problem: &Problem) -> &'static str {
    let gmem = format == abi::gmem::FORMAT.compatible;
    match (field, problem) {
        ("address", Problem::Misaligned { .. }) => "page-alignment",
        ("address", Problem::Zero) => "address-not-zero",
        ("magic" | "kind", _) => "record-kind",
        ("version", _) => "record-version",
        ("payload_bytes", _) => "record-size",
        ("checksum", _) => "record-checksum",
        ("list.total_pages" | "length in pages" | "len_bytes", _) => "state-list",
        ("size_bytes", _) if gmem => "gmem-size",
        ("flags", _) if gmem => "gmem-flags",
        ("extent index", Problem::Structure(_)) => "extent-ascends",
        ("extent index", _) => "extent-in-file",
        ("extent pfn", Problem::Repeated { .. }) => "extent-once",
        ("extent" | "extent flags" | "extent pfn", _) => "extent-fields",
        ("base" | "store" | "size_bytes" | "page_bytes" | "count", _)
            if format == abi::regions::FORMAT.compatible =>
        {
            "regions"
        }
        _ => "record-fields",
    }
}
