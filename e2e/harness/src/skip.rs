//! What becomes of a test whose need is not met.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

use crate::Need;
use crate::machine::Met;

/// One skip, as `TIDEOVER_SKIPS` gets it: a line of four fields with tabs between.
///
/// A test that is skipped more than once in a run (a property test may try many times) writes as
/// many equal lines: count a `package` and `test` once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkipLine {
    /// The package that the test belongs to.
    pub package: String,
    /// The path of the test function, its crate included.
    pub test: String,
    /// The name of the need that is not met. Text and not a [`Need`], so that a reader knows of
    /// needs newer than itself.
    pub need: String,
    /// Why it is not met.
    pub reason: String,
}

impl SkipLine {
    /// Reads a line, without the newline at its end.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split('\t').map(str::to_owned);
        let parsed = Self {
            package: fields.next()?,
            test: fields.next()?,
            need: fields.next()?,
            reason: fields.next()?,
        };
        fields.next().is_none().then_some(parsed)
    }

    /// Appends the line to a file in one write, so that test programs which run at the same time do
    /// not mix theirs.
    fn append_to(&self, path: &Path) -> io::Result<()> {
        let line = format!("{self}\n");
        let mut file = OpenOptions::new().append(true).create(true).open(path)?;
        if file.write(line.as_bytes())? != line.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }
}

impl fmt::Display for SkipLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = self.reason.replace(['\t', '\n', '\r'], " ");
        write!(f, "{}\t{}\t{}\t{reason}", self.package, self.test, self.need)
    }
}

/// A variable names something that is not a need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unnamed {
    /// The word found there.
    pub word: String,
}

impl fmt::Display for Unnamed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Need::ALL.map(Need::name).join(", ");
        write!(f, "{:?} is not a need; there are {known}, and all", self.word)
    }
}

impl std::error::Error for Unnamed {}

impl Need {
    /// Reads needs with commas between, as `TIDEOVER_REQUIRE` gives them. `all` stands for every
    /// need, and nothing for none.
    ///
    /// # Errors
    ///
    /// [`Unnamed`] for the first word that is not the name of a need.
    pub fn list(text: &str) -> Result<Vec<Self>, Unnamed> {
        let mut needs = Vec::new();
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            if word == "all" {
                needs.extend(Self::ALL);
            } else {
                needs.push(Self::named(word).ok_or_else(|| Unnamed { word: word.to_owned() })?);
            }
        }
        Ok(needs)
    }
}

fn listed(variable: &str, need: Need) -> bool {
    let Some(text) = std::env::var_os(variable) else {
        return false;
    };
    match Need::list(&text.to_string_lossy()) {
        Ok(needs) => needs.contains(&need),
        Err(error) => panic!("{variable}: {error}"),
    }
}

/// What the test has while it goes on; if it may not, the skip is told and recorded. `here` is the path of
/// a function within the test.
#[doc(hidden)]
#[must_use]
pub fn go_on(need: Need, package: &str, here: &str) -> Option<Met> {
    let met = if listed("TIDEOVER_WITHOUT", need) {
        Err("TIDEOVER_WITHOUT takes it as not met".to_owned())
    } else {
        need.meet()
    };
    let reason = match met {
        Ok(met) => return Some(met),
        Err(reason) => reason,
    };

    let line = SkipLine {
        package: package.to_owned(),
        test: here.strip_suffix("::here").unwrap_or(here).to_owned(),
        need: need.name().to_owned(),
        reason,
    };
    assert!(
        !listed("TIDEOVER_REQUIRE", need),
        "{} needs {need}, which TIDEOVER_REQUIRE wants of this machine: {}",
        line.test,
        line.reason
    );

    // Not `eprintln!`: the test runner keeps that to itself when the test passes.
    let told = format!("SKIPPED {}: needs {need}: {}\n", line.test, line.reason);
    let _ = io::stderr().write_all(told.as_bytes());
    if let Some(path) = std::env::var_os("TIDEOVER_SKIPS") {
        let path = Path::new(&path);
        if let Err(error) = line.append_to(path) {
            panic!("the skip of {} cannot be recorded in {}: {error}", line.test, path.display());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_back_as_it_was_written() {
        let line = SkipLine {
            package: "tideover-uffd".to_owned(),
            test: "live::a_fault_is_held".to_owned(),
            need: "userfaultfd".to_owned(),
            reason: "the door is shut".to_owned(),
        };
        assert_eq!(SkipLine::parse(&line.to_string()), Some(line));
    }

    #[test]
    fn a_reason_of_many_lines_becomes_one() {
        let line = SkipLine {
            package: "p".to_owned(),
            test: "t".to_owned(),
            need: "kvm".to_owned(),
            reason: "a\tb\nc".to_owned(),
        };
        assert_eq!(line.to_string(), "p\tt\tkvm\ta b c");
    }

    #[test]
    fn a_line_of_three_or_five_fields_is_none() {
        assert_eq!(SkipLine::parse("p\tt\tkvm"), None);
        assert_eq!(SkipLine::parse("p\tt\tkvm\tr\tx"), None);
    }

    #[test]
    fn a_list_has_commas_and_may_say_all() {
        assert_eq!(Need::list(""), Ok(vec![]));
        assert_eq!(Need::list("kvm, pagemap,"), Ok(vec![Need::Kvm, Need::Pagemap]));
        assert_eq!(Need::list("all"), Ok(Need::ALL.to_vec()));
    }

    #[test]
    fn a_misspelt_need_is_an_error_that_names_the_others() {
        let error = Need::list("kvm,usrfaultfd").unwrap_err();
        assert_eq!(error.word, "usrfaultfd");
        assert!(error.to_string().contains("userfaultfd"), "{error}");
    }
}
