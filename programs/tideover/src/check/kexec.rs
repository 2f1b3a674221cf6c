//! Booting another kernel: may it be done, and is one loaded?

use ::liveupdate::kexec::LoadError;

use super::Sight;
use super::finding::Finding;
use super::finding::Id;
use super::kernel::Choice;

/// `CAP_SYS_BOOT`, as a bit of a process's capabilities.
const SYS_BOOT: u64 = 1 << 22;

pub(super) fn findings(sight: &Sight<'_>) -> Vec<Finding> {
    let mut all = vec![rights(sight), call(sight)];
    all.extend(loaded(sight));
    all.push(lockdown(sight));
    all
}

/// What has to be known whatever carries machines.
pub(super) fn of_any_way(sight: &Sight<'_>) -> Vec<Finding> {
    let mut all = vec![rights(sight)];
    all.extend(loaded(sight));
    all.push(lockdown(sight));
    all
}

/// Whether this process may boot a kernel; `None` if it is not known.
fn may_boot(sight: &Sight<'_>) -> Option<bool> {
    let status = sight.host.text("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    Some(u64::from_str_radix(effective.trim(), 16).ok()? & SYS_BOOT != 0)
}

fn limit(sight: &Sight<'_>) -> Option<i64> {
    sight.host.number("/proc/sys/kernel/kexec_load_limit_reboot")
}

fn rights(sight: &Sight<'_>) -> Finding {
    let id = Id::KexecRights;
    if sight.host.number("/proc/sys/kernel/kexec_load_disabled") == Some(1) {
        return id.failure(
            "kernel.kexec_load_disabled is set: no kernel can be loaded until the next boot",
            "find who sets it (sysctl.d), and boot without",
        );
    }
    match limit(sight) {
        Some(0) => {
            return id.failure(
                "kernel.kexec_load_limit_reboot is 0: no more kernels can be loaded until the next boot",
                "find who sets it (sysctl.d), and boot without",
            );
        }
        Some(left @ 1..) => {
            return id.warning(
                format!("kernel.kexec_load_limit_reboot allows a kernel to be loaded {left} more times"),
                "each attempt counts, also one that fails",
            );
        }
        _ => {}
    }
    match may_boot(sight) {
        Some(true) => id.ok("this process has CAP_SYS_BOOT"),
        Some(false) => id.failure("this process has no CAP_SYS_BOOT", "run this as root"),
        None => id.warning("the kernel does not say what this process may", "run this as root"),
    }
}

/// Not asked where asking counts, or nothing can be learnt.
pub(super) fn call(sight: &Sight<'_>) -> Finding {
    let id = Id::KexecCall;
    let absent = || {
        id.failure(
            "the kernel has no kexec_file_load, by which alone sessions get to the next kernel",
            "boot a kernel built with CONFIG_KEXEC_FILE",
        )
    };
    let built = sight.config.as_ref().map(|config| config.get("KEXEC_FILE"));
    let counted = limit(sight).is_some_and(|left| left >= 0);
    let answer = if counted { Err(None) } else { sight.host.calls.file_load().map_err(Some) };
    match (answer, built) {
        (Ok(()), _) => id.ok("the kernel has it, and this process may call it"),
        (Err(Some(LoadError::Unsupported)), _) | (Err(_), Some(Choice::No | Choice::Unsaid)) => absent(),
        (Err(_), Some(Choice::Yes)) => id.ok("the kernel has it"),
        (Err(Some(error)), None) => {
            id.warning(format!("whether the kernel has it cannot be told: {error}"), "run this as root")
        }
        (Err(None), None) => id.warning(
            "whether the kernel has it cannot be told: to ask would count as loading a kernel",
            "see that the kernel was built with CONFIG_KEXEC_FILE",
        ),
    }
}

fn loaded(sight: &Sight<'_>) -> Option<Finding> {
    let id = Id::KexecLoaded;
    match sight.host.number("/sys/kernel/kexec_loaded")? {
        0 => Some(id.ok("none")),
        _ => Some(id.warning(
            "a kernel is loaded already, and the host does not say by which call: by kexec_load(2) it takes no session along",
            "have it loaded again right before the kexec, by kexec_file_load (kexec --kexec-file-syscall)",
        )),
    }
}

fn lockdown(sight: &Sight<'_>) -> Finding {
    let id = Id::Lockdown;
    let text = sight.host.text("/sys/kernel/security/lockdown").unwrap_or_default();
    let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(chosen, _)| chosen);
    match chosen {
        None | Some("none") => id.ok("off"),
        Some(mode) => id.warning(
            format!("on ({}): only a signed kernel can be loaded", mode.escape_debug()),
            "sign the next kernel with a key that this host accepts",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::super::tree::Tree;
    use super::*;

    #[test]
    fn who_may_load_no_kernel_is_told_why() {
        let tree = Tree::new();
        tree.finds(Id::KexecRights, Level::Ok, "CAP_SYS_BOOT");
        tree.file("/proc/self/status", "CapEff:\t000001ffffbfffff\n");
        tree.finds(Id::KexecRights, Level::Failure, "no CAP_SYS_BOOT");
        tree.remove("/proc/self/status");
        tree.finds(Id::KexecRights, Level::Warning, "as root");
        tree.file("/proc/sys/kernel/kexec_load_limit_reboot", "3");
        tree.finds(Id::KexecRights, Level::Warning, "3 more times");
        tree.file("/proc/sys/kernel/kexec_load_limit_reboot", "0");
        tree.finds(Id::KexecRights, Level::Failure, "limit_reboot is 0");
        tree.file("/proc/sys/kernel/kexec_load_disabled", "1");
        tree.finds(Id::KexecRights, Level::Failure, "kexec_load_disabled");
    }

    #[test]
    fn the_call_is_asked_for_or_looked_up() {
        let mut tree = Tree::new();
        tree.finds(Id::KexecCall, Level::Ok, "may call it");
        tree.answers.file_load = || Err(LoadError::Denied);
        tree.finds(Id::KexecCall, Level::Ok, "the kernel has it");
        tree.file("/boot/config-7.3.4", "# CONFIG_KEXEC_FILE is not set\n");
        tree.finds(Id::KexecCall, Level::Failure, "CONFIG_KEXEC_FILE");
        tree.remove("/boot");
        tree.finds(Id::KexecCall, Level::Warning, "may load no kernel");
        tree.answers.file_load = || Err(LoadError::Unsupported);
        tree.finds(Id::KexecCall, Level::Failure, "no kexec_file_load");
    }

    #[test]
    fn the_call_is_not_asked_for_where_that_counts() {
        let mut tree = Tree::new();
        tree.answers.file_load = || panic!("asked for");
        tree.file("/proc/sys/kernel/kexec_load_limit_reboot", "2");
        tree.finds(Id::KexecCall, Level::Ok, "the kernel has it");
        tree.remove("/boot");
        tree.finds(Id::KexecCall, Level::Warning, "would count");
    }

    #[test]
    fn a_kernel_that_is_loaded_is_a_warning() {
        let tree = Tree::new();
        tree.finds(Id::KexecLoaded, Level::Ok, "none");
        tree.file("/sys/kernel/kexec_loaded", "1\n");
        tree.finds(Id::KexecLoaded, Level::Warning, "by which call");
        tree.remove("/sys/kernel/kexec_loaded");
        assert_eq!(tree.find(Id::KexecLoaded), None);
    }

    #[test]
    fn lockdown_asks_for_signed_kernels() {
        let tree = Tree::new();
        tree.finds(Id::Lockdown, Level::Ok, "off");
        tree.file("/sys/kernel/security/lockdown", "none integrity [confidentiality]\n");
        tree.finds(Id::Lockdown, Level::Warning, "on (confidentiality)");
        tree.remove("/sys/kernel/security/lockdown");
        tree.finds(Id::Lockdown, Level::Ok, "off");
    }
}
