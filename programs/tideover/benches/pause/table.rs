//! The numbers for people.

use comfy_table::CellAlignment;
use comfy_table::Table;
use comfy_table::presets;
use measure::numbers::Slope;
use measure::numbers::Spread;

use crate::Comparison;
use crate::Curve;
use crate::PHASES;
use crate::Report;
use crate::arguments;

pub(crate) fn show(report: &Report) -> String {
    let pairs = report.curves.first().map_or(0, |curve| curve.pairs.len());
    let mut text = report.machine.show();
    text += &format!("{pairs} pairs of an update and a hop for each size\n");
    text += "\nPause by the host's clock, in µs\n";
    text += &comparison(report, |curve| &curve.by_host);
    text += "\nPause as the guest sees it, by its own clock, in µs\n";
    text += &comparison(report, |curve| &curve.by_guest);
    text += "ours, floor: median [smallest .. nine tenths below .. largest]\n";
    text += "difference: within each pair; median (quartiles). Its median is below the bound with 95 % confidence,\n";
    text += &format!("and is to be below {:.0} µs.\n", report.target_us);
    text += "\nHow the difference grows with memory\n";
    text += &growth(report);
    text += "\nWhere the pause goes, by the host's clock, in µs (medians; they do not add up exactly)\n";
    text += &phases(report);
    text += "\nTime to full speed after an update, from a sample of pages (medians)\n";
    text += &full_speed(report);
    for memory in &report.left_out {
        text += &format!("\nLEFT OUT for want of memory: {}\n", arguments::show(*memory));
    }
    text
}

fn table<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(header);
    table.add_rows(rows);
    for column in 2..N {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    format!("{table}\n")
}

fn size(curve: &Curve) -> [String; 2] {
    // A page size that was asked for and did not come, or did not come for both, is no page size.
    let all = |huge: u64| if curve.page_size == 4096 { huge == 0 } else { huge == curve.memory_bytes };
    let pages = arguments::show(curve.page_size);
    let came = all(curve.huge_bytes.0) && all(curve.huge_bytes.1);
    [arguments::show(curve.memory_bytes), if came { pages } else { format!("{pages} (not all)") }]
}

fn with_range(spread: &Spread) -> String {
    format!("{:.0} [{:.0} .. {:.0} .. {:.0}]", spread.median, spread.min, spread.p90, spread.max)
}

fn comparison(report: &Report, of: fn(&Curve) -> &Comparison) -> String {
    let header = ["memory", "pages", "ours", "floor", "difference", "bound", ""];
    let rows = report.curves.iter().map(|curve| {
        let [memory, pages] = size(curve);
        let Comparison { ours, floor, difference, difference_upper_bound: bound, under_target } = of(curve);
        let apart = format!(
            "{:.0} ({:.0} .. {:.0})",
            difference.median, difference.lower_quartile, difference.upper_quartile
        );
        let bound_text = bound.map_or_else(|| "-".to_owned(), |bound| format!("{bound:.0}"));
        let verdict = match (bound, under_target) {
            (None, _) => "too few pairs",
            (_, true) => "met",
            (_, false) => "MISSED",
        };
        [memory, pages, with_range(ours), with_range(floor), apart, bound_text, verdict.to_owned()]
    });
    table(header, rows)
}

fn growth(report: &Report) -> String {
    let slope = |slope: &Option<Slope>| match slope {
        None => "needs two sizes".to_owned(),
        Some(Slope { slope, low, high }) => format!("{slope:+.1} µs per GiB ({low:+.1} .. {high:+.1})"),
    };
    let rows = report
        .growth
        .iter()
        .map(|growth| [arguments::show(growth.page_size), slope(&growth.by_host), slope(&growth.by_guest)]);
    table(["pages", "by the host's clock", "by the guest's clock"], rows)
        + "in brackets: where the slope lies, with 95 % confidence\n"
}

fn phases(report: &Report) -> String {
    let header = [
        "memory",
        "pages",
        "paused",
        "saved",
        "sealed",
        "claimed",
        "loaded",
        "running",
        "floor: save",
        "load",
    ];
    let rows = report.curves.iter().map(|curve| {
        let [memory, pages] = size(curve);
        let median = |phase: &str| {
            curve.phases_us.get(phase).map_or_else(String::new, |spread| format!("{:.0}", spread.median))
        };
        let [paused, saved, sealed, claimed, loaded, running] = PHASES.map(median);
        let floor = |spread: &Spread| format!("{:.0}", spread.median);
        let (save, load) = (floor(&curve.floor_save_us), floor(&curve.floor_load_us));
        [memory, pages, paused, saved, sealed, claimed, loaded, running, save, load]
    });
    table(header, rows)
}

fn full_speed(report: &Report) -> String {
    let header = ["memory", "pages", "populated before", "first touch, ns", "later, ns", "all of it, ms"];
    let rows = report.curves.iter().flat_map(|curve| {
        curve.full_speed.iter().map(|full_speed| {
            let [memory, pages] = size(curve);
            let populated = if full_speed.populated { "yes" } else { "no" }.to_owned();
            let cold = format!("{:.0}", full_speed.cold_ns_per_page.median);
            let warm = format!("{:.0}", full_speed.warm_ns_per_page.median);
            let until = &full_speed.time_to_full_speed_ms;
            let until = format!("{:.1} [{:.1} .. {:.1}]", until.median, until.min, until.max);
            [memory, pages, populated, cold, warm, until]
        })
    });
    table(header, rows) + "first touch and later: of a page of 4 KiB, whatever the page size\n"
}
