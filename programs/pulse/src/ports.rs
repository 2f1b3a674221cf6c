//! What the guest does outside of its memory: its I/O ports, and what the host can have it do there.
//!
//! | port | access | what |
//! | --- | --- | --- |
//! | 0x5f0 | out, 4 bytes | a report |
//! | 0x604 | out, 2 bytes | power off, as ACPI on a PC |
//! | 0x64 | out, 1 byte | reset by the keyboard controller |
//! | 0xcf9 | out, 1 byte | reset by the chipset |
//! | 0x3f8, 0x3fd | in and out, 1 byte | the console: a UART's data and line status |
//!
//! All but the reports' are touched only if the host asks for that.

use crate::report::REPORT_PORT;

/// Two bytes: power management's control register.
pub const POWER_PORT: u16 = 0x604;
/// One byte: the keyboard controller's commands.
pub const KEYBOARD_PORT: u16 = 0x64;
/// One byte: the chipset's reset control register.
pub const RESET_PORT: u16 = 0xcf9;
/// One byte: the UART's data.
pub const SERIAL_PORT: u16 = 0x3f8;
/// One byte: the UART's line status.
pub const LINE_STATUS_PORT: u16 = SERIAL_PORT + 5;

/// All ports that the guest may use, with their lengths in bytes.
pub(crate) const PORTS: [(u16, u16); 6] = [
    (REPORT_PORT, 4),
    (POWER_PORT, 2),
    (KEYBOARD_PORT, 1),
    (RESET_PORT, 1),
    (SERIAL_PORT, 1),
    (LINE_STATUS_PORT, 1),
];

/// To [`POWER_PORT`]: sleep, of the kind that is power off.
pub(crate) const POWER_OFF: u16 = 0x2000;
/// To [`KEYBOARD_PORT`]: pulse the reset line.
pub(crate) const PULSE_RESET: u8 = 0xfe;
/// To [`RESET_PORT`]: what a hard reset is, and that it is done.
pub(crate) const RESET_ARM: u8 = 0x02;
pub(crate) const RESET_NOW: u8 = 0x06;

/// A received byte can be read.
pub(crate) const DATA_READY: u8 = 1;
/// A byte can be written.
pub(crate) const CAN_SEND: u8 = 1 << 5;
/// What reads from a port where there is no device.
pub(crate) const NOBODY: u8 = 0xff;
/// Looks at the line status before a byte that cannot be sent is given up, with its line.
pub(crate) const SEND_TRIES: u32 = 1000;
/// Bytes that are echoed at most before the walk goes on.
pub(crate) const ECHO_AT_ONCE: u32 = 16;
/// What each line of the console begins with; the count follows.
pub(crate) const LINE_BEGINS: [u8; 6] = *b"pulse ";

/// What the host can have a vCPU do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Switch the machine off.
    PowerOff,
    /// Reset it by the keyboard controller.
    Reset,
    /// Reset it by the chipset.
    ResetByChipset,
    /// Do what no processor goes on after: a triple fault. The guest's interrupt table is gone then.
    Crash,
}

impl Command {
    /// The word in the mailbox.
    pub(crate) const fn code(self) -> u64 {
        match self {
            Self::PowerOff => 1,
            Self::Reset => 2,
            Self::ResetByChipset => 3,
            Self::Crash => 4,
        }
    }

    /// The command with this word, or `None` for one that this release does not know.
    pub(crate) fn from_code(code: u64) -> Option<Self> {
        [Self::PowerOff, Self::Reset, Self::ResetByChipset, Self::Crash]
            .into_iter()
            .find(|command| command.code() == code)
    }
}

/// The world outside of its memory, to the guest that is a thread.
///
/// A closure that gives the time is a world with a clock and no devices.
pub trait Outside {
    /// The guest's time in cycles.
    fn now(&mut self) -> u64;

    /// Writes to a port.
    fn output(&mut self, port: u16, data: &[u8]) {
        let _ = (port, data);
    }

    /// Reads a byte from a port: all ones where there is no device.
    fn input(&mut self, port: u16) -> u8 {
        let _ = port;
        NOBODY
    }

    /// The processor cannot go on. What the guest does after it has no meaning.
    fn crash(&mut self) {}
}

impl<F: FnMut() -> u64> Outside for F {
    fn now(&mut self) -> u64 {
        self()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_one_command_and_none_is_zero() {
        let known: Vec<u64> = (0..1000)
            .filter(|&code| {
                Command::from_code(code).is_some_and(|command| {
                    assert_eq!(command.code(), code);
                    true
                })
            })
            .collect();
        assert_eq!(known, [1, 2, 3, 4]);
    }

    #[test]
    fn a_world_without_devices_reads_all_ones() {
        let mut world = || 7;
        assert_eq!((world.now(), world.input(LINE_STATUS_PORT)), (7, 0xff));
    }
}
