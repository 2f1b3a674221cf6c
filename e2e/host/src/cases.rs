//! The cases.

mod device;
mod memfd;

use anyhow::bail;

/// What is to come after a life of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// Nothing: the case is done.
    End,
    /// The same kernel, booted by kexec.
    NextLife,
}

/// A case, which is told which of the host's lives this is: 1 and up.
type Case = fn(u32) -> anyhow::Result<Then>;

const CASES: [(&str, Case); 2] = [("device", device::run), ("memfd", memfd::run)];

pub(crate) fn find(name: &str) -> anyhow::Result<Case> {
    let found = CASES.iter().find(|(known, _)| *known == name);
    let Some((_, case)) = found else { bail!("no case is called {name}") };
    Ok(*case)
}
