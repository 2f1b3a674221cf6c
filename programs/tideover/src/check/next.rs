//! The kernel that is to be booted: can it be, will it find what is handed over, does it fit into scratch memory?

use std::collections::BTreeSet;

use super::Sight;
use super::finding::Finding;
use super::finding::Id;
use super::image::Formats;
use super::image::Image;
use super::kernel::CommandLine;
use super::kernel::Config;
use super::kernel::Release;
use super::kernel::release_text;
use super::memory::amount;

/// What a kernel's releases write, where the kernel that runs does not show it.
const KNOWN: [(Release, [&str; 3]); 1] = [(Release { major: 7, minor: 3 }, ["kho-v4", "luo-v5", "memfd-v2"])];
/// What goes into scratch memory beside a kernel and its RAM disk: the kernel's parameters, what checks the image.
const BESIDE_BYTES: u64 = 2 << 20;
/// What a kernel needs besides in one piece, until it knows which memory it may use. One with little in it dies without a word at
/// 4 MiB and boots at 8.
const ROOM_BYTES: u64 = 16 << 20;
const PAGE: u64 = 4096;

pub(super) fn findings(sight: &Sight<'_>) -> Vec<Finding> {
    let image = match image(sight) {
        Ok(image) => image,
        Err(all) => return all,
    };
    let config = config(sight, image);
    vec![
        loadable(image),
        version(sight, image),
        formats(sight, image),
        configuration(image, config.as_ref()),
        command_line(sight, image, config.as_ref()),
        fits(sight, image),
    ]
}

/// What has to be known whatever carries machines.
pub(super) fn of_any_way(sight: &Sight<'_>) -> Vec<Finding> {
    let image = match image(sight) {
        Ok(image) => image,
        Err(all) => return all,
    };
    let (line, whose) = line(sight);
    let id = Id::NextCommandLine;
    vec![
        loadable(image),
        too_long(image, &line, whose).unwrap_or_else(|| id.ok(format!("is short enough{whose}"))),
    ]
}

/// The next kernel's image, or what is to be said where there is none.
fn image<'a>(sight: &'a Sight<'_>) -> Result<&'a Image, Vec<Finding>> {
    match &sight.next {
        None => Err(Vec::new()),
        Some(Ok(image)) => Ok(image),
        Some(Err(error)) => {
            let advice = "give a bzImage of a kernel for x86-64, built with CONFIG_RELOCATABLE";
            Err(vec![Id::NextImage.failure(error.escape_debug().to_string(), advice)])
        }
    }
}

/// What kexec_file_load asks of an image, beside what was looked at when it was read.
fn loadable(image: &Image) -> Finding {
    let (id, description) = (Id::NextImage, &image.description);
    let (major, minor) = description.protocol;
    if !description.above_4_gib || !description.relocatable {
        return id.failure(
            "the kernel cannot be moved, so it cannot be put into scratch memory",
            "build it with CONFIG_RELOCATABLE",
        );
    }
    let version =
        description.version.as_deref().unwrap_or("of a version that it does not tell").escape_debug();
    id.ok(format!("Linux {version}, boot protocol {major}.{minor}"))
}

/// Whether it is the very build that runs.
fn is_the_same(sight: &Sight<'_>, image: &Image) -> bool {
    let build = sight.host.text("/proc/sys/kernel/version").filter(|build| !build.is_empty());
    let version = image.description.version.as_deref();
    release_text(sight.host).as_deref() == image.release()
        && version.zip(build).is_some_and(|(version, build)| version.ends_with(&build))
}

fn version(sight: &Sight<'_>, image: &Image) -> Finding {
    let id = Id::NextVersion;
    let next = image.release().unwrap_or_default();
    let shown = next.escape_debug();
    let runs = release_text(sight.host).unwrap_or_default().escape_debug().to_string();
    match (Release::parse(next), sight.release) {
        (Some(release), _) if release < Release::FIRST => id.failure(
            format!("Linux {shown} takes nothing over: that came with Linux {}", Release::FIRST),
            format!("boot Linux {} or later", Release::FIRST),
        ),
        (Some(release), Some(running)) if release.major != running.major => id.warning(
            format!("Linux {shown}, and {runs} runs: their formats have to be the same"),
            "see below whether they are, and try it on a host without machines first",
        ),
        (Some(_), _) if is_the_same(sight, image) => id.ok("the very build that runs"),
        (Some(_), _) => id.ok(format!("Linux {shown}; {runs} runs")),
        (None, _) => id
            .warning("the image does not tell its version", "see that it is no older than the one that runs"),
    }
}

fn known(release: Option<Release>) -> Option<Formats> {
    let (_, [kho, luo, memfd]) = KNOWN.into_iter().find(|(known, _)| Some(*known) == release)?;
    let one = |name: &str| BTreeSet::from([name.to_owned()]);
    Some(Formats { kho: one(kho), luo: one(luo), memfd: one(memfd) })
}

/// What the kernel that runs writes, as far as it shows it, or its image, or its version is known.
fn running(sight: &Sight<'_>) -> Formats {
    let mut formats = known(sight.release).unwrap_or_default();
    let begins = |path: &str, with: &str| {
        let bytes = sight.host.bytes(path)?;
        let at = bytes.windows(with.len()).position(|window| window == with.as_bytes())?;
        let end = bytes[at..].iter().position(|byte| *byte == 0)?;
        Some(BTreeSet::from([String::from_utf8_lossy(&bytes[at..at + end]).into_owned()]))
    };
    formats.kho = begins("/sys/kernel/debug/kho/out/fdt", "kho-v").unwrap_or(formats.kho);
    formats.luo = begins("/sys/kernel/debug/kho/out/sub_fdts/LUO", "luo-v").unwrap_or(formats.luo);
    let missing = formats.kho.is_empty() || formats.luo.is_empty() || formats.memfd.is_empty();
    if !missing {
        return formats;
    }
    let image = release_text(sight.host).map(|release| sight.host.path(format!("/boot/vmlinuz-{release}")));
    let image = image.and_then(|path| Image::open(&path).ok()).and_then(|image| image.contents.ok());
    let Some(of_image) = image.map(|contents| contents.formats) else { return formats };
    let or = |found: BTreeSet<String>, other| if found.is_empty() { other } else { found };
    Formats {
        kho: or(formats.kho, of_image.kho),
        luo: or(formats.luo, of_image.luo),
        memfd: or(formats.memfd, of_image.memfd),
    }
}

fn formats(sight: &Sight<'_>, image: &Image) -> Finding {
    let id = Id::NextFormats;
    if is_the_same(sight, image) {
        return id.ok("the same build, so the same formats");
    }
    let (read, next) = match &image.contents {
        Ok(contents) => ("", contents.formats.clone()),
        Err(why) => match known(image.release().and_then(Release::parse)) {
            Some(formats) => (" (by its version: the kernel in the image was not looked at)", formats),
            None => {
                return id.warning(
                    format!("cannot be told: {}", why.escape_debug()),
                    "try it on a host without machines first: kernels whose formats differ lose what is handed over",
                );
            }
        },
    };
    let running = running(sight);
    let all = [
        (
            &running.kho,
            &next.kho,
            "CONFIG_KEXEC_HANDOVER",
            "it would boot as if nothing had been handed over",
        ),
        (&running.luo, &next.luo, "CONFIG_LIVEUPDATE", "it would panic at its boot"),
        (&running.memfd, &next.memfd, "CONFIG_LIVEUPDATE_MEMFD", "no session would come back (EIO)"),
    ];
    for (runs, next, option, then) in all {
        if next.is_empty() {
            let found = format!("the next kernel was built without {option}: {then}");
            return id.failure(found, format!("build it with {option}"));
        }
        if !runs.is_empty() && runs.is_disjoint(next) {
            return id.failure(
                format!("{} here, and {} in the next kernel: {then}", list(runs), list(next)),
                "boot a kernel whose formats are those of the one that runs",
            );
        }
    }
    let shown = [list(&next.kho), list(&next.luo), list(&next.memfd)].join(", ");
    if running.kho.is_empty() || running.luo.is_empty() || running.memfd.is_empty() {
        return id.warning(
            format!("{shown}{read}; not all of the running kernel's can be told"),
            "as root, mount -t debugfs none /sys/kernel/debug, and see that both kernels' formats are the same",
        );
    }
    id.ok(format!("{shown}, as here{read}"))
}

fn list(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(" or ")
}

/// How the next kernel was built: in its image, or installed beside it.
fn config(sight: &Sight<'_>, image: &Image) -> Option<Config> {
    image.config().or_else(|| Config::of_release(sight.host, image.release()?))
}

fn configuration(image: &Image, config: Option<&Config>) -> Finding {
    let id = Id::NextConfiguration;
    match (config, &image.contents) {
        (Some(config), _) => config.finding(id),
        // That the formats are there says so.
        (None, Ok(_)) => id.ok("is neither in the image nor in /boot; what is in it was looked at").note(
            "see that it has CONFIG_KVM, which cannot be told",
        ),
        (None, Err(_)) => id.warning(
            "is neither in the image nor in /boot",
            "see that it has CONFIG_KEXEC_HANDOVER, CONFIG_LIVEUPDATE, CONFIG_LIVEUPDATE_MEMFD and CONFIG_KVM",
        ),
    }
}

/// What the next kernel is to be told, and whose line that is.
fn line(sight: &Sight<'_>) -> (CommandLine, &'static str) {
    match &sight.subject.command_line {
        Some(text) => (CommandLine::new(text), ""),
        None => (sight.told.clone(), " (it is the running kernel's: no other is given)"),
    }
}

fn too_long(image: &Image, line: &CommandLine, whose: &str) -> Option<Finding> {
    let (have, most) = (line.text().len() as u64, image.description.command_line_bytes);
    let found = || format!("{have} bytes, and the kernel takes {most}{whose}");
    (have > most).then(|| Id::NextCommandLine.failure(found(), "make it shorter"))
}

fn command_line(sight: &Sight<'_>, image: &Image, config: Option<&Config>) -> Finding {
    let id = Id::NextCommandLine;
    let (line, whose) = line(sight);
    if let Some(finding) = too_long(image, &line, whose) {
        return finding;
    }
    let (missing, perhaps) = line.missing(config);
    if !missing.is_empty() {
        return id.failure(
            format!("lacks {}: what is handed over would be lost{whose}", missing.join(" and ")),
            format!("add {}", [missing.clone(), perhaps].concat().join(" ")),
        );
    }
    if !perhaps.is_empty() {
        return id.warning(
            format!("says nothing of kho{whose}"),
            "add kho=on, unless the kernel was built with CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT",
        );
    }
    id.ok(format!("turns handover and live update on{whose}"))
}

/// The next kernel boots in scratch memory alone, so it is loaded there, each part in one piece.
fn fits(sight: &Sight<'_>, image: &Image) -> Finding {
    let id = Id::NextFits;
    let initrd = match &sight.subject.initrd {
        None => 0,
        Some(path) => match std::fs::metadata(path) {
            Ok(file) => file.len(),
            Err(error) => {
                let found =
                    format!("the initial RAM disk {}: {error}", path.display().to_string().escape_debug());
                return id.failure(found, "give one that can be read");
            }
        },
    };
    let kernel = image.description.init_bytes.next_multiple_of(PAGE);
    let parts = format!("the kernel takes {}, its initial RAM disk {}", amount(kernel), amount(initrd));
    let Some(areas) = sight.scratch.areas() else {
        return id
            .warning(format!("{parts}; how much room there is cannot be told"), "see scratch memory above");
    };
    let needs = [BESIDE_BYTES, kernel, initrd.next_multiple_of(PAGE)];
    let once = (kernel + initrd + BESIDE_BYTES + ROOM_BYTES).div_ceil(1 << 20).next_multiple_of(64);
    let advice =
        format!("make the initial RAM disk smaller, or boot afresh with kho_scratch=64M,{once}M,64M");
    match left(areas, needs).map(|left| left.into_iter().max().unwrap_or_default()) {
        None => {
            let most = areas.iter().copied().max().unwrap_or_default();
            let found = format!("{parts}: no room in scratch memory, whose largest area has {}", amount(most));
            id.failure(found, advice)
        }
        Some(left) if left < ROOM_BYTES => id.warning(
            format!("{parts}, which leaves {} of scratch memory: a kernel for which that is too little dies without a word", amount(left)),
            advice,
        ),
        Some(left) => id.ok(format!("{parts}, which leaves {} of scratch memory", amount(left))),
    }
}

/// What is left of the areas when each of these was put into the first that has room, as Linux does.
fn left(areas: &[u64], needs: [u64; 3]) -> Option<Vec<u64>> {
    let mut areas = areas.to_vec();
    for need in needs {
        let area = areas.iter_mut().find(|area| **area >= need)?;
        *area -= need;
    }
    Some(areas)
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::super::tree::Tree;
    use super::super::tree::good_kernel;
    use super::super::tree::gzip;
    use super::super::tree::image;
    use super::super::tree::kernel;
    use super::*;

    const MIB: u64 = 1 << 20;
    const OTHER: &str = "7.3.5 (someone) #9 SMP Mon";

    fn tree(image: &[u8]) -> Tree {
        let mut tree = Tree::new();
        tree.next(image);
        tree
    }

    fn with(formats: &[&str]) -> Tree {
        tree(&image(OTHER, &gzip(&kernel(formats, None))))
    }

    #[test]
    fn nothing_is_said_of_a_kernel_that_is_not_given() {
        assert!(Tree::new().run().iter().all(|finding| !format!("{:?}", finding.id).starts_with("Next")));
    }

    #[test]
    fn an_image_that_is_none_or_cannot_be_moved_is_a_failure() {
        tree(b"MZ").finds(Id::NextImage, Level::Failure, "no whole bzImage");
        assert_eq!(tree(b"MZ").find(Id::NextVersion), None);
        let good = image(OTHER, &good_kernel());
        tree(&good).finds(Id::NextImage, Level::Ok, "Linux 7.3.5 (someone) #9 SMP Mon, boot protocol 2.15");
        for field in [0x234, 0x236] {
            let mut fixed = good.clone();
            fixed[field] &= !2;
            fixed[field] &= if field == 0x234 { 0 } else { !0 };
            tree(&fixed).finds(Id::NextImage, Level::Failure, "CONFIG_RELOCATABLE");
        }
    }

    #[test]
    fn a_version_is_compared_with_that_which_runs() {
        let of = |version: &str| tree(&image(version, &good_kernel()));
        of("7.3.4 (x) #1 SMP Fri").finds(Id::NextVersion, Level::Ok, "the very build");
        of("7.3.4 (x) #2 SMP Mon").finds(Id::NextVersion, Level::Ok, "Linux 7.3.4; 7.3.4 runs");
        of("7.4.0 (x)").finds(Id::NextVersion, Level::Ok, "Linux 7.4.0");
        of("8.0.0 (x)").finds(Id::NextVersion, Level::Warning, "formats");
        of("6.18.9 (x)").finds(Id::NextVersion, Level::Failure, "6.19");
        of("").finds(Id::NextVersion, Level::Warning, "does not tell");
    }

    #[test]
    fn formats_have_to_be_the_same() {
        let find = |formats: &[&str], level, about: &str| with(formats).finds(Id::NextFormats, level, about);
        find(&["kho-v4", "luo-v5", "memfd-v2"], Level::Ok, "kho-v4, luo-v5, memfd-v2, as here");
        find(&["kho-v4", "luo-v5", "memfd-v1", "memfd-v2"], Level::Ok, "memfd-v1 or memfd-v2");
        find(&["kho-v5", "luo-v5", "memfd-v2"], Level::Failure, "kho-v4 here, and kho-v5 in the next");
        find(&["kho-v4", "luo-v6", "memfd-v2"], Level::Failure, "panic");
        find(&["kho-v4", "luo-v5", "memfd-v3"], Level::Failure, "EIO");
        find(&["luo-v5", "memfd-v2"], Level::Failure, "CONFIG_KEXEC_HANDOVER");
        find(&["kho-v4", "memfd-v2"], Level::Failure, "CONFIG_LIVEUPDATE");
        find(&["kho-v4", "luo-v5"], Level::Failure, "CONFIG_LIVEUPDATE_MEMFD");
    }

    #[test]
    fn formats_of_a_kernel_that_cannot_be_unpacked_are_those_of_its_version() {
        let lz4 = [0x02, 0x21, 0x4c, 0x18, 0, 0];
        let of = |version: &str| tree(&image(version, &lz4));
        of(OTHER).finds(Id::NextFormats, Level::Ok, "by its version");
        of("7.9.1 (x)").finds(Id::NextFormats, Level::Warning, "packed by lz4");
        of("7.3.4 (x) #1 SMP Fri").finds(Id::NextFormats, Level::Ok, "the same build");
    }

    #[test]
    fn formats_of_the_kernel_that_runs_are_seen_known_or_read_from_its_image() {
        let tree = with(&["kho-v4", "luo-v5", "memfd-v2"]);
        // What it shows goes before what is known of its version.
        tree.file("/sys/kernel/debug/kho/out/sub_fdts/LUO", "luo-v6\0\0\0");
        tree.finds(Id::NextFormats, Level::Failure, "luo-v6 here");
        tree.remove("/sys/kernel/debug");
        tree.finds(Id::NextFormats, Level::Ok, "as here");
        tree.file("/proc/sys/kernel/osrelease", "7.2.1");
        tree.finds(Id::NextFormats, Level::Warning, "not all of the running kernel's");
        let own = kernel(&["kho-v4", "luo-v5", "memfd-v1"], None);
        tree.file("/boot/vmlinuz-7.2.1", image("7.2.1", &gzip(&own)));
        tree.finds(Id::NextFormats, Level::Failure, "memfd-v1 here, and memfd-v2");
    }

    #[test]
    fn the_configuration_is_in_the_image_or_beside_it() {
        let formats = ["kho-v4", "luo-v5", "memfd-v2"];
        let tree = with(&formats);
        tree.finds(Id::NextConfiguration, Level::Ok, "neither in the image nor in /boot");
        tree.file("/boot/config-7.3.5", "CONFIG_LIVEUPDATE=y\n");
        tree.finds(Id::NextConfiguration, Level::Failure, "(/boot/config-7.3.5)");
        let own = kernel(
            &formats,
            Some(
                "CONFIG_KEXEC_FILE=y\nCONFIG_MEMFD_CREATE=y\nCONFIG_KEXEC_HANDOVER=y\nCONFIG_LIVEUPDATE=y\n",
            ),
        );
        let mut tree = super::tests::tree(&image(OTHER, &gzip(&own)));
        tree.finds(Id::NextConfiguration, Level::Warning, "without CONFIG_KVM (in the image)");
        tree.next(&image(OTHER, &[0x02, 0x21, 0x4c, 0x18, 0, 0]));
        tree.finds(Id::NextConfiguration, Level::Warning, "see that it has CONFIG_KEXEC_HANDOVER");
    }

    #[test]
    fn the_next_command_line_has_to_turn_it_on_too() {
        let mut tree = tree(&image(OTHER, &good_kernel()));
        let find = |tree: &Tree, level, about| tree.finds(Id::NextCommandLine, level, about);
        find(&tree, Level::Ok, "the running kernel's");
        tree.subject.command_line = Some("quiet".to_owned());
        find(&tree, Level::Failure, "lacks liveupdate=on: what is handed over would be lost ->");
        tree.subject.command_line = Some("liveupdate=on".to_owned());
        find(&tree, Level::Ok, "turns handover and live update on ->");
        tree.subject.command_line = Some("liveupdate=on ".repeat(200));
        find(&tree, Level::Failure, "takes 2047");
        tree.subject.command_line = Some("liveupdate=on".to_owned());
        tree.next(&image(OTHER, &kernel(&[], None)));
        find(&tree, Level::Warning, "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT");
    }

    #[test]
    fn a_kernel_and_its_ram_disk_have_to_go_into_scratch_memory() {
        let mut tree = tree(&image(OTHER, &good_kernel()));
        let find = |tree: &Tree, level, about| tree.finds(Id::NextFits, level, about);
        find(&tree, Level::Ok, "the kernel takes 40 MiB, its initial RAM disk 0 KiB, which leaves 256 MiB");
        tree.file("/initrd", vec![0; 100]);
        tree.subject.initrd = Some(tree.path("/initrd"));
        let scratch = "/sys/kernel/debug/kho/out/scratch_len";
        tree.file(scratch, "0x2b00000\n0x400000\n");
        find(&tree, Level::Warning, "which leaves 4 MiB");
        tree.file(scratch, "0x2000000\n0x2000000\n");
        find(
            &tree,
            Level::Failure,
            "largest area has 32 MiB -> make the initial RAM disk smaller, or boot afresh with kho_scratch=64M,64M,64M",
        );
        tree.remove("/sys/kernel/debug");
        tree.file("/proc/cmdline", "liveupdate=on");
        find(&tree, Level::Warning, "cannot be told");
        tree.subject.initrd = Some(tree.path("/none"));
        find(&tree, Level::Failure, "/none");
    }

    #[test]
    fn parts_go_into_the_first_area_that_has_room() {
        // As a host with Linux 7.3 was seen to do: beside the small parts, a kernel of 13.4 MiB and RAM disks.
        let kernel = 14_135_296;
        let fits = |areas: [u64; 3], initrd| {
            left(&areas.map(|mib| mib * MIB), [BESIDE_BYTES, kernel, initrd]).is_some()
        };
        assert!(!fits([8, 8, 8], 768_000));
        assert!(fits([16, 4, 4], 768_000) && fits([4, 16, 4], 768_000));
        assert!(!fits([16, 4, 4], 7_059_456) && fits([16, 12, 4], 11_253_760));
        assert!(fits([32, 4, 4], 15_448_064) && !fits([32, 4, 4], 19_642_368));
        assert_eq!(left(&[10, 20], [1, 9, 5]), Some(vec![0, 15]));
    }
}
