//! The project's own chores: what must hold before a change lands, as commands.
//!
//! `cargo xtask check` is what CI runs first; each of its steps can be run alone. The end-to-end cases come after it.

#![forbid(unsafe_code)]

mod campaign;
mod cargo;
mod catalogue;
mod check;
mod deps;
mod e2e;
mod fuzz;
mod record;
mod requirements;
mod sources;
mod tally;
mod test;
mod tools;
mod tree;
mod words;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The project's own chores.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run what CI runs, in order, up to the first step that fails; the end-to-end cases aside
    Check(check::Options),
    /// Run every unit, integration and doc test, and list those that this machine made us skip
    Test(test::Options),
    /// Hold docs/requirements.md against the tests: those that it names are there, say which requirement they show, and
    /// passed when they last ran
    Requirements(requirements::Options),
    /// Hold the crates to the rings: arrows point inward, `unsafe` only in sys/, no_std in pure/
    Deps,
    /// Run the end-to-end cases, each in an emulated host whose kernel is replaced
    E2e(e2e::Options),
    /// Kill and stop VMMs in the midst of updates, and count what that cost: docs/reliability.md
    Campaign(campaign::Options),
    /// Feed the decoders with inputs that reach ever more of them, by libFuzzer: docs/fuzzing.md
    Fuzz(fuzz::Options),
    /// Look through every file of the tree for what must not be published, and for untidy white
    /// space
    Words,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().verb {
        Verb::Check(options) => check::run(&options),
        Verb::Test(options) => {
            let tally = test::run(&options).unwrap_or_else(|error| {
                println!("error: {error:#}");
                tally::Tally::ONE_FAILURE
            });
            println!("{tally}");
            Ok(tally.is_good())
        }
        Verb::Requirements(options) => requirements::run(&options),
        Verb::Deps => deps::run(),
        Verb::E2e(options) => e2e::run(&options),
        Verb::Campaign(options) => campaign::run(&options),
        Verb::Fuzz(options) => fuzz::run(&options),
        Verb::Words => words::run(),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What a verb answers: whether all is well; what is not has been said by then.
type Verdict = Result<bool>;
