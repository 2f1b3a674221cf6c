//! The verbs on machines that have a name, as their user has them.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

mod at_path;
mod check;
mod confined;
mod console;
mod devices;
#[path = "../../../devices/src/rig/disk_driver.rs"]
mod disk_driver;
mod ended;
mod held;
mod host;
mod kept;
mod kernel;
mod reported;
mod reserve;
#[path = "../schema/mod.rs"]
mod schema;
mod service;

use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use serde_json::Value;
use vmm::control::Answer;
use vmm::control::Client;
use vmm::control::Request;

use host::Host;

fn ask(client: &Client, request: &Request) -> Answer {
    client.ask(request, &mut |_, _, _| {}).unwrap()
}

#[test]
fn a_machine_lives_from_run_to_stop_through_updates() {
    let host = Host::new();
    let made = host.run("web1");
    assert_eq!(
        (&made["name"], &made["state"], &made["updates"]),
        (&"web1".into(), &"running".into(), &0.into())
    );
    let report = host.json(&["update", "web1"]);
    assert_eq!((&report["outcome"], &report["predecessor_pid"]), (&"updated".into(), &made["pid"]));
    let status = host.json(&["status", "web1"]);
    assert_eq!((&status["pid"], &status["updates"]), (&report["successor_pid"], &1.into()));
    assert_eq!(status["identity"], made["identity"]);
    let listed = host.json(&["ls"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(listed[0]["pid"], status["pid"]);
    assert_eq!(host.json(&["stop", "web1"])["state"], "stopped");
    assert_eq!(host.json(&["ls"]), Value::Array(Vec::new()));
    // One that nobody has reaped yet has no command line any more.
    let left = std::fs::read(format!("/proc/{}/cmdline", status["pid"]));
    assert!(left.unwrap_or_default().is_empty());
}

#[test]
fn a_machine_that_runs_is_inspected_before_and_after_an_update() {
    let host = Host::new();
    let made = host.run("web1");
    for updates in 0..2 {
        let found = host.json(&["inspect", "web1", "--verify"]);
        schema::check(include_str!("../../../../docs/inspect.schema.json"), &found);
        assert_eq!(
            (&found["findings"], &found["arena"]["identity"]),
            (&Value::Array(Vec::new()), &made["identity"])
        );
        assert_eq!(found["luo"]["liveupdate_number"], updates + 1);
        assert_eq!(found["luo"]["sessions"][0]["name"], "web1");
        host.update("web1", "socket");
    }
    host.fails(3, &["inspect", "web2"]);
}

#[test]
fn a_machine_of_kvm_lives_from_run_to_stop_through_updates() {
    harness::need!(kvm);
    let host = Host::new();
    let vcpus = std::thread::available_parallelism().unwrap().get().min(2);
    let made =
        host.json(&["run", "vm", "--memory", "16MiB", "--guest", "kvm", "--vcpus", &vcpus.to_string()]);
    assert_eq!(made["vcpus"], vcpus);
    for updates in 1..=3 {
        assert_eq!(host.json(&["update", "vm"])["outcome"], "updated");
        let status = host.json(&["status", "vm"]);
        assert_eq!((&status["updates"], &status["vcpus"]), (&updates.into(), &vcpus.into()));
    }
    assert_eq!(host.json(&["status", "vm"])["errors"], 0);
    host.json(&["stop", "vm"]);
}

/// The number of a process's thread of this name.
fn thread(pid: &Value, name: &str) -> i32 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let named = |task: &std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
    };
    let found = tasks.into_iter().find(named).unwrap_or_else(|| panic!("{pid} has no thread {name}"));
    found.file_name().to_str().unwrap().parse().unwrap()
}

#[test]
fn a_vcpus_thread_keeps_its_name_and_how_it_is_scheduled() {
    harness::need!(kvm);
    let host = Host::new();
    // Each on a processor of its own.
    let vcpus = std::thread::available_parallelism().unwrap().get().min(2);
    let made =
        host.json(&["run", "vm", "--memory", "16MiB", "--guest", "kvm", "--vcpus", &vcpus.to_string()]);
    let named = |index: usize, pid: &Value| thread(pid, &format!("vcpu{index}"));
    for index in 0..vcpus {
        let vcpu = named(index, &made["pid"]);
        let mut one = rustix::thread::CpuSet::new();
        one.set(index);
        rustix::thread::sched_setaffinity(rustix::process::Pid::from_raw(vcpu), &one).unwrap();
        let nice = (7 + index).to_string();
        let niced = Command::new("renice").args(["-n", &nice, "-p", &vcpu.to_string()]).output().unwrap();
        assert!(niced.status.success(), "{niced:?}");
    }
    for (carrier, index) in [("socket", 0), ("exec", vcpus - 1), ("socket", vcpus - 1), ("exec", 0)] {
        let report = host.json(&["update", "vm", "--carrier", carrier]);
        let pid = &report["successor_pid"];
        let vcpu = named(index, pid);
        let set = rustix::thread::sched_getaffinity(rustix::process::Pid::from_raw(vcpu)).unwrap();
        assert_eq!((set.count(), set.is_set(index)), (1, true), "{carrier}");
        let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{vcpu}/stat")).unwrap();
        // Field 19 of the file is the nice value; two stand before the name's closing bracket.
        let nice = (7 + index).to_string();
        assert_eq!(stat.rsplit_once(") ").unwrap().1.split(' ').nth(16), Some(&*nice), "{carrier}: {stat}");
    }
}

#[test]
fn connections_live_through_an_update_and_are_answered_after_it() {
    let host = Host::new();
    host.run("m");
    let (asks, waits) = (host.client("m"), host.client("m"));
    let Answer::Status(before) = ask(&asks, &Request::Status) else { panic!("no status") };
    let waiting = std::thread::spawn(move || ask(&waits, &Request::Wait));
    for _ in 0..3 {
        host.json(&["update", "m"]);
    }
    let Answer::Status(after) = ask(&asks, &Request::Status) else { panic!("no status") };
    assert_ne!(after.pid, before.pid);
    assert!(after.ticks > before.ticks);
    assert!(!waiting.is_finished());
    host.json(&["stop", "m"]);
    assert_eq!(waiting.join().unwrap(), Answer::Stopped);
    asks.await_end().unwrap();
}

#[test]
fn a_paused_guest_stands_still_through_updates_until_it_is_resumed() {
    let host = Host::new();
    stands_still_through_updates(&host, "thread");
}

#[test]
fn a_paused_guest_of_kvm_stands_still_through_updates_until_it_is_resumed() {
    harness::need!(kvm);
    let host = Host::new();
    stands_still_through_updates(&host, "kvm");
}

fn stands_still_through_updates(host: &Host, guest: &str) {
    host.json(&["run", "m", "--guest", guest, "--memory", "8MiB", "--vcpus", "2"]);
    let ticks = || host.json(&["status", "m"])["ticks"].as_u64().unwrap();
    assert_eq!(host.json(&["pause", "m"])["state"], "paused");
    assert_eq!(host.json(&["pause", "m"])["state"], "paused");
    let before = ticks();
    // The second one saves what has not run since it was loaded.
    for carrier in ["socket", "exec", "exec", "socket", "socket"] {
        let report = host.json(&["update", "m", "--carrier", carrier]);
        assert_eq!((&report["outcome"], &report["pause_us"]), (&"updated".into(), &Value::Null));
        assert_eq!(host.json(&["status", "m"])["state"], "paused");
        assert_eq!(ticks(), before);
    }
    assert_eq!(host.json(&["resume", "m"])["state"], "running");
    let begun = Instant::now();
    while ticks() == before {
        assert!(begun.elapsed() < Duration::from_secs(20), "the guest does not run on");
    }
    let client = host.client("m");
    let Answer::Check(check) = ask(&client, &Request::Check) else { panic!("no check") };
    assert_eq!((check.pages_lost, check.guest_errors), (0, 0), "{check:?}");
}

#[test]
fn exit_codes_tell_what_went_wrong() {
    let host = Host::new();
    assert!(host.fails(3, &["status", "nobody"]).contains("there is no machine nobody"));
    assert!(host.fails(1, &["run", "a/b"]).contains("is no name for a machine"));
    assert!(host.fails(2, &["update"]).contains("Usage"));
    host.run("m");
    assert!(host.fails(1, &["run", "m"]).contains("there is a machine m already"));
    let output = host.tideover(&["update", "m", "--program", "/bin/true"]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("NOT updated") && said.contains("/bin/true is none of the programs"), "{said}");
    assert_eq!(host.json(&["status", "m"])["updates"], 0);
}

#[test]
fn a_program_that_was_allowed_may_be_updated_to() {
    let host = Host::new();
    let other = std::env::temp_dir().join(format!("tideover-other-{}", std::process::id()));
    std::fs::copy(env!("CARGO_BIN_EXE_tideover"), &other).unwrap();
    let path = other.to_str().unwrap();
    let arguments = ["run", "m", "--memory", "8MiB", "--guest", "thread", "--allow-program", path];
    host.json(&arguments);
    let report = host.json(&["update", "m", "--program", path]);
    let program = std::fs::read_link(format!("/proc/{}/exe", report["successor_pid"])).unwrap();
    assert_eq!(program, other);
    // From now on that one is the VMM's own.
    assert_eq!(host.json(&["update", "m"])["outcome"], "updated");
    std::fs::remove_file(other).unwrap();
}

#[test]
fn a_machine_whose_vmm_was_killed_is_dead_and_its_name_is_free() {
    let host = Host::new();
    let pid = host.run("m")["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let begun = Instant::now();
    while host.json(&["ls"])[0]["state"] != "dead" {
        assert!(begun.elapsed() < Duration::from_secs(20), "the machine does not die");
    }
    host.fails(3, &["status", "m"]);
    assert_eq!(host.run("m")["state"], "running");
}

#[test]
fn a_foreground_run_stays_until_the_machine_ends() {
    let host = Host::new();
    let arguments = ["run", "m", "--memory", "8MiB", "--guest", "thread", "--foreground"];
    let mut foreground = host.command(&arguments).stdout(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while !host.tideover(&["status", "m"]).status.success() {
        assert!(begun.elapsed() < Duration::from_secs(20), "the machine does not come");
    }
    host.json(&["update", "m"]);
    assert_eq!(foreground.try_wait().unwrap(), None);
    host.json(&["stop", "m"]);
    assert!(foreground.wait().unwrap().success());
}
