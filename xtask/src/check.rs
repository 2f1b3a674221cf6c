//! The verb `check`: what CI runs, step by step, the end-to-end cases aside.

use std::ffi::OsStr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::tally::Tally;
use crate::{Verdict, cargo, deps, requirements, test, tools, words};

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Leaves a step out; may be given more than once
    #[arg(long, value_name = "STEP")]
    skip: Vec<Step>,
    /// Needs that this machine must meet, with commas between, or `all`; see `test --help`
    #[arg(long, value_name = "NEEDS", value_parser = test::needs)]
    require: Option<String>,
    /// Also asks the advisory database, in the step `deny`: it is fetched from github.com
    #[arg(long)]
    advisories: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Step {
    /// The code is formatted
    Fmt,
    /// No lint of the workspace objects
    Clippy,
    /// The crates keep to their rings
    Deps,
    /// Nothing is in the tree that must not be published
    Words,
    /// Unit, integration and doc tests
    Test,
    /// The table of requirements names tests that are there and passed
    Requirements,
    /// The documentation builds, and every link in it leads somewhere
    Docs,
    /// Licences, sources and bans of what we depend on
    Deny,
}

impl Step {
    const fn name(self) -> &'static str {
        match self {
            Self::Fmt => "fmt",
            Self::Clippy => "clippy",
            Self::Deps => "deps",
            Self::Words => "words",
            Self::Test => "test",
            Self::Requirements => "requirements",
            Self::Docs => "docs",
            Self::Deny => "deny",
        }
    }

    /// The commands of the step, as one would type them.
    fn commands(self, options: &Options) -> Vec<String> {
        let lines: &[&str] = match self {
            Self::Fmt => &["cargo fmt --all --check"],
            Self::Clippy => &["cargo clippy --workspace --all-targets -- -D warnings"],
            Self::Deps => &["cargo xtask deps"],
            Self::Words => &["cargo xtask words"],
            Self::Test => &["cargo xtask test"],
            Self::Requirements => &["cargo xtask requirements"],
            // What readers of the source see, and then, to stay in target/doc, what users see: a
            // link from public to private is an error in the second only.
            Self::Docs => &[
                "RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --no-deps --document-private-items",
                "RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --no-deps",
            ],
            Self::Deny => &["cargo deny check --hide-inclusion-graph bans licenses sources"],
        };
        let mut lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        match (self, &options.require) {
            (Self::Test, Some(needs)) => lines[0].push_str(&format!(" --require {needs}")),
            (Self::Deny, _) if options.advisories => lines[0].push_str(" advisories"),
            _ => {}
        }
        lines
    }

    /// Runs the step. What is wrong has been said by the time it answers.
    fn run(self, options: &Options) -> Result<Outcome> {
        let good = match self {
            Self::Deps => deps::run()?,
            Self::Words => words::run()?,
            Self::Test => {
                let require = options.require.clone();
                return test::run(&test::Options { require, arguments: Vec::new() }).map(Outcome::Tests);
            }
            Self::Requirements => requirements::run(&requirements::Options::default())?,
            Self::Deny => tools::with_cargo_deny(|path| all(&self.commands(options), path))?,
            _ => all(&self.commands(options), None)?,
        };
        Ok(Outcome::Step { good })
    }
}

enum Outcome {
    Step { good: bool },
    Tests(Tally),
}

/// Runs lines of the form `VARIABLE=value cargo argument...`, up to the first that fails. There are
/// no quotes in them. `path` is where to look for programs, if not in the usual places.
fn all(lines: &[String], path: Option<&OsStr>) -> Verdict {
    for line in lines {
        let mut words = line.split(' ').peekable();
        let mut command = cargo::command();
        if let Some(path) = path {
            command.env("PATH", path);
        }
        while let Some((name, value)) = words.peek().and_then(|word| word.split_once('=')) {
            command.env(name, value);
            words.next();
        }
        command.args(words.skip(1)).stdin(Stdio::null());
        let status = command.status().with_context(|| format!("{line} cannot be run"))?;
        if !status.success() {
            println!("{line}: {status}");
            return Ok(false);
        }
    }
    Ok(true)
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// The verb `check`. Its last line counts tests; a step that is no test and fails is one more
/// failure.
pub(crate) fn run(options: &Options) -> Verdict {
    let mut tests = Tally::default();
    let mut ran = Vec::new();
    let mut failed = None;
    for step in Step::value_variants() {
        if options.skip.contains(step) {
            println!("==== {}: left out, as asked", step.name());
            continue;
        }
        println!("==== {}: {}", step.name(), step.commands(options).join("; "));
        let start = Instant::now();
        let good = match step.run(options) {
            Ok(Outcome::Tests(tally)) => {
                let good = tally.is_good();
                tests = tally;
                good
            }
            Ok(Outcome::Step { good }) => good,
            Err(error) => {
                println!("{error:#}");
                false
            }
        };
        ran.push((*step, start.elapsed()));
        if !good {
            failed = Some(*step);
            break;
        }
    }

    println!();
    for (step, time) in &ran {
        let word = if failed == Some(*step) { "FAILED" } else { "passed" };
        println!("{word}  {:<12} {:>8}", step.name(), seconds(*time));
    }
    if let Some(step) = failed {
        let after = Step::value_variants().iter().skip_while(|other| **other != step).skip(1);
        let left: Vec<_> = after.filter(|step| !options.skip.contains(step)).collect();
        if !left.is_empty() {
            let names: Vec<_> = left.iter().map(|step| step.name()).collect();
            println!("not run: {}", names.join(", "));
        }
        println!("\nThe step `{}` failed. To run it alone:", step.name());
        for line in step.commands(options) {
            println!("    {line}");
        }
        if tests.failed == 0 {
            tests.failed = Tally::ONE_FAILURE.failed;
        }
    }
    println!("{tests}");
    Ok(failed.is_none())
}
