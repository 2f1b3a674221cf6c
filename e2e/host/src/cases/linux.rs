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

pub(crate) fn run(_life: &Life) -> anyhow::Result<Then> {
    boot::mount_disk()?;
    linux::begin(MACHINE, &[])?;
    let listener = Listener::new(MACHINE)?;
    let mut last = listener.wait("the guest's first line", linux::BOOT, |_| true)?;
    for carrier in ["socket", "exec"] {
        tideover::update(MACHINE, carrier)?;
        last = listener.wait("a later line", PATIENCE, |said| said.disk >= last.disk + LINES)?;
        println!("{last}");
    }
    let updates = tideover::number(&tideover::status(MACHINE)?, "updates")?;
    ensure!(updates == 2, "updated {updates} times");
    tideover::run(&["stop", MACHINE])?;
    let said = listener.end()?;
    linux::goes_on(&said)?;
    linux::has_written(MACHINE, said.last().context("the guest said nothing")?)?;
    Ok(Then::End)
}
