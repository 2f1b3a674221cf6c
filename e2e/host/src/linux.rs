//! Linux as the guest of a machine, with a disk, which says how it goes.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use anyhow::ensure;
use e2e_guest::Said;

use crate::boot::DISK_AT;
use crate::tideover;
use crate::tideover::Started;

/// Its memory, as `tideover` reads it.
const MEMORY: &str = "192MiB";
const DISK_BYTES: u64 = 16 << 20;
/// Without XSAVE: in QEMU's emulation (7.2) a Linux that uses it as a guest finds areas of the wrong size, and crashes.
const COMMAND_LINE: &str = "console=ttyS0 quiet noxsave kho=off";
/// What the guest says when it cannot go on.
const FAILED: &str = "guest: FAILED";
/// A kernel boots here inside of an emulated one.
pub(crate) const BOOT: Duration = Duration::from_secs(120);

/// The file that is the machine's disk, on the disk that outlives the host's kernels.
pub(crate) fn disk(machine: &str) -> PathBuf {
    PathBuf::from(format!("{DISK_AT}/{machine}.img"))
}

/// Starts such a machine, with a disk of zeros, and with these arguments besides.
pub(crate) fn begin(machine: &str, besides: &[&str]) -> anyhow::Result<()> {
    File::create_new(disk(machine))?.set_len(DISK_BYTES)?;
    let disk = format!("{DISK_AT}/{machine}.img");
    let hardware = ["run", machine, "--memory", MEMORY, "--disk", &disk];
    let software = ["--kernel", "/boot/kernel", "--initrd", "/boot/guest.cpio", "--cmdline", COMMAND_LINE];
    tideover::run(&[&hardware[..], &software, besides].concat())?;
    Ok(())
}

/// What is heard of it on its serial line.
pub(crate) struct Listener(Started);

impl Listener {
    pub(crate) fn new(machine: &str) -> anyhow::Result<Self> {
        Started::new(&["console", machine]).map(Self)
    }

    /// Waits until it says what is waited for.
    pub(crate) fn wait(
        &self,
        what: &str,
        patience: Duration,
        wanted: impl Fn(&Said) -> bool,
    ) -> anyhow::Result<Said> {
        tideover::wait_for(what, patience, || {
            let said = self.0.said();
            if let Some(line) = said.iter().find(|line| line.starts_with(FAILED)) {
                bail!("{line}");
            }
            Ok(said.iter().rev().find_map(|line| Said::parse(line)).filter(|said| wanted(said)))
        })
        .inspect_err(|_| self.0.said().iter().rev().take(15).rev().for_each(|line| println!("{line}")))
    }

    /// Waits until the machine ends, and gives all that was heard.
    pub(crate) fn end(self) -> anyhow::Result<Vec<Said>> {
        Ok(self.0.wait()?.iter().filter_map(|line| Said::parse(line)).collect())
    }
}

/// Each line goes on from the one before, and none says that something was lost.
pub(crate) fn goes_on(said: &[Said]) -> anyhow::Result<()> {
    let next = |one: &Said, other: &Said| {
        let more = other.count > one.count && other.passes >= one.passes && other.up_ms > one.up_ms;
        more && other.disk == one.disk + 1
    };
    ensure!(said.len() > 1 && said.is_sorted_by(next), "lines are missing: {said:?}");
    ensure!(said.iter().all(|said| said.errors == 0), "the guest found errors: {said:?}");
    Ok(())
}

/// All that the guest says that it has written is in the file that is the machine's disk, and at most what it wrote then.
pub(crate) fn has_written(machine: &str, said: &Said) -> anyhow::Result<()> {
    let found = e2e_guest::whole_records(&std::fs::read(disk(machine))?, said.disk)?;
    ensure!(found <= said.disk + 1, "{found} records are on the disk, {said}");
    Ok(())
}
