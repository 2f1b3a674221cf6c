//! What is here of a machine.

use std::os::fd::AsFd as _;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::ensure;
use custody::Kept;
use custody::MAX_REGIONS;
use custody::NoteFile;
use custody::Standing;
use serde::Deserialize;
use serde::Serialize;
use socket::Origin;
use vmm::control::Custody;
use vmm::control::OnOom;

use crate::oom;

/// How long a process may take from the moment that it is ended until its connections are closed: all of its memory is unmapped before.
const END: Duration = Duration::from_secs(30);

/// What is here of a machine: the descriptors that its VMM gave, and what it said of them. Its note is in a file, as it is long and
/// seldom read.
#[derive(Debug)]
pub(crate) struct Remains {
    pub(crate) about: About,
    note: NoteFile,
    regions: Vec<OwnedFd>,
    vcpus: Vec<OwnedFd>,
    /// When a process of its cgroup was last heard to have been ended for want of memory.
    ran_out: Option<Instant>,
}

/// The same without the descriptors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct About {
    pub(crate) pid: u32,
    pub(crate) origin: Origin,
    pub(crate) on_oom: OnOom,
    pub(crate) bytes: u64,
    pub(crate) regions: usize,
    pub(crate) cgroup: Option<String>,
    /// How often a process of the cgroup had been ended for want of memory, as far as was heard since this one gave the machine.
    pub(crate) oom_kills: Option<u64>,
}

impl Remains {
    /// Takes what a VMM, or a holder, has given.
    ///
    /// # Errors
    /// If that is not what it said.
    pub(crate) fn take(custody: &Custody, mut fds: Vec<OwnedFd>) -> anyhow::Result<Self> {
        let Custody { note, vcpus, pid, origin, on_oom, .. } = custody;
        let regions = note.regions.len();
        ensure!((1..=MAX_REGIONS).contains(&regions), "it tells of {regions} regions");
        ensure!(regions.checked_add(*vcpus) == Some(fds.len()), "{} descriptors came", fds.len());
        let vcpus = fds.split_off(regions);
        let cgroup = note.cgroup.clone();
        let about = About {
            pid: *pid,
            origin: *origin,
            on_oom: *on_oom,
            bytes: note.regions.iter().fold(0, |all: u64, bytes| all.saturating_add(*bytes)),
            regions,
            oom_kills: oom::kills(cgroup.as_deref()),
            cgroup,
        };
        let note = NoteFile::make(note).context("the machine's note")?;
        Ok(Self { about, note, regions: fds, vcpus, ran_out: None })
    }

    /// Takes what another daemon has had before: the note, the regions, the vCPUs.
    ///
    /// # Errors
    /// If that is not what it said.
    pub(crate) fn adopt(about: About, mut fds: Vec<OwnedFd>) -> anyhow::Result<Self> {
        ensure!(fds.len() > about.regions, "{} descriptors came", fds.len());
        let vcpus = fds.split_off(1 + about.regions);
        let regions = fds.split_off(1);
        let note = NoteFile::from_fd(fds.pop().context("no note came")?)?;
        Ok(Self { about, note, regions, vcpus, ran_out: None })
    }

    /// The note, the regions, the vCPUs.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let all = self.regions.iter().chain(&self.vcpus);
        [self.note.as_fd()].into_iter().chain(all.map(OwnedFd::as_fd))
    }

    pub(crate) fn copies(&self) -> anyhow::Result<Vec<OwnedFd>> {
        Ok(self.fds().map(|fd| fd.try_clone_to_owned()).collect::<Result<_, _>>()?)
    }

    pub(crate) fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// How the machine stands.
    ///
    /// # Errors
    /// If it cannot be looked at.
    pub(crate) fn standing(&self) -> anyhow::Result<Standing> {
        let copies = self.regions.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>()?;
        let note = NoteFile::from_fd(self.note.as_fd().try_clone_to_owned()?)?;
        Ok(Kept::of(note, copies, self.about.origin)?.standing()?)
    }

    /// Looks whether a process of its cgroup was ended for want of memory.
    pub(crate) fn look_for_want(&mut self) {
        let now = oom::kills(self.about.cgroup.as_deref());
        if now.zip(self.about.oom_kills).is_some_and(|(now, then)| now > then) {
            self.about.oom_kills = now;
            self.ran_out = Some(Instant::now());
        }
    }

    /// A process of its cgroup was ended for want of memory so shortly ago that it can be the one that has ended now.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        self.ran_out.is_some_and(|at| at.elapsed() < END)
    }

    pub(crate) fn into_fds(self) -> Vec<OwnedFd> {
        let Self { regions, vcpus, .. } = self;
        regions.into_iter().chain(vcpus).collect()
    }
}
