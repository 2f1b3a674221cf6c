//! The freeze of one mapping: no page is added to its file by a fault.
//!
//! # What a hold proves
//!
//! From when [`Hold::new`] has returned until the hold ends, no access through this mapping adds a page
//! to the file: not of a thread, not of a vCPU, not of a system call that is given an address in it.
//! Accesses that were under way have ended. Pages that are present are read, written and mapped as
//! before, and so is a page that `fallocate` has put there and nobody has touched, though `SEEK_DATA`
//! takes it for a hole until then. Where pages are collapsed into huge ones (`khugepaged`,
//! `MADV_COLLAPSE`) the kernel fills no hole that is held, since Linux 6.4.
//!
//! It proves nothing about other mappings of the file, in this process or another, nor about
//! `fallocate` and `write` on its descriptor.
//!
//! # How it ends
//!
//! [`Hold::release`] (or dropping the hold) lets everything go on, as when an update is called off.
//! [`Hold::end`] is for a predecessor whose successor has taken over: nothing may go on.
//!
//! KVM is the reason for the second. With an in-kernel local APIC a vCPU's fault on a hole may be
//! handed to a kernel worker (*asynchronous page fault*): the worker parks, and the vCPU sleeps or runs
//! something else. Closing the VM waits for the worker, out of reach of any signal, and a worker that
//! is let go while the memory is still mapped adds its page, though the guest has long left. So, in
//! this order:
//!
//! 1. stop the vCPUs (a parked one is kicked out by a signal, with its instruction pointer on the access);
//! 2. [`Hold::end`], and unmap the memory that it gives back, all owners of it; until the next step is
//!    done nothing else may be mapped there, as what is parked would go on in that (where other threads
//!    map, put a mapping without access in its place);
//! 3. [`Parked::wake`]: what is parked tries again, finds nothing mapped, and fails without a page;
//! 4. close the VM.
//!
//! A process that is killed goes through none of this. Its parked workers are let go when its
//! userfaultfd closes, at once unless another process has a copy: never give one away.
//!
//! Where nothing shall ever park, take a userfaultfd that [refuses](crate::OnHole::Refuse).

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::fd::{self, CallError, Mode, Uffd};
use crate::mapped::{Mapped, Span};

/// A range that is registered for as long as this lives.
///
/// Whoever makes one sees to it that the mapping lives longer, or disarms it.
#[derive(Debug)]
pub(crate) struct Registration {
    uffd: Uffd,
    span: Span,
    /// Whether the range is still to be unregistered.
    armed: bool,
}

impl Registration {
    /// Registers the whole mapping.
    pub(crate) fn new(uffd: Uffd, mapped: &impl Mapped, mode: Mode) -> Result<Self, CallError> {
        let span = Span::whole(mapped)?;
        uffd.register_span(span, mode)?;
        Ok(Self { uffd, span, armed: true })
    }

    pub(crate) fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Unregisters, and says how that went.
    pub(crate) fn end(mut self) -> Result<(), CallError> {
        self.armed = false;
        self.uffd.unregister_span(self.span)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.armed {
            // Should it fail, closing the userfaultfd right after this does the same, unless a forked
            // child has a copy.
            let _closed_anyway = self.uffd.unregister_span(self.span);
        }
    }
}

/// The freeze of one mapping. See the [module](self) for what it proves and how it ends.
///
/// It keeps the mapping (a reference, an `Arc` or the mapping itself), so that what is held stays mapped.
#[derive(Debug)]
pub struct Hold<M: Mapped> {
    // Before the mapping, as fields are dropped in order: while the registration is armed, its range is
    // that of `mapped`.
    registration: Registration,
    mapped: M,
}

impl<M: Mapped> Hold<M> {
    /// Freezes the mapping with a userfaultfd of its own.
    ///
    /// # Errors
    ///
    /// [`CallError`]; nothing is held then.
    pub fn new(uffd: Uffd, mapped: M) -> Result<Self, CallError> {
        let registration = Registration::new(uffd, &mapped, Mode::Missing)?;
        Ok(Self { registration, mapped })
    }

    /// What is held.
    pub fn mapped(&self) -> &M {
        &self.mapped
    }

    /// Waits until an access to a hole parks that has not been told yet, and says where: the offset of
    /// its page in the mapping, in bytes. `None` if there was none by the end of `timeout`, as is
    /// always so if the userfaultfd refuses.
    ///
    /// # Errors
    ///
    /// [`CallError::Call`].
    pub fn wait_fault(&self, timeout: Duration) -> Result<Option<usize>, CallError> {
        let fault = self.registration.uffd.wait_fault(timeout)?;
        Ok(fault.and_then(|fault| fault.offset_in(&self.mapped)))
    }

    /// Tells of what parks, on any thread, while somebody else has the hold.
    ///
    /// # Errors
    ///
    /// [`CallError::Call`] if there is no descriptor left.
    pub fn faults(&self) -> Result<Faults, CallError> {
        let Span { address, len } = self.registration.span;
        Ok(Faults { fd: self.registration.uffd.duplicate()?, address, len })
    }

    /// Has everything that is parked try again. What is still missing parks anew, and is told anew.
    ///
    /// # Errors
    ///
    /// [`CallError::Call`].
    pub fn wake(&self) -> Result<(), CallError> {
        self.registration.uffd.wake_span(self.registration.span)
    }

    /// Ends the freeze: what is parked goes on, and pages are added again.
    ///
    /// # Errors
    ///
    /// [`CallError::Call`]; the freeze has then ended all the same, as the userfaultfd is closed.
    pub fn release(self) -> Result<M, CallError> {
        self.registration.end()?;
        Ok(self.mapped)
    }

    /// Takes the hold apart without letting anything go on. The memory is to be unmapped next, and what
    /// is parked to be [woken](Parked::wake) after that. See the [module](self).
    pub fn end(self) -> (M, Parked) {
        let mut registration = self.registration;
        registration.armed = false;
        (self.mapped, Parked { registration })
    }
}

/// Tells of what parks at a hold. It does not keep the hold, after whose end there is nothing more to tell.
#[derive(Debug)]
pub struct Faults {
    // What unregisters or wakes the range lets go what is parked, so it is no matter that this is open, too.
    fd: OwnedFd,
    address: usize,
    len: usize,
}

impl Faults {
    /// As [`Hold::wait_fault`]; each fault is told to one of all who ask.
    ///
    /// # Errors
    ///
    /// [`CallError::Call`].
    pub fn wait(&self, timeout: Duration) -> Result<Option<usize>, CallError> {
        let fault = fd::wait_fault(self.fd.as_fd(), timeout)?;
        let address = fault.and_then(|fault| usize::try_from(fault.host_address).ok());
        let offset = address.and_then(|address| address.checked_sub(self.address));
        Ok(offset.filter(|offset| *offset < self.len))
    }
}

/// What is parked in memory that is about to be unmapped. The freeze stands until this is woken or
/// dropped.
#[derive(Debug)]
#[must_use = "dropping it lets what is parked go on, which adds pages if the memory is still mapped"]
pub struct Parked {
    /// Disarmed: the range may be unmapped, or by now be somebody else's.
    registration: Registration,
}

impl Parked {
    /// Lets what is parked go on, after the memory was unmapped: a thread gets SIGSEGV, a system call
    /// EFAULT, and KVM's worker ends. Nothing is added to the file.
    ///
    /// # Errors
    ///
    /// [`CallError::Call`]; everything goes on all the same, as the userfaultfd is closed.
    pub fn wake(self) -> Result<(), CallError> {
        self.registration.uffd.wake_span(self.registration.span)
    }
}
