//! Keeps machines against the death of their VMMs.
//!
//! Each VMM of this user gives `tideoverd` what it takes to keep its machine: the descriptors of its regions and a note. That is asked
//! for over the machine's own control socket, which is found in the directory of this user's machines, so a VMM needs to know of
//! nobody, and a daemon that was away has all machines again a moment after it is back. When a VMM dies, a *holder*, a process of the
//! machine's own, gets them, and answers at the machine's socket until somebody wants it to run or gives it up.
#![forbid(unsafe_code)]

mod agent;
mod client;
mod closer;
mod daemon;
mod entry;
mod holders;
mod limits;
mod metrics;
mod oom;
mod protocol;
mod remains;
mod replace;
mod sessions;
mod watch;

use std::process::ExitCode;

pub use agent::socket;
pub use client::Client;
pub use client::Preserved;

use clap::CommandFactory as _;
use clap::Parser;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// What this program is told to hold a machine.
const HOLD: &str = "hold";

/// Keeps the machines of this user against the death of their VMMs.
///
/// It finds them in the directory of this user's machines ($TIDEOVER_DIR, else $XDG_RUNTIME_DIR/tideover, else /run/tideover for root or
/// /tmp/tideover-UID), and agents of live update find it at luo-agent.socket there. `tideover status` says of a machine whether it is kept.
///
/// When a VMM dies, its machine is held: `tideover recover` has it run again, `tideover dump` writes its memory down, `tideover stop`
/// gives it up.
#[derive(Debug, Parser)]
#[command(
    name = "tideoverd",
    version,
    after_help = "\
Exit code: 0 if it was ended or replaced, 1 if it could not go on, 2 for a wrong command line.

Example: tideoverd --metrics 127.0.0.1:9464 &"
)]
struct Cli {
    /// Take over from the tideoverd that runs, which ends then. Nothing is lost in between.
    #[arg(long)]
    replace: bool,
    /// Serve metrics for Prometheus, by HTTP at /metrics of this address and port.
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<std::net::SocketAddr>,
    /// Have holders of machines started by who listens at this socket, and not by tideoverd itself: a service manager, which starts
    /// `tideoverd hold` with each connection as its standard input. So they and the VMMs that they start have none of the limits
    /// that tideoverd has.
    #[arg(long, value_name = "SOCKET")]
    holders: Option<std::path::PathBuf>,
}

/// The program: what its command line asks for.
pub fn main() -> ExitCode {
    log();
    let ended = match std::env::args_os().nth(1).is_some_and(|word| word == HOLD) {
        true => hold(),
        false => daemon::run(&Cli::parse()),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Its command line, for its man page and completions.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// This process is the machine's: it outlives who started it, and no key that is pressed there ends it.
fn hold() -> anyhow::Result<()> {
    rustix::thread::set_name(c"tideover-hold")?;
    match rustix::process::setsid() {
        // A service manager has seen to that.
        Ok(_) | Err(rustix::io::Errno::PERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    vmm::hold()
}

/// To standard error, each line with its fields; TIDEOVER_LOG says how much, as for the command.
fn log() {
    let asked = std::env::var("TIDEOVER_LOG").ok().and_then(|asked| asked.parse::<Targets>().ok());
    let filter = asked.unwrap_or_else(|| Targets::new().with_default(tracing::Level::INFO));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    tracing_subscriber::registry().with(lines).with(filter).init();
}
