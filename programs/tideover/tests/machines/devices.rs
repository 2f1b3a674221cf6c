//! A machine's devices, and how its guest ends, in real VMMs.

use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use devices::disk::Access;
use devices::disk::DiskError;
use devices::disk::DiskFile;
use devices::tap::Tap;
use serde_json::Value;

use crate::host::Console;
use crate::host::Host;
use crate::host::TestFile;
use crate::host::assert_whole;
use crate::host::lines;
use crate::host::wait_for;
use crate::kernel;
use crate::kernel::SECTORS;
use crate::kernel::WORDS;

const CARRIERS: [&str; 2] = ["socket", "exec"];

fn disk() -> TestFile {
    TestFile::new(&vec![0; usize::try_from(SECTORS * 512).unwrap()])
}

fn devices(status: &Value) -> Vec<&str> {
    status["devices"].as_array().unwrap().iter().map(|device| device["name"].as_str().unwrap()).collect()
}

#[test]
fn every_machine_of_kvm_has_a_serial_line_and_power_and_the_disks_asked_for() {
    harness::need!(kvm);
    let host = Host::new();
    let (image, shared) = (disk(), disk());
    let bare = host.json(&["run", "bare", "--guest", "kvm", "--memory", "8MiB"]);
    assert_eq!(devices(&bare), ["serial", "power"]);
    let read_only = format!("{},ro", shared.path());
    let made = host.json(&[
        "run",
        "m",
        "--guest",
        "kvm",
        "--memory",
        "8MiB",
        "--disk",
        image.path(),
        "--disk",
        &read_only,
    ]);
    assert_eq!(devices(&made), ["serial", "power", "disk0", "disk1"]);
    assert_eq!(made["devices"][2]["backend"], image.path());
    assert_eq!(
        (&made["devices"][2]["read_only"], &made["devices"][3]["read_only"]),
        (&false.into(), &true.into())
    );
    assert_eq!(made["devices"][2]["size_bytes"], SECTORS * 512);
    let taken = |file: &TestFile, access| match DiskFile::open(&file.0, access) {
        Err(DiskError::Taken { .. }) => true,
        Err(error) => panic!("{error}"),
        Ok(_) => false,
    };
    for carrier in CARRIERS {
        host.update("m", carrier);
        assert_eq!(host.json(&["status", "m"])["devices"], made["devices"], "{carrier}");
        assert!(taken(&image, Access::ReadOnly), "{carrier}");
        assert!(taken(&shared, Access::ReadWrite) && !taken(&shared, Access::ReadOnly), "{carrier}");
    }
    let said = host.tideover(&["status", "m"]);
    let said = String::from_utf8(said.stdout).unwrap();
    assert!(said.contains(&format!("virtio disk, 32 KiB of {}, read-only", shared.path())), "{said}");
    host.json(&["stop", "m"]);
    assert!(!taken(&image, Access::ReadWrite));
}

#[test]
fn what_is_not_there_is_named_and_no_machine_is_made() {
    harness::need!(kvm);
    let host = Host::new();
    let (image, kernel, text) = (disk(), TestFile::new(&kernel::image(false)), TestFile::new(b"no kernel"));
    let _other = DiskFile::open(&image.0, Access::ReadWrite).unwrap();
    let large = TestFile::new(&vec![0; 20 << 20]);
    let refused = |arguments: &[&str], words: &str| {
        let said = host.fails(1, &[&["run", "m", "--memory", "16MiB", "--guest", "kvm"], arguments].concat());
        assert!(said.contains(words), "{arguments:?}: {said}");
    };
    refused(&["--disk", "/nowhere/disk.img"], "cannot open the disk /nowhere/disk.img: No such file");
    refused(&["--disk", image.path()], &format!("the disk {} is another machine's", image.path()));
    refused(&["--disk", "/dev/null"], "is neither a file nor a block device");
    refused(&["--tap", "tdo-nowhere"], "there is no tap interface \"tdo-nowhere\"");
    refused(&["--kernel", "/nowhere/bzImage"], "cannot open the kernel /nowhere/bzImage: No such file");
    let none = format!("cannot start the kernel {}: it is no whole bzImage", text.path());
    refused(&["--kernel", text.path()], &none);
    let zeros = format!("cannot start the kernel {}: it is no bzImage", large.path());
    refused(&["--kernel", large.path()], &zeros);
    let no_initrd = ["--kernel", kernel.path(), "--initrd", "/nowhere/initrd"];
    refused(&no_initrd, "cannot open the initial RAM disk /nowhere/initrd: No such file");
    let no_room = ["--kernel", kernel.path(), "--initrd", large.path()];
    refused(&no_room, "no room for the initial RAM disk");
    let five = [["--tap", "lo"]; 5].concat();
    refused(&five, "at most 4 disks and network cards, not 5");
    let thread = ["run", "m", "--guest", "thread"];
    for (option, value) in [("--kernel", kernel.path()), ("--disk", image.path()), ("--tap", "tap0")] {
        let said = host.fails(1, &[&thread[..], &[option, value]].concat());
        assert!(said.contains(&format!("{option} needs --guest kvm")), "{said}");
    }
    refused(&["--kernel", kernel.path(), "--vcpus", "2"], "--vcpus");
    assert!(host.fails(2, &["run", "m", "--initrd", "x"]).contains("--kernel"));
    assert!(host.fails(2, &["run", "m", "--cmdline", "x"]).contains("--kernel"));
    assert_eq!(host.json(&["ls"]), Value::Array(Vec::new()));
}

/// A tap that stays when nobody has it. Removed when dropped.
struct Interface(String);

impl Interface {
    fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("tdm{}-{number}", std::process::id() % 1_000_000);
        let made =
            Command::new("ip").args(["tuntap", "add", "dev", &name, "mode", "tap", "vnet_hdr"]).output();
        assert!(made.as_ref().is_ok_and(|made| made.status.success()), "{made:?}");
        Self(name)
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.0]).output();
    }
}

#[test]
fn a_tap_goes_with_the_machine() {
    harness::need!(kvm, tap);
    let (host, interface) = (Host::new(), Interface::new());
    let name = interface.0.as_str();
    let made = host.json(&["run", "m", "--guest", "kvm", "--memory", "8MiB", "--tap", name]);
    assert_eq!((devices(&made)[2], &made["devices"][2]["backend"]), ("net0", &name.into()));
    for carrier in CARRIERS {
        host.update("m", carrier);
        assert_eq!(host.json(&["status", "m"])["devices"], made["devices"], "{carrier}");
        assert!(Tap::open(name).is_err(), "{carrier}: it is the machine's");
    }
    host.json(&["stop", "m"]);
    // VMMs before the last one may take a moment to end.
    wait_for("the interface is free", || Tap::open(name).ok());
}

#[test]
fn a_tap_goes_with_a_machine_that_is_confined() {
    harness::need!(kvm, tap);
    let (host, interface) = (Host::new(), Interface::new());
    let name = interface.0.as_str();
    let made =
        host.json(&["run", "m", "--guest", "kvm", "--memory", "8MiB", "--tap", name, "--confine=kill"]);
    assert_eq!((devices(&made)[2], &made["confined"]), ("net0", &"kill".into()));
    for _ in 0..3 {
        // What the VMM may not do would end it.
        host.update("m", "socket");
        let status = host.json(&["status", "m"]);
        assert_eq!((&status["devices"], &status["confined"]), (&made["devices"], &"kill".into()));
        assert!(Tap::open(name).is_err(), "it is the machine's");
    }
    host.json(&["stop", "m"]);
    // VMMs before the last one may take a moment to end.
    wait_for("the interface is free", || Tap::open(name).ok());
}

#[test]
fn a_kernel_gets_its_command_line_and_its_initial_ram_disk() {
    harness::need!(kvm);
    let host = Host::new();
    let (kernel, initrd) = (TestFile::new(&kernel::image(false)), TestFile::new(b"ramdisk"));
    let (image, path) = (disk(), initrd.path());
    host.run_kernel("m", &kernel, &["--initrd", path, "--cmdline", "quiet x=1", "--disk", image.path()]);
    let console = Console::of(&host, "m");
    console.await_text("boot quiet x=1 virtio_mmio.device=4K@0xd0000000:5|ramd\n");
    assert_eq!(host.json(&["status", "m"])["ticks"], Value::Null);
}

/// A machine with a foreground, and its console.
fn in_foreground(host: &Host, kernel: &TestFile, more: &[&str]) -> (std::process::Child, Console) {
    let arguments = [&Host::kernel_arguments("m", kernel), more, &["--foreground"]].concat();
    let foreground = host.command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("the machine", || host.tideover(&["status", "m"]).status.success().then_some(()));
    let console = Console::of(host, "m");
    console.await_lines(1);
    (foreground, console)
}

#[track_caller]
fn end(foreground: &mut std::process::Child) -> ExitStatus {
    wait_for("the end", || foreground.try_wait().unwrap())
}

#[test]
fn a_guest_that_switches_itself_off_ends_its_machine_before_and_after_updates() {
    harness::need!(kvm);
    let kernel = TestFile::new(&kernel::image(false));
    for carriers in [&[][..], &["socket"], &["exec"]] {
        let host = Host::new();
        let (mut foreground, mut console) = in_foreground(&host, &kernel, &[]);
        carriers.iter().for_each(|carrier| host.update("m", carrier));
        console.type_in("p");
        assert_eq!(end(&mut foreground).code(), Some(0), "{carriers:?}");
        let (code, seen, said) = console.ends();
        assert_eq!(code, Some(0), "{said}");
        assert!(seen.ends_with("off\n"), "its last words come before its end: {seen:?}");
        assert_whole(&seen);
        assert!(said.contains("m has ended"), "{said}");
        wait_for("no machine", || (host.json(&["ls"]) == Value::Array(Vec::new())).then_some(()));
    }
}

#[test]
fn a_guest_that_asks_for_a_reset_starts_again_on_the_same_disk_or_ends() {
    harness::need!(kvm);
    let (kernel, image) = (TestFile::new(&kernel::image(true)), disk());
    let host = Host::new();
    host.run_kernel("m", &kernel, &["--disk", image.path()]);
    let mut console = Console::of(&host, "m");
    for (resets, key) in ["r", "R"].into_iter().enumerate() {
        console.await_lines(3);
        host.update("m", CARRIERS[resets]);
        console.type_in(key);
        let boots = || console.seen().matches("boot ").count() == resets + 2;
        wait_for("another start", || boots().then_some(()));
        assert_eq!(host.json(&["status", "m"])["state"], "running");
    }
    console.await_lines(3);
    let seen = console.seen();
    seen.split("boot ").for_each(assert_whole);
    assert!(lines(seen.split("boot ").last().unwrap()).starts_with(&[0, 1]), "from the beginning: {seen}");
    drop(console);
    host.json(&["stop", "m"]);

    let (mut foreground, mut console) =
        in_foreground(&host, &kernel, &["--disk", image.path(), "--on-reset", "stop"]);
    console.type_in("r");
    assert_eq!((end(&mut foreground).code(), console.ends().0), (Some(0), Some(0)));
}

#[test]
fn a_device_that_its_guest_broke_is_told_by_status_and_through_updates() {
    harness::need!(kvm);
    let (kernel, image) = (TestFile::new(&kernel::image(true)), disk());
    let host = Host::new();
    host.run_kernel("m", &kernel, &["--disk", image.path()]);
    let fault = || host.json(&["status", "m"])["devices"][2]["fault"].as_str().map(str::to_owned);
    let said = || String::from_utf8(host.tideover(&["status", "m"]).stdout).unwrap();
    let mut console = Console::of(&host, "m");
    console.await_lines(2);
    assert_eq!(fault(), None);
    assert!(!said().contains("queue"), "{}", said());
    console.type_in("B");
    let told = wait_for("the fault", fault);
    assert!(told.starts_with("queue 0 is broken: "), "{told}");
    for carrier in CARRIERS {
        assert_eq!(fault().as_ref(), Some(&told), "as often as one asks");
        assert!(said().contains(&told), "{}", said());
        host.update("m", carrier);
    }
    assert_eq!(fault().as_ref(), Some(&told));
}

#[test]
fn a_confined_machine_has_its_devices_through_updates_and_resets() {
    harness::need!(kvm);
    let (kernel, image) = (TestFile::new(&kernel::image(true)), disk());
    let host = Host::new();
    host.run_kernel("m", &kernel, &["--disk", image.path(), "--confine=kill"]);
    let mut console = Console::of(&host, "m");
    for resets in 1..=2 {
        console.await_lines(3);
        host.update("m", "socket");
        console.type_in("r");
        let boots = || console.seen().matches("boot ").count() == resets + 1;
        wait_for("another start", || boots().then_some(()));
    }
    console.await_lines(3);
    assert_eq!(host.json(&["status", "m"])["confined"], "kill");
    console.seen().split("boot ").for_each(assert_whole);
}

#[test]
fn a_guest_that_crashes_is_told_from_one_that_ends() {
    harness::need!(kvm);
    let kernel = TestFile::new(&kernel::image(false));
    let host = Host::new();
    let (mut foreground, mut console) = in_foreground(&host, &kernel, &[]);
    host.update("m", "socket");
    console.type_in("c");
    assert_eq!(end(&mut foreground).code(), Some(5));
    let (code, _, said) = console.ends();
    assert_eq!(code, Some(5));
    assert!(said.contains("the guest has crashed"), "{said}");

    host.run_kernel("kept", &kernel, &["--on-crash", "keep"]);
    let mut console = Console::of(&host, "kept");
    console.await_lines(1);
    console.type_in("c");
    let state = || Some(host.json(&["status", "kept"])).filter(|status| status["state"] == "ended");
    let status = wait_for("the crash", state);
    assert!(status["failure"].as_str().unwrap().contains("has crashed"), "{status}");
    // What it said stays to be seen.
    Console::of(&host, "kept").await_text("line 00000001\n");
}

#[test]
fn a_disk_loses_nothing_while_the_vmms_under_it_are_replaced() {
    harness::need!(kvm);
    let (kernel, image) = (TestFile::new(&kernel::image(true)), disk());
    let host = Host::new();
    let (mut foreground, mut console) =
        in_foreground(&host, &kernel, &["--on-demand", "--disk", image.path()]);
    for _ in 0..10 {
        for carrier in CARRIERS {
            host.update("m", carrier);
        }
        console.await_lines(5);
    }
    console.type_in("p");
    assert_eq!(end(&mut foreground).code(), Some(0));
    let (_, seen, said) = console.ends();
    assert!(!said.contains("missing"), "{said}");
    assert!(!seen.contains("lost"), "the guest found a wrong word");
    assert_whole(&seen);
    let last = *lines(&seen).last().unwrap();
    assert!(last > SECTORS, "{last} rounds");
    let bytes = std::fs::read(&image.0).unwrap();
    let mut words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    for number in 0..SECTORS {
        let round = (0..=last).rev().find(|round| kernel::sector(*round) == number).unwrap();
        for place in 0..WORDS {
            assert_eq!(words.next(), Some(kernel::word(round, place)), "sector {number}, round {round}");
        }
    }
}
