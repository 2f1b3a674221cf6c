//! Which calls are made, and what becomes of the kernel's answers: on threads for which a filter answers in its place.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::fs::File;
use std::os::fd::AsFd as _;
use std::thread;

use seccompiler::BpfProgram;
use seccompiler::SeccompAction;
use seccompiler::SeccompCmpArgLen;
use seccompiler::SeccompCmpOp;
use seccompiler::SeccompCondition;
use seccompiler::SeccompFilter;
use seccompiler::SeccompRule;
use tideover_liveupdate::kexec;
use tideover_liveupdate::kexec::ExecuteError;
use tideover_liveupdate::kexec::LoadError;

/// `LINUX_REBOOT_CMD_KEXEC`.
const KEXEC: u64 = 0x4558_4543;

/// Calls `act` on a thread on which `call` is answered with `errno` if that one of its arguments, counted from 0, is this, or
/// whatever they are; and on which nothing else loads a kernel or reboots.
fn answered<T: Send + 'static>(
    call: i64,
    argument: Option<(u8, u64)>,
    errno: i32,
    act: impl FnOnce() -> T + Send + 'static,
) -> T {
    let when = |compared: SeccompCmpOp| {
        let condition = |(index, value)| {
            SeccompCondition::new(index, SeccompCmpArgLen::Dword, compared.clone(), value).unwrap()
        };
        argument.map(|argument| SeccompRule::new(vec![condition(argument)]).unwrap())
    };
    let rules = when(SeccompCmpOp::Eq);
    let arch = || std::env::consts::ARCH.try_into().unwrap();
    let answer = SeccompAction::Errno(u32::try_from(errno).unwrap());
    let answers = [(call, rules.into_iter().collect())].into_iter().collect();
    let answers = SeccompFilter::new(answers, SeccompAction::Allow, answer, arch()).unwrap();
    let all = [libc::SYS_kexec_load, libc::SYS_kexec_file_load, libc::SYS_reboot];
    let others = all.into_iter().filter(|other| *other != call).map(|other| (other, vec![]));
    // Of the call itself, what was not asked for.
    let asked_otherwise = when(SeccompCmpOp::Ne).map(|rule| (call, vec![rule]));
    let refused = others.chain(asked_otherwise).collect();
    let refuses =
        SeccompFilter::new(refused, SeccompAction::Allow, SeccompAction::Errno(95), arch()).unwrap();
    let (answers, refuses): (BpfProgram, BpfProgram) =
        (answers.try_into().unwrap(), refuses.try_into().unwrap());
    thread::spawn(move || {
        seccompiler::apply_filter(&refuses).unwrap();
        seccompiler::apply_filter(&answers).unwrap();
        act()
    })
    .join()
    .unwrap()
}

fn load(errno: i32) -> LoadError {
    answered(libc::SYS_kexec_file_load, None, errno, || {
        let kernel = File::open("/proc/self/exe").unwrap();
        kexec::load(kernel.as_fd(), None, "quiet").unwrap_err()
    })
}

/// L2.8.3: an image that the other call loaded would lose every session, and nobody would say so.
#[test]
fn a_kernel_is_loaded_by_the_call_that_takes_sessions_along() {
    assert!(matches!(load(libc::ENOEXEC), LoadError::NotAKernel));
    let unload = || kexec::unload().unwrap_err();
    assert!(matches!(answered(libc::SYS_kexec_file_load, None, libc::EBUSY, unload), LoadError::Busy));
}

/// By a flag that no kernel knows: above all not the one that lets go of what is loaded.
#[test]
fn the_call_is_asked_for_without_loading_or_letting_go() {
    let ask = |errno| answered(libc::SYS_kexec_file_load, Some((4, 1 << 31)), errno, kexec::ask);
    ask(libc::EINVAL).unwrap();
    assert!(matches!(ask(libc::ENOSYS), Err(LoadError::Unsupported)));
    assert!(matches!(ask(libc::EPERM), Err(LoadError::Denied)));
}

#[test]
fn what_the_kernel_says_of_an_image_is_told_apart() {
    assert!(matches!(load(libc::EPERM), LoadError::Denied));
    assert!(matches!(load(libc::EINVAL), LoadError::Invalid { bytes: 6 }));
    assert!(matches!(load(libc::ENOSYS), LoadError::Unsupported));
    for errno in [libc::EKEYREJECTED, libc::ENODATA, libc::ENOPKG, libc::EBADMSG] {
        assert!(matches!(load(errno), LoadError::Signature(source) if source.raw_os_error() == Some(errno)));
    }
    assert!(
        matches!(load(libc::ENOMEM), LoadError::Other(source) if source.raw_os_error() == Some(libc::ENOMEM))
    );
    let kernel = File::open("/proc/self/exe").unwrap();
    assert!(matches!(kexec::load(kernel.as_fd(), None, "a\0b"), Err(LoadError::Nul)));
}

/// L2.8.2: of all commands of the reboot call, the one for a kexec alone hands anything over; and the machine goes on if
/// it is refused.
#[test]
fn a_kernel_is_booted_by_the_command_that_hands_over_and_by_no_other() {
    let execute = |errno| {
        answered(libc::SYS_reboot, Some((2, KEXEC)), errno, || match kexec::execute() {
            Err(error) => error,
            Ok(never) => match never {},
        })
    };
    assert!(matches!(execute(libc::EPERM), ExecuteError::Denied));
    assert!(matches!(execute(libc::EINVAL), ExecuteError::NotLoaded));
    assert!(matches!(execute(libc::EBUSY), ExecuteError::Busy));
    let refused = execute(libc::ENOSPC);
    assert!(matches!(refused, ExecuteError::HandOver(source) if source.raw_os_error() == Some(libc::ENOSPC)));
}
