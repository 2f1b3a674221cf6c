//! A whole machine's memory: a raw image, plain or packed, an ELF core, or /proc/kcore.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use abi::Memory;
use anyhow::Context as _;
use anyhow::bail;
use pages::PAGE_BYTES;
use pages::PageRange;
use survey::Options;
use survey::Root;

use super::Hints;
use super::Source;
use super::Told;
use super::arena::Flat;
use super::arena::shown;
use super::candidates;
use super::elf;
use super::search;
use super::unpack;

/// First bytes of what makedumpfile writes.
const KDUMP: &[u8] = b"KDUMP   ";
const DISKDUMP: &[u8] = b"DISKDUMP";

pub(super) fn open(text: &str, path: &str, hints: Hints) -> anyhow::Result<Source> {
    let path = Path::new(path);
    let (file, len) = super::open_file(path)?;
    let mut first = [0; 64];
    let first_len = file.read_at(&mut first, 0).with_context(|| format!("cannot read {}", shown(path)))?;
    let first = &first[..first_len];
    let running = path == Path::new("/proc/kcore");
    let Opened { memory, holds, data } = match () {
        () if unpack::is_packed(first) => {
            let (file, len) =
                unpack::unpack(file).with_context(|| format!("cannot unpack {}", shown(path)))?;
            of_file(file, len).with_context(|| format!("cannot read what is in {}", shown(path)))?
        }
        () if first.starts_with(KDUMP) || first.starts_with(DISKDUMP) => bail!(
            "{} is a compressed dump of makedumpfile's: have it written as ELF (makedumpfile -E)",
            shown(path)
        ),
        () => of_file(file, len).with_context(|| format!("cannot read {}", shown(path)))?,
    };
    let mut told = Told { kind: "memory", name: text.to_owned(), holds, notes: Vec::new() };
    let options = Options { running: running || hints.booted, partial: false };
    told.notes.push(
        match (running, hints.booted) {
            (true, _) => "it is the memory of the kernel that runs here: what it changes meanwhile may be seen half",
            (false, true) => "the kernel in it had read its state: it uses much of that memory for other things",
            (false, false) => {
                "it is judged as of the instant of a kexec: of a kernel that has booted further, as that of a crash, say --booted"
            }
        }
        .to_owned(),
    );
    let address = match hints.fdt {
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
        let mut holds = format!(
            "an ELF core: {} of memory in {} segments",
            crate::size::show(core.len_bytes()),
            core.segments()
        );
        if core.missing_bytes() > 0 {
            holds += &format!(
                "; it is cut short: {} that its headers tell of are not in it",
                crate::size::show(core.missing_bytes())
            );
        }
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
    let Some(choice) = candidates::choose(memory, &found, options) else {
        bail!(
            "there is no root FDT of Kexec Handover in it: no page begins with a device tree of kho-v1 or later; if you know \
             that there is, --fdt-address says where"
        );
    };
    told.notes.extend(choice.notes);
    Ok(choice.address)
}
