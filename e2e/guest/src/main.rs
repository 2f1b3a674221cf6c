//! The first process of a Linux guest: checks and rewrites memory of its own, pass after pass, writes records to its disk and
//! reads them back, and says some times a second how far it is and what it found wrong.

#![forbid(unsafe_code)]

mod disk;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use rustix::mount::MountFlags;
use rustix::time::ClockId;
use tideover_e2e_guest::Said;

use crate::disk::Disk;

/// The memory that is checked, in words: 32 MiB.
const WORDS: usize = (32 << 20) / size_of::<u64>();
/// What is checked and written between two looks at the clock, in words: 64 KiB.
const PIECE_WORDS: usize = (64 << 10) / size_of::<u64>();
/// From one line to the next.
const INTERVAL: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!(
            "this is the first process of an emulated guest, and does nothing elsewhere: cargo xtask e2e"
        );
        return ExitCode::FAILURE;
    }
    if let Err(error) = Guest::new().and_then(Guest::live) {
        println!("guest: FAILED {error:#}");
    }
    // The kernel must not lose its first process; who waits for its next line gives up.
    loop {
        std::thread::park();
    }
}

struct Guest {
    memory: Vec<u64>,
    disk: Option<Disk>,
    said: Said,
    /// The last look at the clock, and the last line's.
    looked: Duration,
    spoke: Duration,
}

impl Guest {
    fn new() -> anyhow::Result<Self> {
        rustix::mount::mount("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), None::<&std::ffi::CStr>)
            .context("cannot mount devtmpfs")?;
        let disk = Disk::open()?;
        let memory = (0..WORDS).map(|index| pattern(0, index)).collect();
        let now = clock(ClockId::Monotonic)?;
        Ok(Self { memory, disk, said: Said::default(), looked: now, spoke: now })
    }

    fn live(mut self) -> anyhow::Result<()> {
        loop {
            let pass = self.said.passes;
            for from in (0..WORDS).step_by(PIECE_WORDS) {
                self.piece(pass, from);
                self.said.count += 1;
                self.look()?;
                if self.looked.saturating_sub(self.spoke) >= INTERVAL {
                    self.speak()?;
                }
            }
            self.said.passes += 1;
        }
    }

    /// Checks what the last pass wrote, and writes what the next one checks.
    fn piece(&mut self, pass: u64, from: usize) {
        for (word, index) in self.memory[from..from + PIECE_WORDS].iter_mut().zip(from..) {
            if *word != pattern(pass, index) {
                self.said.errors += 1;
            }
            *word = pattern(pass + 1, index);
        }
    }

    fn look(&mut self) -> anyhow::Result<()> {
        let now = clock(ClockId::Monotonic)?;
        self.said.errors += u64::from(now < self.looked);
        let gap = now.saturating_sub(self.looked);
        self.looked = now;
        self.said.lately_us = self.said.lately_us.max(u64::try_from(gap.as_micros())?);
        self.said.gap_us = self.said.gap_us.max(self.said.lately_us);
        Ok(())
    }

    fn speak(&mut self) -> anyhow::Result<()> {
        if let Some(disk) = &mut self.disk {
            disk.write(self.said.disk)?;
            let older = disk.older(self.said.disk);
            for number in [self.said.disk, older] {
                self.said.errors += u64::from(!disk.has(number)?);
            }
            self.said.disk += 1;
            self.look()?;
        }
        self.said.ahead_us = ahead_us()?;
        self.said.up_ms = u64::try_from(self.looked.as_millis())?;
        println!("{}", self.said);
        self.said.lately_us = 0;
        self.look()?;
        self.spoke = self.looked;
        Ok(())
    }
}

/// What the word at this place is after so many passes.
fn pattern(pass: u64, index: usize) -> u64 {
    let index = u64::try_from(index).unwrap_or_default();
    (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (pass + 1).wrapping_mul(0xc2b2_ae3d_27d4_eb4f)
}

/// By how much the time of day is ahead of the other clock: the quickest of some looks at both, as one may be interrupted.
fn ahead_us() -> anyhow::Result<u64> {
    let mut looks = Vec::new();
    for _ in 0..5 {
        let (before, day, after) =
            (clock(ClockId::Monotonic)?, clock(ClockId::Realtime)?, clock(ClockId::Monotonic)?);
        looks.push((after.saturating_sub(before), day.saturating_sub(before)));
    }
    let ahead = looks.into_iter().min().map(|(_, ahead)| ahead).unwrap_or_default();
    Ok(u64::try_from(ahead.as_micros())?)
}

fn clock(id: ClockId) -> anyhow::Result<Duration> {
    let time = rustix::time::clock_gettime(id);
    Ok(Duration::new(u64::try_from(time.tv_sec)?, u32::try_from(time.tv_nsec)?))
}
