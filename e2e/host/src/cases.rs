//! The cases.

mod agents;
mod called_off;
mod check;
mod demo;
mod device;
mod fdstore;
mod kexec;
mod kexec_linux;
mod kexec_systemd;
mod kills;
mod linux;
mod machine;
mod memfd;
mod oom;
mod path;
mod stock;
mod tideoverd_systemd;

use anyhow::bail;

pub(crate) use self::kexec_systemd::LINGER;
pub(crate) use self::kexec_systemd::linger;
pub(crate) use self::oom::HOG;
pub(crate) use self::oom::hog;

use crate::boot::Life;

/// What is to come after a life of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// Nothing: the case is done.
    End,
    /// The same kernel, booted by kexec.
    NextLife,
    /// The same, booted by the host's service manager, which was asked to.
    Orderly,
}

/// A case, which is run once in each life of its host.
type Case = fn(&Life) -> anyhow::Result<Then>;

const CASES: &[(&str, Case)] = &[
    ("agents", agents::run),
    ("check", check::run),
    ("demo", demo::run),
    ("device", device::run),
    ("fdstore", fdstore::run),
    ("kexec", kexec::one),
    ("kexec-called-off", called_off::run),
    ("kexec-eight", kexec::eight),
    ("kexec-gib", kexec::gib),
    ("kexec-kills", kills::run),
    ("kexec-linux", kexec_linux::run),
    ("kexec-small-pages", kexec::small_pages),
    ("kexec-systemd", kexec_systemd::run),
    ("kexec-twenty", kexec::twenty),
    ("linux", linux::run),
    ("machine", machine::run),
    ("memfd", memfd::run),
    ("oom", oom::run),
    ("path-devdax", path::devdax),
    ("path-ext4", path::ext4),
    ("path-twenty", path::twenty),
    ("stock-devdax", stock::devdax),
    ("stock-ext4", stock::ext4),
    ("stock-machine", machine::run),
    ("tideoverd-systemd", tideoverd_systemd::run),
];

pub(crate) fn find(name: &str) -> anyhow::Result<Case> {
    let found = CASES.iter().find(|(known, _)| *known == name);
    let Some((_, case)) = found else { bail!("no case is called {name}") };
    Ok(*case)
}
