//! What a VMM may still do once its guest runs.
//!
//! A guest that breaks out of its VM is in the VMM's process, with the VMM's rights. A machine that is *confined* leaves
//! it few:
//!
//! - [`give_up_rights`], before anything else: no capabilities, in no set, and none to be had again by executing a file.
//! - [`filter_calls`], when the guest runs: in all threads only the system calls that running, pausing, restarting and
//!   handing over a guest take. No program is executed and no process made, so that a successor has to be started by
//!   somebody else; no memory becomes executable; no socket is of the network; an ioctl is one of KVM's, of
//!   userfaultfd's or of a tap's, or looks for lost pages.
//!
//! What is left to the rights of the process's user is which files it can open: `/dev/kvm`, `/dev/userfaultfd` and the
//! machine's directory are needed, the last two for updates.

use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use rustix::thread::CapabilitySets;
use seccompiler::BpfProgram;
use seccompiler::SeccompAction;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpArgLen::Qword;
use seccompiler::SeccompCmpOp;
use seccompiler::SeccompCmpOp::Eq;
use seccompiler::SeccompCmpOp::MaskedEq;
use seccompiler::SeccompCondition;
use seccompiler::SeccompFilter;
use seccompiler::SeccompRule;
use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;

/// What becomes of a VMM at a system call that it has no need of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confine {
    /// Nothing: all calls are let through, and the VMM keeps its rights.
    #[default]
    No,
    /// The call fails with EPERM.
    Deny,
    /// The VMM is killed, and the guest with it.
    Kill,
}

/// Why a VMM is not confined.
#[derive(Debug, Error)]
pub enum ConfineError {
    /// The rights could not be given up.
    #[error("cannot give up {what}")]
    Rights {
        /// Which.
        what: &'static str,
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
    /// There is no filter for this machine, or the kernel takes none.
    #[error("cannot filter system calls")]
    Filter(#[source] seccompiler::Error),
}

/// Gives up all capabilities of this thread, and of those that it will start, for good.
///
/// # Errors
/// [`ConfineError::Rights`].
pub fn give_up_rights() -> Result<(), ConfineError> {
    let rights = |what| move |cause| ConfineError::Rights { what, cause };
    rustix::thread::set_no_new_privs(true).map_err(rights("new privileges"))?;
    let held = rustix::thread::capabilities(None).map_err(rights("capabilities"))?;
    // Who may not change the bounding set has nothing to gain from it: it is a limit for privileged programs, and
    // there are no new privileges.
    if held.effective.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().iter() {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                // The kernel is older than the capability.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(cause) => return Err(rights("a capability")(cause)),
            }
        }
    }
    rustix::thread::clear_ambient_capability_set().map_err(rights("ambient capabilities"))?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).map_err(rights("capabilities"))
}

/// Lets all threads of this process make only the system calls that a VMM needs while its guest runs.
///
/// # Errors
/// [`ConfineError::Filter`]; the process is then as it was, or has given up starting threads in one of two ways.
pub fn filter_calls(confine: Confine) -> Result<(), ConfineError> {
    let otherwise = match confine {
        Confine::No => return Ok(()),
        Confine::Deny => errno(Errno::PERM),
        Confine::Kill => SeccompAction::KillProcess,
    };
    let programs = [
        threads_as_before().map_err(ConfineError::Filter)?,
        allowed(otherwise).map_err(ConfineError::Filter)?,
    ];
    programs
        .iter()
        .try_for_each(|program| seccompiler::apply_filter_all_threads(program).map_err(ConfineError::Filter))
}

fn errno(errno: Errno) -> SeccompAction {
    SeccompAction::Errno(errno.raw_os_error().unsigned_abs())
}

fn compile(
    rules: impl IntoIterator<Item = (libc::c_long, Vec<SeccompRule>)>,
    otherwise: SeccompAction,
    on_match: SeccompAction,
) -> Result<BpfProgram, seccompiler::Error> {
    let architecture = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules.into_iter().collect(), otherwise, on_match, architecture)?;
    Ok(filter.try_into()?)
}

/// A filter cannot look at what `clone3` points to. Without that call a C library starts a thread by `clone`, whose
/// flags it can look at.
fn threads_as_before() -> Result<BpfProgram, seccompiler::Error> {
    compile([(libc::SYS_clone3, Vec::new())], SeccompAction::Allow, errno(Errno::NOSYS))
}

fn allowed(otherwise: SeccompAction) -> Result<BpfProgram, seccompiler::Error> {
    let mut rules: Vec<_> = ANYHOW.iter().map(|&call| (call, Vec::new())).collect();
    for &(call, conditions) in IF {
        let one_of: Result<Vec<_>, seccompiler::BackendError> = conditions
            .iter()
            .map(|(argument, length, operation, value)| {
                let condition = SeccompCondition::new(*argument, length.clone(), operation.clone(), *value)?;
                SeccompRule::new(vec![condition])
            })
            .collect();
        rules.push((call, one_of?));
    }
    compile(rules, otherwise, SeccompAction::Allow)
}

/// Calls that are let through whatever their arguments.
const ANYHOW: &[libc::c_long] = &[
    // The memory of the process and of the guest.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_mbind,
    libc::SYS_get_mempolicy,
    libc::SYS_memfd_create,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_userfaultfd,
    // Files and descriptors. `open`, `readlink` and `unlink` are found on machines of some kinds only.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_openat,
    libc::SYS_readlinkat,
    libc::SYS_unlinkat,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_lseek,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_pidfd_open,
    libc::SYS_ppoll,
    // Those who come to the machine's socket, and successors.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    // Threads and time.
    libc::SYS_clone3,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getattr,
    libc::SYS_sched_setattr,
];

/// What an argument, of some length, has to be.
type Condition = (u8, seccompiler::SeccompCmpArgLen, SeccompCmpOp, u64);

/// Bits 8 to 15 of an ioctl's number are its kind.
const KIND: SeccompCmpOp = MaskedEq(0xff00);
const KVM: u64 = 0xae00;
const USERFAULTFD: u64 = 0xaa00;
const LIVEUPDATE: u64 = 0xba00;

/// The kernel's names for what arguments are compared with.
const PROT_EXEC: u64 = 4;
const AF_UNIX: u64 = 1;
const CLONE_THREAD: u64 = 0x1_0000;
const PR_SET_NAME: u64 = 15;
const PR_GET_NAME: u64 = 16;
const PR_SET_VMA: u64 = 0x5356_4d41;
const TCGETS: u64 = 0x5401;
const FIONBIO: u64 = 0x5421;
const PAGEMAP_SCAN: u64 = 0xc060_6610;

/// Calls that are let through if one of the conditions holds.
const IF: &[(libc::c_long, &[Condition])] = &[
    (libc::SYS_mmap, &[(2, Dword, MaskedEq(PROT_EXEC), 0)]),
    (libc::SYS_mprotect, &[(2, Dword, MaskedEq(PROT_EXEC), 0)]),
    (libc::SYS_socket, &[(0, Dword, Eq, AF_UNIX)]),
    (libc::SYS_socketpair, &[(0, Dword, Eq, AF_UNIX)]),
    (libc::SYS_clone, &[(0, Qword, MaskedEq(CLONE_THREAD), CLONE_THREAD)]),
    // To read a limit, not to set one.
    (libc::SYS_prlimit64, &[(2, Qword, Eq, 0)]),
    (
        libc::SYS_prctl,
        &[(0, Dword, Eq, PR_SET_NAME), (0, Dword, Eq, PR_GET_NAME), (0, Dword, Eq, PR_SET_VMA)],
    ),
    (
        libc::SYS_ioctl,
        &[
            (1, Dword, KIND, KVM),
            (1, Dword, KIND, USERFAULTFD),
            (1, Dword, KIND, LIVEUPDATE),
            // Whether the log is a terminal.
            (1, Dword, Eq, TCGETS),
            // Which pages of its own memory are lost, before an update.
            (1, Dword, Eq, PAGEMAP_SCAN),
            (1, Dword, Eq, FIONBIO),
            (1, Dword, Eq, libc::TUNGETIFF),
            (1, Dword, Eq, libc::TUNGETVNETHDRSZ),
            (1, Dword, Eq, libc::TUNSETVNETHDRSZ),
            (1, Dword, Eq, libc::TUNSETOFFLOAD),
        ],
    ),
];

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;
    use std::thread;

    use rustix::net::AddressFamily;
    use rustix::net::SocketType;

    use super::*;

    /// Does something in a thread that is confined, and that alone.
    fn confined<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
        let thread = thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            for program in [threads_as_before().unwrap(), allowed(errno(Errno::PERM)).unwrap()] {
                seccompiler::apply_filter(&program).unwrap();
            }
            what()
        });
        thread.join().unwrap()
    }

    fn denied<T>(result: io::Result<T>) -> bool {
        result.err().and_then(|error| error.raw_os_error()) == Some(libc::EPERM)
    }

    #[test]
    fn no_program_is_executed_and_no_process_made() {
        assert!(confined(|| denied(Err::<(), _>(Command::new("/bin/true").exec()))));
        assert!(confined(|| denied(Command::new("/bin/true").status())));
    }

    #[test]
    fn threads_are_started_as_ever() {
        assert_eq!(confined(|| thread::spawn(|| 7).join().unwrap()), 7);
    }

    #[test]
    fn no_socket_is_of_the_network() {
        let socket = |family| rustix::net::socket(family, SocketType::STREAM, None).map(drop);
        assert_eq!(confined(move || socket(AddressFamily::INET)), Err(Errno::PERM));
        assert_eq!(confined(move || socket(AddressFamily::NETLINK)), Err(Errno::PERM));
        assert_eq!(confined(move || socket(AddressFamily::UNIX)), Ok(()));
    }

    #[test]
    fn rights_that_were_given_up_are_not_had_again() {
        let after = thread::spawn(|| {
            give_up_rights().unwrap();
            let held = rustix::thread::capabilities(None).unwrap();
            let all = CapabilitySets { effective: CapabilitySet::all(), ..held };
            (held, rustix::thread::set_capabilities(None, all))
        });
        let (held, again) = after.join().unwrap();
        let none = CapabilitySet::empty();
        assert_eq!(held, CapabilitySets { effective: none, permitted: none, inheritable: none });
        assert_eq!(again, Err(Errno::PERM));
    }

    #[test]
    fn no_condition_is_on_a_call_that_is_let_through_anyhow() {
        assert!(IF.iter().all(|(call, _)| !ANYHOW.contains(call)));
    }
}
