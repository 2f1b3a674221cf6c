//! Machines that are found by their paths: after a kexec, and after the death of a VMM that nobody else kept.

use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use ::vmm::Brings;
use ::vmm::Hold;
use ::vmm::control::Answer;
use ::vmm::control::Client;
use ::vmm::control::Request;
use anyhow::Context as _;
use anyhow::bail;
use anyhow::ensure;
use custody::Kept;
use custody::When;
use path::Found;
use socket::Program;

use crate::machines;
use crate::progress::Bar;

/// How long a holder may take to look at a machine.
const LOOK: Duration = Duration::from_secs(60);

/// A machine that was found, and where.
pub(crate) struct Place {
    pub(crate) path: PathBuf,
    found: Found,
}

impl Place {
    /// The machine's name, as its last VMM noted it.
    pub(crate) fn name(&self) -> &str {
        &self.found.note().machine
    }
}

/// Every machine at these paths: each a file, a device, or a directory of files. What cannot be looked at is an error of its own.
pub(crate) fn find(paths: &[PathBuf]) -> anyhow::Result<Vec<(PathBuf, anyhow::Result<Place>)>> {
    let mut all = Vec::new();
    for path in paths {
        let path = std::path::absolute(path)?;
        let there = fs::metadata(&path).with_context(|| format!("cannot look at {}", path.display()))?;
        if !there.is_dir() {
            all.push((path.clone(), look(&path)));
            continue;
        }
        let files = fs::read_dir(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut files: Vec<PathBuf> =
            files.flatten().map(|entry| entry.path()).filter(|file| is_place(file)).collect();
        files.sort();
        all.extend(files.into_iter().map(|file| (file.clone(), look(&file))));
    }
    Ok(all)
}

/// A file, or by its name a devdax device: in a directory of devices no other is to be touched.
fn is_place(path: &Path) -> bool {
    let is_dax = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"dax"));
    fs::symlink_metadata(path).is_ok_and(|it| it.is_file() || (is_dax && it.file_type().is_char_device()))
}

fn look(path: &Path) -> anyhow::Result<Place> {
    let found = path::find(path)?.with_context(|| format!("no machine lies at {}", path.display()))?;
    machines::check_name(&found.note().machine)
        .with_context(|| format!("the name of the machine at {}", path.display()))?;
    Ok(Place { path: path.to_owned(), found })
}

/// Has a process hold the machine, and that have it run on if its state is complete to the last instant. `when` is when what was done for
/// it in this life of the host.
pub(crate) fn resume(place: Place, when: &When, program: Option<&Path>, bar: &Bar) -> anyhow::Result<Answer> {
    let name = place.name();
    let kept = place.found.keep(when.clone())?;
    let directory = machines::make_directory()?;
    let died = match place.found.is_of_another_boot()? {
        true => "of the kernel before this one".to_owned(),
        false => format!("that had the machine at {}", place.path.display()),
    };
    let hold = Hold {
        name: name.to_owned(),
        socket: machines::socket(&directory, name),
        when: when.clone(),
        program: program.map(std::path::absolute).transpose()?,
        log: Some(directory.join(format!("{name}.log"))),
        brings: Brings::Remains { vcpus: 0, origin: kept.origin(), died },
        stored: None,
    };
    let holder = hold_it(&hold, &kept)?;
    bar.say("starting the guest");
    let request = Request::Revive { program: None };
    let answer = holder.ask(&request, &mut |what, done, of| bar.at(&format!("{name}: {what}"), done, of));
    bar.done();
    answer
}

/// Starts a process that holds it. From then on it has it, whatever becomes of this one.
fn hold_it(hold: &Hold, kept: &Kept) -> anyhow::Result<Client> {
    ensure!(
        machines::connect(&hold.name).is_err(),
        "a machine {} is there already: stop that one first, or run this one from another directory (TIDEOVER_DIR)",
        hold.name
    );
    let log = machines::log(&machines::make_directory()?, &hold.name)?;
    let words = ["vmm", "--detach", "hold"];
    let (channel, started) = Program::this()?.start_with(words, Stdio::null(), log.into())?;
    ::vmm::await_ready(&channel)?;
    let note = kept.note_file();
    let fds: Vec<_> = [note.as_fd()].into_iter().chain(kept.regions()).collect();
    ::vmm::give(&channel, hold, &fds)?;
    let client = Client::new(channel).with_patience(LOOK);
    match client.answer(&mut |_, _, _| {})? {
        Answer::Held(_) => started.let_go(),
        other => bail!("unexpected answer of a holder: {other:?}"),
    }
    Ok(client)
}
