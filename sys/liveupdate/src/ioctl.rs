//! The calls themselves: `_IO(0xBA, number)`, each with one structure whose first word is its size; and those that freeze a
//! file system.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd as _;
use std::os::fd::FromRawFd as _;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

use crate::name::FIELD_BYTES;

/// `struct liveupdate_ioctl_create_session`, `..._retrieve_session`.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Session {
    size: u32,
    /// Written by the kernel.
    fd: RawFd,
    name: [u8; FIELD_BYTES],
}

/// `struct liveupdate_session_preserve_fd`, `..._retrieve_fd`.
#[derive(Debug)]
#[repr(C)]
struct File {
    size: u32,
    fd: RawFd,
    token: u64,
}

/// `struct liveupdate_session_finish`.
#[derive(Debug)]
#[repr(C)]
struct Finish {
    size: u32,
    reserved: u32,
}

/// `struct liveupdate_session_get_name`.
#[derive(Debug)]
#[repr(C)]
struct GetName {
    size: u32,
    reserved: u32,
    name: [u8; FIELD_BYTES],
}

const _: () = assert!(size_of::<Session>() == 72 && align_of::<Session>() == 4);
const _: () = assert!(size_of::<File>() == 16 && align_of::<File>() == 8);
const _: () = assert!(size_of::<Finish>() == 8 && size_of::<GetName>() == 72);

const SESSION_BYTES: u32 = 72;
const FILE_BYTES: u32 = 16;
const FINISH_BYTES: u32 = 8;

const CREATE_SESSION: libc::Ioctl = 0xba00;
const RETRIEVE_SESSION: libc::Ioctl = 0xba01;
const PRESERVE_FD: libc::Ioctl = 0xba40;
const RETRIEVE_FD: libc::Ioctl = 0xba41;
const FINISH: libc::Ioctl = 0xba42;
const GET_NAME: libc::Ioctl = 0xba43;

/// `_IOWR('X', 119, int)`, of which the kernel neither reads nor writes the number.
const FIFREEZE: libc::Ioctl = 0xc004_5877;
/// `_IOWR('X', 120, int)`, likewise.
const FITHAW: libc::Ioctl = 0xc004_5878;

/// Makes a call with a structure that the kernel reads and writes no further than the size in its first word.
///
/// # Safety
/// `T` has to be the structure of the call, with its own size in its first word.
unsafe fn call<T>(fd: impl AsFd, number: libc::Ioctl, structure: &mut T) -> io::Result<()> {
    // SAFETY: the structure is borrowed for the call, and is what the caller says.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), number, std::ptr::from_mut(structure)) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What the kernel put into this process's table, close-on-exec.
///
/// # Safety
/// The kernel has to have just given the number as an answer.
unsafe fn given(number: RawFd) -> OwnedFd {
    // SAFETY: it is new, and nobody else's yet.
    unsafe { OwnedFd::from_raw_fd(number) }
}

fn session(device: impl AsFd, number: libc::Ioctl, name: [u8; FIELD_BYTES]) -> io::Result<OwnedFd> {
    let mut structure = Session { size: SESSION_BYTES, fd: -1, name };
    // SAFETY: both calls that come here take this structure.
    unsafe { call(device, number, &mut structure)? };
    // SAFETY: both answer with a new descriptor.
    Ok(unsafe { given(structure.fd) })
}

pub(crate) fn create_session(device: impl AsFd, name: [u8; FIELD_BYTES]) -> io::Result<OwnedFd> {
    session(device, CREATE_SESSION, name)
}

pub(crate) fn retrieve_session(device: impl AsFd, name: [u8; FIELD_BYTES]) -> io::Result<OwnedFd> {
    session(device, RETRIEVE_SESSION, name)
}

pub(crate) fn preserve_fd(session: impl AsFd, token: u64, fd: impl AsFd) -> io::Result<()> {
    let mut structure = File { size: FILE_BYTES, fd: fd.as_fd().as_raw_fd(), token };
    // SAFETY: the call takes this structure, and reads it alone.
    unsafe { call(session, PRESERVE_FD, &mut structure) }
}

pub(crate) fn retrieve_fd(session: impl AsFd, token: u64) -> io::Result<OwnedFd> {
    let mut structure = File { size: FILE_BYTES, fd: -1, token };
    // SAFETY: the call takes this structure.
    unsafe { call(session, RETRIEVE_FD, &mut structure)? };
    // SAFETY: it answers with a new descriptor.
    Ok(unsafe { given(structure.fd) })
}

pub(crate) fn finish(session: impl AsFd) -> io::Result<()> {
    let mut structure = Finish { size: FINISH_BYTES, reserved: 0 };
    // SAFETY: the call takes this structure.
    unsafe { call(session, FINISH, &mut structure) }
}

pub(crate) fn get_name(session: impl AsFd) -> io::Result<[u8; FIELD_BYTES]> {
    let mut structure = GetName { size: SESSION_BYTES, reserved: 0, name: [0; FIELD_BYTES] };
    // SAFETY: the call takes this structure.
    unsafe { call(session, GET_NAME, &mut structure)? };
    Ok(structure.name)
}

/// Freezes the file system that the file is of.
pub(crate) fn freeze(file: impl AsFd) -> io::Result<()> {
    without_argument(file, FIFREEZE)
}

/// Thaws the file system that the file is of.
pub(crate) fn thaw(file: impl AsFd) -> io::Result<()> {
    without_argument(file, FITHAW)
}

fn without_argument(file: impl AsFd, number: libc::Ioctl) -> io::Result<()> {
    // SAFETY: both calls that come here use no memory of the caller's.
    let result = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), number, 0) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
