//! A unit like a machine's that has nothing to keep: its main process says when it begins, and is ended by its `ExecStop=`, which says when.

use std::fs;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;
use clap::ValueEnum;
use fdpass::Deadline;
use fdpass::Pidfd;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;
use rustix::time::ClockId;
use rustix::time::clock_gettime;

const TIMES: &str = "/run/bare";
/// How long a process that is to end may take to be gone.
const END: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    Main,
    Stop,
}

/// The machine's unit, with another program: it is set up and stopped as that is. It does not say that it is ready.
pub(crate) fn unit(program: &Path, of_machine: &str) -> String {
    let program = program.display();
    let line = |line: &str| match line.split_once('=') {
        Some(("ExecStart", _)) => format!("ExecStart={program} --be main"),
        Some(("ExecStop", _)) => format!("ExecStop={program} --be stop"),
        Some(("Type", _)) => "Type=exec".to_owned(),
        _ => line.to_owned(),
    };
    of_machine.lines().map(line).collect::<Vec<_>>().join("\n")
}

pub(crate) fn be(role: Role) -> Result<()> {
    match role {
        Role::Main => {
            note(role)?;
            loop {
                std::thread::park();
            }
        }
        Role::Stop => {
            let main: i32 = std::env::var("MAINPID").context("no main process")?.parse()?;
            let process = Pidfd::of_number(u32::try_from(main)?)?;
            note(role)?;
            kill_process(Pid::from_raw(main).context("no process")?, Signal::TERM)?;
            Ok(process.wait_exit(Deadline::after(END))?)
        }
    }
}

fn note(role: Role) -> Result<()> {
    let now = clock_gettime(ClockId::Monotonic);
    let mut times = File::options().create(true).append(true).open(TIMES)?;
    Ok(writeln!(times, "{role:?} {}.{:09}", now.tv_sec, now.tv_nsec)?)
}

/// How long it took from before the last main process was ended until the next one began, in milliseconds.
pub(crate) fn last_restart() -> Result<f64> {
    let begun = std::time::Instant::now();
    loop {
        let times = fs::read_to_string(TIMES)?;
        let last: Vec<&str> = times.lines().rev().take(2).collect();
        if let [began, stopped] = last[..]
            && let (Some(began), Some(stopped)) = (began.strip_prefix("Main "), stopped.strip_prefix("Stop "))
        {
            let [began, stopped]: [f64; 2] = [began.parse()?, stopped.parse()?];
            return Ok((began - stopped) * 1000.0);
        }
        // It is started, and may not have begun.
        ensure!(begun.elapsed() < END, "the bare unit does not begin anew");
        std::thread::sleep(Duration::from_millis(5));
    }
}
