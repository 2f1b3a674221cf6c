//! Waiting until the rest of the machine is quiet.
//!
//! What else runs on the machine makes every figure worse and none truer. So a bench looks at the machine while
//! neither guest runs, and waits for a better moment if it is busy: but not for ever, and it says how it was.

use std::time::{Duration, Instant};

/// One look.
const LOOK: Duration = Duration::from_millis(40);
/// Part of the processors' time that may be somebody else's.
const QUIET: f64 = 0.15;

/// Waits for a quiet machine, with patience for the whole of a run.
#[derive(Debug)]
pub struct Quiet {
    patience: Duration,
    looks: u32,
    busy: f64,
    disturbed: u32,
}

impl Quiet {
    /// Waits for that long at most, all in all.
    #[must_use]
    pub fn new(patience: Duration) -> Self {
        Self { patience, looks: 0, busy: 0.0, disturbed: 0 }
    }

    /// Waits until the machine is quiet, or there is no patience left. To be called while neither guest runs.
    pub fn wait(&mut self) {
        let begun = Instant::now();
        loop {
            let busy = busy_for(LOOK);
            let quiet = busy <= QUIET;
            if quiet || begun.elapsed() >= self.patience {
                self.looks += 1;
                self.busy += busy;
                self.disturbed += u32::from(!quiet);
                self.patience = self.patience.saturating_sub(begun.elapsed().saturating_sub(LOOK));
                return;
            }
        }
    }

    /// What part of the processors' time was somebody else's when the waits ended, on average.
    #[must_use]
    pub fn busy(&self) -> f64 {
        self.busy / f64::from(self.looks.max(1))
    }

    /// In how many of the waits patience ran out, and how many there were.
    #[must_use]
    pub fn disturbed(&self) -> (u32, u32) {
        (self.disturbed, self.looks)
    }
}

/// The part of the processors' time that was used while this thread slept.
fn busy_for(span: Duration) -> f64 {
    let before = ticks();
    std::thread::sleep(span);
    let Some(((busy_before, idle_before), (busy, idle))) = before.zip(ticks()) else { return 0.0 };
    let (busy, idle) = (busy.saturating_sub(busy_before), idle.saturating_sub(idle_before));
    let float = |ticks: u64| f64::from(u32::try_from(ticks).unwrap_or(u32::MAX));
    float(busy) / float((busy + idle).max(1))
}

/// Time of all processors, busy and idle, as the kernel counts it.
fn ticks() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    parse(text.lines().next()?)
}

fn parse(line: &str) -> Option<(u64, u64)> {
    // user, nice, system, idle, waiting for I/O, interrupts (two kinds), taken away by the host; what follows is
    // counted in the first two already.
    let fields = line.strip_prefix("cpu ")?.split_whitespace().take(8);
    let fields = fields.map(|field| field.parse::<u64>().ok()).collect::<Option<Vec<_>>>()?;
    let idle = fields.get(3)? + fields.get(4)?;
    Some((fields.iter().sum::<u64>() - idle, idle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_not_counted_twice_and_waiting_is_idle() {
        assert_eq!(parse("cpu  1 2 4 100 50 8 16 32 1000 1000"), Some((63, 150)));
        assert_eq!(parse("cpu0 1 2 3 4 5 6 7 8"), None);
        assert_eq!(parse("cpu  1 2"), None);
    }

    #[test]
    fn without_patience_one_look_is_enough() {
        let mut quiet = Quiet::new(Duration::ZERO);
        let begun = Instant::now();
        (0..3).for_each(|_| quiet.wait());
        assert!(begun.elapsed() >= 3 * LOOK);
        assert_eq!(quiet.disturbed().1, 3);
        assert!((0.0..=1.0).contains(&quiet.busy()));
    }
}
