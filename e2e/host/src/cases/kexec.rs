//! Machines whose host's kernel is replaced under them.

use std::path::Path;

use anyhow::Context as _;
use anyhow::bail;
use anyhow::ensure;
use serde_json::Value;

use crate::boot::Life;
use crate::boot::Next;
use crate::tideover;
use crate::tideover::number;

use super::Then;

/// How much the guest has to count between two looks.
const TICKS: u64 = 1000;

/// Machines, and how often their host's kernel is replaced.
struct Plan<'a> {
    machines: u32,
    arguments: &'a [&'a str],
    kexecs: u32,
}

/// One machine through two kernels.
pub(crate) fn one(life: &Life) -> anyhow::Result<Then> {
    Plan { machines: 1, arguments: &["--memory", "64MiB"], kexecs: 2 }.live(life)
}

/// Eight at once.
pub(crate) fn eight(life: &Life) -> anyhow::Result<Then> {
    Plan { machines: 8, arguments: &["--memory", "16MiB"], kexecs: 1 }.live(life)
}

/// Memory in pages of 4 KiB, of which the guest has touched a part.
pub(crate) fn small_pages(life: &Life) -> anyhow::Result<Then> {
    Plan { machines: 1, arguments: &["--memory", "64MiB", "--page-size", "4KiB", "--on-demand"], kexecs: 2 }
        .live(life)
}

/// One machine through twenty kernels.
pub(crate) fn twenty(life: &Life) -> anyhow::Result<Then> {
    Plan { machines: 1, arguments: &["--memory", "64MiB", "--vcpus", "2"], kexecs: 20 }.live(life)
}

/// A machine of 1 GiB: what is told of it is a figure.
pub(crate) fn gib(life: &Life) -> anyhow::Result<Then> {
    Plan { machines: 1, arguments: &["--memory", "1GiB"], kexecs: 3 }.live(life)
}

impl Plan<'_> {
    fn live(&self, life: &Life) -> anyhow::Result<Then> {
        let names = (1..=self.machines).map(|number| format!("m{number}"));
        let names: Vec<String> = names.collect();
        match life.number {
            1 => names.iter().try_for_each(|name| self.begin(name))?,
            _ => arrive(life, &names)?,
        }
        if life.number > self.kexecs {
            return end(&names);
        }
        leave(life)
    }

    fn begin(&self, name: &str) -> anyhow::Result<()> {
        let arguments = [&["run", name, "--through-kexec"], self.arguments].concat();
        let begun = tideover::json(&arguments)?;
        ensure!(begun["guest"] == "kvm", "not a guest of KVM: {begun}");
        tideover::wait_ticks(name, TICKS)?;
        Ok(())
    }
}

/// The verb that has the command boot the next life, at once.
pub(super) fn verb(next: &Next) -> anyhow::Result<Vec<&str>> {
    Ok([&orderly(next)?[..], &["--now"]].concat())
}

/// The same, by the host's service manager.
pub(super) fn orderly(next: &Next) -> anyhow::Result<Vec<&str>> {
    let path = |path: &'static Path| path.to_str().context("a path that is not UTF-8");
    let mut verb = vec!["kexec", "--kernel", path(next.kernel)?, "--cmdline", &next.command_line];
    if let Some(initrd) = next.initrd {
        verb.extend(["--initrd", path(initrd)?]);
    }
    Ok(verb)
}

/// Has the command boot the next life: it comes back only if it cannot.
pub(crate) fn leave(life: &Life) -> anyhow::Result<Then> {
    let said = tideover::run(&verb(&life.next()?)?)?;
    bail!("there was no kexec: {said}")
}

/// The same, without machines that cannot go.
pub(crate) fn leave_others(life: &Life) -> anyhow::Result<Then> {
    let said = tideover::run(&[&verb(&life.next()?)?[..], &["--leave-others"]].concat())?;
    bail!("there was no kexec: {said}")
}

/// The command does not, and says this.
pub(crate) fn refused(life: &Life, words: &str) -> anyhow::Result<()> {
    tideover::fails_with(&verb(&life.next()?)?, 1, words)
}

/// All machines are back, and what they tell of it.
pub(super) fn arrive(life: &Life, names: &[String]) -> anyhow::Result<()> {
    let reports = tideover::json(&["resume", "--all"])?;
    let reports = reports.as_array().context("no list of reports")?;
    let came = reports.len();
    ensure!(came == names.len(), "{came} of {} tell that they came back: {}", names.len(), tideover::logs());
    for name in names {
        let report = tideover::json(&["report", name])?;
        println!("{}", tideover::run(&["report", name])?);
        is_sound(&report[0])?;
        let status = tideover::status(name)?;
        ensure!(number(&status, "kexecs")? == u64::from(life.number) - 1, "{status}");
        ensure!(number(&status, "errors")? == 0, "the guest found errors: {status}");
        tideover::wait_ticks(name, TICKS)?;
    }
    Ok(())
}

/// The guest counted on, its clock is right, and the parts of the pause are all of it.
pub(super) fn is_sound(report: &Value) -> anyhow::Result<()> {
    ensure!(
        number(report, "ticks_after")? > number(report, "ticks_before")?,
        "it does not count on: {report}"
    );
    let field = |name: &str| report[name].as_f64().with_context(|| format!("no number {name} in {report}"));
    let pause = field("pause_us")?;
    let parts = report["phases_us"].as_array().context("no parts")?;
    let all: f64 = parts.iter().filter_map(|part| part[1].as_f64()).sum();
    ensure!((all - pause).abs() < 1000.0, "the parts are {all} us, the pause {pause} us: {report}");
    // Not how long the guest saw itself stand still: it records the latest gaps, and has so many here, where each first touch
    // of a page is one, that the pause may be gone from its record.
    keeps_time(report)
}

/// The guest's clock is right, as far as the host's are.
pub(crate) fn keeps_time(report: &Value) -> anyhow::Result<()> {
    if report["clock"] != "tsc" {
        // An emulator that is kept waiting while its kernel measures the TSC: its seconds are of another length than others'.
        println!("this host's clocks do not agree with each other: nothing is known of the guest's");
        return Ok(());
    }
    let error = report["clock_error_us"].as_f64().context("the guest has no clock")?;
    // Its clock and the host's are read one after the other, and others may have the processor meanwhile.
    ensure!(error.abs() < 500_000.0, "the guest's clock is wrong by {error} us");
    Ok(())
}

/// After all that, every byte is what it should be, and the machines can be updated as ever.
fn end(names: &[String]) -> anyhow::Result<Then> {
    for name in names {
        tideover::check(name)?;
        tideover::update(name, "socket")?;
        tideover::run(&["stop", name])?;
    }
    Ok(Then::End)
}
