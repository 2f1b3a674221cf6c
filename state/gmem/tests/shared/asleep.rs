//! Whether a thread waits.

use std::fs;

/// True while the thread (as `/proc/thread-self` names it) sleeps in the kernel.
pub(crate) fn sleeps(thread: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{thread}/stat")).unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    matches!(after_name.chars().next(), Some('S' | 'D'))
}
