//! The verb `test`: cargo's tests, with what was skipped told apart from what passed.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use harness::Need;

use crate::cargo::{self, Workspace};
use crate::catalogue;
use crate::record::{self, Outcome, Ran, Record, Run};
use crate::tally::{PROGRAM, Report, Skips, Tally};

/// What starts each test program, for the setting `runner`. It says which one it is. And it ends one that waits for
/// what never comes: that would otherwise hold up all the others, and nobody would learn which it was. The longest
/// takes a tenth of this.
fn runner() -> String {
    let script =
        format!(r#"echo "{PROGRAM} $CARGO_PKG_NAME $0"; exec timeout --kill-after=10 600 "$0" "$@""#);
    format!(r#"target."cfg(all())".runner = ["sh", "-c", '{script}']"#)
}

#[derive(Args, Debug, Default)]
pub(crate) struct Options {
    /// Needs that this machine must meet, with commas between, or `all`: a test that lacks one
    /// fails instead of being skipped
    #[arg(long, value_name = "NEEDS", value_parser = needs)]
    pub(crate) require: Option<String>,
    /// What else to hand to `cargo test`, as a filter, `-p CRATE`, or `-- --test-threads=1`; with a
    /// package named, only that is tested
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    pub(crate) arguments: Vec<OsString>,
}

/// Checks a list of needs; the test programs read it again for themselves.
pub(crate) fn needs(text: &str) -> Result<String, harness::Unnamed> {
    Need::list(text).map(|_| text.to_owned())
}

/// The verb `test`, but for its last line: the tally is the caller's to print.
pub(crate) fn run(options: &Options) -> Result<Tally> {
    let workspace = Workspace::read()?;
    let folder = &workspace.target_directory;
    std::fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    let file = folder.join(format!("xtask-skips-{}", std::process::id()));
    std::fs::write(&file, "").with_context(|| format!("{} cannot be made", file.display()))?;
    let before = record::state(&workspace)?;
    let ran = cargo_test(options, &file);
    let skips = std::fs::read_to_string(&file);
    let _ = std::fs::remove_file(&file);

    let (status, mut report) = ran?;
    let skips = skips.with_context(|| format!("{} cannot be read", file.display()))?;
    let skips = Skips::parse(&skips)
        .map_err(|error| anyhow!(error))
        .with_context(|| format!("{}, to which the tests append", file.display()))?;
    let mut tally = report.tally(&skips);
    if !report.programs.is_empty() {
        let mut record = Record::read(&workspace);
        record.take_in(results(&workspace, &report, &skips, &before), options.arguments.is_empty());
        record.write(&workspace)?;
    }
    tell(&report, &skips);
    if !status.success() && tally.failed == 0 {
        println!("cargo test failed ({status}) though no test did; this counts as one failure");
        tally.failed = 1;
    }
    if tally.passed + tally.failed == 0 {
        println!("no test ran; a run that shows nothing is no success");
    }
    Ok(tally)
}

/// What a run in this state of the tree leaves in the record.
fn results(workspace: &Workspace, report: &Report, skips: &Skips, tree: &str) -> Run {
    let mut run = Run::default();
    for told in &report.programs {
        let Some(package) = workspace.packages.iter().find(|package| package.name == told.package) else {
            continue;
        };
        let program = format!("{} {}", told.package, told.program);
        if told.died {
            run.died.push(program.clone());
        }
        for (path, outcome) in &told.outcomes {
            let skipped = skips.need(told, path).filter(|_| *outcome == Outcome::Passed);
            let outcome = skipped.map_or_else(|| outcome.clone(), |need| Outcome::Skipped(need.to_owned()));
            let (program, tree) = (program.clone(), tree.to_owned());
            let name = catalogue::name(package, &told.program, path);
            run.tests.insert(name, Ran { program, tree, outcome });
        }
    }
    run
}

fn cargo_test(options: &Options, skips: &Path) -> Result<(ExitStatus, Report)> {
    let mut command = cargo::command();
    command.args(["test", "--no-fail-fast", "--config", &runner()]);
    if !names_a_package(&options.arguments) {
        command.arg("--workspace");
    }
    command.args(&options.arguments);
    command.env("TIDEOVER_SKIPS", skips).stdin(Stdio::null()).stdout(Stdio::piped());
    if let Some(needs) = &options.require {
        command.env("TIDEOVER_REQUIRE", needs);
    }
    let mut child = command.spawn().context("cargo test cannot be run")?;
    let stdout = child.stdout.take().context("cargo test has no stdout")?;
    let report = read(BufReader::new(stdout), &mut io::stdout())?;
    let status = child.wait().context("cargo test cannot be waited for")?;
    Ok((status, report))
}

/// Whether cargo's own arguments, which end at `--`, choose packages.
fn names_a_package(arguments: &[OsString]) -> bool {
    let own = arguments.iter().take_while(|argument| *argument != "--");
    own.map(|argument| argument.to_string_lossy()).any(|argument| {
        argument.starts_with("-p")
            || argument == "--package"
            || argument.starts_with("--package=")
            || argument.starts_with("--manifest-path")
    })
}

/// Passes each line on as it comes, and takes it in. Those that our own [`runner`] prints are for us alone.
fn read(mut lines: impl BufRead, out: &mut impl Write) -> Result<Report> {
    let mut report = Report::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = lines.read_until(b'\n', &mut line).context("what cargo test prints cannot be read")?;
        if length == 0 {
            return Ok(report);
        }
        if !line.starts_with(PROGRAM.as_bytes()) {
            // Whoever reads us may have gone; the tests go on.
            let _ = out.write_all(&line).and_then(|()| out.flush());
        }
        report.line(&String::from_utf8_lossy(&line));
    }
}

fn tell(report: &Report, skips: &Skips) {
    println!();
    if skips.count() > 0 {
        println!("SKIPPED, as this machine lacks what they need ({}):", skips.count());
        print!("{skips}");
        println!("  (--require NEEDS makes these fail, on a machine that must have it)");
    }
    if !report.ignored_names.is_empty() {
        println!("SKIPPED, as their #[ignore] says ({}):", report.ignored_names.len());
        for name in &report.ignored_names {
            println!("    {name}");
        }
    }
    if report.died > 0 {
        println!("DIED before telling their results: test programs ({})", report.died);
    }
    if !report.failed_names.is_empty() {
        println!("FAILED:");
        for name in &report.failed_names {
            println!("    {name}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn a_package_is_looked_for_among_cargos_own_arguments() {
        for line in ["-p x", "-px", "freeze --package x", "--package=x"] {
            assert!(names_a_package(&arguments(line)), "{line}");
        }
        for line in ["", "freeze", "--lib -- -p", "-- --package"] {
            assert!(!names_a_package(&arguments(line)), "{line}");
        }
    }

    #[test]
    fn a_line_that_is_not_utf8_does_not_end_the_reading() {
        let text = b"\xff\xfe\nrunning 1 test\ntest a ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let mut passed_on = Vec::new();
        let mut report = read(&text[..], &mut passed_on).unwrap();
        assert_eq!(passed_on, text);
        assert_eq!(report.tally(&Skips::default()).passed, 1);
    }

    #[test]
    fn a_misspelt_requirement_is_refused_before_anything_runs() {
        assert!(needs("kvm,usrfaultfd").is_err());
        assert_eq!(needs("kvm,pagemap").as_deref(), Ok("kvm,pagemap"));
    }
}
