use super::*;
use crate::catalogue::Test;
use crate::record::Ran;

fn catalogue(tests: &[(&str, &str)]) -> Catalogue {
    let test = |docs: &str| {
        let docs = docs.lines().map(str::to_owned).collect();
        vec![Test { file: "a.rs".into(), line: 7, docs }]
    };
    tests.iter().map(|(name, docs)| ((*name).to_owned(), test(docs))).collect()
}

fn record(outcomes: &[(&str, &str, Outcome)]) -> Record {
    let mut record = Record::default();
    for (name, tree, outcome) in outcomes {
        let ran = Ran { program: "p x".to_owned(), tree: (*tree).to_owned(), outcome: outcome.clone() };
        record.tests.insert((*name).to_owned(), ran);
    }
    record
}

/// What is found of the one row of `page`, in a tree whose state is `now`.
fn findings(page: &str, catalogue: &Catalogue, record: &Record) -> Findings {
    let table = Table::parse(page);
    assert_eq!(table.faults, []);
    let mut findings = Findings::default();
    let known = Known { catalogue, record, tree: "now" };
    table.rows.iter().for_each(|row| findings.row(row, &known));
    findings.docs(&table, catalogue);
    findings
}

const TWO: &str = "| R1.1 | a | as the series | `a` | `p::t`<br>`p::u` |";

fn two() -> Catalogue {
    catalogue(&[("p::t", "R1.1."), ("p::u", "What it is.\n\nR1.1.")])
}

#[test]
fn a_requirement_is_tested_if_all_its_tests_passed_in_this_tree() {
    let passed = |tree| record(&[("p::t", "now", Outcome::Passed), ("p::u", tree, Outcome::Passed)]);
    let found = findings(TWO, &two(), &passed("now"));
    assert_eq!((found.counts.tested, found.faults.len(), found.has_no_result), (1, 0, false));
    assert_eq!(found.counts.to_string(), "1 requirements: 1 tested, 0 not applicable, 0 untested");
    for record in [passed("before"), Record::default()] {
        let found = findings(TWO, &two(), &record);
        assert_eq!((found.counts.untested, found.faults.len(), found.has_no_result), (1, 0, true));
    }
}

#[test]
fn a_test_that_was_skipped_shows_nothing_and_is_no_fault() {
    let skipped = Outcome::Skipped("kvm".to_owned());
    for outcome in [skipped, Outcome::Ignored] {
        let record = record(&[("p::t", "now", Outcome::Passed), ("p::u", "now", outcome)]);
        let found = findings(TWO, &two(), &record);
        assert_eq!((found.counts.untested, found.faults.len(), found.has_no_result), (1, 0, false));
    }
}

#[test]
fn a_test_that_failed_or_is_not_there_is_a_fault() {
    for outcome in [Outcome::Failed, Outcome::Died] {
        let record = record(&[("p::t", "now", Outcome::Passed), ("p::u", "now", outcome)]);
        let found = findings(TWO, &two(), &record);
        assert_eq!((found.counts.untested, found.faults.len()), (1, 1));
        assert!(found.faults[0].contains("docs/requirements.md:1: R1.1: p::u"), "{:?}", found.faults);
    }
    let passed = record(&[("p::t", "now", Outcome::Passed), ("p::u", "now", Outcome::Passed)]);
    let found = findings(TWO, &catalogue(&[("p::t", "R1.1.")]), &passed);
    assert!(found.faults[0].contains("no test p::u"), "{:?}", found.faults);
}

#[test]
fn a_row_without_tests_is_untested_or_not_applicable() {
    let page = "| R1.1 | a | as the series | `a` | untested |\n| R1.2 | b | not yet: c | – | untested |\n\
        | R1.3 | d | not applicable: e | – | – |\n";
    let found = findings(page, &Catalogue::new(), &Record::default());
    assert_eq!(found.counts, Counts { tested: 0, not_applicable: 1, untested: 2 });
    assert_eq!((found.untested.len(), found.faults.len(), found.has_no_result), (2, 0, false));
}

#[test]
fn table_and_doc_comments_name_each_other() {
    let passed = record(&[("p::t", "now", Outcome::Passed), ("p::u", "now", Outcome::Passed)]);
    let found = findings(TWO, &catalogue(&[("p::t", "R1.1."), ("p::u", "As R1.11 says.")]), &passed);
    assert_eq!(found.faults, ["a.rs:7: the doc comment of p::u does not say R1.1"]);
    let more = catalogue(&[("p::t", "R1.1."), ("p::u", "R1.1."), ("p::v", "R1.1.")]);
    let found = findings(TWO, &more, &passed);
    assert_eq!(found.faults, ["a.rs:7: R1.1 does not name p::v in docs/requirements.md"]);
}

#[test]
fn a_number_in_a_comment_is_in_the_table() {
    let table = Table::parse(TWO);
    let mut found = Findings::default();
    found.comments(&table, Path::new("b.rs"), "//! R1.1, R1.2.\nlet text = \"R1.3\"; // R1.4\n    // O1.1\n");
    let expected = ["b.rs:1: R1.2", "b.rs:3: O1.1"].map(|fault| format!("{fault} is not in {PAGE}"));
    assert_eq!(found.faults, expected);
}
