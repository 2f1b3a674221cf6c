//! Moments, and how much time passed between two of them, be it within one boot of the host or across a kexec.
//!
//! No clock of a kernel lives through a kexec: CLOCK_MONOTONIC starts anew with each boot, and CLOCK_REALTIME is set from a
//! hardware clock that counts whole seconds. The processor's TSC runs on, as nothing resets the processor. So a [`Moment`]
//! is the readings of all three, and [`TscRate::elapsed`] takes the one that can be believed and says which.
//!
//! ```
//! use tideover_liveupdate::moment::{Moment, TscRate};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let paused = Moment::now()?; // kept, with the rest of the state
//! # std::thread::sleep(std::time::Duration::from_millis(20));
//! // and in the next kernel:
//! let rate = TscRate::measure()?;
//! let now = Moment::now()?;
//! let whole = rate.elapsed(&paused, &now);
//! let of_old_kernel = rate.elapsed(&paused, &now.boot_start(&rate));
//! # assert!(whole.ns >= 20_000_000 && of_old_kernel.ns == 0);
//! # Ok(()) }
//! ```
//!
//! Only on x86-64.

use std::fmt;
use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::time::ClockId;
use rustix::time::clock_gettime;
use thiserror::Error;

/// Where the kernel tells its boots apart.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// How often a moment is read, to take the reading that took least.
const READINGS: u32 = 8;
/// How far apart two moments have to be for a rate to be made of them, in ns.
const RATE_APART_NS: u64 = 10_000_000;
/// How long [`TscRate::measure`] takes.
const MEASURE: Duration = Duration::from_millis(20);
/// How far a kernel's calibration of the TSC may be off, in parts per million: what KVM bears by default, too.
const CALIBRATION_PPM: u64 = 250;
/// How far the time of day may be off after a boot, in ns: the hardware's clock counts whole seconds.
const REALTIME_OFF_NS: u64 = 1_000_000_000;

/// A moment, by three clocks that were read together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Which boot of which host this was: the kernel's `boot_id`, random.
    pub boot: [u8; 16],
    /// The processor's time stamp counter, in ticks. Runs on through a kexec; a reset takes it to 0.
    pub tsc: u64,
    /// CLOCK_MONOTONIC, in ns. Starts near 0 with each boot, and stands while the host is suspended.
    pub monotonic_ns: u64,
    /// CLOCK_REALTIME, in ns since the epoch. After a boot it is the hardware's clock: to the second, and no better than
    /// that clock was set.
    pub realtime_ns: u64,
    /// In how many ns all three were read: each may be off from the others by as much.
    pub spread_ns: u64,
}

impl Moment {
    /// Now: the tightest of a few readings.
    ///
    /// The first call in a process reads a file below /proc; no other does.
    ///
    /// # Errors
    /// If the kernel does not tell which boot this is: /proc is not mounted, or is not to be read.
    pub fn now() -> io::Result<Self> {
        let boot = boot_id()?;
        let mut tightest = Self::read(boot);
        for _ in 1..READINGS {
            let again = Self::read(boot);
            if again.spread_ns <= tightest.spread_ns {
                tightest = again;
            }
        }
        Ok(tightest)
    }

    fn read(boot: [u8; 16]) -> Self {
        let before_ns = clock_ns(ClockId::Monotonic);
        let tsc = read_tsc();
        let realtime_ns = clock_ns(ClockId::Realtime);
        let spread_ns = clock_ns(ClockId::Monotonic).saturating_sub(before_ns);
        Self { boot, tsc, monotonic_ns: before_ns + spread_ns / 2, realtime_ns, spread_ns }
    }

    /// The moment of the same boot at which CLOCK_MONOTONIC is, or was, at `monotonic_ns`: as far from this one as the
    /// rate says.
    #[must_use]
    pub fn at_monotonic(&self, monotonic_ns: u64, rate: &TscRate) -> Self {
        let (tsc, realtime_ns) = if monotonic_ns < self.monotonic_ns {
            let before_ns = self.monotonic_ns - monotonic_ns;
            (self.tsc.saturating_sub(rate.ticks(before_ns)), self.realtime_ns.saturating_sub(before_ns))
        } else {
            let after_ns = monotonic_ns - self.monotonic_ns;
            (self.tsc.saturating_add(rate.ticks(after_ns)), self.realtime_ns.saturating_add(after_ns))
        };
        Self { tsc, monotonic_ns, realtime_ns, ..*self }
    }

    /// The moment at which the clock of this moment's kernel was 0.
    ///
    /// That is early in its boot, when it first reads the TSC: after the jump and after it was unpacked. Known as exactly as the
    /// kernel kept time until it had calibrated its clocks, which is some milliseconds.
    #[must_use]
    pub fn boot_start(&self, rate: &TscRate) -> Self {
        self.at_monotonic(0, rate)
    }
}

/// When a process of this host's present boot was started, in ns of the present kernel's clock: as in
/// [`Moment::at_monotonic`], as long as the host was not suspended since it booted.
///
/// The kernel tells it in ticks, of 10 ms as a rule; this is the tick's beginning. A process is started when its
/// parent makes it, not when it executes its program: process 1 counts from when the kernel made the thread that then
/// starts most of the kernel itself, and only after that executes the init.
///
/// # Errors
/// If there is no such process, or /proc does not tell.
pub fn process_start_ns(process: u32) -> io::Result<u64> {
    let stat = fs::read(format!("/proc/{process}/stat"))?;
    let ticks_per_second = rustix::param::clock_ticks_per_second();
    start_ns(&stat, ticks_per_second)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc tells no start time"))
}

/// The 22nd field of a process's `stat`, in ns. The second is the process's name, in parentheses, and may hold anything.
fn start_ns(stat: &[u8], ticks_per_second: u64) -> Option<u64> {
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let fields = str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    let ticks: u64 = fields.split_ascii_whitespace().nth(19)?.parse().ok()?;
    scaled(ticks, 1_000_000_000, NonZeroU64::new(ticks_per_second)?)
}

/// How fast a host's TSC runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscRate {
    /// So many ticks ...
    ticks: NonZeroU64,
    /// ... take so many ns ...
    ns: NonZeroU64,
    /// ... and no more than so many ns more or less.
    off_ns: u64,
}

/// Why two moments make no rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RateError {
    /// They are of different boots, whose clocks cannot be compared.
    #[error("the two moments are of different boots of a host")]
    OtherBoot,
    /// They are too close to each other, or the wrong way round.
    #[error("the two moments are {apart_ns} ns apart, and have to be {RATE_APART_NS}, the earlier one first")]
    TooClose {
        /// CLOCK_MONOTONIC between them, in ns; 0 if it went back.
        apart_ns: u64,
    },
    /// The TSC did not go on between them.
    #[error("the TSC stood still or went back, from {earlier:#x} to {later:#x}")]
    Stood {
        /// The TSC of the earlier one.
        earlier: u64,
        /// The TSC of the later one.
        later: u64,
    },
}

impl TscRate {
    /// The rate between two moments of one boot that are 10 ms apart or more: the longer, the more exact.
    ///
    /// # Errors
    /// [`RateError`]
    pub fn between(earlier: &Moment, later: &Moment) -> Result<Self, RateError> {
        if earlier.boot != later.boot {
            return Err(RateError::OtherBoot);
        }
        let apart_ns = later.monotonic_ns.saturating_sub(earlier.monotonic_ns);
        let ns = NonZeroU64::new(apart_ns).filter(|ns| ns.get() >= RATE_APART_NS);
        let ns = ns.ok_or(RateError::TooClose { apart_ns })?;
        let ticks = NonZeroU64::new(later.tsc.saturating_sub(earlier.tsc));
        let ticks = ticks.ok_or(RateError::Stood { earlier: earlier.tsc, later: later.tsc })?;
        Ok(Self { ticks, ns, off_ns: earlier.spread_ns.saturating_add(later.spread_ns) })
    }

    /// The rate of a TSC of so many kHz: as KVM tells it, or the kernel when it boots. Taken to be right to 250 parts per
    /// million.
    #[must_use]
    pub const fn of_khz(khz: NonZeroU64) -> Self {
        // As many ticks as it has kHz take a millisecond.
        const MS: NonZeroU64 = NonZeroU64::new(1_000_000).expect("it is not 0");
        Self { ticks: khz, ns: MS, off_ns: CALIBRATION_PPM }
    }

    /// Measures it, which takes 20 ms.
    ///
    /// # Errors
    /// If the kernel does not tell which boot this is, or the TSC stands still.
    pub fn measure() -> io::Result<Self> {
        let earlier = Moment::now()?;
        std::thread::sleep(MEASURE);
        Self::between(&earlier, &Moment::now()?).map_err(io::Error::other)
    }

    /// In kHz, rounded.
    #[must_use]
    pub fn khz(&self) -> u64 {
        let half = self.ns.get() / 2;
        let khz = (u128::from(self.ticks.get()) * 1_000_000 + u128::from(half)) / u128::from(self.ns.get());
        u64::try_from(khz).unwrap_or(u64::MAX)
    }

    /// How many ns so many ticks take; `u64::MAX` if they are more than fit.
    #[must_use]
    pub fn ns(&self, ticks: u64) -> u64 {
        scaled(ticks, self.ns.get(), self.ticks).unwrap_or(u64::MAX)
    }

    /// How many ticks it does in so many ns; `u64::MAX` if they are more than fit.
    #[must_use]
    pub fn ticks(&self, ns: u64) -> u64 {
        scaled(ns, self.ticks.get(), self.ns).unwrap_or(u64::MAX)
    }

    /// How much time passed from one moment to a later one of the same host, whose TSC has this rate.
    ///
    /// Within one boot it is the difference of CLOCK_MONOTONIC. Across boots it is that of the TSC, unless the TSC went back, or
    /// is not within 2 s and 1 % of what the time of day says: then the difference in the time of day counts, as it
    /// is. Nothing passed, by any clock, if that clock went back.
    #[must_use]
    pub fn elapsed(&self, earlier: &Moment, later: &Moment) -> Elapsed {
        let spread_ns = earlier.spread_ns.saturating_add(later.spread_ns);
        if earlier.boot == later.boot {
            let ns = later.monotonic_ns.saturating_sub(earlier.monotonic_ns);
            return Elapsed { ns, off_ns: spread_ns, by: By::Monotonic };
        }
        let realtime = later.realtime_ns.checked_sub(earlier.realtime_ns);
        let tsc = later.tsc.checked_sub(earlier.tsc).map(|ticks| self.ns(ticks));
        match (tsc, realtime) {
            (Some(ns), Some(realtime_ns)) if agree(ns, realtime_ns) => {
                let rate_off_ns = scaled(ns, self.off_ns, self.ns).unwrap_or(u64::MAX);
                Elapsed { ns, off_ns: spread_ns.saturating_add(rate_off_ns), by: By::Tsc }
            }
            _ => Elapsed {
                ns: realtime.unwrap_or(0),
                off_ns: spread_ns.saturating_add(REALTIME_OFF_NS),
                by: By::Realtime,
            },
        }
    }
}

/// Whether the time that passed by the TSC can be what passed by the time of day.
const fn agree(tsc_ns: u64, realtime_ns: u64) -> bool {
    tsc_ns.abs_diff(realtime_ns) <= 2_000_000_000 + realtime_ns / 100
}

/// `value * to / from`, rounded down.
fn scaled(value: u64, to: u64, from: NonZeroU64) -> Option<u64> {
    u64::try_from(u128::from(value) * u128::from(to) / u128::from(from.get())).ok()
}

/// How much time passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed {
    /// In ns.
    pub ns: u64,
    /// How many ns more or less it may have been. Across boots and by the time of day: if nobody set the hardware's clock, or set
    /// it to another time than the host had.
    pub off_ns: u64,
    /// By which clock.
    pub by: By,
}

/// By which clock it is known how much time passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The kernel's own, within one boot.
    Monotonic,
    /// The processor's time stamp counter, which ran on.
    Tsc,
    /// The time of day.
    Realtime,
}

impl By {
    /// As a word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Monotonic => "monotonic",
            Self::Tsc => "tsc",
            Self::Realtime => "realtime",
        }
    }
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which boot this is. Asked once: no process lives through a boot.
fn boot_id() -> io::Result<[u8; 16]> {
    static KNOWN: OnceLock<[u8; 16]> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return Ok(*known);
    }
    let id = parse_boot_id(&fs::read_to_string(BOOT_ID)?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel's boot_id is none"))?;
    Ok(*KNOWN.get_or_init(|| id))
}

/// 32 hexadecimal digits, with hyphens among them.
fn parse_boot_id(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.trim_end().chars().filter(|digit| *digit != '-').collect();
    let all_digits = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let id = all_digits.then(|| u128::from_str_radix(&digits, 16).ok())??;
    Some(id.to_be_bytes())
}

fn clock_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or_default())
}

fn read_tsc() -> u64 {
    // SAFETY: every x86-64 processor has a TSC, and no code here has the kernel forbid its reading (PR_SET_TSC).
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2.6 GHz: 13 ticks take 5 ns.
    const KHZ: u64 = 2_600_000;
    const SECOND: u64 = 1_000_000_000;

    fn rate() -> TscRate {
        TscRate::of_khz(NonZeroU64::new(KHZ).unwrap())
    }

    /// A moment of a boot, by seconds of its three clocks.
    fn moment(boot: u8, tsc_s: u64, monotonic_s: u64, realtime_s: u64) -> Moment {
        Moment {
            boot: [boot; 16],
            tsc: tsc_s * KHZ * 1000,
            monotonic_ns: monotonic_s * SECOND,
            realtime_ns: realtime_s * SECOND,
            spread_ns: 100,
        }
    }

    #[test]
    fn within_a_boot_the_kernels_own_clock_counts_whatever_the_others_say() {
        let (earlier, later) = (moment(1, 500, 20, 9000), moment(1, 3, 27, 100));
        let elapsed = rate().elapsed(&earlier, &later);
        assert_eq!(elapsed, Elapsed { ns: 7 * SECOND, off_ns: 200, by: By::Monotonic });
        assert_eq!(rate().elapsed(&later, &earlier).ns, 0);
    }

    #[test]
    fn across_boots_the_tsc_counts_and_is_as_exact_as_its_rate() {
        let (earlier, later) = (moment(1, 500, 480, 9000), moment(2, 507, 3, 9008));
        let elapsed = rate().elapsed(&earlier, &later);
        // 250 ns for each ms, and the two readings.
        assert_eq!(elapsed, Elapsed { ns: 7 * SECOND, off_ns: 7000 * 250 + 200, by: By::Tsc });
    }

    #[test]
    fn a_tsc_that_went_back_does_not_count() {
        let (earlier, later) = (moment(1, 500, 480, 9000), moment(2, 4, 3, 9008));
        let elapsed = rate().elapsed(&earlier, &later);
        assert_eq!(elapsed, Elapsed { ns: 8 * SECOND, off_ns: SECOND + 200, by: By::Realtime });
    }

    #[test]
    fn a_tsc_counts_within_two_seconds_and_a_hundredth_of_the_time_of_day() {
        let by = |tsc_s: u64, realtime_s: u64| {
            let (earlier, later) = (moment(1, 500, 480, 9000), moment(2, 500 + tsc_s, 3, 9000 + realtime_s));
            rate().elapsed(&earlier, &later).by
        };
        assert_eq!((by(10, 12), by(14, 12)), (By::Tsc, By::Tsc));
        assert_eq!((by(9, 12), by(15, 12)), (By::Realtime, By::Realtime));
        assert_eq!((by(988, 1000), by(1012, 1000)), (By::Tsc, By::Tsc));
        assert_eq!((by(987, 1000), by(1013, 1000)), (By::Realtime, By::Realtime));
    }

    #[test]
    fn a_time_of_day_that_went_back_counts_as_none() {
        let (earlier, later) = (moment(1, 500, 480, 9000), moment(2, 507, 3, 8000));
        let elapsed = rate().elapsed(&earlier, &later);
        assert_eq!((elapsed.ns, elapsed.by), (0, By::Realtime));
    }

    #[test]
    fn a_rate_of_two_moments_is_that_of_its_khz() {
        let rate_between = TscRate::between(&moment(1, 500, 20, 0), &moment(1, 600, 120, 0)).unwrap();
        assert_eq!((rate_between.khz(), rate().khz()), (KHZ, KHZ));
        assert_eq!((rate_between.ns(13_000), rate_between.ticks(5000)), (5000, 13_000));
        assert_eq!((rate().ns(13_000), rate().ticks(5000)), (5000, 13_000));
        // Exact over the whole range, and no wrong number beyond it.
        assert_eq!(rate().ns(u64::MAX), 7_094_901_566_811_366_005);
        assert_eq!(rate().ticks(u64::MAX), u64::MAX);
    }

    #[test]
    fn moments_that_make_no_rate_are_refused() {
        let earlier = moment(1, 500, 20, 0);
        let at = |boot, tsc_s, after_ns| Moment {
            monotonic_ns: earlier.monotonic_ns + after_ns,
            ..moment(boot, tsc_s, 0, 0)
        };
        let refused = |later| TscRate::between(&earlier, &later).unwrap_err();
        assert_eq!(refused(at(2, 600, SECOND)), RateError::OtherBoot);
        assert_eq!(refused(at(1, 600, 9_999_999)), RateError::TooClose { apart_ns: 9_999_999 });
        assert_eq!(refused(moment(1, 600, 19, 0)), RateError::TooClose { apart_ns: 0 });
        for tsc_s in [500, 499] {
            let later = at(1, tsc_s, SECOND);
            assert_eq!(refused(later), RateError::Stood { earlier: earlier.tsc, later: later.tsc });
        }
        assert!(TscRate::between(&earlier, &at(1, 501, 10_000_000)).is_ok());
    }

    #[test]
    fn a_boot_started_as_long_ago_as_its_clock_says() {
        let now = moment(2, 507, 3, 9008);
        assert_eq!(now.boot_start(&rate()), moment(2, 504, 0, 9005));
        assert_eq!(now.at_monotonic(5 * SECOND, &rate()), moment(2, 509, 5, 9010));
        let saved = moment(1, 500, 480, 9000);
        assert_eq!(rate().elapsed(&saved, &now.boot_start(&rate())).ns, 4 * SECOND);
        // A clock that claims more than the TSC holds.
        assert_eq!(moment(2, 5, 8, 9000).boot_start(&rate()).tsc, 0);
    }

    #[test]
    fn a_process_is_told_by_its_22nd_field_whatever_its_name() {
        let stat = b"77 (a) b 1 (2 3) S 1 77 77 0 -1 4194560 300 0 0 0 1 2 0 0 20 0 1 0 4321 9 10 11";
        assert_eq!(start_ns(stat, 100), Some(43_210_000_000));
        assert_eq!(start_ns(stat, 0), None);
        assert_eq!(start_ns(b"77 (a) S 1 77", 100), None);
        assert_eq!(start_ns(b"77 (a)", 100), None);
        assert_eq!(start_ns(b"", 100), None);
    }

    #[test]
    fn a_boot_is_told_by_32_digits() {
        let id = parse_boot_id("7b512e12-5f3f-4ef3-9a12-b38ba17e92ae\n").unwrap();
        assert_eq!((id[0], id[1], id[15]), (0x7b, 0x51, 0xae));
        for none in ["", "7b512e12", "+b512e12-5f3f-4ef3-9a12-b38ba17e92ae", "éééééééééééééééé"]
        {
            assert_eq!(parse_boot_id(none), None, "{none}");
        }
    }

    #[test]
    fn two_real_moments_agree_by_the_tsc_and_by_the_kernels_clock() {
        let earlier = Moment::now().unwrap();
        let rate = TscRate::measure().unwrap();
        let later = Moment::now().unwrap();
        assert_eq!(earlier.boot, later.boot);
        let by_clock = rate.elapsed(&earlier, &later);
        assert_eq!(by_clock.by, By::Monotonic);
        // Were it another boot, the TSC would count, and come to the same.
        let by_tsc = rate.elapsed(&Moment { boot: [0; 16], ..earlier }, &later);
        assert_eq!(by_tsc.by, By::Tsc);
        let off_ns = by_clock.off_ns + by_tsc.off_ns;
        assert!(by_clock.ns.abs_diff(by_tsc.ns) <= off_ns, "{by_clock:?} {by_tsc:?}");
        assert!(by_clock.ns >= 20_000_000);
    }

    #[test]
    fn this_process_started_after_the_kernel_and_before_now() {
        let started = process_start_ns(std::process::id()).unwrap();
        let first = process_start_ns(1).unwrap();
        assert!(first <= started && started <= Moment::now().unwrap().monotonic_ns, "{first} {started}");
    }
}
