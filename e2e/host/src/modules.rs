//! The modules of a kernel that is not made for these hosts.

use std::ffi::CString;
use std::fs;
use std::fs::File;
use std::path::Path;

use anyhow::Context as _;
use rustix::io::Errno;

/// Where they are, and their names in the order in which they are loaded.
const FOLDER: &str = "/modules";
const ORDER: &str = "order";

/// Loads those that the image has, if it has any, with what the kernel's command line says of them.
pub(crate) fn load() -> anyhow::Result<()> {
    let folder = Path::new(FOLDER);
    if !folder.is_dir() {
        return Ok(());
    }
    let command_line = fs::read_to_string("/proc/cmdline")?;
    let order = fs::read_to_string(folder.join(ORDER)).context("the modules have no order")?;
    for name in order.lines() {
        let file =
            File::open(folder.join(format!("{name}.ko"))).with_context(|| format!("no module {name}"))?;
        let parameters = CString::new(parameters(&command_line, name))?;
        match rustix::system::finit_module(&file, &parameters, 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno).with_context(|| format!("cannot load the module {name}")),
        }
    }
    Ok(())
}

/// What stands as `NAME.PARAMETER=VALUE` in a command line, as a kernel reads it for what is built in.
fn parameters(command_line: &str, name: &str) -> String {
    let prefix = format!("{name}.");
    let told = command_line.split_whitespace().filter_map(|word| word.strip_prefix(&prefix));
    told.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_told_what_stands_behind_its_name_alone() {
        let line = "quiet kvm_amd.npt=0 kvm.halt_poll_ns=0 kvm_amd.avic=1\n";
        assert_eq!(parameters(line, "kvm_amd"), "npt=0 avic=1");
        assert_eq!(parameters(line, "kvm"), "halt_poll_ns=0");
        assert_eq!(parameters(line, "tun"), "");
    }
}
