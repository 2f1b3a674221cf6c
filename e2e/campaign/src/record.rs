//! What is written of each try, one line of JSON each, and what all of them come to.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufRead as _;
use std::io::BufReader;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use comfy_table::CellAlignment;
use comfy_table::Table;
use comfy_table::presets;
use serde::Deserialize;
use serde::Serialize;
use vmm::control::GuestKind;

use crate::choice::Carrier;
use crate::choice::Whom;
use crate::plan::Actor;
use crate::plan::Fault;
use crate::plan::Place;

/// How a try ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The successor runs the guest.
    WentThrough,
    /// The guest runs on where it was.
    RolledBack,
    /// The machine's process was killed, and it was recovered.
    Recovered,
    /// The process that ran the guest was killed while it did: nothing runs it, as that is meant to be. Its memory was compared
    /// all the same.
    Lost,
    /// Nothing runs the guest, though a process lived that should.
    Stranded,
    /// Something did not come to an end.
    Hung,
}

/// A try, and what was found after it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its number.
    pub index: u64,
    /// The campaign's seed.
    pub seed: u64,
    /// How the machine went.
    pub carrier: Carrier,
    /// The guest.
    pub guest: GuestKind,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// A daemon keeps it.
    #[serde(default)]
    pub kept: bool,
    /// The VMM started its successor itself.
    pub starts: bool,
    /// What was done.
    pub fault: Fault,
    /// To whom.
    pub whom: Whom,
    /// Who passed the place.
    pub actor: Option<Actor>,
    /// The place.
    pub place: Option<Place>,
    /// How long after the request, in microseconds.
    pub after_us: Option<u64>,
    /// Processes that were killed.
    pub kills: u32,
    /// Processes that were stopped, and woken later.
    pub stops: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// It was recovered, and the guest ran on from where it stood.
    #[serde(default)]
    pub ran_on: bool,
    /// How long the guest stood still for the update, in microseconds, if that is known.
    pub pause_us: Option<f64>,
    /// Pages of 4 KiB that were compared after it.
    pub pages_checked: u64,
    /// Pages of them that did not hold what they should.
    pub pages_lost: u64,
    /// Wrong words that the guest found.
    pub guest_errors: u64,
    /// Times that the guest found registers lost.
    pub registers_lost: u64,
    /// Ticks lost or counted twice.
    pub ticks_miscounted: u64,
    /// Processes in which the guest ran, as seen from outside after the fault.
    pub owners: u32,
    /// What the try took, in milliseconds.
    pub took_ms: u64,
    /// What else is to be said.
    pub note: Option<String>,
}

impl Record {
    /// Whether something was found that must not be.
    #[must_use]
    pub fn is_bad(&self) -> bool {
        let lost = self.pages_lost + self.guest_errors + self.registers_lost + self.ticks_miscounted;
        lost > 0 || self.owners > 1 || matches!(self.outcome, Outcome::Stranded | Outcome::Hung)
    }
}

/// What all tries come to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Updates that were tried.
    pub tried: u64,
    /// Processes that were killed.
    pub kills: u64,
    /// Of those, daemons that kept a machine.
    pub daemons: u64,
    /// Processes that were stopped, and woken later.
    pub stops: u64,
    /// Updates that went through.
    pub went_through: u64,
    /// Updates that were rolled back.
    pub rolled_back: u64,
    /// Machines that were recovered, since a daemon kept them.
    pub recovered: u64,
    /// Of those, machines whose guest ran on from where it stood.
    pub ran_on: u64,
    /// Machines whose process was killed while it ran the guest.
    pub lost_by_design: u64,
    /// Machines that nothing ran any more though something should.
    pub stranded: u64,
    /// Tries that did not come to an end.
    pub hung: u64,
    /// Places at which a process was struck, of those that there are: each with each fault counts.
    pub places: usize,
    /// Places that there are.
    pub places_in_all: usize,
    /// Pages of 4 KiB that were compared.
    pub pages_checked: u64,
    /// Bytes of pages that did not hold what they should.
    pub bytes_lost: u64,
    /// Wrong words that guests found.
    pub guest_errors: u64,
    /// Times that a guest found registers lost.
    pub registers_lost: u64,
    /// Ticks lost or counted twice.
    pub ticks_miscounted: u64,
    /// Times that a guest ran in two processes.
    pub double_owners: u64,
    #[serde(skip)]
    struck: BTreeSet<String>,
}

impl Totals {
    /// Of nothing yet.
    #[must_use]
    pub fn of_places(places_in_all: usize) -> Self {
        Self { places_in_all, ..Self::default() }
    }

    /// Takes a try in.
    pub fn add(&mut self, record: &Record) {
        self.tried += 1;
        self.kills += u64::from(record.kills);
        self.stops += u64::from(record.stops);
        let count = match record.outcome {
            Outcome::WentThrough => &mut self.went_through,
            Outcome::RolledBack => &mut self.rolled_back,
            Outcome::Recovered => &mut self.recovered,
            Outcome::Lost => &mut self.lost_by_design,
            Outcome::Stranded => &mut self.stranded,
            Outcome::Hung => &mut self.hung,
        };
        *count += 1;
        self.ran_on += u64::from(record.ran_on);
        self.daemons += u64::from(if record.whom == Whom::Daemon { record.kills } else { 0 });
        self.pages_checked += record.pages_checked;
        self.bytes_lost += record.pages_lost * pulse::PAGE_BYTES;
        self.guest_errors += record.guest_errors;
        self.registers_lost += record.registers_lost;
        self.ticks_miscounted += record.ticks_miscounted;
        self.double_owners += u64::from(record.owners > 1);
        if record.kills + record.stops > 0 && record.place.is_some() {
            let Record { carrier, actor, place, fault, whom, .. } = record;
            self.struck.insert(format!("{carrier:?} {actor:?} {place:?} {fault:?} {whom:?}"));
            self.places = self.struck.len();
        }
    }

    /// Whether nothing was found that must not be.
    #[must_use]
    pub fn is_good(&self) -> bool {
        let found = [
            self.stranded,
            self.hung,
            self.bytes_lost,
            self.guest_errors,
            self.registers_lost,
            self.ticks_miscounted,
            self.double_owners,
        ];
        found.iter().all(|found| *found == 0)
    }

    /// For people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::UTF8_BORDERS_ONLY);
        let rows = [
            ("updates tried", self.tried.to_string()),
            ("  processes killed", self.kills.to_string()),
            ("    of them tideoverd", self.daemons.to_string()),
            ("  processes stopped, and woken later", self.stops.to_string()),
            (
                "  named places struck, each with each fault",
                format!("{} of {}", self.places, self.places_in_all),
            ),
            ("went through", self.went_through.to_string()),
            ("rolled back", self.rolled_back.to_string()),
            ("recovered", self.recovered.to_string()),
            ("  ran on from where they stood", self.ran_on.to_string()),
            ("machines lost, their process killed as it ran them", self.lost_by_design.to_string()),
            ("machines lost otherwise", self.stranded.to_string()),
            ("did not end", self.hung.to_string()),
            ("pages compared", self.pages_checked.to_string()),
            ("bytes lost", self.bytes_lost.to_string()),
            ("wrong words found by guests", self.guest_errors.to_string()),
            ("registers lost", self.registers_lost.to_string()),
            ("ticks lost or counted twice", self.ticks_miscounted.to_string()),
            ("double owners", self.double_owners.to_string()),
        ];
        for (what, count) in rows {
            table.add_row([what, &count]);
        }
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }
}

/// The file that tries are appended to.
#[derive(Debug)]
pub struct Results(File);

impl Results {
    /// Opens it, and gives what is in it.
    ///
    /// # Errors
    /// If it cannot be read or written, or is of another seed.
    pub fn open(path: &Path, seed: u64) -> anyhow::Result<(Self, Vec<Record>)> {
        let shown = || path.display().to_string();
        let file = File::options().read(true).append(true).create(true).open(path).with_context(shown)?;
        let mut records = Vec::new();
        for (number, line) in (1..).zip(BufReader::new(&file).lines()) {
            let line = line.with_context(shown)?;
            let record = serde_json::from_str::<Record>(&line);
            let record =
                record.with_context(|| format!("line {number} of {} is no result", path.display()))?;
            anyhow::ensure!(
                record.seed == seed,
                "line {number} of {} is of seed {}, not {seed}: give that, or another file",
                path.display(),
                record.seed
            );
            records.push(record);
        }
        Ok((Self(file), records))
    }

    /// Appends a try, in one write.
    ///
    /// # Errors
    /// As the file system.
    pub fn append(&mut self, record: &Record) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        self.0.write_all(&line).context("cannot write the results")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            index: 3,
            seed: 1,
            carrier: Carrier::Socket,
            guest: GuestKind::Thread,
            vcpus: 1,
            kept: false,
            starts: false,
            fault: Fault::Kill,
            whom: Whom::Itself,
            actor: Some(Actor::Successor),
            place: Some(Place::Started),
            after_us: None,
            kills: 1,
            stops: 0,
            outcome: Outcome::RolledBack,
            ran_on: false,
            pause_us: None,
            pages_checked: 2048,
            pages_lost: 0,
            guest_errors: 0,
            registers_lost: 0,
            ticks_miscounted: 0,
            owners: 1,
            took_ms: 9,
            note: None,
        }
    }

    #[test]
    fn results_are_read_as_they_were_appended_and_only_for_their_seed() {
        let path = std::env::temp_dir().join(format!("tideover-campaign-{}", std::process::id()));
        let (mut results, before) = Results::open(&path, 1).unwrap();
        assert!(before.is_empty());
        results.append(&record()).unwrap();
        results.append(&Record { index: 4, ..record() }).unwrap();
        let (_, read) = Results::open(&path, 1).unwrap();
        assert_eq!(read, [record(), Record { index: 4, ..record() }]);
        let error = Results::open(&path, 2).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(error.contains("is of seed 1, not 2"), "{error}");
    }

    #[test]
    fn a_lost_page_two_owners_a_hang_or_a_stranded_machine_is_bad() {
        let bad = [
            Record { pages_lost: 1, ..record() },
            Record { owners: 2, ..record() },
            Record { ticks_miscounted: 1, ..record() },
            Record { outcome: Outcome::Hung, ..record() },
            Record { outcome: Outcome::Stranded, ..record() },
        ];
        assert!(!record().is_bad());
        for record in bad {
            let mut totals = Totals::of_places(1);
            totals.add(&record);
            assert!(record.is_bad() && !totals.is_good(), "{record:?}");
        }
    }

    #[test]
    fn a_place_is_counted_once_and_only_if_a_process_was_struck_there() {
        let mut totals = Totals::of_places(9);
        totals.add(&Record { kills: 0, ..record() });
        assert_eq!(totals.places, 0);
        totals.add(&record());
        totals.add(&record());
        totals.add(&Record { fault: Fault::Stop, ..record() });
        assert_eq!((totals.places, totals.tried, totals.kills), (2, 4, 3));
        assert!(totals.table().contains("2 of 9"), "{}", totals.table());
    }
}
