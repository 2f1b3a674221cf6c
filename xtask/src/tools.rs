//! Programs that the checks need and a machine may lack: built once, below `target/`, so that the machine stays
//! as it is.

use std::ffi::OsStr;
use std::ffi::OsString;
use std::path::Path;
use std::process::Stdio;

use anyhow::Context as _;
use anyhow::Result;

use crate::Verdict;
use crate::cargo;
use crate::cargo::Workspace;

/// Calls `act` with a PATH on which cargo-deny is, or with none where it is on the usual one.
pub(crate) fn with_cargo_deny(act: impl FnOnce(Option<&OsStr>) -> Verdict) -> Verdict {
    if has_cargo_deny(None) {
        return act(None);
    }
    let tools = Workspace::read()?.target_directory.join("tools");
    let path = path_with(&tools.join("bin"))?;
    if !has_cargo_deny(Some(&path)) {
        println!("cargo-deny is not installed: building it into {} (once, a few minutes)", tools.display());
        let status = cargo::command()
            .args(["install", "cargo-deny", "--locked", "--root"])
            .arg(&tools)
            // Not in the workspace's own build: that has other settings.
            .env_remove("CARGO_TARGET_DIR")
            .stdin(Stdio::null())
            .status()
            .context("cargo install cannot be run")?;
        if !status.success() {
            println!("cargo install cargo-deny --locked: {status}");
            return Ok(false);
        }
    }
    act(Some(&path))
}

fn path_with(folder: &Path) -> Result<OsString> {
    let usual = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(folder.to_owned()).chain(std::env::split_paths(&usual));
    std::env::join_paths(folders).context("the target folder's name cannot be on PATH")
}

fn has_cargo_deny(path: Option<&OsStr>) -> bool {
    let mut command = cargo::command();
    if let Some(path) = path {
        command.env("PATH", path);
    }
    command.args(["deny", "--version"]);
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}
