//! The disk of a host that has systemd: Debian's packages of it, this workspace's programs, and the units of `dist/systemd`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context as _;
use anyhow::Result;

use crate::cargo::Workspace;

use super::image;
use super::kernel;
use super::kernel::Apt;
use super::kernel::succeed;
use super::programs;

/// Debian's release that has a systemd of version 255 or later.
const SUITE: &str = "trixie";
/// With what they depend on.
const PACKAGES: [&str; 2] = ["systemd", "dash"];
/// What of them is of no use here, and large.
const LEFT_OUT: [&str; 5] =
    ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/perl5", "usr/lib/udev"];
/// Folders that others are mounted on, or written to.
const FOLDERS: [&str; 8] = ["boot", "dev", "proc", "root", "run", "sys", "tmp", "var/log"];
/// Folders that are elsewhere.
const LINKS: [(&str, &str); 6] = [
    ("bin", "usr/bin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
    ("sbin", "usr/sbin"),
    ("usr/sbin/init", "../lib/systemd/systemd"),
    ("etc/systemd/system/default.target", "/usr/lib/systemd/system/multi-user.target"),
];
/// Units that this host has no programs for, or no use.
const MASKED: [&str; 12] = [
    "getty.target",
    "ldconfig.service",
    "modprobe@.service",
    "serial-getty@ttyS0.service",
    "systemd-hostnamed.socket",
    "systemd-journal-catalog-update.service",
    "systemd-logind.service",
    "systemd-modules-load.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-udev-trigger.service",
    "systemd-udevd.service",
    "systemd-update-done.service",
];
/// Files of its own.
const FILES: [(&str, &str); 5] = [
    ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
    ("etc/group", "root:x:0:\n"),
    ("etc/os-release", "ID=e2e\n"),
    ("etc/systemd/system/e2e.service", CASE),
];
/// The case, and what lingers when it ends.
const CASE: &str = "\
[Unit]
After=tideover-resume.service tideoverd.service
[Service]
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
Type=simple
RemainAfterExit=yes
TimeoutStartSec=infinity
TimeoutStopSec=infinity
ExecStart=/usr/bin/e2e-init
ExecStop=/usr/bin/e2e-init linger
";
/// Units that are started, and by what.
const WANTED: [(&str, &str, &str); 3] = [
    ("multi-user.target", "e2e.service", "/etc/systemd/system/e2e.service"),
    ("sysinit.target", "tideover-resume.service", "/usr/lib/systemd/system/tideover-resume.service"),
    ("sysinit.target", "tideoverd.service", "/usr/lib/systemd/system/tideoverd.service"),
];
/// In the units' own folders.
const DIST: [(&str, &str); 7] = [
    ("system/tideover@.service", "usr/lib/systemd/system/tideover@.service"),
    (
        "system/tideover@.service.d/preserve.conf",
        "usr/lib/systemd/system/tideover@failed.service.d/preserve.conf",
    ),
    ("system/tideover-resume.service", "usr/lib/systemd/system/tideover-resume.service"),
    ("system/tideoverd.service", "usr/lib/systemd/system/tideoverd.service"),
    ("system/tideover-hold.socket", "usr/lib/systemd/system/tideover-hold.socket"),
    ("system/tideover-hold@.service", "usr/lib/systemd/system/tideover-hold@.service"),
    ("system-shutdown/tideover", "usr/lib/systemd/system-shutdown/tideover"),
];
const DISK_MIB: u32 = 160;

/// Makes it, below the workspace's target folder.
pub(super) fn make(kernel: &Path) -> Result<PathBuf> {
    let workspace = Workspace::read()?;
    let packages = packages()?;
    let root = workspace.target_directory.join("e2e-systemd");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    succeed(Command::new("cp").arg("-a").arg(&packages).arg(&root), "cp")?;
    for folder in FOLDERS {
        fs::create_dir_all(root.join(folder))?;
    }
    for folder in WANTED.map(|(by, _, _)| format!("etc/systemd/system/{by}.wants")) {
        fs::create_dir_all(root.join(folder))?;
    }
    for (at, to) in LINKS {
        symlink(to, root.join(at))?;
    }
    for unit in MASKED {
        symlink("/dev/null", root.join("etc/systemd/system").join(unit))?;
    }
    for (by, unit, to) in WANTED {
        symlink(to, root.join(format!("etc/systemd/system/{by}.wants/{unit}")))?;
    }
    for (at, text) in FILES {
        fs::write(root.join(at), text)?;
    }
    let dist = workspace.root.join("dist/systemd");
    for (from, at) in DIST {
        fs::create_dir_all(root.join(at).parent().context("a file without a folder")?)?;
        fs::copy(dist.join(from), root.join(at)).with_context(|| format!("cannot copy {from}"))?;
    }
    let built = workspace.target_directory.join("release");
    for program in ["e2e-init", "tideover", "tideoverd"] {
        fs::copy(image::stripped(&built.join(program))?, root.join("usr/bin").join(program))?;
    }
    fs::copy(kernel, root.join("boot/kernel"))?;
    file_system(&root, &workspace.target_directory.join("e2e-systemd.img"))
}

fn file_system(root: &Path, disk: &Path) -> Result<PathBuf> {
    if disk.exists() {
        fs::remove_file(disk)?;
    }
    let mut make = Command::new("mke2fs");
    make.env("PATH", programs::path());
    make.args(["-q", "-t", "ext4", "-d"]).arg(root).arg(disk).arg(format!("{DISK_MIB}M"));
    succeed(&mut make, "mke2fs (it is in Debian's e2fsprogs)")?;
    Ok(disk.to_owned())
}

/// Debian's packages, unpacked once and kept.
fn packages() -> Result<PathBuf> {
    let cache = kernel::cache_folder()?;
    let folder = cache.join("systemd");
    if folder.exists() {
        return Ok(folder);
    }
    fs::create_dir_all(&cache)?;
    let apt = Apt::set_up(&cache.join("systemd-apt"), SUITE)?;
    println!("e2e: fetching Debian's {}", PACKAGES.join(" and "));
    let mut fetch = apt.command("apt-get");
    fetch.args(["-q", "-y", "--no-install-recommends", "--download-only", "install"]).args(PACKAGES);
    succeed(&mut fetch, "apt-get install --download-only")?;
    let partial = cache.join("systemd.partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    for package in fs::read_dir(apt.archives())? {
        let path = package?.path();
        if path.extension() == Some("deb".as_ref()) {
            kernel::unpack(&path, &partial)?;
        }
    }
    for path in LEFT_OUT {
        if partial.join(path).exists() {
            fs::remove_dir_all(partial.join(path))?;
        }
    }
    fs::rename(&partial, &folder).context("cannot keep the packages")?;
    fs::remove_dir_all(cache.join("systemd-apt"))?;
    Ok(folder)
}
