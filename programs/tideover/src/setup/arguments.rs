//! What the command line says of `setup`.

use std::path::PathBuf;

use clap::Args;
use clap::Subcommand;
use clap::ValueEnum;
use serde::Serialize;

use crate::size;

/// Gets a host ready whose kernel cannot hand memory over: some of its memory is kept out of the kernel's reach, and outlives it.
///
/// What it is, and what can go wrong, is said in docs/reserved.md.
#[derive(Debug, Args)]
pub(crate) struct Setup {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Reserve(Reserve),
    Format(Format),
}

/// Chooses memory that kernels are to leave alone, and says which parameters have them do so.
///
/// The parameters work from the next boot on. They have to be given to every kernel that is booted by kexec from then on, too: one that
/// is not told uses the memory as its own. Nothing is written unless --write says so.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code: 0 if it was done, or with --check if all is there; 1 if not, 2 for a wrong command line.

Example: tideover setup reserve --size 8GiB
    tideover setup reserve --size 8GiB --as fsdax --write && update-grub && reboot
    tideover setup reserve --check")]
pub(crate) struct Reserve {
    /// How much, in whole 16 MiB.
    #[arg(long, value_name = "SIZE", required_unless_present = "check", value_parser = size::parse)]
    pub(crate) size: Option<u64>,
    /// Where, in whole 16 MiB [default: the lowest place above 4 GiB, else above 1 GiB].
    #[arg(long, value_name = "ADDRESS", requires = "size", value_parser = address)]
    pub(crate) at: Option<u64>,
    /// How it is given out [default: both are shown].
    #[arg(long = "as", value_enum, value_name = "FORM", requires = "size")]
    pub(crate) form: Option<Form>,
    /// Write it where the boot loader's configuration is made from, and have the modules loaded at boot.
    #[arg(long, requires = "form")]
    pub(crate) write: bool,
    /// After the boot: look whether the memory is set aside, and given out.
    #[arg(long, conflicts_with_all = ["size", "at", "form", "write"])]
    pub(crate) check: bool,
    /// Give the result as JSON (schema: docs/reserve.schema.json; with --check docs/check.schema.json).
    #[arg(long)]
    pub(crate) json: bool,
}

/// How reserved memory is given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Form {
    /// /dev/daxX.Y: for one machine, whole, without other tools.
    Devdax,
    /// /dev/pmemN: for a file system, with a file for each machine.
    Fsdax,
}

/// Gets a device of reserved memory ready for machines: /dev/pmemN gets a file system, /dev/daxX.Y the driver that lets it be mapped.
///
/// A file system is made once: after a kexec it is mounted again (mount -o dax=always). A driver is chosen in each kernel anew.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code: 0 if it was done, 1 if not, 2 for a wrong command line.

Example: tideover setup format /dev/pmem0 --mount /var/lib/tideover/reserved --yes
    tideover setup format /dev/dax0.0 --yes")]
pub(crate) struct Format {
    /// /dev/pmemN or /dev/daxX.Y.
    pub(crate) device: PathBuf,
    /// Mount the file system here, its files mapped without a page cache between. The directory is made if it is not there.
    #[arg(long, value_name = "DIR")]
    pub(crate) mount: Option<PathBuf>,
    /// Which file system.
    #[arg(long = "type", value_enum, value_name = "TYPE", default_value_t = FileSystem::Ext4)]
    pub(crate) kind: FileSystem,
    /// Make a file system though there is one, or something else that is known. What is there is lost.
    #[arg(long)]
    pub(crate) force: bool,
    /// Do it. Without this, what would be done is said, and nothing is.
    #[arg(long)]
    pub(crate) yes: bool,
}

/// File systems that map the files on such memory directly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FileSystem {
    Ext4,
    Xfs,
}

/// An address: hexadecimal with 0x, or a size as 6GiB.
fn address(text: &str) -> Result<u64, String> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).map_err(|error| error.to_string()),
        None => size::parse(text),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn nothing_is_written_without_a_form_and_nothing_is_checked_with_a_size() {
        let parses = |words: &[&str]| {
            let all = [&["tideover", "setup", "reserve"], words].concat();
            Cli::try_parse_from(all).is_ok()
        };
        assert!(parses(&["--size", "1GiB"]) && parses(&["--check", "--json"]));
        assert!(parses(&["--size", "1GiB", "--as", "devdax", "--write", "--at", "0x100000000"]));
        assert!(!parses(&[]) && !parses(&["--size", "1GiB", "--write"]));
        assert!(!parses(&["--check", "--size", "1GiB"]) && !parses(&["--check", "--as", "devdax"]));
        assert!(!parses(&["--size", "1GiB", "--at", "0xz"]));
    }

    #[test]
    fn addresses_are_read_in_either_form() {
        assert_eq!([address("0x40000000"), address("1GiB")], [Ok(1 << 30), Ok(1 << 30)]);
    }
}
