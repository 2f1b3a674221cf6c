//! The root FDT of Kexec Handover, compatible `kho-v4`.
//!
//! One page holds a flattened device tree of version 17: the root node names the tree of preserved memory
//! ([`crate::radix`]); each child is a *subtree*, a named blob. The container is big-endian as every
//! device tree, but the payloads are native (little-endian) integers.
//!
//! The kernel makes a fresh tree with libfdt's sequential writer and adds to it with the read-write
//! functions; the two lay a tree out differently, and what is added later stands in front. [`RootFdt::encode`]
//! gives the same bytes. [`RootFdt::read`] goes by names and accepts any order.

use alloc::vec::Vec;

use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use thiserror::Error;

use crate::fdt;
use crate::fdt::Reader;
use crate::fdt::Token;
use crate::fdt::Writer;
use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::OnFault;
use crate::memory::Place;
use crate::memory::Problem;
use crate::memory::stop;
use crate::text::Text;

/// The compatible string that is written and accepted.
pub const COMPATIBLE: &str = "kho-v4";

const COMPATIBLE_NAME: &str = "compatible";
const MAP_NAME: &str = "preserved-memory-map";
const DATA_NAME: &str = "preserved-data";
const SIZE_NAME: &str = "blob-size";
const MISSING: &str = "is missing";

/// Name of a subtree: 1 to 31 bytes, the length that the device tree specification gives node names.
pub type SubtreeName = Text<32>;

/// A named blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subtree {
    /// Its node's name.
    pub name: SubtreeName,
    /// Physical address of the blob.
    pub data: u64,
    /// Bytes of the blob.
    pub size: u64,
}

/// What the root FDT says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootFdt {
    /// Physical address of the root node of the tree of preserved memory; never 0.
    pub map: u64,
    /// The subtrees, the first added first.
    pub subtrees: Vec<Subtree>,
}

/// The tree does not fit its page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a root FDT with {subtrees} subtrees does not fit one page")]
pub struct TooManySubtrees {
    /// How many there are.
    pub subtrees: usize,
}

impl RootFdt {
    /// The tree's bytes, at most a page, as the kernel would have built it.
    ///
    /// # Errors
    /// [`TooManySubtrees`] if they are more than a page.
    pub fn encode(&self) -> Result<Vec<u8>, TooManySubtrees> {
        let mut writer = Writer::default();
        // The order in which the kernel first names them. It names the last two with the first subtree.
        writer.string(MAP_NAME);
        writer.string(COMPATIBLE_NAME);
        if !self.subtrees.is_empty() {
            writer.string(DATA_NAME);
            writer.string(SIZE_NAME);
        }
        writer.begin_node(b"");
        writer.property(COMPATIBLE_NAME, b"kho-v4\0");
        writer.property(MAP_NAME, &self.map.to_le_bytes());
        for subtree in self.subtrees.iter().rev() {
            writer.begin_node(subtree.name.bytes());
            writer.property(SIZE_NAME, &subtree.size.to_le_bytes());
            writer.property(DATA_NAME, &subtree.data.to_le_bytes());
            writer.end_node();
        }
        writer.end_node();
        let reserve_map = if self.subtrees.is_empty() { fdt::FRESH_RESERVE_MAP } else { fdt::HEADER_BYTES };
        let bytes = writer.finish(reserve_map);
        if bytes.len() > PAGE_BYTES {
            return Err(TooManySubtrees { subtrees: self.subtrees.len() });
        }
        Ok(bytes)
    }

    /// Reads the tree in the page at `address`.
    ///
    /// # Errors
    /// [`Malformed`] if it is no device tree, another format's, or misses what it must say.
    pub fn read(memory: &(impl Memory + ?Sized), address: u64) -> Result<Self, Malformed> {
        let place = Place::new(COMPATIBLE, address);
        place.page_address("fdt", address)?;
        let mut page = [0; PAGE_BYTES];
        memory.read(address, &mut page).map_err(|none| place.bad("fdt", Problem::Unreadable(none)))?;
        let draft = Draft::read(&page, address, &mut stop)?;
        // With faults ending it, all of these are there.
        let map = draft.map.ok_or_else(|| place.bad(MAP_NAME, Problem::Structure(MISSING)))?;
        let subtrees = draft.subtrees.iter().filter_map(DraftSubtree::whole).collect();
        Ok(Self { map, subtrees })
    }

    /// The subtree of this name.
    pub fn subtree(&self, name: &SubtreeName) -> Option<&Subtree> {
        self.subtrees.iter().find(|subtree| subtree.name == *name)
    }
}

/// What a root FDT says as far as it can be made out, of whatever version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Draft {
    /// Its compatible string, without its NUL; empty if there is none.
    pub compatible: Vec<u8>,
    /// Bytes of the tree.
    pub total_bytes: u64,
    /// Physical address of the root node of the tree of preserved memory, if that is one of a page.
    pub map: Option<u64>,
    /// The subtrees, the first added first.
    pub subtrees: Vec<DraftSubtree>,
}

/// A subtree as far as it can be made out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DraftSubtree {
    /// Its node's name.
    pub name: Vec<u8>,
    /// Physical address of the blob, if it is not 0.
    pub data: Option<u64>,
    /// Bytes of the blob.
    pub size: Option<u64>,
    /// Physical address of the blob as `kho-v1` and `kho-v2` name it, which has to be a device tree itself.
    pub fdt: Option<u64>,
}

impl DraftSubtree {
    fn whole(&self) -> Option<Subtree> {
        Some(Subtree { name: SubtreeName::new(&self.name).ok()?, data: self.data?, size: self.size? })
    }
}

impl Draft {
    /// Reads the tree in a page that lies at `address`.
    ///
    /// # Errors
    /// What `on_fault` makes of what is wrong. If it goes on, what was broken is missing, and behind a break of the
    /// device tree itself all is.
    pub fn read(page: &[u8], address: u64, on_fault: &mut OnFault<'_>) -> Result<Self, Malformed> {
        let place = Place::new(COMPATIBLE, address);
        let mut draft = Self::default();
        let mut reader = match Reader::new(COMPATIBLE, address, page) {
            Ok(reader) => reader,
            Err(fault) => return on_fault(fault).map(|()| draft),
        };
        draft.total_bytes = reader.total_bytes();
        if let Err(fault) = draft.root(place, &mut reader, on_fault) {
            on_fault(fault)?;
        }
        // In the page the newest stands first.
        draft.subtrees.reverse();
        if draft.compatible != COMPATIBLE.as_bytes() {
            on_fault(place.bad("compatible", Problem::Structure("is not kho-v4")))?;
        }
        match draft.map {
            Some(0) => on_fault(place.bad(MAP_NAME, Problem::Zero))?,
            Some(map) => {
                if let Err(fault) = place.page_address(MAP_NAME, map) {
                    on_fault(fault)?;
                }
            }
            None => on_fault(place.bad(MAP_NAME, Problem::Structure(MISSING)))?,
        }
        draft.map = draft.map.filter(|map| *map != 0 && map.is_multiple_of(PAGE_SIZE));
        Ok(draft)
    }

    /// Reads up to the end of the root node. What it returns as an error is where the device tree breaks.
    fn root(
        &mut self,
        place: Place,
        reader: &mut Reader<'_>,
        on_fault: &mut OnFault<'_>,
    ) -> Result<(), Malformed> {
        let Token::Begin(b"") = reader.next()? else {
            return Err(reader.bad("does not start with the root node"));
        };
        loop {
            match reader.next()? {
                Token::Property(b"compatible", value) => {
                    // A text without its NUL is not the one that it looks like.
                    let text = value.strip_suffix(&[0]).unwrap_or_default();
                    self.compatible = text.to_vec();
                }
                Token::Property(name, value) if name == MAP_NAME.as_bytes() => {
                    self.map = integer(place, MAP_NAME, value, on_fault)?;
                }
                Token::Property(..) => {}
                Token::Begin(name) => {
                    let subtree = subtree(place, name, reader, on_fault)?;
                    if self.subtrees.iter().any(|other| other.name == subtree.name) {
                        let found = subtree.data.unwrap_or_default();
                        on_fault(place.bad("subtree", Problem::Repeated { found }))?;
                    }
                    self.subtrees.push(subtree);
                }
                Token::EndNode => return Ok(()),
                Token::End => return Err(reader.bad("ends inside the root node")),
            }
        }
    }
}

fn subtree(
    place: Place,
    name: &[u8],
    reader: &mut Reader<'_>,
    on_fault: &mut OnFault<'_>,
) -> Result<DraftSubtree, Malformed> {
    let mut subtree = DraftSubtree { name: name.to_vec(), ..DraftSubtree::default() };
    if let Err(bad) = SubtreeName::new(name) {
        on_fault(place.bad("subtree", Problem::TooLarge { found: count(bad.len), limit: 31 }))?;
    }
    let mut wrong = false;
    loop {
        match reader.next()? {
            Token::Property(name, value) if name == DATA_NAME.as_bytes() => {
                subtree.data = integer(place, DATA_NAME, value, on_fault)?;
                wrong |= subtree.data.is_none();
            }
            Token::Property(name, value) if name == SIZE_NAME.as_bytes() => {
                subtree.size = integer(place, SIZE_NAME, value, on_fault)?;
                wrong |= subtree.size.is_none();
            }
            Token::Property(b"fdt", value) => subtree.fdt = integer(place, "fdt", value, on_fault)?,
            Token::Property(..) => {}
            Token::EndNode => break,
            Token::Begin(_) => return Err(reader.bad("has a node inside a subtree")),
            Token::End => return Err(reader.bad("ends inside a subtree")),
        }
    }
    subtree.data = subtree.data.filter(|data| *data != 0);
    // Of an older version, or one whose fault was told.
    let told = wrong || subtree.fdt.is_some();
    for (field, there) in [(DATA_NAME, subtree.data.is_some()), (SIZE_NAME, subtree.size.is_some())] {
        if !there && !told {
            on_fault(place.bad(field, Problem::Structure(MISSING)))?;
        }
    }
    if subtree.fdt.is_some() {
        on_fault(place.bad("fdt", Problem::Structure("is a property of an older format's")))?;
    }
    Ok(subtree)
}

fn integer(
    place: Place,
    field: &'static str,
    value: &[u8],
    on_fault: &mut OnFault<'_>,
) -> Result<Option<u64>, Malformed> {
    match <[u8; 8]>::try_from(value) {
        Ok(bytes) => Ok(Some(u64::from_le_bytes(bytes))),
        Err(_) => {
            let found = count(value.len());
            on_fault(place.bad(field, Problem::Mismatch { expected: 8, found })).map(|()| None)
        }
    }
}

fn count(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(bytes: &[u8]) -> Vec<u8> {
        let mut memory = vec![0; 2 * PAGE_BYTES];
        memory[PAGE_BYTES..][..bytes.len()].copy_from_slice(bytes);
        memory
    }

    fn subtree(name: &str, data: u64, size: u64) -> Subtree {
        Subtree { name: SubtreeName::new(name.as_bytes()).unwrap(), data, size }
    }

    #[test]
    fn a_fresh_tree_has_the_kernels_152_bytes() {
        let bytes = RootFdt { map: 0x1_2345_6000, subtrees: Vec::new() }.encode().unwrap();
        assert_eq!(bytes.len(), 152);
        let structure: Vec<String> = bytes[0x40..][..56]
            .chunks(4)
            .map(|cell| cell.iter().map(|byte| format!("{byte:02x}")).collect())
            .collect();
        assert_eq!(
            structure.join(" "),
            "00000001 00000000 00000003 00000007 00000015 6b686f2d 76340000 00000003 00000008 00000000 \
             00604523 01000000 00000002 00000009"
        );
        assert_eq!(&bytes[16..20], &48u32.to_be_bytes());
    }

    #[test]
    fn a_subtree_costs_48_bytes_and_its_padded_name() {
        let size = |subtrees: &[Subtree]| {
            let fdt = RootFdt { map: 0x1000, subtrees: subtrees.to_vec() };
            fdt.encode().unwrap().len()
        };
        let one = size(&[subtree("LUO", 0x2000, 32)]);
        let two = size(&[subtree("LUO", 0x2000, 32), subtree("kexec-metadata", 0x3000, 73)]);
        assert_eq!(two - one, 48 + 16);
    }

    #[test]
    fn the_newest_subtree_and_its_size_stand_first() {
        let fdt =
            RootFdt { map: 0x1000, subtrees: vec![subtree("old", 0x2000, 1), subtree("new", 0x3000, 2)] };
        let bytes = fdt.encode().unwrap();
        let at = |text: &[u8]| bytes.windows(text.len()).position(|window| window == text).unwrap();
        assert!(at(b"new\0") < at(b"old\0"));
        assert!(at(b"preserved-data\0") < at(b"blob-size\0"));
        assert_eq!(&bytes[16..20], &40u32.to_be_bytes());
        assert_eq!(RootFdt::read(&page(&bytes), 4096).unwrap(), fdt);
    }

    #[test]
    fn seventy_short_subtrees_fit_a_page() {
        let many = |count: usize| RootFdt {
            map: 0x1000,
            subtrees: (0..count).map(|index| subtree(&format!("{index:04}"), 0x2000, 1)).collect(),
        };
        assert!(many(70).encode().is_ok());
        assert_eq!(many(71).encode(), Err(TooManySubtrees { subtrees: 71 }));
    }

    #[test]
    fn another_compatible_is_refused_by_field() {
        let mut bytes = RootFdt { map: 0x1000, subtrees: Vec::new() }.encode().unwrap();
        let at = bytes.windows(6).position(|window| window == b"kho-v4").unwrap();
        bytes[at + 5] = b'3';
        assert_eq!(RootFdt::read(&page(&bytes), 4096).unwrap_err().field, "compatible");
    }

    #[test]
    fn a_map_of_zero_is_refused() {
        let bytes = RootFdt { map: 0, subtrees: Vec::new() }.encode().unwrap();
        assert_eq!(RootFdt::read(&page(&bytes), 4096).unwrap_err().field, MAP_NAME);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(map in 1u64..1 << 52, data in proptest::collection::vec((1u64.., any::<u64>()), 0..40)) {
            let subtrees =
                data.iter().enumerate().map(|(index, (data, size))| subtree(&format!("s{index}"), *data, *size));
            let fdt = RootFdt { map: map << 12, subtrees: subtrees.collect() };
            prop_assert_eq!(RootFdt::read(&page(&fdt.encode().unwrap()), 4096).unwrap(), fdt);
        }

        #[test]
        fn a_damaged_page_gives_an_error_or_a_tree(damage in proptest::collection::vec((0usize..300, any::<u8>()), 1..8)) {
            let fdt = RootFdt { map: 0x1000, subtrees: vec![subtree("LUO", 0x2000, 32)] };
            let mut memory = page(&fdt.encode().unwrap());
            for (at, byte) in damage {
                memory[PAGE_BYTES + at] = byte;
            }
            let _ = RootFdt::read(&memory, 4096);
        }
    }
}
