//! `tideover demo`: a guest, its VMM replaced a few times, and the proof that it did not notice.

use std::io::Write as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitCode;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use ::vmm::control::Answer;
use ::vmm::control::CheckReport;
use ::vmm::control::Client;
use ::vmm::control::GuestKind;
use ::vmm::control::MachineSpec;
use ::vmm::control::Pages;
use ::vmm::control::Request;
use ::vmm::control::Source;
use ::vmm::control::Status;
use ::vmm::control::UpdateOutcome;
use ::vmm::control::UpdateReport;
use ::vmm::control::UpdateRequest;
use anyhow::Context as _;
use anyhow::bail;
use fdpass::Channel;
use indicatif::ProgressBar;
use indicatif::ProgressStyle;
use serde::Serialize;
use socket::Timeouts;

use crate::cli;
use crate::size;
use crate::table;

/// Time between two updates, so that the guest is at its ordinary work when the next one comes.
const BETWEEN_UPDATES: Duration = Duration::from_millis(100);

/// What the demo found; its schema is docs/demo.schema.json.
#[derive(Debug, Serialize)]
pub(crate) struct Result {
    pub(crate) guest: GuestKind,
    pub(crate) memory_bytes: u64,
    pub(crate) page_size: u64,
    pub(crate) huge_bytes: u64,
    pub(crate) store: &'static str,
    pub(crate) carrier: &'static str,
    pub(crate) updates: Vec<UpdateReport>,
    pub(crate) pages_checked: u64,
    pub(crate) pages_lost: u64,
    pub(crate) guest_errors: u64,
    pub(crate) time_to_full_speed_us: Option<f64>,
    pub(crate) verified: bool,
    /// Why there are not more huge pages, for people.
    #[serde(skip)]
    pub(crate) huge_refused: Option<i32>,
}

pub(crate) fn demo(arguments: &cli::Demo) -> anyhow::Result<ExitCode> {
    let guest = choose_guest(arguments.guest)?;
    check_memory(arguments.memory)?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut vmm = FirstVmm::start(&program, &spec(arguments, guest))?;
    let result = run(arguments, &vmm.client, &program).map_err(|error| vmm.explain(error))?;
    vmm.stop()?;
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&result)? + "\n",
        false => table::show(&result),
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write the result")?;
    Ok(if result.verified { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn choose_guest(asked: Option<cli::Guest>) -> anyhow::Result<GuestKind> {
    let kvm = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    match (asked, kvm) {
        (Some(cli::Guest::Thread), _) => Ok(GuestKind::Thread),
        (_, Ok(_)) => Ok(GuestKind::Kvm),
        (Some(cli::Guest::Kvm), Err(error)) => {
            bail!("--guest kvm: cannot open /dev/kvm: {error}. Load KVM, or get the right to use it")
        }
        (None, Err(error)) => {
            eprintln!("##################################################################");
            eprintln!("# WARNING: NO KVM. Cannot open /dev/kvm: {error}");
            eprintln!("# A thread plays the guest: memory and hand-over are real, the VM is not.");
            eprintln!("##################################################################");
            Ok(GuestKind::Thread)
        }
    }
}

/// Refuses what the host could only answer by killing the VMM.
fn check_memory(wanted: u64) -> anyhow::Result<()> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib =
        line.and_then(|line| line.trim().strip_suffix("kB")).and_then(|kib| kib.trim().parse::<u64>().ok());
    match kib.map(|kib| kib << 10) {
        Some(available) if available < wanted => bail!(
            "--memory {}: this host has {} of memory available; ask for less",
            size::show(wanted),
            size::show(available & !((1 << 20) - 1))
        ),
        _ => Ok(()),
    }
}

fn spec(arguments: &cli::Demo, guest: GuestKind) -> MachineSpec {
    MachineSpec {
        name: "demo".to_owned(),
        memory_bytes: arguments.memory,
        pages: match arguments.page_size {
            cli::PageSize::Auto | cli::PageSize::Huge => Pages::Huge,
            cli::PageSize::Small => Pages::Small,
        },
        prefault: !arguments.on_demand,
        guest,
    }
}

/// The VMM that makes the machine. It and its successors end when this side of the control channel closes.
struct FirstVmm {
    client: Client,
    process: Child,
}

impl FirstVmm {
    fn start(program: &Path, spec: &MachineSpec) -> anyhow::Result<Self> {
        let (ours, theirs) = Channel::pair()?;
        let process = Command::new(program)
            .args(["vmm", "run", "--spec", &serde_json::to_string(spec)?])
            .stdin(Stdio::from(theirs.into_stdio()))
            .spawn()
            .with_context(|| format!("cannot start the VMM {}", program.display()))?;
        Ok(Self { client: Client::new(ours), process })
    }

    /// Adds how the VMM ended, if the first one did while it was needed.
    fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        std::thread::sleep(Duration::from_millis(50));
        match self.process.try_wait() {
            Ok(Some(status)) if !status.success() => error.context(format!("the VMM ended: {status}")),
            _ => error,
        }
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        match self.client.ask(&Request::Stop, &mut |_, _, _| {})? {
            Answer::Stopped => Ok(()),
            other => bail!("unexpected answer to stop: {other:?}"),
        }
    }
}

impl Drop for FirstVmm {
    fn drop(&mut self) {
        // After an update it has ended long ago; else it ends as its control channel closes, or is made to.
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && matches!(self.process.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn run(arguments: &cli::Demo, client: &Client, program: &Path) -> anyhow::Result<Result> {
    let bar = Bar::new();
    let status = await_status(client, &bar)?;
    let mut updates = Vec::new();
    for number in 1..=arguments.updates {
        std::thread::sleep(BETWEEN_UPDATES);
        bar.say(&format!("update {number} of {}", arguments.updates));
        let last = number == arguments.updates;
        updates.push(update(client, arguments, program.to_owned(), last)?);
    }
    let check = match client.ask(&Request::Check, &mut |what, done, of| bar.at(what, done, of))? {
        Answer::Check(check) => check,
        other => bail!("unexpected answer to check: {other:?}"),
    };
    bar.done();
    Ok(result(&status, updates, &check))
}

/// Waits for the machine to be made; the guest has to have begun its work.
fn await_status(client: &Client, bar: &Bar) -> anyhow::Result<Status> {
    let ask = |bar: &Bar| client.ask(&Request::Status, &mut |what, done, of| bar.at(what, done, of));
    loop {
        match ask(bar)? {
            Answer::Status(Status { failure: Some(why), .. }) => bail!("the guest has failed: {why}"),
            Answer::Status(status) if status.ticks > 0 => return Ok(status),
            Answer::Status(_) => std::thread::sleep(Duration::from_millis(1)),
            other => bail!("unexpected answer to status: {other:?}"),
        }
    }
}

fn update(
    client: &Client,
    arguments: &cli::Demo,
    program: PathBuf,
    probe: bool,
) -> anyhow::Result<UpdateReport> {
    let timeouts = Timeouts::default();
    let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    let request = Request::Update(UpdateRequest {
        successor: Source::Program(program),
        populate: !arguments.no_populate,
        probe,
        timeout_ms: millis(timeouts.hand_over),
        prepare_timeout_ms: millis(timeouts.prepare),
    });
    match client.ask(&request, &mut |_, _, _| {})? {
        Answer::Update(report) => Ok(*report),
        other => bail!("unexpected answer to update: {other:?}"),
    }
}

fn result(status: &Status, updates: Vec<UpdateReport>, check: &CheckReport) -> Result {
    if let Some(bad) = &check.first_bad {
        eprintln!("tideover: the first thing that is wrong: {bad}");
    }
    let all_updated = updates.iter().all(|update| {
        // An update after which the guest has not counted on is none.
        update.outcome == UpdateOutcome::Updated && update.ticks_after > Some(update.ticks_before)
    });
    let whole = check.pages_lost == 0 && check.guest_errors == 0 && check.registers_lost == 0;
    let probe = updates.iter().rev().find_map(|update| update.probe);
    Result {
        guest: status.guest,
        memory_bytes: status.memory_bytes,
        page_size: status.page_size,
        huge_bytes: status.huge_bytes,
        store: "memfd",
        carrier: "socket",
        updates,
        pages_checked: check.pages_checked,
        pages_lost: check.pages_lost,
        guest_errors: check.guest_errors,
        time_to_full_speed_us: probe.map(|probe| probe.time_to_full_speed_us),
        huge_refused: status.huge_refused,
        verified: all_updated && whole && check.pages_checked > 0,
    }
}

/// Progress on standard error, if that is a terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::no_length();
        let style = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {percent}%");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message("starting the guest");
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(bar)
    }

    fn at(&self, what: &str, done: u64, of: u64) {
        self.0.set_length(of);
        self.0.set_position(done);
        self.0.set_message(what.to_owned());
    }

    fn say(&self, what: &str) {
        self.0.set_message(what.to_owned());
    }

    fn done(&self) {
        self.0.finish_and_clear();
    }
}
