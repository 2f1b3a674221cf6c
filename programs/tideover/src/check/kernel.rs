//! The kernel that runs: its version, how it was built, what it was told.

use std::fmt;
use std::io::Read as _;

use super::Sight;
use super::finding::Finding;
use super::finding::Id;
use super::host::Host;

/// More than any kernel's configuration has, unpacked.
const MOST_BYTES: u64 = 16 << 20;
/// Where a kernel's configuration is, by its release.
const CONFIGS: [&str; 4] =
    ["/boot/config-", "/lib/modules/*/config", "/usr/lib/modules/*/config", "/lib/modules/*/build/.config"];

/// A kernel's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Release {
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl Release {
    /// The first that has `/dev/liveupdate`.
    pub(super) const FIRST: Self = Self { major: 6, minor: 19 };

    /// Reads `7.3.4-rc1` and the like.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (major, rest) = text.split_once('.')?;
        let end = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
        Some(Self { major: major.parse().ok()?, minor: rest[..end].parse().ok()? })
    }

    pub(super) fn of_host(host: &Host) -> Option<Self> {
        Self::parse(&release_text(host)?)
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The running kernel's release, as `uname -r` gives it.
pub(crate) fn release_text(host: &Host) -> Option<String> {
    host.text("/proc/sys/kernel/osrelease")
}

/// What an option of a kernel's configuration is set to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Built in, or a module.
    Yes,
    No,
    /// The option does not occur: this kernel does not know it, or what it needs is off.
    Unsaid,
}

/// How a kernel was built.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    text: String,
    /// Where that is said.
    pub(super) source: String,
}

impl Config {
    fn new(text: String, source: String) -> Self {
        Self { text, source }
    }

    /// Unpacks what a kernel has built into it.
    pub(super) fn unpack(packed: &[u8], source: String) -> Option<Self> {
        let mut text = String::new();
        flate2::read::GzDecoder::new(packed).take(MOST_BYTES).read_to_string(&mut text).ok()?;
        Some(Self::new(text, source))
    }

    pub(crate) fn of_host(host: &Host) -> Option<Self> {
        let built_in = "/proc/config.gz";
        host.bytes(built_in)
            .and_then(|packed| Self::unpack(&packed, built_in.to_owned()))
            .or_else(|| Self::of_release(host, &release_text(host)?))
    }

    /// The one that was installed with a kernel of this release.
    pub(super) fn of_release(host: &Host, release: &str) -> Option<Self> {
        // It becomes part of a path.
        if release.is_empty() || release.contains('/') {
            return None;
        }
        CONFIGS.into_iter().find_map(|path| {
            let path = match path.split_once('*') {
                Some((before, after)) => format!("{before}{release}{after}"),
                None => format!("{path}{release}"),
            };
            Some(Self::new(host.text(&path)?, path))
        })
    }

    /// What an option is set to; its name is given without `CONFIG_`.
    pub(crate) fn get(&self, option: &str) -> Choice {
        for line in self.text.lines() {
            let set = line.strip_prefix("CONFIG_").and_then(|line| line.strip_prefix(option));
            match set {
                Some("=y" | "=m") => return Choice::Yes,
                Some("=n") => return Choice::No,
                _ => {}
            }
            let unset = line.strip_prefix("# CONFIG_").and_then(|line| line.strip_prefix(option));
            if unset == Some(" is not set") {
                return Choice::No;
            }
        }
        Choice::Unsaid
    }

    /// Whether it hands over without being told to.
    pub(super) fn kho_by_default(&self) -> bool {
        self.get("KEXEC_HANDOVER_ENABLE_DEFAULT") == Choice::Yes
    }

    /// What of a kernel's configuration machines need and is missing.
    pub(super) fn missing(&self) -> Vec<&'static str> {
        let needed = ["KEXEC_HANDOVER", "LIVEUPDATE", "KEXEC_FILE", "MEMFD_CREATE"];
        let mut missing: Vec<_> =
            needed.into_iter().filter(|option| self.get(option) != Choice::Yes).collect();
        // Where LIVEUPDATE is not, this is not spoken of; neither by kernels that have it without a choice.
        if self.get("LIVEUPDATE_MEMFD") == Choice::No {
            missing.push("LIVEUPDATE_MEMFD");
        }
        missing
    }

    pub(super) fn has_kvm(&self) -> bool {
        self.get("KVM") == Choice::Yes
    }

    /// Tells what is missing, as a finding on the running or the next kernel.
    pub(super) fn finding(&self, id: Id) -> Finding {
        let (missing, source) = (self.missing(), &self.source);
        if !missing.is_empty() {
            let names = with_prefix(&missing);
            return id
                .failure(format!("without {names} ({source})"), format!("build the kernel with {names}"));
        }
        if !self.has_kvm() {
            return id.warning(
                format!("without CONFIG_KVM ({source})"),
                "only machines whose guest is a thread run there; build the kernel with CONFIG_KVM for the others",
            );
        }
        id.ok(format!("has what is needed ({source})"))
    }
}

fn with_prefix(options: &[&str]) -> String {
    options.iter().map(|option| format!("CONFIG_{option}")).collect::<Vec<_>>().join(", ")
}

/// What a kernel is told when it is booted.
#[derive(Debug, Clone, Default)]
pub(super) struct CommandLine(String);

impl CommandLine {
    pub(super) fn new(text: &str) -> Self {
        Self(text.to_owned())
    }

    pub(super) fn of_host(host: &Host) -> Self {
        Self(host.text("/proc/cmdline").unwrap_or_default())
    }

    pub(super) fn text(&self) -> &str {
        &self.0
    }

    fn words(&self) -> impl Iterator<Item = &str> {
        // What follows is for the first process.
        self.0.split_whitespace().take_while(|word| *word != "--")
    }

    /// Whether this parameter, which has no value, is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.words().any(|word| word == name)
    }

    /// All values of a parameter.
    pub(super) fn values(&self, name: &str) -> impl Iterator<Item = &str> {
        self.words().filter_map(move |word| word.strip_prefix(name)?.strip_prefix('='))
    }

    /// The last value of a parameter: the kernel goes by that.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        self.values(name).last()
    }

    /// The same, as the kernel reads what can be on or off.
    pub(super) fn switch(&self, name: &str) -> Option<bool> {
        let value = self.value(name)?.as_bytes();
        match (value.first()?.to_ascii_lowercase(), value.get(1).map(u8::to_ascii_lowercase)) {
            (b'y' | b't' | b'1', _) | (b'o', Some(b'n')) => Some(true),
            (b'n' | b'f' | b'0', _) | (b'o', Some(b'f')) => Some(false),
            _ => None,
        }
    }

    /// What has to be added for a kernel that is built so, if that is known. `None` for a parameter that may be
    /// missing or not.
    pub(super) fn missing(&self, config: Option<&Config>) -> (Vec<&'static str>, Vec<&'static str>) {
        let (mut missing, mut perhaps) = (Vec::new(), Vec::new());
        if self.switch("liveupdate") != Some(true) {
            missing.push("liveupdate=on");
        }
        match (self.switch("kho"), config.map(Config::kho_by_default)) {
            (Some(true), _) | (None, Some(true)) => {}
            (None, None) => perhaps.push("kho=on"),
            (Some(false), _) | (None, Some(false)) => missing.push("kho=on"),
        }
        (missing, perhaps)
    }
}

/// The kernel's log.
#[derive(Debug, Default)]
pub(super) struct Log(Option<String>);

impl Log {
    pub(super) fn of_host(host: &Host) -> Self {
        Self(host.kernel_log())
    }

    /// The first line that says this, from there on.
    pub(super) fn find(&self, said: &str) -> Option<&str> {
        self.0.as_deref()?.lines().find_map(|line| line.find(said).map(|at| &line[at..]))
    }
}

pub(super) fn findings(sight: &Sight<'_>) -> Vec<Finding> {
    vec![version(sight), configuration(sight), command_line(sight), clock(sight)]
}

/// What has to be known whatever carries machines.
pub(super) fn of_any_way(sight: &Sight<'_>) -> Vec<Finding> {
    let text = release_text(sight.host).unwrap_or_default();
    vec![Id::KernelVersion.ok(format!("Linux {}", text.escape_debug())), clock(sight)]
}

fn version(sight: &Sight<'_>) -> Finding {
    let id = Id::KernelVersion;
    let text = release_text(sight.host).unwrap_or_default().escape_debug().to_string();
    let newer = format!("boot Linux {} or later", Release::FIRST);
    match sight.release {
        None => id.warning(format!("`{text}` is no version that can be read"), newer),
        Some(release) if release < Release::FIRST => {
            id.failure(format!("Linux {text} has no /dev/liveupdate"), newer)
        }
        Some(_) => id.ok(format!("Linux {text}")),
    }
}

fn configuration(sight: &Sight<'_>) -> Finding {
    let id = Id::KernelConfiguration;
    match &sight.config {
        Some(config) => config.finding(id),
        None if sight.device.is_there() => id.ok("is not to be found; the kernel shows below what it has"),
        None => id.warning(
            "is not to be found: there is no /proc/config.gz, and none in /boot or /lib/modules",
            "see that the kernel was built with CONFIG_KEXEC_HANDOVER, CONFIG_LIVEUPDATE and CONFIG_KEXEC_FILE",
        ),
    }
}

fn command_line(sight: &Sight<'_>) -> Finding {
    let id = Id::KernelCommandLine;
    let (missing, perhaps) = sight.told.missing(sight.config.as_ref());
    let told = ["kho", "liveupdate", "kho_scratch"];
    let told = told.map(|name| Some(format!("{name}={}", sight.told.value(name)?.escape_debug())));
    let told = told.into_iter().flatten().collect::<Vec<_>>().join(" ");
    // Where the device is, the kernel was told, whatever can be read.
    if sight.device.is_there() {
        return id.ok(if told.is_empty() {
            "nothing of kho and liveupdate, and both are on".to_owned()
        } else {
            told
        });
    }
    if !missing.is_empty() {
        let advice = format!(
            "add {} to the kernel's command line, and boot it",
            [missing.clone(), perhaps].concat().join(" ")
        );
        return id.failure(format!("lacks {}", missing.join(" and ")), advice);
    }
    if !perhaps.is_empty() {
        return id.warning(
            format!("{told}, and nothing of kho"),
            "add kho=on, unless the kernel was built with CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT",
        );
    }
    id.ok(told)
}

/// What tells the pause across a kexec.
fn clock(sight: &Sight<'_>) -> Finding {
    let id = Id::Clock;
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    match sight.host.text(source).as_deref() {
        Some("tsc") => id.ok("the TSC, which goes on across a kexec"),
        Some(other) => id.warning(
            format!("{}, not the TSC", other.escape_debug()),
            "the pause is known to a second only, and guests' clocks are set no better: boot with tsc=reliable if the TSC is",
        ),
        None => id.warning("the kernel does not say which it uses", "the pause may be known to a second only"),
    }
}

#[cfg(test)]
mod tests {
    use ::liveupdate::OpenError;

    use super::super::Level;
    use super::super::device::Device;
    use super::super::tree::Tree;
    use super::super::tree::gzip;
    use super::*;

    fn absent() -> Device {
        Device::Refused(OpenError::Absent)
    }

    #[test]
    fn a_version_is_read_up_to_its_second_number() {
        let of = |text| Release::parse(text).map(|release| (release.major, release.minor));
        assert_eq!(of("7.3.4"), Some((7, 3)));
        assert_eq!(of("6.19-rc1"), Some((6, 19)));
        assert_eq!(of("10.0+deb"), Some((10, 0)));
        assert_eq!([of(""), of("7"), of("x.y"), of("7.")], [None; 4]);
        assert!(Release::parse("6.9") < Some(Release::FIRST) && Release::parse("7.0") > Some(Release::FIRST));
    }

    #[test]
    fn a_kernel_that_is_too_old_is_a_failure() {
        let tree = Tree::new();
        tree.finds(Id::KernelVersion, Level::Ok, "Linux 7.3.4");
        tree.file("/proc/sys/kernel/osrelease", "6.18.44-fc");
        tree.finds(Id::KernelVersion, Level::Failure, "6.19 or later");
        tree.file("/proc/sys/kernel/osrelease", "\u{1b}[1m");
        tree.finds(Id::KernelVersion, Level::Warning, "`\\u{1b}[1m`");
    }

    #[test]
    fn each_option_that_is_missing_is_named() {
        let tree = Tree::new();
        tree.finds(Id::KernelConfiguration, Level::Ok, "/boot/config-7.3.4");
        let most =
            "CONFIG_KEXEC_FILE=y\nCONFIG_KEXEC_HANDOVER=y\nCONFIG_LIVEUPDATE=y\nCONFIG_MEMFD_CREATE=y\n";
        tree.file("/boot/config-7.3.4", most);
        tree.finds(Id::KernelConfiguration, Level::Warning, "CONFIG_KVM");
        tree.file("/boot/config-7.3.4", format!("{most}CONFIG_KVM=y\n"));
        tree.finds(Id::KernelConfiguration, Level::Ok, "");
        for option in ["KEXEC_FILE", "KEXEC_HANDOVER", "LIVEUPDATE", "MEMFD_CREATE"] {
            let text = most.replace(&format!("CONFIG_{option}=y"), &format!("# CONFIG_{option} is not set"));
            tree.file("/boot/config-7.3.4", text);
            tree.finds(Id::KernelConfiguration, Level::Failure, &format!("without CONFIG_{option} ("));
        }
        tree.file("/boot/config-7.3.4", format!("{most}# CONFIG_LIVEUPDATE_MEMFD is not set\n"));
        tree.finds(Id::KernelConfiguration, Level::Failure, "CONFIG_LIVEUPDATE_MEMFD");
    }

    #[test]
    fn the_configuration_is_that_of_the_kernel_itself_first() {
        let mut tree = Tree::new();
        tree.file("/proc/config.gz", gzip(b"CONFIG_KVM=y\n"));
        tree.finds(Id::KernelConfiguration, Level::Failure, "/proc/config.gz");
        tree.file("/proc/config.gz", b"not packed");
        tree.finds(Id::KernelConfiguration, Level::Ok, "/boot/config-7.3.4");
        tree.remove("/boot");
        tree.file("/lib/modules/7.3.4/config", "CONFIG_KVM=y\n");
        tree.finds(Id::KernelConfiguration, Level::Failure, "/lib/modules/7.3.4/config");
        tree.remove("/lib");
        tree.finds(Id::KernelConfiguration, Level::Ok, "not to be found");
        tree.answers.device = absent;
        tree.finds(Id::KernelConfiguration, Level::Warning, "not to be found");
    }

    #[test]
    fn a_switch_is_read_as_the_kernel_reads_it() {
        let of = |text: &str| CommandLine::new(text).switch("kho");
        assert_eq!(["kho=on", "kho=1", "kho=Y", "kho=true", "x kho=off kho=on"].map(of), [Some(true); 5]);
        assert_eq!(["kho=off", "kho=0", "kho=no", "kho=on kho=off"].map(of), [Some(false); 4]);
        assert_eq!(["", "kho", "kho=", "kho=oh", "akho=on", "-- kho=on"].map(of), [None; 6]);
    }

    #[test]
    fn what_the_command_line_lacks_is_named() {
        let mut tree = Tree::new();
        let lacks = |tree: &Tree, level, about| tree.finds(Id::KernelCommandLine, level, about);
        lacks(&tree, Level::Ok, "liveupdate=on kho_scratch=64M,256M,64M");
        // The device is there, whatever the command line says.
        tree.file("/proc/cmdline", "quiet");
        lacks(&tree, Level::Ok, "both are on");
        tree.answers.device = absent;
        lacks(&tree, Level::Failure, "lacks liveupdate=on ->");
        tree.file("/proc/cmdline", "liveupdate=on");
        lacks(&tree, Level::Ok, "");
        tree.file("/proc/cmdline", "liveupdate=on kho=off");
        lacks(&tree, Level::Failure, "lacks kho=on ->");
        tree.remove("/boot");
        tree.file("/proc/cmdline", "liveupdate=on");
        lacks(&tree, Level::Warning, "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT");
        tree.file("/proc/cmdline", "liveupdate=on kho=1");
        lacks(&tree, Level::Ok, "kho=1");
    }

    #[test]
    fn a_clock_that_is_not_the_tsc_is_a_warning() {
        let tree = Tree::new();
        tree.finds(Id::Clock, Level::Ok, "TSC");
        let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        tree.file(source, "hpet\n");
        tree.finds(Id::Clock, Level::Warning, "hpet");
        tree.remove(source);
        tree.finds(Id::Clock, Level::Warning, "a second only");
    }
}
