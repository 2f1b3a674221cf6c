//! NUL-terminated names in fields of fixed length.

use core::fmt;

use thiserror::Error;

/// A text cannot be a name of this length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a name has 1 to {} bytes without NUL, this one has {len}{}", .limit - 1, if *.nul { " and a NUL" } else { "" })]
pub struct BadText {
    /// Bytes of the text.
    pub len: usize,
    /// Bytes of the field, its NUL included.
    pub limit: usize,
    /// The text holds a NUL.
    pub nul: bool,
}

/// A name of 1 to N-1 arbitrary bytes, none of them NUL. It need not be UTF-8.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Text<const N: usize> {
    // Invariant: ends with a NUL, holds nothing but NULs after the first one, and does not start with one.
    field: [u8; N],
}

impl<const N: usize> Text<N> {
    /// The name with these bytes.
    ///
    /// # Errors
    /// [`BadText`] if it is empty, too long or holds a NUL.
    pub fn new(bytes: &[u8]) -> Result<Self, BadText> {
        let nul = bytes.contains(&0);
        if bytes.is_empty() || bytes.len() >= N || nul {
            return Err(BadText { len: bytes.len(), limit: N, nul });
        }
        let mut field = [0; N];
        field.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        Ok(Self { field })
    }

    /// A name known when the program is built; [`Text::new`] for any other.
    ///
    /// # Panics
    /// While compiling, if it is none.
    pub const fn literal(text: &str) -> Self {
        let bytes = text.as_bytes();
        assert!(!bytes.is_empty() && bytes.len() < N);
        let mut field = [0; N];
        let mut at = 0;
        while at < bytes.len() {
            assert!(bytes[at] != 0);
            field[at] = bytes[at];
            at += 1;
        }
        Self { field }
    }

    /// The name in a field as it was read: everything up to the first NUL; what follows is ignored, as the
    /// kernel does. `None` without a NUL, or if the name is empty.
    pub fn read(field: &[u8; N]) -> Option<Self> {
        let len = field.iter().position(|byte| *byte == 0)?;
        Self::new(field.get(..len)?).ok()
    }

    /// The field, zero filled.
    pub const fn field(&self) -> &[u8; N] {
        &self.field
    }

    /// The name's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.field.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

/// Printable: every byte that is no printable ASCII is escaped, so that a name does no harm in a terminal.
impl<const N: usize> fmt::Display for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes().escape_ascii())
    }
}

impl<const N: usize> fmt::Debug for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// L2.5.2, H3.1.7.
    #[test]
    fn a_name_has_one_byte_less_than_its_field() {
        assert_eq!(Text::<8>::new(b"1234567").unwrap().bytes(), b"1234567");
        assert_eq!(Text::<8>::new(b"12345678"), Err(BadText { len: 8, limit: 8, nul: false }));
        assert!(Text::<8>::new(b"").is_err());
        assert!(Text::<8>::new(b"a\0b").is_err());
    }

    /// L2.5.2.
    #[test]
    fn bytes_after_the_nul_are_ignored() {
        assert_eq!(Text::<8>::read(b"ab\0junk!").unwrap(), Text::literal("ab"));
        assert_eq!(Text::<8>::read(b"12345678"), None);
        assert_eq!(Text::<8>::read(&[0; 8]), None);
    }

    #[test]
    fn a_name_is_escaped_where_it_is_shown() {
        let name = Text::<64>::new(b"a\x1b[2J\xff\"").unwrap();
        assert_eq!(name.to_string(), r#"a\x1b[2J\xff\""#);
    }
}
