//! The state of what all virtio devices share.

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::core::Core;
use super::core::Inner;
use super::queue::Queue;
use super::registers::CONFIG_CHANGE;
use super::registers::DRIVER_OK;
use super::registers::FEATURES_OK;
use super::registers::Registers;
use super::registers::STATUS_BITS;
use super::registers::USED_BUFFER;
use crate::state::Reader;
use crate::state::StateError;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RegistersWire {
    pub(crate) driver_features: U64,
    pub(crate) device_features_select: U32,
    pub(crate) driver_features_select: U32,
    pub(crate) queue_select: U32,
    pub(crate) status: U32,
    pub(crate) interrupt_status: U32,
    pub(crate) queues: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct QueueWire {
    pub(crate) descriptors: U64,
    pub(crate) available: U64,
    pub(crate) used: U64,
    pub(crate) size: U16,
    pub(crate) next: U16,
    pub(crate) ready: U32,
}

/// Registers and queues as they were saved.
#[derive(Debug)]
pub(crate) struct Loaded {
    registers: Registers,
    queues: Vec<Queue>,
}

impl Core {
    /// Appends registers and queues.
    pub(crate) fn encode(&self, payload: &mut Vec<u8>) -> Result<(), StateError> {
        let inner = self.lock();
        self.check_paused(&inner)?;
        let registers = &inner.registers;
        let wire = RegistersWire {
            driver_features: registers.driver_features.into(),
            device_features_select: registers.device_features_select.into(),
            driver_features_select: registers.driver_features_select.into(),
            queue_select: registers.queue_select.into(),
            status: u32::from(registers.status).into(),
            interrupt_status: registers.interrupt_status.into(),
            queues: u32::try_from(inner.queues.len()).unwrap_or(u32::MAX).into(),
        };
        payload.extend_from_slice(wire.as_bytes());
        for queue in &inner.queues {
            let wire = QueueWire {
                descriptors: queue.descriptors.into(),
                available: queue.available.into(),
                used: queue.used.into(),
                size: queue.size.into(),
                next: queue.next.into(),
                ready: u32::from(queue.ready).into(),
            };
            payload.extend_from_slice(wire.as_bytes());
        }
        Ok(())
    }

    fn check_paused(&self, inner: &Inner) -> Result<(), StateError> {
        if inner.running { Err(StateError::NotPaused { device: self.name.clone() }) } else { Ok(()) }
    }

    /// Reads registers and queues, and checks them against this device and its guest's memory.
    pub(crate) fn decode(&self, reader: &mut Reader<'_>) -> Result<Loaded, StateError> {
        let wire: RegistersWire = reader.take("registers")?;
        let registers = self.decode_registers(reader, &wire)?;
        let inner = self.lock();
        let count = wire.queues.get();
        let same = usize::try_from(count) == Ok(inner.queues.len());
        reader.check(same, "queues", count.into(), "is not how many there are")?;
        let mut queues = Vec::with_capacity(inner.queues.len());
        for queue in &inner.queues {
            let wire: QueueWire = reader.take("queue")?;
            queues.push(self.decode_queue(reader, &wire, queue.most)?);
        }
        Ok(Loaded { registers, queues })
    }

    fn decode_registers(&self, reader: &Reader<'_>, wire: &RegistersWire) -> Result<Registers, StateError> {
        let (found, interrupt_status) = (wire.status.get(), wire.interrupt_status.get());
        let [status, ..] = found.to_le_bytes();
        let registers = Registers {
            device_features_select: wire.device_features_select.get(),
            driver_features_select: wire.driver_features_select.get(),
            driver_features: wire.driver_features.get(),
            queue_select: wire.queue_select.get(),
            status,
            interrupt_status,
        };
        let known = found & !u32::from(STATUS_BITS) == 0;
        reader.check(known, "status", found.into(), "has bits that there are not")?;
        let in_order = status & DRIVER_OK == 0 || status & FEATURES_OK != 0;
        reader.check(in_order, "status", found.into(), "is of a driver that skipped a step")?;
        let agrees = status & FEATURES_OK == 0 || registers.agrees(self.features);
        reader.check(
            agrees,
            "driver_features",
            registers.driver_features,
            "is not of what this device offers",
        )?;
        let known = interrupt_status & !(USED_BUFFER | CONFIG_CHANGE) == 0;
        reader.check(known, "interrupt_status", interrupt_status.into(), "has bits that there are not")?;
        Ok(registers)
    }

    fn decode_queue(&self, reader: &Reader<'_>, wire: &QueueWire, most: u16) -> Result<Queue, StateError> {
        let (ready, next) = (wire.ready.get(), wire.next.get());
        reader.check(ready <= 1, "ready", ready.into(), "is neither yes nor no")?;
        reader.check(ready == 1 || next == 0, "next", next.into(), "is of a queue that is not in use")?;
        let queue = Queue {
            most,
            size: wire.size.get(),
            ready: ready == 1,
            descriptors: wire.descriptors.get(),
            available: wire.available.get(),
            used: wire.used.get(),
            next,
        };
        if queue.ready {
            queue.check(&self.memory).map_err(|fault| reader.queue(fault))?;
        }
        Ok(queue)
    }

    /// Takes over what was decoded.
    pub(crate) fn take_over(&self, loaded: Loaded) -> Result<(), StateError> {
        let mut inner = self.lock();
        self.check_paused(&inner)?;
        inner.registers = loaded.registers;
        inner.queues = loaded.queues;
        inner.fault = None;
        Ok(())
    }
}
