//! The registers of virtio-mmio, version 2 (virtio 1.2, section 4.2.2).

/// Bytes of a device's window.
pub(crate) const WINDOW_BYTES: u64 = 0x1000;
/// Where a device's own configuration begins.
pub(crate) const CONFIG: u64 = 0x100;

const MAGIC_VALUE: u32 = u32::from_le_bytes(*b"virt");
const VERSION_VALUE: u32 = 2;
const VENDOR_VALUE: u32 = u32::from_le_bytes(*b"TIDE");

const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS_LOW: u64 = 0x080;
const QUEUE_DESCRIPTORS_HIGH: u64 = 0x084;
const QUEUE_AVAILABLE_LOW: u64 = 0x090;
const QUEUE_AVAILABLE_HIGH: u64 = 0x094;
const QUEUE_USED_LOW: u64 = 0x0a0;
const QUEUE_USED_HIGH: u64 = 0x0a4;
/// Length and address of the shared memory that is selected: all ones, as there is none.
const SHARED_MEMORY: std::ops::RangeInclusive<u64> = 0x0b0..=0x0bc;
const CONFIG_GENERATION: u64 = 0x0fc;

/// The driver has agreed on features.
pub(crate) const FEATURES_OK: u8 = 8;
/// The driver is ready: the device may work.
pub(crate) const DRIVER_OK: u8 = 4;
/// The device has met a fault and waits for a reset.
pub(crate) const NEEDS_RESET: u8 = 0x40;
/// Bits of the status that the driver sets: acknowledge, driver, the two above, failed.
const DRIVERS_BITS: u8 = 1 | 2 | DRIVER_OK | FEATURES_OK | 0x80;
/// All bits of the status.
pub(crate) const STATUS_BITS: u8 = DRIVERS_BITS | NEEDS_RESET;

/// A chain was answered.
pub(crate) const USED_BUFFER: u32 = 1;
/// The status changed.
pub(crate) const CONFIG_CHANGE: u32 = 2;

/// The feature that makes it virtio 1.
pub(crate) const VERSION_1: u64 = 1 << 32;

use super::queue::Queue;

/// What the driver's writes leave behind, but for the queues.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Registers {
    pub(crate) device_features_select: u32,
    pub(crate) driver_features_select: u32,
    pub(crate) driver_features: u64,
    pub(crate) queue_select: u32,
    pub(crate) status: u8,
    pub(crate) interrupt_status: u32,
}

/// What a write asks for beyond the register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    Nothing,
    /// There may be a chain.
    Notify,
    /// The driver has seen all reasons for an interrupt.
    Lower,
    /// The selected queue is to be used.
    Ready,
    /// The selected queue is not to be touched any more.
    NotReady,
    /// The device is to be as new.
    Reset,
}

impl Registers {
    /// Reads a register.
    pub(crate) fn read(&self, offset: u64, device_id: u32, features: u64, queues: &[Queue]) -> u32 {
        let queue = self.selected().and_then(|selected| queues.get(selected));
        match offset {
            MAGIC => MAGIC_VALUE,
            VERSION => VERSION_VALUE,
            DEVICE_ID => device_id,
            VENDOR_ID => VENDOR_VALUE,
            DEVICE_FEATURES => half(features, self.device_features_select),
            QUEUE_SIZE_MAX => queue.map_or(0, |queue| queue.most.into()),
            QUEUE_READY => queue.map_or(0, |queue| queue.ready.into()),
            INTERRUPT_STATUS => self.interrupt_status,
            STATUS => self.status.into(),
            // The configuration never changes.
            CONFIG_GENERATION => 0,
            _ if SHARED_MEMORY.contains(&offset) => u32::MAX,
            _ => 0,
        }
    }

    /// The selected queue's number.
    pub(crate) fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_select).ok()
    }

    /// Writes a register.
    pub(crate) fn write(&mut self, offset: u64, value: u32, features: u64, queues: &mut [Queue]) -> Effect {
        match offset {
            DEVICE_FEATURES_SELECT => self.device_features_select = value,
            DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            DRIVER_FEATURES if self.status & FEATURES_OK == 0 => match self.driver_features_select {
                0 => set_low(&mut self.driver_features, value),
                1 => set_high(&mut self.driver_features, value),
                _ => {}
            },
            QUEUE_SELECT => self.queue_select = value,
            QUEUE_NOTIFY => return Effect::Notify,
            INTERRUPT_ACK => {
                self.interrupt_status &= !value;
                if self.interrupt_status == 0 {
                    return Effect::Lower;
                }
            }
            STATUS => return self.write_status(value, features),
            _ => {
                let queue = self.selected().and_then(|selected| queues.get_mut(selected));
                return queue.map_or(Effect::Nothing, |queue| write_queue(queue, offset, value));
            }
        }
        Effect::Nothing
    }

    fn write_status(&mut self, value: u32, features: u64) -> Effect {
        let [value, ..] = value.to_le_bytes();
        if value == 0 {
            return Effect::Reset;
        }
        let mut set = value & DRIVERS_BITS & !self.status;
        if set & FEATURES_OK != 0 && !self.agrees(features) {
            // The driver reads it back, and sees that there is no agreement.
            set &= !FEATURES_OK;
        }
        if (self.status | set) & FEATURES_OK == 0 {
            set &= !DRIVER_OK;
        }
        self.status |= set;
        if set & DRIVER_OK != 0 { Effect::Notify } else { Effect::Nothing }
    }

    /// Whether what the driver chose is of what was offered.
    pub(crate) fn agrees(&self, features: u64) -> bool {
        self.driver_features & !features == 0 && self.driver_features & VERSION_1 != 0
    }

    /// Whether the device may work.
    pub(crate) fn is_live(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }
}

fn write_queue(queue: &mut Queue, offset: u64, value: u32) -> Effect {
    if offset == QUEUE_READY {
        return match (value & 1 != 0, queue.ready) {
            (true, false) => Effect::Ready,
            (false, true) => Effect::NotReady,
            _ => Effect::Nothing,
        };
    }
    if queue.ready {
        // It is in use; the driver may not change it.
        return Effect::Nothing;
    }
    match offset {
        // One that is too large is refused when the queue is made ready.
        QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(u16::MAX),
        QUEUE_DESCRIPTORS_LOW => set_low(&mut queue.descriptors, value),
        QUEUE_DESCRIPTORS_HIGH => set_high(&mut queue.descriptors, value),
        QUEUE_AVAILABLE_LOW => set_low(&mut queue.available, value),
        QUEUE_AVAILABLE_HIGH => set_high(&mut queue.available, value),
        QUEUE_USED_LOW => set_low(&mut queue.used, value),
        QUEUE_USED_HIGH => set_high(&mut queue.used, value),
        _ => {}
    }
    Effect::Nothing
}

fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value >> 32 << 32 | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = u64::from(high) << 32 | *value << 32 >> 32;
}
