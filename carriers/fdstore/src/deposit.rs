//! What a machine's VMM has in the store.

use std::os::fd::AsFd as _;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use custody::NoteFile;
use fdpass::Deadline;
use fdpass::systemd::Manager;
use fdpass::systemd::ManagerError;
use fdpass::systemd::PushError;
use fdpass::systemd::StoreName;
use fdpass::systemd::StoreNameError;
use machine::Machine;
use serde::Deserialize;
use serde::Serialize;

use crate::Item;

/// Beside a machine's regions and a note there are two more notes at most at a time, and what shows that the last one is in: one
/// is added for a restart, and the next process replaces both.
const SPARE: usize = 3;
/// How long the manager may take: it may have a whole host to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a VMM tells its successor of what is in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// How many regions.
    pub regions: usize,
    /// The highest number that a note has.
    pub note: u64,
}

/// A machine's regions and note, in the store of the service that this process belongs to.
#[derive(Debug)]
pub struct Deposit {
    manager: Manager,
    /// The machine's name. Items have names with it: looked at when this is made.
    machine: String,
    told: Told,
}

impl Deposit {
    /// Has a new machine's regions and its first note kept, before its guest runs, and makes sure that there is room for what
    /// comes later.
    ///
    /// # Errors
    /// [`PushError`]: nothing of it is in the store.
    pub fn make(manager: Manager, machine: &Machine, note: &NoteFile) -> Result<Self, PushError> {
        let fds: Vec<BorrowedFd<'_>> = machine.regions().map(region_fd).collect();
        let told = Told { regions: fds.len(), note: 0 };
        let mut deposit = Self { manager, machine: machine.name().to_string(), told };
        let regions = fds.into_iter().enumerate();
        // The note last: regions without one are of a machine that never ran.
        let all: Vec<_> = regions
            .map(|(index, fd)| (deposit.name(Item::Region(index)), fd))
            .chain([(deposit.name(Item::Note(0)), note.as_fd())])
            .collect();
        let pushed = deposit.manager.push(&all, SPARE, deadline());
        drop(all);
        match pushed {
            Ok(()) => Ok(deposit),
            Err(error) => {
                // What fails here is the manager's to drop, with the service.
                let _ = deposit.empty();
                Err(error)
            }
        }
    }

    /// What another process has made for this machine, and told of.
    ///
    /// # Errors
    /// [`StoreNameError`] if there can be nothing for a machine of this name.
    pub fn of(manager: Manager, machine: &str, told: Told) -> Result<Self, StoreNameError> {
        Item::Note(told.note).name(machine)?;
        Ok(Self { manager, machine: machine.to_owned(), told })
    }

    /// Has the machine's regions kept once more, where the manager has dropped them.
    ///
    /// # Errors
    /// [`PushError`]: some of them may be in the store.
    pub fn put_regions(&mut self, machine: &Machine) -> Result<(), PushError> {
        let fds: Vec<BorrowedFd<'_>> = machine.regions().map(region_fd).collect();
        self.told.regions = fds.len();
        let named: Vec<_> =
            fds.into_iter().enumerate().map(|(index, fd)| (self.name(Item::Region(index)), fd)).collect();
        self.manager.push(&named, SPARE, deadline())
    }

    /// What the next process that has the machine is to be told.
    pub fn told(&self) -> Told {
        self.told
    }

    /// The way to the manager.
    pub fn manager(&self) -> &Manager {
        &self.manager
    }

    /// Has a note kept beside the last one, which counts from then on.
    ///
    /// # Errors
    /// [`PushError`]: the last one counts.
    pub fn add_note(&mut self, note: &NoteFile) -> Result<(), PushError> {
        let number = self.told.note + 1;
        let name = self.name(Item::Note(number));
        if let Err(error) = self.manager.push(&[(name.clone(), note.as_fd())], 0, deadline()) {
            // It may be in, all the same.
            let _ = self.manager.remove(&name, deadline());
            return Err(error);
        }
        self.told.note = number;
        Ok(())
    }

    /// The note that was [added](Self::add_note) last does not count after all.
    ///
    /// # Errors
    /// [`ManagerError`]
    pub fn withdraw_note(&mut self) -> Result<(), ManagerError> {
        self.manager.remove(&self.name(Item::Note(self.told.note)), deadline())?;
        self.told.note -= 1;
        Ok(())
    }

    /// Has a note kept in place of all before it.
    ///
    /// # Errors
    /// [`PushError`]: the last one counts.
    pub fn replace_note(&mut self, note: &NoteFile) -> Result<(), PushError> {
        let before = self.told.note;
        self.add_note(note)?;
        // One that was added and never withdrawn may stand before the last.
        for number in [before.checked_sub(1), Some(before)].into_iter().flatten() {
            self.manager.remove(&self.name(Item::Note(number)), deadline())?;
        }
        Ok(())
    }

    /// The machine is over: nothing of it stays. What is in the store is closed when this returns.
    ///
    /// # Errors
    /// [`ManagerError`]
    pub fn empty(&mut self) -> Result<(), ManagerError> {
        let notes = [self.told.note.checked_sub(1), Some(self.told.note)].into_iter().flatten();
        // The notes first: without one, nobody takes the regions for a machine.
        let items = notes.map(Item::Note).chain((0..self.told.regions).map(Item::Region));
        for item in items {
            self.manager.remove(&self.name(item), deadline())?;
        }
        self.manager.await_done(deadline())
    }

    fn name(&self, item: Item) -> StoreName {
        let name = item.name(&self.machine);
        name.unwrap_or_else(|_| unreachable!("a machine's name goes into that of what is in the store"))
    }
}

fn region_fd(region: &region::Region) -> BorrowedFd<'_> {
    region.as_fd()
}

fn deadline() -> Deadline {
    Deadline::after(PATIENCE)
}
