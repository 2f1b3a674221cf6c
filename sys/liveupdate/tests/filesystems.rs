//! What is asked of the kernel for file systems to stand still: on threads for which a filter answers in its place, so that
//! nothing of this host is frozen.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use seccompiler::BpfProgram;
use seccompiler::SeccompAction;
use seccompiler::SeccompCmpArgLen;
use seccompiler::SeccompCmpOp;
use seccompiler::SeccompCondition;
use seccompiler::SeccompFilter;
use seccompiler::SeccompRule;
use tideover_liveupdate::filesystems::HoldError;
use tideover_liveupdate::filesystems::Refusal;
use tideover_liveupdate::filesystems::Still;

/// `FIFREEZE` and `FITHAW`.
const FREEZE: u64 = 0xc004_5877;
const THAW: u64 = 0xc004_5878;
/// For what comes, on however busy a machine.
const LATE: Duration = Duration::from_secs(300);

/// From here on, on this thread and those that it makes, the kernel answers so when it is asked to freeze or to thaw. No error (0)
/// is success.
fn answer(freeze: i32, thaw: i32) {
    for (number, errno) in [(FREEZE, freeze), (THAW, thaw)] {
        let is = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, number).unwrap();
        let rules = [(libc::SYS_ioctl, vec![SeccompRule::new(vec![is]).unwrap()])].into_iter().collect();
        let answer = SeccompAction::Errno(u32::try_from(errno).unwrap());
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, arch).unwrap();
        let filter: BpfProgram = filter.try_into().unwrap();
        seccompiler::apply_filter(&filter).unwrap();
    }
}

/// What became of the file systems of this host that have a disk and can be written to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Became {
    held: Vec<PathBuf>,
    unsupported: Vec<PathBuf>,
    frozen: Vec<PathBuf>,
    broken: Vec<PathBuf>,
    not_thawed: Vec<PathBuf>,
}

/// Holds and releases, where the kernel answers so.
fn hold(freeze: i32, thaw: i32) -> Result<Became, HoldError> {
    let held = thread::spawn(move || {
        answer(freeze, thaw);
        let still = Still::hold(LATE)?;
        let mut became =
            Became { held: still.held().map(|held| held.point.clone()).collect(), ..Became::default() };
        for (left, refusal) in still.left() {
            match refusal {
                Refusal::Unsupported => became.unsupported.push(left.point.clone()),
                Refusal::Frozen => became.frozen.push(left.point.clone()),
                Refusal::Other(source) if source.raw_os_error() == Some(libc::EIO) => {
                    became.broken.push(left.point.clone());
                }
                Refusal::ReadOnly | Refusal::Hidden(_) => {}
                other => panic!("{other:?}"),
            }
        }
        if let Err(error) = still.release() {
            became.not_thawed = error.failed.into_iter().map(|(failed, _)| failed.point).collect();
        }
        Ok(became)
    });
    held.join().unwrap()
}

#[test]
fn what_the_kernel_says_of_a_file_system_is_told_apart() {
    let held = hold(0, 0).unwrap().held;
    let asked = || held.clone();
    assert_eq!(hold(0, 0).unwrap(), Became { held: asked(), ..Became::default() });
    let unsupported = hold(libc::EOPNOTSUPP, libc::EIO).unwrap();
    assert_eq!(unsupported, Became { unsupported: asked(), ..Became::default() });
    let frozen = hold(libc::EBUSY, libc::EIO).unwrap();
    assert_eq!(frozen, Became { frozen: asked(), ..Became::default() });
    let broken = hold(libc::EIO, libc::EIO).unwrap();
    assert_eq!(broken, Became { broken: asked(), ..Became::default() });
    match hold(libc::EPERM, libc::EIO) {
        Err(HoldError::Denied(filesystem)) => assert_eq!(Some(&filesystem.point), held.first()),
        other => assert!(held.is_empty(), "{other:?}"),
    }
}

#[test]
fn what_somebody_else_has_thawed_is_thawed_and_what_stays_frozen_is_named() {
    let thawed = hold(0, libc::EINVAL).unwrap();
    assert_eq!(thawed, Became { held: thawed.held.clone(), ..Became::default() });
    let stubborn = hold(0, libc::EIO).unwrap();
    let last_first: Vec<_> = stubborn.held.iter().rev().cloned().collect();
    assert_eq!(stubborn, Became { not_thawed: last_first, held: stubborn.held.clone(), ..Became::default() });
}

#[test]
fn a_root_on_a_disk_is_held() {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ext4_root = |line: &str| {
        let (mount, filesystem) = line.split_once(" - ").unwrap();
        let read_only = filesystem.split([' ', ',']).any(|option| option == "ro");
        mount.split(' ').nth(4) == Some("/") && filesystem.starts_with("ext4 ") && !read_only
    };
    let held = hold(0, 0).unwrap().held;
    if mounts.lines().any(ext4_root) {
        assert!(held.contains(&PathBuf::from("/")), "{held:?}");
    }
}
