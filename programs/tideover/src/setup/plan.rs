//! What a kernel has to be told, so that it leaves memory alone and gives it out.

use serde::Serialize;

use super::arguments::Form;
use super::iomem::Map;
use super::iomem::Refusal;
use super::memmap;
use super::memmap::GivenAs;
use super::memmap::Range;
use super::modules;
use super::modules::Have;
use super::modules::Modules;
use super::modules::Needed;

/// A module that is needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Module {
    pub(crate) name: &'static str,
    /// How the running kernel has it.
    pub(crate) have: Have,
}

/// One way to set memory aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Plan {
    pub(crate) form: Form,
    #[serde(rename = "address")]
    start: u64,
    size_bytes: u64,
    /// What the kernel is to be told, `memmap=` first.
    pub(crate) parameters: Vec<String>,
    /// The line of `/proc/iomem` that there is to be after the boot.
    pub(crate) iomem: String,
    pub(crate) modules: Vec<Module>,
    /// What to do after the boot.
    pub(crate) then: Vec<String>,
    /// What is in the way, or has to be known.
    pub(crate) notes: Vec<String>,
    /// Whether the running kernel would take the memory for itself all the same.
    #[serde(skip)]
    pub(crate) taken_back: bool,
}

impl Form {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Devdax => "devdax",
            Self::Fsdax => "fsdax",
        }
    }

    pub(crate) const fn about(self) -> &'static str {
        match self {
            Self::Devdax => "a device for one machine; all of it can be used, and no other tools are needed",
            Self::Fsdax => "a file system for several machines; needs mkfs.ext4 or mkfs.xfs",
        }
    }

    const fn given_as(self) -> GivenAs {
        match self {
            Self::Devdax => GivenAs::Dax,
            Self::Fsdax => GivenAs::Pmem,
        }
    }

    fn modules(self) -> &'static [Needed] {
        match self {
            Self::Devdax => &modules::DAX,
            Self::Fsdax => &modules::PMEM,
        }
    }

    fn then(self) -> Vec<String> {
        let lines: &[&str] = match self {
            Self::Devdax => &["in each kernel that was booted: tideover setup format /dev/dax0.0 --yes"],
            Self::Fsdax => &[
                "once: tideover setup format /dev/pmem0 --mount DIR --yes",
                "in each kernel that was booted after that: mount -o dax=always /dev/pmem0 DIR",
            ],
        };
        lines.iter().map(|line| (*line).to_owned()).collect()
    }
}

impl Plan {
    /// Chooses the memory, or takes that which is asked for.
    pub(crate) fn make(
        map: &Map,
        modules: &Modules<'_>,
        form: Form,
        bytes: u64,
        at: Option<u64>,
    ) -> Result<Self, Refusal> {
        let range = match at {
            Some(start) => map.take(start, bytes)?,
            None => map.choose(bytes, form == Form::Devdax)?,
        };
        let has = |needed: &Needed| Module { name: needed.name, have: modules.have(*needed) };
        let mut plan = Self {
            form,
            start: range.start,
            size_bytes: bytes,
            parameters: parameters(form, range),
            iomem: format!("{range} : {}", form.given_as().in_iomem()),
            modules: form.modules().iter().map(has).filter(is_of_use).collect(),
            then: form.then(),
            notes: Vec::new(),
            taken_back: form == Form::Devdax && modules.have(modules::KMEM) == Have::BuiltIn,
        };
        plan.notes = plan.look();
        Ok(plan)
    }

    /// The parameters in one line.
    pub(crate) fn line(&self) -> String {
        self.parameters.join(" ")
    }

    fn look(&self) -> Vec<String> {
        let missing = self.modules.iter().filter(|module| module.have == Have::Missing);
        let missing: Vec<&str> = missing.map(|module| module.name).collect();
        let mut notes = Vec::new();
        if !missing.is_empty() {
            let names = missing.join(", ");
            notes.push(format!(
                "the running kernel lacks {names}: boot one that has it, or take the other form"
            ));
        }
        if self.taken_back {
            notes.push(
                "kmem is built into the running kernel, and takes such memory for the kernel's own: take --as fsdax"
                    .to_owned(),
            );
        }
        if self.form == Form::Devdax {
            notes.push(
                "Linux 7.3 lists the memory in /proc/iomem only by the name of its device, once there is one"
                    .to_owned(),
            );
        }
        if self.parameters.iter().any(|word| word == "nokaslr") {
            notes.push(
                "nokaslr: the memory lies where a kernel that boots would else put itself at random; with --at at or above its own size, \
                 if there is room, it need not be"
                    .to_owned(),
            );
        }
        notes
    }
}

/// A kernel that was built without nd_btt has an nd_pmem that does without it.
fn is_of_use(module: &Module) -> bool {
    module.name != "nd_btt" || module.have != Have::Missing
}

fn parameters(form: Form, range: Range) -> Vec<String> {
    let (start, mib) = (range.start, range.bytes() >> 20);
    match form {
        Form::Fsdax => vec![format!("memmap={mib}M!{start:#x}")],
        Form::Devdax => {
            // Else kmem, which is loaded when the device comes up, makes it memory of the kernel's own.
            let mut all =
                vec![format!("memmap={mib}M%{start:#x}-1+0xefffffff"), "modprobe.blacklist=kmem".to_owned()];
            if memmap::may_lie_there(range) {
                all.push("nokaslr".to_owned());
            }
            all
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Tree;
    use super::*;

    const GIB: u64 = 1 << 30;

    fn plan(tree: &Tree, form: Form, bytes: u64, at: Option<u64>) -> Plan {
        let host = tree.host();
        Plan::make(&Map::of_host(&host).unwrap(), &Modules::of_host(&host), form, bytes, at).unwrap()
    }

    #[test]
    fn a_plan_says_what_the_kernel_is_to_be_told_and_what_will_be_seen() {
        let tree = Tree::new();
        let plan = plan(&tree, Form::Devdax, GIB, None);
        assert_eq!(plan.line(), "memmap=1024M%0x100000000-1+0xefffffff modprobe.blacklist=kmem");
        assert_eq!(plan.iomem, "100000000-13fffffff : Soft Reserved");
        let plan = super::tests::plan(&tree, Form::Fsdax, GIB, Some(6 * GIB));
        assert_eq!(plan.line(), "memmap=1024M!0x180000000");
        assert_eq!(plan.iomem, "180000000-1bfffffff : Persistent Memory (legacy)");
        assert!(plan.notes.is_empty(), "{:?}", plan.notes);
    }

    #[test]
    fn what_a_plan_says_is_read_back_as_the_same_memory() {
        let tree = Tree::new();
        for (form, bytes) in [(Form::Devdax, 3 * GIB), (Form::Fsdax, 16 << 20), (Form::Devdax, 13 * GIB)] {
            let plan = plan(&tree, form, bytes, None);
            let told = memmap::told(&plan.line());
            let [item] = &told[..] else { panic!("{told:?}") };
            assert_eq!((item.range.start, item.range.bytes()), (plan.start, bytes));
            assert_eq!(item.given_as(), Some(form.given_as()));
            assert_eq!(item.kernel_may_lie_there(), plan.line().ends_with(" nokaslr"));
        }
    }

    #[test]
    fn a_kernel_that_might_lie_in_the_memory_is_to_lie_at_no_random_place() {
        let tree = Tree::new();
        let clear = plan(&tree, Form::Devdax, 10 * GIB, None);
        let unclear = plan(&tree, Form::Devdax, 10 * GIB, Some(9 * GIB));
        assert!(!clear.line().contains("nokaslr") && clear.notes.len() == 1, "{clear:?}");
        assert!(unclear.line().ends_with(" nokaslr") && unclear.notes[1].contains("--at"), "{unclear:?}");
        assert!(!plan(&tree, Form::Fsdax, 10 * GIB, Some(9 * GIB)).line().contains("nokaslr"));
    }

    #[test]
    fn a_kernel_without_nd_btt_needs_none() {
        let tree = Tree::new();
        tree.file("/lib/modules/6.12.1/modules.dep", "kernel/drivers/nvdimm/nd_pmem.ko:\n");
        let names = |plan: &Plan| plan.modules.iter().map(|module| module.name).collect::<Vec<_>>();
        let without = plan(&tree, Form::Fsdax, GIB, None);
        assert_eq!(names(&without), ["libnvdimm", "nd_pmem", "nd_e820"]);
        assert!(without.notes[0].contains("lacks libnvdimm, nd_e820:"), "{without:?}");
    }

    #[test]
    fn modules_that_are_missing_and_one_that_is_in_the_way_are_told_of() {
        let tree = Tree::new();
        tree.file("/lib/modules/6.12.1/modules.dep", "kernel/drivers/dax/device_dax.ko:\n");
        tree.file("/lib/modules/6.12.1/modules.builtin", "kernel/drivers/dax/kmem.ko\n");
        let plan = plan(&tree, Form::Devdax, GIB, None);
        assert!(plan.taken_back);
        assert!(plan.notes[0].contains("lacks dax_hmem:") && plan.notes[1].contains("fsdax"), "{plan:?}");
    }
}
