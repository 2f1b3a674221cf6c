//! The directory of this user's machines: who comes there.

use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::Context as _;
use rustix::fs::inotify;
use rustix::fs::inotify::CreateFlags;
use rustix::fs::inotify::WatchFlags;

/// Rings when something has come to the directory.
#[derive(Debug)]
pub(crate) struct Watch(OwnedFd);

impl Watch {
    pub(crate) fn start(directory: &Path) -> anyhow::Result<Self> {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .context("cannot watch a directory")?;
        inotify::add_watch(&watch, directory, WatchFlags::CREATE | WatchFlags::MOVED_TO)
            .with_context(|| format!("cannot watch {}", directory.display()))?;
        Ok(Self(watch))
    }

    /// It was heard. What has come is looked up in the directory itself: of many events some may be lost.
    pub(crate) fn heard(&self) {
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.0, &mut space);
        while events.next().is_ok() {}
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
