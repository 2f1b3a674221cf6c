//! A network interface whose other end is a descriptor (`/dev/net/tun`), for a virtual machine's network card.
//!
//! Each read takes one Ethernet frame that the host sends, each write gives it one, and before each frame stand
//! [`HEADER_BYTES`] of virtio's header. Frames that nobody has read wait in the kernel, with the open file: a
//! successor that is given the descriptor finds them. As long as somebody has it open, nobody else can have the
//! interface by its name.
#![expect(unsafe_code, reason = "the ioctls of /dev/net/tun take structures by address")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use thiserror::Error;

/// Bytes of `struct virtio_net_hdr_v1` before each frame.
pub const HEADER_BYTES: usize = 12;

const DEVICE: &str = "/dev/net/tun";
/// Frames, without a head of the driver's own, with virtio's.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Why a descriptor is not the other end of an interface.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TapError {
    /// No interface can have this name.
    #[error("{name:?} is no name of an interface: 1 to 15 bytes, without `/`, NUL or white space")]
    Name {
        /// The name.
        name: String,
    },
    /// A system call failed. EBUSY: somebody has the interface.
    #[error("cannot {what} of the interface {name:?}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// The interface.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The descriptor is the other end of an interface of another kind.
    #[error("the interface {name:?} has {what} {found:#x}, not {wanted:#x}")]
    Kind {
        /// The interface.
        name: String,
        /// What is different.
        what: &'static str,
        /// What it is.
        found: i64,
        /// What it has to be.
        wanted: i64,
    },
}

/// The other end of an interface, which does not block.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
}

impl Tap {
    /// Whether there is an interface of this name that somebody can have the other end of. [`open`](Self::open) makes
    /// one if there is none.
    pub fn is_there(name: &str) -> bool {
        // A name with a `/` is no name, and a path to elsewhere.
        request(name).is_ok() && Path::new("/sys/class/net").join(name).join("tun_flags").exists()
    }

    /// Takes the interface of this name, and makes it if there is none.
    ///
    /// # Errors
    /// [`TapError`]; without `CAP_NET_ADMIN` only an interface that was made for this user can be had.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let mut request = request(name)?;
        let call = |what| move |source| TapError::Call { what, name: name.to_owned(), source };
        let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(DEVICE);
        let fd = OwnedFd::from(file.map_err(call("open the end"))?);
        let bits = libc::c_short::try_from(FLAGS);
        request.ifr_ifru.ifru_flags = bits.map_err(|_| call("name the kind")(io::Error::other("kind")))?;
        // SAFETY: an open descriptor, and a request of the type that this number stands for, which outlives the call.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        answer(result).map_err(call("take the end"))?;
        let mut bytes = header_bytes();
        // SAFETY: as above; the call reads one int.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw mut bytes) };
        answer(result).map_err(call("set the header"))?;
        // SAFETY: an open descriptor; the argument is a number. No offloads: each frame is whole and has its checksum.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, 0) };
        answer(result).map_err(call("set the offloads"))?;
        Ok(Self { fd, name: name.to_owned() })
    }

    /// Takes a descriptor that was opened elsewhere, as by the predecessor.
    ///
    /// # Errors
    /// [`TapError`] if it is not the other end of an interface as [`open`](Self::open) makes it.
    pub fn adopt(fd: OwnedFd) -> Result<Self, TapError> {
        let call = |what| move |source| TapError::Call { what, name: String::new(), source };
        // SAFETY: all zeros are such a request: a name of no bytes, and a union of numbers.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: an open descriptor, and a request that the call fills and that outlives it.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
        answer(result).map_err(call("ask for the kind"))?;
        // SAFETY: the call has set the flags, and every bit pattern is a number.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let name = name_of(&request);
        let kind =
            libc::c_int::from(flags) & (libc::IFF_TAP | libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
        check(&name, "flags", kind, FLAGS)?;
        let mut bytes: libc::c_int = 0;
        // SAFETY: as above; the call writes one int.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETVNETHDRSZ, &raw mut bytes) };
        answer(result).map_err(call("ask for the header"))?;
        check(&name, "a header of bytes", bytes, header_bytes())?;
        Ok(Self { fd, name })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Tap> for OwnedFd {
    fn from(tap: Tap) -> Self {
        tap.fd
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "it is 12")]
const fn header_bytes() -> libc::c_int {
    HEADER_BYTES as libc::c_int
}

fn check(name: &str, what: &'static str, found: libc::c_int, wanted: libc::c_int) -> Result<(), TapError> {
    if found == wanted {
        return Ok(());
    }
    Err(TapError::Kind { name: name.to_owned(), what, found: found.into(), wanted: wanted.into() })
}

fn answer(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A request about the interface of this name.
fn request(name: &str) -> Result<libc::ifreq, TapError> {
    // SAFETY: all zeros are such a request: a name of no bytes, and a union of numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let odd = |byte: u8| byte == 0 || byte == b'/' || byte == b':' || byte.is_ascii_whitespace();
    // A `%` would have the kernel choose a number.
    let good = !name.is_empty() && name.len() < request.ifr_name.len() && !name.contains('%');
    if !good || name == "." || name == ".." || name.bytes().any(odd) {
        return Err(TapError::Name { name: name.to_owned() });
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = libc::c_char::from_le_bytes([byte]);
    }
    Ok(request)
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|byte| byte.to_le_bytes()[0]);
    let bytes: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_name_is_refused() {
        for name in ["", "sixteen-bytes-xx", "a/b", "a b", "tap%d", "..", "a\0"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name { .. })), "{name:?}");
            assert!(!Tap::is_there(name), "{name:?}");
        }
    }

    #[test]
    fn what_is_no_end_of_an_interface_is_refused() {
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(matches!(Tap::adopt(null), Err(TapError::Call { what: "ask for the kind", .. })));
    }

    #[test]
    fn an_interface_has_one_holder_and_goes_with_its_descriptor() {
        harness::need!(tap);
        let name = format!("tdo{}", std::process::id() % 100_000);
        assert!(!Tap::is_there(&name));
        let tap = Tap::open(&name).unwrap();
        assert!(Tap::is_there(&name));
        let other = Tap::open(&name);
        assert!(
            matches!(&other, Err(TapError::Call { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy),
            "{other:?}"
        );
        let passed = tap.as_fd().try_clone_to_owned().unwrap();
        drop(tap);
        let successor = Tap::adopt(passed).unwrap();
        assert_eq!(successor.name(), name);
        assert!(Tap::open(&name).is_err(), "the predecessor's end does not free it");
    }

    #[test]
    fn an_interface_of_another_kind_is_refused() {
        harness::need!(tap);
        let name = format!("tdk{}", std::process::id() % 100_000);
        let tap = Tap::open(&name).unwrap();
        let mut bytes: libc::c_int = 10;
        // SAFETY: an open descriptor and an int that outlives the call.
        let result = unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw mut bytes) };
        answer(result).unwrap();
        let other = Tap::adopt(OwnedFd::from(tap));
        assert!(matches!(other, Err(TapError::Kind { found: 10, wanted: 12, .. })), "{other:?}");
    }
}
