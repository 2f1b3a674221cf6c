//! Linux as a guest: updated while it checks its memory and its disk, without a kexec.

use anyhow::Context as _;
use anyhow::ensure;

use crate::boot;
use crate::boot::Life;
use crate::linux;
use crate::linux::Listener;
use crate::tideover;
use crate::tideover::PATIENCE;

use super::Then;

const MACHINE: &str = "vm1";
/// How many lines the guest has to say after each update.
const LINES: u64 = 5;

pub(crate) fn run(life: &Life) -> anyhow::Result<Then> {
    boot::mount_disk()?;
    linux::begin(MACHINE, &[])?;
    let listener = Listener::new(MACHINE)?;
    let mut last = listener.wait("the guest's first line", linux::BOOT, |_| true)?;
    let updates: u64 = life.with("updates", 2)?;
    for (_, carrier) in (0..updates).zip(["socket", "exec"].into_iter().cycle()) {
        tideover::update(MACHINE, carrier)?;
        last = listener.wait("a later line", PATIENCE, |said| said.disk >= last.disk + LINES)?;
        println!("{last}");
    }
    let counted = tideover::number(&tideover::status(MACHINE)?, "updates")?;
    ensure!(counted == updates, "updated {counted} times");
    tideover::run(&["stop", MACHINE])?;
    let said = listener.end()?;
    linux::goes_on(&said)?;
    linux::has_written(MACHINE, said.last().context("the guest said nothing")?)?;
    Ok(Then::End)
}
