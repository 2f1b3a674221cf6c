//! Whether the running kernel has the modules that give memory out.

use serde::Serialize;

use crate::check::Choice;
use crate::check::Config;
use crate::check::Host;
use crate::check::release_text;

/// How a kernel has a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Have {
    /// It is loaded.
    Loaded,
    /// It is part of the kernel.
    BuiltIn,
    /// It can be loaded.
    There,
    /// It is not there.
    Missing,
    /// That cannot be told.
    Unknown,
}

impl Have {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Loaded => "loaded",
            Self::BuiltIn => "built in",
            Self::There => "there",
            Self::Missing => "MISSING",
            Self::Unknown => "cannot be told",
        }
    }
}

/// A module, and the option that a kernel is built with to have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Needed {
    pub(crate) name: &'static str,
    pub(crate) option: &'static str,
}

/// What makes `/dev/daxX.Y` of soft reserved memory.
pub(crate) const DAX: [Needed; 2] =
    [Needed { name: "device_dax", option: "DEV_DAX" }, Needed { name: "dax_hmem", option: "DEV_DAX_HMEM" }];
/// What makes `/dev/pmemN` of what is said to be persistent memory.
pub(crate) const PMEM: [Needed; 4] = [
    Needed { name: "libnvdimm", option: "LIBNVDIMM" },
    Needed { name: "nd_btt", option: "BTT" },
    Needed { name: "nd_pmem", option: "BLK_DEV_PMEM" },
    Needed { name: "nd_e820", option: "X86_PMEM_LEGACY" },
];
/// What takes `/dev/daxX.Y` for the kernel, as memory of its own.
pub(crate) const KMEM: Needed = Needed { name: "kmem", option: "DEV_DAX_KMEM" };

/// What the running kernel has.
pub(crate) struct Modules<'a> {
    host: &'a Host,
    built_in: Option<String>,
    loadable: Option<String>,
    config: Option<Config>,
}

impl<'a> Modules<'a> {
    pub(crate) fn of_host(host: &'a Host) -> Self {
        // It becomes part of a path.
        let release = release_text(host).filter(|release| !release.is_empty() && !release.contains('/'));
        let file = |name: &str| {
            let release = release.as_deref()?;
            let folders = ["/lib/modules", "/usr/lib/modules"].into_iter();
            folders.map(|folder| format!("{folder}/{release}/{name}")).find_map(|path| host.text(path))
        };
        let (built_in, loadable) = (file("modules.builtin"), file("modules.dep"));
        Self { host, built_in, loadable, config: Config::of_host(host) }
    }

    pub(crate) fn have(&self, needed: Needed) -> Have {
        let Needed { name, option } = needed;
        if lists(self.built_in.as_deref(), name) {
            return Have::BuiltIn;
        }
        if self.host.exists(&format!("/sys/module/{name}")) {
            return Have::Loaded;
        }
        if lists(self.loadable.as_deref(), name) {
            return Have::There;
        }
        match self.config.as_ref().map(|config| config.get(option)) {
            Some(Choice::No | Choice::Unsaid) => Have::Missing,
            // What the kernel was built with may lie elsewhere, or be built in.
            Some(Choice::Yes) if self.loadable.is_none() => Have::There,
            _ if self.loadable.is_some() => Have::Missing,
            _ => Have::Unknown,
        }
    }
}

/// Whether a list of a kernel's modules has this one. In a file's name `-` and `_` are the same.
fn lists(list: Option<&str>, name: &str) -> bool {
    let files = list.unwrap_or_default().lines().map(|line| line.split(':').next().unwrap_or_default());
    let names = files.filter_map(|path| path.rsplit('/').next()?.split(".ko").next());
    names.map(|file| file.replace('-', "_")).any(|file| file == name)
}

#[cfg(test)]
mod tests {
    use super::super::tests::Tree;
    use super::*;

    const DEP: &str = "\
kernel/drivers/dax/device_dax.ko.xz:
kernel/drivers/dax/hmem/dax_hmem.ko.zst: kernel/drivers/dax/device_dax.ko.xz
kernel/drivers/nvdimm/nd-btt.ko:
";

    #[test]
    fn modules_are_found_loaded_built_in_or_to_be_loaded() {
        let tree = Tree::new();
        tree.file("/lib/modules/6.12.1/modules.dep", DEP);
        tree.file("/lib/modules/6.12.1/modules.builtin", "kernel/drivers/nvdimm/libnvdimm.ko\n");
        tree.file("/sys/module/nd_pmem/refcnt", "0");
        let host = tree.host();
        let have = |needed| Modules::of_host(&host).have(needed);
        assert_eq!(DAX.map(have), [Have::There, Have::There]);
        assert_eq!(PMEM.map(have), [Have::BuiltIn, Have::There, Have::Loaded, Have::Missing]);
    }

    #[test]
    fn a_kernel_without_lists_is_known_by_how_it_was_built() {
        let tree = Tree::new();
        let host = tree.host();
        let have = |needed| Modules::of_host(&host).have(needed);
        assert_eq!(have(KMEM), Have::Unknown);
        tree.file("/boot/config-6.12.1", "CONFIG_DEV_DAX=y\n# CONFIG_DEV_DAX_HMEM is not set\n");
        assert_eq!(DAX.map(have), [Have::There, Have::Missing]);
    }
}
