//! What a probe found.

use serde::Serialize;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// Machines can be carried, but something is to be done or to be known; or it could not be told.
    Warning,
    /// They cannot.
    Failure,
}

impl Level {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failure => "failure",
        }
    }
}

/// What it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Topic {
    /// The kernel that runs.
    Kernel,
    /// `/dev/liveupdate`.
    Device,
    /// The memory that the next kernel boots in.
    Scratch,
    /// Booting another kernel.
    Kexec,
    /// Memory that kernels leave alone.
    Reserved,
    /// The kernel that is to be booted.
    NextKernel,
    /// The host's memory.
    Memory,
    /// One machine.
    Machine,
}

impl Topic {
    /// For people.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Device => "live update device",
            Self::Scratch => "scratch memory",
            Self::Kexec => "kexec",
            Self::Reserved => "reserved memory",
            Self::NextKernel => "next kernel",
            Self::Memory => "memory",
            Self::Machine => "machine",
        }
    }
}

/// Declares [`Id`]: each with its topic, and what it is called.
macro_rules! ids {
    ($($id:ident: $topic:ident, $title:literal;)*) => {
        /// Which thing was looked at. The name in JSON stays for good.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
        #[serde(rename_all = "snake_case")]
        pub(crate) enum Id {
            $($id,)*
        }

        impl Id {
            #[cfg(test)]
            pub(super) const ALL: &[Self] = &[$(Self::$id,)*];

            const fn about(self) -> (Topic, &'static str) {
                match self {
                    $(Self::$id => (Topic::$topic, $title),)*
                }
            }
        }
    };
}

ids! {
    KernelVersion: Kernel, "version";
    KernelConfiguration: Kernel, "configuration";
    KernelCommandLine: Kernel, "command line";
    Clock: Kernel, "clock";
    DeviceOpen: Device, "device";
    PreservesMemfd: Device, "memfd";
    PreservesHugetlb: Device, "hugetlb memfd";
    PreservesVm: Device, "KVM VM";
    PreservesGuestMemfd: Device, "guest_memfd";
    Sessions: Device, "sessions";
    ScratchMemory: Scratch, "sizes";
    KexecRights: Kexec, "rights";
    KexecCall: Kexec, "kexec_file_load";
    KexecLoaded: Kexec, "loaded image";
    Lockdown: Kexec, "lockdown";
    ReservedMemory: Reserved, "set aside";
    ReservedDevice: Reserved, "device";
    ReservedKexec: Reserved, "kexec_load";
    ReservedNext: Reserved, "next command line";
    NextImage: NextKernel, "image";
    NextVersion: NextKernel, "version";
    NextFormats: NextKernel, "formats";
    NextConfiguration: NextKernel, "configuration";
    NextCommandLine: NextKernel, "command line";
    NextFits: NextKernel, "size";
    MemfdNoexec: Memory, "vm.memfd_noexec";
    HostMemory: Memory, "free";
    MachineAnswers: Machine, "VMM";
    MachineThroughKexec: Machine, "goes along";
    MachineName: Machine, "name";
    MachineSession: Machine, "session";
    MachineGuest: Machine, "guest";
    MachineStore: Machine, "store";
    MachineSeals: Machine, "seals";
    MachinePages: Machine, "pages";
    MachineHoles: Machine, "holes";
    MachineCgroup: Machine, "cgroup";
    MachineDisk: Machine, "disk";
    MachineTap: Machine, "tap";
    MachineConsoles: Machine, "consoles";
}

impl Id {
    pub(crate) fn ok(self, found: impl Into<String>) -> Finding {
        self.at(Level::Ok, found.into(), None)
    }

    pub(crate) fn warning(self, found: impl Into<String>, advice: impl Into<String>) -> Finding {
        self.at(Level::Warning, found.into(), Some(advice.into()))
    }

    pub(crate) fn failure(self, found: impl Into<String>, advice: impl Into<String>) -> Finding {
        self.at(Level::Failure, found.into(), Some(advice.into()))
    }

    fn at(self, level: Level, found: String, advice: Option<String>) -> Finding {
        let (topic, title) = self.about();
        Finding { id: self, topic, title, machine: None, level, found, advice }
    }
}

/// What was found of one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// Which thing.
    pub(crate) id: Id,
    /// What that is about.
    pub(crate) topic: Topic,
    /// The thing, for people.
    pub(crate) title: &'static str,
    /// The machine that it is about, if it is about one.
    pub(crate) machine: Option<String>,
    /// How bad it is.
    pub(crate) level: Level,
    /// What was found, for people.
    pub(crate) found: String,
    /// What to do, if something is to be done, or to be known.
    pub(crate) advice: Option<String>,
}

impl Finding {
    pub(crate) fn of_machine(self, name: &str) -> Self {
        Self { machine: Some(name.to_owned()), ..self }
    }

    /// With something to know, where nothing is wrong.
    pub(crate) fn note(self, advice: impl Into<String>) -> Self {
        Self { advice: Some(advice.into()), ..self }
    }
}
