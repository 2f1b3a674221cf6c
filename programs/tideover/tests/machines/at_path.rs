//! Machines that lie at a path, and are found by it when their VMM is gone.

use std::fs;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;
use serde_json::Value;
use vmm::control::Answer;
use vmm::control::Request;

use crate::ask;
use crate::host::Host;
use crate::host::wait_for;

/// A directory of a test's own on a tmpfs, which goes with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = Path::new("/dev/shm").join(format!("tideover-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).into_os_string().into_string().unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn run(host: &Host, name: &str, path: &str) -> Value {
    host.json(&["run", name, "--memory", "8MiB", "--guest", "thread", "--path", path])
}

#[track_caller]
fn kill(machine: &Value) {
    let pid = Pid::from_raw(i32::try_from(machine["pid"].as_i64().unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    wait_for("a dead VMM", || rustix::process::test_kill_process(pid).is_err().then_some(()));
}

#[track_caller]
fn is_whole(host: &Host, name: &str) {
    let Answer::Check(check) = ask(&host.client(name), &Request::Check) else { panic!("no check") };
    assert_eq!((check.pages_lost, check.guest_errors, check.registers_lost), (0, 0, 0), "{check:?}");
}

#[test]
fn a_machine_at_a_path_is_updated_and_leaves_nothing_when_it_is_stopped() {
    let (host, folder) = (Host::new(), Folder::new("stopped"));
    let path = folder.file("m");
    let made = run(&host, "m", &path);
    assert_eq!((&made["path"], &made["store"]), (&path.clone().into(), &"path".into()));
    let file = fs::metadata(&path).unwrap();
    assert_eq!((file.mode() & 0o777, file.len()), (0o600, (16 + 8) << 20));
    for carrier in ["socket", "exec", "socket"] {
        let report = host.json(&["update", "m", "--carrier", carrier]);
        assert_eq!(report["outcome"], "updated", "{report}");
    }
    is_whole(&host, "m");
    let now = host.json(&["status", "m"]);
    assert_eq!(
        (&now["identity"], &now["path"], &now["updates"]),
        (&made["identity"], &path.clone().into(), &3.into())
    );
    assert!(
        host.fails(1, &["run", "other", "--guest", "thread", "--memory", "8MiB", "--path", &path])
            .contains("is in use")
    );
    assert!(host.fails(1, &["resume", "--path", &path]).contains("is in use"));
    host.json(&["stop", "m"]);
    wait_for("a file that is gone", || (!Path::new(&path).exists()).then_some(()));
}

/// Its guest ran: what its vCPUs had in their registers is lost, its memory is not.
#[test]
fn a_machine_whose_vmm_was_killed_is_found_by_its_path_and_held() {
    let (host, folder) = (Host::new(), Folder::new("killed"));
    let path = folder.file("m");
    let made = run(&host, "m", &path);
    for updates in 0..2 {
        kill(&host.json(&["status", "m"]));
        assert!(host.fails(6, &["resume", "--path", &path]).contains("its memory is whole"));
        let held = host.json(&["status", "m"]);
        assert_eq!(
            (&held["state"], &held["since"], &held["complete"]),
            (&"held".into(), &"death".into(), &false.into())
        );
        assert!(host.fails(1, &["resume", "--path", &path]).contains("is in use"), "it is held");
        host.json(&["recover", "m", "--else", "boot"]);
        is_whole(&host, "m");
        let now = host.json(&["status", "m"]);
        assert_eq!((&now["identity"], &now["recoveries"]), (&made["identity"], &(updates + 1).into()));
    }
    host.json(&["stop", "m"]);
}

/// It was sealed where it stood.
#[test]
fn a_paused_machine_whose_vmm_was_killed_runs_on_from_where_it_stood() {
    let (host, folder) = (Host::new(), Folder::new("paused"));
    let made = run(&host, "m", &folder.file("m"));
    run(&host, "n", &folder.file("n"));
    let paused = host.json(&["pause", "m"]);
    kill(&made);
    let directory = folder.0.to_str().unwrap();
    assert!(host.fails(1, &["resume", "x", "--path", directory]).contains("no machine x lies there"));
    let resumed = host.tideover(&["resume", "m", "--path", directory]);
    let said = String::from_utf8_lossy(&resumed.stderr);
    assert!(resumed.status.success() && said.contains("runs on from where it stood"), "{resumed:?}");
    let now = host.json(&["status", "m"]);
    assert_eq!((&now["state"], &now["ticks"]), (&"paused".into(), &paused["ticks"]));
    host.json(&["resume", "m"]);
    is_whole(&host, "m");
}

#[test]
fn a_held_machine_that_is_stopped_leaves_no_file() {
    let (host, folder) = (Host::new(), Folder::new("given-up"));
    let path = folder.file("m");
    let made = run(&host, "m", &path);
    kill(&made);
    host.fails(6, &["resume", "--path", &path]);
    host.json(&["stop", "m"]);
    wait_for("a file that is gone", || (!Path::new(&path).exists()).then_some(()));
}

/// tideoverd has its memory as any other's.
#[test]
fn a_machine_at_a_path_is_kept_by_tideoverd_too() {
    let (mut host, folder) = (Host::new(), Folder::new("kept"));
    host.start_daemon(&[]);
    let path = folder.file("m");
    let made = run(&host, "m", &path);
    wait_for("a machine that is kept", || {
        let mut agent = host.agent();
        agent.send(br#"{"cmd":"STATUS"}"#, Vec::new()).unwrap();
        let came = agent.receive_some(fdpass::Deadline::after(std::time::Duration::from_secs(60))).unwrap();
        let status: Value = serde_json::from_slice(&came[0].bytes).unwrap();
        (status["kept"][0] == "m").then_some(())
    });
    kill(&made);
    wait_for("a machine that is held", || (host.json(&["ls"])[0]["state"] == "held").then_some(()));
    assert!(host.fails(1, &["resume", "--path", &path]).contains("is in use"));
    host.json(&["recover", "m", "--else", "boot"]);
    is_whole(&host, "m");
    host.json(&["stop", "m"]);
}

#[test]
fn what_is_no_place_for_a_machine_is_refused_and_stays() {
    let (host, folder) = (Host::new(), Folder::new("unfit"));
    let at =
        |path: &str| ["run", "m", "--guest", "thread", "--memory", "8MiB", "--path", path].map(str::to_owned);
    let fails = |path: &str| host.fails(1, &at(path).each_ref().map(String::as_str));
    let mine = folder.file("mine");
    fs::write(&mine, "mine").unwrap();
    fs::set_permissions(&mine, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(fails(&mine).contains("exists"));
    assert!(host.fails(1, &["resume", "--path", &mine]).contains("no machine lies at"));
    assert_eq!(fs::read(&mine).unwrap(), b"mine");
    assert!(fails("/dev/null").contains("another kind than devdax"));
    assert!(fails(&folder.file("no/such")).contains("cannot make"));
    let mut through = at(&folder.file("m")).to_vec();
    through.push("--through-kexec".to_owned());
    let through: Vec<&str> = through.iter().map(String::as_str).collect();
    assert!(host.fails(1, &through).contains("does not outlive this kernel"));
    assert!(!Path::new(&folder.file("m")).exists(), "it was made for that machine alone");
    assert!(
        host.fails(2, &["run", "m", "--path", "/dev/shm/m", "--store", "hugetlb"]).contains("cannot be used")
    );
}

/// Whoever may write the file may cut it off under the VMM, which cannot go on.
#[test]
fn a_vmm_whose_file_is_cut_off_says_so_and_ends() {
    let (host, folder) = (Host::new(), Folder::new("cut"));
    let path = folder.file("m");
    run(&host, "m", &path);
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    wait_for("a machine that is over", || (host.json(&["ls"])[0]["state"] == "dead").then_some(()));
    let log = fs::read_to_string(host.directory.join("m.log")).unwrap();
    assert!(log.contains("memory is gone under its VMM (SIGBUS)"), "{log}");
}

#[test]
fn a_machine_of_kvm_lies_in_huge_pages_of_a_hugetlbfs() {
    harness::need!(kvm, hugetlb);
    let (host, folder) = (Host::new(), Folder::new("hugetlbfs"));
    let mounted =
        Command::new("mount").args(["-t", "hugetlbfs", "-o", "pagesize=2M", "none"]).arg(&folder.0).status();
    assert!(mounted.unwrap().success());
    let path = folder.file("m");
    let made = host.json(&["run", "m", "--memory", "8MiB", "--guest", "kvm", "--path", &path]);
    assert_eq!((&made["page_size"], &made["huge_bytes"]), (&(2 << 20).into(), &(8 << 20).into()));
    host.json(&["update", "m"]);
    is_whole(&host, "m");
    kill(&host.json(&["status", "m"]));
    host.fails(6, &["resume", "--path", &path]);
    host.json(&["recover", "m", "--else", "boot"]);
    is_whole(&host, "m");
    host.json(&["stop", "m"]);
    wait_for("a file that is gone", || (!Path::new(&path).exists()).then_some(()));
    assert!(Command::new("umount").arg(&folder.0).status().unwrap().success());
}
