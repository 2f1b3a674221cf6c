//! Writes what a host is to be told at its boot, where its boot loader's configuration is made from.

use std::fs;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use anyhow::bail;

use super::plan::Plan;
use crate::check::Host;

/// The first line of each file that is written whole. Others are not touched.
const MARK: &str = "# Written by `tideover setup reserve`.\n";
const GRUB: &str = "/etc/default/grub";
const GRUB_DROP_IN: &str = "/etc/default/grub.d/tideover.cfg";
/// What makes GRUB's configuration.
const MAKES_GRUB: [&str; 2] = ["/usr/sbin/grub-mkconfig", "/usr/bin/grub-mkconfig"];
const KERNEL_INSTALL: &str = "/etc/kernel/cmdline";
const MODULES: &str = "/etc/modules-load.d/tideover.conf";

/// What was written, and what has to be done for it to count.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    /// Each file, and what is in it now.
    pub(crate) files: Vec<(String, String)>,
    pub(crate) then: Vec<String>,
}

/// Writes it. Nothing is written if something cannot be.
pub(crate) fn write(host: &Host, plan: &Plan) -> anyhow::Result<Written> {
    if plan.taken_back {
        bail!(
            "kmem is built into the running kernel, and would take the memory for the kernel's own: take --as fsdax"
        );
    }
    let mut written = Written::default();
    written.add(grub(host, plan)?);
    written.add(kernel_install(host, plan)?);
    if written.then.is_empty() {
        bail!(
            "there is neither {GRUB} nor {KERNEL_INSTALL}: give these to the kernel by what this host is booted by: {}",
            plan.line()
        );
    }
    let modules: Vec<&str> = plan.modules.iter().map(|module| module.name).collect();
    written.files.push((MODULES.to_owned(), own(host, MODULES, &(modules.join("\n") + "\n"))?));
    for (path, text) in &written.files {
        put(&host.path(path), text).with_context(|| format!("cannot write {path}"))?;
    }
    Ok(written)
}

impl Written {
    fn add(&mut self, change: Option<Change>) {
        let Some(change) = change else { return };
        self.files.extend(change.file);
        self.then.push(change.then);
    }
}

/// What is to be done about one boot loader.
struct Change {
    /// The file, unless it says so already.
    file: Option<(String, String)>,
    then: String,
}

fn grub(host: &Host, plan: &Plan) -> anyhow::Result<Option<Change>> {
    let Some(text) = host.text(GRUB) else { return Ok(None) };
    let line = plan.line();
    if text.lines().any(|line| !line.trim_start().starts_with('#') && line.contains("memmap=")) {
        bail!("{GRUB} says something of memmap= already; change it there to {line}");
    }
    let reads = |path| host.text(path).is_some_and(|script| script.contains("/default/grub.d"));
    if !MAKES_GRUB.into_iter().any(reads) {
        bail!(
            "this host's grub-mkconfig does not read /etc/default/grub.d: add to GRUB_CMDLINE_LINUX in {GRUB}, or by \
             grubby --update-kernel=ALL --args='{line}': {line}"
        );
    }
    let text = own(host, GRUB_DROP_IN, &format!("GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {line}\"\n"))?;
    let then = match host.exists("/usr/sbin/update-grub") {
        true => "update-grub",
        false => "grub-mkconfig -o /boot/grub/grub.cfg",
    };
    Ok(Some(Change { file: Some((GRUB_DROP_IN.to_owned(), text)), then: then.to_owned() }))
}

/// The line that kernel-install gives to each kernel. It is somebody's, and is only added to.
fn kernel_install(host: &Host, plan: &Plan) -> anyhow::Result<Option<Change>> {
    let Some(old) = host.text(KERNEL_INSTALL) else { return Ok(None) };
    let then =
        "kernel-install add $(uname -r) /lib/modules/$(uname -r)/vmlinuz (and so for each kernel that is installed)".to_owned();
    let has = |word: &String| old.split_whitespace().any(|old| old == word);
    if plan.parameters.iter().all(has) {
        return Ok(Some(Change { file: None, then }));
    }
    if old.split_whitespace().any(|word| word.starts_with("memmap=")) {
        bail!("{KERNEL_INSTALL} says something of memmap= already; change it there to {}", plan.line());
    }
    let new = plan.parameters.iter().filter(|word| !has(word));
    let text = new.fold(old.clone(), |line, word| format!("{line} {word}")) + "\n";
    Ok(Some(Change { file: Some((KERNEL_INSTALL.to_owned(), text)), then }))
}

/// The text of a file of ours, unless there is one of somebody else's.
fn own(host: &Host, path: &str, text: &str) -> anyhow::Result<String> {
    // A link is somebody's, wherever it leads.
    let link = host.path(path).is_symlink();
    let other = host.lines(path).is_some_and(|old| !old.starts_with(MARK));
    if link || other {
        bail!("{path} is there, and was not written by this command: it is left as it is");
    }
    Ok(format!("{MARK}{text}"))
}

/// Writes a file so that who reads it finds the old text or the new one.
fn put(path: &Path, text: &str) -> anyhow::Result<()> {
    let folder = path.parent().context("it has no folder")?;
    fs::create_dir_all(folder)?;
    let aside = path.with_extension(format!("tideover-{}", std::process::id()));
    let written = (|| {
        let mut file = File::create_new(&aside)?;
        file.write_all(text.as_bytes())?;
        if let Ok(old) = fs::metadata(path) {
            file.set_permissions(old.permissions())?;
        }
        file.sync_all()?;
        fs::rename(&aside, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    Ok(written?)
}

#[cfg(test)]
mod tests {
    use super::super::arguments::Form;
    use super::super::iomem::Map;
    use super::super::modules::Modules;
    use super::super::tests::Tree;
    use super::*;

    const GIB: u64 = 1 << 30;
    const SCRIPT: &str = "for x in ${sysconfdir}/default/grub.d/*.cfg ; do";

    fn plan(tree: &Tree, form: Form) -> Plan {
        let host = tree.host();
        Plan::make(&Map::of_host(&host).unwrap(), &Modules::of_host(&host), form, GIB, None).unwrap()
    }

    fn write(tree: &Tree, form: Form) -> anyhow::Result<Written> {
        super::write(&tree.host(), &plan(tree, form))
    }

    fn with_grub() -> Tree {
        let tree = Tree::new();
        tree.file(GRUB, "GRUB_CMDLINE_LINUX=\"\"\n# memmap=x\n");
        tree.file(MAKES_GRUB[0], SCRIPT);
        tree
    }

    #[test]
    fn a_host_of_grub_gets_a_drop_in_that_adds_to_its_line() {
        let tree = with_grub();
        let written = write(&tree, Form::Devdax).unwrap();
        let grub = format!(
            "{MARK}GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX memmap=1024M%0x100000000-1+0xefffffff modprobe.blacklist=kmem\"\n"
        );
        assert_eq!(tree.text(GRUB_DROP_IN).as_deref(), Some(grub.as_str()));
        assert_eq!(tree.text(MODULES).unwrap(), format!("{MARK}device_dax\ndax_hmem\n"));
        assert_eq!(written.then, ["grub-mkconfig -o /boot/grub/grub.cfg"]);
        assert_eq!(written.files[0], (GRUB_DROP_IN.to_owned(), grub));
        // What it wrote it may write anew.
        tree.file("/usr/sbin/update-grub", "");
        assert_eq!(write(&tree, Form::Fsdax).unwrap().then, ["update-grub"]);
        assert!(tree.text(GRUB_DROP_IN).unwrap().contains("memmap=1024M!0x100000000\""));
        assert!(tree.text(MODULES).unwrap().ends_with("libnvdimm\nnd_btt\nnd_pmem\nnd_e820\n"));
        let left = fs::read_dir(tree.path("/etc/default/grub.d")).unwrap().count();
        assert_eq!(left, 1);
    }

    #[test]
    fn the_drop_in_is_read_by_a_shell_as_it_is_meant() {
        for form in [Form::Devdax, Form::Fsdax] {
            let tree = with_grub();
            write(&tree, form).unwrap();
            let script =
                format!(". {}; printf %s \"$GRUB_CMDLINE_LINUX\"", tree.path(GRUB_DROP_IN).display());
            let output = std::process::Command::new("sh")
                .args(["-c", &script])
                .env("GRUB_CMDLINE_LINUX", "a b")
                .output();
            let said = String::from_utf8(output.unwrap().stdout).unwrap();
            assert_eq!(said, format!("a b {}", plan(&tree, form).line()));
        }
    }

    #[test]
    fn a_line_for_kernel_install_is_added_to_once() {
        let tree = Tree::new();
        tree.file(KERNEL_INSTALL, "root=/dev/vda1 quiet\n");
        assert_eq!(write(&tree, Form::Fsdax).unwrap().files.len(), 2);
        let wanted = "root=/dev/vda1 quiet memmap=1024M!0x100000000\n";
        assert_eq!(tree.text(KERNEL_INSTALL).as_deref(), Some(wanted));
        let again = write(&tree, Form::Fsdax).unwrap();
        assert_eq!((again.files.len(), again.then.len()), (1, 1));
        assert_eq!(tree.text(KERNEL_INSTALL).as_deref(), Some(wanted));
        // Another place would be a second one.
        let error = write(&tree, Form::Devdax).unwrap_err().to_string();
        assert!(error.contains("memmap= already"), "{error}");
        assert_eq!(tree.text(KERNEL_INSTALL).as_deref(), Some(wanted));
    }

    #[test]
    fn what_somebody_else_wrote_is_left_and_nothing_else_is_written_then() {
        for path in [GRUB_DROP_IN, MODULES] {
            let tree = with_grub();
            tree.file(path, "mine\n");
            let error = write(&tree, Form::Devdax).unwrap_err().to_string();
            assert!(error.contains(path) && error.contains("left as it is"), "{error}");
            assert_eq!(tree.text(path).unwrap(), "mine\n");
            let other = if path == MODULES { GRUB_DROP_IN } else { MODULES };
            assert_eq!(tree.text(other), None);
        }
        let tree = with_grub();
        tree.file("/mine", MARK);
        tree.link(MODULES, "/mine");
        assert!(write(&tree, Form::Devdax).is_err());
    }

    #[test]
    fn a_host_that_is_booted_otherwise_is_told_what_to_do() {
        let tree = Tree::new();
        let error = write(&tree, Form::Fsdax).unwrap_err().to_string();
        assert!(error.ends_with("memmap=1024M!0x100000000"), "{error}");
        let tree = with_grub();
        tree.file(MAKES_GRUB[0], "");
        let error = write(&tree, Form::Fsdax).unwrap_err().to_string();
        assert!(error.contains("grubby") && error.contains("'memmap=1024M!0x100000000'"), "{error}");
        tree.file(GRUB, "GRUB_CMDLINE_LINUX=\"memmap=1G!4G\"");
        let error = write(&tree, Form::Fsdax).unwrap_err().to_string();
        assert!(error.contains("already"), "{error}");
        assert_eq!(tree.text(MODULES), None);
    }

    #[test]
    fn memory_that_the_kernel_would_take_back_is_not_written() {
        let tree = with_grub();
        tree.file("/lib/modules/6.12.1/modules.builtin", "kernel/drivers/dax/kmem.ko\n");
        assert!(write(&tree, Form::Devdax).unwrap_err().to_string().contains("fsdax"));
        assert!(write(&tree, Form::Fsdax).is_ok());
    }
}
