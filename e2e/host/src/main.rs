//! The first process of an emulated host, or a service in one that has systemd. The kernel's command line names the case
//! that it runs, and which of the host's lives this is: a case may have the host boot its kernel again, by kexec, and goes
//! on after it.
//!
//! It says how it went on the console, in lines that begin with `e2e:`, and turns the host off.
#![forbid(unsafe_code)]

mod boot;
mod cases;
mod daemon;
mod dax;
mod linux;
mod modules;
mod roles;
mod tideover;

use std::process::ExitCode;

use anyhow::Context as _;
use rustix::system::RebootCommand;

use crate::boot::Life;
use crate::cases::Then;

fn main() -> ExitCode {
    if let Some(code) = roles::play() {
        return code;
    }
    if std::env::args().nth(1).is_some_and(|word| word == cases::LINGER) {
        return cases::linger();
    }
    if std::env::args().nth(1).is_some_and(|word| word == cases::HOG) {
        return cases::hog();
    }
    if std::process::id() != 1 && !boot::has_service_manager() {
        eprintln!(
            "this is the first process of an emulated host, and does nothing elsewhere: cargo xtask e2e"
        );
        return ExitCode::FAILURE;
    }
    match live() {
        Ok(Then::Orderly) => return ExitCode::SUCCESS,
        Ok(_) => println!("e2e: passed"),
        Err(error) => {
            print!("{}", tideover::logs());
            println!("e2e: FAILED {error:#}");
        }
    }
    rustix::fs::sync();
    let off = rustix::system::reboot(RebootCommand::PowerOff);
    println!("e2e: FAILED cannot turn the host off: {off:?}");
    loop {
        std::thread::park();
    }
}

fn live() -> anyhow::Result<Then> {
    if !boot::has_service_manager() {
        boot::mount().context("cannot mount the file systems")?;
    }
    let life = Life::read()?;
    boot::await_tsc()?;
    // Behind that: KVM goes by what the TSC's rate is when it is loaded.
    modules::load()?;
    println!("e2e: life {} of {}", life.number, life.case);
    let case = cases::find(&life.case)?;
    match case(&life).with_context(|| format!("in life {}", life.number))? {
        Then::NextLife => boot::next_life(&life).map(|()| Then::End),
        then => Ok(then),
    }
}
