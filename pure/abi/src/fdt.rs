//! Flattened device trees, version 17: the container of the root FDT ([`crate::kho`]) and of other blobs.
//!
//! Big-endian throughout, but for the payloads, which are whoever's wrote them.

use alloc::vec::Vec;

use crate::memory::Malformed;
use crate::memory::Place;
use crate::memory::Problem;

/// First four bytes.
pub const MAGIC: u32 = 0xd00d_feed;
const VERSION: u32 = 17;
const LAST_COMPATIBLE_VERSION: u32 = 16;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;
pub(crate) const HEADER_BYTES: usize = 40;
/// The sequential writer aligns the header to a reserve entry.
pub(crate) const FRESH_RESERVE_MAP: usize = 48;
const RESERVE_ENTRY_BYTES: usize = 16;

/// Grows the structure block and the strings block of a device tree.
#[derive(Default)]
pub(crate) struct Writer {
    structure: Vec<u8>,
    strings: Vec<u8>,
}

impl Writer {
    fn cell(&mut self, value: usize) {
        let cell = u32::try_from(value).unwrap_or(u32::MAX);
        self.structure.extend_from_slice(&cell.to_be_bytes());
    }

    fn token(&mut self, token: u32) {
        self.structure.extend_from_slice(&token.to_be_bytes());
    }

    fn padded(&mut self, bytes: &[u8]) {
        self.structure.extend_from_slice(bytes);
        self.structure.resize(self.structure.len().next_multiple_of(4), 0);
    }

    pub(crate) fn begin_node(&mut self, name: &[u8]) {
        self.token(BEGIN_NODE);
        self.structure.extend_from_slice(name);
        self.padded(&[0]);
    }

    /// Offset of `name` in the strings block, where it is added if it is not there yet.
    pub(crate) fn string(&mut self, name: &str) -> usize {
        let found = self.strings.split(|byte| *byte == 0).scan(0, |offset, text| {
            let at = *offset;
            *offset += text.len() + 1;
            Some((at, text))
        });
        if let Some((at, _)) =
            found.into_iter().find(|(_, text)| !text.is_empty() && *text == name.as_bytes())
        {
            return at;
        }
        let at = self.strings.len();
        self.strings.extend_from_slice(name.as_bytes());
        self.strings.push(0);
        at
    }

    pub(crate) fn end_node(&mut self) {
        self.token(END_NODE);
    }

    pub(crate) fn property(&mut self, name: &str, value: &[u8]) {
        let name = self.string(name);
        self.token(PROP);
        self.cell(value.len());
        self.cell(name);
        self.padded(value);
    }

    pub(crate) fn finish(mut self, reserve_map: usize) -> Vec<u8> {
        self.token(END);
        let structure = reserve_map + RESERVE_ENTRY_BYTES;
        let strings = structure + self.structure.len();
        let total = strings + self.strings.len();
        let mut page = Writer::default();
        page.token(MAGIC);
        page.cell(total);
        page.cell(structure);
        page.cell(strings);
        page.cell(reserve_map);
        page.token(VERSION);
        page.token(LAST_COMPATIBLE_VERSION);
        page.token(0);
        page.cell(self.strings.len());
        page.cell(self.structure.len());
        let mut bytes = page.structure;
        bytes.resize(structure, 0);
        bytes.append(&mut self.structure);
        bytes.append(&mut self.strings);
        bytes
    }
}

/// Walks the nodes and properties of a tree, in the order in which they stand.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    place: Place,
    total_bytes: u64,
    structure: &'a [u8],
    strings: &'a [u8],
}

/// What a walk meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token<'a> {
    /// A node of this name begins.
    Begin(&'a [u8]),
    /// A property of the node that began last and has not ended: its name and its value.
    Property(&'a [u8], &'a [u8]),
    /// A node ends.
    EndNode,
    /// The tree ends.
    End,
}

impl<'a> Reader<'a> {
    /// Reads the header of the tree in `bytes`, which lie at `address` and are of `format`.
    ///
    /// # Errors
    /// [`Malformed`] if it is none, of a later version, or longer than `bytes`.
    pub fn new(format: &'static str, address: u64, bytes: &'a [u8]) -> Result<Self, Malformed> {
        let place = Place::new(format, address);
        let field = |index: usize, name| {
            read_cell(bytes, index * 4)
                .ok_or_else(|| place.bad(name, Problem::Truncated))
                .map(|(cell, _)| cell)
        };
        place.expect("magic", field(0, "magic")?.into(), MAGIC.into())?;
        let last_compatible = field(6, "last_comp_version")?;
        if last_compatible > VERSION {
            return Err(place.bad("last_comp_version", Problem::Unknown { found: last_compatible.into() }));
        }
        let (found, limit) = (u64::from(field(1, "totalsize")?), bytes.len() as u64);
        if found > limit {
            return Err(place.bad("totalsize", Problem::TooLarge { found, limit }));
        }
        let block = |offset: usize, size: usize, name| {
            let offset = usize::try_from(field(offset, name)?).unwrap_or(usize::MAX);
            let size = usize::try_from(field(size, name)?).unwrap_or(usize::MAX);
            let rest = bytes.get(offset..).and_then(|rest| rest.get(..size));
            rest.ok_or_else(|| place.bad(name, Problem::Truncated))
        };
        let (structure, strings) = (block(2, 9, "structure block")?, block(3, 8, "strings block")?);
        Ok(Self { place, total_bytes: found, structure, strings })
    }

    /// Bytes of the whole tree.
    pub const fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// That the structure block is not as it should be.
    pub(crate) fn bad(&self, what: &'static str) -> Malformed {
        self.place.bad("structure block", Problem::Structure(what))
    }

    /// The next node or property.
    ///
    /// # Errors
    /// [`Malformed`] where the tree breaks; there is nothing behind it.
    #[expect(clippy::should_implement_trait, reason = "it has an error, and an end of its own")]
    pub fn next(&mut self) -> Result<Token<'a>, Malformed> {
        loop {
            let (token, rest) = read_cell(self.structure, 0).ok_or_else(|| self.bad("ends without END"))?;
            self.structure = rest;
            match token {
                NOP => {}
                BEGIN_NODE => {
                    let name =
                        self.text(self.structure).ok_or_else(|| self.bad("has a node without a name"))?;
                    self.skip(name.len() + 1)?;
                    return Ok(Token::Begin(name));
                }
                PROP => return self.property(),
                END_NODE => return Ok(Token::EndNode),
                END => return Ok(Token::End),
                _ => return Err(self.place.bad("token", Problem::Unknown { found: token.into() })),
            }
        }
    }

    fn property(&mut self) -> Result<Token<'a>, Malformed> {
        let cut = |what: &Self| what.bad("ends inside a property");
        let (len, rest) = read_cell(self.structure, 0).ok_or_else(|| cut(self))?;
        let (name, rest) = read_cell(rest, 0).ok_or_else(|| cut(self))?;
        self.structure = rest;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let value = rest.get(..len).ok_or_else(|| cut(self))?;
        self.skip(len)?;
        let name = usize::try_from(name).ok().and_then(|name| self.strings.get(name..));
        let name = name.and_then(|name| self.text(name));
        let name = name.ok_or_else(|| self.place.bad("strings block", Problem::Truncated))?;
        Ok(Token::Property(name, value))
    }

    fn text(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        bytes.iter().position(|byte| *byte == 0).and_then(|len| bytes.get(..len))
    }

    fn skip(&mut self, len: usize) -> Result<(), Malformed> {
        let padded = len.next_multiple_of(4);
        self.structure = self.structure.get(padded..).ok_or_else(|| self.bad("ends inside a value"))?;
        Ok(())
    }
}

/// The `compatible` text of the root node of the tree in `bytes`, if that is one.
pub fn compatible(bytes: &[u8]) -> Option<&[u8]> {
    let mut reader = Reader::new("device tree", 0, bytes).ok()?;
    let Ok(Token::Begin(b"")) = reader.next() else { return None };
    loop {
        match reader.next().ok()? {
            Token::Property(b"compatible", value) => return value.split(|byte| *byte == 0).next(),
            Token::Property(..) => {}
            _ => return None,
        }
    }
}

/// The big-endian cell at `offset`, and what follows it.
fn read_cell(bytes: &[u8], offset: usize) -> Option<(u32, &[u8])> {
    let (cell, rest) = bytes.get(offset..)?.split_first_chunk::<4>()?;
    Some((u32::from_be_bytes(*cell), rest))
}
