//! Moves the threads of a process into another process that shares its memory, so that the process itself can execute
//! another program while they run on.
//!
//! `execve` ends all threads of a process but one, takes its address space down and closes the descriptors that do not go
//! with it. For a VMM this means that its guest stands still from before the `execve` until the new program is ready for
//! it. Here the threads *step aside* first: each goes on, in the midst of what it did, as a thread of a new process with
//! the same memory and a copy of the descriptors. The process that they leave keeps its number, its parent and its
//! place in the system, and has one thread, which executes the next program:
//!
//! ```text
//! this process   main, vcpu0, disk ──┬── stays ── execve ──▶ next program gets ready ─ takes over ──▶ …
//!                                    │                                                 │
//! the one aside                      └── main, vcpu0, disk run on in the old space ────┴─▶ ends
//! ```
//!
//! # How it is done
//!
//! Every thread is sent a signal, in whose handler it parks. When all are parked, the caller's thread is copied by `clone`
//! into a process of its own that shares the memory; there it makes a thread for each that is parked, with that one's
//! stack and thread-local storage, which returns from the handler in its place. The parked ones touch no stack any more,
//! and are ended by the `execve`. Until all of the new threads stand ready nothing has happened that cannot be undone.
//!
//! # What changes for a thread
//!
//! Its number and its process's number; what had asked for them before knows the old ones. `pthread_kill` and joining go
//! on working. Name, processors and scheduling class are carried over, the last as far as this process has the right.
//! A system call that it sat in may return EINTR. What has noted a thread's number as the owner of a lock (`pthread_mutex`
//! that is recursive, robust, error-checking or inherits priority) does not know the owner again.
//!
//! On Linux before 6.13 a vCPU whose thread changes waits, once, for a grace period of RCU (some 10 ms).
#![expect(
    unsafe_code,
    reason = "makes tasks that go on with another's stack, and takes over what was inherited"
)]

mod descriptors;
mod files;
mod gather;
mod go;
mod kernel;
mod task;

pub use descriptors::inherit;
pub use descriptors::inherited;
pub use go::Aside;
pub use go::AsideError;
pub use go::step_aside;
