//! How fast a guest works on memory that Tideover made, against plain shared memory of the same page size.
//!
//! Both guests are pulse with one vCPU, which does nothing but verify and write its whole memory. *Ours* runs in
//! VMM processes that are replaced one by another, on memory as they have it: sealed, kept out of core
//! dumps, bound through its inode. The *plain* one of the crate `measure` runs in this process on a memfd that is
//! mapped and populated, and nothing else.
//!
//! Which physical pages a guest gets makes a difference that is nobody's merit. So for each pair both are made anew,
//! and that twice: once ours first, once the plain one, since the one that is made first was seen to be the slower.
//! Both times they work in short turns, one at a time, in an order that leaves out what changes steadily. What counts
//! is the ratio of the two within the pair: as the machine was made, and again after its VMM was replaced.
#![forbid(unsafe_code)]

#[path = "../arguments.rs"]
mod arguments;

use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::Result;
use arguments::Arguments;
use arguments::Machine;
use arguments::PageSize;
use arguments::gib;
use comfy_table::CellAlignment;
use comfy_table::Table;
use comfy_table::presets;
use measure::chain::Chain;
use measure::chain::How;
use measure::numbers;
use measure::numbers::Spread;
use measure::plain::Plain;
use measure::quiet::Quiet;
use pulse::CHUNK_BYTES;
use serde::Serialize;
use vmm::control::Carrier;

/// Guest memory that is measured if no size is asked for: more than any cache keeps.
const MEMORY: [u64; 1] = [256 << 20];
/// What the ratio is to be at least.
const TARGET: f64 = 0.97;
/// One turn.
const TURN: Duration = Duration::from_millis(100);
/// Before what is measured of a turn: caches and clocks settle.
const SETTLE: Duration = Duration::from_millis(10);
/// Whether it is the turn of the one that was made first.
const TURNS: [bool; 4] = [true, false, false, true];
/// For as many full passes as it takes until all memory is in use by the guest's present VM.
const FIRST_PASSES: Duration = Duration::from_secs(60);
/// Updates between the two measurements of a pair.
const UPDATES: u32 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    Ours,
    Plain,
}

impl Whose {
    fn other(self) -> Self {
        match self {
            Self::Ours => Self::Plain,
            Self::Plain => Self::Ours,
        }
    }
}

/// Speeds, in GiB that are verified and written in a second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Pair {
    ours: f64,
    plain: f64,
}

impl Pair {
    /// The two that were measured with guests made in either order. A ratio's middle is the geometric one.
    fn joined(one: Self, other: Self) -> Self {
        let middle = |one: f64, other: f64| (one * other).sqrt();
        Self { ours: middle(one.ours, other.ours), plain: middle(one.plain, other.plain) }
    }
}

/// A series of pairs.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Series {
    memory_bytes: u64,
    page_size: u64,
    /// Bytes that came in huge pages at least, of ours and of the plain guest.
    huge_bytes: (u64, u64),
    /// How often the VMM was replaced before.
    updates: u32,
    ours: Spread,
    plain: Spread,
    ratio: Spread,
    /// The median of the ratio lies above it, with 95 % confidence. `None` of too few pairs.
    ratio_lower_bound: Option<f64>,
    on_target: bool,
    pairs: Vec<Pair>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Report {
    machine: Machine,
    target: f64,
    series: Vec<Series>,
    left_out: Vec<u64>,
}

fn main() -> ExitCode {
    arguments::main("access", &MEMORY, run, show)
}

fn run(arguments: &Arguments) -> Result<Report> {
    let mut quiet = arguments.quiet();
    let measure = |memory, page_size| before_and_after(arguments, &mut quiet, memory, page_size);
    let (series, left_out) = arguments.each_size(measure)?;
    let series = series.into_iter().flatten().collect();
    Ok(Report { machine: Machine::look(&quiet), target: TARGET, series, left_out })
}

fn before_and_after(
    arguments: &Arguments,
    quiet: &mut Quiet,
    memory_bytes: u64,
    page_size: PageSize,
) -> Result<[Series; 2]> {
    let name = arguments::name(memory_bytes, page_size);
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut huge_bytes = (u64::MAX, u64::MAX);
    for number in 0..arguments.pairs {
        let first = if number.is_multiple_of(2) { Whose::Ours } else { Whose::Plain };
        let mut round = |first: Whose| -> Result<[Pair; 2]> {
            let mut guests = Guests::make(arguments, memory_bytes, page_size, first)?;
            let had = guests.huge_bytes()?;
            huge_bytes = (huge_bytes.0.min(had.0), huge_bytes.1.min(had.1));
            let before = guests.pair(first, quiet)?;
            guests.update()?;
            let after = guests.pair(first, quiet)?;
            guests.finish()?;
            Ok([before, after])
        };
        let ([before_one, after_one], [before_other, after_other]) = (round(first)?, round(first.other())?);
        let (was, is) = (Pair::joined(before_one, before_other), Pair::joined(after_one, after_other));
        eprintln!(
            "access: {name}: pair {}: {:.2} GiB/s against {:.2}, after {UPDATES} updates {:.2} against {:.2}",
            number + 1,
            was.ours,
            was.plain,
            is.ours,
            is.plain
        );
        before.push(was);
        after.push(is);
    }
    let series = |updates, pairs| series(memory_bytes, page_size, huge_bytes, updates, pairs);
    Ok([series(0, before)?, series(UPDATES, after)?])
}

fn series(
    memory_bytes: u64,
    page_size: PageSize,
    huge_bytes: (u64, u64),
    updates: u32,
    pairs: Vec<Pair>,
) -> Result<Series> {
    let of = |of: fn(&Pair) -> f64| pairs.iter().map(of).collect::<Vec<_>>();
    let spread = |values: &[f64]| Spread::of(values).context("no pairs");
    let ratios = of(|pair| pair.ours / pair.plain);
    let bound = numbers::median_lower_bound(&ratios);
    Ok(Series {
        memory_bytes,
        page_size: page_size.bytes(),
        huge_bytes,
        updates,
        ours: spread(&of(|pair| pair.ours))?,
        plain: spread(&of(|pair| pair.plain))?,
        ratio: spread(&ratios)?,
        ratio_lower_bound: bound,
        on_target: bound.is_some_and(|bound| bound >= TARGET),
        pairs,
    })
}

/// The two guests, neither of which runs.
struct Guests {
    chain: Chain,
    plain: Plain,
}

impl Guests {
    fn make(arguments: &Arguments, memory_bytes: u64, page_size: PageSize, first: Whose) -> Result<Self> {
        let chain = || -> Result<Chain> {
            let chain = Chain::start(&arguments.program, memory_bytes, page_size.pages());
            let mut chain = chain.context("cannot start our guest")?;
            two_passes(|| chain.passes())?;
            chain.hold()?;
            Ok(chain)
        };
        let plain = || -> Result<Plain> {
            let plain = Plain::start(memory_bytes, page_size.pages());
            let mut plain = plain.context("cannot start the plain guest")?;
            two_passes(|| Ok(plain.passes()))?;
            plain.stop()?;
            Ok(plain)
        };
        Ok(match first {
            Whose::Ours => Self { chain: chain()?, plain: plain()? },
            Whose::Plain => {
                let plain = plain()?;
                Self { chain: chain()?, plain }
            }
        })
    }

    /// Bytes in huge pages, of ours and of the plain guest.
    fn huge_bytes(&mut self) -> Result<(u64, u64)> {
        self.chain.go()?;
        let ours = self.chain.status()?.huge_bytes;
        self.chain.hold()?;
        Ok((ours, self.plain.huge_bytes()))
    }

    fn pair(&mut self, first: Whose, quiet: &mut Quiet) -> Result<Pair> {
        let (mut ours, mut plain) = (Vec::new(), Vec::new());
        for is_first in TURNS {
            quiet.wait();
            match if is_first { first } else { first.other() } {
                Whose::Ours => ours.push(self.our_turn()?),
                Whose::Plain => plain.push(self.plain_turn()?),
            }
        }
        let of = |speeds: &[f64]| numbers::median(speeds).context("no turns");
        Ok(Pair { ours: of(&ours)?, plain: of(&plain)? })
    }

    fn our_turn(&mut self) -> Result<f64> {
        self.chain.go()?;
        let speed = speed(|| self.chain.ticks());
        self.chain.hold()?;
        speed
    }

    fn plain_turn(&mut self) -> Result<f64> {
        self.plain.go()?;
        let speed = speed(|| Ok(self.plain.ticks()));
        self.plain.stop()?;
        speed
    }

    fn update(&mut self) -> Result<()> {
        self.chain.go()?;
        for _ in 0..UPDATES {
            self.chain.update(How { carrier: Carrier::Socket, populate: true, probe: false })?;
            two_passes(|| self.chain.passes())?;
        }
        self.chain.hold()
    }

    fn finish(self) -> Result<()> {
        self.chain.finish()?;
        self.plain.finish()
    }
}

/// Waits until a guest has been over all of its memory: the first of two passes may have begun before.
fn two_passes(passes: impl Fn() -> Result<u64>) -> Result<()> {
    let (begun, wanted) = (Instant::now(), passes()? + 2);
    while passes()? < wanted && begun.elapsed() < FIRST_PASSES {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// What a running guest verifies and writes, in GiB in a second.
fn speed(ticks: impl Fn() -> Result<u64>) -> Result<f64> {
    std::thread::sleep(SETTLE);
    let (from, begun) = (ticks()?, Instant::now());
    std::thread::sleep(TURN);
    let (to, took) = (ticks()?, begun.elapsed());
    Ok(gib((to - from) * CHUNK_BYTES) / took.as_secs_f64())
}

fn show(report: &Report) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["memory", "pages", "updates", "ours, GiB/s", "plain, GiB/s", "ratio", "bound", ""]);
    for series in &report.series {
        table.add_row(row(series));
    }
    for column in 2..7 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let pairs = report.series.first().map_or(0, |series| series.pairs.len());
    let mut text = report.machine.show();
    text += &format!(
        "\nMemory that a guest verifies and writes, ours against plain shared memory, {pairs} pairs\n\
         {table}\n\
         ours, plain: median; ratio: within each pair, median (quartiles). Its median is above the bound with\n\
         95 % confidence, which is to be {:.2} or more.\n",
        report.target
    );
    for memory in &report.left_out {
        text += &format!("LEFT OUT for want of memory: {}\n", arguments::show(*memory));
    }
    text
}

fn row(series: &Series) -> [String; 8] {
    let all = |huge: u64| if series.page_size == 4096 { huge == 0 } else { huge == series.memory_bytes };
    let came = all(series.huge_bytes.0) && all(series.huge_bytes.1);
    let pages = arguments::show(series.page_size);
    let ratio = &series.ratio;
    let verdict = match (series.ratio_lower_bound, series.on_target) {
        (None, _) => "too few pairs",
        (_, true) => "met",
        (_, false) => "MISSED",
    };
    [
        arguments::show(series.memory_bytes),
        if came { pages } else { format!("{pages} (not all)") },
        series.updates.to_string(),
        format!("{:.2}", series.ours.median),
        format!("{:.2}", series.plain.median),
        format!("{:.3} ({:.3} .. {:.3})", ratio.median, ratio.lower_quartile, ratio.upper_quartile),
        series.ratio_lower_bound.map_or_else(|| "-".to_owned(), |bound| format!("{bound:.3}")),
        verdict.to_owned(),
    ]
}
