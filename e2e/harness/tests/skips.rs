//! What a run says when a need is not met: this test program runs one of its own tests again, in an
//! environment made for it.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::{Command, Output};

use harness::SkipLine;

/// The test that the others run again; by itself it shows that a need which is met lets the test go
/// on.
#[test]
fn a_test_that_needs_kvm_finds_it() {
    harness::need!(kvm);
    println!("went on");
    assert!(std::fs::File::open("/dev/kvm").is_ok());
}

fn rerun(skips: &str, environment: &[(&str, &str)]) -> (Output, PathBuf) {
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{skips}-{}", std::process::id()));
    let _ = std::fs::remove_file(&file);
    let mut command = Command::new(std::env::current_exe().expect("the path of this program"));
    command
        .args(["--exact", "a_test_that_needs_kvm_finds_it", "--nocapture"])
        .env_remove("TIDEOVER_REQUIRE")
        .env_remove("TIDEOVER_WITHOUT")
        .env("TIDEOVER_SKIPS", &file)
        .envs(environment.iter().copied());
    (command.output().expect("this program run again"), file)
}

#[test]
fn an_unmet_need_skips_and_is_told_and_recorded() {
    let (output, file) = rerun("skipped", &[("TIDEOVER_WITHOUT", "kvm")]);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    assert!(!stdout.contains("went on"), "{stdout}");
    assert!(stderr.contains("SKIPPED skips::a_test_that_needs_kvm_finds_it: needs kvm"), "{stderr}");

    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let line = SkipLine::parse(text.trim_end_matches('\n')).unwrap();
    assert_eq!(line.package, "tideover-harness");
    assert_eq!(line.test, "skips::a_test_that_needs_kvm_finds_it");
    assert_eq!(line.need, "kvm");
}

#[test]
fn an_unmet_need_that_is_required_fails_the_test_and_is_no_skip() {
    let (output, file) = rerun("required", &[("TIDEOVER_WITHOUT", "kvm"), ("TIDEOVER_REQUIRE", "kvm")]);
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("which TIDEOVER_REQUIRE wants of this machine"), "{stderr}");
    assert!(!file.exists());
}

#[test]
fn a_skip_that_cannot_be_recorded_fails_the_test() {
    let (output, _) =
        rerun("unrecorded", &[("TIDEOVER_WITHOUT", "kvm"), ("TIDEOVER_SKIPS", "/proc/no such file")]);
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("cannot be recorded"), "{stderr}");
}

#[test]
fn a_misspelt_variable_fails_the_test() {
    let (output, _) = rerun("misspelt", &[("TIDEOVER_WITHOUT", "kmv")]);
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("TIDEOVER_WITHOUT: \"kmv\" is not a need"), "{stderr}");
}
