//! Which of the pages that look like a root FDT is the one that counts.
//!
//! A guest writes what it likes into its memory, also a state of its own making, and the node by which a boot loader names
//! one. So nothing that a page says of itself decides alone, a page in memory that another state keeps for a file comes last, and
//! those that were not taken are told of.

use std::cmp::Reverse;

use abi::Memory;
use abi::fdt;
use abi::kho::Draft;
use pages::PAGE_BYTES;
use survey::Options;
use survey::OwnerKind;
use survey::Root;
use survey::Survey;

use super::search::Found;

/// Candidates of which all is made out.
const MOST: usize = 32;
/// Those among the others that are listed.
const LISTED: usize = 8;

/// The page that was chosen, and what is to be said of that.
pub(super) struct Choice {
    pub(super) address: u64,
    pub(super) notes: Vec<String>,
}

/// A page and the state that begins in it.
struct Candidate {
    address: u64,
    version: String,
    survey: Survey,
    is_named: bool,
}

impl Candidate {
    fn keeps_memory(&self) -> bool {
        self.survey.kho.as_ref().and_then(|kho| kho.preserved_bytes).is_some_and(|bytes| bytes > 0)
    }

    fn sessions(&self) -> usize {
        self.survey.luo.as_ref().map_or(0, |luo| luo.sessions.len())
    }

    /// The file for which this state keeps the page at `address`.
    fn file_with(&self, address: u64) -> Option<&str> {
        let after = self.survey.ranges.partition_point(|range| range.address <= address);
        let range = self.survey.ranges.get(after.checked_sub(1)?)?;
        let owner = self.survey.owners.get(range.owner?)?;
        let is_in = address - range.address < range.bytes;
        (is_in && owner.kind == OwnerKind::File).then_some(&owner.label)
    }

    /// What is said of it if it was not taken.
    fn describe(&self, all: &[Self]) -> String {
        let why = match (self.within(all), self.keeps_memory()) {
            (Some((other, file)), _) => format!("in memory that the one at {other:#x} keeps for {file}"),
            (None, false) => "keeps no memory".to_owned(),
            (None, true) => {
                format!("{} sessions, {} rules broken", self.sessions(), self.survey.findings.len())
            }
        };
        format!("{:#x} ({why})", self.address)
    }

    /// The other state that keeps this one's page for a file, if that is not true the other way round, too.
    fn within<'a>(&self, all: &'a [Self]) -> Option<(u64, &'a str)> {
        let other = all.iter().find(|other| {
            other.file_with(self.address).is_some() && self.file_with(other.address).is_none()
        })?;
        Some((other.address, other.file_with(self.address)?))
    }
}

/// Chooses among all pages that were found; none if none was.
pub(super) fn choose(memory: &dyn Memory, found: &Found, options: Options) -> Option<Choice> {
    let mut addresses = found.candidates.clone();
    addresses.sort_by_cached_key(|address| Reverse(promise(memory, *address, found)));
    let all: Vec<Candidate> =
        addresses.iter().take(MOST).map(|at| make_out(memory, *at, found, options)).collect();
    let best = all.iter().max_by_key(|one| {
        let errors = one.survey.findings.len();
        (one.within(&all).is_none(), one.keeps_memory(), one.sessions() > 0, Reverse(errors), one.is_named)
    })?;
    let mut notes =
        vec![format!("the root FDT was found by a search, at {:#x} ({})", best.address, best.version)];
    let names: Vec<String> = found.named.iter().map(|at| format!("{at:#x}")).collect();
    if !names.is_empty() {
        notes.push(format!("what looks like the boot parameters of a kernel names {}", names.join(", ")));
    }
    let others: Vec<&Candidate> = all.iter().filter(|one| one.address != best.address).collect();
    if !others.is_empty() {
        let listed: Vec<String> = others.iter().take(LISTED).map(|one| one.describe(&all)).collect();
        let count = found.count - 1;
        let more = count.saturating_sub(listed.len() as u64);
        let more = if more > 0 { format!(", and {more} more") } else { String::new() };
        notes.push(format!(
            "{count} other pages look like a root FDT, too: {}{more}; --fdt-address has one of them read",
            listed.join(", ")
        ));
    }
    Some(Choice { address: best.address, notes })
}

fn make_out(memory: &dyn Memory, address: u64, found: &Found, options: Options) -> Candidate {
    let version = page(memory, address).and_then(|page| fdt::compatible(&page).map(<[u8]>::to_vec));
    let version = version.unwrap_or_default().escape_ascii().to_string();
    let survey = Survey::read(&memory, &Root::Fdt(address), options);
    Candidate { address, version, survey, is_named: found.named.contains(&address) }
}

/// How likely a page is to be it, by what costs next to nothing: its tree's root is there and not empty, and something names it.
fn promise(memory: &dyn Memory, address: u64, found: &Found) -> (bool, bool) {
    let root = page(memory, address).and_then(|page| {
        let map = Draft::read(&page, address, &mut |_| Ok(())).ok()?.map?;
        self::page(memory, map)
    });
    (root.is_some_and(|root| root.iter().any(|byte| *byte != 0)), found.named.contains(&address))
}

fn page(memory: &dyn Memory, address: u64) -> Option<Vec<u8>> {
    let mut page = vec![0; PAGE_BYTES];
    memory.read(address, &mut page).ok()?;
    Some(page)
}
