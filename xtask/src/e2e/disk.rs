//! The disk of a case's host: a file with an empty file system, which outlives the host's kernels.

use std::ffi::OsString;
use std::fs;
use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;

use crate::cargo::Workspace;

/// Its size in bytes. What is not written to takes no room.
const SIZE_BYTES: u64 = 256 << 20;
/// Where a user may not look for programs, and root does.
const ROOTS_PROGRAMS: &str = "/usr/sbin:/sbin";

/// Makes it anew, below the workspace's target folder.
pub(crate) fn make(case: &str) -> Result<PathBuf> {
    let disk = Workspace::read()?.target_directory.join(format!("e2e-{case}.disk"));
    let shown = disk.display();
    // What a run before has left in it would take room.
    if disk.exists() {
        fs::remove_file(&disk).with_context(|| format!("cannot remove {shown}"))?;
    }
    let file = File::create(&disk).and_then(|file| file.set_len(SIZE_BYTES));
    file.with_context(|| format!("cannot make {shown}"))?;
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(OsString::from(format!(":{ROOTS_PROGRAMS}")));
    let made = Command::new("mkfs.ext4")
        .env("PATH", path)
        .args(["-q", "-F"])
        .arg(&disk)
        .stdin(Stdio::null())
        .status();
    let made =
        made.context("mkfs.ext4 cannot be run: `apt-get install --no-install-recommends e2fsprogs`")?;
    ensure!(made.success(), "mkfs.ext4 {shown}: {made}");
    Ok(disk)
}
