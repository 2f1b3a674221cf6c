//! What the guest says by leaving: one 32-bit OUT to [`REPORT_PORT`].
//!
//! A report only says that there is something to read; what happened stands in the mailbox. Mismatches
//! and lost registers are reported once per pass each, so that a guest that lost all of its memory
//! still moves.

/// The I/O port of all reports. An exit is `KVM_EXIT_IO`, out, four bytes, with [`Report::code`].
pub const REPORT_PORT: u16 = 0x5f0;

/// One report of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// A pass over the whole work area is done.
    Pass,
    /// A word did not hold what it should; the first such report of this pass.
    Mismatch,
    /// A register did not hold what it should; the first such report of this pass.
    Registers,
    /// A probe is answered.
    Probe,
    /// The guest stands still until the park request is taken back.
    Parked,
    /// An exception or an interrupt came, which this guest never expects, and the guest has stopped for good.
    Fault {
        /// The vector, 0 to 255.
        vector: u8,
    },
}

/// Codes from here on are faults: this plus the vector.
pub(crate) const FAULT_CODE: u32 = 0x100;

impl Report {
    /// The number in EAX.
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::Pass => 1,
            Self::Mismatch => 2,
            Self::Registers => 3,
            Self::Probe => 4,
            Self::Parked => 5,
            Self::Fault { vector } => FAULT_CODE | vector as u32,
        }
    }

    /// The report with this code, or `None` for a code that this release does not know.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Pass),
            2 => Some(Self::Mismatch),
            3 => Some(Self::Registers),
            4 => Some(Self::Probe),
            5 => Some(Self::Parked),
            _ => {
                let vector = u8::try_from(code.checked_sub(FAULT_CODE)?).ok()?;
                Some(Self::Fault { vector })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_one_report() {
        let known: Vec<u32> = (0..0x1000)
            .filter(|&code| {
                Report::from_code(code).is_some_and(|report| {
                    assert_eq!(report.code(), code);
                    true
                })
            })
            .collect();
        let expected: Vec<u32> = (1..=5).chain(0x100..0x200).collect();
        assert_eq!(known, expected);
    }
}
