//! A user's machines, and their user.

use std::io::Read as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Child;
use std::process::ChildStdin;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Output;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use fdpass::Deadline;
use fdpass::Lines;
use serde_json::Value;
use vmm::control::Client;

/// A user's directory of machines. All that are left end when it is dropped.
pub(crate) struct Host {
    pub(crate) directory: PathBuf,
    /// Its tideoverd.
    daemon: Option<Daemon>,
}

/// A tideoverd, killed when it is dropped.
pub(crate) struct Daemon(Child);

impl Daemon {
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Host {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("tideover-host-{}-{number}", std::process::id()));
        Self { directory, daemon: None }
    }

    /// Starts a tideoverd in the place of the one before, which is given back.
    pub(crate) fn start_daemon(&mut self, arguments: &[&str]) -> Option<Daemon> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tideoverd"));
        command.args(arguments).env("TIDEOVER_DIR", &self.directory).stdin(Stdio::null());
        let started = Daemon(command.stderr(Stdio::null()).spawn().unwrap());
        self.daemon.replace(started)
    }

    /// A connection to it.
    pub(crate) fn agent(&self) -> Lines {
        let socket = self.directory.join("luo-agent.socket");
        wait_for("tideoverd", || fdpass::connect_lines(&socket, Deadline::after(LONG)).ok())
    }

    /// Its tideoverd's process.
    pub(crate) fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().0.id()
    }

    /// How its tideoverd ended, if it has.
    pub(crate) fn daemon_ended(&mut self) -> Option<ExitStatus> {
        self.daemon.as_mut()?.ended()
    }

    pub(crate) fn kill_daemon(&mut self) {
        self.daemon.take();
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tideover"));
        command.args(arguments).env("TIDEOVER_DIR", &self.directory).stdin(Stdio::null());
        command
    }

    pub(crate) fn tideover(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs a verb that has to succeed, and gives its JSON.
    #[track_caller]
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.tideover(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Runs a verb that has to end with `code`, and gives what it says on standard error.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.tideover(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// A small machine whose guest is a thread.
    pub(crate) fn run(&self, name: &str) -> Value {
        self.json(&["run", name, "--memory", "8MiB", "--guest", "thread", "--page-size", "4KiB"])
    }

    /// A machine with a guest of [`kernel`](crate::kernel).
    pub(crate) fn run_kernel(&self, name: &str, kernel: &TestFile, more: &[&str]) -> Value {
        self.json(&[&Self::kernel_arguments(name, kernel), more].concat())
    }

    /// How that is run.
    pub(crate) fn kernel_arguments<'a>(name: &'a str, kernel: &'a TestFile) -> [&'a str; 8] {
        ["run", name, "--guest", "kvm", "--memory", "16MiB", "--kernel", kernel.path()]
    }

    /// Replaces the machine's VMM.
    #[track_caller]
    pub(crate) fn update(&self, name: &str, carrier: &str) {
        // Long enough for a host that has much else to do.
        let report = self.json(&["update", name, "--carrier", carrier, "--timeout", "20s"]);
        assert_eq!(report["outcome"], "updated", "{report}");
    }

    pub(crate) fn client(&self, name: &str) -> Client {
        let socket = self.directory.join(format!("{name}.sock"));
        let soon = Deadline::after(Duration::from_secs(10));
        Client::new(fdpass::connect(&socket, soon).unwrap()).with_patience(Duration::from_secs(20))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Else it would keep what is stopped.
        self.daemon.take();
        let output = self.tideover(&["ls", "--json"]);
        let machines: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_default();
        for machine in machines {
            self.tideover(&["stop", machine["name"].as_str().unwrap_or_default()]);
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A file of this test's own, removed when dropped.
pub(crate) struct TestFile(pub(crate) PathBuf);

impl TestFile {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tideover-file-{}-{number}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TestFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Far longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// Waits until there is what is looked for.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < LONG, "{what} does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `tideover console`, whose input and output are pipes.
pub(crate) struct Console {
    child: Child,
    stdin: Option<ChildStdin>,
    seen: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Console {
    pub(crate) fn of(host: &Host, machine: &str) -> Self {
        let mut command = host.command(&["console", machine]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (stdin, mut stdout) = (child.stdin.take(), child.stdout.take().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let reader = std::thread::spawn({
            let seen = Arc::clone(&seen);
            move || {
                let mut bytes = [0; 4096];
                while let Ok(read @ 1..) = stdout.read(&mut bytes) {
                    seen.lock().unwrap().extend_from_slice(&bytes[..read]);
                }
            }
        });
        Self { child, stdin, seen, reader: Some(reader) }
    }

    pub(crate) fn type_in(&mut self, text: &str) {
        self.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// The end of its input.
    pub(crate) fn close_input(&mut self) {
        self.stdin = None;
    }

    pub(crate) fn seen(&self) -> String {
        String::from_utf8(self.seen.lock().unwrap().clone()).unwrap()
    }

    /// The last line's number that was seen whole.
    pub(crate) fn last_line(&self) -> Option<u64> {
        lines(&self.seen()).last().copied()
    }

    /// Waits until the guest has gone on for so many lines.
    #[track_caller]
    pub(crate) fn await_lines(&self, more: u64) {
        let from = wait_for("a line", || self.last_line());
        wait_for("another line", || self.last_line().filter(|line| *line >= from + more));
    }

    #[track_caller]
    pub(crate) fn await_text(&self, text: &str) {
        wait_for(text, || self.seen().contains(text).then_some(()));
    }

    /// How it ends, and what it says on standard error.
    pub(crate) fn ends(mut self) -> (Option<i32>, String, String) {
        wait_for("the console's end", || self.child.try_wait().unwrap());
        self.reader.take().unwrap().join().unwrap();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let code = self.child.wait().unwrap().code();
        (code, self.seen(), said)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The numbers of all whole lines that a guest of [`kernel`](crate::kernel) has said.
pub(crate) fn lines(seen: &str) -> Vec<u64> {
    let whole = seen.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    let numbers = whole.filter_map(|line| line.strip_prefix("line "));
    numbers.map(|number| u64::from_str_radix(number, 16).unwrap_or_else(|_| panic!("{number:?}"))).collect()
}

/// Every line is the one after the line before: none is lost, doubled or broken.
#[track_caller]
pub(crate) fn assert_whole(seen: &str) {
    let lines = lines(seen);
    let gap = lines.windows(2).find(|pair| pair[1] != pair[0] + 1);
    assert_eq!(gap, None, "of {} lines", lines.len());
}
