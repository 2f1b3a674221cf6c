//! `tideover inspect`, as its user has it.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

#[path = "schema/mod.rs"]
mod schema;

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::process::Output;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use abi::Memory as _;
use abi::MemoryMut as _;
use abi::gmem::MemoryName;
use abi::kho::RootFdt;
use abi::luo::SessionName;
use abi::state::StateName;
use machine::Machine;
use machine::MemorySpec;
use machine::Spec;
use rustix::fs::FileType;
use rustix::fs::Mode;
use ruzstd::decoding::StreamingDecoder;
use serde_json::Value;

const PACKED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../pure/abi/testdata/kho-linux-7.3.raw.zst");
/// Address of its root FDT.
const FDT: u64 = 0x4f_3000;

/// A folder of a test's own.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tideover-inspect-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A file of these bytes, its zeros left out; gives its path.
    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = File::create(&path).unwrap();
        for (page, at) in bytes.chunks(4096).zip((0u64..).step_by(4096)) {
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(page, at).unwrap();
            }
        }
        file.set_len(bytes.len() as u64).unwrap();
        path.into_os_string().into_string().unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Memory of a real machine.
fn memory() -> &'static Vec<u8> {
    static MEMORY: OnceLock<Vec<u8>> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let mut memory = Vec::new();
        StreamingDecoder::new(File::open(PACKED).unwrap()).unwrap().read_to_end(&mut memory).unwrap();
        memory
    })
}

fn tideover(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tideover")).args(arguments).output().unwrap()
}

#[track_caller]
fn text(arguments: &[&str]) -> String {
    let output = tideover(&[&["inspect"], arguments].concat());
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What is found, which fits the schema.
#[track_caller]
fn json(arguments: &[&str]) -> Value {
    let found = serde_json::from_str(&text(&[arguments, &["--json"]].concat())).unwrap();
    schema::check(include_str!("../../../docs/inspect.schema.json"), &found);
    found
}

/// Without what says where it is from.
fn state(mut found: Value) -> Value {
    found["source"] = Value::Null;
    found
}

#[test]
fn every_rule_is_in_the_schema_by_its_name_and_no_other() {
    let schema: Value = serde_json::from_str(include_str!("../../../docs/inspect.schema.json")).unwrap();
    let names = &schema["properties"]["findings"]["items"]["properties"]["rule"]["enum"];
    let rules: Vec<&str> = survey::RULES.iter().map(|rule| rule.name).collect();
    assert_eq!(*names, serde_json::to_value(rules).unwrap());
}

#[test]
fn a_machines_memory_is_read_packed_or_not_and_its_root_is_found() {
    let folder = Folder::new();
    let packed = format!("memory:{PACKED}");
    let raw = format!("memory:{}", folder.file("raw", memory()));
    let found = json(&[&packed, "--verify"]);
    assert_eq!(found["kho"]["fdt_address"], FDT);
    assert_eq!(found["kho"]["preserved_by_order"], serde_json::json!({ "0": 52, "9": 2 }));
    assert_eq!(found["luo"]["sessions"][0]["files"][0]["token_hex"], "0x2002");
    assert_eq!((&found["findings"], &found["folios"]), (&serde_json::json!([]), &Value::Null));
    assert_eq!(state(json(&[&raw])), state(found.clone()));
    assert_eq!(state(json(&[&raw, "--fdt-address", "0x4f3000"])), state(found));
    let shown = text(&[&raw, "--folios"]);
    assert!(shown.contains("session web-1: 2 files") && shown.contains("0x000002400000"), "{shown}");
    let listed = json(&[&raw, "--folios"]);
    let lists = listed["folios"].as_array().unwrap();
    assert_eq!(lists.len(), 6);
    assert_eq!(
        lists[1]["list"][1],
        serde_json::json!({ "index": 512, "address": 0x240_0000, "bytes": 2 << 20, "order": 9, "flags": 3 })
    );
}

#[test]
fn what_a_file_system_keeps_no_bytes_of_is_not_looked_at() {
    let folder = Folder::new();
    let path = folder.file("raw", memory());
    // It would take minutes to read it all.
    let file = File::options().write(true).open(&path).unwrap();
    if file.set_len(8 << 40).is_err() {
        // This file system has no files of that size.
        file.set_len(16 << 30).unwrap();
    }
    let found = json(&[&format!("memory:{path}")]);
    assert_eq!(found["kho"]["fdt_address"], Value::from(FDT));
}

#[test]
fn of_several_roots_the_one_that_holds_something_is_taken_and_the_others_are_named() {
    let folder = Folder::new();
    let mut other = memory().clone();
    let page = other[usize::try_from(FDT).unwrap()..][..4096].to_vec();
    // A copy whose tree is not there.
    other.write(0x10_0000, &page).unwrap();
    let at = page.windows(8).position(|word| word == 0x4f_2000u64.to_le_bytes()).unwrap();
    other.write(0x10_0000 + at as u64, &0x7000u64.to_le_bytes()).unwrap();
    let source = format!("memory:{}", folder.file("raw", &other));
    let found = json(&[&source]);
    assert_eq!(found["kho"]["fdt_address"], FDT);
    assert!(found["source"]["notes"].to_string().contains("0x100000"), "{}", found["source"]);
}

/// The page of the root FDT, with a tree at `map` in place of its own.
fn root_with(map: u64) -> Vec<u8> {
    let mut page = memory()[usize::try_from(FDT).unwrap()..][..4096].to_vec();
    let at = page.windows(8).position(|word| word == 0x4f_2000u64.to_le_bytes()).unwrap();
    page[at..at + 8].copy_from_slice(&map.to_le_bytes());
    page
}

#[test]
fn pages_that_a_guest_has_made_to_look_like_a_root_hide_no_state() {
    let folder = Folder::new();
    let mut other = memory().clone();
    for index in 0..100 {
        other.write(0x20_0000 + index * 4096, &root_with(0x7000)).unwrap();
    }
    let found = json(&[&format!("memory:{}", folder.file("many", &other))]);
    assert_eq!(found["kho"]["fdt_address"], FDT);
    let notes = found["source"]["notes"].to_string();
    assert!(notes.contains("100 other pages") && notes.contains("more;"), "{notes}");

    // One that boot parameters name, or what looks like them.
    let mut node = [10u32, 32].map(u32::to_le_bytes).concat();
    node.extend([0x20_0000u64, 4096].map(u64::to_le_bytes).concat());
    other.write(0x30_0000, &node).unwrap();
    let found = json(&[&format!("memory:{}", folder.file("named", &other))]);
    assert_eq!(found["kho"]["fdt_address"], FDT);
    assert!(found["source"]["notes"].to_string().contains("names 0x200000"), "{}", found["source"]);
}

#[test]
fn a_whole_state_in_memory_that_another_one_keeps_for_a_file_is_not_the_root() {
    let folder = Folder::new();
    let mut other = memory().clone();
    // In the 4 MiB of session web-1: all the same, and nothing in it is broken.
    other.write(0xe0_1000, &root_with(0x4f_2000)).unwrap();
    let found = json(&[&format!("memory:{}", folder.file("inside", &other))]);
    assert_eq!(found["kho"]["fdt_address"], FDT);
    assert!(found["source"]["notes"].to_string().contains("web-1"), "{}", found["source"]);
}

#[test]
fn a_core_that_tells_of_more_than_it_holds_is_read_as_far_as_it_goes() {
    let folder = Folder::new();
    let mut cut = core(memory());
    // The first segment's length.
    cut[64 + 32..64 + 40].copy_from_slice(&(1u64 << 60).to_le_bytes());
    let found = json(&[&format!("memory:{}", folder.file("cut", &cut))]);
    assert!(found["source"]["holds"].to_string().contains("cut short"), "{}", found["source"]);
}

#[test]
fn of_a_kernel_that_has_booted_further_what_is_broken_may_be_stale() {
    let folder = Folder::new();
    let mut used = memory().clone();
    // The structure of a file.
    used.write(0x84_5000, &[0xa5; 4096]).unwrap();
    let source = format!("memory:{}", folder.file("used", &used));
    assert_eq!(tideover(&["inspect", "--verify", &source]).status.code(), Some(1));
    let booted = tideover(&["inspect", "--verify", "--booted", &source]);
    let shown = String::from_utf8_lossy(&booted.stdout);
    assert_eq!(booted.status.code(), Some(0), "{shown}");
    assert!(shown.contains("may be stale"), "{shown}");
}

#[test]
fn what_is_no_file_is_not_waited_for_or_read_without_end() {
    let folder = Folder::new();
    let pipe = folder.0.join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
    let pipe = pipe.to_str().unwrap();
    for source in [format!("memory:{pipe}"), format!("arena:{pipe}"), "arena:/dev/zero".to_owned()] {
        let output = tideover(&["inspect", &source]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{source}: {said}");
        assert!(said.contains("no file that memory could be in"), "{source}: {said}");
    }
    let empty = folder.file("empty", &[]);
    let said = tideover(&["inspect", &format!("arena:{empty}")]).stderr;
    assert!(String::from_utf8_lossy(&said).contains("has 0 bytes"));
}

#[test]
fn frames_of_a_packed_file_that_hold_no_memory_are_passed_over() {
    let folder = Folder::new();
    let other = [&[0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    let packed = std::fs::read(PACKED).unwrap();
    let found =
        json(&[&format!("memory:{}", folder.file("packed", &[&other[..], &packed, &other].concat()))]);
    assert_eq!(found["kho"]["fdt_address"], FDT);
}

/// An ELF core of memory, in two segments that stand in the file the other way round.
fn core(memory: &[u8]) -> Vec<u8> {
    const SPLIT: usize = 64 << 20;
    let mut bytes = vec![0; 4096];
    bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    bytes[16..20].copy_from_slice(&[4, 0, 62, 0]);
    bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
    bytes[54..58].copy_from_slice(&[56, 0, 3, 0]);
    let (low, high) = memory.split_at(SPLIT);
    let parts = [(0, 4096 + high.len(), low.len()), (SPLIT, 4096, high.len()), (usize::MAX, 0, 4096)];
    for (index, (address, offset, len)) in parts.into_iter().enumerate() {
        let at = 64 + 56 * index;
        bytes[at] = 1;
        for (field, value) in [(8, offset), (24, address), (32, len), (40, len)] {
            bytes[at + field..at + field + 8].copy_from_slice(&(value as u64).to_le_bytes());
        }
    }
    [&bytes, high, low].concat()
}

#[test]
fn an_elf_core_holds_the_same() {
    let folder = Folder::new();
    let core = format!("memory:{}", folder.file("core", &core(memory())));
    let found = json(&[&core]);
    assert!(
        found["source"]["holds"]
            .as_str()
            .unwrap()
            .starts_with("an ELF core: 256 MiB of memory in 2 segments")
    );
    assert_eq!(state(found), state(json(&[&format!("memory:{PACKED}")])));
}

#[test]
fn debugfs_has_the_root_and_the_blobs_and_what_lies_behind_them_is_out_of_reach_not_broken() {
    let folder = Folder::new();
    let read = |address: u64, len: usize| {
        let mut bytes = vec![0; len];
        memory().read(address, &mut bytes).unwrap();
        bytes
    };
    folder.file("in/fdt", &read(FDT, 4096));
    for subtree in RootFdt::read(memory(), FDT).unwrap().subtrees {
        let blob = read(subtree.data, usize::try_from(subtree.size).unwrap());
        folder.file(&format!("in/sub_fdts/{}", subtree.name), &blob);
    }
    let source = |name: &str| format!("debugfs:{}", folder.0.join(name).display());
    let found = json(&[&source("in"), "--verify"]);
    assert_eq!((&found["kho"]["version"], &found["luo"]["liveupdate_number"]), (&"kho-v4".into(), &1.into()));
    assert_eq!(
        (&found["kexec"]["previous_release"], &found["findings"]),
        (&"7.3.4".into(), &serde_json::json!([]))
    );
    assert_eq!(found["kho"]["preserved_bytes"], Value::Null);
    assert!(
        !found["unread"].as_array().unwrap().is_empty() && !found["stale"].as_array().unwrap().is_empty()
    );
    let output = tideover(&["inspect", &source("")]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && error.contains("/in"), "{error}");
}

/// The name of nobody's session: bytes that direct a terminal, turn the writing round, end a script, and are no text.
const HOSTILE: &[u8; 63] =
    b"\x1b[2J\x1b]0;x\x07\xe2\x80\xae\n</script><img src=x onerror=alert(1)>\xff\xfe\x9b31m\"'\\&\r\t";

/// Where the name of the idle session stands.
fn idle_session() -> u64 {
    let memory = memory();
    let at = memory.windows(13).position(|text| text == b"idle-session\0").unwrap();
    at as u64
}

#[test]
fn a_hostile_name_does_no_harm() {
    let folder = Folder::new();
    let mut hostile = memory().clone();
    hostile.write(idle_session(), HOSTILE).unwrap();
    let source = format!("memory:{}", folder.file("raw", &hostile));
    let harmless = |text: &str| {
        text.chars().all(|letter| matches!(letter, '\n' | ' '..='~' | '├' | '─' | '└' | '│' | '…'))
    };
    let shown = text(&[&source, "--fdt-address", "0x4f3000"]);
    assert!(harmless(&shown), "{shown:?}");
    assert!(shown.contains("\\x1b[2J"));
    let output = text(&[&source, "--fdt-address", "0x4f3000", "--json"]);
    assert!(
        output.bytes().all(|byte| matches!(byte, b'\n' | b' '..=b'~')) && !output.contains('<'),
        "{output:?}"
    );
    let session = &serde_json::from_str::<Value>(&output).unwrap()["luo"]["sessions"][2];
    let hex: String = HOSTILE.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(session["name_hex"], hex);
    // One that is UTF-8 is as it was.
    hostile.write(idle_session(), "\u{202e}ö</script>\0".as_bytes()).unwrap();
    let source = format!("memory:{}", folder.file("raw", &hostile));
    let session = &json(&[&source])["luo"]["sessions"][2];
    assert_eq!((&session["name"], &session["name_hex"]), (&"\u{202e}ö</script>".into(), &Value::Null));
}

#[test]
fn what_is_wrong_is_listed_and_the_exit_code_says_so() {
    let folder = Folder::new();
    let mut broken = memory().clone();
    // A name that has no end.
    broken.write(idle_session(), &[b'x'; 64]).unwrap();
    let source = format!("memory:{}", folder.file("raw", &broken));
    assert_eq!(tideover(&["inspect", &source]).status.code(), Some(0));
    let output = tideover(&["inspect", "--verify", &source]);
    let shown = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(shown.contains("error    session-name") && shown.contains("session web-1: 2 files"), "{shown}");
}

#[test]
fn two_states_are_compared() {
    let folder = Folder::new();
    let mut other = memory().clone();
    other.write(idle_session(), b"busy").unwrap();
    let (before, after) = (format!("memory:{PACKED}"), format!("memory:{}", folder.file("raw", &other)));
    let compare = |from: &str, to: &str| -> Value {
        let found = serde_json::from_str(&text(&["--diff", from, to, "--json"])).unwrap();
        schema::check(include_str!("../../../docs/inspect-diff.schema.json"), &found);
        found
    };
    let diff = compare(&before, &after);
    let thing = |name: &str| serde_json::json!([{ "kind": "session", "name": name }]);
    assert_eq!((&diff["came"], &diff["went"]), (&thing("busy-session"), &thing("idle-session")));
    assert_eq!((&diff["same"], &diff["changed"]), (&false.into(), &serde_json::json!([])));
    assert_eq!(compare(&before, &before)["same"], true);
    assert!(text(&["--diff", &before, &after]).contains("came\n│  └─ session busy-session"));
    assert_eq!(tideover(&["inspect", &before, &after]).status.code(), Some(2));
}

#[test]
fn what_is_no_state_is_told_of() {
    let folder = Folder::new();
    let none = folder.file("none", &[0; 8192]);
    let short = folder.file("short", b"x");
    let dump = folder.file("dump", &[b"KDUMP   ".as_slice(), &[0; 4096]].concat());
    for (source, about) in [
        (format!("memory:{none}"), "no root FDT"),
        (format!("memory:{short}"), "no memory of a machine"),
        (format!("memory:{dump}"), "makedumpfile"),
        (format!("memory:{none}-not"), "cannot open"),
        (format!("debugfs:{}", folder.0.display()), "has no fdt"),
    ] {
        let output = tideover(&["inspect", &source]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && error.contains(about), "{source}: {error}");
    }
    // Shown as far as that goes.
    assert_eq!(tideover(&["inspect", &format!("arena:{none}")]).status.code(), Some(0));
    assert_eq!(tideover(&["inspect", "--verify", &format!("arena:{none}")]).status.code(), Some(1));
}

const STATE: StateName = StateName::literal("vcpu0");

fn made() -> Machine {
    let memory = MemorySpec { prefault: false, ..MemorySpec::new(MemoryName::literal("ram"), 4 << 20) };
    let spec = Spec {
        name: SessionName::literal("inspected"),
        vcpus: 1,
        memories: vec![memory],
        states: vec![STATE],
    };
    Machine::create(&spec, &mut |_, _| {}).unwrap()
}

#[test]
fn a_machine_breaks_no_rule_before_and_after_its_seal() {
    harness::need!(userfaultfd);
    let mut machine = made();
    let region0 = machine.descriptors().unwrap().remove(0);
    let source = format!("arena:/proc/{}/fd/{}", std::process::id(), region0.as_raw_fd());
    let before = json(&[&source, "--verify"]);
    assert_eq!(before["findings"], serde_json::json!([]));
    assert_eq!(before["arena"]["ownership"]["state"], "running");
    let _frozen: Vec<_> = machine.memories().iter().map(|memory| memory.inode.freeze().unwrap()).collect();
    machine.seal(vec![(STATE, vec![7; 600 * 4096])]).unwrap();
    let after = json(&[&source, "--verify"]);
    assert_eq!((&after["findings"], &after["unreferenced"]["bytes"]), (&serde_json::json!([]), &0.into()));
    assert_eq!(after["arena"]["ownership"]["state"], "sealed");
    let files = after["luo"]["sessions"][0]["files"].as_array().unwrap();
    let state = files.iter().find(|file| file["handler"] == "tideover-state-v1").unwrap();
    assert_eq!((&state["checksum_right"], &state["list"]["total_pages"]), (&true.into(), &600.into()));
    assert_eq!(state["epoch"], after["arena"]["ownership"]["epoch"]);
    assert_eq!(state["list"]["chunks"], 2);
}

#[test]
fn a_wrong_command_line_is_told_from_a_source_that_cannot_be_read() {
    let wrong: [(&[&str], &str); 7] = [
        (&["--diff", "arena:/absent"], "--diff compares two sources"),
        (&["arena:/absent", "arena:/absent"], "two sources are for --diff"),
        (&["foo:bar"], "`foo` is no kind of source"),
        (&[""], "not empty"),
        (&["web1", "--fdt-address", "0x1000"], "--fdt-address is for memory:FILE"),
        (&["arena:/absent", "--fdt-address", "0x1000"], "--fdt-address is for memory:FILE"),
        (&["arena:/absent", "--booted"], "--booted is for memory:FILE"),
    ];
    for (arguments, text) in wrong {
        let output = tideover(&[&["inspect"], arguments].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains(text), "{arguments:?}: {output:?}");
    }
    assert_eq!(tideover(&["inspect", "arena:/absent"]).status.code(), Some(1));
}
