//! The devices that memory which was set aside is given out by, and what they are used for.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::path::PathBuf;

use super::memmap::Range;
use crate::check::Host;

/// What tells that something known lies on a device: where, by which bytes, and what it is.
const MARKS: [(usize, &[u8], &str); 10] = [
    (1080, b"\x53\xef", "a file system (ext2, ext3 or ext4)"),
    (0, b"XFSB", "a file system (xfs)"),
    (0x10040, b"_BHRfS_M", "a file system (btrfs)"),
    (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
    (512, b"LABELONE", "a volume of LVM"),
    (512, b"EFI PART", "partitions"),
    (4086, b"SWAPSPACE2", "swap space"),
    (4096, b"NVDIMM_PFN_INFO", "a namespace of ndctl's"),
    (4096, b"NVDIMM_DAX_INFO", "a namespace of ndctl's"),
    (4096, b"BTT_ARENA_INFO", "a namespace of ndctl's"),
];
/// As much of a device as is looked at for these.
const HEAD_BYTES: u64 = 0x11000;

/// A file system that is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) at: PathBuf,
    pub(crate) kind: String,
    /// Whether all its files are mapped directly.
    pub(crate) dax: bool,
}

/// A block device of such memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pmem {
    /// As `pmem0`.
    pub(crate) name: String,
    /// Where it lies, if this process may know.
    pub(crate) range: Option<Range>,
    pub(crate) mounts: Vec<Mount>,
    /// What is known to lie on it.
    pub(crate) holds: Option<&'static str>,
}

/// A character device of such memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dax {
    /// As `dax0.0`.
    pub(crate) name: String,
    pub(crate) range: Option<Range>,
    /// Which driver has it; without one it cannot be opened.
    pub(crate) driver: Option<String>,
    /// Its permissions, if there is a node of it.
    pub(crate) mode: Option<u32>,
}

/// Whether this is the name of such a block device.
pub(crate) fn is_pmem(name: &str) -> bool {
    name.strip_prefix("pmem")
        .is_some_and(|rest| rest.starts_with(|letter: char| letter.is_ascii_digit()) && plain(rest))
}

/// Whether this is the name of such a character device.
pub(crate) fn is_dax(name: &str) -> bool {
    let numbers = name.strip_prefix("dax").and_then(|rest| rest.split_once('.'));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    numbers.is_some_and(|(region, id)| is_number(region) && is_number(id))
}

fn plain(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.')
}

impl Pmem {
    pub(crate) fn all(host: &Host) -> Vec<Self> {
        let names = host.names("/sys/class/block").into_iter().filter(|name| is_pmem(name));
        names.map(|name| Self::of_host(host, name)).collect()
    }

    pub(crate) fn of_host(host: &Host, name: String) -> Self {
        let folder = format!("/sys/class/block/{name}");
        let range = range(host, &format!("{folder}/device"));
        let number = host.text(format!("{folder}/dev")).unwrap_or_default();
        let mounts = mounts(host).into_iter().filter(|(device, _)| *device == number);
        let mounts = mounts.map(|(_, mount)| mount).collect();
        let holds = holds(&host.path(format!("/dev/{name}")));
        Self { name, range, mounts, holds }
    }
}

impl Dax {
    pub(crate) fn all(host: &Host) -> Vec<Self> {
        let names = host.names("/sys/bus/dax/devices").into_iter().filter(|name| is_dax(name));
        names.map(|name| Self::of_host(host, name)).collect()
    }

    pub(crate) fn of_host(host: &Host, name: String) -> Self {
        let folder = format!("/sys/bus/dax/devices/{name}");
        let driver = std::fs::read_link(host.path(format!("{folder}/driver"))).ok();
        let driver = driver.and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()));
        let mode = std::fs::metadata(host.path(format!("/dev/{name}"))).ok().map(|node| node.mode() & 0o777);
        Self { range: range(host, &folder), name, driver, mode }
    }
}

/// Where a device lies, by its `resource` and `size`.
fn range(host: &Host, folder: &str) -> Option<Range> {
    let start = host.text(format!("{folder}/resource"))?;
    let start = u64::from_str_radix(start.strip_prefix("0x")?, 16).ok()?;
    let bytes = host.text(format!("{folder}/size"))?.parse().ok()?;
    // Who may not know is told 0.
    Range::sized(start, bytes).filter(|range| range.start > 0)
}

/// The host's mounts, each with the number of its device.
pub(crate) fn mounts(host: &Host) -> Vec<(String, Mount)> {
    let text = host.text("/proc/self/mountinfo").unwrap_or_default();
    let mounts = text.lines().filter_map(|line| {
        let (mount, rest) = line.split_once(" - ")?;
        let fields: Vec<&str> = mount.split(' ').collect();
        let (device, at) = (fields.get(2)?, fields.get(4)?);
        let mut rest = rest.split(' ');
        let (kind, options) = (rest.next()?, rest.nth(1).unwrap_or_default());
        let dax = options.split(',').any(|option| matches!(option, "dax" | "dax=always"));
        let at = PathBuf::from(crate::check::plain(at));
        Some(((*device).to_owned(), Mount { at, kind: kind.to_owned(), dax }))
    });
    mounts.collect()
}

/// What is known to lie on a device.
fn holds(device: &Path) -> Option<&'static str> {
    let mut head = Vec::new();
    File::open(device).ok()?.take(HEAD_BYTES).read_to_end(&mut head).ok()?;
    let has = |place: usize, mark: &[u8]| head.get(place..place + mark.len()) == Some(mark);
    MARKS.into_iter().find(|(place, mark, _)| has(*place, mark)).map(|(_, _, what)| what)
}

#[cfg(test)]
mod tests {
    use super::super::tests::Tree;
    use super::*;

    #[test]
    fn names_of_such_devices_are_told_from_others() {
        assert!(["pmem0", "pmem12", "pmem0p1", "pmem1.2s"].into_iter().all(is_pmem));
        assert!(!["pmem", "pmemx", "sda", "pmem0/../sda", "pmem0 "].into_iter().any(is_pmem));
        assert!(["dax0.0", "dax12.3"].into_iter().all(is_dax));
        assert!(!["dax0", "dax.0", "dax0.", "dax0.0/x", "dax0.0.0", "pmem0"].into_iter().any(is_dax));
    }

    #[test]
    fn a_block_device_is_seen_with_its_mounts_and_what_lies_on_it() {
        let tree = Tree::new();
        tree.file("/sys/class/block/pmem0/dev", "259:0\n");
        tree.file("/sys/class/block/pmem0/device/resource", "0x100000000\n");
        tree.file("/sys/class/block/pmem0/device/size", "1073741824\n");
        tree.file("/sys/class/block/sda/dev", "8:0\n");
        tree.file(
            "/proc/self/mountinfo",
            "\
1 0 8:0 / / rw - ext4 /dev/sda rw
2 1 259:0 / /a\\040b rw,nosuid shared:3 - ext4 /dev/pmem0 rw,dax=always
3 1 259:0 / /c rw - xfs /dev/pmem0 rw,dax=inode
",
        );
        let mut head = vec![0; 2048];
        head[1080..1082].copy_from_slice(b"\x53\xef");
        tree.file("/dev/pmem0", head);
        let all = Pmem::all(&tree.host());
        let [pmem] = &all[..] else { panic!("{all:?}") };
        assert_eq!(pmem.range, Range::sized(1 << 32, 1 << 30));
        assert_eq!(pmem.holds, Some("a file system (ext2, ext3 or ext4)"));
        let seen: Vec<_> = pmem.mounts.iter().map(|mount| (mount.at.to_str().unwrap(), mount.dax)).collect();
        assert_eq!(seen, [("/a b", true), ("/c", false)]);
    }

    #[test]
    fn what_lies_on_a_device_is_known_by_its_marks() {
        let tree = Tree::new();
        tree.file("/x", [0x5a; 1 << 17]);
        assert_eq!(holds(&tree.path("/x")), None);
        for (place, mark, what) in MARKS {
            let mut bytes = vec![0; place + mark.len()];
            bytes[place..].copy_from_slice(mark);
            tree.file("/x", &bytes);
            assert_eq!(holds(&tree.path("/x")), Some(what));
            bytes.pop();
            tree.file("/x", &bytes);
            assert_eq!(holds(&tree.path("/x")), None);
        }
    }

    #[test]
    fn a_character_device_is_seen_with_its_driver() {
        let tree = Tree::new();
        tree.file("/sys/bus/dax/devices/dax0.0/resource", "0x100000000\n");
        tree.file("/sys/bus/dax/devices/dax0.0/size", "4096\n");
        let of = |tree: &Tree| Dax::all(&tree.host()).remove(0);
        assert_eq!((of(&tree).driver, of(&tree).mode), (None, None));
        tree.link("/sys/bus/dax/devices/dax0.0/driver", "../../../bus/dax/drivers/kmem");
        tree.file("/dev/dax0.0", "");
        let dax = of(&tree);
        assert_eq!((dax.driver.as_deref(), dax.range), (Some("kmem"), Range::sized(1 << 32, 4096)));
        assert!(dax.mode.is_some());
        tree.file("/sys/bus/dax/devices/dax0.0/resource", "0x0\n");
        assert_eq!(of(&tree).range, None);
    }
}
