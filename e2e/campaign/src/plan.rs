//! What the processes of a machine are told of the try that is under way, and what they tell: files of a folder that
//! they share.

use std::fs;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context as _;
use machine::update::Step;
use rustix::fs::CWD;
use rustix::fs::FileType;
use rustix::fs::Mode;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vmm::control::MachineSpec;

/// What a process is in an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Actor {
    /// It runs the guest and hands it over.
    Predecessor,
    /// It runs the guest, and has the next program show what it can before it executes it.
    Rehearsal,
    /// It is that next program, and only shows what it can.
    Rehearsed,
    /// It takes the machine over from another process.
    Successor,
    /// It is the next program, executed by the process that ran the guest.
    Next,
    /// It is the program before, executed again since the next one failed.
    Back,
}

impl Actor {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Predecessor => "predecessor",
            Self::Rehearsal => "rehearsal",
            Self::Rehearsed => "rehearsed",
            Self::Successor => "successor",
            Self::Next => "next",
            Self::Back => "back",
        }
    }

    /// The one of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        [Self::Predecessor, Self::Rehearsal, Self::Rehearsed, Self::Successor, Self::Next, Self::Back]
            .into_iter()
            .find(|actor| actor.name() == name)
    }

    /// The places that it passes in an update, in their order.
    #[must_use]
    pub fn places(self) -> Vec<Place> {
        let steps: &[Step] = match self {
            Self::Predecessor => &[
                Step::Connected,
                Step::Offered,
                Step::Warm,
                Step::Paused,
                Step::Saved,
                Step::Sealed,
                Step::Running,
                Step::Settled,
            ],
            Self::Rehearsal => &[Step::Connected, Step::Offered, Step::Warm],
            Self::Rehearsed => &[Step::Received, Step::Attached, Step::Warm],
            Self::Successor | Self::Next | Self::Back => &[
                Step::Received,
                Step::Attached,
                Step::Warm,
                Step::Claimed,
                Step::Loaded,
                Step::Running,
                Step::Settled,
            ],
        };
        let started = !matches!(self, Self::Predecessor | Self::Rehearsal);
        started
            .then_some(Place::Started)
            .into_iter()
            .chain(steps.iter().map(|step| Place::At(*step)))
            .collect()
    }
}

/// Where a process is in an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Place {
    /// It has done nothing yet.
    Started,
    /// It has reached a step.
    At(Step),
}

impl Place {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::At(step) => step.name(),
        }
    }
}

impl From<Place> for String {
    fn from(place: Place) -> Self {
        place.name().to_owned()
    }
}

impl TryFrom<String> for Place {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        match name.as_str() {
            "started" => Ok(Self::Started),
            name => Step::named(name).map(Self::At).ok_or_else(|| format!("no place: {name:?}")),
        }
    }
}

/// What is done to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// It is killed.
    Kill,
    /// It is stopped, and goes on later.
    Stop,
}

/// A fault at a place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Strike {
    /// Who passes there.
    pub actor: Actor,
    /// Where.
    pub place: Place,
    /// What is done.
    pub fault: Fault,
    /// To whom; to the process that passes, if nobody is named.
    pub victim: Option<u32>,
    /// And to the one that passes as well.
    pub both: bool,
}

/// What the processes of a machine are told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The fault that comes by itself, if one does.
    pub strike: Option<Strike>,
    /// A successor that is started as a process of its own is one of a rehearsal.
    pub rehearsed: bool,
    /// The next program finds that it cannot run the machine: before it has done anything, or when it has claimed it.
    pub next_fails: Option<Place>,
    /// How long a successor waits for its predecessor, in milliseconds.
    pub patience_ms: u64,
}

/// The folder that the processes of a machine share.
#[derive(Debug, Clone)]
pub struct Folder(PathBuf);

impl Folder {
    /// One that is there.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the pipe by which processes tell where they are, and opens it.
    ///
    /// # Errors
    /// If the file system has none.
    pub fn make_events(&self) -> anyhow::Result<File> {
        let path = self.events();
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .context("cannot make a pipe")?;
        // For writing, too: so it never is at its end.
        Ok(File::options().read(true).write(true).open(path)?)
    }

    fn events(&self) -> PathBuf {
        self.0.join("events")
    }

    /// Tells that a process is at a place.
    ///
    /// # Errors
    /// If the pipe is gone.
    pub fn tell(&self, actor: Actor, place: Place) -> anyhow::Result<()> {
        let line = format!("{} {} {}\n", std::process::id(), actor.name(), place.name());
        Ok(File::options().append(true).open(self.events())?.write_all(line.as_bytes())?)
    }

    /// Writes the plan, in one step: a process may read it at any time.
    ///
    /// # Errors
    /// As the file system.
    pub fn write_plan(&self, plan: &Plan) -> anyhow::Result<()> {
        self.write("plan.json", plan)
    }

    /// Reads the plan.
    ///
    /// # Errors
    /// As the file system, or if it is none.
    pub fn plan(&self) -> anyhow::Result<Plan> {
        self.read("plan.json")
    }

    /// Writes what machine to make.
    ///
    /// # Errors
    /// As the file system.
    pub fn write_spec(&self, spec: &MachineSpec) -> anyhow::Result<()> {
        self.write("spec.json", spec)
    }

    /// Reads what machine to make.
    ///
    /// # Errors
    /// As the file system, or if it says of none.
    pub fn spec(&self) -> anyhow::Result<MachineSpec> {
        self.read("spec.json")
    }

    fn write(&self, name: &str, value: &impl Serialize) -> anyhow::Result<()> {
        let new = self.0.join(format!("{name}.new"));
        fs::write(&new, serde_json::to_vec(value)?)?;
        Ok(fs::rename(&new, self.0.join(name))?)
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> anyhow::Result<T> {
        Ok(serde_json::from_slice(&fs::read(self.0.join(name))?)?)
    }
}
