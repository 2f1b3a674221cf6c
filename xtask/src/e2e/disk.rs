//! The disk of a case's host: a file with an empty file system, which outlives the host's kernels.

use std::fs;
use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;

use crate::cargo::Workspace;
use crate::e2e::programs;

/// Its size in bytes. What is not written to takes no room.
const SIZE_BYTES: u64 = 256 << 20;

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
    let mut make = Command::new("mkfs.ext4");
    make.env("PATH", programs::path()).args(["-q", "-F"]).arg(&disk).stdin(Stdio::null());
    let made = make.status().context("mkfs.ext4 cannot be run")?;
    ensure!(made.success(), "mkfs.ext4 {shown}: {made}");
    Ok(disk)
}
