//! Whether the host that the tests run on could carry machines through a kexec.

use serde_json::Value;

use crate::host::Host;
use crate::host::TestFile;
use crate::kernel;
use crate::schema;

/// What is found, and the exit code.
fn check(host: &Host, arguments: &[&str]) -> (Value, Option<i32>) {
    let output = host.tideover(&[&["check", "--json"], arguments].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    let found = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"));
    schema::check(include_str!("../../../../docs/check.schema.json"), &found);
    (found, output.status.code())
}

/// The finding on a machine.
fn of_machine<'a>(found: &'a Value, id: &str, machine: &str) -> &'a Value {
    let findings = found["findings"].as_array().unwrap().iter();
    let mut these = findings.filter(|finding| finding["id"] == id && finding["machine"] == machine);
    let one = these.next().unwrap_or_else(|| panic!("no {id} of {machine}: {found:#}"));
    assert!(these.next().is_none(), "{id} of {machine} twice");
    one
}

#[test]
fn the_host_is_looked_at_and_the_verdict_is_the_exit_code() {
    let host = Host::new();
    let (found, code) = check(&host, &[]);
    assert_eq!(code, Some(i32::from(found["verdict"] == "failure")), "{found:#}");
    let levels = found["findings"].as_array().unwrap().iter().map(|finding| &finding["level"]);
    let levels: Vec<&Value> = levels.collect();
    assert_eq!(levels.contains(&&Value::from("failure")), found["verdict"] == "failure");
    // Without a device there is no way; and the advice says what to do.
    if !std::path::Path::new("/dev/liveupdate").exists() {
        assert_eq!(code, Some(1));
        let text = String::from_utf8(host.tideover(&["check"]).stdout).unwrap();
        assert!(text.contains("there is no /dev/liveupdate"), "{text}");
        assert!(text.contains("-> boot") || text.contains("-> add"), "{text}");
        assert!(text.ends_with("\n") && text.contains("CANNOT be carried through a kexec"), "{text}");
    }
}

#[test]
fn each_machine_is_looked_at_and_one_that_there_is_not_is_a_failure() {
    let host = Host::new();
    host.run("a");
    host.json(&[
        "run",
        "b",
        "--memory",
        "8MiB",
        "--guest",
        "thread",
        "--page-size",
        "4KiB",
        "--through-kexec",
    ]);
    let (found, _) = check(&host, &[]);
    for machine in ["a", "b"] {
        assert_eq!(of_machine(&found, "machine_answers", machine)["level"], "ok", "{found:#}");
        assert_eq!(of_machine(&found, "machine_seals", machine)["level"], "ok", "{found:#}");
        assert_eq!(of_machine(&found, "machine_guest", machine)["level"], "ok", "{found:#}");
        // It was run in small pages.
        let pages = of_machine(&found, "machine_pages", machine);
        assert_eq!(pages["level"], "warning", "{pages:#}");
        assert!(pages["advice"].as_str().unwrap().contains("--page-size 2MiB"), "{pages:#}");
    }
    let goes = |machine| &of_machine(&found, "machine_through_kexec", machine)["level"];
    assert_eq!((goes("a"), goes("b")), (&"failure".into(), &"ok".into()));
    let (found, code) = check(&host, &["b", "c"]);
    assert_eq!(code, Some(1));
    assert_eq!(of_machine(&found, "machine_answers", "c")["level"], "failure");
    assert!(found["findings"].as_array().unwrap().iter().all(|finding| finding["machine"] != "a"));
}

#[test]
fn a_disk_of_a_machine_is_looked_at() {
    harness::need!(kvm);
    let (host, kernel, disk) =
        (Host::new(), TestFile::new(&kernel::image(true)), TestFile::new(&vec![0; 1 << 20]));
    host.run_kernel("vm", &kernel, &["--disk", disk.path()]);
    let (found, _) = check(&host, &["vm"]);
    let disk_finding = of_machine(&found, "machine_disk", "vm");
    assert!(disk_finding["found"].as_str().unwrap().contains(disk.path()), "{disk_finding:#}");
    std::fs::remove_file(disk.path()).unwrap();
    let (found, code) = check(&host, &["vm"]);
    assert_eq!(
        (of_machine(&found, "machine_disk", "vm")["level"].as_str(), code),
        (Some("failure"), Some(1))
    );
}

#[test]
fn a_wrong_command_line_is_told_apart() {
    let host = Host::new();
    host.fails(2, &["check", "--initrd", "x"]);
    host.fails(2, &["check", "--what"]);
}

#[test]
fn a_next_kernel_is_looked_at() {
    let (host, kernel) = (Host::new(), TestFile::new(&kernel::image(false)));
    // It has no version, and cannot be moved.
    let (found, code) =
        check(&host, &["--kernel", kernel.path(), "--initrd", kernel.path(), "--cmdline", "x"]);
    let findings = found["findings"].as_array().unwrap();
    let level = |id: &str| &findings.iter().find(|finding| finding["id"] == id).unwrap()["level"];
    assert_eq!(
        (level("next_image"), level("next_command_line"), code),
        (&"failure".into(), &"failure".into(), Some(1))
    );
}
