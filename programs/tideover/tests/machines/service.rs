//! A machine as a service: what its manager keeps outlives its VMMs.

use std::io::Read as _;
use std::path::Path;
use std::process::Child;
use std::process::Stdio;

use manager::Manager;
use serde_json::Value;
use vmm::control::Answer;
use vmm::control::Carrier;
use vmm::control::Request;
use vmm::control::Source;
use vmm::control::UpdateOutcome;
use vmm::control::UpdateRequest;

use crate::host::Host;
use crate::host::wait_for;

/// Regions, three notes, and the probe.
const ROOM: usize = 6;
const THREAD: &[&str] = &["--guest", "thread", "--page-size", "4KiB"];
const KVM: &[&str] = &["--guest", "kvm", "--page-size", "4KiB"];

/// A service of a manager that this test plays.
struct Service {
    host: Host,
    manager: Manager,
    guest: &'static [&'static str],
    main: Option<Child>,
}

impl Service {
    fn new(room: usize, guest: &'static [&'static str]) -> Self {
        Self { host: Host::new(), manager: Manager::start(room), guest, main: None }
    }

    /// Starts its main process, with what the manager keeps.
    fn spawn(&mut self) -> Child {
        let mut command = self.manager.command(Path::new(env!("CARGO_BIN_EXE_tideover")));
        command.args(["service", "run", "m1", "--memory", "8MiB"]).args(self.guest);
        command.env("TIDEOVER_DIR", &self.host.directory).stdin(Stdio::null()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    fn told(&self, line: &str) -> usize {
        self.manager.told().iter().filter(|told| *told == line).count()
    }

    #[track_caller]
    fn start(&mut self) {
        let before = self.told("READY=1");
        let mut main = self.spawn();
        wait_for("the service", || {
            assert!(main.try_wait().unwrap().is_none(), "{:?}", said(&mut main));
            (self.told("READY=1") > before).then_some(())
        });
        self.main = Some(main);
    }

    fn status(&self) -> Value {
        self.host.json(&["status", "m1"])
    }

    fn ask(&self, request: &Request) -> anyhow::Result<Answer> {
        self.host.client("m1").ask(request, &mut |_, _, _| {})
    }

    /// What `service stop` has the VMM do when the unit is restarted.
    #[track_caller]
    fn park(&mut self) {
        let answer = self.ask(&Request::Park).unwrap();
        assert!(matches!(answer, Answer::Sealed(_)), "{answer:?}");
        let ended = self.main.take().unwrap().wait_with_output().unwrap();
        assert!(ended.status.success(), "{ended:?}");
    }

    #[track_caller]
    fn is_sound(&self) {
        self.counts_on();
        let report = match self.ask(&Request::Check).unwrap() {
            Answer::Check(report) => report,
            other => panic!("{other:?}"),
        };
        let lost = (report.pages_lost, report.guest_errors, report.registers_lost, report.ticks_miscounted);
        assert_eq!(lost, (0, 0, 0, 0), "{report:?}");
    }

    #[track_caller]
    fn counts_on(&self) {
        let ticks = || self.status()["ticks"].as_u64();
        let before = ticks().unwrap();
        wait_for("ticks", || ticks().filter(|now| *now > before + 10));
    }
}

fn said(process: &mut Child) -> String {
    let mut said = String::new();
    process.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    said
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(main) = &mut self.main {
            let _ = main.kill();
            let _ = main.wait();
        }
    }
}

fn outlives_restarts(guest: &'static [&'static str]) {
    let mut service = Service::new(ROOM, guest);
    service.start();
    let made = service.status();
    for restart in 1..=3 {
        let before = service.status();
        service.park();
        service.start();
        service.is_sound();
        let after = service.status();
        assert_eq!(after["identity"], made["identity"]);
        assert_ne!(after["pid"], before["pid"]);
        assert_eq!(after["updates"], restart);
        assert!(after["ticks"].as_u64() > before["ticks"].as_u64());
        assert!(after["last_pause_us"].as_f64().unwrap() > 0.0);
        assert_eq!(service.manager.stored().len(), 3, "{:?}", service.manager.stored());
    }
    service.host.json(&["stop", "m1"]);
    assert!(service.main.take().unwrap().wait().unwrap().success());
    assert_eq!(service.manager.stored(), [] as [&str; 0]);
}

#[test]
fn a_guest_outlives_restarts_of_its_service() {
    outlives_restarts(THREAD);
}

#[test]
fn a_guest_of_kvm_outlives_restarts_of_its_service() {
    harness::need!(kvm);
    outlives_restarts(KVM);
}

#[test]
fn a_machine_that_the_manager_cannot_keep_is_not_started() {
    let mut service = Service::new(ROOM - 1, THREAD);
    let ended = service.spawn().wait_with_output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("FileDescriptorStoreMax="), "{said}");
    assert_eq!(service.manager.stored(), [] as [&str; 0]);
    assert_eq!(service.told("READY=1"), 0);
}

#[test]
fn a_process_that_no_manager_has_started_is_no_service() {
    let host = Host::new();
    let said = host.fails(1, &["service", "run", "m1", "--memory", "8MiB", "--guest", "thread"]);
    assert!(said.contains("NOTIFY_SOCKET"), "{said}");
}

#[test]
fn a_guest_that_cannot_be_left_in_the_store_runs_on() {
    let mut service = Service::new(ROOM, THREAD);
    service.start();
    let before = service.status();
    service.manager.set_room(4);
    let error = service.ask(&Request::Park).unwrap_err();
    assert!(error.to_string().contains("FileDescriptorStoreMax="), "{error}");
    service.is_sound();
    assert_eq!(service.status()["pid"], before["pid"]);
    assert_eq!(service.status()["last_pause_us"], Value::Null);
    // There is room again.
    service.manager.set_room(ROOM);
    service.park();
    service.start();
    service.is_sound();
}

#[test]
fn a_vmm_that_is_no_service_leaves_no_machine_in_a_store() {
    let host = Host::new();
    host.run("m1");
    let error = host.client("m1").ask(&Request::Park, &mut |_, _, _| {}).unwrap_err();
    assert!(error.to_string().contains("no service"), "{error}");
    assert_eq!(host.json(&["status", "m1"])["state"], "running");
}

#[test]
fn after_an_update_the_manager_knows_its_main_process_and_has_its_note() {
    let mut service = Service::new(ROOM, THREAD);
    service.start();
    service.host.update("m1", "socket");
    let pid = service.status()["pid"].as_u64().unwrap();
    assert_eq!(service.told(&format!("MAINPID={pid}")), 1);
    assert!(service.main.take().unwrap().wait().unwrap().success());
    wait_for("the note", || {
        (service.manager.stored() == ["tideover/m1/0", "tideover/m1/1", "tideover/m1/note.1"]).then_some(())
    });
    assert!(matches!(service.ask(&Request::Park).unwrap(), Answer::Sealed(_)));
    service.start();
    service.is_sound();
    assert_eq!(service.status()["updates"], 2);
}

#[test]
fn a_successor_that_is_not_of_the_service_is_refused() {
    let mut service = Service::new(ROOM, THREAD);
    service.start();
    let request = UpdateRequest {
        successor: Source::Listen(service.host.directory.join("update")),
        carrier: Carrier::Socket,
        populate: false,
        probe: false,
        timeout_ms: 1000,
        prepare_timeout_ms: 1000,
    };
    match service.ask(&Request::Update(request)).unwrap() {
        Answer::Update(report) => {
            assert_eq!(report.outcome, UpdateOutcome::RolledBack);
            assert!(report.reason.unwrap().contains("restart the service"));
        }
        other => panic!("{other:?}"),
    }
    service.is_sound();
}

#[test]
fn a_vmm_that_was_left_over_hands_its_guest_to_the_next_process() {
    let mut service = Service::new(ROOM, THREAD);
    service.start();
    let before = service.status();
    let mut left_over = service.main.take().unwrap();
    service.start();
    assert!(left_over.wait().unwrap().success());
    service.is_sound();
    assert_eq!(service.status()["identity"], before["identity"]);
    assert_ne!(service.status()["pid"], before["pid"]);
    // It is as any other.
    service.park();
    service.start();
    service.is_sound();
}

#[test]
fn what_was_left_over_is_kept_again_where_the_manager_has_dropped_it() {
    let mut service = Service::new(ROOM, THREAD);
    service.start();
    let mut left_over = service.main.take().unwrap();
    service.manager.drop_all();
    service.start();
    assert!(left_over.wait().unwrap().success());
    service.park();
    service.start();
    service.is_sound();
}

#[test]
fn a_machine_of_the_same_name_that_is_no_service_is_left_alone() {
    let mut service = Service::new(ROOM, THREAD);
    service.host.run("m1");
    let ended = service.spawn().wait_with_output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("is no service"), "{said}");
    service.counts_on();
}

impl Service {
    /// Its main process dies, and the manager starts the next one.
    #[track_caller]
    fn dies(&mut self) {
        let mut main = self.main.take().unwrap();
        main.kill().unwrap();
        main.wait().unwrap();
        self.start();
    }
}

#[test]
fn a_machine_whose_vmm_dies_is_held_until_it_is_recovered() {
    let mut service = Service::new(ROOM, THREAD);
    service.start();
    let made = service.status();
    service.dies();
    let held = service.status();
    assert_eq!((&held["state"], &held["complete"]), (&"held".into(), &false.into()));
    // A restart of who holds it changes nothing.
    assert!(matches!(service.ask(&Request::Park).unwrap(), Answer::Held(_)));
    assert!(service.main.take().unwrap().wait().unwrap().success());
    service.start();
    assert_eq!(service.status()["state"], "held");
    let said = service.host.fails(6, &["recover", "m1"]);
    assert!(said.contains("state is lost"), "{said}");
    service.host.json(&["recover", "m1", "--else", "boot"]);
    // Who held it has ended, and the manager knows who runs it.
    assert!(service.main.take().unwrap().wait().unwrap().success());
    service.is_sound();
    let status = service.status();
    assert_eq!((&status["identity"], &status["recoveries"]), (&made["identity"], &1.into()));
    assert_eq!(service.told(&format!("MAINPID={}", status["pid"])), 1);
    let said = service.manager.told().into_iter().rfind(|told| told.starts_with("STATUS="));
    assert_eq!(said.as_deref(), Some("STATUS=the guest runs"));
    assert!(matches!(service.ask(&Request::Park).unwrap(), Answer::Sealed(_)));
    service.start();
    service.is_sound();
}

#[test]
fn a_paused_guest_outlives_the_death_of_its_vmm_and_stays_paused() {
    let mut service = Service::new(ROOM, THREAD);
    service.start();
    service.host.json(&["pause", "m1"]);
    let before = service.status();
    service.dies();
    let after = service.status();
    assert_eq!((&after["state"], &after["ticks"]), (&"paused".into(), &before["ticks"]));
    assert_eq!(after["recoveries"], 1);
    service.park();
    service.start();
    assert_eq!(service.status()["state"], "paused");
    service.host.json(&["resume", "m1"]);
    service.is_sound();
}

#[test]
fn a_machine_that_is_held_and_given_up_leaves_the_store() {
    let mut service = Service::new(ROOM, THREAD);
    service.start();
    service.dies();
    service.host.json(&["stop", "m1"]);
    assert!(service.main.take().unwrap().wait().unwrap().success());
    assert_eq!(service.manager.stored(), [] as [&str; 0]);
    service.start();
    service.is_sound();
    assert_eq!(service.status()["recoveries"], 0);
}

/// Two who each start somebody in a dead VMM's place would be in each other's way.
#[test]
fn a_machine_that_the_service_manager_keeps_is_left_to_it_by_tideoverd() {
    let mut service = Service::new(ROOM, THREAD);
    service.host.start_daemon(&[]);
    drop(service.host.agent());
    service.start();
    assert_eq!(service.status()["kept"], true);
    for _ in 0..2 {
        service.dies();
        assert_eq!(service.host.json(&["ls"])[0]["pid"], service.main.as_ref().unwrap().id());
        assert_eq!(service.host.json(&["recover", "m1", "--else", "boot"])["how"], "booted");
        service.is_sound();
        assert!(matches!(service.ask(&Request::Park).unwrap(), Answer::Sealed(_)));
        service.start();
    }
    service.is_sound();
}
