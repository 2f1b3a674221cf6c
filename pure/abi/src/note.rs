//! `tideover-note-v1`: what a program says to the one that comes after it, in a file of its own.
//!
//! A record with JSON as its payload, in the file's second page: no record lies at address 0. What the JSON says is a
//! matter of the two programs.

use alloc::string::String;
use alloc::vec::Vec;

use pages::PAGE_SIZE;

use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::Place;
use crate::memory::Problem;
use crate::record::Format;

/// The format.
pub const FORMAT: Format = Format {
    compatible: "tideover-note-v1",
    kind: *b"NOTE",
    version: 1,
    oldest: 1,
    max_payload_bytes: 4 << 20,
};

/// Where the record lies in the file.
pub const ADDRESS: u64 = PAGE_SIZE;

/// The record's bytes.
pub fn encode(text: &str) -> Vec<u8> {
    FORMAT.encode(text.as_bytes())
}

/// Reads the record at [`ADDRESS`].
///
/// # Errors
/// [`Malformed`] if it is none.
pub fn read(memory: &(impl Memory + ?Sized)) -> Result<String, Malformed> {
    let (_, payload) = FORMAT.read(memory, ADDRESS)?;
    String::from_utf8(payload)
        .map_err(|_| Place::new(FORMAT.compatible, ADDRESS).bad("payload", Problem::Unknown { found: 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(record: &[u8]) -> Vec<u8> {
        let mut file = alloc::vec![0; 8192];
        file[4096..][..record.len()].copy_from_slice(record);
        file
    }

    #[test]
    fn what_is_written_is_read() {
        let mut file = file(&encode("{\"it\": \"ö\"}"));
        assert_eq!(read(&file).unwrap(), "{\"it\": \"ö\"}");
        file[4096 + 33] ^= 1;
        assert_eq!(read(&file).unwrap_err().field, "checksum");
    }

    #[test]
    fn a_text_that_is_none_is_refused() {
        let file = file(&FORMAT.encode(b"\xff\xfe"));
        assert_eq!(read(&file).unwrap_err().field, "payload");
        assert_eq!(read(&Vec::new()).unwrap_err().format, FORMAT.compatible);
    }
}
