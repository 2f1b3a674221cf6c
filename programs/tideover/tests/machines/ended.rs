//! Guests that end by themselves, on whichever of their vCPUs.

use std::fs::File;
use std::io::BufRead as _;
use std::io::BufReader;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Child;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use pulse::Command;
use pulse::Mailboxes;
use pulse::Words;
use serde_json::Value;
use vmm::control::Answer;
use vmm::control::Request;

use crate::ask;
use crate::host::Host;

/// How long a machine may take to be what it is to be.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest's memory, from outside of every VMM.
#[derive(Debug)]
struct Ram(File);

impl Words for Ram {
    fn load(&self, offset_bytes: u64) -> u64 {
        let mut word = [0; 8];
        self.0.read_exact_at(&mut word, offset_bytes).unwrap();
        u64::from_le_bytes(word)
    }

    fn store(&self, offset_bytes: u64, value: u64) {
        self.0.write_all_at(&value.to_le_bytes(), offset_bytes).unwrap();
    }
}

impl Ram {
    /// Of the machine `m`, which this process runs.
    fn of(pid: &Value) -> Self {
        let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let is_ram = |link: &Path| {
            std::fs::read_link(link).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:m.ram"))
        };
        let link = links.map(|entry| entry.path()).find(|link| is_ram(link)).unwrap();
        Self(File::options().read(true).write(true).open(link).unwrap())
    }

    fn mailboxes(&self) -> Mailboxes<'_, Self> {
        Mailboxes::find(self, self.0.metadata().unwrap().len()).unwrap()
    }

    fn command(&self, vcpu: u32, command: Command) {
        self.mailboxes().get(vcpu).unwrap().command(command);
    }
}

/// As many vCPUs as this host has processors, two at most.
fn vcpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| if count.get() > 1 { 2 } else { 1 })
}

/// The arguments of a machine of this guest, and more.
fn arguments<'a>(guest: &'a str, vcpus: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let arguments =
        ["run", "m", "--memory", "8MiB", "--page-size", "4KiB", "--guest", guest, "--vcpus", vcpus];
    [&arguments, more].concat()
}

fn soon(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not in a minute");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A command that waits for the machine's end: from before the machine begins, so that it hears of an end right after.
fn in_foreground(host: &Host, guest: &str) -> Child {
    let vcpus = vcpus().to_string();
    let mut command = host.command(&arguments(guest, &vcpus, &["--foreground"]));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.contains("running"), "{said}");
    child
}

/// The command that waits for the machine ends with this code, whichever vCPU ends it, before an update and after one.
fn ends_with(guest: &str, command: Command, code: i32) {
    for (vcpu, carrier) in [(0, None), (vcpus() - 1, Some("socket")), (0, Some("exec"))] {
        let host = Host::new();
        let foreground = in_foreground(&host, guest);
        carrier.into_iter().for_each(|carrier| {
            host.json(&["update", "m", "--carrier", carrier]);
        });
        Ram::of(&host.json(&["status", "m"])["pid"]).command(vcpu, command);
        let output = foreground.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let crashed =
            String::from_utf8_lossy(&output.stderr).contains("the guest has crashed: a triple fault");
        assert_eq!(crashed, code == 5, "{output:?}");
        soon("the machine is gone", || host.json(&["ls"]) == Value::Array(Vec::new()));
    }
}

#[test]
fn a_machine_ends_when_any_thread_of_its_guest_switches_it_off() {
    ends_with("thread", Command::PowerOff, 0);
}

#[test]
fn a_crash_of_any_thread_of_the_guest_ends_the_machine_with_a_code_of_its_own() {
    ends_with("thread", Command::Crash, 5);
}

#[test]
fn a_machine_ends_when_any_vcpu_switches_it_off() {
    harness::need!(kvm);
    ends_with("kvm", Command::PowerOff, 0);
}

#[test]
fn a_triple_fault_of_any_vcpu_ends_the_machine_with_a_code_of_its_own() {
    harness::need!(kvm);
    ends_with("kvm", Command::Crash, 5);
}

/// Ends a machine that starts again, and sees that all of it does.
fn starts_again(guest: &str, command: Command, more: &[&str]) {
    let host = Host::new();
    let count = vcpus();
    let made = host.json(&arguments(guest, &count.to_string(), more));
    for _ in 0..2 {
        let ram = Ram::of(&host.json(&["status", "m"])["pid"]);
        // The host has set it: a guest from the beginning has another.
        let first = ram.mailboxes().first();
        let rate = first.cycles_per_ms();
        first.set_cycles_per_ms(7);
        ram.command(count - 1, command);
        soon("the guest starts again", || first.cycles_per_ms() == rate);
        soon("all vCPUs count", || {
            Mailboxes::find(&ram, 8 << 20).is_ok_and(|found| {
                found.vcpus() == count && found.ticks_of_each().iter().all(|ticks| *ticks > 0)
            })
        });
        assert_eq!(host.json(&["update", "m"])["outcome"], "updated");
        let Answer::Check(check) = ask(&host.client("m"), &Request::Check) else { panic!("no check") };
        assert_eq!((check.pages_lost, check.guest_errors, check.ticks_miscounted), (0, 0, 0), "{check:?}");
    }
    assert_eq!(host.json(&["status", "m"])["identity"], made["identity"]);
}

#[test]
fn a_guest_of_threads_that_is_reset_starts_again_with_all_of_them() {
    starts_again("thread", Command::Reset, &[]);
    starts_again("thread", Command::ResetByChipset, &[]);
}

#[test]
fn a_guest_that_crashed_starts_again_with_all_its_vcpus_if_that_was_asked_for() {
    harness::need!(kvm);
    starts_again("kvm", Command::Crash, &["--on-crash", "restart"]);
}

/// The machine stays, and its guest stands still with all its vCPUs.
fn stays(guest: &str) {
    let host = Host::new();
    let made = host.json(&arguments(guest, &vcpus().to_string(), &["--on-crash", "keep"]));
    let ram = Ram::of(&made["pid"]);
    ram.command(0, Command::Crash);
    soon("the guest ends", || host.json(&["status", "m"])["state"] == "ended");
    // The other vCPUs are stopped a moment later, and before anything else is done.
    host.fails(4, &["update", "m"]);
    let ticks = ram.mailboxes().ticks_of_each();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ram.mailboxes().ticks_of_each(), ticks);
    host.json(&["stop", "m"]);
}

#[test]
fn a_guest_of_threads_that_crashed_stands_still_if_that_was_asked_for() {
    stays("thread");
}

#[test]
fn a_vm_that_crashed_stands_still_if_that_was_asked_for() {
    harness::need!(kvm);
    stays("kvm");
}
