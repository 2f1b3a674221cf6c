//! Programs of this machine that are run, and Debian's packages that have them.

use std::ffi::OsString;
use std::path::PathBuf;

/// What hosts are made with and run by.
pub(crate) const HOSTS: [(&str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("mkfs.ext4", "e2fsprogs"),
    ("strip", "binutils"),
    ("ldd", "libc-bin"),
];
/// What a kernel is fetched and built with.
pub(crate) const KERNEL: [(&str, &str); 6] = [
    ("gcc", "gcc"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("xz", "xz-utils"),
];
/// What a kernel that Debian ships is fetched and unpacked with.
pub(crate) const STOCK: [(&str, &str); 2] = [("dpkg-deb", "dpkg"), ("xz", "xz-utils")];
/// Where a user may not look for programs, and root does.
const ROOTS: &str = ":/usr/sbin:/sbin";

/// Where programs are looked for.
pub(crate) fn path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(ROOTS);
    path
}

/// A program's file.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&path()).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// How to install those that are missing, as a command; `None` if none is.
pub(crate) fn missing(programs: &[(&str, &'static str)]) -> Option<String> {
    let is_absent = |(program, _): &&(&str, &str)| find(program).is_none();
    let missing: Vec<&str> = programs.iter().filter(is_absent).map(|(_, package)| *package).collect();
    match missing.is_empty() {
        true => None,
        false => Some(format!("`apt-get install --no-install-recommends {}`", missing.join(" "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_by_its_package_and_nothing_else_is() {
        assert_eq!(missing(&[("sh", "dash")]), None);
        let told = missing(&[("sh", "dash"), ("no such program", "some-package")]);
        assert_eq!(told.as_deref(), Some("`apt-get install --no-install-recommends some-package`"));
    }
}
