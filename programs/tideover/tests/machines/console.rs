//! The serial line of a machine, as its user sees it.

use std::fs::File;
use std::io::Read as _;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;
use rustix::pty::OpenptFlags;
use rustix::termios::LocalModes;
use rustix::termios::tcgetattr;

use crate::host::Console;
use crate::host::Host;
use crate::host::TestFile;
use crate::host::assert_whole;
use crate::host::lines;
use crate::host::wait_for;
use crate::kernel;

fn kernel() -> TestFile {
    TestFile::new(&kernel::image(false))
}

#[test]
fn consoles_see_every_line_once_before_during_and_after_updates() {
    harness::need!(kvm);
    let (host, kernel) = (Host::new(), kernel());
    host.run_kernel("m", &kernel, &[]);
    let (one, other) = (Console::of(&host, "m"), Console::of(&host, "m"));
    one.await_lines(5);
    other.await_lines(5);
    for carrier in ["socket", "exec", "socket", "socket", "exec", "exec"] {
        host.update("m", carrier);
    }
    assert_eq!(host.json(&["status", "m"])["consoles"], 2);
    let late = Console::of(&host, "m");
    late.await_lines(5);
    drop(other);
    host.update("m", "socket");
    host.update("m", "exec");
    one.await_lines(5);
    late.await_lines(5);
    wait_for("one to have left", || (host.json(&["status", "m"])["consoles"] == 2).then_some(()));
    host.json(&["stop", "m"]);
    let (code, seen, said) = one.ends();
    assert_eq!(code, Some(0), "{said}");
    assert!(!said.contains("missing"), "{said}");
    assert_whole(&seen);
    assert!(seen.starts_with("boot "), "from the beginning: {:?}", seen.get(..80));
    let (_, seen, _) = late.ends();
    assert_whole(&seen);
    assert!(lines(&seen).len() > 5, "what was said of late comes first");
}

#[test]
fn what_is_typed_comes_to_the_guest_once_and_in_order_through_updates() {
    harness::need!(kvm);
    let (host, kernel) = (Host::new(), kernel());
    host.run_kernel("m", &kernel, &[]);
    let mut console = Console::of(&host, "m");
    console.await_lines(1);
    let keys: String = "abdefghijklmnoqstuvwxyz".repeat(8);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for carrier in ["socket", "exec"].into_iter().cycle().take(6) {
                host.update("m", carrier);
            }
            done.store(true, Ordering::SeqCst);
        });
        // A few at a time, so that they come at all moments of an update.
        let mut left = keys.as_str();
        while !left.is_empty() {
            let (some, rest) = left.split_at(left.len().min(4));
            console.type_in(some);
            left = rest;
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    });
    assert!(done.load(Ordering::SeqCst));
    let typed =
        |seen: &str| -> String { seen.lines().filter_map(|line| line.strip_prefix("key ")).collect() };
    wait_for("all keys", || (typed(&console.seen()).len() >= keys.len()).then_some(()));
    console.close_input();
    console.await_lines(3);
    assert_eq!(typed(&console.seen()), keys);
    assert_whole(&console.seen());
}

#[test]
fn what_was_said_when_nobody_looked_is_shown_up_to_a_limit() {
    harness::need!(kvm);
    let (host, kernel) = (Host::new(), kernel());
    host.run_kernel("m", &kernel, &[]);
    Console::of(&host, "m").await_lines(1500);
    host.update("m", "socket");
    let console = Console::of(&host, "m");
    console.await_lines(1);
    let seen = console.seen();
    assert_whole(&seen);
    let shown = lines(&seen);
    assert!(shown[0] > 0 && seen.starts_with("line "), "the latest, in whole lines: {:?}", seen.get(..40));
    assert!(shown.len() > 1000, "{}", shown.len());
}

#[test]
fn a_machine_without_a_serial_line_or_that_is_none_says_so() {
    let host = Host::new();
    host.run("thread");
    assert!(host.fails(1, &["console", "thread"]).contains("has no serial line"));
    assert!(host.fails(3, &["console", "nobody"]).contains("there is no machine nobody"));
    assert_eq!(host.json(&["status", "thread"])["state"], "running");
}

/// A command on a terminal.
pub(crate) struct AtTerminal {
    /// The user's end.
    pub(crate) user: File,
    terminal: OwnedFd,
    child: Child,
    seen: String,
}

impl AtTerminal {
    fn of(host: &Host, machine: &str) -> Self {
        let mut new = Self::start(host.command(&["console", machine]));
        new.await_text("Ctrl-] leaves it");
        new.await_text("line ");
        assert!(is_raw(&new.terminal));
        new
    }

    pub(crate) fn start(mut command: Command) -> Self {
        let user =
            rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        rustix::pty::grantpt(&user).unwrap();
        rustix::pty::unlockpt(&user).unwrap();
        let name = rustix::pty::ptsname(&user, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = rustix::fs::open(name, flags, Mode::empty()).unwrap();
        assert!(!is_raw(&terminal));
        let ends = || Stdio::from(terminal.try_clone().unwrap());
        let child = command.stdin(ends()).stdout(ends()).stderr(ends()).spawn().unwrap();
        Self { user: File::from(user), terminal, child, seen: String::new() }
    }

    /// The number of its process.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap()
    }

    pub(crate) fn await_text(&mut self, text: &str) {
        let mut bytes = [0; 4096];
        while !self.seen.contains(text) {
            let read = self.user.read(&mut bytes).unwrap();
            self.seen += &String::from_utf8_lossy(&bytes[..read]);
        }
    }

    /// It ends with this code, though nobody reads what it says, and the terminal is as it was.
    #[track_caller]
    pub(crate) fn assert_ends(mut self, code: i32) {
        let ended = wait_for("its end", || self.child.try_wait().unwrap());
        assert_eq!(ended.code(), Some(code));
        assert!(!is_raw(&self.terminal), "the terminal is left raw");
    }
}

impl Drop for AtTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_raw(terminal: &OwnedFd) -> bool {
    !tcgetattr(terminal).unwrap().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO)
}

#[test]
fn a_terminal_gives_the_guest_every_key_and_is_as_it_was_however_it_ends() {
    harness::need!(kvm);
    let (host, kernel) = (Host::new(), kernel());
    host.run_kernel("m", &kernel, &[]);
    let other = Console::of(&host, "m");
    let mut console = AtTerminal::of(&host, "m");
    // Ctrl-C is the guest's.
    console.user.write_all(b"x\x03").unwrap();
    console.await_text("key x");
    console.await_text("key \x03");
    host.update("m", "socket");
    console.user.write_all(b"y").unwrap();
    console.await_text("key y");
    // Long enough for the terminal to be full: nobody reads it any more.
    other.await_lines(2000);
    console.user.write_all(b"z\x1dp").unwrap();
    console.assert_ends(0);
    other.await_text("key z");
    for (signal, number) in [(Signal::TERM, 15), (Signal::HUP, 1), (Signal::INT, 2)] {
        let console = AtTerminal::of(&host, "m");
        kill_process(console.pid(), signal).unwrap();
        console.assert_ends(128 + number);
    }
    // The key behind Ctrl-] was not for the guest, or it would be off.
    assert_eq!(host.json(&["status", "m"])["state"], "running");
    let mut console = AtTerminal::of(&host, "m");
    console.user.write_all(b"p").unwrap();
    console.await_text("off");
    console.await_text("m has ended");
    console.assert_ends(0);
}

#[test]
fn the_reference_guest_says_how_far_it_is_and_answers_what_is_typed() {
    harness::need!(kvm);
    let host = Host::new();
    host.json(&["run", "m", "--memory", "16MiB", "--guest", "kvm", "--vcpus", "2"]);
    let mut console = Console::of(&host, "m");
    let whole = |seen: &str| seen.matches('\n').count();
    wait_for("a line", || (whole(&console.seen()) > 0).then_some(()));
    for carrier in ["socket", "exec"] {
        host.update("m", carrier);
        let before = whole(&console.seen());
        console.type_in("xyz");
        wait_for("another line", || (whole(&console.seen()) > before + 1).then_some(()));
    }
    assert_eq!(console.seen().matches("x").count(), 2, "{:?}", console.seen());
}
