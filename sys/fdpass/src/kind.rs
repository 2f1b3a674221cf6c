//! What a descriptor is of.

use std::os::fd::AsFd;
use std::os::fd::AsRawFd;

use rustix::fs::FileType;
use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::net::sockopt;

/// What a descriptor is of, as the kernel says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// An eventfd.
    Eventfd,
    /// A socket that listens.
    Listener,
    /// A socket that is connected, or one end of a pair.
    Connection,
    /// A network interface (`/dev/net/tun`).
    Tap,
    /// A regular file with a name or without, or a block device.
    File,
    /// A pipe or a character device.
    Stream,
    /// Something else: what the kernel calls it.
    Other(String),
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
        FileType::Socket if sockopt::socket_acceptconn(fd)? => Kind::Listener,
        FileType::Socket => match rustix::net::getpeername(fd) {
            Ok(_) => Kind::Connection,
            Err(Errno::NOTCONN) => Kind::Other("a socket that is not connected".to_owned()),
            Err(errno) => return Err(errno.into()),
        },
        FileType::CharacterDevice if path == "/dev/net/tun" => Kind::Tap,
        FileType::CharacterDevice | FileType::Fifo => Kind::Stream,
        FileType::RegularFile | FileType::BlockDevice => Kind::File,
        _ if path == "anon_inode:[eventfd]" => Kind::Eventfd,
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
        assert_eq!(kind(&eventfd).unwrap(), Kind::Eventfd);
        let (one, _other) = Channel::pair().unwrap();
        assert_eq!(kind(&one).unwrap(), Kind::Connection);
        let path = std::env::temp_dir().join(format!("tideover-kind-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(kind(&listener).unwrap(), Kind::Listener);
        assert_eq!(kind(File::open("/proc/self/exe").unwrap()).unwrap(), Kind::File);
        assert_eq!(kind(File::open("/dev/null").unwrap()).unwrap(), Kind::Stream);
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        assert_eq!(kind(&epoll).unwrap(), Kind::Other("anon_inode:[eventpoll]".to_owned()));
    }
}
