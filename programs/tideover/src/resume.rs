//! Machines that stand still run on: after a pause, or after a kexec.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::process::Stdio;

use ::kexec::Index;
use ::kexec::IndexError;
use ::kexec::Listed;
use ::kexec::When;
use ::vmm::Hold;
use ::vmm::control::Answer;
use ::vmm::control::Client;
use ::vmm::control::KexecReport;
use ::vmm::control::Request;
use anyhow::Context as _;
use anyhow::bail;
use liveupdate::Device;
use liveupdate::FindError;
use liveupdate::Incoming;
use machine::SessionName;
use socket::Program;

use crate::cli;
use crate::kexec::open_device;
use crate::machines;
use crate::progress::Bar;
use crate::report;
use crate::verbs;

/// A machine could not run, and is held.
const HELD: u8 = 6;
/// Where it is written down which machines came through a kexec and are still to be had of the kernel, in the directory of
/// this user's machines.
const PENDING: &str = "kexec.json";

pub(crate) fn resume(arguments: &cli::Resume) -> anyhow::Result<ExitCode> {
    let mut when = When::default();
    when.now("resume");
    let Some(name) = &arguments.name else { return all(arguments, when) };
    match machines::connect(name) {
        Ok(client) => match verbs::ask(&client, &Request::Status)? {
            Answer::Held(_) => revive(name, &client, arguments),
            _ => {
                let machine = cli::Machine { name: name.clone(), json: arguments.json };
                verbs::change(&machine, &Request::Resume)
            }
        },
        Err(error) if error.is::<machines::NoMachine>() => one(name, arguments, when, error),
        Err(error) => Err(error),
    }
}

/// A machine that is held is tried again.
fn revive(name: &str, client: &Client, arguments: &cli::Resume) -> anyhow::Result<ExitCode> {
    let bar = Bar::new();
    bar.say("starting the guest");
    let request = Request::Revive { program: arguments.program.clone() };
    let answer = client.ask(&request, &mut |what, done, of| bar.at(what, done, of));
    bar.done();
    end(vec![(name.to_owned(), answer)], arguments)
}

/// A machine that the kernel has, if it does. `absent` says that there is none.
fn one(name: &str, arguments: &cli::Resume, when: When, absent: anyhow::Error) -> anyhow::Result<ExitCode> {
    // Without the device no machine can have come through a kexec.
    let Ok(device) = open_device() else { return Err(absent) };
    let mut pending = Pending::read(&device)?;
    match begin(&device, name, &pending, when, arguments.program.clone()) {
        Ok(begun) => {
            pending.listed.machines.retain(|other| other != name);
            pending.write()?;
            end(await_all(vec![begun]), arguments)
        }
        Err(error) if matches!(error.downcast_ref(), Some(FindError::Absent { .. })) => Err(absent),
        Err(error) => Err(error),
    }
}

fn all(arguments: &cli::Resume, when: When) -> anyhow::Result<ExitCode> {
    let device = open_device()?;
    let mut pending = Pending::read(&device)?;
    if pending.listed.machines.is_empty() {
        complain!("tideover: no machine came through a kexec, or all were resumed");
    }
    let mut begun = Vec::new();
    let mut failed = Vec::new();
    for name in pending.listed.machines.clone() {
        match begin(&device, &name, &pending, when.clone(), arguments.program.clone()) {
            Ok(holder) => begun.push(holder),
            Err(error) => failed.push((name, Err(error))),
        }
    }
    pending.listed.machines = failed.iter().map(|(name, _)| name.clone()).collect();
    pending.write()?;
    drop(device);
    let mut ended = await_all(begun);
    ended.extend(failed);
    end(ended, arguments)
}

/// Machines that came through a kexec, and are still the kernel's.
struct Pending {
    file: PathBuf,
    listed: Listed,
}

impl Pending {
    fn read(device: &Device) -> anyhow::Result<Self> {
        let file = machines::make_directory()?.join(PENDING);
        let listed = match Index::retrieve(device) {
            Ok(listed) => {
                let pending = Self { file, listed };
                // It is not to be had of the kernel again.
                pending.write()?;
                return Ok(pending);
            }
            Err(IndexError::Find(FindError::Absent { .. })) => match fs::read(&file) {
                Ok(bytes) => serde_json::from_slice(&bytes)
                    .with_context(|| format!("cannot read {}", file.display()))?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Listed::default(),
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot read {}", file.display()));
                }
            },
            // Whoever knows a machine's name can have it all the same.
            Err(error) => {
                complain!("tideover: {:#}; resume the machines by their names", anyhow::Error::new(error));
                Listed::default()
            }
        };
        Ok(Self { file, listed })
    }

    fn write(&self) -> anyhow::Result<()> {
        let cannot = || format!("cannot write {}", self.file.display());
        let new = self.file.with_extension("new");
        fs::write(&new, serde_json::to_vec(&self.listed)?).with_context(cannot)?;
        fs::rename(&new, &self.file).with_context(cannot)
    }
}

/// A machine whose holder was started.
struct Begun {
    name: String,
    holder: Client,
    /// As long as the holder may fail to take it.
    session: Incoming,
}

/// Has a holder started for a machine, and gives it the machine's session.
fn begin(
    device: &Device,
    name: &str,
    pending: &Pending,
    when: When,
    program: Option<PathBuf>,
) -> anyhow::Result<Begun> {
    machines::check_name(name)?;
    let session = SessionName::new(name.as_bytes()).context("the machine's name")?;
    let session = ::kexec::session_name(session)?;
    let directory = machines::make_directory()?;
    let log = machines::log(&directory, name)?;
    // Everything that can fail before, as what is retrieved is retrieved once.
    let own = Program::this()?;
    let (channel, started) = own.start_with(["vmm", "--detach", "hold"], Stdio::null(), log.into())?;
    let session = device.retrieve(&session)?;
    let mut whole = pending.listed.when.clone();
    whole.extend(&when);
    let hold = Hold {
        name: name.to_owned(),
        socket: machines::socket(&directory, name),
        when: whole,
        program,
        log: Some(directory.join(format!("{name}.log"))),
    };
    ::vmm::give(&channel, &hold, &session)?;
    started.let_go();
    Ok(Begun { name: name.to_owned(), holder: Client::new(channel), session })
}

type Ended = (String, anyhow::Result<Answer>);

fn await_all(begun: Vec<Begun>) -> Vec<Ended> {
    let bar = Bar::new();
    let ended = begun.into_iter().map(|Begun { name, holder, session }| {
        let answer = holder.answer(&mut |what, done, of| bar.at(&format!("{name}: {what}"), done, of));
        if answer.is_err() {
            // Nobody has it but this process: it is to be had again as long as that lives, and then not.
            complain!("tideover: {name} is lost: its holder is gone");
        }
        drop(session);
        (name, answer)
    });
    let ended = ended.collect();
    bar.done();
    ended
}

/// Says what became of the machines.
fn end(ended: Vec<Ended>, arguments: &cli::Resume) -> anyhow::Result<ExitCode> {
    let mut reports: Vec<KexecReport> = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for (name, answer) in ended {
        match answer {
            Ok(Answer::Report(Some(report))) => reports.push(*report),
            Ok(Answer::Report(None)) => {
                complain!("tideover: {name} runs, and does not tell how it came here")
            }
            Ok(Answer::Held(held)) => {
                code = ExitCode::from(HELD);
                complain!(
                    "tideover: {name} is held by process {}, and does not run: {}; try `tideover resume {name} --program PATH`",
                    held.pid,
                    held.why
                );
            }
            Ok(other) => bail!("{name}: unexpected answer: {other:?}"),
            Err(error) => {
                code = ExitCode::FAILURE;
                complain!("tideover: {name}: {error:#}");
            }
        }
    }
    report::say(&reports, arguments.json)?;
    Ok(code)
}
