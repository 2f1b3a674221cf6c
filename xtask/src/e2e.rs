//! `cargo xtask e2e`: the end-to-end cases, each in an emulated host whose kernel has /dev/liveupdate, or is one that Debian
//! ships.

mod capture;
mod cases;
mod disk;
mod image;
mod kernel;
mod machine;
mod programs;
mod stock;
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
use self::cases::Ground;
use self::machine::Host;

/// Names a kernel as `--kernel` does.
const KERNEL: &str = "TIDEOVER_E2E_KERNEL";
/// How long the cases of `--smoke` may take together.
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
    /// The release of Debian whose newest kernel the cases run on that are for one that is shipped (`kernel` in the list: stock). It
    /// is fetched once, and kept in the cache folder. The environment variable TIDEOVER_E2E_DEBIAN names another one, by its
    /// package: a file, or a folder that it is unpacked in.
    #[arg(long, value_name = "RELEASE", default_value = "bookworm", value_parser = release)]
    debian: String,
    /// Build and fetch no kernel, and skip the cases whose kernel is not there, or all if a program is missing that runs the hosts.
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

/// The name of a release, which becomes one of a folder.
fn release(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    match !text.is_empty() && text.chars().all(fits) {
        true => Ok(text.to_owned()),
        false => Err("it is not the name of a release, as bookworm or trixie-backports".to_owned()),
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
    let mut tally = Tally::default();
    let mut spent = Duration::ZERO;
    for ground in Ground::ALL {
        let cases: Vec<&Case> = cases.iter().copied().filter(|case| case.ground == ground).collect();
        if cases.is_empty() {
            continue;
        }
        match prepare(ground, options)? {
            Ready::Yes { kernel, image } => {
                cases
                    .into_iter()
                    .for_each(|case| run_one(case, (&kernel, &image), &mut spent, options, &mut tally));
            }
            Ready::No(why) => {
                let names: Vec<&str> = cases.iter().map(|case| case.name).collect();
                println!("SKIPPED: the end-to-end cases {}: {why}", names.join(", "));
                tally.skipped += cases.len();
            }
        }
    }
    Ok(tally)
}

/// Runs a case, says how it went, and counts that and its time.
fn run_one(case: &Case, on: (&Path, &Path), spent: &mut Duration, options: &Options, tally: &mut Tally) {
    let left = if options.smoke { SMOKE_LIMIT.saturating_sub(*spent) } else { Duration::MAX };
    let patience = Duration::from_secs(options.timeout.unwrap_or(case.timeout_s)).min(left);
    let begun = Instant::now();
    let ran = run_case(case, on, patience, options);
    *spent += begun.elapsed();
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

fn chosen(options: &Options) -> Result<Vec<&'static Case>> {
    let is_named =
        |case: &Case| options.cases.is_empty() || options.cases.iter().any(|word| case.name.contains(word));
    let is_chosen = |case: &&Case| is_named(case) && (case.smoke || !options.smoke);
    let cases: Vec<_> = CASES.iter().filter(is_chosen).collect();
    ensure!(!cases.is_empty(), "there is no such case: `cargo xtask e2e --list` lists those that there are");
    Ok(cases)
}

/// What all cases of one ground need.
enum Ready {
    Yes { kernel: PathBuf, image: PathBuf },
    No(String),
}

fn prepare(ground: Ground, options: &Options) -> Result<Ready> {
    let may_skip = options.no_build;
    match programs::missing(&programs::HOSTS) {
        Some(missing) if may_skip => return Ok(Ready::No(format!("{missing} first"))),
        Some(missing) => bail!("hosts cannot be run here: {missing} first"),
        None => {}
    }
    match ground {
        Ground::Built => prepare_built(options),
        Ground::Stock => prepare_stock(options),
    }
}

fn prepare_built(options: &Options) -> Result<Ready> {
    let named = std::env::var_os(KERNEL).filter(|path| !path.is_empty()).map(PathBuf::from);
    let kernel = match options.kernel.clone().or(named) {
        Some(kernel) => {
            ensure!(kernel.is_file(), "{} is no kernel", kernel.display());
            kernel
        }
        None => match kernel::kept_or_built(!options.no_build)? {
            Some(kernel) => kernel,
            None => {
                return Ok(Ready::No(format!(
                    "there is no kernel: `cargo xtask e2e` builds one, {KERNEL} names one"
                )));
            }
        },
    };
    let image = image::make(&kernel).context(NO_IMAGE)?;
    Ok(Ready::Yes { kernel, image })
}

fn prepare_stock(options: &Options) -> Result<Ready> {
    match programs::missing(&programs::STOCK) {
        Some(missing) if options.no_build => return Ok(Ready::No(format!("{missing} first"))),
        Some(missing) => bail!("a kernel cannot be unpacked here: {missing} first"),
        None => {}
    }
    let Some(stock) = stock::kept_or_fetched(&options.debian, !options.no_build)? else {
        let package = stock::PACKAGE;
        return Ok(Ready::No(format!(
            "there is no kernel of Debian's: `cargo xtask e2e` fetches one, {package} names one"
        )));
    };
    let image = image::make_with_modules(&stock.kernel, &stock.modules).context(NO_IMAGE)?;
    Ok(Ready::Yes { kernel: stock.kernel, image })
}

const NO_IMAGE: &str = "cannot make the hosts' file system";

fn run_case(
    case: &Case,
    (kernel, image): (&Path, &Path),
    patience: Duration,
    options: &Options,
) -> Result<()> {
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
        ground: case.ground,
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

    #[test]
    fn a_release_is_no_path() {
        assert_eq!(release("trixie-backports"), Ok("trixie-backports".to_owned()));
        for bad in ["", "../x", "a b", "Trixie"] {
            assert!(release(bad).is_err(), "{bad}");
        }
    }
}
