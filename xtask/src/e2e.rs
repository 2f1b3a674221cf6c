//! `cargo xtask e2e`: the end-to-end cases, each in an emulated host whose kernel has /dev/liveupdate.

mod capture;
mod cases;
mod disk;
mod image;
mod kernel;
mod machine;
mod programs;
mod systemd;

use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;

use crate::Verdict;
use crate::tally::Tally;

use self::cases::CASES;
use self::cases::Case;
use self::machine::Host;

/// Names a kernel as `--kernel` does.
const KERNEL: &str = "TIDEOVER_E2E_KERNEL";
/// How long the cases of `--smoke` may take together, from the first one's start.
const SMOKE_LIMIT: Duration = Duration::from_secs(8 * 60);

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only cases whose name contains one of these.
    cases: Vec<String>,
    /// Only the cases that CI runs, which have 8 minutes together.
    #[arg(long)]
    smoke: bool,
    /// List the cases, and run none.
    #[arg(long)]
    list: bool,
    /// The kernel (a bzImage with /dev/liveupdate). Without it, the one that TIDEOVER_E2E_KERNEL names; else one is built from
    /// Debian's newest kernel source, once, and kept in the cache folder.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Build no kernel, and skip all cases where there is none, or a program is missing that runs the hosts.
    #[arg(long)]
    no_build: bool,
    /// Show all that the hosts say.
    #[arg(long)]
    verbose: bool,
    /// How long each case may take, in seconds, instead of what the list says.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Write the memory of a case's host, as it is when the kernel after the first prints its first line, for `tideover inspect`.
    #[arg(long, value_name = "FILE")]
    capture: Option<PathBuf>,
    /// Tell the cases something, as `updates=20`; may be given more than once. What a case knows stands in the list.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parameter)]
    with: Vec<(String, String)>,
}

/// A word of a kernel's command line, without its name.
fn parameter(text: &str) -> Result<(String, String), String> {
    let fits =
        |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_graphic() && c != '"' && c != '=');
    match text.split_once('=') {
        Some((name, value)) if fits(name) && fits(value) => Ok((name.to_owned(), value.to_owned())),
        _ => Err("it is not NAME=VALUE, or has a blank, a quote or a second `=` in it".to_owned()),
    }
}

pub(crate) fn run(options: &Options) -> Verdict {
    if options.list {
        print!("{}", cases::list());
        return Ok(true);
    }
    let tally = run_all(options).unwrap_or_else(|error| {
        println!("error: {error:#}");
        Tally::ONE_FAILURE
    });
    println!("{tally}");
    // Cases are skipped only if that was asked for.
    Ok(tally.failed == 0)
}

fn run_all(options: &Options) -> Result<Tally> {
    let cases = chosen(options)?;
    ensure!(
        options.capture.is_none() || cases.len() == 1,
        "--capture is for one case: {} are named",
        cases.len()
    );
    let (kernel, image) = match prepare(options)? {
        Ready::Yes { kernel, image } => (kernel, image),
        Ready::No(why) => {
            let names: Vec<&str> = cases.iter().map(|case| case.name).collect();
            println!("SKIPPED: the end-to-end cases {}: {why}", names.join(", "));
            return Ok(Tally { skipped: cases.len(), ..Tally::default() });
        }
    };
    let mut tally = Tally::default();
    let begun = Instant::now();
    for case in cases {
        let left = if options.smoke { SMOKE_LIMIT.saturating_sub(begun.elapsed()) } else { Duration::MAX };
        let patience = Duration::from_secs(options.timeout.unwrap_or(case.timeout_s)).min(left);
        let begun = Instant::now();
        let ran = run_case(case, &kernel, &image, patience, options);
        let took = begun.elapsed().as_secs_f64();
        match ran {
            Ok(()) => {
                tally.passed += 1;
                println!("e2e {} ... ok ({took:.1} s)", case.name);
            }
            Err(error) => {
                tally.failed += 1;
                println!("e2e {} ... FAILED ({took:.1} s): {error:#}", case.name);
            }
        }
    }
    Ok(tally)
}

fn chosen(options: &Options) -> Result<Vec<&'static Case>> {
    let is_named =
        |case: &Case| options.cases.is_empty() || options.cases.iter().any(|word| case.name.contains(word));
    let is_chosen = |case: &&Case| is_named(case) && (case.smoke || !options.smoke);
    let cases: Vec<_> = CASES.iter().filter(is_chosen).collect();
    ensure!(!cases.is_empty(), "there is no such case: `cargo xtask e2e --list` lists those that there are");
    Ok(cases)
}

/// What all cases need.
enum Ready {
    Yes { kernel: PathBuf, image: PathBuf },
    No(String),
}

fn prepare(options: &Options) -> Result<Ready> {
    let may_skip = options.no_build;
    match programs::missing(&programs::HOSTS) {
        Some(missing) if may_skip => return Ok(Ready::No(format!("{missing} first"))),
        Some(missing) => bail!("hosts cannot be run here: {missing} first"),
        None => {}
    }
    let named = std::env::var_os(KERNEL).filter(|path| !path.is_empty()).map(PathBuf::from);
    let kernel = match options.kernel.clone().or(named) {
        Some(kernel) => {
            ensure!(kernel.is_file(), "{} is no kernel", kernel.display());
            kernel
        }
        None => match kernel::kept_or_built(!may_skip)? {
            Some(kernel) => kernel,
            None => {
                return Ok(Ready::No(format!(
                    "there is no kernel: `cargo xtask e2e` builds one, {KERNEL} names one"
                )));
            }
        },
    };
    let image = image::make(&kernel).context("cannot make the hosts' file system")?;
    Ok(Ready::Yes { kernel, image })
}

fn run_case(case: &Case, kernel: &Path, image: &Path, patience: Duration, options: &Options) -> Result<()> {
    ensure!(!patience.is_zero(), "the time for all cases is over");
    let disk = if case.disk { Some(disk::make(case.name)?) } else { None };
    let systemd = if case.systemd { Some(systemd::make(kernel)?) } else { None };
    let host = Host {
        kernel,
        image,
        systemd: systemd.as_deref(),
        memory_mib: case.memory_mib,
        disk: disk.as_deref(),
        case: case.name,
        parameters: case.parameters,
        with: &options.with,
        capture: options.capture.as_deref(),
        verbose: options.verbose,
    };
    host.run(patience)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_is_one_word_of_a_command_line() {
        assert_eq!(parameter("updates=20"), Ok(("updates".to_owned(), "20".to_owned())));
        for bad in ["", "updates", "=2", "a=", "a=1 2", "a=\"1", "a=1=2"] {
            assert!(parameter(bad).is_err(), "{bad}");
        }
    }
}
