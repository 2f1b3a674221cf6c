//! Machines that stand still run on: after a pause, or after a kexec.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::process::Stdio;
use std::time::Duration;

use ::kexec::Index;
use ::kexec::IndexError;
use ::kexec::Listed;
use ::vmm::Brings;
use ::vmm::Hold;
use ::vmm::control::Answer;
use ::vmm::control::Client;
use ::vmm::control::Request;
use anyhow::Context as _;
use anyhow::bail;
use custody::When;
use fdpass::Channel;
use liveupdate::Device;
use liveupdate::FindError;
use liveupdate::Incoming;
use liveupdate::OpenError;
use liveupdate::moment::Moment;
use machine::SessionName;
use serde::Deserialize;
use serde::Serialize;
use socket::Program;
use socket::Started;

use crate::cli;
use crate::kexec::open_device;
use crate::machines;
use crate::places;
use crate::progress::Bar;
use crate::report;
use crate::report::Done;
use crate::verbs;

/// A machine could not run, and is held.
pub(crate) const HELD: u8 = 6;
/// Where it is written down which machines came through a kexec and are still to be had of the kernel, in the directory of
/// this user's machines.
const PENDING: &str = "kexec.json";
/// How many holders a machine may have, one after another, that die.
const HOLDERS: u32 = 3;
/// How long whoever has a machine may take to say how it is.
const LOOK: Duration = Duration::from_secs(5);

pub(crate) fn resume(arguments: &cli::Resume) -> anyhow::Result<ExitCode> {
    let mut when = When::default();
    when.now("resume");
    if !arguments.path.is_empty() {
        return at_paths(arguments, &when);
    }
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

/// Machines that are found by their paths.
fn at_paths(arguments: &cli::Resume, when: &When) -> anyhow::Result<ExitCode> {
    let bar = Bar::new();
    let (mut ended, mut seen) = (Vec::new(), false);
    for (path, place) in places::find(&arguments.path)? {
        match place {
            Ok(place) if arguments.name.as_deref().is_some_and(|name| name != place.name()) => {}
            Ok(place) => {
                seen = true;
                let name = place.name().to_owned();
                match places::resume(place, when, arguments.program.as_deref(), &bar) {
                    // There was no kexec.
                    Ok(Answer::Report(None)) => complain!("tideover: {name} runs on from where it stood"),
                    answer => ended.push((name, answer)),
                }
            }
            // Beside others it may be anything.
            Err(error) if arguments.path.contains(&path) || arguments.name.is_none() => {
                ended.push((path.display().to_string(), Err(error)));
            }
            Err(_) => {}
        }
    }
    match &arguments.name {
        Some(name) if !seen => bail!("no machine {name} lies there"),
        _ => end(ended, arguments),
    }
}

/// A machine that is held is tried again.
fn revive(name: &str, client: &Client, arguments: &cli::Resume) -> anyhow::Result<ExitCode> {
    let answer = ask_revive(name, client, arguments);
    end(vec![(name.to_owned(), answer)], arguments)
}

fn ask_revive(name: &str, client: &Client, arguments: &cli::Resume) -> anyhow::Result<Answer> {
    let bar = Bar::new();
    bar.say("starting the guest");
    // Its holder looks for it where it lies from there.
    let program = arguments.program.as_deref().map(std::path::absolute).transpose()?;
    let request = Request::Revive { program };
    let answer = client.ask(&request, &mut |what, done, of| bar.at(&format!("{name}: {what}"), done, of));
    bar.done();
    answer
}

/// A machine that the kernel has, if it does. `absent` says that there is none.
fn one(name: &str, arguments: &cli::Resume, when: When, absent: anyhow::Error) -> anyhow::Result<ExitCode> {
    // Without the device no machine can have come through a kexec.
    let device = match open_device() {
        Ok(device) => device,
        Err(OpenError::Absent | OpenError::Denied(_)) => return Err(absent),
        Err(error) => bail!("{absent:#}; nor can the kernel be asked whether it has one: {error}"),
    };
    let mut pending = Pending::read(&device)?;
    let ready = Ready::start(name, &pending.listed, when, arguments.program.clone())?;
    let begun = ready.begin(&device);
    if begun.as_ref().map_or_else(is_final, |_| true) {
        pending.listed.machines.retain(|other| other != name);
        pending.write()?;
    }
    match begun {
        Ok(begun) => {
            drop(device);
            end(await_all(vec![begun]), arguments)
        }
        Err(error) if matches!(error.downcast_ref(), Some(FindError::Absent { .. })) => {
            complain!("tideover: {error}");
            Err(absent)
        }
        Err(error) => Err(error),
    }
}

/// The kernel does not have the machine, or will not give it again in this life.
fn is_final(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(FindError::Absent { .. } | FindError::Taken { .. }))
}

fn all(arguments: &cli::Resume, when: When) -> anyhow::Result<ExitCode> {
    let held = held()?;
    let device = open_device()?;
    let mut pending = Pending::read(&device)?;
    // One that was begun before, by a command that did not get to write so.
    pending.listed.machines.retain(|name| machines::connect(name).is_err());
    let names = pending.listed.machines.clone();
    if names.is_empty() && held.is_empty() {
        complain!("tideover: no machine came through a kexec, or all were resumed");
    }
    // All holders first: they take their time to start, and do so at once.
    let start = |name: &String| Ready::start(name, &pending.listed, when.clone(), arguments.program.clone());
    let ready: Vec<_> = names.iter().map(start).collect();
    let mut begun = Vec::new();
    let mut failed = Vec::new();
    let mut still = Vec::new();
    for (name, ready) in names.into_iter().zip(ready) {
        match ready.and_then(|ready| ready.begin(&device)) {
            Ok(holder) => begun.push(holder),
            Err(error) => {
                if !is_final(&error) {
                    still.push(name.clone());
                }
                failed.push((name, Err(error)));
            }
        }
    }
    pending.listed.machines = still;
    if let Err(error) = pending.write() {
        complain!("tideover: {error:#}");
    }
    drop(device);
    let mut ended = await_all(begun);
    ended.extend(failed);
    ended.extend(held.into_iter().map(|name| {
        let answer = machines::connect(&name).and_then(|client| ask_revive(&name, &client, arguments));
        (name, answer)
    }));
    end(ended, arguments)
}

/// Machines that a holder has already.
fn held() -> anyhow::Result<Vec<String>> {
    let is_held = |name: &String| {
        let client = machines::connect(name).ok()?.with_patience(LOOK);
        Some(matches!(verbs::ask(&client, &Request::Status).ok()?, Answer::Held(_)))
    };
    Ok(machines::names()?.into_iter().filter(|name| is_held(name) == Some(true)).collect())
}

/// Machines that came through a kexec, and are still the kernel's.
pub(crate) struct Pending {
    file: PathBuf,
    listed: Listed,
}

/// What is written down of them.
#[derive(Serialize, Deserialize)]
struct Written {
    /// This life of the host: what was written in another one is over.
    boot: [u8; 16],
    listed: Listed,
}

impl Pending {
    pub(crate) fn read(device: &Device) -> anyhow::Result<Self> {
        let file = machines::make_directory()?.join(PENDING);
        let listed = match Index::retrieve(device) {
            Ok(listed) => {
                let pending = Self { file, listed };
                // It is not to be had of the kernel again.
                pending.write()?;
                return Ok(pending);
            }
            Err(IndexError::Find(FindError::Absent { .. })) => Self::written(&file)?,
            // Whoever knows a machine's name can have it all the same.
            Err(error) => {
                complain!("tideover: {:#}; resume the machines by their names", anyhow::Error::new(error));
                Listed::default()
            }
        };
        Ok(Self { file, listed })
    }

    fn written(file: &Path) -> anyhow::Result<Listed> {
        let cannot = || format!("cannot read {}", file.display());
        let bytes = match fs::read(file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Listed::default()),
            Err(error) => return Err(error).with_context(cannot),
        };
        let written: Written = serde_json::from_slice(&bytes).with_context(cannot)?;
        Ok(if written.boot == boot()? { written.listed } else { Listed::default() })
    }

    fn write(&self) -> anyhow::Result<()> {
        let cannot = || format!("cannot write {}", self.file.display());
        let new = self.file.with_extension("new");
        let written = Written { boot: boot()?, listed: self.listed.clone() };
        fs::write(&new, serde_json::to_vec(&written)?).with_context(cannot)?;
        fs::rename(&new, &self.file).with_context(cannot)
    }

    /// Their names.
    pub(crate) fn into_names(self) -> Vec<String> {
        self.listed.machines
    }
}

/// Which life of the host this is.
fn boot() -> anyhow::Result<[u8; 16]> {
    Ok(Moment::now().context("the kernel does not say which boot this is")?.boot)
}

/// A holder that waits for its machine. Unless it [gets](Ready::begin) it, it ends with this.
struct Ready {
    channel: Channel,
    started: Started,
    hold: Hold,
}

impl Ready {
    /// Starts it. All that can fail does so before the machine is retrieved, which can be done once.
    fn start(name: &str, listed: &Listed, when: When, program: Option<PathBuf>) -> anyhow::Result<Self> {
        machines::check_name(name)?;
        let directory = machines::make_directory()?;
        let mut whole = listed.when.clone();
        whole.extend(&when);
        let hold = Hold {
            name: name.to_owned(),
            socket: machines::socket(&directory, name),
            when: whole,
            // It is looked for from elsewhere.
            program: program.as_deref().map(std::path::absolute).transpose()?,
            log: Some(directory.join(format!("{name}.log"))),
            brings: Brings::Session,
            stored: None,
        };
        Self::again(hold)
    }

    /// Another one.
    fn again(hold: Hold) -> anyhow::Result<Self> {
        let log = machines::log(&machines::make_directory()?, &hold.name)?;
        let words = ["vmm", "--detach", "hold"];
        let (channel, started) = Program::this()?.start_with(words, Stdio::null(), log.into())?;
        Ok(Self { channel, started, hold })
    }

    /// Gives it its machine.
    fn begin(self, device: &Device) -> anyhow::Result<Begun> {
        let session = ::kexec::session_name(SessionName::new(self.hold.name.as_bytes())?)?;
        // What ends this command's process group does not end the holder any more.
        ::vmm::await_ready(&self.channel)?;
        let session = device.retrieve(&session)?;
        match self.give(&session) {
            Ok((holder, hold)) => Ok(Begun { hold, holder, session }),
            // As long as this process has the session, another holder can have it.
            Err((error, hold)) => {
                complain!("tideover: {}: {error:#}; it is tried again", hold.name);
                let ready = Self::again(hold)?;
                ::vmm::await_ready(&ready.channel)?;
                let (holder, hold) = ready.give(&session).map_err(|(error, _)| error)?;
                Ok(Begun { hold, holder, session })
            }
        }
    }

    fn give(self, session: &Incoming) -> Result<(Client, Hold), (anyhow::Error, Hold)> {
        match ::vmm::give(&self.channel, &self.hold, &[session.as_fd()]) {
            Ok(()) => {
                self.started.let_go();
                Ok((Client::new(self.channel), self.hold))
            }
            Err(error) => Err((error, self.hold)),
        }
    }
}

/// A machine whose holder was started.
struct Begun {
    hold: Hold,
    holder: Client,
    /// As long as the holder may fail: the machine is lost with the last descriptor of it.
    session: Incoming,
}

impl Begun {
    /// What becomes of it. A holder that dies is followed by another one.
    fn answer(self, bar: &Bar) -> anyhow::Result<Answer> {
        let Self { hold, mut holder, session } = self;
        let name = hold.name.clone();
        for _ in 0..HOLDERS {
            let answer = holder.answer(&mut |what, done, of| bar.at(&format!("{name}: {what}"), done, of));
            let Err(error) = answer else { return answer };
            complain!("tideover: {name}: its holder is gone: {error:#}; another one is started");
            let ready = Ready::again(hold.clone())?;
            ::vmm::await_ready(&ready.channel)?;
            (holder, _) = ready.give(&session).map_err(|(error, _)| error)?;
        }
        // Nobody has it but this process, which is about to end.
        bail!("it is lost: one holder after another has died")
    }
}

type Ended = (String, anyhow::Result<Answer>);

fn await_all(begun: Vec<Begun>) -> Vec<Ended> {
    let bar = Bar::new();
    let ended = begun.into_iter().map(|begun| (begun.hold.name.clone(), begun.answer(&bar)));
    let ended = ended.collect();
    bar.done();
    ended
}

/// Says what became of the machines.
fn end(ended: Vec<Ended>, arguments: &cli::Resume) -> anyhow::Result<ExitCode> {
    let mut reports = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for (name, answer) in ended {
        match answer {
            Ok(Answer::Report(Some(report))) => reports.push(Done::Kexec(report)),
            Ok(Answer::Report(None)) => {
                complain!("tideover: {name} runs, and does not tell how it came here")
            }
            Ok(Answer::Held(held)) => {
                code = ExitCode::from(HELD);
                complain!("tideover: {}", verbs::held(&held));
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
