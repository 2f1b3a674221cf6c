//! What became of each test when it last ran, kept in the target folder from run to run.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::cargo::Workspace;
use crate::tree;

/// What became of a test.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    Passed,
    Failed,
    /// This machine lacks this need.
    Skipped(String),
    /// Its attribute says so.
    Ignored,
    /// Its program ended before it told what became of it.
    Died,
}

/// A test that ran.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct Ran {
    /// The file name of its program, without the hash, behind its package's.
    pub(crate) program: String,
    /// The [`state`] of the tree when the run began.
    pub(crate) tree: String,
    pub(crate) outcome: Outcome,
}

/// The last run of every test, by [name](crate::catalogue::name).
///
/// A run of some tests leaves what is known of the others, each with the state of the tree that it ran in. So what
/// ran before a change tells nothing of the tree after it, and is there again if the change is undone.
#[derive(Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct Record {
    pub(crate) tests: BTreeMap<String, Ran>,
}

/// The results of one run.
#[derive(Debug, Default)]
pub(crate) struct Run {
    pub(crate) tests: BTreeMap<String, Ran>,
    /// Programs that died.
    pub(crate) died: Vec<String>,
}

impl Record {
    fn path(workspace: &Workspace) -> PathBuf {
        workspace.target_directory.join("xtask-tests.json")
    }

    /// The record of earlier runs; one that is not there, or that another version wrote, is empty.
    pub(crate) fn read(workspace: &Workspace) -> Self {
        let text = std::fs::read(Self::path(workspace)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Puts a run into the record. One that was of `all` tests leaves nothing of what was there before.
    pub(crate) fn take_in(&mut self, run: Run, all: bool) {
        if all {
            self.tests.clear();
        }
        for ran in self.tests.values_mut().filter(|ran| run.died.contains(&ran.program)) {
            ran.outcome = Outcome::Died;
        }
        self.tests.extend(run.tests);
    }

    pub(crate) fn write(&self, workspace: &Workspace) -> Result<()> {
        let path = Self::path(workspace);
        let new = path.with_extension(format!("json-{}", std::process::id()));
        let text = serde_json::to_vec_pretty(self).context("the record of the tests cannot be told")?;
        let written = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path));
        written.with_context(|| format!("{} cannot be written", path.display()))
    }
}

/// A number for what is in the tree, prose apart: no test depends on that. It is the same wherever and whenever the same
/// compiler built us.
pub(crate) fn state(workspace: &Workspace) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    let is_prose = |file: &Path| file.extension().is_some_and(|extension| extension == "md");
    for file in tree::files(&workspace.root)?.into_iter().filter(|file| !is_prose(file)) {
        let bytes = std::fs::read(workspace.root.join(&file));
        bytes.with_context(|| format!("{} cannot be read", file.display()))?.hash(&mut hasher);
        file.hash(&mut hasher);
    }
    Ok(format!("{:016x}", hasher.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(program: &str, tree: &str, outcome: Outcome) -> Ran {
        Ran { program: program.to_owned(), tree: tree.to_owned(), outcome }
    }

    fn run(tests: &[(&str, Ran)], died: &[&str]) -> Run {
        let tests = tests.iter().map(|(name, ran)| ((*name).to_owned(), ran.clone())).collect();
        Run { tests, died: died.iter().map(|program| (*program).to_owned()).collect() }
    }

    #[test]
    fn a_run_of_some_tests_leaves_the_others_with_the_tree_that_they_ran_in() {
        let mut record = Record::default();
        let old = ran("p x", "1", Outcome::Passed);
        record.take_in(run(&[("a", old.clone()), ("b", old.clone())], &[]), true);
        let new = ran("p x", "2", Outcome::Failed);
        record.take_in(run(&[("b", new.clone())], &[]), false);
        assert_eq!(record.tests["a"], old);
        assert_eq!(record.tests["b"], new);
        record.take_in(run(&[("b", old.clone())], &[]), true);
        assert_eq!(record.tests.keys().collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn of_a_program_that_died_nothing_passed_but_what_it_told() {
        let mut record = Record::default();
        let passed = |program| ran(program, "1", Outcome::Passed);
        record.take_in(run(&[("a", passed("p x")), ("b", passed("p x")), ("c", passed("p y"))], &[]), true);
        record.take_in(run(&[("b", passed("p x"))], &["p x"]), false);
        let outcomes: Vec<_> = record.tests.values().map(|ran| ran.outcome.clone()).collect();
        assert_eq!(outcomes, [Outcome::Died, Outcome::Passed, Outcome::Passed]);
    }

    #[test]
    fn a_record_is_read_back_as_it_was_written() {
        let mut record = Record::default();
        let outcomes = [
            Outcome::Passed,
            Outcome::Failed,
            Outcome::Skipped("kvm".to_owned()),
            Outcome::Ignored,
            Outcome::Died,
        ];
        for (number, outcome) in outcomes.into_iter().enumerate() {
            record.tests.insert(format!("t{number}"), ran("p x", "1", outcome));
        }
        let text = serde_json::to_vec(&record).unwrap();
        assert_eq!(serde_json::from_slice::<Record>(&text).unwrap(), record);
    }
}
