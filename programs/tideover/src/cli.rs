//! What the command line says.

use std::path::PathBuf;

use clap::Args;
use clap::Parser;
use clap::Subcommand;
use clap::ValueEnum;

use crate::size;

/// Replaces the VMM under a running guest, its memory kept in place.
#[derive(Debug, Parser)]
#[command(version, after_help = "TIDEOVER_LOG=debug shows what happens, on standard error.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Demo(Demo),
    #[command(hide = true)]
    Vmm(Vmm),
}

/// Starts a guest, replaces its VMM a few times, and proves that no byte was lost.
///
/// The guest counts, writes patterns over all of its memory, checks them again and again, and measures its own
/// longest pause. At the end the guest has to have checked every page, and so has the host. Needs
/// /dev/kvm; without it, a thread plays the guest.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code: 0 if every update succeeded and no byte was lost, 1 otherwise, 2 for a wrong command line.

Example: tideover demo --memory 4GiB --updates 10 --json")]
pub(crate) struct Demo {
    /// Guest memory: 4MiB to 64GiB, in whole 2 MiB.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size::guest_memory)]
    pub(crate) memory: u64,
    /// How many times to replace the VMM.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) updates: u32,
    /// Which guest; kvm if there is /dev/kvm.
    #[arg(long, value_enum)]
    pub(crate) guest: Option<Guest>,
    /// Page size of the guest's memory; huge as far as they can be had.
    #[arg(long, value_enum, default_value_t = PageSize::Auto)]
    pub(crate) page_size: PageSize,
    /// Leave the guest's pages to its first touch.
    #[arg(long)]
    pub(crate) on_demand: bool,
    /// Do not enter the guest's pages into the successor's page tables before the pause.
    #[arg(long)]
    pub(crate) no_populate: bool,
    /// Give the result as JSON (schema: docs/demo.schema.json).
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Guest {
    /// A VM of KVM with one vCPU.
    Kvm,
    /// A thread of the VMM, which needs no right and no hardware.
    Thread,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PageSize {
    /// 2 MiB, as far as they can be had.
    Auto,
    /// 4 KiB.
    #[value(name = "4KiB")]
    Small,
    /// 2 MiB, as far as they can be had.
    #[value(name = "2MiB")]
    Huge,
}

/// Runs as the VMM of one machine. Started by other verbs, not by hand.
#[derive(Debug, Args)]
pub(crate) struct Vmm {
    #[command(subcommand)]
    pub(crate) life: Life,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Life {
    /// Make a machine; the control channel is standard input.
    Run {
        /// The machine, as JSON.
        #[arg(long)]
        spec: String,
    },
    /// Take a machine over from the VMM at the other end of standard input.
    Succeed {
        /// Connect to the VMM that listens here instead.
        #[arg(long, value_name = "PATH")]
        connect: Option<PathBuf>,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_demo_defaults_to_a_gib_and_five_updates() {
        let Command::Demo(demo) = Cli::parse_from(["tideover", "demo"]).command else { panic!("demo") };
        assert_eq!((demo.memory, demo.updates, demo.json), (1 << 30, 5, false));
        let parse = |arguments: &[&str]| Cli::try_parse_from([&["tideover", "demo"], arguments].concat());
        assert!(parse(&["--updates", "0"]).is_err());
        assert!(parse(&["--memory", "much"]).is_err());
        assert!(parse(&["--page-size", "4KiB", "--guest", "thread"]).is_ok());
    }
}
