//! The files of a session, by their handlers.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::string::ToString as _;
use alloc::vec::Vec;
use core::cell::RefCell;

use abi::Malformed;
use abi::Memory;
use abi::OnFault;
use abi::Problem;
use abi::folio;
use abi::guest_memfd;
use abi::guest_memfd::GuestMemfd;
use abi::kvm_vm;
use abi::luo;
use abi::memfd;
use abi::memfd::Memfd;
use abi::vmalloc;
use abi::vmalloc::Descriptor;
use pages::Order;
use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;
use zerocopy::FromBytes as _;

use crate::findings::Findings;
use crate::model::File;
use crate::model::FolioTable;
use crate::model::Known;
use crate::model::List;
use crate::model::Luo;
use crate::model::Name;
use crate::model::OwnerKind;
use crate::model::Run;
use crate::model::Session;
use crate::model::Severity;
use crate::picture::Picture;
use crate::read::Context;
use crate::read::escaped;
use crate::records;

/// Runs of folios that are listed.
const LARGEST: usize = 8;
/// Pages at a file's beginning whose frames are remembered: as much as a note takes.
const HEAD: u64 = 1 + (4 << 20) / PAGE_SIZE + 1;
/// A memfd has less pages than this.
const MEMFD_PAGES: u64 = 1 << 32;

const SEALS: [(u64, &str); 6] =
    [(1, "seal"), (2, "shrink"), (4, "grow"), (8, "write"), (16, "future_write"), (32, "exec")];
const GUEST_FLAGS: [(u64, &str); 2] = [(1, "mmap"), (2, "init_shared")];
const MEMFD_FOLIO_FLAGS: [(u64, &str); 2] = [(1, "dirty"), (2, "uptodate")];
const GUEST_FOLIO_FLAGS: [(u64, &str); 1] = [(1, "uptodate")];

/// The names of the bits that are set; those that have none are one, in hexadecimal.
pub(crate) fn names(bits: u64, known: &[(u64, &str)]) -> Vec<String> {
    let mut left = bits;
    let mut names: Vec<String> = Vec::new();
    for (bit, name) in known {
        if bits & bit != 0 {
            left &= !bit;
            names.push((*name).to_string());
        }
    }
    if left != 0 {
        names.push(format!("{left:#x}"));
    }
    names
}

pub(crate) fn guest_flags(bits: u64) -> Vec<String> {
    names(bits, &GUEST_FLAGS)
}

/// Reads a file of a session, the `file`th of the `session`th.
pub(crate) fn read<M: Memory>(
    context: &mut Context<'_, M>,
    session_name: &Name,
    (session, file): (usize, usize),
    entry: &luo::FileSer,
) -> File {
    let (token, data) = (entry.token.get(), entry.data.get());
    let name = Name::of_field(&entry.compatible);
    let label = format!("session {session_name}, file {token:#x} ({name})");
    let owner = context.picture.owner(OwnerKind::File, label.clone());
    if let Some(owner) = context.picture.owners.get_mut(owner) {
        (owner.session, owner.file) = (Some(session), Some(file));
    }
    let mut found = File {
        handler: escaped(name.bytes()),
        handler_known: Known::Current,
        token,
        token_hex: format!("{token:#x}"),
        data,
        owner,
        ..File::default()
    };
    if name.bytes().is_empty() {
        found.handler_known = Known::Unknown;
        return found;
    }
    let known = is_known(&found.handler);
    if data == 0 && known {
        context.findings.add(
            "address-not-zero",
            &label,
            None,
            Some("data"),
            "its handler's structure has no address",
        );
        return found;
    }
    let Context { picture, findings, .. } = context;
    if known && !picture.enter(findings, owner, data) {
        return found;
    }
    found.read = by_handler(context, &label, &mut found);
    if found.handler_known == Known::Unknown {
        let words = format!("nothing is known of `{name}`: its memory is not either");
        context.findings.add("handler-known", &label, None, Some("handler"), &words);
        context.findings.lost = true;
    }
    found
}

fn is_known(handler: &str) -> bool {
    let kernels = [memfd::COMPATIBLE, memfd::COMPATIBLE_V1, guest_memfd::COMPATIBLE, kvm_vm::COMPATIBLE];
    kernels.contains(&handler) || records::is_ours(handler)
}

fn by_handler<M: Memory>(context: &mut Context<'_, M>, label: &str, file: &mut File) -> bool {
    match file.handler.as_str() {
        memfd::COMPATIBLE | guest_memfd::COMPATIBLE => with_folios(context, label, file),
        memfd::COMPATIBLE_V1 => {
            file.handler_known = Known::Older;
            with_folios(context, label, file)
        }
        kvm_vm::COMPATIBLE => kvm_vm(context, label, file),
        handler => match records::reader(handler) {
            Some(read) => read(context, label, file),
            None => {
                file.handler_known = Known::Unknown;
                if file.data != 0 {
                    claim_if_preserved(context, file.owner, file.data);
                }
                false
            }
        },
    }
}

/// The page of a structure of which nothing is known but its address, if it is one.
fn claim_if_preserved<M>(context: &mut Context<'_, M>, owner: usize, address: u64) {
    let Context { picture, findings, .. } = context;
    let pfn = Pfn::at(address & !(PAGE_SIZE - 1));
    if pfn.is_ok_and(|pfn| picture.marks.covering(pfn).is_some()) {
        picture.claim_page(findings, owner, address);
    }
}

/// What a structure with a list of folios says.
pub(crate) struct Walked {
    size: u64,
    position: Option<u64>,
    seals: Option<u32>,
    flags: Option<u64>,
    records: u64,
    vm_token: Option<u64>,
    list: Descriptor,
}

/// Walks the folios of a file. None if there is no such structure, or the handler has none with folios.
pub(crate) fn folio_walk(
    memory: &impl Memory,
    handler: &str,
    data: u64,
    order: &dyn Fn(Pfn) -> Option<Order>,
    visit: &mut dyn FnMut(folio::Part) -> Result<(), Malformed>,
    on_fault: &mut OnFault<'_>,
) -> Option<Walked> {
    match handler {
        memfd::COMPATIBLE => {
            let ser = Memfd::walk_on(memory, data, order, visit, on_fault).ok()??;
            Some(Walked {
                size: ser.size.get(),
                position: Some(ser.pos.get()),
                seals: Some(ser.seals.get()),
                flags: Some(ser.flags.get().into()),
                records: ser.nr_folios.get(),
                vm_token: None,
                list: ser.folios,
            })
        }
        memfd::COMPATIBLE_V1 => {
            let ser = Memfd::walk_v1_on(memory, data, order, visit, on_fault).ok()??;
            Some(Walked {
                size: ser.size.get(),
                position: Some(ser.pos.get()),
                seals: None,
                flags: None,
                records: ser.nr_folios.get(),
                vm_token: None,
                list: ser.folios,
            })
        }
        guest_memfd::COMPATIBLE => {
            let ser = GuestMemfd::walk_on(memory, data, order, visit, on_fault).ok()??;
            Some(Walked {
                size: ser.size.get(),
                position: None,
                seals: None,
                flags: Some(ser.flags.get()),
                records: ser.nr_folios.get(),
                vm_token: Some(ser.vm_token.get()),
                list: ser.folios,
            })
        }
        _ => None,
    }
}

/// Sums up a list of folios as it goes by.
#[derive(Default)]
struct Tally {
    table: FolioTable,
    list: List,
    flags: BTreeMap<u16, u64>,
    folios: u64,
    bytes: u64,
    run: Option<(u64, PageRange)>,
    /// Pages of the file in folios.
    covered: u64,
    /// Frames of the file's first pages.
    head: Vec<(u64, PageRange)>,
}

impl Tally {
    fn folio(&mut self, folio: &folio::Folio, pages: u64) {
        let (len, bytes) = (folio.frames.len_pages(), folio.frames.len_bytes());
        self.folios += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        *self.table.by_order.entry(len.ilog2()).or_default() += 1;
        *self.flags.entry(folio.flags).or_default() += 1;
        self.covered = self.covered.saturating_add(len.min(pages.saturating_sub(folio.index)));
        if folio.index < HEAD && self.head.len() < PAGE_BYTES {
            self.head.push((folio.index, folio.frames));
        }
        if let Some((index, run)) = &mut self.run {
            let adjacent = run.end() == folio.frames.start().get()
                && index.checked_add(run.len_pages()) == Some(folio.index);
            let longer = PageRange::new(run.start(), run.len_pages().saturating_add(len));
            if let (true, Ok(longer)) = (adjacent, longer) {
                *run = longer;
                return;
            }
        }
        self.end_run();
        self.run = Some((folio.index, folio.frames));
    }

    fn end_run(&mut self) {
        let Some((index, frames)) = self.run.take() else { return };
        self.table.runs += 1;
        let run = Run { index, address: frames.start().address(), bytes: frames.len_bytes() };
        let at = self.table.largest_runs.partition_point(|other| other.bytes >= run.bytes);
        if at < LARGEST {
            self.table.largest_runs.insert(at, run);
            self.table.largest_runs.truncate(LARGEST);
        }
    }
}

fn with_folios<M: Memory>(context: &mut Context<'_, M>, label: &str, file: &mut File) -> bool {
    let Context { view, findings, picture, .. } = context;
    let view = &*view;
    let owner = file.owner;
    // A file's size is read with its structure, before the first folio.
    let pages = size_of(view, &file.handler, file.data).div_ceil(PAGE_SIZE);
    let known = picture.known;
    let both = RefCell::new((findings, picture));
    let mut tally = Tally::default();
    let order = |pfn| match known {
        true => both.borrow().1.marks.order_at(pfn),
        false => Some(Order::PAGE),
    };
    let mut visit = |part| {
        let (findings, picture) = &mut *both.borrow_mut();
        match part {
            folio::Part::List(part) => {
                if !list_part(findings, picture, owner, &mut tally.list, part) {
                    return Err(too_much(file.data));
                }
            }
            folio::Part::Folio(folio) => {
                tally.folio(&folio, pages);
                picture.claim(findings, owner, folio.frames, false);
            }
            folio::Part::Hole { .. } => tally.table.hole_records += 1,
            folio::Part::Lost { .. } => tally.table.lost_records += 1,
        }
        Ok(())
    };
    let mut on_fault = |fault: Malformed| {
        both.borrow_mut().0.fault(label, &fault);
        Ok(())
    };
    let walked = folio_walk(view, &file.handler, file.data, &order, &mut visit, &mut on_fault);
    let Some(walked) = walked else { return false };
    let (findings, picture) = both.into_inner();
    let len = if file.handler == memfd::COMPATIBLE_V1 { 40 } else { 48 };
    picture.claim_bytes(findings, owner, file.data, len);
    tally.end_run();
    describe(file, &walked, tally);
    check_list(findings, label, &walked.list, file.list.as_ref());
    check_folios(findings, label, file);
    let head = core::mem::take(&mut file.head);
    records::look_inside(view, &head, file);
    true
}

fn size_of(memory: &impl Memory, handler: &str, data: u64) -> u64 {
    let at = if handler == guest_memfd::COMPATIBLE { data } else { data.saturating_add(8) };
    let mut size = [0; 8];
    memory.read(at, &mut size).map_or(0, |()| u64::from_le_bytes(size))
}

/// Ends a walk; it is told of already.
fn too_much(address: u64) -> Malformed {
    Malformed { format: "kho_vmalloc", address, field: "blocks", problem: Problem::Truncated }
}

/// Notes a part of a list of pages, and who has it; false if it is more than there can be.
pub(crate) fn list_part(
    findings: &mut Findings,
    picture: &mut Picture,
    owner: usize,
    list: &mut List,
    part: vmalloc::Part,
) -> bool {
    let pages = match part {
        vmalloc::Part::Chunk { .. } => 1,
        vmalloc::Part::Block(range) => range.len_pages(),
        vmalloc::Part::Missing { .. } => 0,
    };
    if !picture.spend(findings, owner, pages) {
        return false;
    }
    match part {
        vmalloc::Part::Chunk { address, .. } => {
            list.chunks += 1;
            picture.claim_page(findings, owner, address);
        }
        vmalloc::Part::Block(range) => {
            list.blocks += 1;
            picture.claim(findings, owner, range, true);
        }
        vmalloc::Part::Missing { .. } => list.blocks += 1,
    }
    true
}

fn describe(file: &mut File, walked: &Walked, mut tally: Tally) {
    let guest = file.handler == guest_memfd::COMPATIBLE;
    file.size = Some(walked.size);
    file.position = walked.position;
    file.seals = walked.seals;
    file.seal_names = names(walked.seals.unwrap_or_default().into(), &SEALS);
    file.flags = walked.flags;
    if guest {
        file.flag_names = guest_flags(walked.flags.unwrap_or_default());
    }
    file.vm_token = walked.vm_token;
    file.folios = Some(tally.folios);
    file.bytes = Some(tally.bytes);
    let known: &[(u64, &str)] = if guest { &GUEST_FOLIO_FLAGS } else { &MEMFD_FOLIO_FLAGS };
    for (flags, count) in &tally.flags {
        let named = names(u64::from(*flags), known);
        let named = if named.is_empty() { "none".to_string() } else { named.join("+") };
        *tally.table.by_flag.entry(named).or_default() += count;
    }
    tally.table.records = walked.records;
    tally.table.hole_pages = walked.size.div_ceil(PAGE_SIZE).saturating_sub(tally.covered);
    file.folio_table = Some(tally.table);
    file.list = list_of(&walked.list, &tally.list);
    file.head = tally.head;
}

/// What is to be said of a list: what its descriptor says, and what was met.
pub(crate) fn list_of(descriptor: &Descriptor, met: &List) -> Option<List> {
    let list = List {
        first: descriptor.first.get(),
        total_pages: descriptor.total_pages.get().into(),
        flags: descriptor.flags.get(),
        order: descriptor.order.get(),
        ..*met
    };
    (!descriptor.is_empty()).then_some(list)
}

/// What a list of pages keeps to beside what its reader asks for.
pub(crate) fn check_list(findings: &mut Findings, label: &str, descriptor: &Descriptor, list: Option<&List>) {
    let Some(list) = list else { return };
    let unknown = descriptor.flags.get() & !(vmalloc::PLAIN | vmalloc::HUGE);
    if unknown != 0 {
        let words = format!("the flags are {:#x}", descriptor.flags.get());
        findings.add("vmalloc-flags", label, Some(list.first), Some("flags"), &words);
    }
    let blocks = usize::try_from(list.blocks).unwrap_or(usize::MAX);
    let full = blocks > 0 && blocks.is_multiple_of(vmalloc::CHUNK_BLOCKS);
    let told =
        findings.list.iter().any(|finding| finding.subject == label && finding.rule.starts_with("vmalloc-"));
    if full && !told && list.chunks < Descriptor::chunks(blocks) as u64 {
        let words = format!("{blocks} blocks fill {} chunks, and no other follows", list.chunks);
        findings.add("vmalloc-trailing-chunk", label, Some(list.first), Some("next"), &words);
    }
}

fn check_folios(findings: &mut Findings, label: &str, file: &File) {
    let Some(table) = &file.folio_table else { return };
    let size = file.size.unwrap_or_default();
    if file.handler == guest_memfd::COMPATIBLE {
        if table.by_order.keys().any(|order| *order != 0) {
            findings.add(
                "guest-memfd-order",
                label,
                Some(file.data),
                None,
                "it has folios of more than one page",
            );
        }
        return;
    }
    if size.div_ceil(PAGE_SIZE) >= MEMFD_PAGES {
        findings.add(
            "memfd-size",
            label,
            Some(file.data),
            Some("size"),
            &format!("the size is {size} bytes"),
        );
    }
    if table.hole_records > 0 {
        let words = format!("{} records are holes", table.hole_records);
        findings.add("memfd-no-holes", label, Some(file.data), None, &words);
    }
}

fn kvm_vm<M: Memory>(context: &mut Context<'_, M>, label: &str, file: &mut File) -> bool {
    let draft = match kvm_vm::Draft::read(&context.view, file.data) {
        Ok(draft) => draft,
        Err(fault) => {
            context.note_fault(label, &fault);
            return false;
        }
    };
    let Context { view, findings, picture, .. } = context;
    file.vm_type = Some(draft.vm_type);
    picture.claim_bytes(findings, file.owner, file.data, 32);
    let (layout, odd) = match draft.layout {
        kvm_vm::Layout::Type => ("type", None),
        kvm_vm::Layout::State { address } => {
            let words =
                format!("it has the layout of 16 bytes, with the architecture's state at {address:#x}");
            ("type, architecture's state", Some(words))
        }
        kvm_vm::Layout::Attributes { count, list } => {
            attributes(&*view, findings, picture, (label, file), &list);
            let words = format!("it has the layout of 32 bytes, with {count} memory attributes");
            ("type, memory attributes", Some(words))
        }
        kvm_vm::Layout::Unknown => {
            ("unknown", Some("it has none of the three layouts that are known".to_string()))
        }
    };
    file.layout = Some(layout.to_string());
    if let kvm_vm::Layout::State { address } = draft.layout {
        claim_if_preserved(context, file.owner, address);
    }
    if let Some(words) = odd {
        context.findings.add("kvm-vm-layout", label, Some(file.data), Some("layout"), &words);
        context.findings.lost = true;
    }
    true
}

fn attributes(
    memory: &impl Memory,
    findings: &mut Findings,
    picture: &mut Picture,
    (label, file): (&str, &mut File),
    descriptor: &Descriptor,
) {
    let mut met = List::default();
    let owner = file.owner;
    let mut faults = Vec::new();
    let mut visit = |part| match list_part(findings, picture, owner, &mut met, part) {
        true => Ok(()),
        false => Err(too_much(descriptor.first.get())),
    };
    let mut on_fault = |fault| {
        faults.push(fault);
        Ok(())
    };
    let _ = vmalloc::walk_on(memory, descriptor, &mut visit, &mut on_fault);
    faults.iter().for_each(|fault| findings.fault(label, fault));
    file.list = list_of(descriptor, &met);
    check_list(findings, label, descriptor, file.list.as_ref());
}

/// What the files of a session have to be to each other.
pub(crate) fn check_session<M>(context: &mut Context<'_, M>, session: &Session) {
    for file in session.files.iter().filter(|file| file.handler == guest_memfd::COMPATIBLE && file.read) {
        let vm = session.files.iter().find(|other| Some(other.token) == file.vm_token);
        if vm.is_some_and(|vm| vm.handler == kvm_vm::COMPATIBLE) {
            continue;
        }
        let words = match vm {
            Some(vm) => format!("vm_token {:#x} names a file of {}", vm.token, vm.handler),
            None => format!("vm_token {:#x} names no file", file.vm_token.unwrap_or_default()),
        };
        let label = context.picture.label(file.owner);
        context.findings.add("guest-memfd-vm", &label, Some(file.data), Some("vm_token"), &words);
    }
}

/// All states that hold something were saved for one seal.
pub(crate) fn check_states<M>(context: &mut Context<'_, M>, luo: &Luo) {
    let files = luo.sessions.iter().flat_map(|session| &session.files);
    let mut saved = files.filter(|file| file.epoch.is_some_and(|epoch| epoch != 0));
    let Some(first) = saved.next() else { return };
    for other in saved.filter(|other| other.identity == first.identity && other.epoch != first.epoch) {
        let (epoch, wanted) = (other.epoch.unwrap_or_default(), first.epoch.unwrap_or_default());
        let label = context.picture.label(other.owner);
        let words =
            format!("it was saved for the seal of epoch {epoch}, another one for that of epoch {wanted}");
        context.findings.add("state-epoch", &label, Some(other.data), Some("epoch"), &words);
    }
}

/// A LUO blob of another version: what it is called, and what is known of that version.
pub(crate) fn older_luo<M: Memory>(
    context: &mut Context<'_, M>,
    label: &str,
    found: &mut Luo,
    address: u64,
    bytes: u64,
) {
    let mut blob = alloc::vec![0; usize::try_from(bytes.min(PAGE_SIZE)).unwrap_or_default()];
    if context.view.read(address, &mut blob).is_err() {
        return;
    }
    // The first two are device trees.
    let tree = abi::fdt::compatible(&blob).map(<[u8]>::to_vec);
    let version = tree.clone().unwrap_or_else(|| Name::of_field(&blob[..blob.len().min(8)]).bytes().to_vec());
    found.version = escaped(&version);
    let older = matches!(version.as_slice(), b"luo-v1" | b"luo-v2" | b"luo-v3" | b"luo-v4");
    found.version_known = if older { Known::Older } else { Known::Unknown };
    let named = format!("`{}`", found.version);
    let words = match older {
        true => format!("the blob is {named}, an earlier version: its sessions are not read"),
        false => format!("the blob is {named}, which is not known"),
    };
    let severity = if older { Severity::Warning } else { Severity::Error };
    context.findings.add_as(severity, "luo-version", label, Some(address), Some("compatible"), &words);
    context.findings.unread(format!("{label}: the sessions of {named}"));
    match version.as_slice() {
        b"luo-v1" => found.liveupdate_number = property(&blob, b"liveupdate-number"),
        b"luo-v2" => {
            let header = property(&blob, b"luo-abi-header");
            found.liveupdate_number = header.and_then(|header| word(&context.view, header));
        }
        b"luo-v3" | b"luo-v4" => {
            let ser = luo::LuoSer::read_from_prefix(&blob).ok();
            found.liveupdate_number = ser.map(|(ser, _)| ser.liveupdate_num.get());
        }
        _ => {}
    }
    if version == b"luo-v4" {
        let first = luo::LuoSer::read_from_prefix(&blob).map_or(0, |(ser, _)| ser.sessions.get());
        sessions_of_v4(context, label, found, first);
    }
}

/// The sessions of `luo-v4` are listed as those of version 5 are; their files are not.
fn sessions_of_v4<M: Memory>(context: &mut Context<'_, M>, label: &str, found: &mut Luo, first: u64) {
    let mut seen = alloc::collections::BTreeSet::new();
    let mut faults = Vec::new();
    let mut gather = |fault| {
        faults.push(fault);
        Ok(())
    };
    let chain = abi::block::Chain::<luo::SessionSer>::read_on(&context.view, first, &mut seen, &mut gather);
    faults.iter().for_each(|fault| context.note_fault(label, fault));
    let Ok(chain) = chain else { return };
    let Context { picture, findings, .. } = context;
    let owner = picture.owner(OwnerKind::Luo, "LUO: list of sessions".to_string());
    for page in &chain.blocks {
        picture.claim_page(findings, owner, *page);
    }
    let session = |entry: &luo::SessionSer| Session {
        name: Name::of_field(&entry.name),
        count: entry.count.get(),
        ..Session::default()
    };
    found.sessions = chain.entries.iter().map(session).collect();
    found.blocks = chain.blocks;
}

fn word(memory: &impl Memory, address: u64) -> Option<u64> {
    let mut word = [0; 8];
    memory.read(address, &mut word).ok().map(|()| u64::from_le_bytes(word))
}

/// A number among the properties of a device tree's root.
fn property(blob: &[u8], wanted: &[u8]) -> Option<u64> {
    use abi::fdt::Token;
    let mut reader = abi::fdt::Reader::new("device tree", 0, blob).ok()?;
    reader.next().ok()?;
    loop {
        match reader.next().ok()? {
            Token::Property(name, value) if name == wanted => {
                return value.try_into().ok().map(u64::from_le_bytes);
            }
            Token::Property(..) => {}
            _ => return None,
        }
    }
}
