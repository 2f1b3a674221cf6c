//! Where the machines of this user are, and how to reach one by its name.

use std::fs::DirBuilder;
use std::fs::File;
use std::fs::OpenOptions;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::bail;
use fdpass::ConnectError;
use fdpass::Deadline;
use rustix::process::geteuid;
use thiserror::Error;

use crate::control::Client;

/// What a control socket's file is called behind the machine's name.
pub const SOCKET: &str = ".sock";
/// How long a VMM may take to accept a connection.
const ACCEPT: Duration = Duration::from_secs(5);
/// As long as a session's name, and short enough for a socket's file.
const MAX_NAME: usize = 63;
/// The flag of a socket that listens, in /proc/net/unix.
const LISTENS: &str = "00010000";

/// There is no machine of this name.
#[derive(Debug, Error)]
#[error("there is no machine {name}: `tideover ls` lists those that there are")]
pub struct NoMachine {
    name: String,
}

/// The directory of this user's machines.
#[must_use]
pub fn directory() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(directory) = variable("TIDEOVER_DIR") {
        return directory;
    }
    if let Some(runtime) = variable("XDG_RUNTIME_DIR") {
        return runtime.join("tideover");
    }
    match geteuid() {
        user if user.is_root() => PathBuf::from("/run/tideover"),
        user => PathBuf::from(format!("/tmp/tideover-{}", user.as_raw())),
    }
}

/// The directory, made if it is not there. That it is private is checked where a socket is made in it.
///
/// # Errors
/// If it cannot be made.
pub fn make_directory() -> anyhow::Result<PathBuf> {
    let directory = directory();
    make(&directory)?;
    Ok(directory)
}

/// Makes a private directory if it is not there.
///
/// # Errors
/// If it cannot be made.
pub fn make(directory: &Path) -> anyhow::Result<()> {
    let made = DirBuilder::new().mode(0o700).recursive(true).create(directory);
    made.with_context(|| format!("cannot make the directory {}", directory.display()))
}

/// Checks a name before a file is called so.
///
/// # Errors
/// If it is none.
pub fn check_name(name: &str) -> anyhow::Result<()> {
    let fits = (1..=MAX_NAME).contains(&name.len());
    let letters = name.chars().all(|letter| letter.is_ascii_alphanumeric() || "._-".contains(letter));
    if fits && letters && !name.starts_with(['.', '-']) {
        return Ok(());
    }
    bail!(
        "`{}` is no name for a machine: 1 to {MAX_NAME} letters, digits, `.`, `_` and `-`, the first of them a letter, a \
         digit or `_`",
        name.escape_debug()
    )
}

/// Where the machine of this name is controlled.
#[must_use]
pub fn socket(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}{SOCKET}"))
}

/// What a machine's VMMs have to say goes on where the last one's ended.
///
/// # Errors
/// If the file cannot be opened.
pub fn log(directory: &Path, name: &str) -> anyhow::Result<File> {
    let path = directory.join(format!("{name}.log"));
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    file.with_context(|| format!("cannot write the log {}", path.display()))
}

/// Connects to a machine's VMM.
///
/// # Errors
/// [`NoMachine`], or why its VMM cannot be reached.
pub fn connect(name: &str) -> anyhow::Result<Client> {
    check_name(name)?;
    let channel = match fdpass::connect(&socket(&directory(), name), Deadline::after(ACCEPT)) {
        Ok(channel) => channel,
        Err(ConnectError::Absent { .. } | ConnectError::Refused { .. }) => {
            return Err(NoMachine { name: name.to_owned() }.into());
        }
        Err(error) => return Err(error.into()),
    };
    channel.require_same_user().with_context(|| format!("the VMM of {name} is not to be trusted"))?;
    Ok(Client::new(channel))
}

/// The process that listens for a machine, if it is one that may be looked at.
///
/// A socket is bound by way of its directory's descriptor, so the kernel tells the end of its path alone. Whoever listens has
/// the directory open as well.
#[must_use]
pub fn process(name: &str) -> Option<u32> {
    let directory = std::fs::canonicalize(directory()).ok()?;
    let end = format!("/{name}{SOCKET}");
    let table = std::fs::read_to_string("/proc/net/unix").ok()?;
    let sockets = table.lines().filter_map(|line| {
        // Slot, references, protocol, flags, type, state, inode; then the path.
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, _, _, LISTENS, _, _, inode, .., path] = fields[..] else { return None };
        path.ends_with(&end).then(|| PathBuf::from(format!("socket:[{inode}]")))
    });
    let sockets: Vec<PathBuf> = sockets.collect();
    let processes = std::fs::read_dir("/proc").ok()?;
    let numbers = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    numbers.into_iter().find(|pid: &u32| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let open: Vec<PathBuf> = files.filter_map(|file| std::fs::read_link(file.path()).ok()).collect();
        open.contains(&directory) && sockets.iter().any(|socket| open.contains(socket))
    })
}

/// Names of all machines, also of those whose VMM has died: their sockets are still there.
///
/// # Errors
/// If the directory cannot be read.
pub fn names() -> anyhow::Result<Vec<String>> {
    let directory = directory();
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", directory.display())),
    };
    let files = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> =
        files.filter_map(|file| file.strip_suffix(SOCKET).map(str::to_owned)).collect();
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_be_a_file_and_nothing_else() {
        for good in ["a", "web-1", "_x.y", &"n".repeat(63)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "ä", "a\n", &"n".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
