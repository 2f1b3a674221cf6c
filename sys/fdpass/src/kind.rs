//! What a descriptor is of.

use std::fmt;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;

use abi::foreign::FdKind;
use rustix::fs::FileType;
use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::net::sockopt;

/// What a descriptor is of, as the kernel says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Something that has a number in `tideover-fd-v1`.
    Known(FdKind),
    /// Something else: what the kernel calls it.
    Other(String),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(kind) => kind.fmt(f),
            Self::Other(what) => what.fmt(f),
        }
    }
}

/// What the descriptor is of.
///
/// # Errors
/// If the kernel does not say, as without `/proc`.
pub fn kind(fd: impl AsFd) -> std::io::Result<Kind> {
    let fd = fd.as_fd();
    let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let path = path.to_string_lossy();
    Ok(match FileType::from_raw_mode(fstat(fd)?.st_mode) {
        FileType::Socket if sockopt::socket_acceptconn(fd)? => Kind::Known(FdKind::Listener),
        FileType::Socket => match rustix::net::getpeername(fd) {
            Ok(_) => Kind::Known(FdKind::Connection),
            Err(Errno::NOTCONN) => Kind::Other("a socket that is not connected".to_owned()),
            Err(errno) => return Err(errno.into()),
        },
        FileType::CharacterDevice if path == "/dev/net/tun" => Kind::Known(FdKind::Tap),
        FileType::CharacterDevice | FileType::Fifo => Kind::Known(FdKind::Stream),
        FileType::RegularFile | FileType::BlockDevice => Kind::Known(FdKind::File),
        _ if path == "anon_inode:[eventfd]" => Kind::Known(FdKind::Eventfd),
        _ => Kind::Other(path.escape_debug().to_string()),
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::Channel;

    #[test]
    fn each_kind_is_told_from_the_others() {
        let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        assert_eq!(kind(&eventfd).unwrap(), Kind::Known(FdKind::Eventfd));
        let (one, _other) = Channel::pair().unwrap();
        assert_eq!(kind(&one).unwrap(), Kind::Known(FdKind::Connection));
        let path = std::env::temp_dir().join(format!("tideover-kind-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(kind(&listener).unwrap(), Kind::Known(FdKind::Listener));
        assert_eq!(kind(File::open("/proc/self/exe").unwrap()).unwrap(), Kind::Known(FdKind::File));
        assert_eq!(kind(File::open("/dev/null").unwrap()).unwrap(), Kind::Known(FdKind::Stream));
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        assert_eq!(kind(&epoll).unwrap(), Kind::Other("anon_inode:[eventpoll]".to_owned()));
    }
}
