//! Machines whose VMM gives up what it does not need.

use std::path::PathBuf;

use serde_json::Value;
use vmm::control::Answer;
use vmm::control::Carrier;
use vmm::control::Request;
use vmm::control::Source;
use vmm::control::UpdateOutcome;
use vmm::control::UpdateRequest;

use crate::Host;
use crate::ask;

/// A confined machine that dies at a system call too many.
fn run(host: &Host, guest: &str) -> Value {
    host.json(&["run", "m", "--memory", "16MiB", "--guest", guest, "--page-size", "4KiB", "--confine=kill"])
}

/// What /proc says of each thread of a process, by the names of the lines.
fn of_threads(pid: &Value, names: &[&str]) -> Vec<Vec<String>> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let tell = |task: std::fs::DirEntry| {
        // A thread may have ended since.
        let status = std::fs::read_to_string(task.path().join("status")).ok()?;
        let value = |name: &&str| {
            let line = status.lines().find_map(|line| line.strip_prefix(*name)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
        };
        Some(names.iter().map(value).collect())
    };
    tasks.filter_map(tell).collect()
}

fn every_thread_is_confined(pid: &Value) {
    const NONE: &str = "0000000000000000";
    let names = ["NoNewPrivs", "Seccomp", "CapInh", "CapPrm", "CapEff", "CapAmb"];
    let threads = of_threads(pid, &names);
    assert!(threads.len() > 1);
    for thread in threads {
        assert_eq!(thread, ["1", "2", NONE, NONE, NONE, NONE], "{names:?}");
    }
}

fn a_confined_machine_lives_from_run_to_stop(guest: &str) {
    let host = Host::new();
    let made = run(&host, guest);
    every_thread_is_confined(&made["pid"]);
    for updates in 1..=3 {
        let report = host.json(&["update", "m"]);
        assert_eq!(report["outcome"], "updated");
        // It answers once it is confined.
        let status = host.json(&["status", "m"]);
        assert_eq!((&status["updates"], &status["confined"]), (&updates.into(), &"kill".into()));
        every_thread_is_confined(&report["successor_pid"]);
    }
    host.json(&["pause", "m"]);
    host.json(&["update", "m"]);
    host.json(&["resume", "m"]);
    let Answer::Check(check) = ask(&host.client("m"), &Request::Check) else { panic!("no check") };
    assert_eq!((check.pages_lost, check.guest_errors), (0, 0), "{check:?}");
    host.json(&["stop", "m"]);
}

#[test]
fn a_confined_thread_lives_from_run_to_stop_through_updates() {
    a_confined_machine_lives_from_run_to_stop("thread");
}

#[test]
fn a_confined_vm_lives_from_run_to_stop_through_updates() {
    harness::need!(kvm);
    a_confined_machine_lives_from_run_to_stop("kvm");
}

#[test]
fn a_confined_vmm_starts_and_executes_no_program_itself() {
    let host = Host::new();
    let made = run(&host, "thread");
    assert!(host.fails(1, &["update", "m", "--carrier", "exec"]).contains("confined"));
    for carrier in [Carrier::Socket, Carrier::Exec] {
        let request = UpdateRequest {
            successor: Source::Own,
            carrier,
            populate: true,
            probe: false,
            timeout_ms: 2000,
            prepare_timeout_ms: 60_000,
        };
        let Answer::Update(report) = ask(&host.client("m"), &Request::Update(request)) else {
            panic!("no report")
        };
        assert_eq!((report.outcome, report.pause_us), (UpdateOutcome::RolledBack, None));
        assert!(report.reason.unwrap().contains("this VMM is confined"));
    }
    let status = host.json(&["status", "m"]);
    assert_eq!((&status["pid"], &status["state"]), (&made["pid"], &"running".into()));
}

#[test]
fn a_program_that_takes_no_machine_leaves_a_confined_one_where_it_is() {
    let host = Host::new();
    let made = run(&host, "thread");
    for program in ["/bin/true", "/bin/false"] {
        let said = host.fails(4, &["update", "m", "--program", program]);
        assert!(said.contains("ended by itself"), "{said}");
    }
    let absent = PathBuf::from(&host.directory).join("absent");
    assert!(host.fails(1, &["update", "m", "--program", absent.to_str().unwrap()]).contains("absent"));
    let status = host.json(&["status", "m"]);
    assert_eq!((&status["pid"], &status["updates"]), (&made["pid"], &0.into()));
    assert_eq!(host.json(&["update", "m"])["outcome"], "updated");
}
