//! Names of sessions.

use std::fmt;

use thiserror::Error;

/// Bytes of a name in the kernel's structures, with the NUL behind it.
pub(crate) const FIELD_BYTES: usize = 64;

/// The name of a session: 1 to 63 bytes of any kind but NUL.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    bytes: Vec<u8>,
}

/// This cannot be a session's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NameError {
    /// It is empty.
    #[error("a session's name is empty")]
    Empty,
    /// It has too many bytes.
    #[error("a session's name has {bytes} bytes, and can have at most 63")]
    TooLong {
        /// How many.
        bytes: usize,
    },
    /// There is a NUL in it, where the kernel would see its end.
    #[error("a session's name has a NUL in it, at byte {at}")]
    Nul {
        /// Where.
        at: usize,
    },
}

impl Name {
    /// Takes a name.
    ///
    /// # Errors
    /// [`NameError`] if the kernel would not take it, or would take less than all of it.
    pub fn new(bytes: &[u8]) -> Result<Self, NameError> {
        if bytes.is_empty() {
            return Err(NameError::Empty);
        }
        if bytes.len() >= FIELD_BYTES {
            return Err(NameError::TooLong { bytes: bytes.len() });
        }
        match bytes.iter().position(|byte| *byte == 0) {
            Some(at) => Err(NameError::Nul { at }),
            None => Ok(Self { bytes: bytes.to_vec() }),
        }
    }

    /// Its bytes, without a NUL.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// As the kernel's structures have it.
    pub(crate) fn to_field(&self) -> [u8; FIELD_BYTES] {
        let mut field = [0; FIELD_BYTES];
        field[..self.bytes.len()].copy_from_slice(&self.bytes);
        field
    }

    /// What the kernel wrote: everything before the first NUL.
    pub(crate) fn of_field(field: &[u8; FIELD_BYTES]) -> Result<Self, NameError> {
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(FIELD_BYTES);
        Self::new(&field[..end])
    }
}

/// With everything escaped that could harm a terminal.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes.escape_ascii())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_the_kernel_takes_whole_are_names() {
        assert_eq!(Name::new(b""), Err(NameError::Empty));
        assert_eq!(Name::new(&[b'a'; 64]), Err(NameError::TooLong { bytes: 64 }));
        assert_eq!(Name::new(b"a\0b"), Err(NameError::Nul { at: 1 }));
        let longest = Name::new(&[0xff; 63]).map(|name| name.to_field());
        assert_eq!(longest.map(|field| (field[62], field[63])), Ok((0xff, 0)));
    }

    #[test]
    fn a_field_is_read_up_to_its_nul() {
        let mut field = [b'x'; FIELD_BYTES];
        field[5] = 0;
        assert_eq!(Name::of_field(&field).map(|name| name.as_bytes().to_vec()), Ok(b"xxxxx".to_vec()));
        assert_eq!(Name::of_field(&[b'x'; FIELD_BYTES]), Err(NameError::TooLong { bytes: 64 }));
    }

    #[test]
    fn a_name_is_shown_without_its_control_characters() {
        assert_eq!(Name::new(b"a\x1b[1m\xffb").map(|name| name.to_string()), Ok(r"a\x1b[1m\xffb".to_owned()));
    }
}
