//! `cargo xtask fuzz`: libFuzzer on the targets of the crate `fuzz`, with the stable compiler.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::Verdict;
use crate::cargo::{self, Workspace};

/// Has the compiler count which edges of a program are taken, and tell what is compared with what.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";
/// With a target named, build scripts and macros are not compiled for coverage.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// An input that takes longer hangs, in seconds.
const INPUT_SECONDS: u32 = 10;
/// The longest input. A structure takes a few hundred bytes of one: pages are mostly zero.
const INPUT_BYTES: u32 = 4096;

#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// The targets [default: all]
    targets: Vec<String>,
    /// At most so many executions of each
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    runs: u64,
    /// At most so many minutes for each
    #[arg(long, value_name = "M", default_value_t = 10)]
    minutes: u64,
    /// List the targets, and run none
    #[arg(long)]
    list: bool,
    /// Run one target on this input alone: to see what it says
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Make the fewest inputs that reach all that was reached the kept corpus
    #[arg(long)]
    keep: bool,
}

/// What it takes to fuzz.
struct Tools {
    engine: PathBuf,
    corpus: PathBuf,
    work: PathBuf,
}

/// How a target fared.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    executions: u64,
    per_second: u64,
    /// Edges of the program that were taken.
    edges: u64,
}

/// The verb `fuzz`.
pub(crate) fn run(options: &Options) -> Verdict {
    let workspace = Workspace::read()?;
    let corpus = build(&workspace, false)?;
    let all = output(Command::new(&corpus).arg("list"))?;
    if options.list {
        print!("{all}");
        return Ok(true);
    }
    let all: Vec<&str> = all.lines().collect();
    if let Some(unknown) = options.targets.iter().find(|target| !all.contains(&target.as_str())) {
        bail!("there is no target {unknown}: there are {}", all.join(", "));
    }
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let has_compiler =
        Command::new(&compiler).arg("--version").output().is_ok_and(|done| done.status.success());
    ensure!(has_compiler, "libFuzzer is C++, and {compiler} cannot be run: install Debian's g++, or set CXX");
    let work = workspace.target_directory.join("fuzzing");
    let tools = Tools { engine: build(&workspace, true)?, corpus, work };
    let chosen = all
        .into_iter()
        .filter(|name| options.targets.is_empty() || options.targets.iter().any(|target| target == name));
    let chosen: Vec<&str> = chosen.collect();
    match (&options.input, chosen.as_slice()) {
        (Some(input), [target]) => one(&tools, target, input),
        (Some(_), _) => bail!("an input is for one target: name it"),
        (None, targets) => every(&tools, targets, options),
    }
}

/// Builds the engine, or the program that packs and unpacks inputs, and gives its path.
fn build(workspace: &Workspace, engine: bool) -> Result<PathBuf> {
    let mut command = cargo::command();
    command.args(["build", "--quiet", "--locked", "--package", "tideover-fuzz"]).stdin(Stdio::null());
    let target = &workspace.target_directory;
    let program = if engine {
        command.args([
            "--profile",
            "fuzz",
            "--features",
            "engine",
            "--bin",
            "fuzz-engine",
            "--target",
            TRIPLE,
        ]);
        command.env("RUSTFLAGS", COVERAGE);
        target.join(TRIPLE).join("fuzz/fuzz-engine")
    } else {
        command.args(["--bin", "fuzz-corpus"]);
        target.join("debug/fuzz-corpus")
    };
    let status = command.status().context("cargo cannot be run")?;
    ensure!(status.success(), "the fuzzer cannot be built: {status}");
    Ok(program)
}

fn output(command: &mut Command) -> Result<String> {
    let done = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let done = done.with_context(|| format!("{command:?} cannot be run"))?;
    ensure!(done.status.success(), "{command:?}: {}", done.status);
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// libFuzzer on a target.
fn engine(tools: &Tools, target: &str) -> Command {
    let mut command = Command::new(&tools.engine);
    command.env("TIDEOVER_FUZZ_TARGET", target).current_dir(&tools.work).stdin(Stdio::null());
    // A trace takes more memory than an input may.
    command.env("RUST_BACKTRACE", "0");
    command.arg(format!("-timeout={INPUT_SECONDS}"));
    command
}

fn one(tools: &Tools, target: &str, input: &Path) -> Verdict {
    fs::create_dir_all(&tools.work)?;
    let input = input.canonicalize().with_context(|| format!("{} cannot be read", input.display()))?;
    let status = engine(tools, target).arg(input).status().context("the fuzzer cannot be run")?;
    Ok(status.success())
}

fn every(tools: &Tools, targets: &[&str], options: &Options) -> Verdict {
    println!("{:<12} {:>12} {:>8} {:>6}  {:>8}", "target", "executions", "per s", "edges", "minutes");
    let mut good = true;
    for target in targets {
        let begun = Instant::now();
        let folder = tools.work.join(target);
        let inputs = folder.join("inputs");
        fs::create_dir_all(&folder)?;
        output(Command::new(&tools.corpus).args(["unpack", target]).arg(&inputs))?;
        let log = folder.join("log");
        let status = engine(tools, target)
            .args([format!("-runs={}", options.runs), format!("-max_total_time={}", options.minutes * 60)])
            .args([format!("-max_len={INPUT_BYTES}"), "-print_final_stats=1".to_owned()])
            .args(["-use_value_profile=1", "-rss_limit_mb=1024", "-reduce_inputs=1"])
            .arg(format!("-artifact_prefix={}/", folder.display()))
            .arg(&inputs)
            .stderr(fs::File::create(&log)?)
            .status()
            .context("the fuzzer cannot be run")?;
        let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let Figures { executions, per_second, edges } = figures(&said);
        let minutes = begun.elapsed().as_secs_f64() / 60.0;
        println!("{target:<12} {executions:>12} {per_second:>8} {edges:>6}  {minutes:>8.1}");
        if !status.success() {
            println!("{}", found(&said, &log));
            good = false;
        } else if options.keep {
            keep(tools, target, &folder, &inputs)?;
        }
    }
    Ok(good)
}

/// Makes the fewest inputs that reach what all of them do the kept corpus.
fn keep(tools: &Tools, target: &str, folder: &Path, inputs: &Path) -> Result<()> {
    let fewest = folder.join("fewest");
    if fewest.exists() {
        fs::remove_dir_all(&fewest)?;
    }
    fs::create_dir_all(&fewest)?;
    let log = folder.join("merge-log");
    let status = engine(tools, target)
        .arg("-merge=1")
        .args([&fewest, inputs])
        .stderr(fs::File::create(&log)?)
        .status()
        .context("the fuzzer cannot be run")?;
    ensure!(status.success(), "the inputs of {target} cannot be merged, see {}", log.display());
    output(Command::new(&tools.corpus).args(["pack", target]).arg(&fewest))?;
    // The next run starts with these.
    fs::remove_dir_all(inputs)?;
    Ok(fs::rename(fewest, inputs)?)
}

/// What libFuzzer says at its end, and the edges in its last line that counts them.
fn figures(said: &str) -> Figures {
    let after = |mark: &str| {
        let at = said.rfind(mark).map(|at| said.get(at + mark.len()..).unwrap_or_default().trim_start());
        let digits = at.map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default());
        digits.and_then(|digits| digits.parse().ok()).unwrap_or_default()
    };
    Figures {
        executions: after("stat::number_of_executed_units:"),
        per_second: after("stat::average_exec_per_sec:"),
        edges: after(" cov: "),
    }
}

/// What it says of an input that broke a decoder.
fn found(said: &str, log: &Path) -> String {
    let tells = ["panicked at", "memory allocation of", "ERROR:", "Test unit written to"];
    let mut lines = said.lines().peekable();
    let mut shown = String::new();
    while let Some(line) = lines.next() {
        if tells.iter().any(|tell| line.contains(tell)) {
            shown += &format!("    {line}\n");
            if line.contains("panicked at") {
                shown.extend(lines.peek().map(|why| format!("    {why}\n")));
            }
        }
    }
    let after = "Run it again with --input FILE; once the decoder is right, its bytes as hex go into a line of fuzz/found/TARGET.txt.";
    format!("{shown}    all of it: {}\n    {after}", log.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "\
INFO: Seed: 1
#2\tINITED cov: 10 ft: 20 corp: 1/1b exec/s: 0 rss: 29Mb
#1000\tDONE   cov: 786 ft: 5300 corp: 1383/272Kb lim: 552 exec/s: 41039 rss: 33Mb
stat::number_of_executed_units: 1000
stat::average_exec_per_sec:     41039
";

    #[test]
    fn figures_are_those_of_the_end() {
        assert_eq!(figures(SAID), Figures { executions: 1000, per_second: 41039, edges: 786 });
        assert_eq!(figures(""), Figures::default());
    }

    #[test]
    fn what_was_found_is_shown_with_its_reason() {
        let said = "thread 'x' panicked at a.rs:1:2:\nwhy it did\nmore\n==1== ERROR: libFuzzer: deadly signal\nartifact_prefix='./'; Test unit written to ./crash-1\n";
        let shown = found(said, Path::new("/log"));
        assert!(
            shown.starts_with("    thread 'x' panicked at a.rs:1:2:\n    why it did\n    ==1== ERROR"),
            "{shown}"
        );
        assert!(shown.contains("./crash-1") && shown.contains("/log"), "{shown}");
        assert!(!shown.contains("more"));
    }
}
