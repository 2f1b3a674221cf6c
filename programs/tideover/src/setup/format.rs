//! `tideover setup format`: gets a device of reserved memory ready for machines.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::process::ExitCode;
use std::process::Stdio;

use anyhow::Context as _;
use anyhow::bail;
use anyhow::ensure;
use rustix::fs::AtFlags;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::StatxFlags;
use rustix::mount::MountFlags;
use rustix::mount::UnmountFlags;

use super::arguments::FileSystem;
use super::arguments::Format;
use super::devices;
use super::devices::Dax;
use super::devices::Pmem;
use super::memmap::Range;
use crate::check::Host;

/// `STATX_ATTR_DAX`: the file is mapped directly, with no page cache between.
const ATTRIBUTE_DAX: u64 = 0x0020_0000;
const DRIVERS: &str = "/sys/bus/dax/drivers";
const MEMORY: &str = "/sys/devices/system/memory";

/// What is done to the host.
trait Hands {
    /// Runs a program to its end.
    fn run(&self, program: &str, arguments: &[&str]) -> anyhow::Result<()>;
    fn mount(&self, device: &Path, at: &Path, kind: &str) -> anyhow::Result<()>;
    fn unmount(&self, at: &Path) -> anyhow::Result<()>;
    /// Whether a new file there is mapped directly.
    fn maps_directly(&self, at: &Path) -> anyhow::Result<bool>;
    /// Writes to a file of the kernel's.
    fn tell(&self, path: &Path, text: &str) -> anyhow::Result<()>;
}

pub(super) fn format(arguments: &Format) -> anyhow::Result<ExitCode> {
    let (host, hands) = (Host::this(), Live);
    let mut said = Vec::new();
    let done = run(&host, &hands, arguments, &mut said);
    let text: String = said.iter().map(|line| format!("{line}\n")).collect();
    std::io::stdout().write_all(text.as_bytes()).context("cannot write the result")?;
    done?;
    Ok(if arguments.yes { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Says what is done, as far as it gets.
fn run(host: &Host, hands: &dyn Hands, arguments: &Format, said: &mut Vec<String>) -> anyhow::Result<()> {
    let shown = arguments.device.display().to_string().escape_debug().to_string();
    let real = host.real(&arguments.device).with_context(|| format!("{shown} is not there"))?;
    let name = real.strip_prefix("/dev").ok().and_then(Path::to_str).unwrap_or_default().to_owned();
    let work = Work { host, hands, arguments };
    if devices::is_dax(&name) && host.exists(&format!("/sys/bus/dax/devices/{name}")) {
        ensure!(
            arguments.mount.is_none(),
            "{shown} is given to a machine as it is, and takes no file system: leave --mount out"
        );
        return work.bind(&Dax::of_host(host, name), said);
    }
    if devices::is_pmem(&name) && host.exists(&format!("/sys/class/block/{name}")) {
        return work.make(&Pmem::of_host(host, name), said);
    }
    bail!("{shown} is no device of reserved memory: these are /dev/pmemN and /dev/daxX.Y")
}

struct Work<'a> {
    host: &'a Host,
    hands: &'a dyn Hands,
    arguments: &'a Format,
}

impl Work<'_> {
    /// Says it, and whether it is to be done.
    fn says(&self, said: &mut Vec<String>, what: String) -> bool {
        let will = if self.arguments.yes { "" } else { "would be done with --yes: " };
        said.push(format!("{will}{what}"));
        self.arguments.yes
    }

    /// Makes a file system.
    fn make(&self, pmem: &Pmem, said: &mut Vec<String>) -> anyhow::Result<()> {
        let device = format!("/dev/{}", pmem.name);
        if let Some(mount) = pmem.mounts.first() {
            bail!(
                "{device} is mounted at {}{}: what is there stays as it is",
                mount.at.display().to_string().escape_debug(),
                if mount.dax { " and mapped directly" } else { "" }
            );
        }
        if let Some(holds) = pmem.holds.filter(|_| !self.arguments.force) {
            bail!(
                "{device} holds {holds}, and perhaps machines: mount it (mount -o dax=always {device} DIR), or \
                 lose what is on it by --force"
            );
        }
        let (program, words) = self.maker(&device);
        if self.says(said, format!("{program} {}", words.join(" "))) {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            self.hands.run(program, &words)?;
        }
        match &self.arguments.mount {
            Some(at) => self.mount(&device, at, said),
            None => {
                said.push(format!("then: mount -o dax=always {device} DIR"));
                Ok(())
            }
        }
    }

    /// What makes the file system.
    fn maker(&self, device: &str) -> (&'static str, Vec<String>) {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
        let (program, mut all) = match self.arguments.kind {
            // Direct mapping takes blocks as large as a page; small file systems would get smaller ones.
            FileSystem::Ext4 => ("mkfs.ext4", words(&["-q", "-b", "4096"])),
            // Blocks that files share cannot be mapped directly by every kernel.
            FileSystem::Xfs => ("mkfs.xfs", words(&["-q", "-m", "reflink=0"])),
        };
        if self.arguments.force {
            all.push(match self.arguments.kind {
                FileSystem::Ext4 => "-F".to_owned(),
                FileSystem::Xfs => "-f".to_owned(),
            });
        }
        all.push(device.to_owned());
        (program, all)
    }

    /// Mounts it, for its owner alone, and looks whether its files are mapped directly.
    fn mount(&self, device: &str, at: &Path, said: &mut Vec<String>) -> anyhow::Result<()> {
        let kind = match self.arguments.kind {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
        };
        let shown = at.display().to_string().escape_debug().to_string();
        if !self.says(
            said,
            format!("mount -t {kind} -o nosuid,nodev,dax=always {device} {shown}; chmod 0700 {shown}"),
        ) {
            return Ok(());
        }
        let here = self.host.path(at);
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&here);
        made.with_context(|| format!("cannot make {shown}"))?;
        self.hands.mount(&self.host.path(device), &here, kind)?;
        let looked = fs::set_permissions(&here, fs::Permissions::from_mode(0o700))
            .with_context(|| format!("cannot change the mode of {shown}"))
            .and_then(|()| self.hands.maps_directly(&here));
        match looked {
            Ok(true) => {
                said.push(format!("files in {shown} are mapped directly, as the kernel says of one"));
                Ok(())
            }
            bad => {
                self.hands.unmount(&here)?;
                bad?;
                bail!(
                    "{shown}: the kernel says that a file there is not mapped directly (DAX), so it was unmounted: what a page cache has is lost in a kexec"
                )
            }
        }
    }

    /// Gives the device to the driver that lets it be mapped.
    fn bind(&self, dax: &Dax, said: &mut Vec<String>) -> anyhow::Result<()> {
        let name = &dax.name;
        match dax.driver.as_deref() {
            Some("device_dax") => {
                said.push(format!("/dev/{name} has the driver device_dax already"));
                return self.look(name, said);
            }
            Some("kmem") => {
                self.not_in_use(dax)?;
                self.tell(&format!("{DRIVERS}/kmem/unbind"), name, said)?;
            }
            Some(other) => {
                bail!("/dev/{name} has the driver {}, which this command does not know", other.escape_debug())
            }
            None => {}
        }
        let new = format!("{DRIVERS}/device_dax/new_id");
        ensure!(
            self.host.exists(&new),
            "there is no {new}: load the module device_dax (modprobe device_dax)"
        );
        self.tell(&new, name, said)?;
        if !self.arguments.yes {
            return Ok(());
        }
        let driver = Dax::of_host(self.host, name.clone()).driver;
        ensure!(
            driver.as_deref() == Some("device_dax"),
            "/dev/{name} did not get the driver device_dax: see the kernel's log"
        );
        self.look(name, said)
    }

    fn tell(&self, path: &str, name: &str, said: &mut Vec<String>) -> anyhow::Result<()> {
        if self.says(said, format!("echo {name} > {path}")) {
            self.hands
                .tell(&self.host.path(path), name)
                .with_context(|| format!("cannot write to {path}"))?;
        }
        Ok(())
    }

    /// Who may open it sees all of a guest's memory.
    fn look(&self, name: &str, said: &mut Vec<String>) -> anyhow::Result<()> {
        let node = format!("/dev/{name}");
        if Dax::of_host(self.host, name.to_owned()).mode.is_some_and(|mode| mode & 0o077 != 0)
            && self.says(said, format!("chmod 0600 {node}"))
        {
            fs::set_permissions(self.host.path(&node), fs::Permissions::from_mode(0o600))
                .with_context(|| format!("cannot change the mode of {node}"))?;
        }
        Ok(())
    }

    /// What kmem has given to the kernel, the kernel may use: then it cannot be taken back, and no machine can be in it.
    fn not_in_use(&self, dax: &Dax) -> anyhow::Result<()> {
        let name = &dax.name;
        let blocks = self.blocks(dax.range);
        let blocks = blocks.with_context(|| {
            format!("cannot tell whether the kernel uses the memory of /dev/{name}: run this as root")
        })?;
        let state = |block: &u64| self.host.text(format!("{MEMORY}/memory{block}/state"));
        let used = blocks.iter().filter(|block| state(block).is_some_and(|state| state != "offline")).count();
        ensure!(
            used == 0,
            "/dev/{name} has the driver kmem, and {used} of its {} blocks of memory are in use by the kernel; nothing that was \
             there is left. Boot with modprobe.blacklist=kmem",
            blocks.len()
        );
        Ok(())
    }

    /// The numbers of the memory blocks that lie in it.
    fn blocks(&self, range: Option<Range>) -> Option<Vec<u64>> {
        let bytes = u64::from_str_radix(&self.host.text(format!("{MEMORY}/block_size_bytes"))?, 16).ok()?;
        let range = range?;
        Some((range.start.checked_div(bytes)?..range.end.div_ceil(bytes)).collect())
    }
}

/// This host.
struct Live;

impl Hands for Live {
    fn run(&self, program: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
        let output = output.with_context(|| format!("cannot run {program}"))?;
        let why = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program}: {}: {}", output.status, why.trim().escape_debug());
        Ok(())
    }

    fn mount(&self, device: &Path, at: &Path, kind: &str) -> anyhow::Result<()> {
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount(device, at, kind, flags, Some(c"dax=always")).with_context(|| {
            format!("cannot mount {} with dax=always: the kernel's log says why", device.display())
        })
    }

    fn unmount(&self, at: &Path) -> anyhow::Result<()> {
        rustix::mount::unmount(at, UnmountFlags::empty()).context("cannot unmount it")
    }

    fn maps_directly(&self, at: &Path) -> anyhow::Result<bool> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file =
            rustix::fs::open(at, flags, Mode::RUSR | Mode::WUSR).context("cannot make a file there")?;
        let seen = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::empty());
        Ok(seen.context("statx")?.stx_attributes.bits() & ATTRIBUTE_DAX != 0)
    }

    fn tell(&self, path: &Path, text: &str) -> anyhow::Result<()> {
        Ok(fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())?)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::path::PathBuf;

    use super::super::tests::Tree;
    use super::*;

    /// Writes down what it is told to do; gives a device its driver as the kernel would.
    struct Noted<'a> {
        tree: &'a Tree,
        done: RefCell<Vec<String>>,
        direct: bool,
    }

    impl Noted<'_> {
        fn note(&self, what: String) -> anyhow::Result<()> {
            self.done.borrow_mut().push(what);
            Ok(())
        }
    }

    impl Hands for Noted<'_> {
        fn run(&self, program: &str, arguments: &[&str]) -> anyhow::Result<()> {
            self.note(format!("{program} {}", arguments.join(" ")))
        }

        fn mount(&self, _: &Path, at: &Path, kind: &str) -> anyhow::Result<()> {
            assert!(at.is_dir());
            self.note(format!("mount {kind}"))
        }

        fn unmount(&self, _: &Path) -> anyhow::Result<()> {
            self.note("unmount".to_owned())
        }

        fn maps_directly(&self, _: &Path) -> anyhow::Result<bool> {
            Ok(self.direct)
        }

        fn tell(&self, path: &Path, text: &str) -> anyhow::Result<()> {
            let told = path.strip_prefix(self.tree.path(DRIVERS))?.display().to_string();
            if told == "device_dax/new_id" {
                self.tree.link("/sys/bus/dax/devices/dax0.0/driver", "../drivers/device_dax");
            }
            self.note(format!("{text} > {told}"))
        }
    }

    fn asked(device: &str) -> Format {
        Format { device: PathBuf::from(device), mount: None, kind: FileSystem::Ext4, force: false, yes: true }
    }

    /// What was done, and what came of it.
    fn run(tree: &Tree, direct: bool, arguments: &Format) -> (Vec<String>, String) {
        let hands = Noted { tree, done: RefCell::default(), direct };
        let mut said = Vec::new();
        let result = super::run(&tree.host(), &hands, arguments, &mut said);
        let end = result.map_or_else(|error| format!("{error:#}"), |()| said.join("; "));
        (hands.done.into_inner(), end)
    }

    fn pmem() -> Tree {
        let tree = Tree::new();
        tree.file("/sys/class/block/pmem0/dev", "259:0\n");
        tree.file("/dev/pmem0", [0; 4096]);
        tree
    }

    #[test]
    fn a_file_system_is_made_and_mounted_for_its_owner_alone() {
        let tree = pmem();
        let at = Some(PathBuf::from("/srv/machines"));
        let (done, end) = run(&tree, true, &Format { mount: at.clone(), ..asked("/dev/pmem0") });
        assert_eq!(done, ["mkfs.ext4 -q -b 4096 /dev/pmem0", "mount ext4"]);
        assert!(end.contains("chmod 0700 /srv/machines") && end.contains("mapped directly"), "{end}");
        let mode = fs::metadata(tree.path("/srv/machines")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let (done, end) = run(&tree, true, &Format { kind: FileSystem::Xfs, ..asked("/dev/pmem0") });
        assert_eq!(done, ["mkfs.xfs -q -m reflink=0 /dev/pmem0"]);
        assert!(end.ends_with("then: mount -o dax=always /dev/pmem0 DIR"), "{end}");
    }

    #[test]
    fn a_file_system_that_is_not_mapped_directly_is_unmounted_again() {
        let arguments = Format { mount: Some(PathBuf::from("/srv/machines")), ..asked("/dev/pmem0") };
        let (done, end) = run(&pmem(), false, &arguments);
        assert_eq!(done.last().map(String::as_str), Some("unmount"));
        assert!(end.contains("is not mapped directly"), "{end}");
    }

    #[test]
    fn nothing_is_done_without_yes() {
        let mount = Some(PathBuf::from("/srv/machines"));
        let tree = pmem();
        let (done, end) = run(&tree, true, &Format { yes: false, mount, ..asked("/dev/pmem0") });
        assert!(done.is_empty() && end.contains("would be done with --yes: mkfs.ext4"), "{done:?} {end}");
        assert!(!tree.path("/srv").exists());
        let (done, end) = run(&dax("kmem", "offline"), true, &Format { yes: false, ..asked("/dev/dax0.0") });
        assert!(done.is_empty() && end.contains("with --yes: echo dax0.0 >"), "{done:?} {end}");
    }

    #[test]
    fn what_lies_on_a_device_is_lost_only_by_force_and_what_is_mounted_never() {
        let tree = pmem();
        tree.file("/dev/pmem0", b"XFSB");
        let (done, end) = run(&tree, true, &asked("/dev/pmem0"));
        assert!(done.is_empty() && end.contains("holds a file system (xfs)"), "{end}");
        let forced = Format { force: true, ..asked("/dev/pmem0") };
        assert_eq!(run(&tree, true, &forced).0, ["mkfs.ext4 -q -b 4096 -F /dev/pmem0"]);
        tree.file("/proc/self/mountinfo", "2 1 259:0 / /m rw - ext4 /dev/pmem0 rw,dax=always\n");
        let (done, end) = run(&tree, true, &forced);
        assert!(done.is_empty() && end.contains("is mounted at /m"), "{end}");
    }

    #[test]
    fn other_devices_are_refused_by_whatever_name() {
        let tree = pmem();
        tree.file("/dev/sda", "");
        tree.file("/dev/pmem7", "");
        tree.link("/dev/pmem8", "sda");
        for device in ["/dev/sda", "/dev/pmem7", "/dev/pmem8", "/proc/cmdline"] {
            let (done, end) = run(&tree, true, &asked(device));
            assert!(done.is_empty() && end.contains("no device of reserved memory"), "{device}: {end}");
        }
        assert!(run(&tree, true, &asked("/dev/none\u{1b}")).1.contains("/dev/none\\u{1b} is not there"));
        // A link to one is that one.
        tree.link("/dev/by-name", "pmem0");
        assert_eq!(run(&tree, true, &asked("/dev/by-name")).0.len(), 1);
    }

    /// A device of 256 MiB at 4 GiB, and two blocks of memory in this state.
    fn dax(driver: &str, state: &str) -> Tree {
        let tree = Tree::new();
        tree.file("/sys/bus/dax/devices/dax0.0/resource", "0x100000000\n");
        tree.file("/sys/bus/dax/devices/dax0.0/size", "268435456\n");
        if !driver.is_empty() {
            tree.link("/sys/bus/dax/devices/dax0.0/driver", &format!("../drivers/{driver}"));
        }
        tree.file("/sys/bus/dax/drivers/device_dax/new_id", "");
        tree.file("/sys/devices/system/memory/block_size_bytes", "8000000\n");
        tree.file("/sys/devices/system/memory/memory32/state", "offline\n");
        tree.file("/sys/devices/system/memory/memory33/state", format!("{state}\n"));
        tree.file("/dev/dax0.0", "");
        fs::set_permissions(tree.path("/dev/dax0.0"), fs::Permissions::from_mode(0o600)).unwrap();
        tree
    }

    #[test]
    fn a_device_gets_the_driver_that_lets_it_be_mapped() {
        let (new, unbind) = ("dax0.0 > device_dax/new_id", "dax0.0 > kmem/unbind");
        assert_eq!(run(&dax("", ""), true, &asked("/dev/dax0.0")).0, [new]);
        assert_eq!(run(&dax("kmem", "offline"), true, &asked("/dev/dax0.0")).0, [unbind, new]);
        let (done, end) = run(&dax("device_dax", ""), true, &asked("/dev/dax0.0"));
        assert!(done.is_empty() && end.contains("already"), "{end}");
        let (done, end) = run(&dax("fsdev_dax", ""), true, &asked("/dev/dax0.0"));
        assert!(done.is_empty() && end.contains("fsdev_dax"), "{end}");
    }

    #[test]
    fn memory_that_the_kernel_uses_is_not_taken_from_it() {
        let (done, end) = run(&dax("kmem", "online"), true, &asked("/dev/dax0.0"));
        assert!(
            done.is_empty() && end.contains("1 of its 2 blocks") && end.contains("modprobe.blacklist=kmem"),
            "{end}"
        );
        let tree = dax("kmem", "offline");
        tree.file("/sys/devices/system/memory/block_size_bytes", "0\n");
        assert!(run(&tree, true, &asked("/dev/dax0.0")).1.contains("cannot tell"));
    }

    #[test]
    fn a_device_that_others_may_open_is_made_its_owners() {
        let tree = dax("device_dax", "");
        fs::set_permissions(tree.path("/dev/dax0.0"), fs::Permissions::from_mode(0o644)).unwrap();
        let (_, end) = run(&tree, true, &asked("/dev/dax0.0"));
        assert!(end.contains("chmod 0600 /dev/dax0.0"), "{end}");
        assert_eq!(fs::metadata(tree.path("/dev/dax0.0")).unwrap().permissions().mode() & 0o777, 0o600);
        let error = run(&tree, true, &Format { mount: Some(PathBuf::from("/m")), ..asked("/dev/dax0.0") }).1;
        assert!(error.contains("takes no file system"), "{error}");
    }

    #[test]
    fn a_device_without_its_module_is_told_of() {
        let tree = dax("", "");
        fs::remove_file(tree.path("/sys/bus/dax/drivers/device_dax/new_id")).unwrap();
        assert!(run(&tree, true, &asked("/dev/dax0.0")).1.contains("modprobe device_dax"));
    }

    #[test]
    fn a_file_in_a_folder_of_a_page_cache_is_not_mapped_directly() {
        // As no file of this host's temporary folder is; so this call is known to answer.
        assert!(!Live.maps_directly(&std::env::temp_dir()).unwrap());
    }
}
