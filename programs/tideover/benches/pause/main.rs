//! How long a guest stands still while its VMM is replaced, against the least that KVM allows.
//!
//! For each size of memory there are two guests, one of which runs at a time: *ours*, in VMM processes that are
//! replaced one by another, and the *plain* one of the crate `measure`, which hops from VM to VM in this process
//! by the same KVM calls and nothing else: the *floor*. A pair is one update and one hop, right after each other,
//! their order changing from pair to pair; what counts is the difference within the pair, which leaves out what
//! the machine does to both.
//!
//! Both pauses are measured twice: from the return of the last `KVM_RUN` to the call of the next one, by the
//! host's clock; and by the guest, which looks at its clock all the time, and sees the way out of the old VM and
//! into the new one as well.
#![forbid(unsafe_code)]

#[path = "../arguments.rs"]
mod arguments;
mod table;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::Result;
use arguments::Arguments;
use arguments::Machine;
use arguments::PageSize;
use arguments::gib;
use measure::chain::Chain;
use measure::chain::How;
use measure::numbers;
use measure::numbers::Group;
use measure::numbers::Slope;
use measure::numbers::Spread;
use measure::plain::Plain;
use measure::quiet::Quiet;
use serde::Serialize;
use vmm::control::Carrier;

/// Sizes that are measured if none is asked for.
const MEMORY: [u64; 3] = [64 << 20, 1 << 30, 8 << 30];
/// What an update may cost over the floor, in microseconds.
const TARGET_US: f64 = 500.0;
/// A guest runs at least that long before it is stopped,
const AT_LEAST: Duration = Duration::from_millis(100);
/// and goes on until it has touched all of its memory in its present VM, or this has passed.
const AT_MOST: Duration = Duration::from_millis(500);
/// For all of its memory, at the beginning.
const FIRST_PASS: Duration = Duration::from_secs(30);
/// Updates after which the guest's first touches are measured, each way.
const PROBES: u32 = 3;

/// Steps of an update while the guest stands still.
const PHASES: [&str; 6] = ["paused", "saved", "sealed", "claimed", "loaded", "running"];

/// An update and a hop, in microseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Pair {
    ours_us: f64,
    floor_us: f64,
    ours_seen_by_guest_us: f64,
    floor_seen_by_guest_us: f64,
    floor_save_us: f64,
    floor_load_us: f64,
    phases_us: BTreeMap<String, f64>,
}

/// Ours and the floor, by one clock, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Comparison {
    ours: Spread,
    floor: Spread,
    /// Of ours less the floor, within each pair.
    difference: Spread,
    /// The median of the difference lies below it, with 95 % confidence. `None` of too few pairs.
    difference_upper_bound: Option<f64>,
    under_target: bool,
}

/// What the first touches of memory cost after an update.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct FullSpeed {
    populated: bool,
    cold_ns_per_page: Spread,
    warm_ns_per_page: Spread,
    /// For all pages, if the guest does nothing else, in milliseconds.
    time_to_full_speed_ms: Spread,
}

/// One size of memory, of one page size.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Curve {
    memory_bytes: u64,
    page_size: u64,
    /// Bytes that came in huge pages, of ours and of the plain guest.
    huge_bytes: (u64, u64),
    by_host: Comparison,
    by_guest: Comparison,
    /// Where the pause goes, by the host's clock, in microseconds.
    phases_us: BTreeMap<String, Spread>,
    floor_save_us: Spread,
    floor_load_us: Spread,
    full_speed: Vec<FullSpeed>,
    pairs: Vec<Pair>,
}

/// How the difference grows with memory, in microseconds per GiB.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Growth {
    page_size: u64,
    by_host: Option<Slope>,
    by_guest: Option<Slope>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Report {
    machine: Machine,
    target_us: f64,
    curves: Vec<Curve>,
    growth: Vec<Growth>,
    left_out: Vec<u64>,
}

fn main() -> ExitCode {
    arguments::main("pause", &MEMORY, run, table::show)
}

fn run(arguments: &Arguments) -> Result<Report> {
    let mut quiet = arguments.quiet();
    let measure = |memory, page_size| curve(arguments, &mut quiet, memory, page_size);
    let (curves, left_out) = arguments.each_size(measure)?;
    let growth = arguments.page_size.iter().map(|page_size| growth(&curves, page_size.bytes())).collect();
    Ok(Report { machine: Machine::look(&quiet), target_us: TARGET_US, curves, growth, left_out })
}

/// The two guests.
struct Guests {
    chain: Chain,
    plain: Plain,
    name: String,
}

fn curve(arguments: &Arguments, quiet: &mut Quiet, memory_bytes: u64, page_size: PageSize) -> Result<Curve> {
    let name = arguments::name(memory_bytes, page_size);
    eprintln!("pause: {name}: making two guests");
    let chain = Chain::start(&arguments.program, memory_bytes, page_size.pages());
    let mut chain = chain.context("cannot start our guest")?;
    settle(FIRST_PASS, || chain.passes())?;
    let ours_huge = chain.status()?.huge_bytes;
    chain.hold()?;
    let mut plain = Plain::start(memory_bytes, page_size.pages()).context("cannot start the plain guest")?;
    settle(FIRST_PASS, || Ok(plain.passes()))?;
    plain.stop()?;
    let huge_bytes = (ours_huge, plain.huge_bytes());
    let mut guests = Guests { chain, plain, name };
    let pairs = (0..arguments.pairs).map(|number| guests.pair(number, quiet)).collect::<Result<Vec<_>>>()?;
    let full_speed = vec![guests.full_speed(true, quiet)?, guests.full_speed(false, quiet)?];
    guests.chain.finish()?;
    guests.plain.finish()?;
    let all = |of: fn(&Pair) -> f64| spread(&pairs, of);
    Ok(Curve {
        memory_bytes,
        page_size: page_size.bytes(),
        huge_bytes,
        by_host: compare(&pairs, |pair| pair.ours_us, |pair| pair.floor_us)?,
        by_guest: compare(&pairs, |pair| pair.ours_seen_by_guest_us, |pair| pair.floor_seen_by_guest_us)?,
        phases_us: phases(&pairs)?,
        floor_save_us: all(|pair| pair.floor_save_us)?,
        floor_load_us: all(|pair| pair.floor_load_us)?,
        full_speed,
        pairs,
    })
}

/// Lets a guest run until it has walked over all of its memory, so that all of it is in use by its present VM.
fn settle(at_most: Duration, passes: impl Fn() -> Result<u64>) -> Result<()> {
    let begun = Instant::now();
    // The pass that is under way began before.
    let wanted = passes()? + 2;
    while begun.elapsed() < AT_LEAST || (passes()? < wanted && begun.elapsed() < at_most) {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

impl Guests {
    fn pair(&mut self, number: u32, quiet: &mut Quiet) -> Result<Pair> {
        quiet.wait();
        let (report, hop) = if number.is_multiple_of(2) {
            let report = self.update(How { carrier: Carrier::Socket, populate: true, probe: false })?;
            (report, self.hop()?)
        } else {
            let hop = self.hop()?;
            (self.update(How { carrier: Carrier::Socket, populate: true, probe: false })?, hop)
        };
        let ours_us = report.pause_us.context("the update has no pause")?;
        let seen = report.guest_pause_us.context("the guest saw no pause")?;
        eprintln!(
            "pause: {}: pair {}: {ours_us:.0} µs against {:.0}, seen by the guest {seen:.0} against {:.0}",
            self.name,
            number + 1,
            hop.pause_us,
            hop.guest_pause_us
        );
        Ok(Pair {
            ours_us,
            floor_us: hop.pause_us,
            ours_seen_by_guest_us: seen,
            floor_seen_by_guest_us: hop.guest_pause_us,
            floor_save_us: hop.save_us,
            floor_load_us: hop.load_us,
            phases_us: report.phases_us,
        })
    }

    fn update(&mut self, how: How) -> Result<vmm::control::UpdateReport> {
        self.chain.go()?;
        settle(AT_MOST, || self.chain.passes())?;
        let report = self.chain.update(how)?;
        self.chain.hold()?;
        Ok(report)
    }

    fn hop(&mut self) -> Result<measure::plain::Took> {
        self.plain.go()?;
        settle(AT_MOST, || Ok(self.plain.passes()))?;
        let hop = self.plain.hop()?;
        self.plain.stop()?;
        Ok(hop)
    }

    fn full_speed(&mut self, populated: bool, quiet: &mut Quiet) -> Result<FullSpeed> {
        let (mut cold, mut warm, mut until) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..PROBES {
            quiet.wait();
            let report = self.update(How { carrier: Carrier::Socket, populate: populated, probe: true })?;
            let probe = report.probe.context("the guest was not probed")?;
            cold.push(probe.cold_ns);
            warm.push(probe.warm_ns);
            until.push(probe.time_to_full_speed_us / 1000.0);
        }
        eprintln!("pause: {}: probed, {}populated", self.name, if populated { "" } else { "not " });
        let of = |values: &[f64]| Spread::of(values).context("no probe");
        Ok(FullSpeed {
            populated,
            cold_ns_per_page: of(&cold)?,
            warm_ns_per_page: of(&warm)?,
            time_to_full_speed_ms: of(&until)?,
        })
    }
}

fn spread(pairs: &[Pair], of: impl Fn(&Pair) -> f64) -> Result<Spread> {
    Spread::of(&pairs.iter().map(of).collect::<Vec<_>>()).context("no pairs")
}

fn compare(pairs: &[Pair], ours: fn(&Pair) -> f64, floor: fn(&Pair) -> f64) -> Result<Comparison> {
    let differences: Vec<f64> = pairs.iter().map(|pair| ours(pair) - floor(pair)).collect();
    let bound = numbers::median_upper_bound(&differences);
    Ok(Comparison {
        ours: spread(pairs, ours)?,
        floor: spread(pairs, floor)?,
        difference: Spread::of(&differences).context("no pairs")?,
        difference_upper_bound: bound,
        under_target: bound.is_some_and(|bound| bound < TARGET_US),
    })
}

fn phases(pairs: &[Pair]) -> Result<BTreeMap<String, Spread>> {
    let took = |pair: &Pair, phase: &str| pair.phases_us.get(phase).copied().unwrap_or_default();
    let mut phases = BTreeMap::new();
    for phase in PHASES {
        phases.insert(phase.to_owned(), spread(pairs, |pair| took(pair, phase))?);
    }
    Ok(phases)
}

fn growth(curves: &[Curve], page_size: u64) -> Growth {
    let groups = |of: fn(&Pair) -> f64| -> Vec<Group> {
        let curves = curves.iter().filter(|curve| curve.page_size == page_size);
        curves
            .map(|curve| Group { at: gib(curve.memory_bytes), values: curve.pairs.iter().map(of).collect() })
            .collect()
    };
    Growth {
        page_size,
        by_host: Slope::of(&groups(|pair| pair.ours_us - pair.floor_us)),
        by_guest: Slope::of(&groups(|pair| pair.ours_seen_by_guest_us - pair.floor_seen_by_guest_us)),
    }
}
