//! Memory that kernels leave alone, of the host that the tests run on: it is looked at, and nothing is changed.

use serde_json::Value;

use crate::host::Host;
use crate::schema;

#[test]
fn memory_is_chosen_or_it_is_said_why_not() {
    let host = Host::new();
    let output = host.tideover(&["setup", "reserve", "--size", "64MiB", "--json"]);
    let errors = String::from_utf8(output.stderr).unwrap();
    if !output.status.success() {
        // Who may not see addresses, or has no memory for it.
        assert!(errors.contains("as root") || errors.contains("in one piece"), "{errors}");
        return;
    }
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    schema::check(include_str!("../../../../docs/reserve.schema.json"), &found);
    let plans = found["plans"].as_array().unwrap();
    assert_eq!((&plans[0]["form"], &plans[1]["form"]), (&"devdax".into(), &"fsdax".into()));
    for plan in plans {
        let address = plan["address"].as_u64().unwrap();
        assert!(address >= 1 << 30 && address.is_multiple_of(16 << 20), "{plan:#}");
        assert!(plan["parameters"][0].as_str().unwrap().contains(&format!("{address:#x}")), "{plan:#}");
    }
    assert_eq!(found["written"], Value::Array(Vec::new()));
}

#[test]
fn what_is_set_aside_on_this_host_is_looked_at() {
    let host = Host::new();
    let output = host.tideover(&["setup", "reserve", "--check", "--json"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    schema::check(include_str!("../../../../docs/check.schema.json"), &found);
    assert_eq!(output.status.code(), Some(i32::from(found["verdict"] == "failure")), "{found:#}");
    let told = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let ids = || found["findings"].as_array().unwrap().iter().map(|finding| &finding["id"]);
    assert!(ids().any(|id| id == "reserved_memory"), "{told}: {found:#}");
}

#[test]
fn a_device_that_is_none_of_such_memory_is_refused() {
    let host = Host::new();
    for device in ["/dev/null", "/dev/dax999.999", "/dev"] {
        let errors = host.fails(1, &["setup", "format", device, "--yes"]);
        assert!(
            errors.contains("no device of reserved memory") || errors.contains("is not there"),
            "{errors}"
        );
    }
    host.fails(2, &["setup", "format"]);
    host.fails(2, &["setup", "reserve"]);
}
