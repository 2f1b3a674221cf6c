//! The verbs on machines that have a name.

use std::io::Write as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::process::Stdio;
use std::time::Duration;

use ::vmm::control::Answer;
use ::vmm::control::Client;
use ::vmm::control::Confine;
use ::vmm::control::DeviceKind;
use ::vmm::control::DeviceStatus;
use ::vmm::control::DiskSpec;
use ::vmm::control::End;
use ::vmm::control::GuestKind;
use ::vmm::control::GuestState;
use ::vmm::control::Held;
use ::vmm::control::LinuxSpec;
use ::vmm::control::MachineSpec;
use ::vmm::control::OnOom;
use ::vmm::control::Request;
use ::vmm::control::Source;
use ::vmm::control::Status;
use ::vmm::control::Store;
use ::vmm::control::Then;
use ::vmm::control::UpdateOutcome;
use ::vmm::control::UpdateReport;
use ::vmm::control::UpdateRequest;
use anyhow::Context as _;
use anyhow::anyhow;
use anyhow::bail;
use comfy_table::Table;
use comfy_table::presets;
use fdpass::Deadline;
use fdpass::Pidfd;
use fdpass::ReceiveError;
use serde_json::json;
use socket::Program;
use socket::Timeouts;

use crate::cli;
use crate::cli::NewMachine;
use crate::cli::Run;
use crate::demo;
use crate::first_vmm;
use crate::first_vmm::Begun;
use crate::first_vmm::FirstVmm;
use crate::machines;
use crate::progress::Bar;
use crate::size;
use crate::table;
use crate::time;

/// An update was called off.
const CALLED_OFF: u8 = 4;
/// The guest crashed.
const CRASHED: u8 = 5;
/// How long a VMM may take to say how it is, before it counts as busy.
const LOOK: Duration = Duration::from_secs(2);
/// How long tideoverd may take to have a new machine. It has it in a moment, unless it is stopped.
const KEEP: Duration = Duration::from_secs(5);
/// How long a VMM may take to answer who asks about its machine alone.
const PATIENCE: Duration = Duration::from_secs(5);

/// Writes a result to standard output.
pub(crate) fn say(text: &str) -> anyhow::Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("cannot write the result")
}

pub(crate) fn say_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    say(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Connects to a machine to look at it, not to change it: that takes no longer than a moment.
pub(crate) fn connect_to_look(name: &str) -> anyhow::Result<Client> {
    Ok(machines::connect(name)?.with_patience(PATIENCE))
}

/// Says of a VMM that did not answer in time what may be the matter.
pub(crate) fn explain_silence(name: &str, error: anyhow::Error) -> anyhow::Error {
    let late =
        error.downcast_ref::<ReceiveError>().is_some_and(|error| matches!(error, ReceiveError::TimedOut));
    if !late {
        return error;
    }
    let (process, pid) = match machines::process(name) {
        Some(pid) => (format!("process {pid}"), pid.to_string()),
        None => ("its process is not known".to_owned(), "PID".to_owned()),
    };
    anyhow!(
        "{name}: its VMM ({process}) does not answer within {} s: is it stopped? `kill -CONT {pid}` has it go on. If it is \
         busy, as with an update, try again later",
        PATIENCE.as_secs()
    )
}

/// As [`ask_status`], of who only looks.
pub(crate) fn status_to_look(name: &str) -> anyhow::Result<Status> {
    ask_status(&connect_to_look(name)?).map_err(|error| explain_silence(name, error))
}

pub(crate) fn ask(client: &Client, request: &Request) -> anyhow::Result<Answer> {
    client.ask(request, &mut |_, _, _| {})
}

/// How a machine is that something is to be done to which only one can do that runs.
pub(crate) fn ask_status(client: &Client) -> anyhow::Result<Status> {
    match look(client)? {
        Look::Status(status) => Ok(*status),
        Look::Held(machine) => bail!("{}", held(&machine)),
    }
}

/// How a machine is, that may be held.
pub(crate) enum Look {
    Status(Box<Status>),
    Held(Held),
}

pub(crate) fn look(client: &Client) -> anyhow::Result<Look> {
    match ask(client, &Request::Status)? {
        Answer::Status(status) => Ok(Look::Status(status)),
        Answer::Held(held) => Ok(Look::Held(held)),
        other => bail!("unexpected answer to status: {other:?}"),
    }
}

/// What is to be said of a machine that is held.
pub(crate) fn held(held: &Held) -> String {
    let name = &held.name;
    // It tells of files and of what programs say: nothing of it is to reach a terminal as a command.
    let why: String = held.why.chars().filter(|letter| !letter.is_control()).collect();
    let (since, may) = match (held.left_behind, held.complete) {
        (true, true) => ("its VMM died", format!("`tideover recover {name}` has it run on")),
        (true, false) => (
            "its VMM died",
            format!(
                "`tideover dump {name} FILE` writes its memory down, `tideover recover {name} --else boot` starts its guest from the \
                 beginning"
            ),
        ),
        (false, _) => (
            "a kexec",
            format!("`tideover resume {name}` tries again, with --program PATH by another program"),
        ),
    };
    format!(
        "{name} is held by process {} since {since}, and does not run: {why}; {may}; `tideover stop {name}` gives it up",
        held.pid
    )
}

fn held_json(held: &Held) -> serde_json::Value {
    json!({
        "name": held.name,
        "state": "held",
        "pid": held.pid,
        "why": held.why,
        "since": if held.left_behind { "death" } else { "kexec" },
        "complete": held.complete,
    })
}

pub(crate) fn run(arguments: &Run) -> anyhow::Result<ExitCode> {
    let (Run { new, .. }, name) = (arguments, &arguments.new.name);
    machines::check_name(name)?;
    if machines::connect(name).is_ok() {
        bail!("there is a machine {name} already: stop it first, or take another name");
    }
    // What lies at a path takes what is reserved, or the file system says that there is no room.
    let spec = spec(new, true, arguments.path.is_none())?;
    let path = arguments.path.as_deref().map(absolute).transpose()?;
    let store = if path.is_some() { Store::Path } else { spec.store };
    let spec = MachineSpec { through_kexec: arguments.through_kexec, store, path, ..spec };
    let file = machines::log(&machines::make_directory()?, name)?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let bar = Bar::new();
    let mut vmm = FirstVmm::start(&program, &spec, &new.allow_program, arguments.foreground, Some(file))?;
    let begun = vmm.await_begin(&bar).map_err(|error| vmm.explain(error));
    let begun = begun.with_context(|| format!("cannot start machine {name}"))?;
    let status = match begun {
        Begun::Runs(mut status) => {
            status.kept = await_kept(&machines::directory(), name, &bar);
            status
        }
        Begun::Over(how) => return ended(how),
    };
    bar.done();
    match arguments.json {
        true => say_json(&status)?,
        false => say(&format!("{}\n", sentence(&status)))?,
    }
    let client = vmm.let_go()?;
    if arguments.foreground { ended(client.answer(&mut |_, _, _| {})?) } else { Ok(ExitCode::SUCCESS) }
}

/// Waits until tideoverd keeps the machine, if there is one. Says whether it does.
fn await_kept(directory: &Path, name: &str, bar: &Bar) -> bool {
    let kept = match tideoverd::Client::connect(directory) {
        Ok(None) => return false,
        Ok(Some(client)) => {
            bar.say("waiting for tideoverd");
            client.await_kept(name, KEEP)
        }
        Err(error) => Err(error),
    };
    match kept {
        Ok(true) => return true,
        Ok(false) => {
            complain!("tideover: tideoverd does not have {name} yet: should its VMM die now, it is lost")
        }
        Err(error) => complain!("tideover: {name} is not kept: {error:#}"),
    }
    false
}

/// The machine that is asked for, with a control socket in the directory of this user's machines; what this host cannot have is
/// refused here, unless the machine is there already: it has what it asks for.
pub(crate) fn spec(arguments: &NewMachine, is_new: bool, takes_memory: bool) -> anyhow::Result<MachineSpec> {
    machines::check_name(&arguments.name)?;
    let spec = first_vmm::spec(&arguments.name, &arguments.hardware, is_new, takes_memory)?;
    check_kernel(arguments, &spec)?;
    let directory = machines::make_directory()?;
    Ok(MachineSpec {
        numa: arguments.numa.clone(),
        socket: Some(machines::socket(&directory, &arguments.name)),
        on_power_off: then(arguments.on_power_off),
        on_reset: then(arguments.on_reset),
        on_crash: then(arguments.on_crash),
        disks: arguments.disk.iter().map(|disk| disk_spec(disk)).collect::<Result<_, _>>()?,
        taps: arguments.tap.clone(),
        linux: linux_spec(arguments)?,
        confine: arguments.confine.of_spec(),
        on_oom: match arguments.on_oom {
            cli::OnOom::Keep => OnOom::Keep,
            cli::OnOom::Drop => OnOom::Drop,
        },
        ..spec
    })
}

/// Refuses what this guest does not have.
fn check_kernel(arguments: &NewMachine, spec: &MachineSpec) -> anyhow::Result<()> {
    if arguments.kernel.is_some() && spec.vcpus > 1 {
        bail!("--kernel: a kernel is told of one processor only; leave --vcpus out");
    }
    if spec.guest != GuestKind::Thread {
        return Ok(());
    }
    let asked = [
        ("--kernel", arguments.kernel.is_some()),
        ("--disk", !arguments.disk.is_empty()),
        ("--tap", !arguments.tap.is_empty()),
    ];
    match asked.into_iter().find(|(_, asked)| *asked) {
        Some((what, _)) => bail!("{what} needs --guest kvm: a thread has no devices and starts no kernel"),
        None => Ok(()),
    }
}

/// A path as whoever looks at the machine later understands it.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot tell where {} is", path.display()))
}

fn disk_spec(text: &str) -> anyhow::Result<DiskSpec> {
    let (path, read_only) = text.strip_suffix(",ro").map_or((text, false), |path| (path, true));
    Ok(DiskSpec { path: absolute(path.as_ref())?, read_only })
}

fn linux_spec(arguments: &NewMachine) -> anyhow::Result<Option<LinuxSpec>> {
    let Some(kernel) = &arguments.kernel else { return Ok(None) };
    let initrd = arguments.initrd.as_deref().map(absolute).transpose()?;
    Ok(Some(LinuxSpec { kernel: absolute(kernel)?, initrd, command_line: arguments.cmdline.clone() }))
}

/// What the end of a machine comes to.
pub(crate) fn ended(answer: Answer) -> anyhow::Result<ExitCode> {
    match answer {
        Answer::Stopped | Answer::Ended(End::PowerOff | End::Reset) => Ok(ExitCode::SUCCESS),
        Answer::Ended(end @ End::Crashed(_)) => {
            complain!("tideover: {end}");
            Ok(ExitCode::from(CRASHED))
        }
        Answer::Error(error) => bail!("{error}"),
        other => bail!("not the end of a machine: {other:?}"),
    }
}

fn then(then: cli::Then) -> Then {
    match then {
        cli::Then::Stop => Then::Stop,
        cli::Then::Restart => Then::Restart,
        cli::Then::Keep => Then::Keep,
    }
}

pub(crate) fn state(state: GuestState) -> &'static str {
    match state {
        GuestState::Running => "running",
        GuestState::Paused => "paused",
        GuestState::Ended => "ended",
    }
}

fn sentence(status: &Status) -> String {
    let failure = status.failure.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
    format!(
        "{}: {}{failure}, {}, {}, {} of memory, process {}",
        status.name,
        state(status.state),
        table::guest(status.guest),
        table::vcpus(status.vcpus),
        size::show(status.memory_bytes),
        status.pid
    )
}

/// A machine's name, and how it is.
pub(crate) type Seen = (String, anyhow::Result<Look>);

/// How all machines are.
pub(crate) fn see() -> anyhow::Result<Vec<Seen>> {
    let seen = machines::names()?.into_iter().map(|name| {
        let status = machines::connect(&name).and_then(|client| look(&client.with_patience(LOOK)));
        (name, status)
    });
    Ok(seen.collect())
}

/// The same as JSON.
pub(crate) fn list(seen: &[Seen]) -> anyhow::Result<Vec<serde_json::Value>> {
    let all = seen.iter().map(|(name, status)| match status {
        Ok(Look::Status(status)) => serde_json::to_value(status),
        Ok(Look::Held(held)) => Ok(held_json(held)),
        Err(error) => Ok(json!({ "name": name, "state": silence(error) })),
    });
    Ok(all.collect::<Result<_, _>>()?)
}

pub(crate) fn ls(arguments: &cli::Ls) -> anyhow::Result<ExitCode> {
    let found = see()?;
    if arguments.json {
        say_json(&list(&found)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    if found.is_empty() {
        say_none();
        return Ok(ExitCode::SUCCESS);
    }
    let mut shown = Table::new();
    shown.load_style(presets::UTF8_BORDERS_ONLY);
    shown.set_header(["name", "state", "process", "memory", "updates", "age", "kept"]);
    for (name, status) in &found {
        let none = || "-".to_owned();
        shown.add_row(match status {
            Ok(Look::Status(status)) => [
                name.clone(),
                state(status.state).to_owned(),
                status.pid.to_string(),
                size::show(status.memory_bytes),
                status.updates.to_string(),
                time::show(status.age_ms),
                if status.kept { "yes" } else { "no" }.to_owned(),
            ],
            Ok(Look::Held(held)) => {
                [name.clone(), "held".to_owned(), held.pid.to_string(), none(), none(), none(), none()]
            }
            Err(error) => [name.clone(), silence(error).to_owned(), none(), none(), none(), none(), none()],
        });
    }
    say(&format!("{shown}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// Says that there are no machines.
pub(crate) fn say_none() {
    complain!("tideover: no machines in {}", machines::directory().display());
}

/// What a machine is that does not answer.
pub(crate) fn silence(error: &anyhow::Error) -> &'static str {
    if error.is::<machines::NoMachine>() { "dead" } else { "busy" }
}

pub(crate) fn status(arguments: &cli::Status) -> anyhow::Result<ExitCode> {
    let machine = &arguments.machine;
    let client = connect_to_look(&machine.name)?;
    let status = match look(&client).map_err(|error| explain_silence(&machine.name, error))? {
        Look::Status(status) => status,
        Look::Held(machine) if arguments.machine.json => {
            say_json(&held_json(&machine))?;
            return Ok(ExitCode::SUCCESS);
        }
        Look::Held(machine) => {
            say(&format!("{}\n", held(&machine)))?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    if machine.json {
        say_json(&status)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = format!("{}\n", sentence(&status));
    let died = match status.recoveries {
        0 => String::new(),
        times => format!(", recovered {times} times"),
    };
    text +=
        &format!("  age        {}, VMM replaced {} times{died}\n", time::show(status.age_ms), status.updates);
    text += &format!(
        "  memory     {}, pages of {} asked for, {} mapped in huge ones\n",
        demo::store_name(status.store),
        size::show(status.page_size),
        size::show(status.huge_bytes)
    );
    if let Some(path) = &status.path {
        let lives =
            if status.through_kexec { ", which a kexec leaves alone" } else { ", until this kernel ends" };
        text += &format!("  path       {}{lives}\n", path.display().to_string().escape_debug());
    }
    text += &format!("  identity   {}\n", status.identity);
    let kept = match (status.kept, status.stored) {
        _ if status.path.is_some() => "found by its path should its VMM die",
        (_, true) => "the service manager: kept over a restart of its unit, and against the death of its VMM",
        (true, false) => "kept against the death of its VMM",
        (false, false) => "lost should its VMM die",
    };
    text += &format!("  keeper     {kept}\n");
    match status.confined {
        Confine::No => {}
        Confine::Deny => text += "  confined   other system calls fail\n",
        Confine::Kill => text += "  confined   another system call ends it\n",
    }
    if let (Some(ticks), Some(passes), Some(errors)) = (status.ticks, status.passes, status.errors) {
        text +=
            &format!("  guest      {ticks} ticks, {passes} passes over its memory, {errors} errors found\n");
    }
    for device in &status.devices {
        text += &format!("  {:<10} {}\n", device.name, describe(device));
        if let Some(fault) = &device.fault {
            text += &format!("  {:<10} {}\n", "", fault.escape_debug());
        }
    }
    if status.consoles > 0 {
        text += &format!("  consoles   {} attached\n", status.consoles);
    }
    say(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// What a device is, in a few words.
fn describe(device: &DeviceStatus) -> String {
    let backend = device.backend.as_deref().unwrap_or_default().escape_debug();
    match device.kind {
        DeviceKind::Serial => "16550A at port 0x3f8: see `tideover console`".to_owned(),
        DeviceKind::Power => "power off and reset".to_owned(),
        DeviceKind::Disk => {
            let only = if device.read_only == Some(true) { ", read-only" } else { "" };
            format!("virtio disk, {} of {backend}{only}", size::show(device.size_bytes.unwrap_or_default()))
        }
        DeviceKind::Net => {
            let dropped = device.dropped.unwrap_or_default();
            format!("virtio network card at {backend}, {dropped} frames dropped")
        }
    }
}

pub(crate) fn update(arguments: &cli::Update) -> anyhow::Result<ExitCode> {
    let client = machines::connect(&arguments.name)?;
    let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    let request = UpdateRequest {
        successor: arguments.program.clone().map_or(Source::Own, Source::Program),
        carrier: arguments.carrier.of_request(),
        populate: !arguments.no_populate,
        probe: false,
        timeout_ms: millis(arguments.timeout),
        prepare_timeout_ms: millis(Timeouts::default().prepare),
    };
    let bar = Bar::new();
    bar.say("updating");
    let answer = match ask_status(&client)?.confined {
        Confine::No => ask(&client, &Request::Update(request))?,
        _ if arguments.carrier == cli::Carrier::Exec => {
            bail!(
                "{} is confined: its VMM cannot execute anything, so --carrier exec cannot be",
                arguments.name
            )
        }
        confined => start_and_ask(&client, arguments, confined, request)?,
    };
    let report = match answer {
        Answer::Update(report) => report,
        other => bail!("unexpected answer to update: {other:?}"),
    };
    bar.done();
    match arguments.json {
        true => say_json(&report)?,
        false => say(&told(&arguments.name, &report))?,
    }
    Ok(match report.outcome {
        UpdateOutcome::Updated => ExitCode::SUCCESS,
        UpdateOutcome::RolledBack => ExitCode::from(CALLED_OFF),
    })
}

/// Starts the next VMM of a machine whose own one can start nothing, and has that one hand over.
fn start_and_ask(
    client: &Client,
    arguments: &cli::Update,
    confined: Confine,
    request: UpdateRequest,
) -> anyhow::Result<Answer> {
    let path =
        arguments.program.clone().map_or_else(Program::this_path, Ok).context("cannot find this program")?;
    let program = Program::open(&path, std::slice::from_ref(&path))?;
    let log = machines::log(&machines::directory(), &arguments.name)?;
    let words = ["vmm"].into_iter().chain(first_vmm::flags(true, confined)).chain(["succeed"]);
    // Our own output is not its to hold open.
    let (channel, mut started) = program.start_with(words, Stdio::null(), log.into())?;
    let answer = client.ask_update_to(channel, request, &mut |_, _, _| {});
    match &answer {
        Ok(Answer::Update(report)) if report.outcome == UpdateOutcome::RolledBack => {
            if let Some(status) = started.ended(Duration::from_millis(100)) {
                complain!("tideover: {} ended by itself: {status}", path.display());
            }
        }
        // Where there is no answer it may run the guest. If it does not it ends by itself.
        _ => started.let_go(),
    }
    answer
}

pub(crate) fn told(name: &str, report: &UpdateReport) -> String {
    let pause = |us: Option<f64>| match us {
        Some(us) => format!("the guest stood still for {}", table::millis(us)),
        None => "the guest did not stand still for it".to_owned(),
    };
    let reason = report.reason.as_deref().unwrap_or("no reason given");
    match (report.outcome, report.successor_pid) {
        (UpdateOutcome::Updated, Some(successor)) => {
            let aside = report.aside_us.map(|us| format!(", after {} to step aside", table::millis(us)));
            let seen = report.guest_pause_us.map(|us| format!(" ({} as it saw it)", table::millis(us)));
            let pause = match (report.pause_us, &report.reason) {
                (None, Some(reason)) => reason.clone(),
                (us, _) => pause(us),
            };
            let processes = match report.predecessor_pid {
                same if same == successor => format!("in process {same}"),
                before => format!("from process {before} to {successor}"),
            };
            let (seen, aside) = (seen.unwrap_or_default(), aside.unwrap_or_default());
            format!("{name}: updated {processes}; {pause}{seen}{aside}\n")
        }
        _ => format!(
            "{name}: NOT updated, and runs on in process {}: {reason}; {}\n",
            report.predecessor_pid,
            pause(report.pause_us)
        ),
    }
}

pub(crate) fn pause(arguments: &cli::Pause) -> anyhow::Result<ExitCode> {
    change(&arguments.machine, &Request::Pause)
}

/// Has a machine do something, and says how it is then.
pub(crate) fn change(machine: &cli::Machine, request: &Request) -> anyhow::Result<ExitCode> {
    let client = machines::connect(&machine.name)?;
    match ask(&client, request)? {
        Answer::Paused | Answer::Resumed => {}
        Answer::Held(machine) => bail!("{}", held(&machine)),
        other => bail!("unexpected answer to {request:?}: {other:?}"),
    }
    let status = ask_status(&client)?;
    match machine.json {
        true => say_json(&status)?,
        false => say(&format!("{}\n", sentence(&status)))?,
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn stop(arguments: &cli::Stop) -> anyhow::Result<ExitCode> {
    let machine = &arguments.machine;
    let client = machines::connect(&machine.name)?;
    let (name, pid) = match look(&client)? {
        Look::Status(status) => (status.name, status.pid),
        Look::Held(held) => (held.name, held.pid),
    };
    let process = Pidfd::of_number(pid);
    match ask(&client, &Request::Stop)? {
        Answer::Stopped => {}
        other => bail!("unexpected answer to stop: {other:?}"),
    }
    let bar = Bar::new();
    bar.say("waiting for the memory to be freed");
    // Without a descriptor of the process, the end of the connection comes close.
    match process {
        Ok(process) => process.wait_exit(Deadline::never()).context("the VMM does not end")?,
        Err(_) => client.await_end().context("the VMM does not end")?,
    }
    bar.done();
    match machine.json {
        true => say_json(&json!({ "name": name, "state": "stopped", "pid": pid }))?,
        false => say(&format!("{}: stopped\n", machine.name))?,
    }
    Ok(ExitCode::SUCCESS)
}
