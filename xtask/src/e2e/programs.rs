//! Programs of this machine that are run, and Debian's packages that have them.

use std::ffi::OsString;

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
/// Where a user may not look for programs, and root does.
const ROOTS: &str = ":/usr/sbin:/sbin";

/// Where programs are looked for.
pub(crate) fn path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(ROOTS);
    path
}

/// How to install those that are missing, as a command; `None` if none is.
pub(crate) fn missing(programs: &[(&str, &'static str)]) -> Option<String> {
    let path = path();
    let is_there = |program: &str| std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    let missing: Vec<&str> =
        programs.iter().filter(|(program, _)| !is_there(program)).map(|(_, package)| *package).collect();
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
