//! The `tideover` command: replaces the VMM under a running guest, its memory kept in place.
#![forbid(unsafe_code)]

/// Says something on standard error. That nobody can hear it is no reason to fail.
macro_rules! complain {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

mod check;
mod cli;
mod console;
mod demo;
mod dump;
mod first_vmm;
mod inspect;
mod keeper;
mod kexec;
mod leavers;
mod orderly;
mod page;
mod pages;
mod places;
mod progress;
mod recover;
mod report;
mod resume;
mod service;
mod setup;
mod size;
mod table;
mod time;
mod top;
mod verbs;
mod vmm;
mod waterfall;

use std::process::ExitCode;

use ::vmm::machines;
use clap::Parser as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// There is no machine of the name that was given.
const NO_MACHINE: u8 = 3;

/// Diagnostics go to stderr: stdout is the result's alone.
fn log() {
    let asked = std::env::var("TIDEOVER_LOG").ok().and_then(|asked| asked.parse::<Targets>().ok());
    let filter = asked.unwrap_or_else(|| Targets::new().with_default(tracing::Level::WARN));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    tracing_subscriber::registry().with(lines).with(filter).init();
}

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1).peekable();
    if words.peek().is_some_and(|verb| verb == "vmm") {
        let arguments = cli::Vmm::parse_from(words);
        log();
        return end(vmm::vmm(arguments));
    }
    let cli = cli::Cli::parse();
    log();
    end(match cli.command {
        cli::Command::Demo(arguments) => demo::demo(&arguments),
        cli::Command::Run(arguments) => verbs::run(&arguments),
        cli::Command::Ls(arguments) => verbs::ls(&arguments),
        cli::Command::Status(arguments) => verbs::status(&arguments),
        cli::Command::Update(arguments) => verbs::update(&arguments),
        cli::Command::Pause(arguments) => verbs::pause(&arguments),
        cli::Command::Resume(arguments) => resume::resume(&arguments),
        cli::Command::Recover(arguments) => recover::recover(&arguments),
        cli::Command::Dump(arguments) => dump::dump(&arguments),
        cli::Command::Kexec(arguments) => kexec::kexec(&arguments),
        cli::Command::Rehearse(arguments) => kexec::rehearse(&arguments),
        cli::Command::Report(arguments) => report::report(&arguments),
        cli::Command::Top(arguments) => top::top(&arguments),
        cli::Command::Stop(arguments) => verbs::stop(&arguments),
        cli::Command::Service(arguments) => service::service(&arguments),
        cli::Command::Console(arguments) => console::console(&arguments),
        cli::Command::Setup(arguments) => setup::setup(&arguments),
        cli::Command::Check(arguments) => check::check(&arguments),
        cli::Command::Inspect(arguments) => inspect::inspect(&arguments),
        cli::Command::Completions(arguments) => pages::completions(&arguments),
        cli::Command::Man(arguments) => pages::man(&arguments),
    })
}

fn end(result: anyhow::Result<ExitCode>) -> ExitCode {
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
