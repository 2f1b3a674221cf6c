//! A short campaign with real VMMs, as one runs it.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::path::PathBuf;
use std::process::Command;

use campaign::record::Record;
use serde_json::Value;

struct Results(PathBuf);

impl Results {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("tideover-campaign-{name}-{}.jsonl", std::process::id())))
    }

    fn run(&self, arguments: &[&str]) -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tideover-campaign"));
        let ran = command.args(arguments).arg("--json").arg("--results").arg(&self.0).output().unwrap();
        let said = String::from_utf8_lossy(&ran.stderr);
        assert_eq!(ran.status.code(), Some(0), "{said}");
        serde_json::from_slice(&ran.stdout).unwrap()
    }

    fn records(&self) -> Vec<Record> {
        let text = std::fs::read_to_string(&self.0).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn a_campaign_is_gone_on_with(guest: &str) {
    let results = Results::new(guest);
    let first = results.run(&["--seed", "5", "--kills", "12", "--guest", guest]);
    let before = results.records();
    assert!(first["kills"].as_u64().unwrap() >= 12, "{first}");
    let both = results.run(&["--seed", "5", "--kills", "24", "--guest", guest]);
    let records = results.records();
    assert_eq!(records[..before.len()], before);
    assert_eq!(both["tried"].as_u64(), Some(records.len() as u64), "{both}");
    let mut numbers: Vec<u64> = records.iter().map(|record| record.index).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), records.len(), "no try is done twice");
    assert!(records.iter().all(|record| record.pages_checked > 1000), "{records:?}");
    assert_eq!((&both["bytes_lost"], &both["double_owners"]), (&0.into(), &0.into()), "{both}");
    assert!(both["rolled_back"].as_u64() > Some(0) && both["lost_by_design"].as_u64() > Some(0), "{both}");
}

#[test]
fn a_campaign_goes_on_where_it_ended() {
    a_campaign_is_gone_on_with("thread");
}

#[test]
fn a_campaign_of_kvm_goes_on_where_it_ended() {
    harness::need!(kvm);
    a_campaign_is_gone_on_with("kvm");
}
