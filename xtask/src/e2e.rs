//! `cargo xtask e2e`: the end-to-end cases, each in an emulated host whose kernel has /dev/liveupdate.

mod disk;
mod image;
mod kernel;
mod machine;

use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;

use crate::Verdict;
use crate::tally::Tally;

use self::machine::Host;

/// A case, and what its host has.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    memory_mib: u32,
    /// A disk with a file system.
    disk: bool,
}

const CASES: &[Case] = &[
    Case { name: "demo", memory_mib: 1024, disk: false },
    Case { name: "device", memory_mib: 768, disk: false },
    Case { name: "kexec", memory_mib: 1024, disk: false },
    Case { name: "kexec-eight", memory_mib: 1024, disk: false },
    Case { name: "kexec-gib", memory_mib: 2560, disk: false },
    Case { name: "kexec-linux", memory_mib: 1024, disk: true },
    Case { name: "kexec-small-pages", memory_mib: 1024, disk: false },
    Case { name: "kexec-twenty", memory_mib: 1024, disk: false },
    Case { name: "linux", memory_mib: 1024, disk: true },
    Case { name: "machine", memory_mib: 1024, disk: false },
    Case { name: "memfd", memory_mib: 768, disk: false },
];

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only cases whose name contains one of these.
    cases: Vec<String>,
    /// The kernel (a bzImage with /dev/liveupdate). Without it one is built from Debian's newest kernel source, once,
    /// and kept in the cache folder.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Build no kernel: if none is given or kept, skip all cases.
    #[arg(long)]
    no_build: bool,
    /// Show all that the hosts say.
    #[arg(long)]
    verbose: bool,
    /// How long each case may take, in seconds.
    #[arg(long, default_value_t = 240)]
    timeout: u64,
}

pub(crate) fn run(options: &Options) -> Verdict {
    let tally = run_all(options)?;
    println!("{tally}");
    Ok(tally.is_good())
}

fn run_all(options: &Options) -> Result<Tally> {
    let wanted =
        |name: &str| options.cases.is_empty() || options.cases.iter().any(|word| name.contains(word));
    let cases: Vec<_> = CASES.iter().filter(|case| wanted(case.name)).collect();
    let names: Vec<&str> = CASES.iter().map(|case| case.name).collect();
    ensure!(!cases.is_empty(), "no case is called so; there are: {}", names.join(", "));
    let kernel = match &options.kernel {
        Some(kernel) => kernel.clone(),
        None => match kernel::kept_or_built(!options.no_build)? {
            Some(kernel) => kernel,
            None => {
                println!(
                    "SKIPPED: all end-to-end cases, as there is no kernel: `cargo xtask e2e` builds one"
                );
                return Ok(Tally { skipped: cases.len(), ..Tally::default() });
            }
        },
    };
    let image = image::make(&kernel).context("cannot make the hosts' file system")?;
    let mut tally = Tally::default();
    for &Case { name, memory_mib, disk } in cases {
        let begun = Instant::now();
        let disk = if disk { Some(disk::make(name)?) } else { None };
        let disk = disk.as_deref();
        let host =
            Host { kernel: &kernel, image: &image, memory_mib, disk, case: name, verbose: options.verbose };
        match host.run(Duration::from_secs(options.timeout)) {
            Ok(()) => {
                tally.passed += 1;
                println!("e2e {name} ... ok ({:.1} s)", begun.elapsed().as_secs_f64());
            }
            Err(error) => {
                tally.failed += 1;
                println!("e2e {name} ... FAILED ({:.1} s): {error:#}", begun.elapsed().as_secs_f64());
            }
        }
    }
    Ok(tally)
}
