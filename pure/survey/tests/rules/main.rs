//! Each rule, by a state that breaks it and nothing else.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

mod breaks;
mod state;

use std::collections::BTreeSet;

use state::State;
use tideover_survey::RULES;
use tideover_survey::Survey;

/// Names of the rules that are broken.
fn broken(survey: &Survey) -> BTreeSet<&'static str> {
    survey.findings.iter().map(|finding| finding.rule).collect()
}

#[test]
fn a_good_state_breaks_no_rule_but_for_the_holes_that_a_memfd_may_have() {
    let survey = State::new().survey();
    let found: Vec<_> = survey.findings.iter().collect();
    assert_eq!(broken(&survey), BTreeSet::from(["memfd-no-holes"]), "{found:#?}");
    assert_eq!(survey.unread, Vec::<String>::new());
    assert_eq!(survey.unreferenced.bytes, 0, "{:#x?}", survey.unreferenced);
    let files: usize = survey.luo.unwrap().sessions.iter().map(|session| session.files.len()).sum();
    assert_eq!(files, 68);
}

#[test]
fn every_rule_is_broken_by_a_state_that_breaks_no_other() {
    let good = State::new();
    let (mut tried, mut wrong) = (BTreeSet::new(), Vec::new());
    for (rule, how) in breaks::ALL {
        let mut state = good.clone();
        how(&mut state);
        let survey = state.survey();
        let mut found = broken(&survey);
        if *rule != "memfd-no-holes" {
            found.remove("memfd-no-holes");
        }
        if found != BTreeSet::from([*rule]) {
            wrong.push((rule, survey.findings));
        }
        tried.insert(*rule);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let arena: BTreeSet<&str> =
        ["regions", "arena-header", "arena-root-slot", "arena-ownership", "arena-blocks", "machine-identity"]
            .into();
    let all: BTreeSet<&str> = RULES.iter().map(|rule| rule.name).collect();
    assert_eq!(all.len(), RULES.len(), "a rule's name stands twice");
    let untried: Vec<_> = all.difference(&tried).filter(|rule| !arena.contains(*rule)).collect();
    assert!(untried.is_empty(), "{untried:?}");
}

#[test]
fn what_is_not_broken_is_still_shown() {
    let good = State::new().survey();
    for (rule, how) in breaks::ALL {
        let mut state = State::new();
        how(&mut state);
        let survey = state.survey();
        // What breaks the way there leaves nothing to be shown behind it.
        if ["fdt-structure", "fdt-size", "kho-map", "luo-size", "luo-version"].contains(rule) {
            continue;
        }
        assert_eq!(survey.kexec.is_some(), *rule != "kexec-metadata", "{rule}");
        let names = |survey: &Survey| survey.luo.as_ref().map(|luo| luo.sessions.len());
        let sessions = names(&survey).unwrap_or_default();
        let lists = ["kho-subtree", "block-count", "address-in-range", "kho-subtree-twice"];
        assert!(sessions == names(&good).unwrap() || lists.contains(rule), "{rule}: {sessions}");
    }
}
