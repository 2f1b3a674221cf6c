//! The daemon's life: it waits for what comes, and does what is due.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use fdpass::Deadline;
use fdpass::systemd::Manager;
use fdpass::systemd::Tell;
use rustix::process::WaitOptions;
use tracing::info;
use tracing::warn;
use vmm::machines;

use crate::Cli;
use crate::agent::Agents;
use crate::closer::Closer;
use crate::entry::Counts;
use crate::entry::Entry;
use crate::entry::Keeping;
use crate::entry::Means;
use crate::holders::Holders;
use crate::limits;
use crate::metrics::Metrics;
use crate::oom::Ends;
use crate::replace;
use crate::watch::Watch;

/// How long the service manager may take to take a message.
const TELL: Duration = Duration::from_secs(5);

/// What the daemon has.
pub(crate) struct Daemon {
    pub(crate) directory: PathBuf,
    pub(crate) entries: BTreeMap<String, Entry>,
    pub(crate) counts: Counts,
    pub(crate) files: u64,
    watch: Watch,
    ends: Ends,
    holders: Holders,
    closer: Closer,
}

/// What rang.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Rang {
    Directory,
    Memory,
    Machine(String),
    Agents(usize),
    Metrics,
}

/// Runs until it is replaced.
pub(crate) fn run(cli: &Cli) -> anyhow::Result<()> {
    rustix::thread::set_name(c"tideoverd").context("cannot take a name")?;
    let files = limits::raise();
    let directory = machines::make_directory()?;
    let metrics = cli.metrics.map(Metrics::bind).transpose()?;
    let mut daemon = Daemon {
        watch: Watch::start(&directory)?,
        ends: Ends::start()?,
        entries: BTreeMap::new(),
        counts: Counts::default(),
        files,
        holders: Holders::new(cli.holders.as_deref())?,
        closer: Closer::start()?,
        directory,
    };
    let mut agents = match cli.replace {
        true => replace::take_over(&mut daemon)?,
        false => Agents::bind(&daemon.directory)?,
    };
    info!(directory = %daemon.directory.display(), files, "keeps machines");
    daemon.look_around();
    say_ready();
    loop {
        let rang = daemon.wait(&agents, metrics.as_ref())?;
        for rang in rang {
            match rang {
                Rang::Directory => {
                    daemon.watch.heard();
                    daemon.look_around();
                }
                Rang::Memory => {
                    daemon.ends.heard();
                    daemon.entries.values_mut().for_each(Entry::look_for_want);
                }
                Rang::Machine(name) => daemon.with(&name, Entry::hear),
                Rang::Metrics => {
                    if let Some(metrics) = &metrics {
                        metrics.serve(&daemon, &agents);
                    }
                }
                Rang::Agents(place) => {
                    if agents.hear(place, &mut daemon) {
                        info!("another tideoverd has all of it");
                        agents.leave();
                        return Ok(());
                    }
                }
            }
        }
        daemon.act();
        agents.act(&daemon);
        // Holders that have ended.
        while matches!(rustix::process::wait(WaitOptions::NOHANG), Ok(Some(_))) {}
    }
}

/// To the service manager, if this is a service: whoever comes from now on is heard.
fn say_ready() {
    let told = Manager::from_environment().and_then(|manager| match manager {
        Some(manager) => manager.tell(&[Tell::Ready], Deadline::after(TELL)),
        None => Ok(()),
    });
    if let Err(error) = told {
        warn!(
            error = &error as &dyn std::error::Error,
            "the service manager does not hear that this is ready"
        );
    }
}

impl Daemon {
    /// Waits until something rings, or is due.
    fn wait(&self, agents: &Agents, metrics: Option<&Metrics>) -> anyhow::Result<Vec<Rang>> {
        let mut fds: Vec<BorrowedFd<'_>> = vec![self.watch.as_fd(), self.ends.as_fd()];
        let mut of = vec![Rang::Directory, Rang::Memory];
        for (name, entry) in &self.entries {
            if let Some(fd) = entry.fd() {
                fds.push(fd);
                of.push(Rang::Machine(name.clone()));
            }
        }
        for (fd, place) in agents.fds().zip(0..) {
            fds.push(fd);
            of.push(Rang::Agents(place));
        }
        if let Some(metrics) = metrics {
            fds.push(metrics.as_fd());
            of.push(Rang::Metrics);
        }
        let soonest = self.entries.values().filter_map(Entry::due).filter_map(Deadline::remaining).min();
        let soonest = [soonest, agents.due().and_then(Deadline::remaining)].into_iter().flatten().min();
        let until = soonest.map_or(Deadline::never(), Deadline::after);
        let ready = fdpass::ready(&fds, until).context("cannot wait for what comes")?;
        Ok(ready.into_iter().map(|place| of[place].clone()).collect())
    }

    fn with(&mut self, name: &str, act: impl FnOnce(&mut Entry, &mut Means<'_>)) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let mut means = Means {
            directory: &self.directory,
            holders: &self.holders,
            closer: &self.closer,
            ends: &self.ends,
            counts: &mut self.counts,
        };
        act(entry, &mut means);
    }

    /// Does what is due, and forgets machines that are over.
    fn act(&mut self) {
        let due = self.entries.values().filter(|entry| entry.due().is_some_and(Deadline::has_passed));
        for name in due.map(|entry| entry.name.clone()).collect::<Vec<_>>() {
            self.with(&name, Entry::act);
        }
        self.entries.retain(|_, entry| !entry.is_over());
    }

    /// Looks for machines in the directory.
    fn look_around(&mut self) {
        match machines::names() {
            Ok(names) => {
                for name in names {
                    self.entries
                        .entry(name)
                        .or_insert_with_key(|name| Entry::found(name.clone()))
                        .look_again();
                }
            }
            Err(error) => warn!(error = &*error, "the directory of machines cannot be read"),
        }
    }

    /// Looks for a machine at once.
    pub(crate) fn look_for(&mut self, name: &str) {
        let entry = self.entries.entry(name.to_owned());
        entry.or_insert_with_key(|name| Entry::found(name.clone())).look_again();
    }

    /// How many machines are kept in each way.
    pub(crate) fn tally(&self, keeping: Keeping) -> usize {
        self.entries.values().filter(|entry| entry.keeping() == keeping).count()
    }

    /// How soon nothing that is here may change hands any more.
    pub(crate) const fn patience() -> Duration {
        Duration::from_secs(10)
    }
}
