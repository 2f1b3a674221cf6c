//! What a VMM gives away while it lives, so that its death takes no more than itself.
//!
//! Whoever keeps the machine has its regions and a note from the first moment on. That is its memory. A state belongs to it
//! only while the machine is sealed: in an update, and while it is *at rest*, which a paused machine is.

use std::os::fd::AsFd as _;
use std::os::fd::BorrowedFd;
use std::process;

use anyhow::Context as _;
use anyhow::ensure;
use custody::Note;
use fdpass::Channel;
use fdpass::MAX_MESSAGE_FDS;
use gmem::Freeze;
use machine::update::Guest as _;
use path::Place;
use region::Region;
use socket::Origin;
use socket::Program;
use tracing::warn;

use crate::clients::ClientId;
use crate::clients::Mode;
use crate::control;
use crate::control::Answer;
use crate::control::Custody;
use crate::serve::Vmm;

/// A guest that stands still, in a machine that is sealed by the process that runs it: should that die, nothing is lost.
#[derive(Debug, Default)]
pub(crate) struct AtRest {
    /// As long as it is.
    freezes: Vec<Freeze>,
    sealed: bool,
}

impl Vmm {
    /// Seals the machine where it is, if its guest stands still until it is resumed. Should that not be possible, the guest stands
    /// still all the same.
    pub(crate) fn rest(&mut self) {
        if !self.guest.held || self.at_rest.sealed || self.guest.failure().is_some() {
            return;
        }
        if let Err(error) = self.seal_here() {
            self.at_rest = AtRest::default();
            warn!(error = &*error, "the guest stands still, and is lost should this process die");
        }
    }

    fn seal_here(&mut self) -> anyhow::Result<()> {
        let freezes = self.machine.memories().iter().map(|memory| memory.inode.freeze());
        self.at_rest.freezes = freezes.collect::<Result<_, _>>()?;
        let states = self.guest.save()?;
        self.machine.seal(states)?;
        self.at_rest.sealed = true;
        Ok(())
    }

    /// The machine is to be changed: takes it back.
    ///
    /// # Errors
    /// If it is another's by now: the guest must not run here.
    pub(crate) fn rise(&mut self) -> anyhow::Result<()> {
        if self.at_rest.sealed {
            self.machine.unseal().context("the guest is lost")?;
        }
        self.at_rest = AtRest::default();
        Ok(())
    }

    /// What it takes to keep the machine, for who asked, from now on.
    pub(crate) fn give_custody(&mut self, client: ClientId) {
        self.clients.set_mode(client, Mode::Keeps);
        let given = self.custody().map(|(answer, fds)| self.clients.tell_with(client, &answer, &fds));
        if let Err(error) = given {
            self.clients.set_mode(client, Mode::Asks);
            self.clients.tell(client, &Answer::Error(format!("{error:#}")));
        }
    }

    /// Something has changed that they have to know, and the service manager, too, if that keeps the machine.
    pub(crate) fn tell_of_change(&mut self) {
        self.tell_keepers();
        self.renew_note();
    }

    pub(crate) fn tell_keepers(&mut self) {
        if self.clients.keepers().next().is_none() {
            return;
        }
        let (answer, fds) = match self.custody() {
            Ok(custody) => custody,
            Err(error) => return warn!(error = &*error, "who keeps the machine does not know all of it"),
        };
        let told = |keeper: &Channel| control::send_at_once(keeper, &answer, &fds);
        let lost = self.clients.keepers().filter(|keeper| told(keeper).is_err()).count();
        drop(fds);
        if lost > 0 {
            // It notices that its connection is closed, and asks again. The guest and its updates wait for nobody.
            warn!(lost, "whoever kept the machine does not read what it is told, and is let go");
            self.clients.let_go_of_keepers();
        }
    }

    fn custody(&self) -> anyhow::Result<(Answer, Vec<BorrowedFd<'_>>)> {
        let vcpus = self.guest.guest.vcpus();
        let regions = self.machine.regions().map(Region::as_fd);
        let count = vcpus.len();
        let fds: Vec<_> = regions.chain(vcpus).collect();
        // With the note's, which who keeps it adds.
        ensure!(fds.len() < MAX_MESSAGE_FDS, "the machine has more regions and vCPUs than can be kept");
        let (pid, on_oom) = (process::id(), self.spec.on_oom);
        let (origin, stored) = (Origin::LeftBehind, self.deposit.is_some());
        let custody = Custody { note: self.note()?, vcpus: count, pid, origin, on_oom, stored };
        Ok((Answer::Custody(Box::new(custody)), fds))
    }

    /// Looks where the machine lies, if it is found by its path: from then on this process says so if it goes away under it.
    pub(crate) fn find_place(&mut self) -> anyhow::Result<()> {
        self.place = Place::of(&self.machine).context("the machine's path")?;
        if self.place.is_some() {
            region::guard().context("cannot see to it that memory which goes away is noticed")?;
        }
        Ok(())
    }

    /// Notes of a machine that is found by its path what its next VMM has to know.
    pub(crate) fn renew_note_at_path(&self) {
        let Some(place) = &self.place else { return };
        if let Err(error) = self.note().and_then(|note| Ok(place.write(&note)?)) {
            warn!(error = &*error, "what the VMM before this one has noted is found by the machine's path");
        }
    }

    /// The machine is over: nobody is to find it by its path.
    pub(crate) fn give_up_place(&mut self) {
        let Some(place) = self.place.take() else { return };
        if let Err(error) = place.empty() {
            warn!(error = &error as &dyn std::error::Error, "the machine's file stays");
        }
    }

    /// What this VMM leaves for the machine's next life, if nothing but memory gets there.
    pub(crate) fn note(&self) -> anyhow::Result<Note> {
        let own = self.guest.guest.formats();
        Ok(Note {
            machine: self.machine.name().to_string(),
            identity: self.machine.identity().to_string(),
            formats: self.machine.formats().into_iter().chain(own).collect(),
            regions: self.machine.regions().map(Region::len_bytes).collect(),
            program: Program::this_path().context("cannot find this program")?,
            cgroup: custody::cgroup(),
            vmm: serde_json::to_value(self.told_alone())?,
            sealed: None,
        })
    }
}
