//! The example does what it says.

use std::process::Command;

/// Process, memory, register of a line that the example prints.
fn read(line: &str) -> (u64, u64, u64) {
    let numbers = line.split(|letter: char| !letter.is_ascii_digit()).filter_map(|word| word.parse().ok());
    match numbers.collect::<Vec<u64>>()[..] {
        [pid, memory, register] => (pid, memory, register),
        _ => panic!("not a line of the example: {line}"),
    }
}

#[test]
fn its_guest_counts_on_while_its_vmm_is_replaced_twice() {
    harness::need!(kvm);
    let output = Command::new(env!("CARGO_BIN_EXE_minimal")).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lives: Vec<(u64, u64, u64)> = text.lines().map(read).collect();
    assert_eq!(lives.len(), 3, "{text}{errors}");
    for pair in lives.windows(2) {
        assert_ne!(pair[0].0, pair[1].0, "another process");
        assert!(pair[0].1 < pair[1].1, "it counts on: {text}");
    }
    // The two count the same: a lost register would fall behind for good.
    assert!(lives.iter().all(|(_, memory, register)| memory.abs_diff(*register) <= 1), "{text}");
}

#[test]
fn it_stays_under_100_lines() {
    assert!(include_str!("../minimal.rs").lines().count() < 100);
}
