//! A kernel as Debian ships it, and those of its modules that hosts need.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;

use crate::cargo::Workspace;

use super::kernel;
use super::kernel::Apt;
use super::programs;

/// Names a package of a kernel: a file, or a folder that it is unpacked in.
pub(super) const PACKAGE: &str = "TIDEOVER_E2E_DEBIAN";
/// How the packages of kernels for virtual machines are called.
const PACKAGES: &str = "^linux-image-[0-9].*-cloud-amd64$";

/// What hosts need, with what that depends on; and whether a kernel may be without it.
const WANTED: [(&str, bool); 10] = [
    // What ext4 asks for by what it does, and not by its name.
    ("crc32c_generic", true),
    ("ext4", false),
    ("virtio_pci", false),
    ("virtio_blk", false),
    ("kvm_amd", false),
    ("nd_pmem", false),
    ("nd_e820", false),
    ("device_dax", false),
    ("dax_hmem", false),
    ("tun", false),
];

/// The newest of this release, which is fetched once if `fetch` says so; `None` if there is none then.
pub(super) fn kept_or_fetched(suite: &str, fetch: bool) -> Result<Option<Stock>> {
    if let Some(named) = std::env::var_os(PACKAGE).filter(|path| !path.is_empty()).map(PathBuf::from) {
        let shown = named.display();
        let stock = if named.is_dir() { Stock::of(&named) } else { unpacked(&named) };
        return Ok(Some(stock.with_context(|| format!("{PACKAGE}: {shown} is no kernel's package"))?));
    }
    let cache = kernel::cache_folder()?;
    let folder = cache.join(format!("debian-{suite}"));
    if !folder.exists() {
        if !fetch {
            return Ok(None);
        }
        self::fetch(suite, &cache, &folder)?;
    }
    Ok(Some(Stock::of(&folder).with_context(|| format!("in {}", folder.display()))?))
}

/// A package of somebody else, unpacked below the workspace's target folder.
fn unpacked(package: &Path) -> Result<Stock> {
    ensure!(package.is_file(), "it is neither a file nor a folder");
    let folder = Workspace::read()?.target_directory.join("e2e-debian");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    kernel::unpack(package, &folder)?;
    Stock::of(&folder)
}

fn fetch(suite: &str, cache: &Path, folder: &Path) -> Result<()> {
    fs::create_dir_all(cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let apt_folder = cache.join(format!("debian-{suite}-apt"));
    let apt = Apt::set_up(&apt_folder, suite)?;
    let package = apt.newest(PACKAGES).with_context(|| format!("{suite} has no kernel"))?;
    println!("e2e: fetching Debian's {package}");
    let partial = cache.join(format!("debian-{suite}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    fs::create_dir_all(&partial)?;
    kernel::unpack(&apt.download(&package, &apt.archives())?, &partial)?;
    fs::rename(&partial, folder).context("cannot keep the kernel")?;
    fs::remove_dir_all(apt_folder).context("cannot remove the package")
}

/// A kernel and its modules.
pub(super) struct Stock {
    pub(super) kernel: PathBuf,
    /// In the order in which they are loaded.
    pub(super) modules: Vec<Module>,
}

/// A module, as the kernel takes it.
pub(super) struct Module {
    /// As the kernel calls it.
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

impl Stock {
    /// What is in an unpacked package.
    fn of(package: &Path) -> Result<Self> {
        let boot = only_entry(&package.join("boot"), "vmlinuz-")?;
        let release = boot.strip_prefix("vmlinuz-").context("a kernel without a name")?;
        let modules = ["lib/modules", "usr/lib/modules"].map(|below| package.join(below).join(release));
        let modules = modules.iter().find(|folder| folder.is_dir());
        let tree = Tree::read(modules.with_context(|| format!("there are no modules of {release}"))?)?;
        Ok(Self { kernel: package.join("boot").join(&boot), modules: tree.in_order()? })
    }
}

/// The name of the one entry that begins so.
fn only_entry(folder: &Path, begins: &str) -> Result<String> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let names: Vec<String> = names.filter(|name| name.starts_with(begins)).collect();
    match <[String; 1]>::try_from(names) {
        Ok([name]) => Ok(name),
        Err(names) => bail!("{} has {} files {begins}*, not one", folder.display(), names.len()),
    }
}

/// The modules that a kernel has: in files of their own, and in itself. What depends on what is asked of the modules: the
/// list of it is made when a package is installed.
struct Tree {
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

impl Tree {
    fn read(folder: &Path) -> Result<Self> {
        let built_in = fs::read_to_string(folder.join("modules.builtin"));
        let built_in = built_in.context("it does not say what is built in")?;
        let built_in = built_in.lines().filter_map(|line| module_name(Path::new(line))).collect();
        let mut files = BTreeMap::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else if let Some(name) = module_name(&entry.path()) {
                    files.insert(name, entry.path());
                }
            }
        }
        Ok(Self { files, built_in })
    }

    fn in_order(&self) -> Result<Vec<Module>> {
        let (mut found, mut seen) = (Vec::new(), BTreeSet::new());
        for (name, may_be_absent) in WANTED {
            let is_there = self.files.contains_key(name) || self.built_in.contains(name);
            if is_there || !may_be_absent {
                self.visit(name, &mut seen, &mut found)?;
            }
        }
        Ok(found)
    }

    /// Puts a module behind those that it depends on.
    fn visit(&self, name: &str, seen: &mut BTreeSet<String>, found: &mut Vec<Module>) -> Result<()> {
        if self.built_in.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let file = self.files.get(name).with_context(|| format!("it has no module {name}"))?;
        let bytes = unpacked_module(file).with_context(|| format!("cannot read {}", file.display()))?;
        let needed = needs(&bytes).with_context(|| format!("{name} does not say what it depends on"))?;
        for other in needed {
            self.visit(&other, seen, found).with_context(|| format!("for {name}"))?;
        }
        found.push(Module { name: name.to_owned(), bytes });
        Ok(())
    }
}

/// What the kernel calls the module of a file, if it is one.
fn module_name(file: &Path) -> Option<String> {
    let (name, end) = file.file_name()?.to_str()?.split_once(".ko")?;
    ["", ".xz"].contains(&end).then(|| name.replace('-', "_"))
}

fn unpacked_module(file: &Path) -> Result<Vec<u8>> {
    if file.extension() != Some("xz".as_ref()) {
        return Ok(fs::read(file)?);
    }
    let mut unpack = Command::new("xz");
    unpack.env("PATH", programs::path()).arg("-dc").arg(file).stdin(Stdio::null());
    let unpacked = unpack.output().context("xz cannot be run: it is in Debian's xz-utils")?;
    ensure!(unpacked.status.success(), "xz: {}", unpacked.status);
    Ok(unpacked.stdout)
}

/// The modules that this one depends on, as it says itself: `depends=` with names and commas, in a string of its section
/// `.modinfo`.
fn needs(module: &[u8]) -> Option<Vec<String>> {
    let mut strings = module.split(|byte| *byte == 0);
    let listed = strings.find_map(|string| string.strip_prefix(b"depends="))?;
    let listed = std::str::from_utf8(listed).ok()?;
    Some(listed.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(modules: &[(&str, &str)], built_in: &[&str]) -> (PathBuf, Tree) {
        let folder =
            std::env::temp_dir().join(format!("xtask-stock-{}-{}", std::process::id(), modules.len()));
        fs::create_dir_all(folder.join("kernel/drivers")).unwrap();
        for (name, needs) in modules {
            let text = format!("\0license=GPL\0depends={needs}\0name={name}\0");
            fs::write(folder.join(format!("kernel/drivers/{name}.ko")), text).unwrap();
        }
        let lines: String = built_in.iter().map(|name| format!("kernel/fs/{name}.ko\n")).collect();
        fs::write(folder.join("modules.builtin"), lines).unwrap();
        let tree = Tree::read(&folder).unwrap();
        (folder, tree)
    }

    #[test]
    fn a_module_comes_once_and_after_what_it_depends_on() {
        let modules = [
            ("kvm-amd", "kvm"),
            ("kvm", "irqbypass"),
            ("irqbypass", ""),
            ("virtio_blk", "virtio,virtio_ring"),
            ("virtio_ring", "virtio"),
            ("virtio", ""),
            ("nd_pmem", ""),
            ("nd_e820", ""),
            ("device_dax", ""),
            ("dax_hmem", ""),
            ("tun", ""),
        ];
        let (folder, tree) = tree(&modules, &["ext4", "virtio_pci"]);
        let order: Vec<String> = tree.in_order().unwrap().into_iter().map(|module| module.name).collect();
        fs::remove_dir_all(folder).unwrap();
        let begin = ["virtio", "virtio_ring", "virtio_blk", "irqbypass", "kvm", "kvm_amd", "nd_pmem"];
        assert_eq!(order[..7], begin);
        assert_eq!(order.len(), 11);
    }

    #[test]
    fn a_module_that_is_missing_is_named() {
        let (folder, tree) = tree(&[("virtio_blk", "virtio"), ("virtio_pci", "")], &["ext4"]);
        let error = tree.in_order().err().map(|error| format!("{error:#}"));
        fs::remove_dir_all(folder).unwrap();
        assert_eq!(error.as_deref(), Some("for virtio_blk: it has no module virtio"));
    }

    #[test]
    fn a_module_says_itself_what_it_depends_on() {
        assert_eq!(needs(b"x\0depends=a,b-c\0y"), Some(vec!["a".to_owned(), "b_c".to_owned()]));
        assert_eq!(needs(b"\0depends=\0"), Some(Vec::new()));
        assert_eq!(needs(b"\0independs=a\0"), None);
        assert_eq!(module_name(Path::new("x/kvm-amd.ko.xz")).as_deref(), Some("kvm_amd"));
        assert_eq!(module_name(Path::new("x/kvm.ko")).as_deref(), Some("kvm"));
        assert_eq!(module_name(Path::new("x/kvm.ko.zst")), None);
        assert_eq!(module_name(Path::new("x/modules.order")), None);
    }
}
