//! The verb `requirements`: whether what is asked of us is shown by tests, by number.

mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;

use crate::cargo::Workspace;
use crate::catalogue::{self, Catalogue};
use crate::record::{self, Outcome, Record};
use crate::{Verdict, tree};
use table::{Answer, Number, Row, Table};

/// The page with the table.
const PAGE: &str = "docs/requirements.md";

#[derive(Args, Debug, Default)]
pub(crate) struct Options {
    /// Also fails if a requirement is untested
    #[arg(long)]
    complete: bool,
}

/// How many requirements there are of each sort.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    tested: usize,
    not_applicable: usize,
    untested: usize,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tested, not_applicable, untested } = self;
        let all = tested + not_applicable + untested;
        write!(f, "{all} requirements: {tested} tested, {not_applicable} not applicable, {untested} untested")
    }
}

/// What the page, the source and the last runs say together.
#[derive(Debug, Default)]
struct Findings {
    counts: Counts,
    /// Each a line, with its place in front.
    faults: Vec<String>,
    /// Why requirements are untested, with what each asks.
    untested: BTreeMap<String, Vec<String>>,
    /// Some test has no result in this state of the tree.
    has_no_result: bool,
}

/// What became of the tests of one row, the worst first.
enum Shown {
    Fault(String),
    Untested(String),
    Yes,
}

/// What is known of the tests.
struct Known<'a> {
    catalogue: &'a Catalogue,
    record: &'a Record,
    /// The state of the tree.
    tree: &'a str,
}

impl Known<'_> {
    fn shown(&self, test: &str) -> Shown {
        match self.catalogue.get(test).map(Vec::as_slice) {
            None => return Shown::Fault(format!("there is no test {test}")),
            Some([_]) => {}
            Some(_) => return Shown::Fault(format!("two tests are called {test}")),
        }
        let now = self.record.tests.get(test).filter(|ran| ran.tree == self.tree);
        match now.map(|ran| &ran.outcome) {
            None => Shown::Untested(NO_RESULT.to_owned()),
            Some(Outcome::Passed) => Shown::Yes,
            Some(Outcome::Skipped(need)) => {
                Shown::Untested(format!("its tests need {need}, which this machine lacks"))
            }
            Some(Outcome::Ignored) => Shown::Untested("its tests are ignored".to_owned()),
            Some(Outcome::Failed) => Shown::Fault(format!("{test} failed")),
            Some(Outcome::Died) => Shown::Fault(format!("{test}: its program died")),
        }
    }
}

const NO_RESULT: &str = "its tests have not run since the tree changed";

impl Findings {
    fn fault(&mut self, line: usize, what: impl fmt::Display) {
        self.faults.push(format!("{PAGE}:{line}: {what}"));
    }

    fn row(&mut self, row: &Row, known: &Known<'_>) {
        let number = row.number;
        let mut why = match (row.answer, row.tests.is_empty()) {
            (Answer::NotApplicable, _) => {
                self.counts.not_applicable += 1;
                return;
            }
            (Answer::NotYet, _) => Some("it is not done yet".to_owned()),
            (_, true) => Some("no test is named".to_owned()),
            (_, false) => None,
        };
        for test in &row.tests {
            match known.shown(test) {
                Shown::Yes => {}
                Shown::Untested(because) => {
                    self.has_no_result |= because == NO_RESULT;
                    why = why.or(Some(because));
                }
                Shown::Fault(what) => {
                    self.fault(row.line, format_args!("{number}: {what}"));
                    why = Some("a test of it is amiss".to_owned());
                }
            }
        }
        match why {
            None => self.counts.tested += 1,
            Some(why) => {
                self.counts.untested += 1;
                self.untested.entry(why).or_default().push(format!(
                    "{:<8} {}",
                    number.to_string(),
                    row.asked
                ));
            }
        }
    }

    /// Holds the doc comments of the tests against the table, both ways.
    fn docs(&mut self, table: &Table, catalogue: &Catalogue) {
        for row in &table.rows {
            for test in &row.tests {
                let Some([written]) = catalogue.get(test).map(Vec::as_slice) else { continue };
                if !numbers(&written.docs).contains(&row.number) {
                    let (file, line, number) = (written.file.display(), written.line, row.number);
                    self.faults
                        .push(format!("{file}:{line}: the doc comment of {test} does not say {number}"));
                }
            }
        }
        for (name, written) in catalogue {
            for test in written {
                for number in numbers(&test.docs) {
                    if table.row(number).is_some_and(|row| !row.tests.contains(name)) {
                        let (file, line) = (test.file.display(), test.line);
                        self.faults.push(format!("{file}:{line}: {number} does not name {name} in {PAGE}"));
                    }
                }
            }
        }
    }

    /// Looks for numbers that the table does not have in the comments of a file.
    fn comments(&mut self, table: &Table, file: &Path, text: &str) {
        for (at, line) in (1..).zip(text.lines()).filter(|(_, line)| line.trim_start().starts_with("//")) {
            for number in Number::all_in(line).filter(|number| table.row(*number).is_none()) {
                self.faults.push(format!("{}:{at}: {number} is not in {PAGE}", file.display()));
            }
        }
    }
}

fn numbers(docs: &[String]) -> BTreeSet<Number> {
    docs.iter().flat_map(|line| Number::all_in(line)).collect()
}

fn look(workspace: &Workspace) -> Result<Findings> {
    let root = &workspace.root;
    let page = std::fs::read_to_string(root.join(PAGE)).with_context(|| format!("{PAGE} cannot be read"))?;
    let table = Table::parse(&page);
    let catalogue = catalogue::read(workspace)?;
    let (record, tree) = (Record::read(workspace), record::state(workspace)?);
    let known = Known { catalogue: &catalogue, record: &record, tree: &tree };
    let mut findings = Findings::default();
    for fault in &table.faults {
        findings.fault(fault.line, &fault.what);
    }
    if table.rows.is_empty() {
        findings.faults.push(format!("{PAGE}: there is no requirement in it"));
    }
    for row in &table.rows {
        for place in row.places.iter().filter(|place| !root.join(place).exists()) {
            findings.fault(row.line, format_args!("{}: there is no {place}", row.number));
        }
        findings.row(row, &known);
    }
    findings.docs(&table, &catalogue);
    let is_rust = |file: &&std::path::PathBuf| file.extension().is_some_and(|extension| extension == "rs");
    for file in tree::files(root)?.iter().filter(is_rust) {
        findings.comments(&table, file, &tree::text(root, file)?.unwrap_or_default());
    }
    Ok(findings)
}

/// The verb `requirements`.
pub(crate) fn run(options: &Options) -> Verdict {
    let findings = look(&Workspace::read()?)?;
    for (why, rows) in &findings.untested {
        println!("UNTESTED, as {why} ({}):", rows.len());
        for row in rows {
            println!("    {row}");
        }
    }
    if findings.has_no_result {
        println!(
            "Of some tests no result is known in this state of the tree; to have them all: cargo xtask test"
        );
    }
    if !findings.faults.is_empty() {
        println!("WRONG ({}):", findings.faults.len());
        for fault in &findings.faults {
            println!("    {fault}");
        }
    }
    println!("{}", findings.counts);
    Ok(findings.faults.is_empty() && (findings.counts.untested == 0 || !options.complete))
}

#[cfg(test)]
mod tests;
