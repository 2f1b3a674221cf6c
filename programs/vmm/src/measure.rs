//! What the VMM reads off its guest.

use std::collections::BTreeMap;
use std::time::Duration;
use std::time::Instant;

use fdpass::monotonic_ns;
use machine::update::Guest;
use machine::update::Step;
use machine::update::Timeline;
use pulse::HUGE_PAGE_BYTES;
use pulse::Mailboxes;
use pulse::PAGE_BYTES;
use pulse::Tally;
use pulse::check;
use serde::Deserialize;
use serde::Serialize;
use socket::Report;

use crate::control::CheckReport;
use crate::control::KexecReport;
use crate::control::ProbeReport;
use crate::control::UpdateOutcome;
use crate::control::UpdateReport;
use crate::guest::AnyGuest;
use crate::guest::MemoryWords;
use crate::guest::Served;

/// Windows of 2 MiB that a probe touches.
const PROBE_WINDOWS: u64 = 16;
/// How long the guest may take to count on after an update.
const FIRST_TICK: Duration = Duration::from_secs(10);
/// How long the guest may take to answer a probe.
const PROBE_ANSWER: Duration = Duration::from_secs(60);

/// What the successor's VMM tells its predecessor, for the report.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Told {
    pub(crate) ticks_before: u64,
    pub(crate) entered_ns: Option<u64>,
    pub(crate) ticks_after: Option<u64>,
    pub(crate) guest_pause_us: Option<f64>,
    pub(crate) probe: Option<ProbeReport>,
    /// The guest stood still before, and does after.
    pub(crate) held: bool,
    /// What the way from another kernel took, if it came from one.
    #[serde(default)]
    pub(crate) kexec: Option<KexecReport>,
}

#[expect(clippy::cast_precision_loss, reason = "times of an update are far below 2^52 ns")]
pub(crate) fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

pub(crate) fn micros_of(span: Duration) -> f64 {
    micros(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX))
}

/// Waits until `done` gives something, looking often.
fn wait_for<T>(limit: Duration, mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let begun = Instant::now();
    loop {
        let found = done();
        if found.is_some() || begun.elapsed() > limit {
            return found;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// After an update: have all vCPUs counted on, and how long a gap did the worst of them see? When they were entered is
/// asked once they count: their threads may not have got to it before. Of a guest that is held there is nothing to see.
pub(crate) fn after_update(words: Option<&MemoryWords>, before: Before, runs: Option<&dyn Served>) -> Told {
    let Before { ticks, pauses, probe } = before;
    let ticks_before = ticks.iter().sum();
    let Some(guest) = runs else { return Told { ticks_before, held: true, ..Told::default() } };
    let Some(words) = words else {
        let entered_ns = wait_for(FIRST_TICK, || guest.entered_ns());
        return Told { entered_ns, ..Told::default() };
    };
    let Ok(mailboxes) = words.mailboxes() else { return Told { ticks_before, ..Told::default() } };
    // Two ticks: after the first one it has compared the gap, after the second one it is written.
    let ticks_after = wait_for(FIRST_TICK, || {
        let now = mailboxes.ticks_of_each();
        let all_count_on =
            now.len() == ticks.len() && now.iter().zip(&ticks).all(|(now, then)| *now > then + 1);
        all_count_on.then(|| now.iter().sum())
    });
    let guest_pause_us = longest_pause_ns(&mailboxes, &pauses).map(micros);
    let probe = probe.and_then(|request| probed(words, request));
    let entered_ns = guest.entered_ns();
    Told { ticks_before, entered_ns, ticks_after, guest_pause_us, probe, held: false, kexec: None }
}

/// The longest pause that a vCPU has recorded from its number in `first` on, in nanoseconds by its own clock. Of one that has
/// recorded so many since that the first is not kept, nothing is known: that was the pause in question.
fn longest_pause_ns(mailboxes: &Mailboxes<'_, MemoryWords>, first: &[u64]) -> Option<u64> {
    let of_each = mailboxes.iter().zip(first).filter_map(|(mailbox, first)| {
        let pauses = mailbox.pauses_from(*first);
        pauses.first().filter(|(number, _)| number == first)?;
        let longest = pauses.into_iter().map(|(_, pause)| pause.cycles).max()?;
        mailbox.nanoseconds(longest)
    });
    of_each.max()
}

/// Where the guest stands when it is taken over, and does not run yet.
#[derive(Debug, Clone, Default)]
pub(crate) struct Before {
    /// Of each vCPU.
    ticks: Vec<u64>,
    /// Of each vCPU.
    pauses: Vec<u64>,
    /// The first probe, which the guest does before anything else.
    probe: Option<u64>,
}

impl Before {
    /// Looks at a guest that stands still.
    pub(crate) fn look(words: Option<&MemoryWords>, probe: bool) -> Self {
        let Some(words) = words else { return Self::default() };
        let mailboxes = words.mailboxes();
        let pauses = mailboxes.iter().flat_map(Mailboxes::iter).map(|mailbox| mailbox.pauses()).collect();
        let ticks = mailboxes.map_or_else(|_| Vec::new(), |mailboxes| mailboxes.ticks_of_each());
        Self { ticks, pauses, probe: probe.then(|| ask_probe(words)) }
    }
}

fn ask_probe(words: &MemoryWords) -> u64 {
    words.mailbox().request_probe(PROBE_WINDOWS)
}

/// Waits for the first probe, then has it done again.
fn probed(words: &MemoryWords, request: u64) -> Option<ProbeReport> {
    let mailbox = words.mailbox();
    let memory_bytes = mailbox.layout().ok()?.memory_bytes();
    let cold = wait_for(PROBE_ANSWER, || mailbox.probe(request))?;
    let again = ask_probe(words);
    let warm = wait_for(PROBE_ANSWER, || mailbox.probe(again))?;
    let each = |cycles: u64| -> Option<f64> {
        let ns = Duration::from_nanos(mailbox.nanoseconds(cycles)?).as_secs_f64() * 1e9;
        Some(ns / pages_f64(cold.pages.max(1)))
    };
    let (cold_ns, warm_ns) = (each(cold.cycles)?, each(warm.cycles)?);
    // The first 2 MiB are left out by the probe, and do not count.
    let all = (memory_bytes - HUGE_PAGE_BYTES) / PAGE_BYTES;
    let time_to_full_speed_us = (cold_ns - warm_ns).max(0.0) * pages_f64(all) / 1000.0;
    Some(ProbeReport { pages: cold.pages, cold_ns, warm_ns, time_to_full_speed_us })
}

#[expect(clippy::cast_precision_loss, reason = "a page count is far below 2^52")]
fn pages_f64(pages: u64) -> f64 {
    pages as f64
}

/// Puts both sides' measures together.
pub(crate) fn report(report: &Report, stopped_ns: Option<u64>) -> UpdateReport {
    let told: Told = serde_json::from_value(report.vmm.clone()).unwrap_or_default();
    let seen = seen(&told, &report.timeline, stopped_ns);
    let silent = report.silent.as_ref();
    UpdateReport {
        predecessor_pid: report.predecessor_pid,
        successor_pid: Some(report.successor_pid),
        reason: silent.map(|why| format!("the successor has the machine, and is silent: {why}")),
        // A guest that was held did not stand still for the update.
        pause_us: seen.pause_us.or_else(|| (!told.held).then(|| micros_of(report.pause()))),
        ..seen
    }
}

/// The same of an update for whose failure there is a `reason`, after which the program before took the machine over
/// again: `attempt` is how long the guest stood still before that.
pub(crate) fn report_of_return(
    back: &Report,
    stopped_ns: Option<u64>,
    reason: String,
    attempt: Option<Duration>,
) -> UpdateReport {
    let seen = report(back, stopped_ns);
    UpdateReport {
        outcome: UpdateOutcome::RolledBack,
        successor_pid: None,
        reason: Some(reason),
        pause_us: seen.pause_us.map(|pause| pause + attempt.map_or(0.0, micros_of)),
        ..seen
    }
}

/// The same from this process, the successor, whose predecessor died before it could say how the update went.
pub(crate) fn report_of_death(predecessor_pid: u32, told: &Told) -> UpdateReport {
    UpdateReport {
        predecessor_pid,
        successor_pid: Some(std::process::id()),
        reason: Some(
            "the process that ran the guest died before it could say how long the guest stood still"
                .to_owned(),
        ),
        ..seen(told, &Timeline::default(), None)
    }
}

/// What the guest and the clocks say of an update from this process.
fn seen(told: &Told, timeline: &Timeline, stopped_ns: Option<u64>) -> UpdateReport {
    let pause = stopped_ns.zip(told.entered_ns);
    UpdateReport {
        predecessor_pid: std::process::id(),
        successor_pid: None,
        outcome: UpdateOutcome::Updated,
        reason: None,
        pause_us: pause.map(|(stopped, entered)| micros(entered.saturating_sub(stopped))),
        aside_us: None,
        guest_pause_us: told.guest_pause_us,
        phases_us: phases(timeline, stopped_ns, told.entered_ns),
        ticks_before: told.ticks_before,
        ticks_after: told.ticks_after,
        probe: told.probe,
    }
}

/// The way to each step. Of the first and the last in the pause, what the guest does not run in: it was stopped a moment
/// after the update was ready, and is entered a moment after the swap.
fn phases(timeline: &Timeline, stopped_ns: Option<u64>, entered_ns: Option<u64>) -> BTreeMap<String, f64> {
    let mut phases: BTreeMap<String, f64> =
        timeline.phases().map(|(step, took)| (step.name().to_owned(), micros_of(took))).collect();
    let mut set = |step: Step, from: Option<u64>, to: Option<u64>| {
        if let Some((from, to)) = from.zip(to) {
            phases.insert(step.name().to_owned(), micros(to.saturating_sub(from)));
        }
    };
    set(Step::Paused, stopped_ns, timeline.at_ns(Step::Paused));
    set(Step::Running, timeline.at_ns(Step::Loaded), entered_ns);
    phases
}

/// Has the guest walk over all of its memory, stops it, and compares every word.
pub(crate) fn check(
    guest: &mut AnyGuest,
    words: &MemoryWords,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> anyhow::Result<CheckReport> {
    let mailboxes = words.mailboxes()?;
    let first = passes_of_each(&mailboxes);
    let mut last_told = monotonic_ns();
    loop {
        let (done, of) = walked(&mailboxes, &first);
        if done == of {
            break;
        }
        if let Some(why) = guest.failure() {
            anyhow::bail!("the guest has failed: {why}");
        }
        if monotonic_ns() - last_told > 100_000_000 {
            last_told = monotonic_ns();
            progress("guest checks its memory", done, of);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if let Err(error) = guest.pause() {
        // It may stop yet, when nobody waits for it any more.
        guest.resume()?;
        return Err(error.into());
    }
    // The state is not wanted, but the guest gives it.
    let saved = guest.save();
    let checked = compare(words);
    guest.resume()?;
    saved?;
    let (mut check, first_bad) = checked?;
    let passes = passes_of_each(&mailboxes).into_iter().zip(first).map(|(now, first)| now - first);
    check.guest_passes = passes.min().unwrap_or_default();
    check.first_bad = first_bad;
    Ok(check)
}

/// Passes that each vCPU has done over its share of the memory.
fn passes_of_each(mailboxes: &Mailboxes<'_, MemoryWords>) -> Vec<u64> {
    let each = mailboxes.iter().zip(mailboxes.layouts());
    each.map(|(mailbox, layout)| mailbox.progress(layout).pass).collect()
}

/// Pages that all vCPUs have walked in the two passes that follow the `first` ones, and how many those have. Two: the
/// pass under way does not count, as it began before the question.
fn walked(mailboxes: &Mailboxes<'_, MemoryWords>, first: &[u64]) -> (u64, u64) {
    let each = mailboxes.iter().zip(mailboxes.layouts()).zip(first);
    let each = each.map(|((mailbox, layout), first)| {
        let work = layout.work_pages();
        let (pages, now) = (work.end - work.start, mailbox.progress(layout));
        let done = now.pass.saturating_sub(*first) * pages + (now.cursor - work.start);
        (done.min(2 * pages), 2 * pages)
    });
    each.fold((0, 0), |(done, of), (more, of_more)| (done + more, of + of_more))
}

/// Compares every word of a stopped guest's memory with what it should be.
pub(crate) fn compare(words: &MemoryWords) -> anyhow::Result<(CheckReport, Option<String>)> {
    let mailboxes = words.mailboxes()?;
    let read = |offset: u64, into: &mut [u8]| words.0.read(offset, into);
    let work = mailboxes.check_work(read)?;
    let fixed = check::fixed_pages(&mailboxes.first().fixed_sums(), read)?;
    let tally = mailboxes.tally();
    let first_bad = work
        .first_bad
        .map(|bad| format!("{bad:?}"))
        .or_else(|| {
            fixed.changed.first().map(|offset| format!("the guest's own page at {offset:#x} has changed"))
        })
        .or_else(|| mailboxes.first_bad().map(|bad| format!("found by the guest: {bad:?}")))
        .or_else(|| {
            let Tally { ticks, shared, .. } = tally;
            let say =
                || format!("the vCPUs have counted {ticks} ticks, and {shared} in the word that they share");
            (!tally.agrees()).then(say)
        });
    let report = CheckReport {
        pages_checked: work.pages_checked + fixed.pages_checked,
        pages_lost: work.pages_lost + u64::try_from(fixed.changed.len()).unwrap_or(u64::MAX),
        guest_errors: mailboxes.errors(),
        registers_lost: mailboxes.registers_lost(),
        ticks_miscounted: tally.miscounted(),
        guest_passes: 0,
        first_bad: None,
    };
    Ok((report, first_bad))
}
