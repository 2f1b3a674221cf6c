//! What is mounted, as /proc/self/mountinfo has it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use super::Filesystem;

/// A file system, with all its mounts.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) device: (u32, u32),
    pub(super) kind: String,
    pub(super) read_only: bool,
    /// In the order of mounting; at least one.
    pub(super) mounts: Vec<Mount>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) id: u64,
    pub(super) point: PathBuf,
}

impl Superblock {
    pub(super) fn filesystem(&self) -> Filesystem {
        let point = self.mounts.first().map(|mount| mount.point.clone()).unwrap_or_default();
        Filesystem { point, kind: self.kind.clone(), device: self.device }
    }
}

/// The kinds of file system that need a block device, from /proc/filesystems.
pub(super) fn kinds_of_disks(filesystems: &str) -> BTreeSet<&str> {
    filesystems.lines().filter_map(|line| line.strip_prefix('\t')).map(str::trim).collect()
}

/// The file systems of these kinds, the one that was mounted last first. The kernel lists mounts as they were made, and a
/// file system was mounted no later than the first of its mounts was made. `None` if a line is none of mountinfo.
pub(super) fn superblocks(mountinfo: &[u8], kinds: &BTreeSet<&str>) -> Option<Vec<Superblock>> {
    let mut found: Vec<Superblock> = Vec::new();
    for line in mountinfo.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let (superblock, mount) = parse(line)?;
        if !kinds.contains(superblock.kind.as_str()) {
            continue;
        }
        match found.iter_mut().find(|known| known.device == superblock.device) {
            Some(known) => known.mounts.push(mount),
            None => found.push(Superblock { mounts: vec![mount], ..superblock }),
        }
    }
    found.reverse();
    Some(found)
}

/// `36 35 98:0 /root /mount/point rw,noatime master:1 - ext4 /dev/source rw,errors=continue`: between the mount's options and the
/// hyphen stand any number of fields. The last has the options of the file system itself.
fn parse(line: &[u8]) -> Option<(Superblock, Mount)> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = text(fields.next()?)?.parse().ok()?;
    let device = text(fields.nth(1)?)?.split_once(':')?;
    let device = (device.0.parse().ok()?, device.1.parse().ok()?);
    let point = PathBuf::from(OsString::from_vec(unescaped(fields.nth(1)?)));
    fields.find(|field| *field == b"-")?;
    let kind = String::from_utf8(unescaped(fields.next()?)).ok()?;
    let options = fields.nth(1)?;
    let read_only = options.split(|byte| *byte == b',').any(|option| option == b"ro");
    Some((Superblock { device, kind, read_only, mounts: Vec::new() }, Mount { id, point }))
}

fn text(field: &[u8]) -> Option<&str> {
    str::from_utf8(field).ok()
}

/// With the bytes that the kernel writes as a backslash and three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        match octal(rest) {
            Some(byte) => {
                bytes.push(byte);
                rest = &rest[4..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    bytes
}

/// The byte that `\ooo` at the start stands for.
fn octal(bytes: &[u8]) -> Option<u8> {
    let digits = bytes.strip_prefix(b"\\")?.get(..3)?;
    digits.iter().try_fold(0_u8, |value, digit| {
        let digit = (b'0'..=b'7').contains(digit).then(|| digit - b'0')?;
        value.checked_mul(8)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const KINDS: &str = "nodev\tsysfs\nnodev\ttmpfs\n\text4\n\tvfat\n\tsquashfs\nnodev\tbinder\n\tbtrfs\n";

    fn found(mountinfo: &str) -> Vec<Superblock> {
        superblocks(mountinfo.as_bytes(), &kinds_of_disks(KINDS)).unwrap()
    }

    fn points(superblock: &Superblock) -> Vec<&Path> {
        superblock.mounts.iter().map(|mount| mount.point.as_path()).collect()
    }

    #[test]
    fn file_systems_that_need_a_disk_are_told_from_those_that_do_not() {
        let kinds = kinds_of_disks(KINDS);
        assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["btrfs", "ext4", "squashfs", "vfat"]);
        assert_eq!(found("22 27 0:21 / /proc rw - proc proc rw\n23 27 0:6 / /tmp rw - tmpfs none rw\n"), []);
    }

    #[test]
    fn each_file_system_comes_once_and_the_last_mounted_first() {
        let found = found(
            "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard\n\
             30 27 7:0 / /home rw shared:2 master:1 - ext4 /dev/loop0 rw\n\
             31 27 254:0 /var /srv ro - ext4 /dev/vda rw,discard\n\
             32 27 8:1 / /boot rw - vfat /dev/sda1 rw\n",
        );
        let devices: Vec<_> = found.iter().map(|superblock| superblock.device).collect();
        assert_eq!(devices, [(8, 1), (7, 0), (254, 0)]);
        assert_eq!(points(&found[2]), [Path::new("/"), Path::new("/srv")]);
        assert_eq!(found[2].mounts[1].id, 31);
        let named = Filesystem { point: "/".into(), kind: "ext4".into(), device: (254, 0) };
        assert_eq!(found[2].filesystem(), named);
    }

    /// A mount may be read-only whose file system is written to by another way.
    #[test]
    fn the_file_system_and_not_its_mount_says_whether_it_is_read_only() {
        let found = found(
            "27 1 254:0 / / ro,relatime - ext4 /dev/vda rw,errors=remount-ro\n\
             30 27 7:0 / /snap rw - squashfs /dev/loop0 ro,errors=continue\n",
        );
        assert_eq!(found.iter().map(|one| one.read_only).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn mount_points_with_spaces_newlines_and_backslashes_are_as_they_were_made() {
        let found = found("27 1 8:1 / /a\\040b\\012c\\134d\\043\u{e9} rw - ext4 /dev/my\\040disk rw\n");
        assert_eq!(points(&found[0]), [Path::new("/a b\nc\\d#\u{e9}")]);
        for (field, bytes) in [(r"\04", r"\04"), (r"\089", r"\089"), (r"\777", r"\777"), (r"\\101", r"\A")] {
            assert_eq!(unescaped(field.as_bytes()), bytes.as_bytes(), "{field}");
        }
    }

    #[test]
    fn what_is_no_line_of_mountinfo_is_refused() {
        for line in [
            "x",
            "27 1 254 / / rw - ext4 /dev/vda rw",
            "27 1 254:x / / rw - ext4 /dev/vda rw",
            "x 1 254:0 / / rw - ext4 /dev/vda rw",
            "27 1 254:0 / / rw ext4 /dev/vda rw",
            "27 1 254:0 / / rw - ext4 /dev/vda",
        ] {
            assert_eq!(superblocks(line.as_bytes(), &kinds_of_disks(KINDS)), None, "{line}");
        }
    }
}
