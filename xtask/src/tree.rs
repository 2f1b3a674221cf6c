//! The files of the tree: what git tracks, and what it would if it were added.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The files under `root`, by paths relative to it, in order; those that git ignores are left out.
pub(crate) fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("git")
        .current_dir(root)
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
        .stderr(Stdio::inherit())
        .output()
        .context("git cannot be run; it is asked which files belong to the tree")?;
    if !output.status.success() {
        bail!("git ls-files failed: {}", output.status);
    }
    let mut files = Vec::new();
    for name in output.stdout.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = str::from_utf8(name)
            .with_context(|| format!("a file's name is not UTF-8: {}", name.escape_ascii()))?;
        // One that is deleted, but not in the index yet, is not a file; nor is a link.
        if root.join(name).symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
            files.push(PathBuf::from(name));
        }
    }
    files.sort();
    files.dedup();
    if files.is_empty() {
        bail!("git knows no file under {}", root.display());
    }
    Ok(files)
}

/// The text of a file, or `None` if it is not text.
pub(crate) fn text(root: &Path, file: &Path) -> Result<Option<String>> {
    let bytes =
        std::fs::read(root.join(file)).with_context(|| format!("{} cannot be read", file.display()))?;
    Ok(String::from_utf8(bytes).ok())
}
