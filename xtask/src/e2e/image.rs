//! The hosts' file system: this workspace's programs, what they are linked with, and the kernel with its modules, as the kernel
//! unpacks it (`newc`, see initramfs-buffer-format in the kernel's documentation).

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;

use crate::cargo;
use crate::cargo::Workspace;

use super::programs;
use super::stock::Module;

/// Programs: their package and name.
const INIT: (&str, &str) = ("tideover-e2e-host", "e2e-init");
const GUEST_INIT: (&str, &str) = ("tideover-e2e-guest", "e2e-guest");
const COMMAND: (&str, &str) = ("tideover", "tideover");
const DAEMON: (&str, &str) = ("tideover", "tideoverd");
/// Where the kernel is in the hosts, and the file system of their Linux guests, which have the same kernel.
const KERNEL: &str = "/boot/kernel";
const GUEST: &str = "/boot/guest.cpio";
/// Where the kernel's modules are, and a file with their names in the order in which they are loaded.
const MODULES: &str = "/modules";
/// What makes a file system in a host.
const MAKE: (&str, &str) = ("mke2fs", "/bin/mke2fs");
/// Folders that others are mounted on.
const FOLDERS: [&str; 7] = ["/dev", "/disk", "/pmem", "/proc", "/run", "/sys", "/tmp"];

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
const CONSOLE: u32 = 0o020_600;

/// Makes it, below the workspace's target folder.
pub(crate) fn make(kernel: &Path) -> Result<PathBuf> {
    let workspace = Workspace::read()?;
    let guest = guest(&workspace)?;
    let image = workspace.target_directory.join("e2e.cpio");
    system(&FOLDERS, &own_programs(&workspace)?, &[(kernel, KERNEL), (&guest, GUEST)])?.write(&image)?;
    Ok(image)
}

/// The same for a kernel that has modules, beside the other one.
pub(crate) fn make_with_modules(kernel: &Path, modules: &[Module]) -> Result<PathBuf> {
    let workspace = Workspace::read()?;
    let guest = guest(&workspace)?;
    let make = programs::find(MAKE.0).with_context(|| format!("there is no {}", MAKE.0))?;
    let programs = [&own_programs(&workspace)?[..], &[(make, MAKE.1)]].concat();
    let mut archive = system(&FOLDERS, &programs, &[(kernel, KERNEL), (&guest, GUEST)])?;
    archive.folders(MODULES)?;
    for Module { name, bytes } in modules {
        archive.entry(&format!("{MODULES}/{name}.ko"), FILE, (0, 0), bytes)?;
    }
    let order: Vec<&str> = modules.iter().map(|module| &module.name[..]).collect();
    archive.entry(&format!("{MODULES}/order"), FILE, (0, 0), order.join("\n").as_bytes())?;
    let image = workspace.target_directory.join("e2e-stock.cpio");
    archive.write(&image)?;
    Ok(image)
}

/// The hosts' programs, and where they are to be.
fn own_programs(workspace: &Workspace) -> Result<Vec<(PathBuf, &'static str)>> {
    let built = workspace.target_directory.join("release");
    let programs = [(INIT, "/init"), (COMMAND, "/bin/tideover"), (DAEMON, "/bin/tideoverd")];
    programs.into_iter().map(|((_, name), at)| Ok((stripped(&built.join(name))?, at))).collect()
}

/// Builds all programs, and makes the guests' file system.
fn guest(workspace: &Workspace) -> Result<PathBuf> {
    let mut build = cargo::command();
    build.args(["build", "--release", "--quiet"]);
    for (package, program) in [INIT, GUEST_INIT, COMMAND, DAEMON] {
        build.args(["--package", package, "--bin", program]);
    }
    ensure!(build.status().context("cargo cannot be run")?.success(), "the hosts' programs cannot be built");
    let guest = workspace.target_directory.join("e2e-guest.cpio");
    let init = stripped(&workspace.target_directory.join("release").join(GUEST_INIT.1))?;
    system(&["/dev"], &[(init, "/init")], &[])?.write(&guest)?;
    Ok(guest)
}

/// A file system with these folders, programs with what they are linked with, and other files; each with its place in it.
fn system(folders: &[&str], programs: &[(PathBuf, &str)], files: &[(&Path, &str)]) -> Result<Archive> {
    let mut archive = Archive::default();
    folders.iter().try_for_each(|folder| archive.folders(folder))?;
    // The first process finds its output there before it can mount anything.
    archive.folders("/dev")?;
    archive.entry("/dev/console", CONSOLE, (5, 1), &[])?;
    let mut libraries = BTreeSet::new();
    for (path, at) in programs {
        archive.file(path, at)?;
        libraries.extend(linked_with(path)?);
    }
    for library in libraries {
        let at = library.to_str().context("a library's path is not UTF-8")?;
        archive.file(&library, at)?;
    }
    files.iter().try_for_each(|(from, to)| archive.file(from, to))?;
    Ok(archive)
}

/// A copy without what only a debugger reads: the next kernel starts in little memory.
pub(super) fn stripped(program: &Path) -> Result<PathBuf> {
    let copy = program.with_extension("stripped");
    let status = Command::new("strip").arg("-o").arg(&copy).arg(program).status();
    ensure!(status.context("strip cannot be run: it is in Debian's binutils")?.success(), "strip failed");
    Ok(copy)
}

/// The libraries of a program, and what loads them.
fn linked_with(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = Command::new("ldd").arg(program).output().context("ldd cannot be run")?;
    ensure!(listed.status.success(), "ldd {}: {}", program.display(), listed.status);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let paths = listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(PathBuf::from).collect())
}

/// An archive of the kernel's kind.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    /// A folder, and those that it is in.
    fn folders(&mut self, path: &str) -> Result<()> {
        let ends = path.char_indices().filter(|(at, byte)| *byte == '/' && *at > 0).map(|(at, _)| at);
        for end in ends.chain([path.len()]) {
            if self.folders.insert(path[..end].to_owned()) {
                self.entry(&path[..end], FOLDER, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    fn file(&mut self, from: &Path, to: &str) -> Result<()> {
        if let Some((folder, _)) = to.rsplit_once('/').filter(|(folder, _)| !folder.is_empty()) {
            self.folders(folder)?;
        }
        let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.entry(to, PROGRAM, (0, 0), &bytes)
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), bytes: &[u8]) -> Result<()> {
        self.entries += 1;
        let name = path.trim_start_matches('/');
        let (length, name_length) = (u32::try_from(bytes.len())?, u32::try_from(name.len() + 1)?);
        let fields = [self.entries, mode, 0, 0, 1, 0, length, 0, 0, device.0, device.1, name_length, 0];
        let mut header = "070701".to_owned();
        fields.into_iter().try_for_each(|field| write!(header, "{field:08x}"))?;
        self.bytes.extend(header.bytes().chain(name.bytes()).chain([0]));
        self.pad();
        self.bytes.extend(bytes);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn write(self, to: &Path) -> Result<()> {
        fs::write(to, self.finish()?).with_context(|| format!("cannot write {}", to.display()))
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        // As it lies on a disk, too.
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_once_and_before_what_is_in_them() {
        let mut archive = Archive::default();
        archive.folders("/usr/lib").unwrap();
        archive.folders("/usr/lib/x").unwrap();
        assert_eq!(archive.folders, ["/usr", "/usr/lib", "/usr/lib/x"].map(str::to_owned).into());
        let text = String::from_utf8_lossy(&archive.bytes).into_owned();
        assert!(text.find("usr\0") < text.find("usr/lib\0") && archive.entries == 3);
        assert_eq!(archive.finish().unwrap().len() % 512, 0);
    }
}
