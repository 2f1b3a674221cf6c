//! The command under test, as whoever runs this host would use it.

use std::fmt::Write as _;
use std::fs;
use std::io::BufRead as _;
use std::io::BufReader;
use std::io::Read;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::Output;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::bail;
use anyhow::ensure;
use fdpass::Deadline;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::WaitOptions;
use serde_json::Value;
use vmm::control::Answer;
use vmm::control::Client;
use vmm::control::Request;

const PROGRAM: &str = "/bin/tideover";
/// Where the machines' sockets and logs are.
pub(crate) const DIRECTORY: &str = "/run/tideover";
/// For what takes moments on a real processor: this one is emulated, and the machine that does so may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How many of the last lines of each log are shown.
const LAST_LINES: usize = 15;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).env("TIDEOVER_DIR", DIRECTORY).stdin(Stdio::null());
    command
}

/// Runs a verb, and gives what it says and how it ends.
pub(crate) fn output(arguments: &[&str]) -> anyhow::Result<Output> {
    command(arguments).output().with_context(|| format!("cannot run {PROGRAM}"))
}

/// Runs a verb that has to fail with this exit code, and finds programs here first; gives what it complains.
pub(crate) fn fails_among(arguments: &[&str], code: i32, programs: &Path) -> anyhow::Result<String> {
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
    let output = command(arguments).env("PATH", path).output().context("cannot run a verb")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(code), "{}: {}: {said}", arguments.join(" "), output.status);
    Ok(said)
}

/// Runs a verb that has to succeed, and gives what it says.
pub(crate) fn run(arguments: &[&str]) -> anyhow::Result<String> {
    let output = output(arguments)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    // Complaints that were no reason to fail.
    print!("{}", String::from_utf8_lossy(&output.stderr));
    ensure!(
        output.status.success(),
        "tideover {}: {}: {said}{}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(said)
}

/// Runs a verb that has to fail with this exit code, and gives what it complains of.
pub(crate) fn fails(arguments: &[&str], code: i32) -> anyhow::Result<String> {
    let output = output(arguments)?;
    let said = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    println!("{said}");
    ensure!(
        output.status.code() == Some(code),
        "tideover {}: {}: {said}",
        arguments.join(" "),
        output.status
    );
    Ok(said)
}

/// Runs a verb that may fail, and gives all that it says.
pub(crate) fn either(arguments: &[&str]) -> anyhow::Result<String> {
    let Output { status, stdout, stderr } = output(arguments)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(format!("{status}: {}{}", text(&stdout), text(&stderr)))
}

/// Runs a verb that has to fail so, and complains of this.
pub(crate) fn fails_with(arguments: &[&str], code: i32, words: &str) -> anyhow::Result<()> {
    let said = fails(arguments, code)?;
    ensure!(said.contains(words), "tideover {} says nothing of {words:?}: {said}", arguments.join(" "));
    Ok(())
}

/// Runs a verb that has to succeed, and gives its JSON.
pub(crate) fn json(arguments: &[&str]) -> anyhow::Result<Value> {
    let said = run(&[arguments, &["--json"]].concat())?;
    serde_json::from_str(&said).with_context(|| format!("tideover {} says {said}", arguments.join(" ")))
}

/// How a machine is.
pub(crate) fn status(machine: &str) -> anyhow::Result<Value> {
    json(&["status", machine])
}

/// The number in a field of an answer.
pub(crate) fn number(answer: &Value, field: &str) -> anyhow::Result<u64> {
    answer[field].as_u64().with_context(|| format!("no number {field} in {answer}"))
}

/// A connection to a machine's VMM, which waits as long as this host may take.
pub(crate) fn connect(machine: &str) -> anyhow::Result<Client> {
    let path = Path::new(DIRECTORY).join(format!("{machine}.sock"));
    let channel = fdpass::connect(&path, Deadline::after(PATIENCE)).context("cannot connect to a VMM")?;
    Ok(Client::new(channel).with_patience(3 * PATIENCE))
}

/// Has a machine's guest check all of its memory, and its VMM compare every word: nothing is lost.
pub(crate) fn check(machine: &str) -> anyhow::Result<()> {
    let answer = connect(machine)?.ask(&Request::Check, &mut |_, _, _| {})?;
    let Answer::Check(check) = answer else { bail!("unexpected answer to check: {answer:?}") };
    let lost = check.pages_lost + check.guest_errors + check.registers_lost + check.ticks_miscounted;
    ensure!(lost == 0 && check.pages_checked > 0 && check.guest_passes > 0, "{machine}: {check:?}");
    println!("{machine}: {} pages checked", check.pages_checked);
    Ok(())
}

/// Replaces a machine's VMM. Its pause is of no interest here, but has to end.
pub(crate) fn update(machine: &str, carrier: &str) -> anyhow::Result<()> {
    let report = json(&["update", machine, "--carrier", carrier, "--timeout", "60s"])?;
    ensure!(report["outcome"] == "updated", "by {carrier}: {report}");
    println!("updated by {carrier} in {} us", report["pause_us"]);
    Ok(())
}

/// Waits until there is what is looked for.
pub(crate) fn wait_for<T>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(begun.elapsed() < patience, "{what} does not come in {} s", patience.as_secs());
        thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until a machine's reference guest has counted so much more, and gives its count.
pub(crate) fn wait_ticks(machine: &str, more: u64) -> anyhow::Result<u64> {
    let from = number(&status(machine)?, "ticks")?;
    wait_for("another tick", PATIENCE, || {
        let ticks = number(&status(machine)?, "ticks")?;
        Ok((ticks >= from + more).then_some(ticks))
    })
}

/// Kills a process, and waits for its end.
pub(crate) fn kill(pid: u64) -> anyhow::Result<()> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no number of a process")?;
    rustix::process::kill_process(number, Signal::KILL).with_context(|| format!("cannot kill {pid}"))?;
    wait_for("the end of a process", PATIENCE, || {
        // Orphans come to the first process.
        let _ = rustix::process::waitpid(Some(number), WaitOptions::NOHANG);
        Ok((!is_alive(pid)).then_some(()))
    })
}

/// Sends a process a signal.
pub(crate) fn signal(pid: u64, signal: Signal) -> anyhow::Result<()> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no number of a process")?;
    rustix::process::kill_process(number, signal).with_context(|| format!("cannot signal {pid}"))
}

/// A process that is stopped as long as this lives.
pub(crate) struct Stopped {
    pid: u64,
}

impl Stopped {
    pub(crate) fn new(pid: u64) -> anyhow::Result<Self> {
        signal(pid, Signal::STOP)?;
        Ok(Self { pid })
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have been killed.
        let _ = signal(self.pid, Signal::CONT);
    }
}

/// Whether there is such a process, and not only what is left of one.
pub(crate) fn is_alive(pid: u64) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// The last lines of all machines' logs.
pub(crate) fn logs() -> String {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return String::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths
        .filter(|path| path.extension() == Some("log".as_ref()))
        .fold(String::new(), |text, path| text + &log(&path))
}

fn log(path: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let skipped = text.lines().count().saturating_sub(LAST_LINES);
    text.lines().skip(skipped).fold(String::new(), |mut shown, line| {
        // A string takes whatever is written to it.
        let _ = writeln!(shown, "{}: {line}", path.display());
        shown
    })
}

/// A verb that goes on. It ends with this.
pub(crate) struct Started {
    child: Child,
    said: Lines,
    complained: Lines,
}

type Lines = Arc<Mutex<Vec<String>>>;

/// The lines of a pipe, as they come.
fn lines(output: impl Read + Send + 'static) -> Lines {
    let said = Lines::default();
    thread::spawn({
        let said = Arc::clone(&said);
        move || {
            let mut lines = BufReader::new(output).split(b'\n');
            while let Some(Ok(line)) = lines.next() {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                said.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        }
    });
    said
}

fn so_far(lines: &Lines) -> Vec<String> {
    lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

impl Started {
    pub(crate) fn new(arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = command(arguments);
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("cannot start a verb")?;
        let said = lines(child.stdout.take().context("a verb has no output")?);
        let complained = lines(child.stderr.take().context("a verb has no output")?);
        Ok(Self { child, said, complained })
    }

    /// The whole lines that it has said so far.
    pub(crate) fn said(&self) -> Vec<String> {
        so_far(&self.said)
    }

    /// The whole lines that it has complained of so far.
    pub(crate) fn complained(&self) -> Vec<String> {
        so_far(&self.complained)
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u64 {
        self.child.id().into()
    }

    /// How it ends by itself.
    pub(crate) fn code(&mut self) -> anyhow::Result<Option<i32>> {
        Ok(wait_for("a verb's end", 3 * PATIENCE, || Ok(self.child.try_wait()?))?.code())
    }

    /// Waits until it ends by itself.
    pub(crate) fn wait(mut self) -> anyhow::Result<Vec<String>> {
        let status = wait_for("a verb's end", PATIENCE, || Ok(self.child.try_wait()?))?;
        if !status.success() {
            bail!("it ended: {status}; it said {:?}", self.said());
        }
        Ok(self.said())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
