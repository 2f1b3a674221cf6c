//! What was found, for people.

use std::collections::BTreeMap;
use std::io;
use std::io::Write;

use abi::Memory;
use survey::Arena;
use survey::File;
use survey::Finding;
use survey::FolioLine;
use survey::FolioTable;
use survey::Folios;
use survey::Kho;
use survey::Known;
use survey::List;
use survey::Luo;
use survey::OrderStats;
use survey::Session;
use survey::Severity;
use survey::Survey;

use super::branch::Branch;
use super::source::Source;
use super::source::Told;

/// Owners and ranges that are shown: who wants all of them wants the JSON.
const MOST: usize = 32;

/// A number, its thousands apart.
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// So many of something.
pub(super) fn many(number: u64, what: &str) -> String {
    format!("{} {what}{}", count(number), if number == 1 { "" } else { "s" })
}

/// A length: exact where it is short or round, else to a tenth of a unit.
pub(super) fn bytes(len: u64) -> String {
    const UNITS: [(u32, &str); 6] =
        [(60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = UNITS.into_iter().find(|(shift, _)| len >> shift > 0);
    match unit {
        None => many(len, "byte"),
        Some((shift, name)) if len.is_multiple_of(1 << shift) => format!("{} {name}", len >> shift),
        Some((10, _)) => many(len, "byte"),
        Some((shift, name)) => {
            let tenths = (u128::from(len) * 10) >> shift;
            format!("{}.{} {name}", tenths / 10, tenths % 10)
        }
    }
}

/// A path or a name that somebody typed, without what would direct a terminal.
fn plain(text: &str) -> String {
    text.escape_debug().to_string()
}

/// Writes all of it.
pub(super) fn write(
    to: &mut dyn Write,
    source: &Source,
    survey: &Survey,
    folios: bool,
    verify: bool,
) -> io::Result<()> {
    head(&source.told).write(to)?;
    if let Some(arena) = &survey.arena {
        self::arena(arena).write(to)?;
    }
    match &survey.kho {
        Some(kho) => self::kho(kho, survey).write(to)?,
        None => writeln!(to, "KHO  could not be read")?,
    }
    let memory = source.memory();
    let lists = folios.then(|| survey::folios(&memory, survey));
    if let Some(luo) = &survey.luo {
        self::luo(luo, lists.as_ref()).write(to)?;
    }
    owners(survey).write(to)?;
    list(to, "may be stale", survey.stale.iter().map(|stale| format!("{}: {}", stale.what, stale.why)))?;
    list(to, "could not be read", survey.unread.iter().cloned())?;
    findings(to, survey, verify)
}

fn list(to: &mut dyn Write, heading: &str, lines: impl Iterator<Item = String>) -> io::Result<()> {
    let mut branch = Branch::new(heading);
    let mut some = false;
    for line in lines {
        some = true;
        branch.push(line);
    }
    if some { branch.write(to) } else { Ok(()) }
}

fn head(told: &Told) -> Branch<'static> {
    let mut head = Branch::new(format!("{}  {}", told.kind, plain(&told.name))).with(plain(&told.holds));
    told.notes.iter().for_each(|note| head.push(plain(note)));
    head
}

fn version(version: &str, known: Known) -> String {
    let version = if version.is_empty() { "of no version" } else { version };
    match known {
        Known::Current => version.to_owned(),
        Known::Older => format!("{version} (an earlier version, read in part)"),
        Known::Unknown => format!("{version} (not known)"),
    }
}

fn arena(arena: &Arena) -> Branch<'static> {
    let identity = arena.identity.as_deref().unwrap_or("of no valid header");
    let mut branch = Branch::new(format!("arena  machine {identity}"));
    if let Some(len) = arena.region0_bytes {
        branch.push(format!("region 0: {}", bytes(len)));
    }
    if let Some(owner) = &arena.ownership {
        branch.push(format!("owner: {}, epoch {}, nonce {:#08x}", owner.state, owner.epoch, owner.nonce));
    }
    let mut slots = Branch::new("root slots");
    for slot in &arena.slots {
        let state = match (slot.counts, slot.valid) {
            (true, _) => "counts",
            (false, true) => "the one before",
            (false, false) => "not valid",
        };
        slots.push(format!(
            "at {:#x}: generation {}, root FDT at {:#x}: {state}",
            slot.address, slot.generation, slot.fdt_address
        ));
    }
    branch.push(slots);
    let mut regions = Branch::new("regions");
    for region in &arena.regions {
        regions.push(format!(
            "{:#014x}  {:>9}  {}, made for pages of {}, NUMA {}, inode {}",
            region.address,
            bytes(region.bytes),
            region.store,
            bytes(region.page_bytes),
            region.policy,
            region.file
        ));
    }
    branch.with(regions)
}

fn kho(kho: &Kho, survey: &Survey) -> Branch<'static> {
    let at = kho.fdt_address.map_or_else(String::new, |address| format!(" at {address:#x}"));
    let mut branch = Branch::new(format!(
        "KHO  {}, root FDT{at}, {}",
        version(&kho.version, kho.version_known),
        many(kho.fdt_bytes, "byte")
    ));
    match kho.preserved_bytes {
        Some(preserved) => {
            let blocks = kho.orders.iter().map(|order| order.blocks).sum();
            let mut all =
                Branch::new(format!("preserved: {} in {}", bytes(preserved), many(blocks, "block")));
            table(&kho.orders).into_iter().for_each(|line| all.push(line));
            branch.push(all);
        }
        None => branch.push("preserved: the tree could not be read"),
    }
    if let Some(map) = kho.map_address {
        let whose = if kho.tree.preserved { "preserved, too" } else { "not preserved" };
        let levels: Vec<String> =
            kho.tree.by_level.iter().rev().map(|(level, nodes)| format!("level {level}: {nodes}")).collect();
        let levels = if levels.is_empty() { String::new() } else { format!(" ({})", levels.join(", ")) };
        let (nodes, len) = (many(kho.tree.nodes, "node"), bytes(kho.tree.bytes));
        branch.push(format!("tree: root at {map:#x}, {nodes}{levels}, {len}, {whose}"));
    }
    let mut blobs = Branch::new(many(kho.blobs.len().try_into().unwrap_or_default(), "subtree"));
    for blob in &kho.blobs {
        let len = blob.bytes.map_or_else(|| "unknown length".to_owned(), |len| many(len, "byte"));
        let at = blob.address.map_or_else(|| "nowhere".to_owned(), |address| format!("at {address:#x}"));
        let read = if blob.read { "" } else { ": not read" };
        blobs.push(format!("{}  {len} {at}{read}", blob.name));
    }
    branch.push(blobs);
    if let Some(kexec) = &survey.kexec {
        branch.push(format!("handed over by Linux {}, kexec {}", kexec.previous_release, kexec.kexec_count));
    }
    for region in &survey.memblock {
        branch.push(format!(
            "reserved memory {}: {} at {:#x}",
            region.name,
            bytes(region.bytes),
            region.address
        ));
    }
    branch
}

/// The orders in columns.
fn table(orders: &[OrderStats]) -> Vec<String> {
    if orders.is_empty() {
        return Vec::new();
    }
    let mut rows = vec![
        ["order", "block", "blocks", "bytes", "runs", "leaves", "density", "from", "to"].map(String::from),
    ];
    rows.extend(orders.iter().map(|order| {
        [
            order.order.to_string(),
            bytes(order.block_bytes),
            count(order.blocks),
            bytes(order.bytes),
            count(order.runs),
            count(order.leaves),
            format!("{:.2} %", order.density * 100.0),
            format!("{:#x}", order.lowest),
            format!("{:#x}", order.highest),
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or_default();
    let widths: [usize; 9] = std::array::from_fn(width);
    let line = |row: &[String; 9]| {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        cells.join("  ")
    };
    rows.iter().map(line).collect()
}

fn luo<'a>(luo: &'a Luo, lists: Option<&'a Folios<'a, &'a dyn Memory>>) -> Branch<'a> {
    let number = luo.liveupdate_number.map_or_else(String::new, |number| format!(", update {number}"));
    let files = luo.sessions.iter().map(|session| session.files.len()).sum::<usize>();
    let mut branch = Branch::new(format!(
        "LUO  {}{number}, {}, {}",
        version(&luo.version, luo.version_known),
        many(luo.sessions.len().try_into().unwrap_or_default(), "session"),
        many(files.try_into().unwrap_or_default(), "file")
    ));
    if !luo.handlers.is_empty() {
        let handlers: Vec<String> =
            luo.handlers.iter().map(|(name, files)| format!("{files} of {name}")).collect();
        branch.push(format!("handlers: {}", handlers.join(", ")));
    }
    for flb in &luo.flbs {
        branch.push(format!("shared object {}: {:#x}, {}", flb.name, flb.data, many(flb.count, "user")));
    }
    for session in &luo.sessions {
        branch.push(self::session(session, lists));
    }
    branch
}

fn session<'a>(session: &'a Session, lists: Option<&'a Folios<'a, &'a dyn Memory>>) -> Branch<'a> {
    let mut branch = Branch::new(format!("session {}: {}", session.name, many(session.count, "file")));
    for file in &session.files {
        branch.push(self::file(file, lists));
    }
    branch
}

fn file<'a>(file: &'a File, lists: Option<&'a Folios<'a, &'a dyn Memory>>) -> Branch<'a> {
    let mut facts = vec![format!("token {}  {}", file.token_hex, version_of_handler(file))];
    if let Some(name) = &file.name {
        facts.push(name.name.to_string());
    }
    facts.extend(file.size.map(|size| format!("size {}", bytes(size))));
    facts.extend(file.position.map(|position| format!("position {position}")));
    if let Some(seals) = file.seals {
        facts.push(if seals == 0 {
            "no seals".to_owned()
        } else {
            format!("seals {}", file.seal_names.join("+"))
        });
    }
    if !file.flag_names.is_empty() {
        facts.push(format!("flags {}", file.flag_names.join("+")));
    }
    facts.extend(file.vm_type.map(|kind| format!("type {kind}")));
    facts.extend(file.vcpus.map(|vcpus| many(vcpus, "vCPU")));
    facts.extend(file.layout.as_ref().map(|layout| format!("layout: {layout}")));
    facts.extend(file.vm_token.map(|token| format!("of the VM of token {token:#x}")));
    facts.extend(file.fd_kind.clone());
    facts.extend(file.fd_index.map(|index| format!("descriptor {index}")));
    facts.extend(file.holds.as_ref().map(|holds| format!("holds {}", held(holds))));
    if !file.read {
        facts.push("not read".to_owned());
    }
    let mut branch = Branch::new(facts.join(", "));
    if let Some(epoch) = file.epoch {
        branch.push(state(file, epoch));
    }
    if let Some(table) = &file.folio_table {
        folio_table(&mut branch, file, table);
    }
    for extent in &file.extents {
        let (at, len) = (extent.address, bytes(extent.bytes));
        branch.push(format!("extent: pages from {} on, {len} at {at:#x}", count(extent.index)));
    }
    branch.push(place(file));
    if let Some(note) = &file.note {
        branch.push(format!("note: {note}"));
    }
    if let (Some(lists), true) = (lists, file.folio_table.is_some()) {
        branch.lines(Box::new(move |line| {
            lists.list(file, &mut |folio| line(&folio_line(folio)));
        }));
    }
    branch
}

fn version_of_handler(file: &File) -> String {
    version(&file.handler, file.handler_known)
}

fn held(holds: &str) -> &str {
    match holds {
        "arena" => "region 0 of an arena",
        "note" => "a note",
        other => other,
    }
}

fn state(file: &File, epoch: u32) -> String {
    if epoch == 0 {
        return "nothing is saved".to_owned();
    }
    let len = bytes(file.bytes.unwrap_or_default());
    let groups = file.groups.map_or_else(String::new, |groups| format!(" in {}", many(groups, "group")));
    let sum = match file.checksum_right {
        Some(true) => "checksum right",
        Some(false) => "checksum WRONG",
        None => "checksum not looked at",
    };
    format!("{len}{groups}, saved for the seal of epoch {epoch}, {sum}")
}

fn folio_table(branch: &mut Branch<'_>, file: &File, table: &FolioTable) {
    let pairs = |map: &BTreeMap<u32, u64>| -> Vec<String> {
        map.iter().map(|(order, folios)| format!("order {order}: {}", count(*folios))).collect()
    };
    let mut facts = vec![format!(
        "{}, {}",
        many(file.folios.unwrap_or_default(), "folio"),
        bytes(file.bytes.unwrap_or_default())
    )];
    facts.extend(pairs(&table.by_order));
    facts.extend(table.by_flag.iter().map(|(flags, folios)| format!("{flags}: {}", count(*folios))));
    facts.push(match table.hole_pages {
        0 => "no holes".to_owned(),
        pages => format!("{} in holes", many(pages, "page")),
    });
    if table.hole_records > 0 {
        facts.push(many(table.hole_records, "hole record"));
    }
    if table.lost_records > 0 {
        facts.push(format!("{} without preserved memory", many(table.lost_records, "record")));
    }
    let mut line = Branch::new(facts.join(", "));
    if table.runs > 0 {
        let largest: Vec<String> = table
            .largest_runs
            .iter()
            .take(4)
            .map(|run| format!("{} at {:#x} (page {})", bytes(run.bytes), run.address, count(run.index)))
            .collect();
        let more = if table.runs > 4 { ", …" } else { "" };
        line.push(format!("{}: {}{more}", many(table.runs, "run"), largest.join(", ")));
    }
    branch.push(line);
}

fn place(file: &File) -> String {
    let list = file.list.as_ref().map_or_else(String::new, |list: &List| {
        format!(
            "; list of {} in {} at {:#x}",
            many(list.total_pages, "page"),
            many(list.chunks, "chunk"),
            list.first
        )
    });
    format!("structure at {:#x}{list}", file.data)
}

fn folio_line(folio: &FolioLine) -> String {
    match folio.bytes {
        0 if folio.address == 0 => format!("page {:>10}  hole", count(folio.index)),
        0 => format!("page {:>10}  at {:#014x}  not preserved", count(folio.index), folio.address),
        len => format!(
            "page {:>10}  at {:#014x}  {:>7}  order {:>2}  flags {:#x}",
            count(folio.index),
            folio.address,
            bytes(len),
            folio.order,
            folio.flags
        ),
    }
}

fn owners(survey: &Survey) -> Branch<'static> {
    let mut branch = Branch::new("who has preserved memory");
    let owners: Vec<_> = survey.owners.iter().filter(|owner| owner.bytes > 0).collect();
    for owner in owners.iter().take(MOST) {
        let metadata = match owner.metadata_bytes {
            0 => String::new(),
            all if all == owner.bytes => ", all of it metadata".to_owned(),
            some => format!(", of it {} metadata", bytes(some)),
        };
        branch.push(format!("{:>9}  {}{metadata}", bytes(owner.bytes), owner.label));
    }
    if owners.len() > MOST {
        branch.push(format!("and {} others: --json lists them", owners.len() - MOST));
    }
    let left = &survey.unreferenced;
    let nothing = if left.perhaps_by_unread { "nothing that could be read" } else { "nothing" };
    let mut rest = Branch::new(format!("{:>9}  {nothing} refers to", bytes(left.bytes)));
    for run in &left.first {
        rest.push(format!("{} at {:#x}", bytes(run.bytes), run.address));
    }
    let shown = u64::try_from(left.first.len()).unwrap_or_default();
    if left.runs > shown {
        rest.push(format!("and {} more", many(left.runs - shown, "run")));
    }
    if left.bytes > 0 {
        branch.push(rest);
    }
    branch
}

fn severity(severity: Severity) -> &'static str {
    match severity {
        Severity::Note => "note",
        Severity::Warning => "warning",
        Severity::Error => "error",
    }
}

fn findings(to: &mut dyn Write, survey: &Survey, verify: bool) -> io::Result<()> {
    if survey.findings.is_empty() {
        return writeln!(to, "no rule is broken");
    }
    let number =
        |wanted: Severity| survey.findings.iter().filter(|finding| finding.severity == wanted).count();
    let summary = [(Severity::Error, "error"), (Severity::Warning, "warning"), (Severity::Note, "note")]
        .into_iter()
        .map(|(severity, what)| (number(severity), what))
        .filter(|(number, _)| *number > 0)
        .map(|(number, what)| many(number.try_into().unwrap_or_default(), what))
        .collect::<Vec<_>>()
        .join(", ");
    if !verify {
        return writeln!(to, "rules are broken: {summary}; --verify lists them");
    }
    let width = survey.findings.iter().map(|finding| finding.rule.len()).max().unwrap_or_default();
    let mut branch = Branch::new(format!("rules that are broken: {summary}"));
    for finding in &survey.findings {
        branch.push(finding_line(finding, width));
    }
    if survey.findings_left_out > 0 {
        branch.push(format!("and {} more of rules that stand above", survey.findings_left_out));
    }
    branch.write(to)
}

fn finding_line(finding: &Finding, width: usize) -> Branch<'static> {
    let says = survey::rule(finding.rule).map_or("", |rule| rule.says);
    let level = severity(finding.severity);
    Branch::new(format!("{level:<7}  {:<width$}  {says}", finding.rule))
        .with(format!("{}: {}", finding.subject, finding.words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_said_for_people() {
        assert_eq!(
            ["0", "999", "1,000", "12,345,678"],
            [0, 999, 1000, 12_345_678].map(count).each_ref().map(|text| &**text)
        );
        assert_eq!([many(1, "run"), many(2, "run")], ["1 run", "2 runs"]);
        let lengths = [0, 1, 4096, 12_297, 4_407_296, 1 << 30, u64::MAX].map(bytes);
        assert_eq!(lengths, ["0 bytes", "1 byte", "4 KiB", "12,297 bytes", "4.2 MiB", "1 GiB", "15.9 EiB"]);
    }
}
