//! Memory that kernels leave alone: the way through a kexec without `/dev/liveupdate`.

use std::path::Path;

use super::Sight;
use super::finding::Finding;
use super::finding::Id;
use super::finding::Level;
use super::host::Host;
use super::host::OpenFile;
use super::kernel::CommandLine;
use super::kexec;
use crate::setup::devices::Dax;
use crate::setup::devices::Mount;
use crate::setup::devices::Pmem;
use crate::setup::iomem::ABOVE_BYTES;
use crate::setup::iomem::Map;
use crate::setup::iomem::Unseen;
use crate::setup::memmap;
use crate::setup::memmap::Difference;
use crate::setup::memmap::GivenAs;
use crate::setup::memmap::Item;
use crate::setup::memmap::Range;
use crate::setup::modules;
use crate::setup::modules::Have;
use crate::setup::modules::Modules;

/// How it is set up.
const SET_UP: &str = "set some aside by `tideover setup reserve --size SIZE`";

/// What there is of it.
pub(super) struct Reserved {
    /// All that this kernel was told of memory.
    told: Vec<Item>,
    map: Result<Map, Unseen>,
    pmem: Vec<Pmem>,
    dax: Vec<Dax>,
    /// Whether kmem may take a character device for the kernel when it comes up.
    kmem: bool,
    /// Whether the kernel keeps to the place where it was loaded.
    stays: bool,
}

impl Reserved {
    pub(super) fn of_host(host: &Host, line: &CommandLine) -> Self {
        let barred = bars_kmem(line);
        let kmem = match Modules::of_host(host).have(modules::KMEM) {
            Have::BuiltIn => true,
            Have::Missing => false,
            Have::Loaded | Have::There | Have::Unknown => !barred,
        };
        Self {
            told: memmap::told(line.text()),
            map: Map::of_host(host),
            pmem: Pmem::all(host),
            dax: Dax::all(host),
            kmem,
            stays: line.has("nokaslr"),
        }
    }

    /// What is set aside.
    fn aside(&self) -> impl Iterator<Item = (&Item, GivenAs)> {
        self.told.iter().filter_map(|item| Some((item, item.given_as()?)))
    }

    /// Whether there is any.
    pub(super) fn is_there(&self) -> bool {
        self.aside().next().is_some() || !self.pmem.is_empty() || !self.dax.is_empty()
    }

    /// Whether a machine could be put there now.
    pub(super) fn is_usable(&self) -> bool {
        let direct = self.pmem.iter().flat_map(|pmem| &pmem.mounts).any(|mount| mount.dax);
        direct || self.dax.iter().any(|dax| dax.driver.as_deref() == Some("device_dax"))
    }
}

fn lies_in(file: &OpenFile, mount: &Mount) -> bool {
    let path = Path::new(&file.name);
    path != mount.at && path.starts_with(&mount.at)
}

pub(super) fn findings(sight: &Sight<'_>) -> Vec<Finding> {
    let reserved = &sight.reserved;
    if !reserved.is_there() {
        let id = Id::ReservedMemory;
        return vec![match sight.device.is_there() {
            true => id.ok("none, and none is needed: there is /dev/liveupdate"),
            false => id.warning(
                "none",
                format!("the other way through a kexec, by kernels without /dev/liveupdate: {SET_UP}"),
            ),
        }];
    }
    let mut all = look(reserved, &sight.files);
    all.extend(call(sight));
    all.extend(next(sight));
    all
}

/// What can be told of it without a next kernel.
pub(super) fn look(reserved: &Reserved, files: &[OpenFile]) -> Vec<Finding> {
    let mut all: Vec<Finding> = reserved.aside().map(|(item, given)| memory(reserved, item, given)).collect();
    if all.is_empty() && reserved.is_there() {
        all.push(
            Id::ReservedMemory
                .ok("none by memmap=; what the devices have, the firmware keeps from each kernel"),
        );
    }
    if all.is_empty() {
        all.push(Id::ReservedMemory.failure(
            "none: this kernel's command line has no memmap= that sets any aside",
            format!("{SET_UP} --write, or add the parameters that it shows; and boot"),
        ));
    }
    let is_device = |(_, given): (&Item, GivenAs)| given != GivenAs::Nothing;
    if reserved.pmem.is_empty() && reserved.dax.is_empty() && reserved.aside().any(is_device) {
        all.push(Id::ReservedDevice.failure(
            "no /dev/pmemN and no /dev/daxX.Y",
            "load the modules: device_dax and dax_hmem for memmap=SIZE%…, nd_pmem and nd_e820 for memmap=SIZE!…",
        ));
    }
    all.extend(reserved.pmem.iter().map(|pmem| block_device(pmem, files)));
    all.extend(reserved.dax.iter().map(|dax| character_device(reserved, dax)));
    all
}

/// One piece that this kernel was told to set aside.
fn memory(reserved: &Reserved, item: &Item, given: GivenAs) -> Finding {
    let id = Id::ReservedMemory;
    let shown = format!("{}: {}", item.shown(), memmap::place(item.range));
    if given == GivenAs::Nothing {
        return id.warning(
            format!("{shown}; nothing gives it out"),
            "for machines use the forms that `tideover setup reserve` shows",
        );
    }
    let map = match &reserved.map {
        Ok(map) => map,
        Err(error) => return id.warning(format!("{shown}; {error}"), "run this as root"),
    };
    if let Some(name) = map.used_as_memory(item.range) {
        let name = name.escape_debug();
        return id.failure(
            format!("{shown}, and the kernel uses some of it ({name} in /proc/iomem)"),
            taken(name.to_string().as_str()),
        );
    }
    if item.kernel_may_lie_there() && !reserved.stays {
        return id.failure(
            format!("{shown}: a kernel that boots may put itself there, as it takes its random place without regard to memmap=SIZE%… where that lies below SIZE"),
            "add nokaslr, or set aside memory that begins at or above its own size",
        );
    }
    if !is_seen(reserved, map, item.range, given) {
        return id.failure(
            format!("{shown}, and /proc/iomem has no such {}", given.in_iomem()),
            "see the kernel's log for `user-defined physical RAM map`: part of it may be no memory, or be reserved by the firmware",
        );
    }
    if given == GivenAs::Dax && reserved.kmem {
        return id.warning(
            format!("{shown}; kmem may take it for the kernel's own memory when its device comes up"),
            "add modprobe.blacklist=kmem to the kernel's command line",
        );
    }
    id.ok(shown)
}

fn taken(name: &str) -> &'static str {
    match name.contains("kmem") {
        true => "boot with modprobe.blacklist=kmem; what was in it is lost",
        false => "see that memmap= is read by this kernel: it is one of x86's",
    }
}

/// Whether the memory is where it was told to be. Linux 7.3 shows what is soft reserved by its device alone.
fn is_seen(reserved: &Reserved, map: &Map, range: Range, given: GivenAs) -> bool {
    map.named(given.in_iomem()).iter().any(|seen| seen.contains(range))
        || given == GivenAs::Dax
            && reserved.dax.iter().filter_map(|dax| dax.range).any(|dax| range.overlaps(dax))
}

fn block_device(pmem: &Pmem, files: &[OpenFile]) -> Finding {
    let (id, name) = (Id::ReservedDevice, format!("/dev/{}", pmem.name));
    if files.iter().any(|file| file.name == name) {
        return id.failure(
            format!("{name} is in use as it is: a page cache lies between, and what is not synchronized is lost in a kexec"),
            format!("stop who uses it, and make a file system: tideover setup format {name} --mount DIR --yes"),
        );
    }
    let Some(mount) = pmem.mounts.iter().find(|mount| !mount.dax).or(pmem.mounts.first()) else {
        return match pmem.holds {
            Some(holds) => id.warning(
                format!("{name} holds {holds}, and is not mounted"),
                format!("mount -o dax=always {name} DIR"),
            ),
            None => id.warning(
                format!("{name} has no file system; as it is it is no place for machines"),
                format!("tideover setup format {name} --mount DIR --yes"),
            ),
        };
    };
    let at = mount.at.display().to_string().escape_debug().to_string();
    if mount.dax {
        return id.ok(format!("{name}: {} at {at}, mapped directly", mount.kind.escape_debug()));
    }
    let found = format!(
        "{name} is mounted at {at} without dax=always: a page cache lies between, and what is not synchronized is lost in a kexec"
    );
    match files.iter().any(|file| lies_in(file, mount)) {
        true => id.failure(
            format!("{found}; files there are in use"),
            format!("stop who uses them, and mount it anew: umount {at} && mount -o dax=always {name} {at}"),
        ),
        false => id.warning(
            found,
            format!(
                "mount it anew before machines are put there: umount {at} && mount -o dax=always {name} {at}"
            ),
        ),
    }
}

fn character_device(reserved: &Reserved, dax: &Dax) -> Finding {
    let (id, name) = (Id::ReservedDevice, format!("/dev/{}", dax.name));
    match dax.driver.as_deref() {
        Some("device_dax") => {}
        Some("kmem") => {
            return id.failure(
                format!("{name} has the driver kmem: the kernel may use it as memory of its own"),
                format!(
                    "boot with modprobe.blacklist=kmem; while the kernel uses none of it, `tideover setup format {name} --yes` gets it back"
                ),
            );
        }
        Some(other) => {
            return id.warning(
                format!("{name} has the driver {}, and not device_dax", other.escape_debug()),
                format!("see what uses it; device_dax is chosen by echo {} > /sys/bus/dax/drivers/device_dax/new_id", dax.name),
            );
        }
        None => {
            let then = if reserved.kmem { ", before kmem is loaded" } else { "" };
            return id.warning(
                format!("{name} has no driver, and cannot be opened"),
                format!("tideover setup format {name} --yes{then}"),
            );
        }
    }
    match dax.mode {
        None => id.warning(format!("{name} has a driver and no node"), "run this where the host's /dev is: in no container"),
        Some(mode) if mode & 0o077 != 0 => id.warning(
            format!("{name} may be opened by others than its owner (mode {mode:04o}), who see all that is in a machine there"),
            format!("chmod 0600 {name}, and see which rule of udev's opens it"),
        ),
        Some(_) => id.ok(format!("{name}, for its owner alone")),
    }
}

/// How the next kernel is loaded. kexec_load(2) takes the firmware's word for what is memory.
fn call(sight: &Sight<'_>) -> Option<Finding> {
    let id = Id::ReservedKexec;
    let reserved = &sight.reserved;
    reserved.aside().next()?;
    let blind = "kexec_load(2) knows nothing of memmap=, and was seen to put what it boots over such memory";
    let by = "load kernels by kexec_file_load alone (kexec --kexec-file-syscall, or -s)";
    if kexec::call(sight).level != Level::Failure {
        return Some(id.ok("kexec_file_load keeps out of it").note(format!("{by}: {blind}")));
    }
    let found = format!("there is no kexec_file_load, and {blind}");
    let room = |range: Range| {
        let above = Range::sized(range.end, ABOVE_BYTES)?;
        Some(reserved.map.as_ref().ok()?.is_memory(above))
    };
    let all_have_room = reserved.aside().all(|(item, _)| room(item.range) == Some(true));
    Some(match all_have_room {
        true => id.warning(
            format!("{found}; 128 MiB of memory lie above it, where a small kernel goes first"),
            "boot a kernel built with CONFIG_KEXEC_FILE",
        ),
        false => id.failure(
            found,
            "boot a kernel built with CONFIG_KEXEC_FILE, or set aside memory that has 128 MiB above it",
        ),
    })
}

/// Whether the next kernel leaves the same memory alone.
fn next(sight: &Sight<'_>) -> Option<Finding> {
    sight.subject.kernel.as_ref()?;
    sight.reserved.aside().next()?;
    let Some(next) = &sight.subject.command_line else {
        let found = "sets the same memory aside (it is the running kernel's: no other is given)";
        return Some(Id::ReservedNext.ok(found));
    };
    Some(next_line(sight.told.text(), next))
}

/// Whether a kernel that is told `next` leaves the memory alone that this one was told to, by `own`.
pub(crate) fn next_line(own: &str, next: &str) -> Finding {
    let id = Id::ReservedNext;
    let (here, there) = (memmap::told(own), memmap::told(next));
    let (own, next) = (CommandLine::new(own), CommandLine::new(next));
    match memmap::compare(&here, &there) {
        Difference::Lost(items) => {
            let items = items.join(" ");
            let found = format!(
                "lacks {items}: the kernel would use that memory as its own, and all that is in it would be lost"
            );
            return id.failure(found, format!("add {items}"));
        }
        Difference::Overruled(items) => {
            let found = format!("says {}, which is about memory that is set aside here", items.join(" "));
            return id.failure(found, "leave that out");
        }
        Difference::Other(_) | Difference::None => {}
    }
    if there.iter().any(Item::kernel_may_lie_there) && !next.has("nokaslr") {
        return id.failure("lacks nokaslr: the kernel may put itself into the memory", "add nokaslr");
    }
    let gives_dax = here.iter().any(|item| item.given_as() == Some(GivenAs::Dax));
    if gives_dax && bars_kmem(&own) && !bars_kmem(&next) {
        let found =
            "lacks modprobe.blacklist=kmem: the kernel may make the memory its own when its device comes up";
        return id.failure(found, "add modprobe.blacklist=kmem");
    }
    match memmap::compare(&here, &there) {
        Difference::Other(items) => id.warning(
            format!("sets the same memory aside, and differs in {}", items.join(" ")),
            "see that this is meant",
        ),
        _ => id.ok("sets the same memory aside"),
    }
}

/// Whether kmem is not loaded by itself.
fn bars_kmem(line: &CommandLine) -> bool {
    line.values("modprobe.blacklist").any(|value| value.split(',').any(|name| name == "kmem"))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use ::liveupdate::OpenError;
    use ::liveupdate::kexec::LoadError;
    use ::vmm::control::DeviceKind;
    use ::vmm::control::Store;

    use super::super::device::Device;
    use super::super::tree::PID;
    use super::super::tree::Tree;
    use super::super::tree::device;
    use super::super::tree::good_kernel;
    use super::super::tree::image;
    use super::*;

    const PMEM: &str = "memmap=1G!4G";
    const DAX: &str = "memmap=1G%4G-1+0xefffffff modprobe.blacklist=kmem";
    const BEHIND: &str = "140000000-1ffffffff : System RAM\n";

    fn tree(line: &str, is: &str) -> Tree {
        let tree = Tree::new();
        tree.file("/proc/cmdline", format!("liveupdate=on {line}\n"));
        tree.file(
            "/proc/iomem",
            format!("100000-bfffffff : System RAM\n100000000-13fffffff : {is}\n{BEHIND}"),
        );
        tree
    }

    /// A host with a file system in such memory.
    fn pmem(options: &str) -> Tree {
        let tree = tree(PMEM, "Persistent Memory (legacy)");
        tree.file("/sys/class/block/pmem0/dev", "259:0\n");
        tree.file("/dev/pmem0", [0; 8192]);
        if !options.is_empty() {
            let mounts =
                format!("1 0 8:1 / / rw - ext4 /dev/vda rw\n2 1 259:0 / /m rw - ext4 /dev/pmem0 {options}\n");
            tree.file("/proc/self/mountinfo", mounts);
        }
        tree
    }

    /// A host with a character device.
    fn dax(line: &str, driver: &str) -> Tree {
        let tree = tree(line, "Soft Reserved");
        tree.file("/sys/bus/dax/devices/dax0.0/resource", "0x100000000\n");
        tree.file("/sys/bus/dax/devices/dax0.0/size", "1073741824\n");
        tree.file("/dev/dax0.0", "");
        mode(&tree, 0o600);
        if !driver.is_empty() {
            tree.link("/sys/bus/dax/devices/dax0.0/driver", format!("../../drivers/{driver}"));
        }
        tree
    }

    fn mode(tree: &Tree, mode: u32) {
        use std::os::unix::fs::PermissionsExt as _;
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(tree.path("/dev/dax0.0"), permissions).unwrap();
    }

    /// Has the machine lie there.
    fn at_path(tree: &mut Tree, path: &str) {
        let status = tree.status();
        status.store = Store::Path;
        status.path = Some(PathBuf::from(path));
    }

    fn absent() -> Device {
        Device::Refused(OpenError::Absent)
    }

    #[test]
    fn a_host_without_either_way_is_told_of_this_one() {
        let mut tree = Tree::new();
        tree.finds(Id::ReservedMemory, Level::Ok, "none is needed");
        tree.answers.device = absent;
        tree.finds(Id::ReservedMemory, Level::Warning, "tideover setup reserve --size SIZE");
    }

    #[test]
    fn memory_is_set_aside_if_the_kernel_was_told_and_shows_it() {
        pmem("rw,dax=always").finds(Id::ReservedMemory, Level::Ok, "memmap=1G!4G: 1 GiB at 0x100000000");
        dax(DAX, "device_dax").finds(Id::ReservedMemory, Level::Ok, "0xefffffff: 1 GiB");
        tree(PMEM, "System RAM").finds(Id::ReservedMemory, Level::Failure, "uses some of it (System RAM");
        tree(PMEM, "Reserved").finds(
            Id::ReservedMemory,
            Level::Failure,
            "no such Persistent Memory (legacy)",
        );
        tree("memmap=2G!4G", "Persistent Memory (legacy)").finds(
            Id::ReservedMemory,
            Level::Failure,
            "uses some of it",
        );
        tree("memmap=1G$4G", "Reserved").finds(Id::ReservedMemory, Level::Warning, "nothing gives it out");
        let hidden = tree(PMEM, "");
        hidden.file("/proc/iomem", "00000000-00000000 : System RAM\n");
        hidden.finds(Id::ReservedMemory, Level::Warning, "as root");
    }

    #[test]
    fn memory_that_is_shown_by_its_device_alone_is_there() {
        let tree = dax(DAX, "device_dax");
        tree.file(
            "/proc/iomem",
            format!("100000-bfffffff : System RAM\n100000000-13fffffff : dax0.0\n{BEHIND}"),
        );
        tree.finds(Id::ReservedMemory, Level::Ok, "1 GiB");
        tree.remove("/sys/bus");
        tree.finds(Id::ReservedMemory, Level::Failure, "no such Soft Reserved");
    }

    #[test]
    fn a_kernel_that_might_lie_in_it_is_a_failure() {
        let line = "memmap=8G%4G-1+0xefffffff modprobe.blacklist=kmem";
        let map = "100000-bfffffff : System RAM\n100000000-2ffffffff : Soft Reserved\n300000000-3ffffffff : System RAM\n";
        let tree = dax(line, "device_dax");
        tree.file("/proc/iomem", map);
        tree.finds(Id::ReservedMemory, Level::Failure, "add nokaslr");
        tree.file("/proc/cmdline", format!("liveupdate=on nokaslr {line}"));
        tree.finds(Id::ReservedMemory, Level::Ok, "8 GiB");
    }

    #[test]
    fn kmem_that_may_take_the_memory_is_told_of() {
        let line = "memmap=1G%4G-1+0xefffffff";
        let with = dax(line, "device_dax");
        with.file("/lib/modules/7.3.4/modules.dep", "kernel/drivers/dax/kmem.ko.xz:\n");
        with.finds(Id::ReservedMemory, Level::Warning, "modprobe.blacklist=kmem");
        with.file("/proc/cmdline", format!("liveupdate=on {line} modprobe.blacklist=x,kmem"));
        with.finds(Id::ReservedMemory, Level::Ok, "1 GiB");
        let without = dax(line, "device_dax");
        without.file("/lib/modules/7.3.4/modules.dep", "kernel/drivers/dax/device_dax.ko:\n");
        without.finds(Id::ReservedMemory, Level::Ok, "1 GiB");
        let built_in = dax(DAX, "device_dax");
        built_in.file("/lib/modules/7.3.4/modules.builtin", "kernel/drivers/dax/kmem.ko\n");
        built_in.finds(Id::ReservedMemory, Level::Warning, "kmem may take it");
        let taken = dax(DAX, "kmem");
        taken.finds(Id::ReservedDevice, Level::Failure, "driver kmem");
        taken.file("/proc/iomem", "100000000-13fffffff : Soft Reserved\n  100000000-13fffffff : System RAM (kmem)\n140000000-1ffffffff : System RAM\n");
        taken.finds(Id::ReservedMemory, Level::Failure, "what was in it is lost");
    }

    #[test]
    fn a_file_system_has_to_be_mapped_directly() {
        pmem("rw,dax=always").finds(Id::ReservedDevice, Level::Ok, "/dev/pmem0: ext4 at /m, mapped directly");
        let cached = pmem("rw");
        cached.finds(Id::ReservedDevice, Level::Warning, "umount /m && mount -o dax=always /dev/pmem0 /m");
        // The folder alone is no file of a machine's.
        cached.opens(PID, 7, "/m");
        cached.finds(Id::ReservedDevice, Level::Warning, "page cache");
        cached.opens(PID, 8, "/m/web1");
        cached.finds(Id::ReservedDevice, Level::Failure, "files there are in use");
    }

    #[test]
    fn a_device_as_it_is_is_no_place_for_machines() {
        let raw = pmem("");
        raw.finds(Id::ReservedDevice, Level::Warning, "no file system");
        raw.file("/dev/pmem0", b"XFSB");
        raw.finds(Id::ReservedDevice, Level::Warning, "holds a file system (xfs), and is not mounted");
        raw.opens(PID, 7, "/dev/pmem0");
        raw.finds(Id::ReservedDevice, Level::Failure, "is in use as it is");
    }

    #[test]
    fn a_character_device_needs_its_driver_and_is_its_owners_alone() {
        dax(DAX, "device_dax").finds(Id::ReservedDevice, Level::Ok, "/dev/dax0.0, for its owner alone");
        dax(DAX, "").finds(Id::ReservedDevice, Level::Warning, "tideover setup format /dev/dax0.0 --yes");
        dax(DAX, "fsdev_dax").finds(Id::ReservedDevice, Level::Warning, "fsdev_dax");
        let open = dax(DAX, "device_dax");
        mode(&open, 0o640);
        open.finds(Id::ReservedDevice, Level::Warning, "mode 0640");
        open.remove("/dev/dax0.0");
        open.finds(Id::ReservedDevice, Level::Warning, "no node");
        tree(DAX, "Soft Reserved").finds(Id::ReservedDevice, Level::Failure, "device_dax and dax_hmem");
    }

    #[test]
    fn the_next_kernel_has_to_leave_the_same_memory_alone() {
        let mut tree = pmem("rw,dax=always");
        assert_eq!(tree.find(Id::ReservedNext), None);
        tree.next(&image("7.3.5 (x)", &good_kernel()));
        tree.finds(Id::ReservedNext, Level::Ok, "the running kernel's");
        let mut find = |line: &str, level, about: &str| {
            tree.subject.command_line = Some(line.to_owned());
            tree.finds(Id::ReservedNext, level, about);
        };
        find("liveupdate=on memmap=1024M!0x100000000", Level::Ok, "the same memory");
        find("liveupdate=on", Level::Failure, "lacks memmap=1G!4G: the kernel would use");
        find("memmap=1G!4G memmap=1G@4G", Level::Failure, "says memmap=1G@4G");
        find("memmap=1G!4G memmap=1G!5G", Level::Warning, "differs in memmap=1G!5G");
    }

    #[test]
    fn the_next_kernel_has_to_keep_itself_and_kmem_out_too() {
        let large = "memmap=8G%4G-1+0xefffffff modprobe.blacklist=kmem";
        let says = |own: &str, next: &str| next_line(own, next);
        assert_eq!(says(&format!("nokaslr {large}"), &format!("{large} nokaslr")).level, Level::Ok);
        assert!(says(large, large).found.contains("lacks nokaslr"));
        let without = DAX.replace(" modprobe.blacklist=kmem", "");
        let finding = says(DAX, &without);
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.found.contains("lacks modprobe.blacklist=kmem"), "{finding:?}");
        assert_eq!(says(&without, &without).level, Level::Ok);
        assert_eq!(says("quiet", "").level, Level::Ok);
    }

    #[test]
    fn kexec_load_is_warned_of_and_without_the_other_call_it_is_a_failure_near_the_top() {
        let mut tree = pmem("rw,dax=always");
        tree.finds(Id::ReservedKexec, Level::Ok, "kexec_load(2) knows nothing of memmap=");
        tree.answers.file_load = || Err(LoadError::Unsupported);
        tree.finds(Id::ReservedKexec, Level::Warning, "CONFIG_KEXEC_FILE");
        tree.file(
            "/proc/iomem",
            "100000000-13fffffff : Persistent Memory (legacy)\n140000000-143ffffff : System RAM\n",
        );
        tree.finds(Id::ReservedKexec, Level::Failure, "128 MiB above it");
        assert_eq!(Tree::new().find(Id::ReservedKexec), None);
    }

    #[test]
    fn a_host_without_the_device_carries_what_lives_in_its_reserved_memory() {
        let mut tree = pmem("rw,dax=always");
        tree.answers.device = absent;
        tree.file("/proc/sys/kernel/osrelease", "6.12.1\n");
        tree.file("/boot/config-6.12.1", "CONFIG_KEXEC_FILE=y\nCONFIG_KVM=m\n");
        tree.finds(Id::MachineStore, Level::Failure, "not in reserved memory");
        at_path(&mut tree, "/m/web1");
        tree.finds(Id::MachineStore, Level::Ok, "/m/web1: no kernel has to preserve it");
        tree.finds(Id::MachineThroughKexec, Level::Ok, "/m/web1");
        let worst = super::super::worst(&tree.run());
        assert_eq!(worst, Level::Ok, "{:#?}", tree.run());
        tree.finds(Id::KernelVersion, Level::Ok, "6.12.1");
        tree.finds(Id::DeviceOpen, Level::Ok, "machines in reserved memory");
    }

    #[test]
    fn a_machine_there_needs_nothing_of_the_device_where_there_is_one() {
        let mut tree = dax(DAX, "device_dax");
        at_path(&mut tree, "/dev/dax0.0");
        let disk = tree.path("/disk").display().to_string();
        tree.status().devices.push(device(DeviceKind::Disk, &disk));
        tree.finds(Id::MachineStore, Level::Ok, "/dev/dax0.0");
        tree.finds(Id::KernelVersion, Level::Ok, "Linux 7.3.4");
        assert_eq!(tree.find(Id::MachineSeals), None);
        // Its devices are opened again, as any machine's.
        tree.finds(Id::MachineDisk, Level::Failure, "put the file back");
    }

    #[test]
    fn what_is_looked_at_after_the_boot_fails_where_nothing_is() {
        let tree = Tree::new();
        let host = tree.host();
        let all = look(&Reserved::of_host(&host, &CommandLine::of_host(&host)), &[]);
        assert_eq!((all.len(), all[0].level), (1, Level::Failure));
    }
}
