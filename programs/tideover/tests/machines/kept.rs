//! Machines whose VMMs die, and the process that keeps them.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use custody::NoteFile;
use custody::When;
use fdpass::Deadline;
use fdpass::Lines;
use fdpass::Listener;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;
use serde_json::Value;
use serde_json::json;
use socket::Program;
use vmm::Brings;
use vmm::Hold;
use vmm::Picture;
use vmm::control::Answer;
use vmm::control::CheckReport;
use vmm::control::Request;

use crate::ask;
use crate::host::Host;
use crate::host::wait_for;

const PATIENCE: Duration = Duration::from_secs(60);

fn kept() -> Host {
    let mut host = Host::new();
    host.start_daemon(&[]);
    let _agent = host.agent();
    host
}

fn kill(machine: &Value) {
    let pid = i32::try_from(machine["pid"].as_i64().unwrap()).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

/// How it is once it is held.
#[track_caller]
fn held(host: &Host, name: &str) -> Value {
    held_by_another(host, name, &Value::Null)
}

/// How it is once another process than this one holds it.
#[track_caller]
fn held_by_another(host: &Host, name: &str, pid: &Value) -> Value {
    wait_for("a machine that is held", || {
        let all = host.json(&["ls"]);
        let machine = all.as_array().unwrap().iter().find(|machine| machine["name"] == name)?.clone();
        (machine["state"] == "held" && machine["pid"] != *pid).then_some(machine)
    })
}

fn command(lines: &mut Lines, command: &Value) -> Value {
    lines.send(&serde_json::to_vec(command).unwrap(), Vec::new()).unwrap();
    let came = lines.receive_some(Deadline::after(PATIENCE)).unwrap();
    serde_json::from_slice(&came[0].bytes).unwrap()
}

/// Waits until tideoverd has exactly these machines.
#[track_caller]
fn await_kept(host: &Host, names: &[&str]) {
    let mut agent = host.agent();
    wait_for("machines that are kept", || {
        let status = command(&mut agent, &json!({ "cmd": "STATUS" }));
        (status["kept"] == json!(names) && status["alone"] == json!([])).then_some(())
    });
}

/// What is left of a machine's memory, seen from outside.
fn check(host: &Host, name: &str) -> CheckReport {
    let (custody, fds, _connection) = host.client(name).ask_custody().unwrap();
    Picture::of(&custody, fds).unwrap().check().unwrap()
}

fn no_byte_is_lost(host: &Host, name: &str) {
    let report = check(host, name);
    assert!(report.pages_checked > 1000, "{report:?}");
    let wrong = (report.pages_lost, report.guest_errors, report.registers_lost, report.ticks_miscounted);
    assert_eq!(wrong, (0, 0, 0, 0), "{report:?}");
}

#[test]
fn a_machine_whose_vmm_was_killed_is_held_whole_and_starts_again_only_if_that_is_asked_for() {
    let host = kept();
    let made = host.run("web1");
    assert_eq!(made["kept"], true);
    kill(&made);
    let machine = held(&host, "web1");
    assert_eq!((&machine["since"], &machine["complete"]), (&"death".into(), &false.into()));
    let said = host.fails(6, &["recover", "web1"]);
    assert!(said.contains("its vCPUs' state is lost; its memory is whole"), "{said}");
    host.fails(6, &["recover", "web1"]);
    no_byte_is_lost(&host, "web1");
    let report = host.json(&["recover", "web1", "--else", "boot"]);
    assert_eq!(report["how"], "booted");
    let status = wait_for("a machine that is kept again", || {
        Some(host.json(&["status", "web1"])).filter(|status| status["kept"] == true)
    });
    assert_eq!(status["pid"], report["pid"]);
    assert_eq!((&status["identity"], &status["recoveries"]), (&made["identity"], &1.into()));
    assert_eq!((&status["state"], &status["errors"]), (&"running".into(), &0.into()));
}

fn a_paused_machine_survives(host: &Host, run: &[&str]) {
    let made = host.json(run);
    let paused = host.json(&["pause", "web1"]);
    kill(&made);
    assert_eq!(held(host, "web1")["complete"], true);
    no_byte_is_lost(host, "web1");
    assert_eq!(host.json(&["recover", "web1"])["how"], "runs_on");
    let back = host.json(&["status", "web1"]);
    assert_eq!((&back["state"], &back["ticks"]), (&"paused".into(), &paused["ticks"]));
    assert_eq!((&back["identity"], &back["recoveries"]), (&made["identity"], &1.into()));
    host.json(&["resume", "web1"]);
    let Answer::Check(report) = ask(&host.client("web1").with_patience(PATIENCE), &Request::Check) else {
        panic!("no check")
    };
    let wrong = (report.pages_lost, report.guest_errors, report.registers_lost, report.ticks_miscounted);
    assert_eq!(wrong, (0, 0, 0, 0), "{report:?}");
    // Now that it has run on, what was sealed is not its state any more.
    kill(&host.json(&["status", "web1"]));
    assert_eq!(held(host, "web1")["complete"], false);
}

#[test]
fn a_paused_machine_whose_vmm_was_killed_runs_on_from_where_it_stood() {
    let host = kept();
    let run = ["run", "web1", "--memory", "8MiB", "--guest", "thread", "--page-size", "4KiB"];
    a_paused_machine_survives(&host, &run);
}

#[test]
fn a_paused_machine_of_kvm_whose_vmm_was_killed_runs_on_from_where_it_stood() {
    harness::need!(kvm);
    a_paused_machine_survives(&kept(), &["run", "web1", "--memory", "16MiB", "--vcpus", "2"]);
}

#[test]
fn a_machine_stays_kept_when_its_vmm_is_replaced_and_is_not_when_it_is_stopped() {
    let host = kept();
    host.run("web1");
    host.run("web2");
    await_kept(&host, &["web1", "web2"]);
    for carrier in ["socket", "exec"] {
        host.update("web1", carrier);
        let status = host.json(&["status", "web1"]);
        assert_eq!(status["kept"], true, "{carrier}");
    }
    host.tideover(&["stop", "web2"]);
    await_kept(&host, &["web1"]);
    kill(&host.json(&["status", "web1"]));
    held(&host, "web1");
    no_byte_is_lost(&host, "web1");
    host.json(&["stop", "web1"]);
    await_kept(&host, &[]);
}

#[test]
fn whoever_dies_of_those_that_keep_a_machine_is_followed_by_another() {
    let mut host = kept();
    let made = host.run("web1");
    // The daemon, while the VMM lives.
    host.kill_daemon();
    host.start_daemon(&[]);
    await_kept(&host, &["web1"]);
    kill(&made);
    // The daemon, while a holder has it; and the holder, while the daemon has it.
    let first = held(&host, "web1");
    await_kept(&host, &["web1"]);
    host.kill_daemon();
    host.start_daemon(&[]);
    await_kept(&host, &["web1"]);
    kill(&first);
    held_by_another(&host, "web1", &first["pid"]);
    await_kept(&host, &["web1"]);
    no_byte_is_lost(&host, "web1");
    assert_eq!(host.json(&["recover", "web1", "--else", "boot"])["how"], "booted");
    await_kept(&host, &["web1"]);
}

/// A holder that was to run it, and died, does not make of it a machine that was sealed.
#[test]
fn a_machine_that_ran_on_never_gets_complete_by_any_death_after_that() {
    let host = kept();
    kill(&host.run("web1"));
    let mut holder = held(&host, "web1");
    for _ in 0..3 {
        await_kept(&host, &["web1"]);
        let said = host.fails(6, &["recover", "web1", "--else", "boot", "--program", "/bin/false"]);
        assert!(said.contains("web1 is held"), "{said}");
        kill(&holder);
        holder = held_by_another(&host, "web1", &holder["pid"]);
        assert_eq!(holder["complete"], false);
    }
}

/// As a service manager does, after the first few have ended as soon as they were started.
#[test]
fn holders_are_started_by_who_is_asked_to_and_those_that_fail_are_followed_by_others() {
    let mut host = Host::new();
    vmm::machines::make(&host.directory).unwrap();
    let socket = host.directory.join("hold.socket");
    let listener = Listener::bind(&socket).unwrap();
    host.start_daemon(&["--holders", socket.to_str().unwrap()]);
    let mut agent = host.agent();
    kill(&host.run("web1"));
    for _ in 0..3 {
        drop(listener.accept(Deadline::after(PATIENCE)).unwrap());
    }
    let connection = listener.accept(Deadline::after(PATIENCE)).unwrap();
    let mut holder = Command::new(env!("CARGO_BIN_EXE_tideoverd"));
    holder.arg("hold").env("TIDEOVER_DIR", &host.directory).stdin(connection.into_stdio());
    let mut holder = holder.stderr(Stdio::null()).spawn().unwrap();
    assert_eq!(held(&host, "web1")["pid"], holder.id());
    await_kept(&host, &["web1"]);
    no_byte_is_lost(&host, "web1");
    assert_eq!(command(&mut agent, &json!({ "cmd": "STATUS" }))["deaths"], 1);
    host.json(&["stop", "web1"]);
    assert!(holder.wait().unwrap().success());
}

#[test]
fn a_daemon_takes_over_from_another_what_vmms_and_holders_have() {
    let mut host = kept();
    kill(&host.run("web1"));
    held(&host, "web1");
    let second = host.run("web2");
    await_kept(&host, &["web1", "web2"]);
    let mut old = host.start_daemon(&["--replace"]).unwrap();
    let status = wait_for("the old daemon's end", || old.ended());
    assert!(status.success(), "{status}");
    await_kept(&host, &["web1", "web2"]);
    kill(&second);
    assert_eq!(held(&host, "web2")["complete"], false);
    no_byte_is_lost(&host, "web1");
    no_byte_is_lost(&host, "web2");
}

#[test]
fn a_second_daemon_and_one_that_finds_none_to_replace_end() {
    let mut host = kept();
    let mut first = host.start_daemon(&[]).unwrap();
    assert_eq!(wait_for("the second's end", || host.daemon_ended()).code(), Some(1));
    assert_eq!(first.ended(), None);
    drop(first);
    host.start_daemon(&["--replace"]);
    assert_eq!(wait_for("the third's end", || host.daemon_ended()).code(), Some(1));
}

#[test]
fn a_daemon_that_is_stopped_holds_up_no_machine_and_has_it_again_when_it_goes_on() {
    let host = kept();
    let made = host.run("web1");
    let daemon = i32::try_from(host.daemon_pid()).unwrap();
    let signal = |signal| kill_process(Pid::from_raw(daemon).unwrap(), signal).unwrap();
    signal(Signal::STOP);
    let begun = Instant::now();
    // More than its socket takes.
    for _ in 0..60 {
        host.json(&["pause", "web1"]);
        host.json(&["resume", "web1"]);
    }
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    assert_eq!(host.json(&["status", "web1"])["kept"], false);
    signal(Signal::CONT);
    await_kept(&host, &["web1"]);
    kill(&made);
    assert_eq!(held(&host, "web1")["complete"], false);
    no_byte_is_lost(&host, "web1");
}

/// As two daemons could come to start one each, if one is killed at the wrong moment.
#[test]
fn of_two_that_hold_one_machine_the_second_ends() {
    let mut host = kept();
    kill(&host.run("web1"));
    held(&host, "web1");
    host.kill_daemon();
    let (custody, mut fds, connection) = host.client("web1").ask_custody().unwrap();
    drop(connection);
    fds.insert(0, NoteFile::make(&custody.note).unwrap().as_fd().try_clone_to_owned().unwrap());
    let program = Path::new(env!("CARGO_BIN_EXE_tideoverd"));
    let program = Program::open(program, &[program.to_owned()]).unwrap();
    let (channel, mut second) = program.start_with(["hold"], Stdio::null(), Stdio::null()).unwrap();
    vmm::await_ready(&channel).unwrap();
    let brings = Brings::Remains { vcpus: 0, origin: custody.origin, died: "process 1".to_owned() };
    let socket = host.directory.join("web1.sock");
    let hold = Hold {
        name: "web1".to_owned(),
        socket,
        when: When::default(),
        program: None,
        log: None,
        brings,
        stored: None,
    };
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    vmm::give(&channel, &hold, &fds).unwrap();
    assert!(second.ended(PATIENCE).unwrap().success());
    no_byte_is_lost(&host, "web1");
}

#[test]
fn a_peer_that_lies_floods_or_stalls_harms_nobody_else() {
    let host = kept();
    host.run("web1");
    let (mut liar, mut stalled, mut good) = (host.agent(), host.agent(), host.agent());
    for line in [
        &b"{"[..],
        b"{\"cmd\":\"NONE\"}",
        b"\xff\xfe",
        b"{\"cmd\":\"KEEP\",\"id\":\"../x\"}",
        b"{\"cmd\":\"TAKEN\"}",
        b"",
    ] {
        liar.send(line, Vec::new()).unwrap();
        let came = liar.receive_some(Deadline::after(PATIENCE)).unwrap();
        let event: Value = serde_json::from_slice(&came[0].bytes).unwrap();
        assert_eq!(event["event"], "ERROR", "{event}");
    }
    // It asks, and reads nothing: until it is let go.
    let request = serde_json::to_vec(&json!({ "cmd": "STATUS" })).unwrap();
    while stalled.send(&request, Vec::new()).is_ok() {
        let status = command(&mut good, &json!({ "cmd": "STATUS" }));
        assert_eq!(status["kept"], json!(["web1"]));
    }
    // A line without an end.
    let flood = vec![b'x'; 60_000];
    let mut flooder =
        std::os::unix::net::UnixStream::connect(host.directory.join("luo-agent.socket")).unwrap();
    while std::io::Write::write_all(&mut flooder, &flood).is_ok() {}
    let many: Vec<Lines> = (0..300).map(|_| host.agent()).collect();
    drop(many);
    let status = wait_for("an answer", || {
        let mut late = host.agent();
        late.send(&request, Vec::new()).ok()?;
        let came = late.receive_some(Deadline::after(PATIENCE)).ok()?;
        serde_json::from_slice::<Value>(&came[0].bytes).ok()
    });
    assert_eq!(status["kept"], json!(["web1"]));
}

/// What is said to it, which is nothing where all is well: agents expect it so.
fn subscribe(agent: &mut Lines, id: &str) -> Option<Value> {
    for command in [json!({ "cmd": "SUBSCRIBE", "id": id }), json!({ "cmd": "STATUS" })] {
        agent.send(&serde_json::to_vec(&command).unwrap(), Vec::new()).unwrap();
    }
    let mut said = None;
    loop {
        for line in agent.receive_some(Deadline::after(PATIENCE)).unwrap() {
            let event: Value = serde_json::from_slice(&line.bytes).unwrap();
            if event["event"] == "STATUS" {
                return said;
            }
            said = Some(event);
        }
    }
}

#[test]
fn an_agent_stays_subscribed_when_the_daemon_is_replaced_and_its_name_is_its_own() {
    let mut host = kept();
    let (mut agent, mut other) = (host.agent(), host.agent());
    assert_eq!(subscribe(&mut agent, "vm-a"), None);
    assert_eq!(subscribe(&mut other, "vm-a").unwrap()["event"], "ERROR");
    let mut old = host.start_daemon(&["--replace"]).unwrap();
    wait_for("the old daemon's end", || old.ended());
    let status = command(&mut agent, &json!({ "cmd": "STATUS" }));
    assert_eq!(status["agents"], 1);
    assert_eq!(subscribe(&mut other, "vm-a").unwrap()["event"], "ERROR");
    drop(agent);
    wait_for("a name that is free", || subscribe(&mut other, "vm-a").is_none().then_some(()));
    if !Path::new("/dev/liveupdate").exists() {
        let refused = command(&mut host.agent(), &json!({ "cmd": "PRESERVE", "timeout_ms": 1000 }));
        assert!(refused["why"].as_str().unwrap().contains("there is no /dev/liveupdate"), "{refused}");
    }
    drop(other);
    let mut operator = host.agent();
    wait_for("nobody who is asked", || {
        let preserved = command(&mut operator, &json!({ "cmd": "PRESERVE", "timeout_ms": 1000 }));
        (preserved == json!({ "event": "PRESERVED", "ready": [], "missing": [] })).then_some(())
    });
}

#[test]
fn a_machine_that_stands_still_is_dumped_and_one_that_runs_is_not() {
    harness::need!(kvm);
    let host = kept();
    let made = host.json(&["run", "web1", "--memory", "16MiB", "--vcpus", "2"]);
    let path = host.directory.join("core");
    let file = path.to_str().unwrap();
    let said = host.fails(1, &["dump", "web1", file]);
    assert!(said.contains("`tideover pause web1`") && !path.exists(), "{said}");
    kill(&made);
    held(&host, "web1");
    let report = host.json(&["dump", "web1", file]);
    assert_eq!((&report["vcpus"], &report["memory_bytes"]), (&2.into(), &(16 << 20).into()));
    let core = fs::read(&path).unwrap();
    assert_eq!(&core[..5], b"\x7fELF\x02");
    assert_eq!(registers(&core).len(), 2);
    for [rip, cr3] in registers(&core) {
        assert!(rip != 0 && rip < 16 << 20, "pulse runs where its memory is: {rip:#x}");
        assert!(cr3 != 0 && cr3 < 16 << 20, "{cr3:#x}");
    }
    assert!(is_memory_of(&host, &core), "what the core holds is what the machine has");
    let said = host.fails(1, &["dump", "web1", file]);
    assert!(said.contains("File exists"), "{said}");
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(fs::metadata(Path::new(file)).unwrap().permissions().mode() & 0o777, 0o600);
}

fn word(core: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(core[at..at + 8].try_into().unwrap())
}

/// The program counter and the page table of each vCPU, as its note for crash says.
fn registers(core: &[u8]) -> Vec<[u64; 2]> {
    let notes = core.windows(5).enumerate().take_while(|(at, _)| *at < 4096);
    let of_crash = notes.filter(|(_, name)| *name == b"QEMU\0");
    of_crash
        .map(|(at, _)| at + 8)
        .map(|at| [word(core, at + 8 + 16 * 8), word(core, at + 8 + 18 * 8 + 240 + 24)])
        .collect()
}

/// The segment of memory, against what the machine's holder gives.
fn is_memory_of(host: &Host, core: &[u8]) -> bool {
    let (custody, fds, _connection) = host.client("web1").ask_custody().unwrap();
    assert_eq!(custody.vcpus, 2);
    let memory = fs::read(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fds[1]))).unwrap();
    let at = usize::try_from(word(core, 64 + 56 + 8)).unwrap();
    core[at..] == memory[..]
}
