//! A machine's way from one kernel to the next: what is told of it, and what it took.

use std::fs;
use std::process;

use custody::When;
use liveupdate::moment;
use liveupdate::moment::Moment;
use liveupdate::moment::TscRate;
use machine::update::Step;
use machine::update::Timeline;
use serde::Deserialize;
use serde::Serialize;

use crate::control::KexecReport;
use crate::guest::Served;
use crate::measure;

/// What is told of it by one kernel's programs to the next one's.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Crossing {
    /// When what happened, before and after.
    pub(crate) when: When,
    /// The guest's clock at the moment `clock`, in nanoseconds.
    clock_ns: Option<u64>,
    /// When this kernel's first program was started, in nanoseconds of the monotonic clock, as whoever starts the VMM sees it:
    /// the VMM itself may be confined, and see no process but its own.
    #[serde(default)]
    first_program_ns: Option<u64>,
}

/// Parts of the pause: what each is called, and what it goes on to.
const PARTS: [(&str, &str); 12] = [
    ("save", "sealed"),
    ("shutdown", "jump"),
    ("kexec", "boot"),
    ("kernel", "user"),
    ("user_space", "resume"),
    ("session", "session"),
    ("retrieve", "retrieved"),
    ("start_vmm", "received"),
    ("map", "attached"),
    ("prepare", "warm"),
    ("load", "loaded"),
    ("first_instruction", "entered"),
];

impl Crossing {
    /// Of a guest that is about to leave.
    pub(crate) fn begin(guest: &dyn Served) -> Self {
        let mut when = When::default();
        let clock_ns = guest.clock_ns();
        when.now("clock");
        Self { when, clock_ns, first_program_ns: None }
    }

    /// Looks at what a VMM may not see.
    pub(crate) fn look_around(&mut self) {
        self.first_program_ns = first_program_ns();
    }

    /// What is known of the time between the two lives, by this one.
    pub(crate) fn look_back(&mut self, rate: &TscRate) {
        let Ok(now) = Moment::now() else { return };
        self.when.note("boot", &now.boot_start(rate));
        if let Some(user_ns) = self.first_program_ns {
            self.when.note("user", &now.at_monotonic(user_ns.min(now.monotonic_ns), rate));
        }
    }

    /// How much time has passed since it [began](Crossing::begin), in nanoseconds.
    pub(crate) fn since_it_began_ns(&self, rate: &TscRate) -> u64 {
        let began = self.when.at("clock").zip(Moment::now().ok());
        began.map_or(0, |(began, now)| rate.elapsed(&began, &now).ns)
    }

    /// What it took. The guest runs by now; its first instruction was at `entered_ns` of the monotonic clock.
    pub(crate) fn report(
        mut self,
        name: &str,
        (timeline, entered_ns): (&Timeline, Option<u64>),
        told: &measure::Told,
        guest: &dyn Served,
        rate: &TscRate,
    ) -> KexecReport {
        if let Ok(now) = Moment::now() {
            let mut note = |what: &str, at_ns: Option<u64>| {
                if let Some(at_ns) = at_ns {
                    self.when.note(what, &now.at_monotonic(at_ns.min(now.monotonic_ns), rate));
                }
            };
            note("received", timeline.at_ns(Step::Received));
            note("attached", timeline.at_ns(Step::Attached));
            note("warm", timeline.at_ns(Step::Warm));
            note("loaded", timeline.at_ns(Step::Loaded));
            note("entered", entered_ns);
        }
        let pause = self.when.at("stopped").zip(self.when.at("entered"));
        let pause = pause.map(|(stopped, entered)| rate.elapsed(&stopped, &entered));
        let shutdown = self.when.at("asked").zip(self.when.at("stopped"));
        let shutdown = shutdown.map(|(asked, stopped)| rate.elapsed(&asked, &stopped));
        KexecReport {
            name: name.to_owned(),
            pid: process::id(),
            shutdown_us: shutdown.map(|shutdown| measure::micros(shutdown.ns)),
            pause_us: pause.map(|pause| measure::micros(pause.ns)),
            clock: pause.map(|pause| pause.by.name().to_owned()),
            uncertain_us: pause.map(|pause| measure::micros(pause.off_ns)),
            phases_us: self.parts(rate),
            guest_pause_us: told.guest_pause_us,
            clock_error_us: self.clock_error_us(guest, rate),
            ticks_before: told.ticks_before,
            ticks_after: told.ticks_after,
        }
    }

    /// Each part from the end of the one before it; one whose end is not known is in the next.
    fn parts(&self, rate: &TscRate) -> Vec<(String, f64)> {
        let mut from = self.when.at("stopped");
        let mut parts = Vec::new();
        for (part, ends) in PARTS {
            let Some((begun, end)) = from.zip(self.when.at(ends)) else { continue };
            parts.push((part.to_owned(), measure::micros(rate.elapsed(&begun, &end).ns)));
            from = Some(end);
        }
        parts
    }

    #[expect(clippy::cast_precision_loss, reason = "errors of a clock are far below 2^52 ns")]
    fn clock_error_us(&self, guest: &dyn Served, rate: &TscRate) -> Option<f64> {
        let (before_ns, at) = self.clock_ns.zip(self.when.at("clock"))?;
        let after_ns = guest.clock_ns()?;
        let passed_ns = rate.elapsed(&at, &Moment::now().ok()?).ns;
        let error_ns = i128::from(after_ns) - i128::from(before_ns) - i128::from(passed_ns);
        Some(error_ns as f64 / 1000.0)
    }
}

/// When the first program was started that process 1 has started, or any other: the end of what the kernel does by itself,
/// and of the little that process 1 did before.
fn first_program_ns() -> Option<u64> {
    let processes =
        fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let numbers = processes.filter_map(|name| name.parse::<u32>().ok());
    // Threads of the kernel execute no file.
    let programs =
        numbers.filter(|number| *number != 1 && fs::read_link(format!("/proc/{number}/exe")).is_ok());
    programs.filter_map(|number| moment::process_start_ns(number).ok()).min()
}
