//! The campaign: tries one after another, by several workers, until there were enough.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use terminal::Signals;
use vmm::control::GuestKind;

use crate::attempt::attempt;
use crate::attempt::place_of;
use crate::choice;
use crate::choice::Carrier;
use crate::choice::Try;
use crate::machine::Machine;
use crate::process;
use crate::record::Outcome;
use crate::record::Record;
use crate::record::Results;
use crate::record::Totals;

/// What campaign.
#[derive(Debug, Clone)]
pub struct Options {
    /// All choices follow from it.
    pub seed: u64,
    /// Ends when so many processes were killed, earlier runs included.
    pub kills: Option<u64>,
    /// Ends after so long.
    pub span: Option<Duration>,
    /// Where results are appended, and where those of earlier runs are.
    pub results: Option<PathBuf>,
    /// Of one carrier alone.
    pub carrier: Option<Carrier>,
    /// The guest.
    pub guest: GuestKind,
    /// This try alone, over and over.
    pub only: Option<u64>,
    /// Tries under way at a time; at least two, one for each kind of machine.
    pub jobs: u64,
}

/// Runs it; each try goes to `progress` with what all come to so far.
///
/// # Errors
/// If machines cannot be made, or results not be kept.
pub fn run(options: &Options, progress: &mut dyn FnMut(&Record, &Totals)) -> anyhow::Result<Totals> {
    process::adopt_orphans()?;
    let signals = Signals::hold().context("cannot hold signals back")?;
    let mut totals = Totals::of_places(choice::spots().len());
    let mut done = BTreeSet::new();
    let mut results = None;
    if let Some(path) = &options.results {
        let (file, records) = Results::open(path, options.seed)?;
        for record in &records {
            totals.add(record);
            done.insert(record.index);
        }
        results = Some(file);
    }
    let end = options.span.map(|span| Instant::now() + span);
    let is_over = AtomicBool::new(false);
    let (sender, records) = mpsc::channel();
    thread::scope(|scope| {
        let is_over = &is_over;
        // However this ends, the workers do.
        let _over = Over(is_over);
        for worker in 0..options.jobs.max(2) {
            let (sender, done) = (sender.clone(), &done);
            scope.spawn(move || work(options, worker, done, is_over, &sender));
        }
        drop(sender);
        loop {
            process::reap();
            let asked_to_end = signals.take().is_some();
            if asked_to_end || end.is_some_and(|end| end <= Instant::now()) {
                is_over.store(true, Ordering::Relaxed);
            }
            let record: Record = match records.recv_timeout(Duration::from_millis(20)) {
                Ok(record) => record?,
                Err(mpsc::RecvTimeoutError::Timeout) => continue,
                Err(mpsc::RecvTimeoutError::Disconnected) => return anyhow::Ok(()),
            };
            results.as_mut().map_or(Ok(()), |results| results.append(&record))?;
            totals.add(&record);
            progress(&record, &totals);
            if options.kills.is_some_and(|kills| totals.kills >= kills) {
                is_over.store(true, Ordering::Relaxed);
            }
        }
    })?;
    process::reap();
    Ok(totals)
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Does every try that is this worker's, on machines of one kind.
fn work(
    options: &Options,
    worker: u64,
    done: &BTreeSet<u64>,
    is_over: &AtomicBool,
    sender: &mpsc::Sender<anyhow::Result<Record>>,
) {
    let walk = choice::walk(options.seed);
    let workers = options.jobs.max(2) & !1;
    let mut machine = None;
    let mine = (0..).map(|turn: u64| turn * workers + worker).filter(|index| !done.contains(index));
    for index in mine {
        if is_over.load(Ordering::Relaxed) || worker >= workers {
            return;
        }
        let chosen = choice::choose(options.seed, &walk, options.only.unwrap_or(index));
        if options.carrier.is_some_and(|carrier| carrier != chosen.carrier) {
            continue;
        }
        let record = one(options, &chosen, &mut machine);
        let has_failed = record.is_err();
        if sender.send(record).is_err() || has_failed {
            return;
        }
    }
}

fn one(options: &Options, chosen: &Try, machine: &mut Option<Machine>) -> anyhow::Result<Record> {
    let begun = Instant::now();
    let there = machine.take().filter(|there| there.keeper.is_some() == chosen.kept);
    let mut there = match there {
        Some(there) => there,
        None => Machine::make(options.guest, chosen.vcpus, chosen.kept)?,
    };
    let found = attempt(&mut there, chosen);
    if matches!(found.outcome, Outcome::WentThrough | Outcome::RolledBack | Outcome::Recovered) {
        *machine = Some(there);
    }
    let (actor, place, after_us) = place_of(chosen);
    Ok(Record {
        index: chosen.index,
        seed: options.seed,
        carrier: chosen.carrier,
        guest: options.guest,
        vcpus: chosen.vcpus,
        kept: chosen.kept,
        starts: chosen.starts,
        fault: chosen.fault,
        whom: chosen.whom,
        actor,
        place,
        after_us,
        kills: found.kills,
        stops: found.stops,
        outcome: found.outcome,
        ran_on: found.ran_on,
        pause_us: found.pause_us,
        pages_checked: found.memory.pages_checked,
        pages_lost: found.memory.pages_lost,
        guest_errors: found.memory.guest_errors,
        registers_lost: found.memory.registers_lost,
        ticks_miscounted: found.memory.ticks_miscounted,
        owners: found.owners,
        took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        note: found.note,
    })
}
