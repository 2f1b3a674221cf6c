//! A machine of KVM in this host, updated while it runs, without a kexec.

use anyhow::ensure;

use crate::boot::Life;
use crate::tideover;
use crate::tideover::PATIENCE;
use crate::tideover::Started;
use crate::tideover::number;

use super::Then;

const MACHINE: &str = "m1";
/// How much the guest has to count between two looks.
const TICKS: u64 = 1000;

pub(crate) fn run(_life: &Life) -> anyhow::Result<Then> {
    let begun = begin(MACHINE)?;
    let console = Started::new(&["console", MACHINE])?;
    let mut before = tideover::wait_ticks(MACHINE, TICKS)?;
    for carrier in ["socket", "exec"] {
        tideover::update(MACHINE, carrier)?;
        let after = tideover::wait_ticks(MACHINE, TICKS)?;
        ensure!(after > before, "after {carrier}, {after} ticks; before, {before}");
        before = after;
        let heard = console.said().len();
        tideover::wait_for("a line of the guest", PATIENCE, || {
            Ok((console.said().len() > heard).then_some(()))
        })?;
    }
    let status = tideover::status(MACHINE)?;
    ensure!(number(&status, "errors")? == 0, "the guest found errors: {status}");
    ensure!(status["identity"] == begun["identity"], "another machine: {status}");
    ensure!(number(&status, "updates")? == 2, "not updated twice: {status}");
    tideover::run(&["stop", MACHINE])?;
    ensure!(!tideover::is_alive(number(&status, "pid")?), "its VMM lives on");
    is_counting(&console.wait()?)?;
    is_dead_when_killed()?;
    Ok(Then::End)
}

fn begin(machine: &str) -> anyhow::Result<serde_json::Value> {
    let begun = tideover::json(&["run", machine, "--memory", "64MiB"])?;
    ensure!(begun["guest"] == "kvm", "not a guest of KVM: {begun}");
    Ok(begun)
}

/// Each line of the guest says more than the one before.
fn is_counting(lines: &[String]) -> anyhow::Result<()> {
    let ticks = |line: &String| line.strip_prefix("pulse ").and_then(|ticks| ticks.parse::<u64>().ok());
    let ticks: Vec<_> = lines.iter().map(ticks).collect();
    ensure!(ticks.iter().all(Option::is_some) && ticks.is_sorted_by(|one, other| one < other), "{lines:?}");
    Ok(())
}

fn is_dead_when_killed() -> anyhow::Result<()> {
    let begun = begin("m2")?;
    tideover::kill(number(&begun, "pid")?)?;
    let all = tideover::json(&["ls"])?;
    ensure!(all[0]["name"] == "m2" && all[0]["state"] == "dead", "{all}");
    Ok(())
}
