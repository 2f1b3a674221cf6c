//! All mailboxes of a guest, and what they say together.

use crate::check::{Check, work_area};
use crate::layout::{Layout, MAILBOX_OFFSET, MAX_VCPUS, PAGE_BYTES, SHARED_OFFSET, WORK_OFFSET};
use crate::mailbox::{BadWord, Fault, Gap, Mailbox, MailboxError, Words};

/// The host's view of all mailboxes of one guest.
#[derive(Debug)]
pub struct Mailboxes<'a, W: Words> {
    words: &'a W,
    /// In the order of the vCPUs; not empty.
    layouts: Vec<Layout>,
}

impl<W: Words> Clone for Mailboxes<'_, W> {
    fn clone(&self) -> Self {
        Self { words: self.words, layouts: self.layouts.clone() }
    }
}

/// What the vCPUs have counted each by itself, and all together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// The sum of all vCPUs' ticks.
    pub ticks: u64,
    /// The word that each of them counts up before its own.
    pub shared: u64,
    /// How many vCPUs there are.
    pub vcpus: u32,
}

impl Tally {
    /// Whether no tick was lost and none was counted twice, in a guest that stands still: each vCPU may have
    /// counted one that it has not noted yet.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.miscounted() == 0
    }

    /// How many ticks were lost or counted twice, at least, in a guest that stands still.
    #[must_use]
    pub fn miscounted(&self) -> u64 {
        match self.shared.checked_sub(self.ticks) {
            Some(ahead) => ahead.saturating_sub(self.vcpus.into()),
            None => self.ticks - self.shared,
        }
    }
}

impl<'a, W: Words> Mailboxes<'a, W> {
    /// Finds the mailboxes of the guest in this memory of `memory_bytes` bytes. What stands there is checked: that
    /// there are as many mailboxes as each of them says, in their order, and that their shares of the work area
    /// leave nothing out.
    ///
    /// # Errors
    ///
    /// [`MailboxError`] if there is no such guest.
    pub fn find(words: &'a W, memory_bytes: u64) -> Result<Self, MailboxError> {
        let first = Mailbox::new(words, MAILBOX_OFFSET);
        // The magic first: without it nothing else means anything.
        first.layout()?;
        let (_, found) = first.place();
        let vcpus = u32::try_from(found).ok().filter(|vcpus| (1..=MAX_VCPUS).contains(vcpus));
        let vcpus = vcpus.ok_or(MailboxError::Vcpus { found })?;
        let mut layouts = Vec::new();
        let mut end = WORK_OFFSET;
        for expected in 0..vcpus {
            let mailbox = Mailbox::new(words, MAILBOX_OFFSET + u64::from(expected) * PAGE_BYTES);
            let layout = mailbox.layout()?;
            let place = mailbox.place();
            if place != (expected.into(), vcpus.into()) {
                let (vcpu, vcpus_there) = place;
                return Err(MailboxError::Vcpu { expected, vcpus, vcpu, vcpus_there });
            }
            if layout.memory_bytes() != memory_bytes {
                return Err(MailboxError::MemorySize { found: layout.memory_bytes(), memory_bytes });
            }
            if layout.work().start != end {
                return Err(MailboxError::Share { start: layout.work().start, end });
            }
            end = layout.work().end;
            layouts.push(layout);
        }
        if end != memory_bytes {
            return Err(MailboxError::Share { start: memory_bytes, end });
        }
        Ok(Self { words, layouts })
    }

    /// Where things lie, for each vCPU.
    #[must_use]
    pub fn layouts(&self) -> &[Layout] {
        &self.layouts
    }

    /// How many vCPUs the guest has.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        // At most eight.
        u32::try_from(self.layouts.len()).unwrap_or(MAX_VCPUS)
    }

    /// The first vCPU's, which always is there.
    #[must_use]
    pub fn first(&self) -> Mailbox<'a, W> {
        Mailbox::new(self.words, MAILBOX_OFFSET)
    }

    /// The mailbox of the vCPU with this number, from 0.
    #[must_use]
    pub fn get(&self, vcpu: u32) -> Option<Mailbox<'a, W>> {
        self.layouts
            .iter()
            .find(|layout| layout.vcpu() == vcpu)
            .map(|layout| Mailbox::new(self.words, layout.mailbox_offset()))
    }

    /// Each vCPU's, in their order.
    pub fn iter(&self) -> impl Iterator<Item = Mailbox<'a, W>> {
        self.layouts.iter().map(|layout| Mailbox::new(self.words, layout.mailbox_offset()))
    }

    /// Each vCPU's ticks.
    #[must_use]
    pub fn ticks_of_each(&self) -> Vec<u64> {
        self.iter().map(|mailbox| mailbox.ticks()).collect()
    }

    /// The ticks of all vCPUs together.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        self.iter().map(|mailbox| mailbox.ticks()).fold(0, u64::wrapping_add)
    }

    /// What the vCPUs have counted each by itself, and all together. Of a guest that runs the two do not go together.
    #[must_use]
    pub fn tally(&self) -> Tally {
        Tally { ticks: self.ticks(), shared: self.words.load(SHARED_OFFSET), vcpus: self.vcpus() }
    }

    /// Passes that all vCPUs have done: of the slowest one.
    #[must_use]
    pub fn passes(&self) -> u64 {
        let passes = self.iter().zip(&self.layouts).map(|(mailbox, layout)| mailbox.progress(layout).pass);
        passes.min().unwrap_or_default()
    }

    /// Words that any of them found wrong.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.iter().map(|mailbox| mailbox.errors()).fold(0, u64::saturating_add)
    }

    /// The first word that a vCPU found wrong, of the first vCPU that found any.
    #[must_use]
    pub fn first_bad(&self) -> Option<BadWord> {
        self.iter().find_map(|mailbox| mailbox.first_bad())
    }

    /// Times that any of them found its registers wrong.
    #[must_use]
    pub fn registers_lost(&self) -> u64 {
        self.iter().map(|mailbox| mailbox.registers_lost()).fold(0, u64::saturating_add)
    }

    /// The exception that stopped a vCPU for good, of the first vCPU that met one.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        self.iter().find_map(|mailbox| mailbox.fault())
    }

    /// The longest gap that any of them has seen since its last reset.
    #[must_use]
    pub fn longest_gap(&self) -> Gap {
        let gaps = self.iter().map(|mailbox| mailbox.longest_gap());
        gaps.max_by_key(|gap| gap.cycles).unwrap_or(Gap { cycles: 0, end: 0 })
    }

    /// Compares the whole work area of a stopped guest: [`work_area`] of each vCPU.
    ///
    /// # Errors
    ///
    /// What `read` answered.
    pub fn check_work<E>(&self, mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>) -> Result<Check, E> {
        let each = self.iter().zip(&self.layouts);
        each.map(|(mailbox, layout)| work_area(layout, mailbox.progress(layout), &mut read))
            .try_fold(Check::default(), |all, check| Ok(all.and(check?)))
    }
}

#[cfg(test)]
mod tests;
