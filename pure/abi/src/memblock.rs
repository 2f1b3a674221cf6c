//! The KHO subtree `memblock`, compatible `memblock-v1`: memory that was reserved by name (`reserve_mem=`).
//!
//! A device tree of its own, with a node for each region.

use alloc::vec::Vec;

use pages::PAGE_BYTES;

use crate::fdt::Reader;
use crate::fdt::Token;
use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::OnFault;
use crate::memory::Place;
use crate::memory::Problem;

/// The compatible string of the blob.
pub const COMPATIBLE: &str = "memblock-v1";
/// The compatible string of a region.
pub const REGION_COMPATIBLE: &str = "reserve-mem-v1";
/// Name of the KHO subtree.
pub const SUBTREE: &str = "memblock";

/// The most regions.
pub const MAX_REGIONS: usize = 8;
/// The most bytes of a region's name.
const MAX_NAME: usize = 15;

/// A region.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Region {
    /// What it is called: 1 to 15 bytes.
    pub name: Vec<u8>,
    /// Its physical address.
    pub start: u64,
    /// Its length, in bytes.
    pub size: u64,
}

/// Reads the blob of `size` bytes at `address`, of which there may be a page: the regions, past what is wrong with one.
///
/// # Errors
/// What `on_fault` makes of what is wrong.
pub fn read_on(
    memory: &(impl Memory + ?Sized),
    address: u64,
    size: u64,
    on_fault: &mut OnFault<'_>,
) -> Result<Vec<Region>, Malformed> {
    let place = Place::new(COMPATIBLE, address);
    let mut regions = Vec::new();
    let len = match usize::try_from(size).ok().filter(|len| *len <= PAGE_BYTES) {
        Some(len) => len,
        None => {
            on_fault(place.bad("blob-size", Problem::TooLarge { found: size, limit: PAGE_BYTES as u64 }))?;
            PAGE_BYTES
        }
    };
    let mut blob = alloc::vec![0; len];
    let read = memory
        .read(address, &mut blob)
        .map_err(|none| place.bad("address", Problem::Unreadable(none)))
        .and_then(|()| walk(place, &blob, &mut regions, on_fault));
    read.or_else(on_fault).map(|()| regions)
}

fn walk(
    place: Place,
    blob: &[u8],
    regions: &mut Vec<Region>,
    on_fault: &mut OnFault<'_>,
) -> Result<(), Malformed> {
    let mut reader = Reader::new(COMPATIBLE, place.address, blob)?;
    let Token::Begin(b"") = reader.next()? else {
        return Err(reader.bad("does not start with the root node"));
    };
    let mut known = false;
    loop {
        match reader.next()? {
            Token::Property(b"compatible", value) => known = value == b"memblock-v1\0",
            Token::Property(..) => {}
            Token::Begin(name) => {
                let region = region(place, name, &mut reader)?;
                match region {
                    Ok(region) if regions.iter().any(|other: &Region| other.name == region.name) => {
                        on_fault(place.bad("region", Problem::Repeated { found: region.start }))?;
                    }
                    Ok(region) => regions.push(region),
                    Err(fault) => on_fault(fault)?,
                }
            }
            Token::EndNode => break,
            Token::End => return Err(reader.bad("ends inside the root node")),
        }
    }
    if !known {
        on_fault(place.bad("compatible", Problem::Structure("is not memblock-v1")))?;
    }
    let found = regions.len() as u64;
    if regions.len() > MAX_REGIONS {
        on_fault(place.bad("regions", Problem::TooLarge { found, limit: MAX_REGIONS as u64 }))?;
    }
    Ok(())
}

/// A region, or what is wrong with it; outside, what is wrong with the tree.
fn region(
    place: Place,
    name: &[u8],
    reader: &mut Reader<'_>,
) -> Result<Result<Region, Malformed>, Malformed> {
    let (mut start, mut size, mut known) = (None, None, false);
    loop {
        match reader.next()? {
            Token::Property(b"compatible", value) => known = value == b"reserve-mem-v1\0",
            Token::Property(b"start", value) => start = value.try_into().ok().map(u64::from_le_bytes),
            Token::Property(b"size", value) => size = value.try_into().ok().map(u64::from_le_bytes),
            Token::Property(..) => {}
            Token::EndNode => break,
            Token::Begin(_) => return Err(reader.bad("has a node inside a region")),
            Token::End => return Err(reader.bad("ends inside a region")),
        }
    }
    let bad = |field, what| Err(place.bad(field, Problem::Structure(what)));
    Ok(match (start, size) {
        _ if !known => bad("region", "is not reserve-mem-v1"),
        _ if name.is_empty() || name.len() > MAX_NAME => bad("region", "has no name of 1 to 15 bytes"),
        (Some(start), Some(size)) if start != 0 && size != 0 => {
            Ok(Region { name: name.to_vec(), start, size })
        }
        (None | Some(0), _) => bad("start", "is missing, zero or not 8 bytes long"),
        _ => bad("size", "is missing, zero or not 8 bytes long"),
    })
}

/// The blob's bytes.
pub fn encode(regions: &[Region]) -> Vec<u8> {
    let mut writer = crate::fdt::Writer::default();
    writer.begin_node(b"");
    writer.property("compatible", b"memblock-v1\0");
    for region in regions {
        writer.begin_node(&region.name);
        writer.property("compatible", b"reserve-mem-v1\0");
        writer.property("start", &region.start.to_le_bytes());
        writer.property("size", &region.size.to_le_bytes());
        writer.end_node();
    }
    writer.end_node();
    writer.finish(crate::fdt::HEADER_BYTES)
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::memory::stop;

    fn region(name: &str) -> Region {
        Region { name: name.as_bytes().to_vec(), start: 0x1_0000, size: 0x2000 }
    }

    fn read(bytes: &[u8], size: u64) -> Result<Vec<Region>, Malformed> {
        let mut memory = vec![0; 8192];
        memory[4096..][..bytes.len()].copy_from_slice(bytes);
        read_on(&memory, 4096, size, &mut stop)
    }

    #[test]
    fn what_is_written_is_read() {
        let regions = [region("trace"), region("oops")];
        let bytes = encode(&regions);
        assert_eq!(read(&bytes, bytes.len() as u64).unwrap(), regions);
    }

    #[test]
    fn broken_regions_are_refused_by_field() {
        let field = |regions: &[Region]| {
            let bytes = encode(regions);
            read(&bytes, bytes.len() as u64).unwrap_err().field
        };
        assert_eq!(field(&[region("trace"), region("trace")]), "region");
        assert_eq!(field(&[region("sixteen-letters-")]), "region");
        assert_eq!(field(&[Region { start: 0, ..region("trace") }]), "start");
        assert_eq!(field(&[Region { size: 0, ..region("trace") }]), "size");
        let nine: Vec<Region> = (0..9).map(|index| region(&format!("r{index}"))).collect();
        assert_eq!(field(&nine), "regions");
        assert_eq!(read(&encode(&[]), 4097).unwrap_err().field, "blob-size");
        let mut bytes = encode(&[]);
        let at = bytes.windows(8).position(|window| window == b"memblock").unwrap();
        bytes[at] = b'x';
        assert_eq!(read(&bytes, bytes.len() as u64).unwrap_err().field, "compatible");
    }
}
