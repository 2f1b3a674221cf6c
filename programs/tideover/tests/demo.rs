//! The demo does what its help and its schema say.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

mod schema;

use std::collections::BTreeSet;
use std::process::Command;
use std::process::Output;

use serde_json::Value;

fn tideover(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tideover")).args(arguments).output().unwrap()
}

fn demo_json(arguments: &[&str]) -> Value {
    let output = tideover(&[&["demo", "--json"], arguments].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn check_result(result: &Value, updates: usize, memory_bytes: u64) {
    schema::check(include_str!("../../../docs/demo.schema.json"), result);
    assert_eq!(result["verified"], true);
    assert_eq!(result["memory_bytes"], memory_bytes);
    assert_eq!((&result["pages_lost"], &result["guest_errors"]), (&0.into(), &0.into()));
    assert!(result["pages_checked"].as_u64().unwrap() > memory_bytes / 4096 - 64);
    let list = result["updates"].as_array().unwrap();
    assert_eq!(list.len(), updates);
    for pair in list.windows(2) {
        assert_eq!(pair[0]["successor_pid"], pair[1]["predecessor_pid"]);
    }
    for update in list {
        assert!(update["ticks_after"].as_u64() > update["ticks_before"].as_u64());
        let phases: BTreeSet<&str> =
            update["phases_us"].as_object().unwrap().keys().map(String::as_str).collect();
        assert!(
            ["paused", "saved", "sealed", "claimed", "loaded", "running"]
                .into_iter()
                .all(|phase| phases.contains(phase))
        );
    }
}

#[test]
fn a_thread_lives_through_three_updates_and_the_json_fits_its_schema() {
    check_result(&demo_json(&["--guest", "thread", "--memory", "16MiB", "--updates", "3"]), 3, 16 << 20);
}

#[test]
fn a_vm_lives_through_three_updates_and_the_json_fits_its_schema() {
    harness::need!(kvm);
    check_result(&demo_json(&["--guest", "kvm", "--memory", "64MiB", "--updates", "3"]), 3, 64 << 20);
}

#[test]
fn a_vm_of_small_pages_given_on_demand_lives_through_updates() {
    harness::need!(kvm);
    let small =
        ["--guest", "kvm", "--memory", "32MiB", "--updates", "2", "--page-size", "4KiB", "--on-demand"];
    let result = demo_json(&small);
    check_result(&result, 2, 32 << 20);
    assert_eq!(result["huge_bytes"], 0);
}

/// Updates a small guest of this kind, its memory from this store, by each carrier.
fn by_each_carrier(guest: &str, store: &str) {
    by_each_carrier_with(guest, store, 1);
}

fn by_each_carrier_with(guest: &str, store: &str, vcpus: usize) {
    for carrier in ["socket", "exec"] {
        let arguments =
            ["--guest", guest, "--store", store, "--carrier", carrier, "--memory", "16MiB", "--updates", "2"];
        let result = demo_json(&[&arguments[..], &["--vcpus", &vcpus.to_string()]].concat());
        check_result(&result, 2, 16 << 20);
        assert_eq!((&result["store"], &result["carrier"]), (&store.into(), &carrier.into()));
        assert_eq!((&result["vcpus"], &result["ticks_miscounted"]), (&vcpus.into(), &0.into()));
        for update in result["updates"].as_array().unwrap() {
            let same = update["predecessor_pid"] == update["successor_pid"];
            assert_eq!(same, carrier == "exec");
        }
    }
}

#[test]
fn a_thread_in_a_memfd_is_updated_by_each_carrier() {
    by_each_carrier("thread", "memfd");
}

#[test]
fn a_vm_in_a_memfd_is_updated_by_each_carrier() {
    harness::need!(kvm);
    by_each_carrier("kvm", "memfd");
}

/// As many as this host has processors, of several.
fn several() -> usize {
    std::thread::available_parallelism().unwrap().get().min(4)
}

#[test]
fn a_thread_for_each_vcpu_is_updated_by_each_carrier() {
    by_each_carrier_with("thread", "memfd", several());
}

#[test]
fn a_vm_of_several_vcpus_is_updated_by_each_carrier() {
    harness::need!(kvm);
    by_each_carrier_with("kvm", "memfd", several());
}

#[test]
fn more_vcpus_than_the_host_has_processors_are_refused_before_anything_is_started() {
    if std::thread::available_parallelism().unwrap().get() >= 8 {
        // This host really has them.
        return;
    }
    let output = tideover(&["demo", "--guest", "thread", "--memory", "8MiB", "--vcpus", "8"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("--vcpus 8: this host gives this program"), "{said}");
}

#[test]
fn a_vm_in_a_guest_memfd_is_updated_by_each_carrier() {
    harness::need!(kvm, guest_memfd);
    by_each_carrier("kvm", "guest_memfd");
}

#[test]
fn a_vm_in_huge_pages_of_the_hosts_is_updated_by_each_carrier() {
    harness::need!(kvm, hugetlb);
    by_each_carrier("kvm", "hugetlb");
}

#[test]
fn memory_that_no_store_has_is_refused_with_what_to_do() {
    for (store, pages, remedy) in [
        ("memfd", "1GiB", "use --store hugetlb"),
        ("hugetlb", "4KiB", "use --store memfd"),
        ("guest_memfd", "2MiB", "use --store memfd or hugetlb"),
    ] {
        let output = tideover(&["demo", "--memory", "8MiB", "--store", store, "--page-size", pages]);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains(remedy), "{output:?}");
    }
}

#[test]
fn people_get_a_table_and_a_verdict() {
    let output = tideover(&["demo", "--guest", "thread", "--memory", "8MiB", "--updates", "1"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("VMM before") && text.contains("1 of 1 updates, and no byte was lost"), "{text}");
}

#[test]
fn a_wrong_command_line_is_refused_with_code_2() {
    let wrong: [&[&str]; 6] = [
        &["demo", "--memory", "5MiB"],
        &["demo", "--updates", "0"],
        &["demo", "--vcpus", "0"],
        &["demo", "--vcpus", "9"],
        &["launch"],
        &[],
    ];
    for wrong in wrong {
        let output = tideover(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn more_memory_than_the_host_has_is_refused_before_anything_is_started() {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let available = meminfo.lines().find(|line| line.starts_with("MemAvailable")).unwrap();
    let kib: u64 = available.split_whitespace().nth(1).unwrap().parse().unwrap();
    if kib > 60 << 20 {
        // This host really has it.
        return;
    }
    let output = tideover(&["demo", "--guest", "thread", "--memory", "64GiB"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("ask for less"));
}

#[test]
fn a_vmm_without_its_control_channel_says_so() {
    let output = Command::new(env!("CARGO_BIN_EXE_tideover"))
        .args(["vmm", "succeed"])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot find the predecessor"));
}
