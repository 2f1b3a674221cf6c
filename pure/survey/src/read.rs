//! The way through a state: the root FDT, the tree, the blobs, the sessions.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::string::ToString as _;
use alloc::vec::Vec;

use abi::Malformed;
use abi::Memory;
use abi::Problem;
use abi::holds;
use abi::kexec_metadata;
use abi::kho;
use abi::luo;
use abi::memblock;
use abi::radix;
use abi::radix::Found;
use abi::radix::Key;
use pages::Order;
use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use pages::PageRange;

use crate::Options;
use crate::Root;
use crate::arena;
use crate::files;
use crate::files::folio_walk;
use crate::findings::Findings;
use crate::marks::Marks;
use crate::model::Blob;
use crate::model::File;
use crate::model::Flb;
use crate::model::FolioLine;
use crate::model::KexecMetadata;
use crate::model::Kho;
use crate::model::Known;
use crate::model::Luo;
use crate::model::Name;
use crate::model::OrderStats;
use crate::model::OwnerKind;
use crate::model::ReservedMemory;
use crate::model::Session;
use crate::model::Severity;
use crate::model::Stale;
use crate::model::Survey;
use crate::picture::Picture;
use crate::view::View;

/// Versions of the root FDT before the one that is written.
const OLDER_KHO: [&[u8]; 3] = [b"kho-v1", b"kho-v2", b"kho-v3"];
/// The first of them, whose memory map is no tree.
const KHO_V1: &[u8] = b"kho-v1";

/// Blocks of an arena: more than the frames of region 0 and the blocks of 255 regions.
const ARENA_BLOCKS: u64 = 1 << 20;
/// Blocks outside memory that are still gone through.
const SPARE_BLOCKS: u64 = 1 << 16;

/// What a survey gathers besides itself.
pub(crate) struct Context<'a, M> {
    pub(crate) view: View<'a, M>,
    pub(crate) options: Options,
    pub(crate) findings: Findings,
    pub(crate) picture: Picture,
    /// Identity of the arena's machine.
    pub(crate) identity: Option<String>,
}

impl<M> Context<'_, M> {
    /// Has what a decoder finds be a finding.
    pub(crate) fn note_fault(&mut self, subject: &str, fault: &Malformed) {
        self.findings.fault(subject, fault);
    }
}

pub(crate) fn escaped(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

pub(crate) fn read<M: Memory>(memory: &M, root: &Root, options: Options) -> Survey {
    let mut findings = Findings::new(options);
    let mut survey = Survey::default();
    let (address, page) = match root {
        Root::Fdt(address) => (Some(*address), read_page(memory, *address, &mut findings)),
        Root::Blob(bytes) => (None, Some(bytes.clone())),
        Root::Arena => {
            let (arena, address) = arena::read(memory, &mut findings);
            survey.arena = Some(arena);
            (address, address.and_then(|address| read_page(memory, address, &mut findings)))
        }
    };
    let draft = page.map(|page| read_root(&page, address, &mut findings));
    let view = match (&mut survey.arena, &draft) {
        (Some(arena), Some((_, draft))) => arena::regions(memory, arena, draft, &mut findings),
        _ => View::new(memory),
    };
    let picture = Picture::new(view.runs());
    let identity = survey.arena.as_ref().and_then(|arena| arena.identity.clone());
    let mut context = Context { view, options, findings, picture, identity };
    if let Some((mut kho, draft)) = draft {
        let region0 = survey.arena.as_ref().map(|arena| arena.region0_bytes.unwrap_or_default());
        read_tree(&mut context, &mut kho, region0);
        read_blobs(&mut context, &mut kho, &mut survey, &draft);
        survey.kho = Some(kho);
    }
    staleness(&mut survey, options);
    let Context { mut findings, mut picture, .. } = context;
    survey.unreferenced = picture.unreferenced(&mut findings);
    (survey.owners, survey.ranges, survey.ranges_left_out, survey.map) = picture.finish();
    survey.unread = findings.unread;
    survey.findings = findings.list;
    survey.findings_left_out = findings.left_out;
    survey
}

fn read_page(memory: &impl Memory, address: u64, findings: &mut Findings) -> Option<Vec<u8>> {
    let mut page = alloc::vec![0; PAGE_BYTES];
    let fault = |field, problem| Malformed { format: kho::COMPATIBLE, address, field, problem };
    if !address.is_multiple_of(PAGE_SIZE) {
        findings.fault("root FDT", &fault("fdt", Problem::Misaligned { found: address }));
    }
    match memory.read(address, &mut page) {
        Ok(()) => Some(page),
        Err(none) => {
            findings.fault("root FDT", &fault("fdt", Problem::Unreadable(none)));
            None
        }
    }
}

fn read_root(page: &[u8], address: Option<u64>, findings: &mut Findings) -> (Kho, kho::Draft) {
    let mut faults = Vec::new();
    let mut gather = |fault| {
        faults.push(fault);
        Ok(())
    };
    // It goes on behind every fault, so there is always a draft.
    let draft = kho::Draft::read(page, address.unwrap_or_default(), &mut gather).unwrap_or_default();
    let version = draft.compatible.as_slice();
    let version_known = match version {
        _ if version == kho::COMPATIBLE.as_bytes() => Known::Current,
        _ if OLDER_KHO.contains(&version) => Known::Older,
        _ => Known::Unknown,
    };
    let named = format!("`{}`", escaped(version));
    for fault in &faults {
        match (fault.field, version_known) {
            ("compatible", Known::Older) => {
                let words = format!("the root FDT is {named}, an earlier version: what can be read of it is");
                findings.add_as(
                    Severity::Warning,
                    "kho-version",
                    "root FDT",
                    address,
                    Some("compatible"),
                    &words,
                );
            }
            ("compatible", Known::Unknown) if !version.is_empty() => {
                let words = format!(
                    "the root FDT is {named}, which is not known: its tree and its blobs are read as kho-v4's"
                );
                findings.add("kho-version", "root FDT", address, Some("compatible"), &words);
            }
            // Where the device tree broke, this only follows.
            ("compatible" | "preserved-memory-map", Known::Unknown)
                if version.is_empty() && faults.len() > 1 => {}
            // The first two versions name a blob so.
            ("fdt", Known::Older) => {}
            _ => findings.fault("root FDT", fault),
        }
    }
    let kho = Kho {
        version: escaped(version),
        version_known,
        fdt_address: address,
        fdt_bytes: draft.total_bytes,
        map_address: draft.map.filter(|_| version != KHO_V1),
        subtrees: draft.subtrees.iter().map(|subtree| Name::new(&subtree.name).text()).collect(),
        ..Kho::default()
    };
    if version == KHO_V1 {
        findings.unread("kho-v1: its map of preserved memory is no tree, and is not read".to_string());
    }
    (kho, draft)
}

/// Sums over the blocks of one order, gathered by ascending key.
struct Sum {
    stats: OrderStats,
    next: u64,
}

/// Reads the tree; in an arena `arena` is the length of region 0.
fn read_tree<M: Memory>(context: &mut Context<'_, M>, kho: &mut Kho, arena: Option<u64>) {
    let owner = context.picture.owner(OwnerKind::Kho, "KHO: root FDT and tree".to_string());
    let Some(root) = kho.map_address else { return };
    let runs = context.view.runs();
    let frames = arena.map_or(0, |bytes| bytes / PAGE_SIZE);
    let arena = arena.is_some();
    let (mut nodes, mut sums) = (Vec::new(), BTreeMap::<u32, Sum>::new());
    let (findings, marks) = (&mut context.findings, &mut context.picture.marks);
    let mut faults = Vec::new();
    let mut outside = Vec::new();
    let (mut blocks, limit) = (0, most_blocks(&runs, arena));
    let mut visit = |found| {
        match found {
            Found::Node { level, address, .. } => {
                *kho.tree.by_level.entry(level).or_default() += 1;
                if arena {
                    nodes.push(address);
                }
            }
            Found::Block(key) => {
                count(&mut sums, key);
                blocks += 1;
                if blocks > limit {
                    return Err(too_many(root));
                }
                let range = key.range();
                let alone = key.order() == Order::PAGE && range.start().get() != 0;
                let wrong = match () {
                    () if !holds(&runs, range) => Some("tree-in-range"),
                    () if arena && range.start().get() < frames && !alone => Some("arena-blocks"),
                    () => None,
                };
                if let Some(rule) = wrong.filter(|_| outside.len() < PAGE_BYTES) {
                    outside.push((rule, key));
                }
                marks.preserve(key);
            }
        }
        Ok(())
    };
    let mut on_fault = |fault: Malformed| {
        if faults.len() < PAGE_BYTES {
            faults.push(fault);
        }
        Ok(())
    };
    let whole = radix::walk_on(&context.view, root, &mut visit, &mut on_fault);
    if whole.is_err() {
        findings.unread(format!(
            "the tree of preserved memory beyond {limit} blocks: memory has no room for more"
        ));
    }
    let rootless = faults.iter().any(|fault| fault.address == root) && kho.tree.by_level.is_empty();
    faults.iter().for_each(|fault| findings.fault("tree of preserved memory", fault));
    if rootless {
        return;
    }
    for (rule, key) in outside {
        let (range, order) = (key.range(), key.order().get());
        let words = format!("a block of order {order}, {} bytes", range.len_bytes());
        findings.add(rule, "tree of preserved memory", Some(range.start().address()), None, &words);
    }
    sum_up(context, kho, sums);
    context.picture.known = !context.options.partial || kho.tree.nodes > 0;
    own(context, kho, owner, &nodes, arena);
}

/// Blocks that a tree can have: a page of memory is in one of each order at most, and few are outside. In an arena guest
/// memory is whole regions.
fn most_blocks(runs: &[PageRange], arena: bool) -> u64 {
    let pages: u64 = runs.iter().map(|run| run.len_pages()).fold(0, u64::saturating_add);
    if arena { ARENA_BLOCKS } else { pages.saturating_mul(2).saturating_add(SPARE_BLOCKS) }
}

/// Ends a walk.
fn too_many(address: u64) -> Malformed {
    Malformed { format: "kho radix tree", address, field: "blocks", problem: Problem::Truncated }
}

fn count(sums: &mut BTreeMap<u32, Sum>, key: Key) {
    let order = key.order();
    let sum = sums.entry(order.get()).or_insert_with(|| Sum {
        stats: OrderStats {
            order: order.get(),
            block_bytes: order.len_pages().saturating_mul(PAGE_SIZE),
            lowest: key.range().start().address(),
            ..OrderStats::default()
        },
        next: 0,
    });
    sum.stats.blocks += 1;
    sum.stats.bytes = sum.stats.bytes.saturating_add(sum.stats.block_bytes);
    sum.stats.runs += u64::from(sum.next != key.get());
    sum.next = key.get() + 1;
    let range = key.range();
    sum.stats.highest = range.start().address().saturating_add(range.len_bytes().saturating_sub(1));
}

fn sum_up<M: Memory>(context: &mut Context<'_, M>, kho: &mut Kho, sums: BTreeMap<u32, Sum>) {
    let (findings, marks) = (&mut context.findings, &context.picture.marks);
    kho.tree.nodes = kho.tree.by_level.values().sum();
    kho.tree.bytes = kho.tree.nodes * PAGE_SIZE;
    kho.preserved_by_order = sums.iter().map(|(order, sum)| (*order, sum.stats.blocks)).collect();
    let all = sums.values().fold(0, |bytes: u64, sum| bytes.saturating_add(sum.stats.bytes));
    kho.preserved_bytes = Some(all);
    let density = |mut stats: OrderStats| {
        stats.leaves = Order::new(stats.order).map_or(0, |order| marks.leaves_of(order));
        stats.density = share(stats.blocks, stats.leaves << radix::LEAF_BITS);
        stats
    };
    kho.orders = sums.into_values().map(|sum| density(sum.stats)).collect();
    if marks.overflowed {
        findings.unread("the tree of preserved memory has more leaves than are accounted for".to_string());
    }
    for (key, larger) in marks.overlaps().take(PAGE_BYTES) {
        let (start, other) = (key.range().start(), larger.range().start());
        let words = format!(
            "a block of order {} lies in the one of order {} at {:#x}",
            key.order().get(),
            larger.order().get(),
            other.address()
        );
        findings.add("tree-no-overlap", "tree of preserved memory", Some(start.address()), None, &words);
    }
}

#[expect(clippy::cast_precision_loss, reason = "a share is for people")]
fn share(part: u64, of: u64) -> f64 {
    if of == 0 { 0.0 } else { part as f64 / of as f64 }
}

/// What the tree and the FDT have of preserved memory themselves: all in an arena, in a kernel the FDT alone.
fn own<M>(context: &mut Context<'_, M>, kho: &mut Kho, owner: usize, nodes: &[u64], arena: bool) {
    let Context { picture, findings, .. } = context;
    kho.tree.preserved = arena;
    for node in nodes {
        picture.claim_page(findings, owner, *node);
    }
    let marks = &picture.marks;
    let preserved = |address: u64| pages::Pfn::at(address).is_ok_and(|pfn| marks.covering(pfn).is_some());
    if let Some(fdt) = kho.fdt_address.filter(|fdt| arena || preserved(*fdt)) {
        picture.claim_page(findings, owner, fdt);
    }
}

fn read_blobs<M: Memory>(
    context: &mut Context<'_, M>,
    kho: &mut Kho,
    survey: &mut Survey,
    draft: &kho::Draft,
) {
    for subtree in &draft.subtrees {
        let name = Name::new(&subtree.name);
        let label = format!("subtree {name}");
        let owner = context.picture.owner(OwnerKind::Subtree, label);
        let (address, bytes) = (subtree.data.or(subtree.fdt), subtree.size);
        let mut blob = Blob { name, address, bytes, read: false, owner: Some(owner) };
        if let Some(address) = address {
            blob.read = read_blob(context, survey, (owner, &subtree.name), address, bytes);
        }
        kho.blobs.push(blob);
    }
}

/// True if it was made out what the blob says.
fn read_blob<M: Memory>(
    context: &mut Context<'_, M>,
    survey: &mut Survey,
    (owner, name): (usize, &[u8]),
    address: u64,
    bytes: Option<u64>,
) -> bool {
    let (label, is) = (context.picture.label(owner), |other: &str| name == other.as_bytes());
    // A blob of a version that does not say its length is a device tree's page at most.
    let len = bytes.unwrap_or(PAGE_SIZE);
    let Context { picture, findings, view, .. } = context;
    picture.claim_bytes(findings, owner, address, bytes.unwrap_or(1));
    if is(luo::SUBTREE) {
        let luo = read_luo(context, owner, address, len);
        let read = luo.is_some();
        survey.luo = luo;
        return read;
    }
    if is(kexec_metadata::SUBTREE) {
        match kexec_metadata::KexecMetadata::read(view, address, len) {
            Ok(found) => {
                survey.kexec = Some(KexecMetadata {
                    version: kexec_metadata::VERSION,
                    previous_release: escaped(&found.previous_release),
                    kexec_count: found.kexec_count,
                });
            }
            Err(fault) => findings.fault(&label, &fault),
        }
        return survey.kexec.is_some();
    }
    if is(memblock::SUBTREE) {
        let mut on_fault = |fault| {
            findings.fault(&label, &fault);
            Ok(())
        };
        let regions = memblock::read_on(view, address, len, &mut on_fault).unwrap_or_default();
        survey.memblock = reserve(context, &regions);
        return true;
    }
    if survey.arena.is_some() && name == abi::regions::SUBTREE.bytes() {
        return true;
    }
    findings.lost = true;
    // Of a name that cannot be one that was told.
    if kho::SubtreeName::new(name).is_ok() {
        let words = "is none whose format is known: what it refers to is not either";
        findings.add("kho-subtree-known", &label, Some(address), None, words);
    }
    false
}

fn reserve<M>(context: &mut Context<'_, M>, regions: &[memblock::Region]) -> Vec<ReservedMemory> {
    let Context { picture, findings, .. } = context;
    let reserve = |region: &memblock::Region| {
        let (name, address, bytes) = (Name::new(&region.name), region.start, region.size);
        let owner = picture.owner(OwnerKind::Reserved, format!("reserved memory {name}"));
        let range = PageRange::of_bytes(address, bytes);
        match range {
            Ok(range) => picture.claim(findings, owner, range, false),
            Err(_) => picture.claim_bytes(findings, owner, address, bytes),
        }
        ReservedMemory { name, address, bytes }
    };
    regions.iter().map(reserve).collect()
}

fn read_luo<M: Memory>(context: &mut Context<'_, M>, owner: usize, address: u64, bytes: u64) -> Option<Luo> {
    let label = context.picture.label(owner);
    let mut faults = Vec::new();
    let mut gather = |fault| {
        faults.push(fault);
        Ok(())
    };
    let draft = luo::Draft::read(&context.view, address, bytes, &mut gather).unwrap_or_default();
    let version = draft.compatible.split(|byte| *byte == 0).next().unwrap_or_default();
    let mut found = Luo { version: escaped(version), version_known: Known::Current, ..Luo::default() };
    let other = faults.iter().any(|fault| fault.field == "compatible");
    if other {
        files::older_luo(context, &label, &mut found, address, bytes);
        return Some(found);
    }
    let unread = faults
        .iter()
        .any(|fault| fault.address == address && matches!(fault.problem, Problem::Unreadable(_)));
    faults.iter().for_each(|fault| context.note_fault(&label, fault));
    if unread || draft.compatible == [0; 8] {
        return None;
    }
    let Context { picture, findings, .. } = context;
    let luo_owner = picture.owner(OwnerKind::Luo, "LUO: lists of sessions and files".to_string());
    found.liveupdate_number = Some(draft.liveupdate_num);
    found.flbs_address = Some(draft.flbs_address).filter(|address| *address != 0);
    let blocks = draft.sessions.iter().flat_map(|session| &session.blocks);
    for page in found.flbs_address.iter().chain(&draft.blocks).chain(blocks) {
        picture.claim_page(findings, luo_owner, *page);
    }
    found.flbs = draft
        .flbs
        .iter()
        .map(|flb| Flb { name: Name::new(flb.name.bytes()), data: flb.data, count: flb.count })
        .collect();
    if found.flbs.iter().any(|flb| flb.data != 0) {
        // What a shared object's number refers to is known to its own code alone.
        findings.lost = true;
    }
    check_filled(findings, &label, draft.filled, &draft.blocks);
    found.blocks.clone_from(&draft.blocks);
    for (index, session) in draft.sessions.iter().enumerate() {
        let session = read_session(context, index, session);
        for file in &session.files {
            *found.handlers.entry(file.handler.clone()).or_default() += 1;
        }
        found.sessions.push(session);
    }
    files::check_states(context, &found);
    Some(found)
}

/// A block that another one follows is full.
fn check_filled(findings: &mut Findings, label: &str, filled: bool, blocks: &[u64]) {
    // Where a block was broken, this follows.
    let broken = findings.list.iter().any(|finding| finding.rule.starts_with("block-"));
    if !broken && !filled {
        let words = "a block in the midst of a chain has room for more entries";
        findings.add("block-filled", label, blocks.first().copied(), None, words);
    }
}

fn read_session<M: Memory>(context: &mut Context<'_, M>, index: usize, draft: &luo::DraftSession) -> Session {
    let name = Name::of_field(&draft.entry.name);
    check_filled(&mut context.findings, &format!("session {name}"), draft.filled, &draft.blocks);
    let mut session =
        Session { count: draft.entry.count.get(), blocks: draft.blocks.clone(), files: Vec::new(), name };
    for (place, file) in draft.files.iter().enumerate() {
        let file = files::read(context, &session.name, (index, place), file);
        session.files.push(file);
    }
    files::check_session(context, &session);
    session
}

fn staleness(survey: &mut Survey, options: Options) {
    let mut stale = |what: &str, why: &str| {
        survey.stale.push(Stale { what: what.to_string(), why: why.to_string() });
    };
    if options.running {
        stale(
            "the LUO blob",
            "a kernel frees it as soon as it has read it: what is there now may be something else",
        );
        stale(
            "the tree's own nodes",
            "they are not preserved: a kernel that has read the tree uses their pages for other things",
        );
        stale(
            "files and sessions that were retrieved or finished",
            "their records and lists are freed then, and still told of here",
        );
    }
    let slots = survey.arena.iter().flat_map(|arena| &arena.slots);
    let before = slots.into_iter().find(|slot| slot.valid && !slot.counts);
    let before =
        before.map(|slot| format!("the tree of generation {}, at {:#x}", slot.generation, slot.fdt_address));
    if let Some(what) = before {
        let why = "a later one counts, and its frames may have been used again: it is not looked at";
        survey.stale.push(Stale { what, why: why.to_string() });
    }
}

/// Lists the folios of files one by one.
pub struct Folios<'a, M> {
    view: View<'a, M>,
    marks: Box<Marks>,
    known: bool,
}

/// Makes ready to list the folios of the files of a survey of this memory.
pub fn folios<'a, M: Memory>(memory: &'a M, survey: &Survey) -> Folios<'a, M> {
    let view = match &survey.arena {
        Some(arena) => View::with_runs(memory, arena::runs(arena)),
        None => View::new(memory),
    };
    let mut marks = Box::new(Marks::default());
    let root = survey.kho.as_ref().and_then(|kho| kho.map_address);
    if let Some(root) = root {
        let mut visit = |found| {
            if let Found::Block(key) = found {
                marks.preserve(key);
            }
            Ok(())
        };
        let _ = radix::walk_on(&view, root, &mut visit, &mut |_| Ok(()));
    }
    Folios { view, marks, known: root.is_some() }
}

impl<M: Memory> Folios<'_, M> {
    /// Lists the folios of a file, in the order of its list, past what is wrong. False if it has no such list.
    pub fn list(&self, file: &File, visit: &mut dyn FnMut(&FolioLine)) -> bool {
        let order = |pfn| match self.known {
            true => self.marks.order_at(pfn),
            false => Some(Order::PAGE),
        };
        let mut part = |part| {
            match part {
                abi::folio::Part::Folio(folio) => visit(&FolioLine {
                    index: folio.index,
                    address: folio.frames.start().address(),
                    bytes: folio.frames.len_bytes(),
                    order: folio.frames.len_pages().ilog2(),
                    flags: folio.flags,
                }),
                abi::folio::Part::Hole { index } => {
                    visit(&FolioLine { index, address: 0, bytes: 0, order: 0, flags: 0 });
                }
                abi::folio::Part::Lost { index, pfn } => {
                    visit(&FolioLine {
                        index,
                        address: pfn.saturating_mul(PAGE_SIZE),
                        bytes: 0,
                        order: 0,
                        flags: 0,
                    });
                }
                abi::folio::Part::List(_) => {}
            }
            Ok(())
        };
        folio_walk(&self.view, &file.handler, file.data, &order, &mut part, &mut |_| Ok(())).is_some()
    }
}
