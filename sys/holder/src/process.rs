//! The holder itself.
//!
//! It shares this process's memory with threads that run on, so it may touch nothing of it but its own stack and
//! [`Task`]: no allocation, no lock, no thread-local (`errno` is one). Hence system calls by hand.

use std::arch::asm;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

/// Bytes of each of the two stacks.
const STACK_BYTES: usize = 64 << 10;

/// What the holder does.
struct Task {
    waits: RawFd,
    close: Vec<RawFd>,
    /// Its second half's stack.
    stack: Box<[u128]>,
}

fn stack() -> Box<[u128]> {
    vec![0; STACK_BYTES / size_of::<u128>()].into_boxed_slice()
}

/// One past a stack's highest byte, which is aligned as the ABI wants it.
fn top(stack: &mut [u128]) -> *mut libc::c_void {
    stack.as_mut_ptr_range().end.cast()
}

/// Starts it: a process that starts the holder and ends, so that the holder is the reaper's.
pub(crate) fn start(waits: &OwnedFd, close: Vec<RawFd>) -> io::Result<()> {
    let mut first_stack = stack();
    // Never freed: the holder lives in the old address space until it ends, and that goes with it.
    let task = Box::leak(Box::new(Task { waits: waits.as_raw_fd(), close, stack: stack() }));
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let argument: *mut Task = task;
    // SAFETY: `first_stack` is memory that nobody else uses until `clone` returns, which it does when the child has
    // ended (CLONE_VFORK); `argument` points to a task that is never freed. `middle` keeps to what a process in shared
    // memory may do: see the module's comment.
    let pid = unsafe { libc::clone(middle, top(&mut first_stack), flags, argument.cast()) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut status = 0;
    // SAFETY: `status` is an int of ours, and `pid` a child of ours that nobody else waits for.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    match (waited, libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0) {
        (-1, _) => Err(io::Error::last_os_error()),
        (_, true) => Ok(()),
        (_, false) => Err(io::Error::other("the holder was not started")),
    }
}

extern "C" fn middle(task: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `start` gave a task that is never freed, and touches it no more.
    let task = unsafe { &mut *task.cast::<Task>() };
    let argument: *mut Task = task;
    // SAFETY: the stack is the task's own and used by the holder alone; the task is never freed. libc's `clone` writes
    // `errno` only if it fails, while this process's parent waits in `clone` (CLONE_VFORK).
    let pid = unsafe { libc::clone(hold, top(&mut task.stack), libc::CLONE_VM, argument.cast()) };
    exit(if pid < 0 { 1 } else { 0 })
}

extern "C" fn hold(task: *mut libc::c_void) -> libc::c_int {
    // SAFETY: as in `middle`, which ends without touching it again.
    let task = unsafe { &*task.cast::<Task>() };
    for fd in &task.close {
        call(libc::SYS_close, [(*fd).cast_unsigned() as usize, 0, 0]);
    }
    let mut byte = 0u8;
    // The end of the pipe, or an error: either way there is nothing left to wait for. A signal is not.
    while call(libc::SYS_read, [task.waits.cast_unsigned() as usize, (&raw mut byte).addr(), 1])
        == -i64::from(libc::EINTR)
    {}
    exit(0)
}

fn exit(code: usize) -> ! {
    loop {
        call(libc::SYS_exit_group, [code, 0, 0]);
    }
}

/// A system call, which touches no memory but what its arguments name.
fn call(number: libc::c_long, arguments: [usize; 3]) -> i64 {
    let result: i64;
    // SAFETY: the calls made here are close of this process's own copy of a descriptor, read of one byte into a local
    // whose address is given, and exit_group. By the x86-64 ABI the kernel changes rax, rcx and r11 alone.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}
