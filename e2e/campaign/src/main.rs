//! `tideover-campaign`: see the library. It is also every VMM that it starts.
#![forbid(unsafe_code)]

use std::io::IsTerminal as _;
use std::io::Write as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use campaign::choice::Carrier;
use campaign::record::Record;
use campaign::record::Totals;
use campaign::role;
use campaign::run;
use clap::Parser;
use clap::ValueEnum;
use vmm::control::GuestKind;

/// Kill and stop VMMs in the midst of updates, and count what that cost
///
/// Ends with 1 if a byte was lost, a guest ran in two processes, a machine was lost that should not be, or something did not end.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask campaign")]
struct Arguments {
    /// What all choices follow from
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// End when so many processes were killed, those of earlier runs with the same file included [default: 1000, unless --minutes is
    /// given]
    #[arg(long, value_name = "N")]
    kills: Option<u64>,
    /// End after so long
    #[arg(long, value_name = "M")]
    minutes: Option<u64>,
    /// Append each try to this file, and go on where it ends
    #[arg(long, value_name = "FILE")]
    results: Option<PathBuf>,
    /// How the machines go to their next VMM
    #[arg(long, value_enum, default_value_t = Way::Both)]
    carrier: Way,
    /// The guest [default: kvm where there is /dev/kvm, else thread]
    #[arg(long, value_enum)]
    guest: Option<Guest>,
    /// Do the try of this number alone, over and over: to see what it says
    #[arg(long, value_name = "N", conflicts_with = "results")]
    only: Option<u64>,
    /// Tries at a time: an even number
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: u64,
    /// Print the totals as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Way {
    Socket,
    Exec,
    Both,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Guest {
    Kvm,
    Thread,
}

fn main() -> ExitCode {
    if let Some(folder) = std::env::var_os(role::FOLDER) {
        return role::play(folder.into(), &std::env::args().skip(1).collect::<Vec<_>>());
    }
    let arguments = Arguments::parse();
    match campaign(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// True if nothing was found that must not be.
fn campaign(arguments: &Arguments) -> anyhow::Result<bool> {
    let default = if Path::new("/dev/kvm").exists() { Guest::Kvm } else { Guest::Thread };
    let options = run::Options {
        seed: arguments.seed,
        kills: arguments.kills.or(arguments.minutes.is_none().then_some(1000)),
        span: arguments.minutes.map(|minutes| Duration::from_secs(minutes * 60)),
        results: arguments.results.clone(),
        carrier: match arguments.carrier {
            Way::Socket => Some(Carrier::Socket),
            Way::Exec => Some(Carrier::Exec),
            Way::Both => None,
        },
        guest: match arguments.guest.unwrap_or(default) {
            Guest::Kvm => GuestKind::Kvm,
            Guest::Thread => GuestKind::Thread,
        },
        only: arguments.only,
        jobs: arguments.jobs,
    };
    let begun = Instant::now();
    let mut told = begun;
    let mut progress = |record: &Record, totals: &Totals| {
        if record.is_bad() {
            eprintln!("\n{}", serde_json::to_string(record).unwrap_or_default());
        }
        if told.elapsed() >= Duration::from_secs(if std::io::stderr().is_terminal() { 1 } else { 10 }) {
            told = Instant::now();
            tell(totals, begun.elapsed());
        }
    };
    let totals = run::run(&options, &mut progress)?;
    if std::io::stderr().is_terminal() {
        eprintln!();
    }
    match arguments.json {
        true => println!("{}", serde_json::to_string_pretty(&totals)?),
        false => println!("{}", totals.table()),
    }
    Ok(totals.is_good())
}

fn tell(totals: &Totals, since: Duration) {
    let (start, end) = if std::io::stderr().is_terminal() { ("\r", "") } else { ("", "\n") };
    let Totals { tried, kills, stops, bytes_lost, double_owners, .. } = totals;
    let mut stderr = std::io::stderr().lock();
    // Progress is no reason to fail.
    let _ = write!(
        stderr,
        "{start}{:>6.0} s: {tried} tries, {kills} killed, {stops} stopped, {bytes_lost} bytes lost, {double_owners} double owners{end}",
        since.as_secs_f64()
    );
    let _ = stderr.flush();
}
