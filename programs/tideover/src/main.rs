//! The `tideover` command: replaces the VMM under a running guest, its memory kept in place.
#![forbid(unsafe_code)]

/// Says something on standard error. That nobody can hear it is no reason to fail.
macro_rules! complain {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

mod cli;
mod demo;
mod first_vmm;
mod machines;
mod pages;
mod progress;
mod size;
mod table;
mod time;
mod verbs;
mod vmm;

use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::EnvFilter;

/// There is no machine of the name that was given.
const NO_MACHINE: u8 = 3;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    // Diagnostics go to stderr: stdout is the result's alone.
    let filter = EnvFilter::try_from_env("TIDEOVER_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    let result = match cli.command {
        cli::Command::Demo(arguments) => demo::demo(&arguments),
        cli::Command::Run(arguments) => verbs::run(&arguments),
        cli::Command::Ls(arguments) => verbs::ls(&arguments),
        cli::Command::Status(arguments) => verbs::status(&arguments),
        cli::Command::Update(arguments) => verbs::update(&arguments),
        cli::Command::Pause(arguments) => verbs::pause(&arguments),
        cli::Command::Resume(arguments) => verbs::resume(&arguments),
        cli::Command::Stop(arguments) => verbs::stop(&arguments),
        cli::Command::Completions(arguments) => pages::completions(&arguments),
        cli::Command::Man(arguments) => pages::man(&arguments),
        cli::Command::Vmm(arguments) => vmm::vmm(arguments),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            complain!("tideover: {error:#}");
            match error.is::<machines::NoMachine>() {
                true => ExitCode::from(NO_MACHINE),
                false => ExitCode::FAILURE,
            }
        }
    }
}
