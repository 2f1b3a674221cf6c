//! What the command shows to whoever tries it first.

use anyhow::ensure;

use crate::boot::Life;
use crate::tideover;

use super::Then;

pub(crate) fn run(life: &Life) -> anyhow::Result<Then> {
    let updates = life.with("updates", 2_u32)?.to_string();
    for carrier in ["socket", "exec"] {
        let found = tideover::json(&[
            "demo",
            "--memory",
            "64MiB",
            "--vcpus",
            "2",
            "--updates",
            &updates,
            "--carrier",
            carrier,
        ])?;
        ensure!(found["verified"] == true && found["guest"] == "kvm", "by {carrier}: {found}");
    }
    Ok(Then::End)
}
