//! The line by which a device asks for the guest's attention.

use std::fmt;
use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An interrupt line of one device. Called by several threads, with the device's lock held: it must not block, nor
/// call the device.
pub trait InterruptLine: Send + Sync {
    /// The device has a reason for an interrupt. Called at each new reason, also while the line is raised.
    ///
    /// # Errors
    /// If the guest may not get it. The reason stays recorded, and the line is raised again after an update.
    fn raise(&self) -> io::Result<()>;

    /// The device has no reason left.
    ///
    /// # Errors
    /// If the line stays raised.
    fn lower(&self) -> io::Result<()>;
}

/// A line that sends a pulse for each reason, by an event that KVM (`KVM_IRQFD`) or the VMM waits for: what ISA
/// interrupts are.
#[derive(Debug)]
pub struct EdgeLine(EventFd);

impl EdgeLine {
    /// A line that signals this event. It should not block when it is written.
    #[must_use]
    pub fn new(event: EventFd) -> Self {
        Self(event)
    }
}

impl InterruptLine for EdgeLine {
    fn raise(&self) -> io::Result<()> {
        match self.0.write(1) {
            // The event's counter is full: who waits for it is to see it in any case.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    fn lower(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A line that has a level, set by a function: `KVM_IRQ_LINE`, or an interrupt controller of the VMM's own.
pub struct LevelLine<F>(F);

impl<F: Fn(bool) -> io::Result<()> + Send + Sync> LevelLine<F> {
    /// A line whose level is set by `set`.
    pub const fn new(set: F) -> Self {
        Self(set)
    }
}

impl<F> fmt::Debug for LevelLine<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LevelLine")
    }
}

impl<F: Fn(bool) -> io::Result<()> + Send + Sync> InterruptLine for LevelLine<F> {
    fn raise(&self) -> io::Result<()> {
        (self.0)(true)
    }

    fn lower(&self) -> io::Result<()> {
        (self.0)(false)
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn an_edge_line_signals_each_reason_and_does_not_block() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let line = EdgeLine::new(event.try_clone().unwrap());
        line.raise().unwrap();
        line.raise().unwrap();
        line.lower().unwrap();
        assert_eq!(event.read().unwrap(), 2);
        event.write(u64::MAX - 1).unwrap();
        line.raise().unwrap();
    }
}
