//! Machines that lie in memory which the kernel leaves alone, on a kernel that knows nothing of them.
//!
//! | life | what ends it | what the next one finds |
//! | --- | --- | --- |
//! | 1 | `tideover kexec` | machines that run on |
//! | 2 | the same, after a VMM was killed and its machine booted anew | the same |
//! | 3 | another kernel, of which no machine is told | memory that is later than any state |
//! | 4 | the end of the case | |

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use anyhow::ensure;
use serde_json::Value;

use crate::boot;
use crate::boot::DISK_AT;
use crate::boot::Life;
use crate::dax;
use crate::tideover;
use crate::tideover::number;

use super::Then;
use super::kexec;

/// How much a guest has to count between two looks.
const TICKS: u64 = 500;
/// The exit codes of what was refused, and of a machine that is held.
const REFUSED: i32 = 1;
const HELD: i32 = 6;
const LIVES: u32 = 4;
/// How often `path-twenty` has its kernel replaced.
const KEXECS: u32 = 20;

/// Where machines lie.
struct Ground {
    /// Their names, and where each is.
    machines: &'static [(&'static str, &'static str)],
    /// Where all of them are found.
    all: &'static str,
    /// What a path says that has no machine any more.
    empty: &'static str,
}

const FILES: Ground = Ground {
    machines: &[("m1", "/pmem/m1"), ("m2", "/pmem/m2")],
    all: dax::AT,
    empty: "cannot look at /pmem/",
};
const DEVICE: Ground =
    Ground { machines: &[("m1", dax::DEVICE)], all: dax::DEVICE, empty: "no machine lies at /dev/dax0.0" };

/// Two of them in files on ext4 with DAX.
pub(crate) fn ext4(life: &Life) -> anyhow::Result<Then> {
    dax::mount(life)?;
    FILES.live(life)
}

/// One that has a device.
pub(crate) fn devdax(life: &Life) -> anyhow::Result<Then> {
    dax::show_device()?;
    DEVICE.live(life)
}

/// One in a file through twenty kernels.
pub(crate) fn twenty(life: &Life) -> anyhow::Result<Then> {
    dax::mount(life)?;
    boot::mount_disk()?;
    let (name, path) = ("m1", "/pmem/m1");
    if life.number == 1 {
        begin(name, path, "16MiB")?;
    } else {
        tideover::run(&["resume", "--path", path])?;
        arrived(name, u64::from(life.number) - 1)?;
    }
    if life.number > KEXECS {
        tideover::run(&["stop", name])?;
        return Ok(Then::End);
    }
    kexec::leave(life)
}

impl Ground {
    fn live(&self, life: &Life) -> anyhow::Result<Then> {
        boot::mount_disk()?;
        match life.number {
            1 => {
                self.machines.iter().try_for_each(|(name, path)| begin(name, path, memory(name)))?;
                kexec::leave(life)
            }
            2 => {
                self.arrive(1)?;
                // The next VMM has to leave a trace of its own.
                self.machines.iter().try_for_each(|(name, _)| tideover::update(name, "socket"))?;
                let (name, path) = self.machines[0];
                killed(name, path)?;
                kexec::leave(life)
            }
            3 => {
                self.arrive(2)?;
                Ok(Then::NextLife)
            }
            _ => {
                ensure!(life.number == LIVES, "there is no life {}", life.number);
                self.machines.iter().try_for_each(|(name, path)| came_too_late(name, path))?;
                self.end()
            }
        }
    }

    /// All are back, and what they tell of it.
    fn arrive(&self, kexecs: u64) -> anyhow::Result<()> {
        let reports = tideover::json(&["resume", "--all", "--path", self.all])?;
        let reports = reports.as_array().context("no list of reports")?;
        let (came, machines) = (reports.len(), self.machines.len());
        ensure!(came == machines, "{came} of {machines} tell that they came back: {}", tideover::logs());
        self.machines.iter().try_for_each(|(name, _)| arrived(name, kexecs))
    }

    /// What is stopped leaves nothing behind.
    fn end(&self) -> anyhow::Result<Then> {
        for (name, path) in self.machines {
            tideover::update(name, "exec")?;
            tideover::check(name)?;
            tideover::run(&["stop", name])?;
            tideover::fails_with(&["resume", "--path", path], REFUSED, self.empty)?;
        }
        Ok(Then::End)
    }
}

/// The second one is larger: how long it stands still is not to depend on that.
fn memory(name: &str) -> &'static str {
    if name == "m1" { "64MiB" } else { "192MiB" }
}

fn begin(name: &str, path: &str, memory: &str) -> anyhow::Result<()> {
    let begun = tideover::json(&["run", name, "--memory", memory, "--path", path])?;
    ensure!(begun["guest"] == "kvm" && begun["store"] == "path" && begun["path"] == path, "{begun}");
    tideover::wait_ticks(name, TICKS)?;
    keep(&begun)
}

/// Writes down whose life goes on, and how far it has come.
fn keep(status: &Value) -> anyhow::Result<()> {
    let name = status["name"].as_str().context("a machine without a name")?;
    fs::write(file(name), status.to_string()).context("cannot write what was")
}

fn written(name: &str) -> anyhow::Result<Value> {
    let bytes = fs::read(file(name)).with_context(|| format!("nothing is written down of {name}"))?;
    Ok(serde_json::from_slice(&bytes)?)
}

fn file(name: &str) -> String {
    format!("{DISK_AT}/{name}.json")
}

/// The machine is what it was in the life before, and its report is right.
fn arrived(name: &str, kexecs: u64) -> anyhow::Result<()> {
    let report = tideover::json(&["report", name])?;
    println!("{}", tideover::run(&["report", name])?);
    kexec::is_sound(&report[0])?;
    let status = is_the_same(name)?;
    ensure!(number(&status, "kexecs")? == kexecs, "{status}");
    let before = written(name)?;
    ensure!(number(&status, "ticks")? > number(&before, "ticks")?, "it was {before}, and is {status}");
    tideover::wait_ticks(name, TICKS)?;
    tideover::check(name)?;
    keep(&tideover::status(name)?)
}

/// It has the identity that was written down, and its guest no complaints.
fn is_the_same(name: &str) -> anyhow::Result<Value> {
    let before = written(name)?;
    let status = tideover::status(name)?;
    ensure!(status["identity"] == before["identity"], "it was {before}, and is {status}");
    ensure!(number(&status, "errors")? == 0, "the guest found errors: {status}");
    Ok(status)
}

/// Its VMM dies, and nobody has it but its path.
fn killed(name: &str, path: &str) -> anyhow::Result<()> {
    tideover::fails_with(&["resume", "--path", path], REFUSED, "is in use")?;
    tideover::kill(number(&tideover::status(name)?, "pid")?)?;
    held_and_booted(name, path)
}

/// The kernel went under it, and it was told nothing: what its vCPUs had is lost.
fn came_too_late(name: &str, path: &str) -> anyhow::Result<()> {
    ensure!(Path::new(path).exists(), "{path} is gone");
    held_and_booted(name, path)
}

fn held_and_booted(name: &str, path: &str) -> anyhow::Result<()> {
    tideover::fails_with(&["resume", "--path", path], HELD, "its memory is whole")?;
    let held = tideover::status(name)?;
    ensure!(held["state"] == "held" && held["complete"] == false, "{held}");
    tideover::run(&["recover", name, "--else", "boot"])?;
    tideover::wait_ticks(name, TICKS)?;
    let status = is_the_same(name)?;
    let before = written(name)?;
    ensure!(
        number(&status, "recoveries")? == number(&before, "recoveries")? + 1,
        "it was {before}, and is {status}"
    );
    tideover::check(name)?;
    keep(&tideover::status(name)?)
}
