//! How long a guest stands still while its VMM executes the next one's program, against `execve` alone.
//!
//! A pair is one update by the exec carrier and one bare `execve` of this program by a process that has nothing, right
//! after each other, their order changing from pair to pair: the *floor* is from before the call to the first line of
//! `main`. What counts is the difference within the pair.
#![forbid(unsafe_code)]

#[path = "../arguments.rs"]
mod arguments;

use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::Result;
use arguments::Arguments;
use arguments::Machine;
use arguments::PageSize;
use arguments::gib;
use comfy_table::Table;
use comfy_table::presets;
use fdpass::monotonic_ns;
use measure::chain::Chain;
use measure::chain::How;
use measure::numbers;
use measure::numbers::Group;
use measure::numbers::Slope;
use measure::numbers::Spread;
use measure::quiet::Quiet;
use serde::Serialize;
use vmm::control::Carrier;

/// Sizes that are measured if none is asked for.
const MEMORY: [u64; 3] = [64 << 20, 1 << 30, 8 << 30];
/// What an update may cost over execve, in microseconds.
const TARGET_US: f64 = 2000.0;
/// How long the guest runs before it is stopped.
const RUN: Duration = Duration::from_millis(300);
/// For all of its memory, at the beginning.
const FIRST_PASS: Duration = Duration::from_secs(60);
/// Says to this program that it is the one that is executed, and when it was.
const EXECUTED_AT: &str = "TIDEOVER_BENCH_EXECUTED_AT";
/// Says to this program that it is to execute itself.
const EXECUTE: &str = "TIDEOVER_BENCH_EXECUTE";

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Curve {
    memory_bytes: u64,
    page_size: u64,
    ours_us: Spread,
    floor_us: Spread,
    difference_us: Spread,
    /// The median of the difference lies below it, with 95 % confidence. `None` of too few pairs.
    difference_upper_bound_us: Option<f64>,
    pairs: Vec<(f64, f64)>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Report {
    machine: Machine,
    target_us: f64,
    curves: Vec<Curve>,
    growth_us_per_gib: Vec<Option<Slope>>,
}

fn main() -> ExitCode {
    if let Ok(at) = std::env::var(EXECUTED_AT) {
        let at: u64 = at.parse().unwrap_or_default();
        println!("{}", monotonic_ns().saturating_sub(at));
        return ExitCode::SUCCESS;
    }
    if std::env::var_os(EXECUTE).is_some() {
        let Ok(program) = std::env::current_exe() else { return ExitCode::FAILURE };
        let error = Command::new(program).env(EXECUTED_AT, monotonic_ns().to_string()).exec();
        eprintln!("exec: cannot execute this program: {error}");
        return ExitCode::FAILURE;
    }
    arguments::main("exec", &MEMORY, run, show)
}

fn run(arguments: &Arguments) -> Result<Report> {
    let mut quiet = arguments.quiet();
    let measure = |memory, page_size| curve(arguments, &mut quiet, memory, page_size);
    let (curves, _) = arguments.each_size(measure)?;
    let growth = arguments.page_size.iter().map(|page_size| {
        let curves = curves.iter().filter(|curve: &&Curve| curve.page_size == page_size.bytes());
        let group = |curve: &Curve| Group { at: gib(curve.memory_bytes), values: differences(&curve.pairs) };
        Slope::of(&curves.map(group).collect::<Vec<_>>())
    });
    let growth_us_per_gib = growth.collect();
    Ok(Report { machine: Machine::look(&quiet), target_us: TARGET_US, growth_us_per_gib, curves })
}

fn curve(arguments: &Arguments, quiet: &mut Quiet, memory_bytes: u64, page_size: PageSize) -> Result<Curve> {
    let chain = Chain::start(&arguments.program, memory_bytes, page_size.pages());
    let mut chain = chain.context("cannot start the guest")?;
    let begun = Instant::now();
    while chain.passes()? < 1 && begun.elapsed() < FIRST_PASS {
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut pairs = Vec::new();
    for number in 0..arguments.pairs {
        quiet.wait();
        let pair = if number.is_multiple_of(2) {
            let ours = update(&mut chain)?;
            (ours, execve()?)
        } else {
            let floor = execve()?;
            (update(&mut chain)?, floor)
        };
        eprintln!(
            "exec: {}: pair {}: {:.0} µs against {:.0}",
            arguments::name(memory_bytes, page_size),
            number + 1,
            pair.0,
            pair.1
        );
        pairs.push(pair);
    }
    chain.finish()?;
    let of = |of: fn(&(f64, f64)) -> f64| {
        Spread::of(&pairs.iter().map(of).collect::<Vec<_>>()).context("no pairs")
    };
    Ok(Curve {
        memory_bytes,
        page_size: page_size.bytes(),
        ours_us: of(|pair| pair.0)?,
        floor_us: of(|pair| pair.1)?,
        difference_us: of(|pair| pair.0 - pair.1)?,
        difference_upper_bound_us: numbers::median_upper_bound(&differences(&pairs)),
        pairs,
    })
}

fn differences(pairs: &[(f64, f64)]) -> Vec<f64> {
    pairs.iter().map(|(ours, floor)| ours - floor).collect()
}

fn update(chain: &mut Chain) -> Result<f64> {
    chain.go()?;
    std::thread::sleep(RUN);
    let report = chain.update(How { carrier: Carrier::Exec, populate: false, probe: false })?;
    chain.hold()?;
    let pause = report.pause_us.context("the update has no pause")?;
    // The guest stands still twice. Both count.
    Ok(pause + report.aside_us.context("an update by exec that did not step aside")?)
}

/// What `execve` of a program like ours takes, in microseconds: this program executes itself, and compares the clocks.
fn execve() -> Result<f64> {
    let program = std::env::current_exe()?;
    let output = Command::new(program).env(EXECUTE, "1").output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let ns: u32 = said.trim().parse().with_context(|| format!("no time: {said}"))?;
    Ok(f64::from(ns) / 1000.0)
}

fn show(report: &Report) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["memory", "pages", "ours", "execve", "difference", "bound", ""]);
    let spread = |spread: &Spread| format!("{:.0} [{:.0} .. {:.0}]", spread.median, spread.min, spread.max);
    for curve in &report.curves {
        let bound = curve.difference_upper_bound_us;
        table.add_row([
            arguments::show(curve.memory_bytes),
            arguments::show(curve.page_size),
            spread(&curve.ours_us),
            spread(&curve.floor_us),
            format!("{:.0}", curve.difference_us.median),
            bound.map_or_else(|| "too few pairs".to_owned(), |bound| format!("{bound:.0}")),
            if bound.is_some_and(|bound| bound < TARGET_US) { "met" } else { "MISSED" }.to_owned(),
        ]);
    }
    let slopes = report.growth_us_per_gib.iter().flatten();
    let slopes: String = slopes.map(|slope| format!("growth: {slope:?}\n")).collect();
    format!(
        "{}\nPause of an update by exec against execve alone, by the host's clock, in µs\n{table}\nThe bound: the median of the \
         difference is below it with 95 % confidence; it is to be below {TARGET_US:.0} µs.\n{slopes}",
        report.machine.show()
    )
}
