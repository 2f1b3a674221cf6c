//! The hosts' kernel: built once from Debian's newest kernel source, and kept outside the tree.

use std::fs;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;

use crate::cargo::Workspace;
use crate::e2e::programs;

/// The suite that has the newest kernels for today's stable release. Its name, as what `stable-backports` is may lag behind.
const SUITE: &str = "trixie-backports";
/// The kernel that is kept, or a new one if `build` says so; `None` if there is none then.
pub(crate) fn kept_or_built(build: bool) -> Result<Option<PathBuf>> {
    let fragment = Workspace::read()?.root.join("e2e/host/kernel.config");
    let wanted = fs::read_to_string(&fragment).context("cannot read the kernel's configuration")?;
    let cache = cache_folder()?;
    let (kernel, built_with) = (cache.join("bzImage"), cache.join("built-with.config"));
    let is_kept = || kernel.is_file() && fs::read_to_string(&built_with).is_ok_and(|with| with == wanted);
    if is_kept() {
        return Ok(Some(kernel));
    }
    if !build {
        return Ok(None);
    }
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let _lock = lock(&cache)?;
    // Another run may have built it meanwhile.
    if !is_kept() {
        let built = self::build(&cache, &fragment)?;
        fs::copy(built, &kernel).context("cannot keep the kernel")?;
        fs::write(&built_with, wanted).context("cannot keep the kernel's configuration")?;
        // A gigabyte and a half.
        fs::remove_dir_all(cache.join("source")).context("cannot remove the kernel's source")?;
    }
    Ok(Some(kernel))
}

/// Waits until no other run builds here: two would take each other's source away.
fn lock(cache: &Path) -> Result<File> {
    let path = cache.join("lock");
    let cannot = || format!("cannot lock {}", path.display());
    let file = File::create(&path).with_context(cannot)?;
    if file.try_lock().is_err() {
        println!("e2e: waiting for another run, which builds a kernel");
        file.lock().with_context(cannot)?;
    }
    Ok(file)
}

pub(super) fn cache_folder() -> Result<PathBuf> {
    let set = std::env::var_os("XDG_CACHE_HOME").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    Ok(set.or_else(home).context("neither XDG_CACHE_HOME nor HOME is set")?.join("tideover/e2e"))
}

fn build(cache: &Path, fragment: &Path) -> Result<PathBuf> {
    if let Some(missing) = programs::missing(&programs::KERNEL) {
        bail!("a kernel cannot be built here: {missing} first, or give one by --kernel");
    }
    let source = fetch(cache)?;
    println!("e2e: building the kernel in {} (once, 5 to 15 minutes)", source.display());
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let make = |arguments: &[&str]| {
        let mut command = Command::new("make");
        succeed(command.arg("-s").arg("-C").arg(&source).args(arguments), "make")
    };
    // As a variable of make's own: that of the environment is set anew by the kernel's makefile.
    let asked = format!("KCONFIG_ALLCONFIG={}", fragment.display());
    make(&[&asked, "tinyconfig"])?;
    has_all(fragment, &source.join(".config"))?;
    make(&[&format!("-j{jobs}"), "bzImage"])?;
    Ok(source.join("arch/x86/boot/bzImage"))
}

/// Each option that was asked for is set: one whose dependencies are not there is left out without a word.
fn has_all(fragment: &Path, config: &Path) -> Result<()> {
    let (asked, set) = (fs::read_to_string(fragment)?, fs::read_to_string(config)?);
    let missing: Vec<&str> = asked
        .lines()
        .filter(|line| line.ends_with("=y") && !set.lines().any(|other| other == *line))
        .collect();
    ensure!(missing.is_empty(), "this kernel cannot have {}", missing.join(", "));
    Ok(())
}

/// The newest kernel's source, unpacked.
fn fetch(cache: &Path) -> Result<PathBuf> {
    let apt = Apt::set_up(&cache.join("apt"), SUITE)?;
    let package =
        apt.newest("^linux-source-[0-9.]+$").with_context(|| format!("{SUITE} has no kernel source"))?;
    println!("e2e: fetching {package}");
    let folder = cache.join("source");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    unpack(&apt.download(&package, &folder)?, &folder)?;
    let archive = folder.join(format!("usr/src/{package}.tar.xz"));
    succeed(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(&folder), "tar")?;
    Ok(folder.join(package))
}

/// apt-get with lists and a cache of its own, for which nothing is installed: the machine's own stay as they are.
pub(super) struct Apt {
    folder: PathBuf,
}

impl Apt {
    pub(super) fn set_up(folder: &Path, suite: &str) -> Result<Self> {
        for folder in ["lists/partial", "cache/archives/partial"].map(|below| folder.join(below)) {
            fs::create_dir_all(folder)?;
        }
        fs::write(folder.join("sources.list"), format!("deb {} {suite} main\n", mirror()?))?;
        fs::write(folder.join("status"), "")?;
        let shown = folder.display();
        let text = format!(
            "Dir::Etc::sourcelist \"{shown}/sources.list\";\nDir::Etc::sourceparts \"-\";\n\
             Dir::State::lists \"{shown}/lists\";\nDir::State::status \"{shown}/status\";\n\
             Dir::Cache \"{shown}/cache\";\nAPT::Sandbox::User \"root\";\n"
        );
        let apt = Self { folder: folder.to_owned() };
        fs::write(apt.configuration(), text)?;
        succeed(apt.command("apt-get").args(["-q", "update"]), "apt-get update")?;
        Ok(apt)
    }

    fn configuration(&self) -> PathBuf {
        self.folder.join("apt.conf")
    }

    /// Where packages are that were fetched.
    pub(super) fn archives(&self) -> PathBuf {
        self.folder.join("cache/archives")
    }

    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(self.configuration()).stdin(Stdio::null());
        command
    }

    /// The package of the highest version among those whose names are like this.
    pub(super) fn newest(&self, names: &str) -> Result<String> {
        let search = self.command("apt-cache").args(["search", "--names-only", names]).output()?;
        let listed = String::from_utf8_lossy(&search.stdout).into_owned();
        let packages = listed.lines().filter_map(|line| line.split_whitespace().next());
        let newest = packages.max_by_key(|package| version(package));
        Ok(newest.with_context(|| format!("no package is called {names}"))?.to_owned())
    }

    /// Fetches a package into a folder, and gives the file.
    pub(super) fn download(&self, package: &str, folder: &Path) -> Result<PathBuf> {
        let mut download = self.command("apt-get");
        succeed(download.current_dir(folder).args(["-q", "download", package]), "apt-get download")?;
        let paths = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
        let files: Vec<PathBuf> = paths.filter(|path| path.extension() == Some("deb".as_ref())).collect();
        match <[PathBuf; 1]>::try_from(files) {
            Ok([file]) => Ok(file),
            Err(files) => bail!("{package} is {} files, not one", files.len()),
        }
    }
}

/// The numbers in a package's name: of `linux-source-7.3` 7 and 3.
fn version(package: &str) -> Vec<u32> {
    let numbers = package.split(|letter: char| !letter.is_ascii_digit());
    numbers.filter_map(|number| number.parse().ok()).collect()
}

/// Where this machine gets Debian's packages from.
fn mirror() -> Result<String> {
    let targets = Command::new("apt-get")
        .args(["indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)", "Created-By: Packages"])
        .output()
        .context("there is no apt-get: give a kernel by --kernel")?;
    let listed = String::from_utf8_lossy(&targets.stdout).into_owned();
    let debian = listed.lines().find_map(|line| line.strip_prefix("Debian Debian "));
    Ok(debian.context("this machine's apt knows no Debian: give a kernel by --kernel")?.to_owned())
}

/// Unpacks a package into a folder: nothing is installed.
pub(super) fn unpack(package: &Path, folder: &Path) -> Result<()> {
    succeed(Command::new("dpkg-deb").arg("-x").arg(package).arg(folder), "dpkg-deb")
}

/// Runs a command, whose output is shown only if it fails.
pub(super) fn succeed(command: &mut Command, what: &str) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{what} cannot be run"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let last: Vec<&str> = said.lines().rev().take(20).collect();
    let last: Vec<&str> = last.into_iter().rev().collect();
    bail!("{what}: {}:\n{}", output.status, last.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_package_is_the_one_of_the_highest_version() {
        let newest =
            |packages: [&'static str; 3]| packages.into_iter().max_by_key(|package| version(package));
        let sources = ["linux-source-6.19", "linux-source-7.12", "linux-source-7.3"];
        assert_eq!(newest(sources), Some("linux-source-7.12"));
        let images = ["6.1.0-9", "6.1.0-48", "6.1.0-47"];
        assert_eq!(newest(images), Some("6.1.0-48"));
        let images = ["6.12.9+deb13", "6.12.86+deb13", "6.1.0-48"];
        assert_eq!(newest(images), Some("6.12.86+deb13"));
    }
}
