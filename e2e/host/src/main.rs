//! The first process of an emulated host. The kernel's command line names the case that it runs, and which of the
//! host's lives this is: a case may have the host boot its kernel again, by kexec, and goes on after it.
//!
//! It says how it went on the console, in lines that begin with `e2e:`, and turns the host off.
#![forbid(unsafe_code)]

mod boot;
mod cases;

use std::process::ExitCode;

use anyhow::Context as _;
use rustix::system::RebootCommand;

use crate::boot::CommandLine;
use crate::cases::Then;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!(
            "this is the first process of an emulated host, and does nothing elsewhere: cargo xtask e2e"
        );
        return ExitCode::FAILURE;
    }
    match live() {
        Ok(()) => println!("e2e: passed"),
        Err(error) => println!("e2e: FAILED {error:#}"),
    }
    rustix::fs::sync();
    let off = rustix::system::reboot(RebootCommand::PowerOff);
    println!("e2e: FAILED cannot turn the host off: {off:?}");
    loop {
        std::thread::park();
    }
}

fn live() -> anyhow::Result<()> {
    boot::mount().context("cannot mount the file systems")?;
    let command_line = CommandLine::read()?;
    println!("e2e: life {} of {}", command_line.life, command_line.case);
    let case = cases::find(&command_line.case)?;
    match case(command_line.life).with_context(|| format!("in life {}", command_line.life))? {
        Then::End => Ok(()),
        Then::NextLife => boot::next_life(&command_line),
    }
}
