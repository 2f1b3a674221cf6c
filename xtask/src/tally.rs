//! Counting tests from what cargo's test programs print, and what becomes of each.

use std::collections::BTreeMap;
use std::fmt;

use harness::SkipLine;

use crate::record::Outcome;

/// Begins the line that goes before each test program's own, with its package and its path. Cargo tells of programs on
/// its stderr, where it cannot be told which of them printed what.
pub(crate) const PROGRAM: &str = "xtask-program";

/// How many tests passed, failed and did not run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

impl Tally {
    /// One failure that is no test's, so that no last line says "0 failed" of a run that failed.
    pub(crate) const ONE_FAILURE: Self = Self { passed: 0, failed: 1, skipped: 0 };

    /// Whether something was shown to hold, and nothing not to.
    pub(crate) const fn is_good(&self) -> bool {
        self.passed > 0 && self.failed == 0
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// What the test programs said, read line by line.
#[derive(Debug, Default)]
pub(crate) struct Report {
    passed: usize,
    failed: usize,
    ignored: usize,
    /// As many names as were printed: `-- --quiet` prints none.
    pub(crate) failed_names: Vec<String>,
    /// With the reason that the attribute gives, if it does.
    pub(crate) ignored_names: Vec<String>,
    /// Test programs that ended without their `test result:` line.
    pub(crate) died: usize,
    /// Every program that said which it is, in the order in which they ran.
    pub(crate) programs: Vec<Told>,
    running: Option<Program>,
}

/// What one test program told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) package: String,
    /// The name of its crate.
    pub(crate) program: String,
    /// What became of each test, by its path in the crate.
    pub(crate) outcomes: Vec<(String, Outcome)>,
    /// It ended without its `test result:` line.
    pub(crate) died: bool,
    /// It has said all that it will.
    over: bool,
}

impl Told {
    /// Reads the line that goes before a program's own.
    fn parse(line: &str) -> Option<Self> {
        let (package, path) = line.strip_prefix(PROGRAM)?.trim_start().split_once(' ')?;
        let file = path.rsplit('/').next()?;
        let program = file.rsplit_once('-').map_or(file, |(name, _hash)| name);
        let (package, program) = (package.to_owned(), program.to_owned());
        Some(Self { package, program, outcomes: Vec::new(), died: false, over: false })
    }
}

/// A test program between its `running N tests` and its `test result:`.
#[derive(Debug)]
struct Program {
    announced: usize,
    passed: usize,
    failed: usize,
    ignored: usize,
}

impl Report {
    /// Takes in one line of what `cargo test` prints on stdout.
    pub(crate) fn line(&mut self, line: &str) {
        let line = line.trim_end();
        if let Some(told) = Told::parse(line) {
            self.end_of_program();
            self.programs.push(told);
        } else if let Some(announced) = announced(line) {
            self.end_of_program();
            self.running = Some(Program { announced, passed: 0, failed: 0, ignored: 0 });
        } else if let Some([passed, failed, ignored]) = result(line) {
            self.running = None;
            if let Some(told) = self.programs.last_mut() {
                told.over = true;
            }
            self.passed += passed;
            self.failed += failed;
            self.ignored += ignored;
        } else if let (Some(program), Some((name, outcome))) = (&mut self.running, outcome(line)) {
            let path = name.strip_suffix(" - should panic").unwrap_or(name);
            if let (Some(told), Some(became)) = (self.programs.last_mut(), became(outcome)) {
                // What comes after its result is no test of it: a doc test's.
                if !told.over {
                    told.outcomes.push((path.to_owned(), became));
                }
            }
            if outcome == "ok" {
                program.passed += 1;
            } else if outcome.starts_with("FAILED") {
                program.failed += 1;
                self.failed_names.push(name.to_owned());
            } else if let Some(reason) = outcome.strip_prefix("ignored") {
                program.ignored += 1;
                let reason = reason.strip_prefix(", ").unwrap_or_default();
                let dash = if reason.is_empty() { "" } else { ": " };
                self.ignored_names.push(format!("{name}{dash}{reason}"));
            }
        }
    }

    /// A program that died (a signal, `exit` in a test) prints no result. What it had said of its
    /// tests counts; those that it said nothing of have failed, and if there are none, one has.
    fn end_of_program(&mut self) {
        if let Some(program) = self.running.take() {
            if let Some(told) = self.programs.last_mut().filter(|told| !told.over) {
                (told.died, told.over) = (true, true);
            }
            let said = program.passed + program.failed + program.ignored;
            let lost = program.announced.saturating_sub(said);
            self.died += 1;
            self.passed += program.passed;
            self.failed += program.failed + lost.max(usize::from(program.failed == 0));
            self.ignored += program.ignored;
        }
    }

    /// After the last line: the tally, in which the skipped are taken out of those that passed.
    pub(crate) fn tally(&mut self, skips: &Skips) -> Tally {
        self.end_of_program();
        let skipped = skips.count().min(self.passed);
        Tally { passed: self.passed - skipped, failed: self.failed, skipped: skipped + self.ignored }
    }
}

/// The number in `running N tests`.
fn announced(line: &str) -> Option<usize> {
    let rest = line.strip_prefix("running ")?;
    let count = rest.strip_suffix(" tests").or_else(|| rest.strip_suffix(" test"))?;
    count.parse().ok()
}

/// The numbers of tests that passed, failed and were ignored, of a `test result:` line.
fn result(line: &str) -> Option<[usize; 3]> {
    let rest = line.strip_prefix("test result: ")?;
    let (_, counts) = rest.split_once(". ")?;
    let mut counts = counts.split("; ");
    let mut next = |word: &str| counts.next()?.strip_suffix(word)?.trim_end().parse().ok();
    Some([next("passed")?, next("failed")?, next("ignored")?])
}

/// The name and the outcome in `test NAME ... OUTCOME`.
fn outcome(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("test ")?.rsplit_once(" ... ")
}

/// What a word after ` ... ` says.
fn became(word: &str) -> Option<Outcome> {
    match word {
        "ok" => Some(Outcome::Passed),
        _ if word.starts_with("FAILED") => Some(Outcome::Failed),
        _ if word.starts_with("ignored") => Some(Outcome::Ignored),
        _ => None,
    }
}

/// The tests that were skipped, by the need that is not met and the reason.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Skips {
    by_need: BTreeMap<(String, String), Vec<String>>,
    /// The need that is not met, by package and path of the test, its crate included.
    needs: BTreeMap<(String, String), String>,
}

impl Skips {
    /// Reads the file that the tests' skips were appended to. A test counts once, however often it
    /// wrote.
    ///
    /// # Errors
    ///
    /// The first line that is not a skip: the count would be wrong.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut tests = BTreeMap::new();
        for line in text.lines() {
            let skip = SkipLine::parse(line).ok_or_else(|| format!("{line:?} is not a skip"))?;
            tests.entry((skip.package, skip.test)).or_insert((skip.need, skip.reason));
        }
        let mut skips = Self::default();
        for ((package, test), need) in tests {
            skips.needs.insert((package.clone(), test.clone()), need.0.clone());
            let named = skips.by_need.entry(need).or_default();
            named.push(format!("{package}  {test}"));
        }
        Ok(skips)
    }

    pub(crate) fn count(&self) -> usize {
        self.by_need.values().map(Vec::len).sum()
    }

    /// The need that a test was skipped for.
    pub(crate) fn need(&self, told: &Told, path: &str) -> Option<&str> {
        let test = format!("{}::{path}", told.program);
        self.needs.get(&(told.package.clone(), test)).map(String::as_str)
    }
}

impl fmt::Display for Skips {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ((need, reason), tests) in &self.by_need {
            writeln!(f, "  need {need}: {reason}")?;
            for test in tests {
                writeln!(f, "    {test}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, skips: &Skips) -> (Report, Tally) {
        let mut report = Report::default();
        text.lines().for_each(|line| report.line(line));
        let tally = report.tally(skips);
        (report, tally)
    }

    fn tally(passed: usize, failed: usize, skipped: usize) -> Tally {
        Tally { passed, failed, skipped }
    }

    const TWO_PROGRAMS: &str = "
running 3 tests
test a::b ... ok
test a::c - should panic ... ok
test a::d ... ignored, takes an hour

test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.00s


running 2 tests
test e ... FAILED
test f ... ok

failures:
    e

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s
";

    #[test]
    fn the_results_of_all_programs_are_summed() {
        let (report, tally_read) = read(TWO_PROGRAMS, &Skips::default());
        assert_eq!(tally_read, tally(3, 1, 1));
        assert_eq!(report.failed_names, ["e"]);
        assert_eq!(report.ignored_names, ["a::d: takes an hour"]);
        assert_eq!(report.died, 0);
    }

    #[test]
    fn a_skipped_test_is_taken_out_of_those_that_passed() {
        let skips = Skips::parse("p\ta::b\tkvm\tno\n").unwrap();
        assert_eq!(read(TWO_PROGRAMS, &skips).1, tally(2, 1, 2));
    }

    #[test]
    fn a_test_that_skips_twice_counts_once_and_its_namesake_elsewhere_again() {
        let text = "p\ta::b\tkvm\tno\np\ta::b\tkvm\tno\nq\ta::b\tpagemap\thidden\n";
        let skips = Skips::parse(text).unwrap();
        assert_eq!(skips.count(), 2);
        let told = "  need kvm: no\n    p  a::b\n  need pagemap: hidden\n    q  a::b\n";
        assert_eq!(skips.to_string(), told);
    }

    #[test]
    fn a_line_that_is_no_skip_is_refused() {
        assert!(Skips::parse("p\ta::b\tkvm\tno\nhello\n").unwrap_err().contains("hello"));
        assert_eq!(Skips::parse(""), Ok(Skips::default()));
    }

    #[test]
    fn a_program_that_dies_has_failed_the_tests_it_did_not_report() {
        let text = "running 4 tests\ntest a ... ok\ntest b ... ignored\n";
        let (report, tally_read) = read(text, &Skips::default());
        assert_eq!(tally_read, tally(1, 2, 1));
        assert_eq!(report.died, 1);
    }

    #[test]
    fn a_program_that_dies_after_its_last_test_has_failed_one() {
        let text = "running 1 test\ntest a ... ok\nrunning 0 tests\n\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        assert_eq!(read(text, &Skips::default()).1, tally(1, 1, 0));
    }

    fn told(package: &str, program: &str, died: bool, outcomes: &[(&str, Outcome)]) -> Told {
        let outcomes = outcomes.iter().map(|(path, outcome)| ((*path).to_owned(), outcome.clone())).collect();
        let (package, program) = (package.to_owned(), program.to_owned());
        Told { package, program, outcomes, died, over: true }
    }

    #[test]
    fn what_became_of_a_test_is_known_by_the_program_that_was_announced() {
        let text = TWO_PROGRAMS
            .replacen(
                "running 3",
                &format!("{PROGRAM} tideover-p /t/debug/deps/tideover_p-01ab\nrunning 3"),
                1,
            )
            .replacen("running 2", &format!("{PROGRAM} tideover-p /t/debug/deps/rules-02cd\nrunning 2"), 1);
        let (report, _) = read(&text, &Skips::default());
        let (ok, failed, ignored) = (Outcome::Passed, Outcome::Failed, Outcome::Ignored);
        let first = [("a::b", ok.clone()), ("a::c", ok.clone()), ("a::d", ignored)];
        let expected = [
            told("tideover-p", "tideover_p", false, &first),
            told("tideover-p", "rules", false, &[("e", failed), ("f", ok)]),
        ];
        assert_eq!(report.programs, expected);
        let skips = Skips::parse("tideover-p\trules::f\tkvm\tno\ntideover-q\trules::e\tkvm\tno\n").unwrap();
        assert_eq!(skips.need(&report.programs[1], "f"), Some("kvm"));
        assert_eq!(skips.need(&report.programs[1], "e"), None);
        assert_eq!(skips.need(&report.programs[0], "f"), None);
    }

    #[test]
    fn a_program_that_died_is_not_given_the_tests_of_the_next() {
        let text =
            format!("{PROGRAM} p a-1\nrunning 2 tests\ntest x ... ok\n{PROGRAM} p b-2\n{TWO_PROGRAMS}");
        let (report, _) = read(&text, &Skips::default());
        assert_eq!(report.programs[0], told("p", "a", true, &[("x", Outcome::Passed)]));
        assert_eq!((report.programs.len(), report.died), (2, 1));
        assert_eq!(report.programs[1].outcomes.len(), 3, "the program after is no announced one: doc tests");
    }

    #[test]
    fn what_a_test_prints_is_not_counted() {
        let text = "running into trouble\ntest result: what?\ntest of nothing\nrunning x tests\n";
        let (report, tally_read) = read(text, &Skips::default());
        assert_eq!(tally_read, tally(0, 0, 0));
        assert_eq!(report.died, 0);
    }

    #[test]
    fn a_run_of_nothing_is_not_good() {
        assert!(!tally(0, 0, 3).is_good());
        assert!(!tally(5, 1, 0).is_good());
        assert!(tally(1, 0, 3).is_good());
        assert!(!Tally::ONE_FAILURE.is_good());
    }
}
