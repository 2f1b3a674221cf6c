//! What the VMM reads off its guest.

use std::collections::BTreeMap;
use std::time::Duration;
use std::time::Instant;

use fdpass::monotonic_ns;
use machine::update::Guest;
use machine::update::Step;
use machine::update::Timeline;
use pulse::HUGE_PAGE_BYTES;
use pulse::PAGE_BYTES;
use pulse::check;
use serde::Deserialize;
use serde::Serialize;
use socket::Report;

use crate::control::CheckReport;
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

/// After an update: has the guest counted on, and how long a gap did it see? When it was entered is asked once it
/// counts: its thread may not have got to it before. Of a guest that is held there is nothing to see.
pub(crate) fn after_update(words: &MemoryWords, before: Before, runs: Option<&dyn Served>) -> Told {
    let Before { ticks: ticks_before, pauses, probe } = before;
    let Some(guest) = runs else { return Told { ticks_before, held: true, ..Told::default() } };
    let mailbox = words.mailbox();
    // Two ticks: after the first one it has compared the gap, after the second one it is written.
    let ticks = wait_for(FIRST_TICK, || Some(mailbox.ticks()).filter(|ticks| *ticks > ticks_before + 1));
    let pause = words.longest_pause_ns(pauses);
    let probe = probe.and_then(|request| probed(words, request));
    let (entered_ns, guest_pause_us) = (guest.entered_ns(), pause.map(micros));
    Told { ticks_before, entered_ns, ticks_after: ticks, guest_pause_us, probe, held: false }
}

/// Where the guest stands when it is taken over, and does not run yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Before {
    ticks: u64,
    pauses: u64,
    /// The first probe, which the guest does before anything else.
    probe: Option<u64>,
}

impl Before {
    /// Looks at a guest that stands still.
    pub(crate) fn look(words: &MemoryWords, probe: bool) -> Self {
        let mailbox = words.mailbox();
        Self { ticks: mailbox.ticks(), pauses: mailbox.pauses(), probe: probe.then(|| ask_probe(words)) }
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

/// The same of an update by exec, or of one that came back by it.
pub(crate) fn report_of_exec(report: &exec::Report, told: &Told) -> UpdateReport {
    let seen = seen(told, &report.timeline, report.stopped_ns);
    match &report.failed {
        None => UpdateReport { successor_pid: Some(seen.predecessor_pid), ..seen },
        Some(why) => UpdateReport { outcome: UpdateOutcome::RolledBack, reason: Some(why.clone()), ..seen },
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
    let mailbox = words.mailbox();
    let layout = mailbox.layout()?;
    let first = mailbox.progress(&layout).pass;
    // A pass that began after the question: the one under way does not count.
    let wanted = first + 2;
    let pages = layout.work_pages().end - layout.work_pages().start;
    let mut last_told = monotonic_ns();
    loop {
        let now = mailbox.progress(&layout);
        if now.pass >= wanted {
            break;
        }
        if let Some(why) = guest.failure() {
            anyhow::bail!("the guest has failed: {why}");
        }
        if monotonic_ns() - last_told > 100_000_000 {
            last_told = monotonic_ns();
            let done = (now.pass - first) * pages + (now.cursor - layout.work_pages().start);
            progress("guest checks its memory", done.min(2 * pages), 2 * pages);
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
    check.guest_passes = mailbox.progress(&layout).pass - first;
    check.first_bad = first_bad;
    Ok(check)
}

/// Compares every word of a stopped guest's memory with what it should be.
fn compare(words: &MemoryWords) -> anyhow::Result<(CheckReport, Option<String>)> {
    let mailbox = words.mailbox();
    let layout = mailbox.layout()?;
    let read = |offset: u64, into: &mut [u8]| words.0.read(offset, into);
    let work = check::work_area(&layout, mailbox.progress(&layout), read)?;
    let fixed = check::fixed_pages(&mailbox.fixed_sums(), read)?;
    let first_bad = work
        .first_bad
        .map(|bad| format!("{bad:?}"))
        .or_else(|| {
            fixed.changed.first().map(|offset| format!("the guest's own page at {offset:#x} has changed"))
        })
        .or_else(|| mailbox.first_bad().map(|bad| format!("found by the guest: {bad:?}")));
    let report = CheckReport {
        pages_checked: work.pages_checked + fixed.pages_checked,
        pages_lost: work.pages_lost + u64::try_from(fixed.changed.len()).unwrap_or(u64::MAX),
        guest_errors: mailbox.errors(),
        registers_lost: mailbox.registers_lost(),
        guest_passes: 0,
        first_bad: None,
    };
    Ok((report, first_bad))
}
