//! The `tideover` command: replaces the VMM under a running guest, its memory kept in place.
#![forbid(unsafe_code)]

mod cli;
mod demo;
mod size;
mod table;
mod vmm;

use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    // Diagnostics go to stderr: stdout is the result's alone.
    let filter = EnvFilter::try_from_env("TIDEOVER_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    let result = match cli.command {
        cli::Command::Demo(arguments) => demo::demo(&arguments),
        cli::Command::Vmm(arguments) => vmm::vmm(arguments),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("tideover: {error:#}");
            ExitCode::FAILURE
        }
    }
}
