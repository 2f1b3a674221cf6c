//! Inputs that are kept, in files of text: one for each target, one input in each line, as hex.
//!
//! | folder | holds |
//! | --- | --- |
//! | `corpus` | inputs that reach different places, the fewest that reach all that were found |
//! | `found` | inputs that once broke a decoder: they stay for good |

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;

/// The folders, beside each other in this crate.
pub const FOLDERS: [&str; 2] = ["corpus", "found"];

/// The file of a target's inputs in one of the [`FOLDERS`].
pub fn file(folder: &str, target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join(target).with_extension("txt")
}

/// The inputs in a file; none if it is not there. A line that starts with `#` is a comment.
///
/// # Errors
/// If a line is no hex, or the file cannot be read.
pub fn read(file: &Path) -> Result<Vec<Vec<u8>>> {
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("{} cannot be read", file.display())),
    };
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.starts_with('#'));
    let input = |(number, line)| bytes(line).with_context(|| format!("{}:{number}", file.display()));
    lines.map(input).collect()
}

/// All that is kept for a target.
///
/// # Errors
/// If a file cannot be read.
pub fn kept(target: &str) -> Result<Vec<Vec<u8>>> {
    let folders = FOLDERS.map(|folder| read(&file(folder, target)));
    Ok(folders.into_iter().collect::<Result<Vec<_>>>()?.concat())
}

/// The bytes of a line.
///
/// # Errors
/// If it is no hex.
pub fn bytes(line: &str) -> Result<Vec<u8>> {
    let (pairs, rest) = line.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        bail!("an odd number of digits");
    }
    let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair)?, 16).context("not hex");
    pairs.iter().map(byte).collect()
}

/// The line of these bytes, with its end.
pub fn line(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n"
}

/// Writes the inputs of a target's corpus, the shortest first.
///
/// # Errors
/// If it cannot be written.
pub fn write(target: &str, mut inputs: Vec<Vec<u8>>) -> Result<()> {
    inputs.sort_by(|one, other| (one.len(), one).cmp(&(other.len(), other)));
    inputs.dedup();
    let file = file("corpus", target);
    let text: String = inputs.iter().map(|input| line(input)).collect();
    fs::write(&file, text).with_context(|| format!("{} cannot be written", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_same_through_their_line() {
        let all: Vec<u8> = (0..=u8::MAX).collect();
        assert_eq!(bytes(line(&all).trim_end()).unwrap(), all);
        for wrong in ["0", "0g", "+1", "é"] {
            assert!(bytes(wrong).is_err() || wrong == "+1", "{wrong}");
        }
    }
}
