//! What a kernel shows of its state in /sys/kernel/debug/kho/in and out: the root FDT and the blobs, and nothing behind them.

use std::io::Read as _;
use std::path::Path;

use abi::Memory;
use abi::NoMemory;
use abi::kho::Draft;
use anyhow::Context as _;
use anyhow::bail;
use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;
use survey::Options;
use survey::Root;

use super::Source;
use super::Told;
use super::arena::shown;

/// More than any blob there is.
const MOST_BYTES: u64 = 64 << 20;

/// The blobs, where the root FDT says that they are.
struct Blobs(Vec<(u64, Vec<u8>)>);

impl Memory for Blobs {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        let none = NoMemory::at(address, into.len());
        let inside = |(at, bytes): &(u64, Vec<u8>)| {
            let offset = usize::try_from(address.checked_sub(*at)?).ok()?;
            bytes.get(offset..)?.get(..into.len()).map(<[u8]>::to_vec)
        };
        let found = self.0.iter().find_map(inside).ok_or(none)?;
        into.copy_from_slice(&found);
        Ok(())
    }

    /// All of the address space: how much memory there is cannot be told from here, and what is not in the blobs is
    /// out of reach, not absent.
    fn runs(&self) -> Vec<PageRange> {
        PageRange::new(Pfn::ZERO, u64::MAX / PAGE_SIZE).into_iter().collect()
    }
}

pub(super) fn open(text: &str, path: &str) -> anyhow::Result<Source> {
    let directory = Path::new(path);
    let Some(fdt) = blob(&directory.join("fdt"))? else {
        let inner = ["in", "out"].into_iter().find(|name| directory.join(name).join("fdt").exists());
        match inner {
            Some(inner) => bail!(
                "{} has no fdt, but {inner} in it has: say debugfs:{}/{inner}",
                shown(directory),
                shown(directory)
            ),
            None => bail!(
                "{} has no fdt: it is no folder of a kernel's /sys/kernel/debug/kho/in or out",
                shown(directory)
            ),
        }
    };
    let mut page = fdt.clone();
    page.resize(page.len().max(PAGE_BYTES), 0);
    let draft = Draft::read(&page, 0, &mut |_| Ok(())).unwrap_or_default();
    let (mut blobs, mut notes) = (Vec::new(), Vec::new());
    for subtree in &draft.subtrees {
        let name = String::from_utf8_lossy(&subtree.name).into_owned();
        let escaped = subtree.name.escape_ascii().to_string();
        // A name is the kernel's, and here it leads to a file.
        let plain = !name.is_empty() && !name.contains('/') && !name.starts_with('.');
        let bytes = if plain { blob(&directory.join("sub_fdts").join(&name))? } else { None };
        match (subtree.data.or(subtree.fdt), bytes) {
            (Some(address), Some(bytes)) => blobs.push((address, bytes)),
            _ => notes.push(format!("there is no blob of subtree {escaped} here")),
        }
    }
    notes.extend(scratch(directory));
    let outgoing = directory.file_name().is_some_and(|name| name == "out");
    notes.push(match outgoing {
        true => "this is what the kernel hands over: it lists its sessions at the kexec, and none before".to_owned(),
        false => "this is what the kernel was handed: it has read it, and uses much of that memory for other things".to_owned(),
    });
    let holds = "the root FDT and the blobs: what lies behind addresses in them is out of reach".to_owned();
    let told = Told { kind: "debugfs", name: text.to_owned(), holds, notes };
    let options = Options { running: !outgoing, partial: true };
    Ok(Source { memory: Box::new(Blobs(blobs)), root: Root::Blob(page), options, told })
}

/// A file's bytes; none if there is no such file.
fn blob(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    if !path.exists() {
        return Ok(None);
    }
    let (file, _) = super::open_file(path)?;
    let mut bytes = Vec::new();
    file.take(MOST_BYTES).read_to_end(&mut bytes).with_context(|| format!("cannot read {}", shown(path)))?;
    Ok(Some(bytes))
}

/// The memory that the next kernel boots in, which a kernel that hands over names beside its tree.
fn scratch(directory: &Path) -> Option<String> {
    let list = |name: &str| {
        let text = String::from_utf8(blob(&directory.join(name)).ok()??).ok()?;
        text.split_whitespace()
            .map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok())
            .collect::<Option<Vec<_>>>()
    };
    let (starts, lengths) = (list("scratch_phys")?, list("scratch_len")?);
    let areas: Vec<String> = starts
        .iter()
        .zip(&lengths)
        .map(|(start, len)| format!("{start:#x} ({})", crate::size::show(*len)))
        .collect();
    (!areas.is_empty()).then(|| format!("scratch memory: {}", areas.join(", ")))
}
