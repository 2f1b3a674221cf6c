//! Linux as the guest of a host whose kernel is replaced under it twice: its memory, its disk, and a file of the host's.

use std::fs;

use anyhow::Context as _;
use anyhow::ensure;

use crate::boot;
use crate::boot::DISK_AT;
use crate::boot::Life;
use crate::linux;
use crate::linux::Listener;
use crate::tideover;
use crate::tideover::PATIENCE;

use super::Then;
use super::kexec;

const MACHINE: &str = "vm1";
/// How many lines the guest has to say in each life.
const LINES: u64 = 5;
const LIVES: u32 = 3;

pub(crate) fn run(life: &Life) -> anyhow::Result<Then> {
    boot::mount_disk()?;
    if life.number == 1 {
        linux::begin(MACHINE, &["--through-kexec"])?;
    } else {
        for before in 1..life.number {
            let text = fs::read(host_file(before)).context("the host's file is gone")?;
            ensure!(text == host_text(before), "the host's file of life {before} has other bytes");
        }
        let reports = tideover::json(&["resume", "--all"])?;
        println!("{}", tideover::run(&["report", MACHINE])?);
        kexec::keeps_time(&reports[0])?;
    }
    let listener = Listener::new(MACHINE)?;
    let first = listener.wait("a line of the guest", linux::BOOT, |_| true)?;
    let last = listener.wait("a later line", PATIENCE, |said| said.disk >= first.disk + LINES)?;
    println!("{last}");
    if life.number < LIVES {
        drop(listener);
        // Not written back by anybody but the kexec.
        fs::write(host_file(life.number), host_text(life.number))?;
        return kexec::leave(life);
    }
    tideover::run(&["stop", MACHINE])?;
    let said = listener.end()?;
    linux::goes_on(&said)?;
    linux::has_written(MACHINE, said.last().context("the guest said nothing")?)?;
    Ok(Then::End)
}

fn host_file(life: u32) -> String {
    format!("{DISK_AT}/host{life}")
}

fn host_text(life: u32) -> Vec<u8> {
    format!("life {life}\n").repeat(100_000).into_bytes()
}
