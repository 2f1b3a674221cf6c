//! The demo's result for people.

use ::vmm::control::GuestKind;
use ::vmm::control::UpdateOutcome;
use ::vmm::control::UpdateReport;
use comfy_table::CellAlignment;
use comfy_table::Table;
use comfy_table::presets;

use crate::demo::Result;
use crate::size;

/// Steps that are shown: those of the pause.
pub(crate) const PHASES: [&str; 6] = ["paused", "saved", "sealed", "claimed", "loaded", "running"];

pub(crate) fn show(result: &Result) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header([
        "update",
        "VMM before",
        "after",
        "pause",
        "seen by guest",
        "ticks before",
        "after",
        "outcome",
    ]);
    for (number, update) in (1..).zip(&result.updates) {
        table.add_row(row(number, update));
    }
    (0..7).for_each(|column| {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    });
    let mut text = format!("{}\n{table}\n", heading(result));
    for (number, update) in (1..).zip(&result.updates) {
        let reason = update.reason.iter().map(|reason| match update.outcome {
            UpdateOutcome::Updated => format!("update {number}: {reason}\n"),
            UpdateOutcome::RolledBack => format!("update {number} was rolled back: {reason}\n"),
        });
        text.extend(reason);
    }
    text += &phases(result);
    text += &verdict(result);
    text
}

fn heading(result: &Result) -> String {
    let pages = match result.huge_bytes {
        0 => "4 KiB pages".to_owned(),
        huge if huge == result.memory_bytes => "2 MiB pages".to_owned(),
        huge => format!("{} of it in 2 MiB pages, the rest in 4 KiB pages", size::show(huge)),
    };
    let refused = result.huge_refused.map(std::io::Error::from_raw_os_error);
    let pages =
        refused.map_or(pages.clone(), |why| format!("{pages}; the host refused more huge ones: {why}"));
    let guest = guest(result.guest);
    format!(
        "{guest}, {}, {} of memory ({pages}), store {}, carrier {}",
        vcpus(result.vcpus),
        size::show(result.memory_bytes),
        result.store,
        result.carrier
    )
}

pub(crate) fn guest(kind: GuestKind) -> &'static str {
    match kind {
        GuestKind::Kvm => "KVM guest",
        GuestKind::Thread => "guest that is a thread (no KVM)",
    }
}

pub(crate) fn vcpus(count: u64) -> String {
    match count {
        1 => "1 vCPU".to_owned(),
        count => format!("{count} vCPUs"),
    }
}

fn row(number: u32, update: &UpdateReport) -> [String; 8] {
    let optional = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    [
        number.to_string(),
        update.predecessor_pid.to_string(),
        optional(update.successor_pid.map(|pid| pid.to_string())),
        optional(update.pause_us.map(millis)),
        optional(update.guest_pause_us.map(millis)),
        update.ticks_before.to_string(),
        optional(update.ticks_after.map(|ticks| ticks.to_string())),
        match update.outcome {
            UpdateOutcome::Updated => "updated".to_owned(),
            UpdateOutcome::RolledBack => "rolled back".to_owned(),
        },
    ]
}

pub(crate) fn millis(us: f64) -> String {
    format!("{:.2} ms", us / 1000.0)
}

/// The pause's phases: the median over all updates of each.
fn phases(result: &Result) -> String {
    let median = |phase: &str| {
        let mut took: Vec<f64> =
            result.updates.iter().filter_map(|update| update.phases_us.get(phase)).copied().collect();
        took.sort_unstable_by(f64::total_cmp);
        took.get(took.len() / 2).copied()
    };
    let shown: Vec<String> =
        PHASES.iter().filter_map(|phase| Some(format!("{phase} {:.0}", median(phase)?))).collect();
    if shown.is_empty() {
        return String::new();
    }
    format!("phases of the pause (median, µs): {}\n", shown.join(", "))
}

fn verdict(result: &Result) -> String {
    let all = result.memory_bytes / 4096;
    let mut text = format!(
        "pages checked {} of {all} (the rest are the guest's stacks, mailboxes and shared count), lost {}\n",
        result.pages_checked, result.pages_lost
    );
    if let Some(us) = result.time_to_full_speed_us {
        let took = match us > 0.0 {
            true => millis(us),
            false => "too short to tell".to_owned(),
        };
        text += &format!("time to full speed after an update: {took} (from a sample of pages)\n");
    }
    let updated = result.updates.iter().filter(|update| update.outcome == UpdateOutcome::Updated).count();
    let all = result.updates.len();
    text += &match result.verified {
        true => format!("verified: {updated} of {all} updates, and no byte was lost\n"),
        false => format!("NOT verified: {updated} of {all} updates; {}\n", wrong(result).join(", ")),
    };
    text
}

/// Everything that keeps a result from being verified.
fn wrong(result: &Result) -> Vec<String> {
    let not_updated = |update: &&UpdateReport| update.outcome == UpdateOutcome::RolledBack;
    let stood =
        |update: &&UpdateReport| !not_updated(update) && update.ticks_after <= Some(update.ticks_before);
    let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    let found = [
        (count(result.updates.iter().filter(not_updated).count()), "updates rolled back"),
        (
            count(result.updates.iter().filter(stood).count()),
            "updates after which the guest did not count on",
        ),
        (result.pages_lost, "pages lost"),
        (result.guest_errors, "wrong words found by the guest"),
        (result.registers_lost, "times that its registers were lost"),
        (result.ticks_miscounted, "ticks lost or counted twice"),
        (u64::from(result.pages_checked == 0), "check that looked at no page"),
    ];
    found.into_iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect()
}
