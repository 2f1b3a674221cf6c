//! A whole machine's memory: a raw image, plain or packed, an ELF core, or /proc/kcore.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use abi::Memory;
use abi::fdt;
use anyhow::Context as _;
use anyhow::bail;
use pages::PAGE_BYTES;
use pages::PageRange;
use survey::Options;
use survey::Root;
use survey::Survey;

use super::Source;
use super::Told;
use super::arena::Flat;
use super::arena::shown;
use super::elf;
use super::search;
use super::unpack;

/// First bytes of what makedumpfile writes.
const KDUMP: &[u8] = b"KDUMP   ";
const DISKDUMP: &[u8] = b"DISKDUMP";

pub(super) fn open(text: &str, path: &str, fdt: Option<u64>) -> anyhow::Result<Source> {
    let path = Path::new(path);
    let file = File::open(path).with_context(|| format!("cannot open {}", shown(path)))?;
    let mut first = [0; 64];
    let len = file.read_at(&mut first, 0).with_context(|| format!("cannot read {}", shown(path)))?;
    let first = &first[..len];
    let running = path == Path::new("/proc/kcore");
    let Opened { memory, holds, data } = match () {
        () if first.starts_with(&unpack::ZSTD) => {
            let (file, len) =
                unpack::unpack(file).with_context(|| format!("cannot unpack {}", shown(path)))?;
            of_file(file, len).with_context(|| format!("cannot read what is in {}", shown(path)))?
        }
        () if first.starts_with(KDUMP) || first.starts_with(DISKDUMP) => bail!(
            "{} is a compressed dump of makedumpfile's: have it written as ELF (makedumpfile -E)",
            shown(path)
        ),
        () => {
            let len = file.metadata().with_context(|| format!("cannot look at {}", shown(path)))?.len();
            of_file(file, len).with_context(|| format!("cannot read {}", shown(path)))?
        }
    };
    let mut told = Told { kind: "memory", name: text.to_owned(), holds, notes: Vec::new() };
    let options = Options { running, partial: false };
    if running {
        told.notes.push(
            "it is the memory of the kernel that runs here: what it changes meanwhile may be seen half"
                .to_owned(),
        );
    }
    let address = match fdt {
        Some(address) => address,
        None => find(memory.as_ref(), data, options, &mut told)?,
    };
    Ok(Source { memory, root: Root::Fdt(address), options, told })
}

/// Memory, what is said of it, and where in it something is.
struct Opened {
    memory: Box<dyn Memory>,
    holds: String,
    data: Vec<PageRange>,
}

fn of_file(file: File, len: u64) -> anyhow::Result<Opened> {
    let mut magic = [0; 4];
    if file.read_exact_at(&mut magic, 0).is_ok() && magic == *b"\x7fELF" {
        let core = elf::Core::open(file)?;
        let holds = format!(
            "an ELF core: {} of memory in {} segments",
            crate::size::show(core.len_bytes()),
            core.segments()
        );
        return Ok(Opened { data: core.runs(), memory: Box::new(core), holds });
    }
    if len < PAGE_BYTES as u64 {
        bail!("it has {len} bytes, which is no memory of a machine");
    }
    let holds = format!("a raw image: {} of memory from address 0 on", crate::size::show(len));
    let memory = Flat::new(file, len);
    Ok(Opened { data: memory.data(), memory: Box::new(memory), holds })
}

/// The root FDT, among all pages that look like one.
fn find(memory: &dyn Memory, data: Vec<PageRange>, options: Options, told: &mut Told) -> anyhow::Result<u64> {
    let found = search::search(memory, data);
    let best = found.candidates.iter().copied().max_by_key(|address| {
        let survey = Survey::read(&memory, &Root::Fdt(*address), options);
        let errors = survey.findings.len();
        let tree = survey.kho.and_then(|kho| kho.preserved_bytes).is_some_and(|bytes| bytes > 0);
        // What the boot loader of the next kernel names is it, if it holds anything.
        (tree, found.named.contains(address), survey.luo.is_some(), std::cmp::Reverse(errors))
    });
    let Some(best) = best else {
        bail!(
            "there is no root FDT of Kexec Handover in it: no page begins with a device tree of kho-v1 or later; if you know \
             that there is, --fdt-address says where"
        );
    };
    let mut page = vec![0; PAGE_BYTES];
    let version = memory.read(best, &mut page).ok().and_then(|()| fdt::compatible(&page));
    let version = version.map(|version| version.escape_ascii().to_string()).unwrap_or_default();
    told.notes.push(format!("the root FDT was found by a search, at {best:#x} ({version})"));
    if found.named.contains(&best) {
        told.notes.push("the parameters of a kernel that is booted name it".to_owned());
    }
    let others: Vec<String> = found
        .candidates
        .iter()
        .filter(|address| **address != best)
        .map(|address| format!("{address:#x}"))
        .collect();
    if !others.is_empty() {
        told.notes.push(format!(
            "other pages look like a root FDT, too, and say less or are broken: {}; --fdt-address has one of them read",
            others.join(", ")
        ));
    }
    Ok(best)
}
