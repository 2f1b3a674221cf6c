//! What happens when memory goes away under a process that uses it: somebody has truncated the file of a machine that lies at a path, or the
//! hardware has lost a page.

use std::io;
use std::mem;
use std::ptr;

/// With this code a process ends whose machine's memory went away.
pub const EXIT_CODE: i32 = 70;

const SAID: &[u8] = b"tideover: the machine's memory is gone under its VMM (SIGBUS): its file was truncated, its device taken away, \
or the hardware lost a page. The machine is stopped\n";

/// From now on this process says so, and ends, when it touches memory that is not there any more. It would be killed without a word.
///
/// # Errors
/// As the kernel.
pub fn guard() -> io::Result<()> {
    let handler: extern "C" fn(libc::c_int) = stop;
    // SAFETY: all-zero is a valid sigaction: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: a whole sigaction, whose handler makes two calls that a signal handler may make, and does not return.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn stop(_signal: libc::c_int) {
    // SAFETY: the text is static; both calls are async-signal-safe, and the second one ends the process.
    unsafe {
        libc::write(libc::STDERR_FILENO, SAID.as_ptr().cast(), SAID.len());
        libc::_exit(EXIT_CODE);
    }
}
