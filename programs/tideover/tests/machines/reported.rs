//! What `report` and `top` say.

use std::io::Write as _;

use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;

use crate::console::AtTerminal;
use crate::host::Host;
use crate::host::TestFile;

#[test]
fn the_last_update_is_reported_by_whoever_runs_the_machine_then() {
    let host = Host::new();
    host.run("web1");
    assert_eq!(host.json(&["report", "web1"]), serde_json::json!([]));
    let told = host.json(&["update", "web1"]);
    let reports = host.json(&["report", "web1"]);
    let report = reports[0].as_object().unwrap();
    assert_eq!((&report["kind"], &report["name"]), (&"update".into(), &"web1".into()));
    for (field, value) in told.as_object().unwrap() {
        assert_eq!(&report[field], value, "{field}");
    }
    let status = host.json(&["status", "web1"]);
    assert_eq!((&status["last_pause_us"], &status["epoch"]), (&told["pause_us"], &4.into()));
    // The next one is called off: the program does not know what to do with what it is told.
    host.fails(4, &["update", "web1", "--program", "/bin/true"]);
    let reports = host.json(&["report"]);
    assert_eq!((&reports[0]["outcome"], reports.as_array().unwrap().len()), (&"rolled_back".into(), 1));
    let schema: serde_json::Value =
        serde_json::from_str(include_str!("../../../../docs/report.schema.json")).unwrap();
    let of_update = &schema["items"]["oneOf"][1];
    for field in of_update["required"].as_array().unwrap() {
        assert!(reports[0].get(field.as_str().unwrap()).is_some(), "{field}");
    }
}

#[test]
fn an_update_by_exec_is_reported_by_the_program_that_was_executed() {
    harness::need!(kvm);
    let host = Host::new();
    host.json(&["run", "web1", "--guest", "kvm", "--memory", "64MiB"]);
    let told = host.json(&["update", "web1", "--carrier", "exec"]);
    assert!(told["aside_us"].is_number(), "{told}");
    assert_eq!(host.json(&["report", "web1"])[0]["pause_us"], told["pause_us"]);
}

#[test]
fn a_report_is_shown_with_bars_and_as_a_page() {
    let host = Host::new();
    host.run("web1");
    host.update("web1", "socket");
    let text = String::from_utf8(host.tideover(&["report"]).stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("web1: updated from process "), "{text}");
    for (line, phase) in lines[1..].iter().zip(["paused", "saved", "sealed", "claimed", "loaded", "running"])
    {
        assert!(
            line.trim_start().starts_with(phase) && line.contains(" ms  ") && line.chars().count() <= 80,
            "{line}"
        );
    }
    let page = TestFile::new(b"");
    let output = host.tideover(&["report", "web1", "--html", page.path()]);
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    let page = std::fs::read_to_string(page.path()).unwrap();
    assert!(page.contains("<h2>web1: update</h2>") && page.contains("Content-Security-Policy"), "{page}");
    assert_eq!(page.matches("<rect ").count(), 6);
}

#[test]
fn where_there_is_nothing_to_report_no_page_is_written_and_that_is_said() {
    let host = Host::new();
    host.run("web1");
    let page = host.directory.join("page.html");
    let path = page.to_str().unwrap();
    for arguments in [&["report", "web1", "--html", path][..], &["report", "--html", path]] {
        let said = host.fails(0, arguments);
        assert!(said.contains("there is nothing to report") && said.contains(path), "{said}");
        assert!(!page.exists(), "{arguments:?}");
    }
}

#[test]
fn top_shows_the_machines_once_where_there_is_no_terminal() {
    let host = Host::new();
    host.run("web1");
    host.update("web1", "socket");
    let text = String::from_utf8(host.tideover(&["top"]).stdout).unwrap();
    let row = text.lines().find(|line| line.contains("web1")).unwrap();
    assert!(["running", " 4 ", " ms ", " no "].iter().all(|part| row.contains(part)), "{text}");
    assert!(!text.contains('\u{1b}'), "{text:?}");
    assert_eq!(host.json(&["top", "--once"])[0]["name"], "web1");
}

#[test]
fn top_on_a_terminal_is_drawn_anew_until_a_key_or_a_signal_and_leaves_it_as_it_was() {
    let host = Host::new();
    host.run("web1");
    let start = || {
        let mut top = AtTerminal::start(host.command(&["top", "--interval", "100ms"]));
        top.await_text("\u{1b}[?1049h");
        top.await_text("web1");
        top
    };
    let mut top = start();
    host.run("web2");
    top.await_text("web2");
    top.user.write_all(b"xq").unwrap();
    top.await_text("\u{1b}[?1049l");
    top.assert_ends(0);
    let mut top = start();
    top.user.write_all(b"\x03").unwrap();
    top.assert_ends(0);
    for (signal, number) in [(Signal::TERM, 15), (Signal::HUP, 1)] {
        let mut top = start();
        kill_process(top.pid(), signal).unwrap();
        top.await_text("\u{1b}[?1049l");
        top.assert_ends(128 + number);
    }
}

#[test]
fn a_vmm_that_is_stopped_is_named_by_who_only_looks() {
    let host = Host::new();
    host.run("web1");
    host.update("web1", "socket");
    let number = host.json(&["status", "web1"])["pid"].as_i64().unwrap();
    let pid = Pid::from_raw(i32::try_from(number).unwrap()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let said: Vec<_> = ["status", "report", "inspect"]
        .into_iter()
        .map(|verb| (verb, host.tideover(&[verb, "web1"])))
        .collect();
    // Before anything fails: it is to end with this test.
    kill_process(pid, Signal::CONT).unwrap();
    for (verb, output) in said {
        let text = String::from_utf8_lossy(&output.stderr);
        let wanted = format!("web1: its VMM (process {number}) does not answer within 5 s: is it stopped?");
        assert!(output.status.code() == Some(1) && text.contains(&wanted), "{verb}: {text}");
    }
    assert_eq!(host.json(&["status", "web1"])["state"], "running");
}

#[test]
fn top_says_where_there_are_no_machines() {
    let host = Host::new();
    let output = host.tideover(&["top", "--once"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(said.contains("no machines in") && said.contains(host.directory.to_str().unwrap()), "{said}");
    assert_eq!(host.json(&["top", "--once"]), serde_json::json!([]));
}

#[test]
fn the_help_of_a_verb_that_only_looks_lists_no_exit_code_of_one_that_changes() {
    let host = Host::new();
    for verb in ["ls", "status", "report", "top"] {
        let help = String::from_utf8(host.tideover(&[verb, "--help"]).stdout).unwrap();
        let codes = help.lines().find(|line| line.contains("Exit code:")).unwrap();
        assert!(codes.contains("2 for a wrong command line"), "{verb}: {help}");
        assert!(
            !help.contains("called off") && !help.contains("crashed") && !help.contains("held"),
            "{verb}: {help}"
        );
    }
}
