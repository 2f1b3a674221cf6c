//! JSON that does no harm wherever it is written to: its strings are printable ASCII, everything else in them is escaped.

use std::io;
use std::io::Write;

use serde::Serialize;
use serde_json::ser::Formatter;
use serde_json::ser::PrettyFormatter;

/// What is indented, and escaped.
#[derive(Default)]
struct Plain(PrettyFormatter<'static>);

impl Formatter for Plain {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        // Neither what directs a terminal, nor what turns the writing round, nor what ends a script.
        let harmless = |letter: char| (' '..='~').contains(&letter) && !matches!(letter, '<' | '>' | '&');
        for letter in fragment.chars() {
            if harmless(letter) {
                write!(writer, "{letter}")?;
                continue;
            }
            for unit in letter.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }

    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_array(writer)
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array(writer)
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array_value(writer)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object(writer)
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object(writer)
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object_value(writer)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object_value(writer)
    }
}

/// Writes a value, and ends the line.
pub(super) fn write(to: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut serializer = serde_json::Serializer::with_formatter(&mut *to, Plain::default());
    value.serialize(&mut serializer)?;
    to.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_text_comes_back_as_it_was_and_is_plain_ascii_meanwhile() {
        let hostile = "\u{1b}[2J\u{202e}\n</script>\u{7f}\u{85}\u{1f980}\"\\ä";
        let mut bytes = Vec::new();
        write(&mut bytes, &vec![hostile]).unwrap();
        assert!(bytes.iter().all(|byte| matches!(byte, b'\n' | b' '..=b'~')), "{bytes:?}");
        assert!(!bytes.contains(&b'<'));
        assert_eq!(serde_json::from_slice::<Vec<String>>(&bytes).unwrap(), [hostile]);
    }
}
