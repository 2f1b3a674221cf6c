//! Records of our own.

use alloc::format;
use alloc::string::String;
use alloc::string::ToString as _;
use alloc::vec::Vec;

use abi::Malformed;
use abi::Memory;
use abi::NoMemory;
use abi::OnFault;
use abi::foreign;
use abi::foreign::FdRecord;
use abi::gmem;
use abi::gmem::GmemRecord;
use abi::note;
use abi::record::Format;
use abi::state;
use abi::state::StateRecord;
use abi::vm;
use abi::vm::VmRecord;
use abi::vmalloc;
use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use pages::PageRange;

use crate::files;
use crate::model::Extent;
use crate::model::File;
use crate::model::Label;
use crate::model::List;
use crate::model::Name;
use crate::read::Context;
use crate::view::View;

type Reader<M> = fn(&mut Context<'_, M>, &str, &mut File) -> bool;

/// True of a handler whose records are ours.
pub(crate) fn is_ours(handler: &str) -> bool {
    reader::<Vec<u8>>(handler).is_some()
}

/// What reads the records of a handler, if they are ours.
pub(crate) fn reader<M: Memory>(handler: &str) -> Option<Reader<M>> {
    match handler {
        _ if handler == gmem::FORMAT.compatible => Some(guest_memory::<M>),
        _ if handler == vm::FORMAT.compatible => Some(machine::<M>),
        _ if handler == state::FORMAT.compatible => Some(state::<M>),
        _ if handler == foreign::FORMAT.compatible => Some(descriptor::<M>),
        _ => None,
    }
}

/// Reads a record by one of our decoders, whose faults become findings, and claims its pages.
fn record<'a, M: Memory, T>(
    context: &mut Context<'a, M>,
    label: &str,
    file: &File,
    format: &Format,
    read: impl FnOnce(&View<'a, M>, u64, &mut OnFault<'_>) -> Result<T, Malformed>,
) -> Option<T> {
    let mut faults = Vec::new();
    let result = read(&context.view, file.data, &mut |fault| {
        faults.push(fault);
        Ok(())
    });
    faults.iter().for_each(|fault| context.note_fault(label, fault));
    let result = result.inspect_err(|fault| context.note_fault(label, fault)).ok()?;
    let mut payload = [0; 8];
    let bytes = context.view.read(file.data.saturating_add(16), &mut payload);
    let bytes = bytes.map_or(0, |()| u64::from_le_bytes(payload)).min(format.max_payload_bytes);
    let Context { picture, findings, .. } = context;
    picture.claim_bytes(findings, file.owner, file.data, Format::pages(bytes) * PAGE_SIZE);
    Some(result)
}

fn named(bytes: &[u8]) -> Option<Label> {
    Some(Label { name: Name::new(bytes) })
}

fn identify<M>(context: &mut Context<'_, M>, label: &str, file: &mut File, identity: vm::Identity) {
    let identity = identity.to_string();
    if let Some(arena) = context.identity.as_ref().filter(|arena| **arena != identity) {
        let words = format!("it is of machine {identity}, the arena of machine {arena}");
        context.findings.add("machine-identity", label, Some(file.data), Some("identity"), &words);
    }
    file.identity = Some(identity);
}

fn guest_memory<M: Memory>(context: &mut Context<'_, M>, label: &str, file: &mut File) -> bool {
    let Some(found) = record(context, label, file, &gmem::FORMAT, GmemRecord::read_on) else { return false };
    identify(context, label, file, found.identity);
    file.name = named(found.name.bytes());
    file.size = Some(found.size_bytes);
    file.flags = Some(found.flags);
    file.flag_names = files::guest_flags(found.flags);
    file.bytes = Some(found.extents.iter().map(|extent| extent.frames.len_bytes()).sum());
    for extent in &found.extents {
        let Context { picture, findings, .. } = context;
        picture.claim(findings, file.owner, extent.frames, false);
        file.extents.push(Extent {
            index: extent.index,
            address: extent.frames.start().address(),
            bytes: extent.frames.len_bytes(),
        });
    }
    true
}

fn machine<M: Memory>(context: &mut Context<'_, M>, label: &str, file: &mut File) -> bool {
    let Some(found) = record(context, label, file, &vm::FORMAT, VmRecord::read_on) else { return false };
    identify(context, label, file, found.identity);
    (file.vm_type, file.vcpus) = (Some(found.vm_type), Some(found.vcpus));
    true
}

fn descriptor<M: Memory>(context: &mut Context<'_, M>, label: &str, file: &mut File) -> bool {
    let Some(found) = record(context, label, file, &foreign::FORMAT, FdRecord::read_on) else { return false };
    identify(context, label, file, found.identity);
    file.name = named(found.name.bytes());
    (file.fd_kind, file.fd_index) = (Some(found.kind.to_string()), Some(found.index));
    true
}

fn state<M: Memory>(context: &mut Context<'_, M>, label: &str, file: &mut File) -> bool {
    let Some(found) = record(context, label, file, &state::FORMAT, StateRecord::read_on) else {
        return false;
    };
    identify(context, label, file, found.identity);
    file.name = named(found.name.bytes());
    (file.epoch, file.checksum) = (Some(found.epoch), Some(found.checksum));
    file.bytes = Some(found.len_bytes);
    let Context { picture, findings, .. } = context;
    if !picture.can_spend(findings, file.owner, found.len_bytes.div_ceil(PAGE_SIZE)) {
        return true;
    }
    let memory = context.view.clone();
    let list = match found.read_list(&memory, file.data) {
        Ok(list) => list,
        Err(fault) => {
            context.note_fault(label, &fault);
            return true;
        }
    };
    let Context { picture, findings, .. } = context;
    let mut met = List::default();
    let blocks = list.blocks.len();
    for block in &list.blocks {
        let _ = files::list_part(findings, picture, file.owner, &mut met, vmalloc::Part::Block(*block));
    }
    for chunk in &list.chunks {
        let part = vmalloc::Part::Chunk { address: *chunk, blocks };
        let _ = files::list_part(findings, picture, file.owner, &mut met, part);
    }
    file.list = files::list_of(&found.list, &met);
    files::check_list(findings, label, &found.list, file.list.as_ref());
    match found.read_bytes(&memory, file.data, &list) {
        Ok(bytes) => {
            file.checksum_right = Some(true);
            file.groups = abi::groups::decode(&bytes).ok().map(|groups| groups.len() as u64);
        }
        Err(fault) if fault.field == "checksum" => {
            file.checksum_right = Some(false);
            findings.add("state-checksum", label, Some(file.data), Some("checksum"), &fault.to_string());
        }
        Err(fault) => findings.fault(label, &fault),
    }
    true
}

/// The first pages of a file, by their place in it.
struct Head<'a, M> {
    memory: &'a M,
    pages: &'a [(u64, PageRange)],
}

impl<M: Memory> Memory for Head<'_, M> {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        let none = NoMemory::at(address, into.len());
        let (mut at, mut rest) = (address, into);
        while !rest.is_empty() {
            let (page, offset) = (at / PAGE_SIZE, at % PAGE_SIZE);
            let inside =
                |(index, frames): &&(u64, PageRange)| *index <= page && page - index < frames.len_pages();
            let (index, frames) = self.pages.iter().find(inside).ok_or(none)?;
            let left = usize::try_from(PAGE_SIZE - offset).unwrap_or(PAGE_BYTES).min(rest.len());
            let (part, behind) = rest.split_at_mut(left);
            self.memory.read(frames.start().address() + (page - index) * PAGE_SIZE + offset, part)?;
            at += left as u64;
            rest = behind;
        }
        Ok(())
    }

    fn runs(&self) -> Vec<PageRange> {
        Vec::new()
    }
}

/// What the bytes of a file are, as far as that is ours to know.
pub(crate) fn look_inside(memory: &impl Memory, pages: &[(u64, PageRange)], file: &mut File) {
    let head = Head { memory, pages };
    let mut first = [0; 8];
    if head.read(0, &mut first).is_ok() && first == abi::arena::MAGIC {
        file.holds = Some("arena".to_string());
        return;
    }
    let mut kind = [0; 12];
    let magic = b"TDRECORDNOTE";
    if head.read(note::ADDRESS, &mut kind).is_ok() && kind == *magic {
        file.holds = Some("note".to_string());
        file.note = note::read(&head).ok().map(|text| shortened(&text));
    }
}

/// A text that is to be shown: not all of what may be 4 MiB.
fn shortened(text: &str) -> String {
    let (head, more) = match text.char_indices().nth(PAGE_BYTES) {
        Some((end, _)) => (&text[..end], "…"),
        None => (text, ""),
    };
    format!("{}{more}", head.escape_debug())
}
