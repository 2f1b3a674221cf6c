//! What all benches are told, where they run, and what is the same in each.

#[path = "../src/size.rs"]
#[expect(unused_imports, reason = "a bench without harness is built as a test, and its tests are left out")]
mod size;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::Result;
use clap::Parser;
use clap::ValueEnum;
use measure::quiet::Quiet;
use serde::Serialize;
pub(crate) use size::show;
use vmm::control::Pages;

/// Measures Tideover against plain KVM. Run by `cargo bench`; arguments go behind `--`.
#[derive(Debug, Parser)]
#[command(after_help = "Example: cargo bench --bench pause -- --memory 1GiB --page-size 2MiB --pairs 40")]
pub(crate) struct Arguments {
    /// Pairs of measurements, ours and the one to compare it with, for each size.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pairs: u32,
    /// Guest memory; may be given more than once.
    #[arg(long, value_name = "SIZE", value_parser = size::guest_memory)]
    pub(crate) memory: Vec<u64>,
    /// Page size of the guest's memory; may be given more than once. Both if not given.
    #[arg(long, value_enum)]
    pub(crate) page_size: Vec<PageSize>,
    /// How long to wait, all in all, for moments in which the machine does nothing else, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub(crate) patience: u64,
    /// Measure this build of `tideover` instead of the one at hand.
    #[arg(long, value_name = "PATH", default_value = env!("CARGO_BIN_EXE_tideover"), hide_default_value = true)]
    pub(crate) program: PathBuf,
    /// Give the numbers, one by one, as a line of JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Says that this is `cargo bench`, and not a test of everything that can be built.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PageSize {
    #[value(name = "2MiB")]
    Huge,
    #[value(name = "4KiB")]
    Small,
}

impl PageSize {
    pub(crate) fn pages(self) -> Pages {
        match self {
            Self::Huge => Pages::Huge,
            Self::Small => Pages::Small,
        }
    }

    pub(crate) fn bytes(self) -> u64 {
        match self {
            Self::Huge => 2 << 20,
            Self::Small => 4 << 10,
        }
    }
}

impl Arguments {
    pub(crate) fn quiet(&self) -> Quiet {
        Quiet::new(Duration::from_secs(self.patience))
    }

    /// Measures each page size with each size of memory that there is room for. Gives the sizes that were left out, too.
    pub(crate) fn each_size<T>(
        &self,
        mut measure: impl FnMut(u64, PageSize) -> Result<T>,
    ) -> Result<(Vec<T>, Vec<u64>)> {
        let (mut measured, mut left_out) = (Vec::new(), Vec::new());
        for page_size in &self.page_size {
            for memory_bytes in &self.memory {
                if has_room(*memory_bytes) {
                    measured.push(measure(*memory_bytes, *page_size)?);
                } else {
                    left_out.push(*memory_bytes);
                }
            }
        }
        Ok((measured, left_out))
    }

    /// What was asked for; `None` if this was not started by `cargo bench`: then there is nothing to be done.
    fn read(memory: &[u64]) -> Option<Self> {
        let mut arguments = Self::parse();
        if !arguments.bench {
            eprintln!("This is a bench, not a test: run it by `cargo bench`.");
            return None;
        }
        if arguments.memory.is_empty() {
            arguments.memory = memory.to_vec();
        }
        if arguments.page_size.is_empty() {
            arguments.page_size = vec![PageSize::Huge, PageSize::Small];
        }
        Some(arguments)
    }
}

/// The `main` of a bench, which measures `memory` if no size is asked for: what `run` finds goes to standard output.
pub(crate) fn main<R: Serialize>(
    bench: &str,
    memory: &[u64],
    run: impl FnOnce(&Arguments) -> Result<R>,
    show: impl FnOnce(&R) -> String,
) -> ExitCode {
    let Some(arguments) = Arguments::read(memory) else { return ExitCode::SUCCESS };
    let text = run(&arguments).and_then(|report| match arguments.json {
        true => serde_json::to_string(&report).map(|line| line + "\n").context("cannot write it as JSON"),
        false => Ok(show(&report)),
    });
    match text {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{bench}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What guests of this size are called.
pub(crate) fn name(memory_bytes: u64, page_size: PageSize) -> String {
    format!("{} in {} pages", show(memory_bytes), show(page_size.bytes()))
}

#[expect(clippy::cast_precision_loss, reason = "bytes that a guest has or walks over are far below 2^52")]
pub(crate) fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Left to the rest of the machine, in bytes.
const SLACK: u64 = 1 << 30;

/// Whether this machine has room for two guests of that size. Says so if it has not.
fn has_room(memory_bytes: u64) -> bool {
    let available = available_bytes();
    let has = available.is_none_or(|available| available >= 2 * memory_bytes + SLACK);
    if !has {
        let available = show(available.unwrap_or_default());
        eprintln!("######################################################################");
        eprintln!("# LEFT OUT: {} of guest memory. Two guests of that size and", show(memory_bytes));
        eprintln!("# 1 GiB for the rest are more than the {available} that are available.");
        eprintln!("######################################################################");
    }
    has
}

fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// Where it was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) cpus: usize,
    /// Part of the processors' time that somebody else used, looked at before each measurement.
    pub(crate) busy_elsewhere: f64,
    /// Measurements that were made though the machine was not quiet, and all of them.
    pub(crate) disturbed: (u32, u32),
}

impl Machine {
    pub(crate) fn look(quiet: &Quiet) -> Self {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            kernel: kernel.trim().to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, Into::into),
            busy_elsewhere: quiet.busy(),
            disturbed: quiet.disturbed(),
        }
    }

    pub(crate) fn show(&self) -> String {
        let (disturbed, all) = self.disturbed;
        format!(
            "Linux {}, {} CPUs; other work took {:.0} % of them, and {disturbed} of {all} measurements could not wait \
             for it to end\n",
            self.kernel,
            self.cpus,
            self.busy_elsewhere * 100.0
        )
    }
}
