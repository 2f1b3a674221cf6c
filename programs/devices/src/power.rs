//! How a guest ends, or starts anew: the ports of a PC for it.
//!
//! | port | access | means |
//! | --- | --- | --- |
//! | 0x604 | word with SLP_EN (0x2000): 0x2000 for S5 as QEMU's ACPI names it, 0x2034 from guests that set more | power off |
//! | 0x64 | byte 0xFE | reset, by the keyboard controller |
//! | 0xCF9 | byte with bit 2 going up: 0x06 and 0x0E | reset, by the chipset |

use std::fmt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use abi::record::Format;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;

use crate::bus::Bus;
use crate::bus::BusError;
use crate::bus::PortDevice;
use crate::device::Device;
use crate::device::ResumeError;
use crate::state::Reader;
use crate::state::StateError;

/// Port of the power management's control register.
const PM_CONTROL: u16 = 0x604;
/// Port of the keyboard controller's commands, which are read back as its status.
const KEYBOARD: u16 = 0x64;
/// Port of the chipset's reset control register.
const RESET_CONTROL: u16 = 0xcf9;

/// Go to sleep, in the power management's control register.
const SLP_EN: u16 = 1 << 13;
/// Which sleep: the three bits 10 to 12. Power off is 0 here, as on QEMU's machines.
const SLP_TYPE: u16 = 7 << 10;
/// The keyboard controller's command that pulses the reset line.
const PULSE_RESET: u8 = 0xfe;
/// Reset the processor, when it goes up.
const RESET_CPU: u8 = 1 << 2;

pub(crate) const FORMAT: Format =
    Format { compatible: "tideover-power-v1", kind: *b"DPWR", version: 1, oldest: 1, max_payload_bytes: 16 };

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Wire {
    reset_control: u8,
    reserved: [u8; 7],
}

/// What the guest asks the VMM for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PowerEvent {
    /// To end.
    PowerOff,
    /// To start anew.
    Reset,
}

/// The ports for power off and reset. What a guest asks for goes to the VMM as an event, on the thread of the vCPU
/// that asks; it is not part of the state, as the VMM has it by then.
pub struct Power {
    name: String,
    reset_control: Mutex<u8>,
    event: Box<dyn Fn(PowerEvent) + Send + Sync>,
}

impl fmt::Debug for Power {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Power").field("name", &self.name).finish_non_exhaustive()
    }
}

/// One of the ports.
struct Port {
    power: Arc<Power>,
    port: u16,
}

impl Power {
    /// The device, which tells `event`.
    pub fn new(name: &str, event: impl Fn(PowerEvent) + Send + Sync + 'static) -> Arc<Self> {
        let event = Box::new(event);
        Arc::new(Self { name: name.to_owned(), reset_control: Mutex::default(), event })
    }

    /// Puts it at its ports.
    ///
    /// # Errors
    /// [`BusError`]
    pub fn attach(self: &Arc<Self>, bus: &mut Bus) -> Result<(), BusError> {
        for (port, len) in [(PM_CONTROL, 2), (KEYBOARD, 1), (RESET_CONTROL, 1)] {
            bus.at_ports(port, len, Arc::new(Port { power: Arc::clone(self), port }))?;
        }
        Ok(())
    }

    fn reset_control(&self) -> std::sync::MutexGuard<'_, u8> {
        self.reset_control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_reset_control(&self, value: u8) {
        let before = std::mem::replace(&mut *self.reset_control(), value);
        if value & !before & RESET_CPU != 0 {
            (self.event)(PowerEvent::Reset);
        }
    }
}

impl PortDevice for Port {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let value = match self.port {
            RESET_CONTROL => *self.power.reset_control(),
            // Neither power state nor keyboard: nothing is pending, nothing is busy.
            _ => 0,
        };
        if offset == 0 {
            data.fill(0);
            data.iter_mut().take(1).for_each(|byte| *byte = value);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        match (self.port, offset, data) {
            (PM_CONTROL, 0, [low, high]) => {
                let value = u16::from_le_bytes([*low, *high]);
                if value & SLP_EN != 0 && value & SLP_TYPE == 0 {
                    (self.power.event)(PowerEvent::PowerOff);
                }
            }
            (KEYBOARD, 0, [PULSE_RESET]) => (self.power.event)(PowerEvent::Reset),
            (RESET_CONTROL, 0, [value]) => self.power.write_reset_control(*value),
            _ => {}
        }
    }
}

impl Device for Power {
    fn name(&self) -> &str {
        &self.name
    }

    fn format(&self) -> &'static str {
        FORMAT.compatible
    }

    fn pause(&self) {}

    fn resume(&self) -> Result<(), ResumeError> {
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let wire = Wire { reset_control: *self.reset_control(), reserved: [0; 7] };
        Ok(FORMAT.encode(wire.as_bytes()))
    }

    fn load(&self, bytes: &[u8]) -> Result<(), StateError> {
        let mut reader = Reader::new(&self.name, &FORMAT, bytes)?;
        let wire: Wire = reader.take("reset_control")?;
        reader.end("reserved")?;
        *self.reset_control() = wire.reset_control;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn on_a_bus() -> (Bus, Arc<Power>, mpsc::Receiver<PowerEvent>) {
        let (sender, events) = mpsc::channel();
        let power = Power::new("power", move |event| sender.send(event).unwrap());
        let mut bus = Bus::new();
        power.attach(&mut bus).unwrap();
        (bus, power, events)
    }

    #[test]
    fn each_port_asks_for_what_it_stands_for() {
        let (bus, _power, events) = on_a_bus();
        let asked: [(u16, &[u8], PowerEvent); 4] = [
            (0x604, &[0x34, 0x20], PowerEvent::PowerOff),
            (0x604, &[0x00, 0x20], PowerEvent::PowerOff),
            (0x64, &[0xfe], PowerEvent::Reset),
            (0xcf9, &[0x0e], PowerEvent::Reset),
        ];
        for (port, data, event) in asked {
            assert!(bus.port_out(port, data));
            assert_eq!(events.try_recv(), Ok(event), "{port:#x}");
        }
    }

    #[test]
    fn other_values_ask_for_nothing() {
        let (bus, _power, events) = on_a_bus();
        let others: [(u16, &[u8]); 8] = [
            (0x604, &[0x34]),
            (0x604, &[0x01, 0x00]),
            (0x604, &[0x00, 0x34]),
            (0x64, &[0xd1]),
            (0x64, &[0xfe, 0xfe]),
            (0xcf9, &[0x02]),
            (0xcf8, &[0xff; 4]),
            (0x605, &[0x20]),
        ];
        for (port, data) in others {
            bus.port_out(port, data);
            assert!(events.try_recv().is_err(), "{port:#x} {data:x?}");
        }
    }

    #[test]
    fn a_reset_begun_before_an_update_is_not_asked_for_twice() {
        let (bus, power, events) = on_a_bus();
        bus.port_out(0xcf9, &[0x06]);
        assert_eq!(events.try_recv(), Ok(PowerEvent::Reset));
        let (new_bus, new, new_events) = on_a_bus();
        new.load(&power.save().unwrap()).unwrap();
        let mut value = [0];
        new_bus.port_in(0xcf9, &mut value);
        assert_eq!(value, [0x06]);
        new_bus.port_out(0xcf9, &[0x06]);
        assert!(new_events.try_recv().is_err(), "the bit did not go up");
        new_bus.port_out(0xcf9, &[0x02]);
        new_bus.port_out(0xcf9, &[0x06]);
        assert_eq!(new_events.try_recv(), Ok(PowerEvent::Reset));
    }
}
