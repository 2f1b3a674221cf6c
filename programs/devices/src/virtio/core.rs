//! What all virtio devices share: registers, queues, and the one request at a time that may be under way.
//!
//! Everything is under one lock, but the work on a request: that is done without it, and `busy` says so. What
//! must not happen meanwhile (a pause, a reset, a queue that is taken away) waits until it is done and keeps
//! the next from starting.

use std::io;
use std::io::PipeWriter;
use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::thread;

use thiserror::Error;

use super::queue::Chain;
use super::queue::Queue;
use super::queue::RingFault;
use super::registers::CONFIG;
use super::registers::CONFIG_CHANGE;
use super::registers::DRIVER_OK;
use super::registers::Effect;
use super::registers::NEEDS_RESET;
use super::registers::Registers;
use super::registers::USED_BUFFER;
use crate::device::ResumeError;
use crate::interrupt::InterruptLine;
use crate::memory::GuestMemory;

/// Why a device waits for its driver to reset it, or did not get an interrupt through.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceFault {
    /// The driver broke a queue.
    #[error("queue {queue} is broken")]
    Ring {
        /// Its number.
        queue: usize,
        /// What is wrong with it.
        #[source]
        source: RingFault,
    },
    /// The driver made a request that cannot be answered.
    #[error("a request in queue {queue} {why}")]
    Request {
        /// Number of the queue.
        queue: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// What serves the requests panicked.
    #[error("the work on a request in queue {queue} panicked")]
    Panic {
        /// Number of the queue.
        queue: usize,
    },
    /// What carries the frames failed.
    #[error("frames can no longer be taken")]
    Frames(#[source] io::Error),
    /// The interrupt line did not take an interrupt. It stays due.
    #[error("the interrupt cannot be raised")]
    Interrupt(#[source] io::Error),
}

/// What is under the lock.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) registers: Registers,
    pub(crate) queues: Vec<Queue>,
    pub(crate) running: bool,
    pub(crate) ending: bool,
    /// A request is being worked on, without the lock.
    busy: bool,
    /// How many wait for that to end, and want no other to begin.
    stoppers: u32,
    pub(crate) fault: Option<DeviceFault>,
}

/// A virtio device but for what it does.
pub(crate) struct Core {
    pub(crate) name: String,
    pub(crate) device_id: u32,
    /// What is offered to the driver.
    pub(crate) features: u64,
    pub(crate) memory: GuestMemory,
    line: Arc<dyn InterruptLine>,
    inner: Mutex<Inner>,
    /// How many want the lock, so that who works without end lets them have it.
    wanted: AtomicUsize,
    changed: Condvar,
    /// Signalled where `changed` is, for a worker that waits for descriptors.
    wake: Option<PipeWriter>,
}

impl Core {
    pub(crate) fn new(
        name: &str,
        device_id: u32,
        features: u64,
        queues: &[u16],
        memory: GuestMemory,
        line: Arc<dyn InterruptLine>,
    ) -> Self {
        let inner = Inner {
            registers: Registers::default(),
            queues: queues.iter().copied().map(Queue::new).collect(),
            running: false,
            ending: false,
            busy: false,
            stoppers: 0,
            fault: None,
        };
        Self {
            name: name.to_owned(),
            device_id,
            features,
            memory,
            line,
            inner: Mutex::new(inner),
            wanted: AtomicUsize::new(0),
            changed: Condvar::new(),
            wake: None,
        }
    }

    /// With a pipe that tells a worker of every change. It is not to block.
    pub(crate) fn with_wake(mut self, wake: PipeWriter) -> Self {
        self.wake = Some(wake);
        self
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.wanted.fetch_add(1, Ordering::SeqCst);
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        self.wanted.fetch_sub(1, Ordering::SeqCst);
        inner
    }

    /// The lock for a worker that takes it again and again: after all who want it.
    pub(crate) fn lock_last(&self) -> MutexGuard<'_, Inner> {
        while self.wanted.load(Ordering::SeqCst) > 0 {
            thread::yield_now();
        }
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        self.changed.notify_all();
        if let Some(mut wake) = self.wake.as_ref() {
            // It fails only when so much was told that the worker wakes in any case.
            let _ = wake.write(&[1]);
        }
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no request is being worked on, and lets none begin meanwhile.
    fn quiet<'a>(&self, mut inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        inner.stoppers += 1;
        while inner.busy {
            inner = self.wait(inner);
        }
        inner.stoppers -= 1;
        inner
    }

    /// The driver reads a register, or of `config`.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8], config: &[u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(CONFIG) {
            let from = usize::try_from(at).ok().and_then(|at| config.get(at..)).unwrap_or_default();
            data.iter_mut().zip(from).for_each(|(byte, value)| *byte = *value);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            let inner = self.lock();
            let value = inner.registers.read(offset, self.device_id, self.features, &inner.queues);
            *data = value.to_le_bytes();
        }
    }

    /// The driver writes a register.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(data);
        let mut guard = self.lock();
        let inner = &mut *guard;
        match inner.registers.write(offset, value, self.features, &mut inner.queues) {
            Effect::Nothing => {}
            Effect::Notify => self.tell(),
            Effect::Lower => self.lower(&mut guard),
            Effect::Ready => self.ready(&mut guard),
            Effect::NotReady => {
                let selected = guard.registers.selected();
                guard = self.quiet(guard);
                let queue = selected.and_then(|selected| guard.queues.get_mut(selected));
                queue.into_iter().for_each(|queue| (queue.ready, queue.next) = (false, 0));
                self.tell();
            }
            Effect::Reset => {
                guard = self.quiet(guard);
                guard.registers = Registers::default();
                guard.queues.iter_mut().for_each(|queue| *queue = Queue::new(queue.most));
                self.lower(&mut guard);
                self.tell();
            }
        }
    }

    /// The driver says that there may be a chain, by whatever way the VMM heard of it.
    pub(crate) fn notify(&self) {
        // Under the lock: who looked at the queues before is waiting by now, or looks again.
        let _inner = self.lock();
        self.tell();
    }

    fn ready(&self, inner: &mut Inner) {
        let Some(number) = inner.registers.selected() else { return };
        let Some(queue) = inner.queues.get_mut(number) else { return };
        match queue.check(&self.memory) {
            Ok(()) => {
                queue.ready = true;
                self.tell();
            }
            Err(source) => self.broken(inner, DeviceFault::Ring { queue: number, source }),
        }
    }

    fn lower(&self, inner: &mut Inner) {
        if let Err(error) = self.line.lower() {
            inner.fault = Some(DeviceFault::Interrupt(error));
        }
    }

    fn raise(&self, inner: &mut Inner, reason: u32) {
        inner.registers.interrupt_status |= reason;
        if let Err(error) = self.line.raise() {
            inner.fault = Some(DeviceFault::Interrupt(error));
        }
    }

    /// Stops until the driver resets the device.
    fn broken(&self, inner: &mut Inner, fault: DeviceFault) {
        inner.registers.status |= NEEDS_RESET;
        if inner.registers.status & DRIVER_OK != 0 {
            self.raise(inner, CONFIG_CHANGE);
        }
        inner.fault = Some(fault);
    }

    pub(crate) fn pause(&self) {
        let mut inner = self.lock();
        inner.running = false;
        drop(self.quiet(inner));
    }

    pub(crate) fn resume(&self) -> Result<(), ResumeError> {
        let mut inner = self.lock();
        inner.running = true;
        self.tell();
        if inner.registers.interrupt_status == 0 {
            return Ok(());
        }
        let failed = |source| ResumeError { device: self.name.clone(), what: "raise its interrupt", source };
        self.line.raise().map_err(failed)
    }

    /// Has [`work`](Self::work) return.
    pub(crate) fn end(&self) {
        self.lock().ending = true;
        self.tell();
    }

    /// Works off a queue until the end. `serve` does one request and answers how many bytes it wrote into the chain, or
    /// why there is no answer; it gets what the driver agreed to.
    pub(crate) fn work(&self, queue: usize, serve: impl Fn(&Chain, u64) -> Result<u32, &'static str>) {
        let mut inner = self.lock();
        while !inner.ending {
            let Some(chain) = self.next(&mut inner, queue) else {
                inner = self.wait(inner);
                continue;
            };
            inner.busy = true;
            let features = inner.registers.driver_features;
            drop(inner);
            let served = catch_unwind(AssertUnwindSafe(|| serve(&chain, features)));
            inner = self.lock_last();
            inner.busy = false;
            match served {
                Ok(Ok(written)) => self.answer(&mut inner, queue, &chain, written),
                Ok(Err(why)) => self.broken(&mut inner, DeviceFault::Request { queue, why }),
                Err(_) => self.broken(&mut inner, DeviceFault::Panic { queue }),
            }
            self.tell();
        }
    }

    /// The next request to be worked on, if one may be.
    pub(crate) fn next(&self, inner: &mut Inner, number: usize) -> Option<Chain> {
        if !inner.running || inner.stoppers > 0 || !inner.registers.is_live() {
            return None;
        }
        let queue = inner.queues.get(number).filter(|queue| queue.ready)?;
        queue.peek(&self.memory).unwrap_or_else(|source| {
            self.broken(inner, DeviceFault::Ring { queue: number, source });
            None
        })
    }

    /// Gives a request back to the driver, done.
    pub(crate) fn answer(&self, inner: &mut Inner, number: usize, chain: &Chain, written: u32) {
        let Some(queue) = inner.queues.get_mut(number) else { return };
        match queue.answer(&self.memory, chain, written) {
            Ok(true) => self.raise(inner, USED_BUFFER),
            Ok(false) => {}
            Err(source) => self.broken(inner, DeviceFault::Ring { queue: number, source }),
        }
    }
}
