//! `tideover setup`: gets a host ready whose kernel cannot hand memory over.
//!
//! Some of the host's memory is kept out of the kernel's reach by `memmap=`, and given out as a device or a file system that maps it
//! directly. A kexec leaves it as it is, whatever the kernels are, as long as each is told to leave it alone.

pub(crate) mod arguments;
pub(crate) mod devices;
mod format;
pub(crate) mod iomem;
pub(crate) mod memmap;
pub(crate) mod modules;
mod plan;
mod reserve;
mod write;

use std::process::ExitCode;

/// The verb.
pub(crate) fn setup(arguments: &arguments::Setup) -> anyhow::Result<ExitCode> {
    match &arguments.verb {
        arguments::Verb::Reserve(arguments) => reserve::reserve(arguments),
        arguments::Verb::Format(arguments) => format::format(arguments),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;
    use std::sync::atomic::AtomicU32;
    use std::sync::atomic::Ordering;

    use crate::check::Host;

    /// A made-up host, whose files lie below a folder that goes with it.
    pub(in crate::setup) struct Tree(PathBuf);

    impl Tree {
        /// A host with a kernel's version and a map of its memory.
        pub(in crate::setup) fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let root = std::env::temp_dir().join(format!("tideover-setup-{}-{number}", std::process::id()));
            fs::create_dir_all(&root).unwrap();
            let tree = Self(root);
            tree.file("/proc/sys/kernel/osrelease", "6.12.1\n");
            tree.file("/proc/cmdline", "quiet\n");
            tree.file("/proc/iomem", super::iomem::tests::HOST);
            tree
        }

        pub(in crate::setup) fn host(&self) -> Host {
            Host::below(&self.0)
        }

        pub(in crate::setup) fn path(&self, path: &str) -> PathBuf {
            self.0.join(path.trim_start_matches('/'))
        }

        pub(in crate::setup) fn file(&self, path: &str, bytes: impl AsRef<[u8]>) {
            let path = self.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }

        pub(in crate::setup) fn text(&self, path: &str) -> Option<String> {
            fs::read_to_string(self.path(path)).ok()
        }

        pub(in crate::setup) fn link(&self, path: &str, to: &str) {
            let path = self.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let _ = fs::remove_file(&path);
            symlink(to, path).unwrap();
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}
