//! What it costs tideoverd to keep many machines: how soon it has them, its memory, and its processor time while nothing happens.
//!
//! The machines are real ones in a few processes, without guests: each has its regions, and a socket at which it gives them, as a VMM
//! does. In the place of its vCPU it gives another descriptor.

mod machines;

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitCode;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use clap::Parser;
use fdpass::Deadline;
use serde_json::Value;
use serde_json::json;

/// How many machines one process has.
const OF_ONE: usize = 250;
/// How long everything may take to be there.
const PATIENCE: Duration = Duration::from_secs(600);

/// Measures what it costs tideoverd to keep machines. Run by `cargo bench`; arguments go behind `--`.
#[derive(Debug, Parser)]
#[command(after_help = "Example: cargo bench --bench keep -- --machines 200 --idle 10")]
struct Arguments {
    /// How many machines.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    machines: usize,
    /// How long to look while nothing happens, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    idle: u64,
    /// Measure this build of `tideoverd` instead of the one at hand.
    #[arg(long, value_name = "PATH", default_value = env!("CARGO_BIN_EXE_tideoverd"), hide_default_value = true)]
    program: PathBuf,
    /// Be the machines with these numbers.
    #[arg(long, value_name = "FROM-TO", hide = true)]
    be: Option<String>,
    /// What cargo says.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.be {
        Some(numbers) => machines::be(numbers),
        None => measure(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A process that ends with this.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A directory that goes with this.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    let directory = Directory(std::env::temp_dir().join(format!("tideover-keep-{}", std::process::id())));
    vmm::machines::make(&directory.0)?;
    let mut hosts = Vec::new();
    for from in (0..arguments.machines).step_by(OF_ONE) {
        let to = (from + OF_ONE).min(arguments.machines);
        let mut host = Command::new(std::env::current_exe()?);
        host.args(["--be", &format!("{from}-{to}")]).env("TIDEOVER_DIR", &directory.0);
        hosts.push(Ends(host.stdin(Stdio::null()).spawn().context("cannot start machines")?));
    }
    await_machines(&directory.0, arguments.machines)?;
    let begun = Instant::now();
    let log = fs::File::create(directory.0.join("tideoverd.log"))?;
    let mut daemon = Command::new(&arguments.program);
    daemon.env("TIDEOVER_DIR", &directory.0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let daemon = Ends(daemon.spawn().with_context(|| format!("cannot run {}", arguments.program.display()))?);
    let pid = daemon.0.id();
    await_kept(&directory.0, arguments.machines)?;
    let took = begun.elapsed();
    let at_first = processor_time(pid)?;
    println!(
        "{} machines are kept {:.2} s after the start of tideoverd, which had a processor for {:.2} s of that",
        arguments.machines,
        took.as_secs_f64(),
        at_first.as_secs_f64()
    );
    thread::sleep(Duration::from_secs(arguments.idle));
    let while_idle = processor_time(pid)? - at_first;
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    println!(
        "{} KiB are resident, {} at most so far, with {descriptors} descriptors",
        status(pid, "VmRSS")?,
        status(pid, "VmHWM")?
    );
    println!(
        "in {} s without an event it had a processor for {:.3} ms: {:.4} % of one",
        arguments.idle,
        while_idle.as_secs_f64() * 1e3,
        100.0 * while_idle.as_secs_f64() / Duration::from_secs(arguments.idle).as_secs_f64()
    );
    Ok(())
}

/// Waits until all of them listen.
fn await_machines(directory: &Path, count: usize) -> Result<()> {
    let until = Deadline::after(PATIENCE);
    loop {
        let there = fs::read_dir(directory)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        if there.filter(|name| name.ends_with(machines::READY)).count() == count.div_ceil(OF_ONE) {
            return Ok(());
        }
        ensure!(!until.has_passed(), "the machines do not come");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until tideoverd says that it has so many.
fn await_kept(directory: &Path, count: usize) -> Result<()> {
    let until = Deadline::after(PATIENCE);
    let mut kept = 0;
    while !until.has_passed() {
        if let Ok(now) = ask(directory) {
            kept = now;
        }
        if kept == count {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(5));
    }
    bail!("{kept} of {count} are kept")
}

fn ask(directory: &Path) -> Result<usize> {
    let mut lines = fdpass::connect_lines(&directory.join("luo-agent.socket"), Deadline::after(PATIENCE))?;
    lines.send(&serde_json::to_vec(&json!({ "cmd": "STATUS" }))?, Vec::new())?;
    let came = lines.receive_some(Deadline::after(PATIENCE))?;
    let status: Value = serde_json::from_slice(&came.first().context("no answer")?.bytes)?;
    Ok(status["kept"].as_array().context("no list")?.len())
}

/// What all threads of a process had.
fn processor_time(pid: u32) -> Result<Duration> {
    let mut all = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = fs::read_to_string(thread?.path().join("schedstat"))?;
        all += stat.split_whitespace().next().context("no time")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(all))
}

/// In KiB.
fn status(pid: u32, name: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB"));
    Ok(kib.with_context(|| format!("no {name}"))?.trim().parse()?)
}
