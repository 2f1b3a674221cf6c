//! Which physical pages are behind a mapping: the proof that nothing was copied.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use pages::PAGE_SIZE;

use crate::Mapping;

const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// Physical page frame numbers of the pages at `offsets`, in this process's mapping; `None` where none is
/// mapped. Needs the right to see them (CAP_SYS_ADMIN).
///
/// # Errors
/// If `/proc/self/pagemap` cannot be read, or shows only zeros (`PermissionDenied`).
pub fn frames(mapping: &Mapping, offsets: impl IntoIterator<Item = u64>) -> io::Result<Vec<Option<u64>>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let first = mapping.host_address() as u64 / PAGE_SIZE;
    let frame = |offset: u64| {
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, (first + offset / PAGE_SIZE) * 8)?;
        let entry = u64::from_le_bytes(entry);
        match (entry & PRESENT != 0, entry & FRAME) {
            (false, _) => Ok(None),
            (true, 0) => {
                Err(io::Error::new(io::ErrorKind::PermissionDenied, "page frame numbers are hidden"))
            }
            (true, frame) => Ok(Some(frame)),
        }
    };
    offsets.into_iter().map(frame).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Region;

    #[test]
    fn two_mappings_of_a_page_have_one_frame() {
        harness::need!(pagemap);
        let one = Region::create("t", 8 * 4096).unwrap().map().unwrap();
        let other =
            Region::accept("t", rustix::io::dup(one.region()).unwrap(), 8 * 4096).unwrap().map().unwrap();
        one.store(4096, 1).unwrap();
        assert_eq!(other.load(4096).unwrap(), 1);
        let frame = frames(&one, [4096]).unwrap();
        assert!(frame[0].is_some());
        assert_eq!(frame, frames(&other, [4096]).unwrap());
        assert_eq!(frames(&one, [0]).unwrap(), [None]);
    }
}
