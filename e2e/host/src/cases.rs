//! The cases.

mod demo;
mod device;
<<<<<<< HEAD
mod kexec;
=======
mod linux;
>>>>>>> 5ace3a4 (e2e: a Linux guest that checks its memory and its disk, and hosts with a disk that outlives their kernels)
mod machine;
mod memfd;

use anyhow::bail;

use crate::boot::Life;

/// What is to come after a life of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// Nothing: the case is done.
    End,
    /// The same kernel, booted by kexec.
    NextLife,
}

/// A case, which is run once in each life of its host.
type Case = fn(&Life) -> anyhow::Result<Then>;

<<<<<<< HEAD
const CASES: [(&str, Case); 9] = [
    ("demo", demo::run),
    ("device", device::run),
    ("machine", machine::run),
    ("memfd", memfd::run),
    ("kexec", kexec::one),
    ("kexec-eight", kexec::eight),
    ("kexec-small-pages", kexec::small_pages),
    ("kexec-gib", kexec::gib),
    ("kexec-twenty", kexec::twenty),
=======
const CASES: [(&str, Case); 5] = [
    ("demo", demo::run),
    ("device", device::run),
    ("linux", linux::run),
    ("machine", machine::run),
    ("memfd", memfd::run),
>>>>>>> 5ace3a4 (e2e: a Linux guest that checks its memory and its disk, and hosts with a disk that outlives their kernels)
];

pub(crate) fn find(name: &str) -> anyhow::Result<Case> {
    let found = CASES.iter().find(|(known, _)| *known == name);
    let Some((_, case)) = found else { bail!("no case is called {name}") };
    Ok(*case)
}
