//! Processes whose threads step aside, and what their processes do then.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]
#![expect(unsafe_code, reason = "blocks signals, which Rust's library does not do")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use seccompiler::SeccompAction;
use seccompiler::SeccompCmpArgLen;
use seccompiler::SeccompCmpOp;
use seccompiler::SeccompCondition;
use seccompiler::SeccompFilter;
use seccompiler::SeccompRule;
use tideover_aside::AsideError;
use tideover_aside::step_aside;

/// Says to this program what it is to do, and where to say how it went.
const ROLE: &str = "TIDEOVER_ASIDE_TEST";
const SAYS: &str = "TIDEOVER_ASIDE_SAYS";
const PATIENCE: Duration = Duration::from_secs(20);

/// Threads that are in the midst of something: one counts, one waits for another thread, one sits in a system call.
struct Busy {
    ends: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    awaited: Arc<(Mutex<bool>, Condvar)>,
    pipe: std::io::PipeWriter,
    threads: Vec<JoinHandle<u64>>,
}

impl Busy {
    fn start() -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU64::new(0));
        let awaited = Arc::new((Mutex::new(false), Condvar::new()));
        let (mut reader, pipe) = std::io::pipe().unwrap();
        let named = |name: &str| thread::Builder::new().name(name.to_owned());
        let counts = named("counts").spawn({
            let (ends, count) = (Arc::clone(&ends), Arc::clone(&count));
            move || {
                // Registers of all kinds are in use.
                let (mut sum, mut wave) = (0u64, 1.0f64);
                while !ends.load(Ordering::Acquire) {
                    sum += count.fetch_add(1, Ordering::AcqRel) & 1;
                    wave = (wave * 1.000_000_1).min(2.0);
                }
                assert!((1.0..=2.0).contains(&wave));
                sum.min(7)
            }
        });
        let waits = named("waits").spawn({
            let awaited = Arc::clone(&awaited);
            move || {
                let come = awaited.0.lock().unwrap();
                drop(awaited.1.wait_while(come, |come| !*come).unwrap());
                8
            }
        });
        let reads = named("reads").spawn(move || {
            let mut said = String::new();
            reader.read_to_string(&mut said).unwrap();
            u64::try_from(said.len()).unwrap()
        });
        let threads = [counts, waits, reads].map(Result::unwrap).into_iter().collect();
        Self { ends, count, awaited, pipe, threads }
    }

    /// Each of them goes on, and can be told to end and joined.
    fn check(mut self) {
        let before = self.count.load(Ordering::Acquire);
        await_that("nobody counts", || self.count.load(Ordering::Acquire) > before + 1000);
        let names: Vec<String> = threads().into_values().collect();
        for name in ["counts", "waits", "reads"] {
            assert!(names.iter().any(|other| other == name), "{names:?}");
        }
        self.ends.store(true, Ordering::Release);
        *self.awaited.0.lock().unwrap() = true;
        self.awaited.1.notify_all();
        self.pipe.write_all(b"nine bytes").unwrap();
        drop(self.pipe);
        let said: Vec<u64> = self.threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(said, [7, 8, 10]);
    }
}

/// Names of this process's threads.
fn threads() -> BTreeMap<u32, String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|entry| entry.unwrap());
    let named = tasks.filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        Some((task.file_name().to_str()?.parse().ok()?, name.trim().to_owned()))
    });
    named.collect()
}

fn await_that(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn execute(program: &'static str) -> impl FnOnce(&[RawFd]) + Send + 'static {
    move |_| {
        let _ = Command::new(program).exec();
    }
}

/// Not a test of its own: what the tests start. It says whether all went as it was to.
#[test]
fn plays_its_role_if_it_has_one() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let says = PathBuf::from(std::env::var_os(SAYS).unwrap());
    let before = process::id();
    let busy = Busy::start();
    match role.as_str() {
        "executes" => {
            let aside = step_aside(Vec::new(), execute("/bin/cat"), PATIENCE).unwrap();
            assert_eq!(aside.left, before);
            assert!(aside.others >= 3 && process::id() != before);
        }
        "packs" => {
            let (mut reader, writer) = std::io::pipe().unwrap();
            let number = writer.as_raw_fd();
            let says = move |luggage: &[RawFd]| {
                let to = format!("echo well packed >&{}", luggage[0]);
                let _ = Command::new("/bin/sh").args(["-c", &to]).exec();
            };
            step_aside(vec![OwnedFd::from(writer)], says, PATIENCE).unwrap();
            assert!(!PathBuf::from(format!("/proc/self/fd/{number}")).exists());
            let mut said = String::new();
            reader.read_to_string(&mut said).unwrap();
            assert_eq!(said, "well packed\n");
        }
        "again" => {
            for _ in 0..20 {
                step_aside(Vec::new(), execute("/bin/cat"), PATIENCE).unwrap();
            }
        }
        "cannot execute" => {
            step_aside(Vec::new(), execute("/nowhere"), PATIENCE).unwrap();
            assert_ne!(process::id(), before);
            await_that("it does not wait", || fs::read_to_string(&says).is_ok_and(|said| said == "go on"));
        }
        "cannot make threads" => {
            refuse_threads();
            let error = step_aside(Vec::new(), execute("/bin/cat"), PATIENCE).unwrap_err();
            assert!(
                matches!(&error, AsideError::Clone(source) if source.raw_os_error() == Some(1)),
                "{error:?}"
            );
            assert_eq!(process::id(), before);
        }
        "is deaf" => {
            let (hears, heard) = std::sync::mpsc::channel();
            let (deaf, may_hear) = std::sync::mpsc::channel::<()>();
            let thread = thread::spawn(move || {
                block_signals(libc::SIG_BLOCK);
                hears.send(()).unwrap();
                may_hear.recv().unwrap();
                block_signals(libc::SIG_UNBLOCK);
            });
            heard.recv().unwrap();
            let error = step_aside(Vec::new(), execute("/bin/cat"), Duration::from_millis(50)).unwrap_err();
            assert!(matches!(error, AsideError::Stuck { .. }), "{error:?}");
            assert_eq!(process::id(), before);
            deaf.send(()).unwrap();
            thread.join().unwrap();
            step_aside(Vec::new(), execute("/bin/cat"), PATIENCE).unwrap();
            assert_ne!(process::id(), before);
        }
        "fails after it stepped aside" => {
            step_aside(Vec::new(), execute("/nowhere"), PATIENCE).unwrap();
            refuse_threads();
            for _ in 0..20 {
                let error = step_aside(Vec::new(), execute("/bin/cat"), PATIENCE).unwrap_err();
                assert!(matches!(error, AsideError::Clone(_)), "{error:?}");
            }
        }
        "allocates" => allocates(),
        "is killed" => {
            deny(libc::SYS_wait4, Vec::new(), SeccompAction::KillProcess);
            step_aside(Vec::new(), execute("/bin/cat"), PATIENCE).unwrap();
            assert_ne!(process::id(), before);
        }
        "has nobody to make it" => {
            let shares = u64::try_from(libc::CLONE_CHILD_CLEARTID | libc::CLONE_THREAD).unwrap();
            let only = u64::try_from(libc::CLONE_CHILD_CLEARTID).unwrap();
            let makes_process =
                SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(shares), only);
            let rule = SeccompRule::new(vec![makes_process.unwrap()]).unwrap();
            // The process by way of which the other one is made, before it makes it.
            deny(libc::SYS_clone, vec![rule], SeccompAction::KillProcess);
            for _ in 0..3 {
                let error = step_aside(Vec::new(), execute("/bin/cat"), PATIENCE).unwrap_err();
                assert!(
                    matches!(&error, AsideError::Clone(source) if source.raw_os_error() == Some(libc::EINTR)),
                    "{error:?}"
                );
            }
            assert_eq!(process::id(), before);
        }
        "is killed on the way" => {
            let thread = u64::try_from(libc::CLONE_THREAD).unwrap();
            let makes_thread =
                SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(thread), thread);
            let rule = SeccompRule::new(vec![makes_thread.unwrap()]).unwrap();
            // The other process, when it has made the first thread.
            deny(libc::SYS_clone, vec![rule], SeccompAction::KillProcess);
            let aside = step_aside(Vec::new(), execute("/bin/cat"), PATIENCE);
            panic!("it is not killed: {aside:?}");
        }
        "keeps what the kernel knows" => keeps_what_the_kernel_knows(),
        other => panic!("{other}"),
    }
    busy.check();
    // Written at once, so that it is there whole or not at all.
    fs::write(says.with_extension("new"), format!("well {}", process::id())).unwrap();
    fs::rename(says.with_extension("new"), says).unwrap();
}

/// Blocks all signals on the calling thread, or no longer.
fn block_signals(how: i32) {
    // SAFETY: all zeros are a valid set; the set is the local's, and the old one is not asked for.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(how, &raw const all, std::ptr::null_mut());
    }
}

/// Has the kernel refuse this thread the making of threads with the `clone` call: EPERM.
fn refuse_threads() {
    let thread = u64::try_from(libc::CLONE_THREAD).unwrap();
    let makes_thread =
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(thread), thread).unwrap();
    let rule = SeccompRule::new(vec![makes_thread]).unwrap();
    deny(libc::SYS_clone, vec![rule], SeccompAction::Errno(1));
}

/// What the kernel does when this thread, or one that it makes, makes such a system call.
fn deny(call: libc::c_long, rules: Vec<SeccompRule>, action: SeccompAction) {
    let filter = SeccompFilter::new(
        [(call, rules)].into_iter().collect(),
        SeccompAction::Allow,
        action,
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

/// Steps aside while other threads are in the midst of the allocator, whose locks they hold for this one's memory, too.
fn allocates() {
    let ends = Arc::new(AtomicBool::new(false));
    let start = || {
        let (give, given) = std::sync::mpsc::sync_channel::<Vec<Vec<u8>>>(4);
        let frees = thread::spawn(move || given.into_iter().for_each(drop));
        let ends = Arc::clone(&ends);
        let makes = thread::spawn(move || {
            while !ends.load(Ordering::Acquire) {
                let _ = give.send((1..200).map(|size| vec![7; size * 16]).collect());
            }
        });
        [makes, frees]
    };
    let threads: Vec<_> = (0..20).flat_map(|_| start()).collect();
    for _ in 0..100 {
        step_aside(Vec::new(), execute("/bin/cat"), PATIENCE).unwrap();
    }
    ends.store(true, Ordering::Release);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// A thread that goes on elsewhere is the owner of the locks that it held, and is told on which processor it is.
fn keeps_what_the_kernel_knows() {
    // SAFETY: all zeros are a mutex and attributes to be initialised.
    let (mut mutex, mut robust) =
        unsafe { std::mem::zeroed::<(libc::pthread_mutex_t, libc::pthread_mutexattr_t)>() };
    // SAFETY: both are locals, which outlive the calls, and the mutex stays where it is.
    let locked = unsafe {
        libc::pthread_mutexattr_init(&raw mut robust);
        libc::pthread_mutexattr_setrobust(&raw mut robust, libc::PTHREAD_MUTEX_ROBUST);
        libc::pthread_mutex_init(&raw mut mutex, &raw const robust);
        libc::pthread_mutex_lock(&raw mut mutex)
    };
    assert_eq!(locked, 0);
    let player = process::id();
    step_aside(Vec::new(), execute("/bin/cat"), PATIENCE).unwrap();
    await_that("it does not execute cat", || {
        fs::read_to_string(format!("/proc/{player}/comm")).is_ok_and(|name| name.trim() == "cat")
    });
    // SAFETY: as above.
    assert_eq!(unsafe { libc::pthread_mutex_trylock(&raw mut mutex) }, libc::EBUSY);
    let processors = thread::available_parallelism().unwrap().get();
    for processor in (0..processors).chain(0..processors) {
        // SAFETY: all zeros are an empty set; the calls read and write the local.
        let at = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(processor, &mut set);
            libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
            libc::sched_getcpu()
        };
        assert_eq!(usize::try_from(at), Ok(processor));
    }
}

/// A process in a role, and where it says how it went.
struct Player {
    child: Child,
    says: PathBuf,
}

impl Player {
    fn start(role: &str) -> Self {
        let says =
            std::env::temp_dir().join(format!("tideover-aside-{}-{}", process::id(), role.replace(' ', "-")));
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "plays_its_role_if_it_has_one", "--nocapture"])
            .env(ROLE, role)
            .env(SAYS, &says)
            // All threads share the allocator's one lock.
            .env("MALLOC_ARENA_MAX", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child, says }
    }

    /// Waits until it says that all is well, and gives the process that says it.
    fn well(&self) -> u32 {
        let mut pid = None;
        await_that("nobody says that all is well", || {
            let said = fs::read_to_string(&self.says).unwrap_or_default();
            pid = said.strip_prefix("well ").and_then(|pid| pid.parse().ok());
            pid.is_some()
        });
        pid.unwrap()
    }

    /// The name of the program that its process executes.
    fn name(&self) -> String {
        let name = fs::read_to_string(format!("/proc/{}/comm", self.child.id())).unwrap_or_default();
        name.trim().to_owned()
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.says);
    }
}

fn is_gone(pid: u32) -> bool {
    !PathBuf::from(format!("/proc/{pid}")).exists()
}

#[test]
fn threads_go_on_elsewhere_while_their_process_executes_another_program() {
    let mut player = Player::start("executes");
    let aside = player.well();
    assert_ne!(aside, player.child.id());
    await_that("it does not execute cat", || player.name() == "cat");
    // What it says at its end goes to the same output.
    await_that("the other process does not end", || is_gone(aside));
    player.child.stdin.take().unwrap().write_all(b"still here").unwrap();
    let mut said = String::new();
    player.child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.ends_with("still here"), "{said}");
    assert!(player.child.wait().unwrap().success());
}

#[test]
fn luggage_goes_into_the_program_and_not_into_the_other_process() {
    let player = Player::start("packs");
    assert_ne!(player.well(), player.child.id());
}

#[test]
fn threads_that_have_stepped_aside_can_do_so_again() {
    let player = Player::start("again");
    let aside = player.well();
    assert_ne!(aside, player.child.id());
    await_that("it does not execute cat", || player.name() == "cat");
    await_that("the other process does not end", || is_gone(aside));
}

#[test]
fn a_process_that_cannot_execute_waits_for_the_other_and_ends_with_it() {
    let mut player = Player::start("cannot execute");
    thread::sleep(Duration::from_millis(100));
    assert!(player.child.try_wait().unwrap().is_none());
    fs::write(&player.says, "go on").unwrap();
    let aside = player.well();
    await_that("the other process does not end", || is_gone(aside));
    assert!(player.child.wait().unwrap().success());
}

#[test]
fn without_threads_in_the_other_process_all_go_on_in_this_one() {
    let player = Player::start("cannot make threads");
    assert_eq!(player.well(), player.child.id());
}

#[test]
fn threads_that_could_not_execute_before_can_fail_to_step_aside_again() {
    let player = Player::start("fails after it stepped aside");
    assert_ne!(player.well(), player.child.id());
}

#[test]
fn threads_that_hold_the_allocators_locks_step_aside() {
    let player = Player::start("allocates");
    assert_ne!(player.well(), player.child.id());
}

#[test]
fn the_other_process_goes_on_without_the_one_that_is_killed_while_it_leaves() {
    let player = Player::start("is killed");
    assert_ne!(player.well(), player.child.id());
}

#[test]
fn threads_go_on_if_what_was_to_make_the_other_process_is_killed() {
    let player = Player::start("has nobody to make it");
    assert_eq!(player.well(), player.child.id());
}

#[test]
fn a_process_whose_threads_are_killed_on_their_way_out_ends() {
    let mut player = Player::start("is killed on the way");
    let mut ended = None;
    await_that("it does not end", || {
        ended = player.child.try_wait().unwrap();
        ended.is_some()
    });
    assert_eq!(ended.and_then(|status| status.code()), Some(1));
}

#[test]
fn what_the_kernel_keeps_for_a_thread_goes_with_it() {
    let player = Player::start("keeps what the kernel knows");
    assert_ne!(player.well(), player.child.id());
}

#[test]
fn a_thread_that_takes_no_signal_keeps_all_where_they_are_until_it_does() {
    let player = Player::start("is deaf");
    assert_ne!(player.well(), player.child.id());
    await_that("it does not execute cat", || player.name() == "cat");
}

#[test]
fn a_descriptor_is_taken_over_once_and_only_if_it_was_inherited() {
    use std::os::fd::IntoRawFd as _;
    let errno = |number| tideover_aside::inherited(number).unwrap_err().raw_os_error();
    let file = fs::File::open("/proc/self/exe").unwrap();
    assert_eq!(errno(file.as_raw_fd()), Some(1));
    tideover_aside::inherit(&file, true).unwrap();
    // As if another program had opened it: nobody here owns it any more.
    let number = file.into_raw_fd();
    let taken = tideover_aside::inherited(number).unwrap();
    assert_eq!(errno(taken.as_raw_fd()), Some(1));
    assert_eq!([errno(0), errno(1 << 20)], [Some(1), Some(9)]);
}
