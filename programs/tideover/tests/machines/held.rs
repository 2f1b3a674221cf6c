//! Machines that came through a kexec and that nothing runs: what each verb says of one, and what is said where there was
//! no kexec.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use fdpass::Deadline;
use fdpass::Listener;
use serde_json::Value;
use vmm::control;
use vmm::control::Answer;
use vmm::control::Held;
use vmm::control::Request;

use crate::host::Host;

const PATIENCE: Duration = Duration::from_secs(60);

/// Answers as a holder does, until it is told to stop. Its process is another one, which ends with it.
fn hold(host: &Host, name: &str, why: &str) {
    DirBuilder::new().mode(0o700).recursive(true).create(&host.directory).unwrap();
    let listener = Listener::bind(&host.directory.join(format!("{name}.sock"))).unwrap();
    let mut process = Command::new("sleep").arg("600").spawn().unwrap();
    let held = Held {
        name: name.to_owned(),
        pid: process.id(),
        why: why.to_owned(),
        left_behind: false,
        complete: false,
    };
    thread::spawn(move || {
        let mut stopped = false;
        while !stopped {
            let channel = listener.accept(Deadline::after(PATIENCE)).unwrap();
            while let Ok(Some(request)) = control::receive::<Request>(&channel, Deadline::after(PATIENCE)) {
                stopped = request == Request::Stop;
                let answer = if stopped { Answer::Stopped } else { Answer::Held(held.clone()) };
                control::send(&channel, &answer).unwrap();
                if stopped {
                    break;
                }
            }
        }
        drop(listener);
        process.kill().unwrap();
        process.wait().unwrap();
    });
}

#[test]
fn a_machine_that_is_held_is_called_so_by_every_verb() {
    let host = Host::new();
    hold(&host, "web1", "its program's name was \u{1b}[31mred");
    let listed = host.json(&["ls"]);
    assert_eq!((&listed[0]["name"], &listed[0]["state"]), (&"web1".into(), &"held".into()));
    assert_eq!(host.json(&["status", "web1"])["why"], "its program's name was \u{1b}[31mred");
    let said = String::from_utf8(host.tideover(&["status", "web1"]).stdout).unwrap();
    assert!(said.contains("does not run: its program's name was [31mred; `tideover resume web1`"), "{said}");
    for verb in ["update", "pause", "rehearse", "console"] {
        let said = host.fails(1, &[verb, "web1"]);
        assert!(said.contains("web1 is held"), "{verb}: {said}");
    }
    let said = host.fails(6, &["resume", "web1"]);
    assert!(said.contains("web1 is held by process"), "{said}");
    let said = host.fails(1, &["kexec", "--kernel", "/absent", "--cmdline", "liveupdate=on", "--now"]);
    assert!(said.contains("held, and would end with this kernel: web1"), "{said}");
    assert_eq!(host.json(&["stop", "web1"])["state"], "stopped");
    assert_eq!(host.json(&["ls"]), Value::Array(Vec::new()));
}

#[test]
fn where_no_kernel_can_have_left_a_machine_that_is_said() {
    let host = Host::new();
    let said = host.fails(3, &["resume", "absent"]);
    assert!(said.contains("there is no machine absent"), "{said}");
    // On a host that has the device it is another user's, or has nothing.
    if !Path::new("/dev/liveupdate").exists() {
        let said = host.fails(1, &["resume", "--all"]);
        assert!(said.contains("there is no /dev/liveupdate"), "{said}");
    }
}
