//! `tideover check`: can this host carry its machines through a kexec, by Linux's `/dev/liveupdate` or in memory that kernels leave
//! alone?
//!
//! A list of probes, each of which looks at one thing of the host ([`Host`]) and tells what it found, how bad that is and what to do
//! ([`Finding`]). Nothing that is found out here is certain to hold a moment later; it is said before it costs a machine.

mod device;
mod finding;
mod host;
mod image;
mod kernel;
mod kexec;
mod live;
mod machine;
mod memory;
mod next;
mod reserved;
mod scratch;
mod show;
#[cfg(test)]
mod tree;

use std::path::PathBuf;

pub(crate) use finding::Finding;
pub(crate) use finding::Level;
pub(crate) use host::Host;
pub(crate) use kernel::Choice;
pub(crate) use kernel::Config;
pub(crate) use kernel::release_text;
pub(crate) use machine::plain;
pub(crate) use memory::amount;
pub(crate) use reserved::next_line;
pub(crate) use show::check;
pub(crate) use show::reserved_memory;

use device::Device;
use host::OpenFile;
use image::Image;
use kernel::CommandLine;
use kernel::Log;
use kernel::Release;
use reserved::Reserved;
use scratch::Scratch;

/// What is to be carried, and where.
#[derive(Debug, Default)]
pub(crate) struct Subject {
    /// The machines' names; empty: all of this user's.
    pub(crate) machines: Vec<String>,
    /// The kernel that is to be booted, a bzImage; without, only this host is looked at.
    pub(crate) kernel: Option<PathBuf>,
    /// Its initial RAM disk.
    pub(crate) initrd: Option<PathBuf>,
    /// Its command line; without, that of the kernel that runs.
    pub(crate) command_line: Option<String>,
}

/// What more than one probe wants to know, looked up once.
struct Sight<'a> {
    host: &'a Host,
    subject: &'a Subject,
    /// The running kernel's.
    release: Option<Release>,
    config: Option<Config>,
    told: CommandLine,
    log: Log,
    device: Device,
    /// What the host's processes have open, as far as this one may know.
    files: Vec<OpenFile>,
    scratch: Scratch,
    reserved: Reserved,
    /// The next kernel, or why its image is none.
    next: Option<Result<Image, String>>,
}

impl<'a> Sight<'a> {
    fn look(host: &'a Host, subject: &'a Subject) -> Self {
        let (told, log) = (CommandLine::of_host(host), Log::of_host(host));
        let device = host.calls.device();
        let next = subject.kernel.as_deref().map(Image::open);
        let (release, config) = (Release::of_host(host), Config::of_host(host));
        let can_hand_over = config.as_ref().is_none_or(|config| config.get("KEXEC_HANDOVER") == Choice::Yes);
        let scratch = Scratch::of_host(host, &told, &log, can_hand_over);
        let (reserved, files) = (Reserved::of_host(host, &told), host.open_files());
        Self { host, subject, release, config, told, log, device, files, scratch, reserved, next }
    }

    /// Whether reserved memory is the one way there is.
    fn only_reserved(&self) -> bool {
        !self.device.is_there() && self.reserved.is_usable()
    }
}

type Probe = fn(&Sight<'_>) -> Vec<Finding>;

/// In the order in which they are shown.
const PROBES: [Probe; 8] = [
    kernel::findings,
    device::findings,
    scratch::findings,
    kexec::findings,
    reserved::findings,
    next::findings,
    memory::findings,
    machine::findings,
];

/// The same where reserved memory is the one way: what only `/dev/liveupdate` takes is not asked for.
const RESERVED_PROBES: [Probe; 6] = [
    kernel::of_any_way,
    device::not_needed,
    kexec::of_any_way,
    reserved::findings,
    next::of_any_way,
    machine::findings,
];

/// Looks at everything.
///
/// Opens `/dev/liveupdate`, which has one user at a time, for a moment, after `/dev/kvm`: the device's first opening since the
/// boot has the kernel read what the one before left, and whoever brings a handler has to be there then.
pub(crate) fn run(host: &Host, subject: &Subject) -> Vec<Finding> {
    let sight = Sight::look(host, subject);
    let probes: &[Probe] = if sight.only_reserved() { &RESERVED_PROBES } else { &PROBES };
    probes.iter().flat_map(|probe| probe(&sight)).collect()
}

/// How bad the worst of them is.
pub(crate) fn worst(findings: &[Finding]) -> Level {
    findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok)
}

#[cfg(test)]
mod tests {
    use super::finding::Id;
    use super::tree::Tree;
    use super::tree::good_kernel;
    use super::tree::gzip;
    use super::tree::image;
    use super::*;

    #[test]
    fn a_host_on_which_all_is_well_has_no_warning() {
        let mut tree = Tree::new();
        tree.next(&image("7.3.5 (someone) #2 SMP", &gzip(&good_kernel())));
        let findings = tree.run();
        let bad: Vec<_> = findings.iter().filter(|finding| finding.level != Level::Ok).collect();
        assert!(bad.is_empty(), "{bad:#?}");
        assert_eq!(worst(&findings), Level::Ok);
        assert!(findings.len() > 20, "{findings:#?}");
    }

    #[test]
    fn a_host_of_which_nothing_is_to_be_seen_is_told_of_without_a_panic() {
        let tree = Tree::new();
        for folder in ["/proc", "/sys", "/boot"] {
            tree.remove(folder);
        }
        assert_eq!(worst(&tree.run()), Level::Warning);
    }

    #[test]
    fn every_finding_is_in_the_schema_by_its_name_and_no_other() {
        let schema: serde_json::Value =
            serde_json::from_str(include_str!("../../../../docs/check.schema.json")).unwrap();
        let names = &schema["properties"]["findings"]["items"]["properties"]["id"]["enum"];
        assert_eq!(*names, serde_json::to_value(Id::ALL).unwrap());
    }

    #[test]
    fn the_worst_finding_is_the_verdict() {
        let ok = Id::Clock.ok("");
        let (warning, failure) = (Id::Clock.warning("", ""), Id::Clock.failure("", ""));
        assert_eq!(worst(&[]), Level::Ok);
        assert_eq!(worst(&[ok.clone(), warning.clone()]), Level::Warning);
        assert_eq!(worst(&[failure, warning, ok]), Level::Failure);
    }
}
