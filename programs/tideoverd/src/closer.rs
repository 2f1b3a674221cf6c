//! Closing what takes its time: the last descriptor of a VM's vCPU is the VM's end, which waits for the kernel's readers, and that of
//! a region frees all of its memory.

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::sync::mpsc::Sender;
use std::thread;

use anyhow::Context as _;

/// A thread that closes descriptors.
#[derive(Debug, Clone)]
pub(crate) struct Closer(Sender<Vec<OwnedFd>>);

impl Closer {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let close = move || {
            while receiver.recv().is_ok() {}
        };
        thread::Builder::new().name("closer".to_owned()).spawn(close).context("cannot start a thread")?;
        Ok(Self(sender))
    }

    pub(crate) fn close(&self, fds: Vec<OwnedFd>) {
        // Without the thread they are closed here.
        let _ = self.0.send(fds);
    }
}
