//! What `tideover check` finds in a host that can carry machines, and where something is amiss.

use anyhow::Context as _;
use anyhow::ensure;
use liveupdate::Device;
use liveupdate::Name;
use serde_json::Value;

use crate::boot::Life;
use crate::boot::Next;
use crate::tideover;

use super::Then;

/// Sessions that go into one of the kernel's blocks.
const BLOCK: usize = 51;

pub(crate) fn run(life: &Life) -> anyhow::Result<Then> {
    let next = life.next()?;
    all_is_well(&next)?;
    if life.number == 2 {
        return Ok(Then::End);
    }
    a_machine_can_go()?;
    who_has_the_device_is_named()?;
    sessions_are_seen()?;
    Ok(Then::NextLife)
}

/// What is found, whatever the verdict.
fn check(arguments: &[&str]) -> anyhow::Result<Value> {
    let output = tideover::output(&[&["check", "--json"], arguments].concat())?;
    let found: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{}{}", output.status, String::from_utf8_lossy(&output.stderr)))?;
    let failed = found["verdict"] == "failure";
    ensure!(output.status.code() == Some(i32::from(failed)), "{}: {found:#}", output.status);
    Ok(found)
}

/// Checks that something was found at this level, and in these words.
fn finds(found: &Value, id: &str, level: &str, words: &str) -> anyhow::Result<()> {
    let findings = found["findings"].as_array().context("no findings")?;
    let finding = findings.iter().find(|finding| finding["id"] == id);
    let finding = finding.with_context(|| format!("no {id}: {found:#}"))?;
    let said = finding["found"].as_str().context("it says nothing")?;
    ensure!(finding["level"] == level && said.contains(words), "not {level} with `{words}`: {finding:#}");
    Ok(())
}

fn all_is_well(next: &Next) -> anyhow::Result<()> {
    let path = |path: &'static std::path::Path| path.to_str().context("a path that is not UTF-8");
    let (kernel, initrd) = (path(next.kernel)?, path(next.initrd.context("no initial file system")?)?);
    let arguments = ["--kernel", kernel, "--initrd", initrd, "--cmdline", &next.command_line];
    println!("{}", tideover::run(&[&["check"], &arguments[..]].concat())?);
    let found = check(&arguments)?;
    let wanted = [
        ("kernel_version", "Linux "),
        ("kernel_configuration", "/proc/config.gz"),
        ("kernel_command_line", "liveupdate=on"),
        ("clock", "the TSC"),
        ("device_open", "takes sessions"),
        ("preserves_memfd", "preserved by"),
        ("preserves_hugetlb", "not preserved by this kernel"),
        ("preserves_vm", "not preserved by this kernel"),
        ("sessions", "none"),
        ("scratch_memory", "32 MiB, 96 MiB, 32 MiB (/sys/kernel/debug/kho/out/scratch_len)"),
        ("kexec_rights", "CAP_SYS_BOOT"),
        ("kexec_call", "may call it"),
        ("kexec_loaded", "none"),
        ("next_image", "Linux "),
        ("next_version", "the very build"),
        ("next_formats", "the same"),
        ("next_configuration", "in the image"),
        ("next_command_line", "turns handover and live update on"),
        ("next_fits", "which leaves"),
    ];
    wanted.into_iter().try_for_each(|(id, words)| finds(&found, id, "ok", words))?;
    ensure!(found["verdict"] == "ok", "not all is well: {found:#}");
    // It has left nothing behind, and the device can be had.
    let device = Device::open().context("after the check")?;
    drop(device);
    Ok(())
}

fn a_machine_can_go() -> anyhow::Result<()> {
    tideover::json(&["run", "m1", "--guest", "thread", "--memory", "16MiB", "--through-kexec"])?;
    let found = check(&["m1"])?;
    for id in ["machine_answers", "machine_store", "machine_seals", "machine_through_kexec", "machine_cgroup"]
    {
        finds(&found, id, "ok", "")?;
    }
    finds(&found, "machine_holes", "ok", "")?;
    tideover::run(&["stop", "m1"])?;
    Ok(())
}

fn who_has_the_device_is_named() -> anyhow::Result<()> {
    let device = Device::open()?;
    let found = check(&[])?;
    finds(&found, "device_open", "failure", "process 1 (")?;
    drop(device);
    finds(&check(&[])?, "device_open", "ok", "")
}

fn sessions_are_seen() -> anyhow::Result<()> {
    let device = Device::open()?;
    let make = |number| Ok(device.create(&Name::new(format!("s {number:02}").as_bytes())?)?);
    let mut sessions = (0..BLOCK).map(make).collect::<anyhow::Result<Vec<_>>>()?;
    drop(device);
    finds(&check(&[])?, "sessions", "warning", "51 open: s 00 (process 1)")?;
    sessions.pop();
    finds(&check(&[])?, "sessions", "ok", "50 open")
}
