//! The same guest on plain shared memory, in a VM of this process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use floor::{Guest, PageSize, PlainMemory, Slot};
use pulse::{Image, Layout, MAILBOX_OFFSET, Mailbox, Options, Vectors, Words};
use vmm::control::Pages;

/// How long the guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a hop took, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Took {
    /// By the host's clock.
    pub pause_us: f64,
    /// The part of it that reads the state.
    pub save_us: f64,
    /// The part of it that writes the state.
    pub load_us: f64,
    /// By the guest's clock: the longest time in which it did not look at it.
    pub guest_pause_us: f64,
}

struct PlainWords(Arc<PlainMemory>);

impl Words for PlainWords {
    fn load(&self, offset_bytes: u64) -> u64 {
        self.0.load(offset_bytes)
    }

    fn store(&self, offset_bytes: u64, value: u64) {
        self.0.store(offset_bytes, value);
    }
}

/// pulse on plain memory. It runs, unless it is [stopped](Plain::stop).
pub struct Plain {
    guest: Guest,
    words: PlainWords,
    layout: Layout,
}

impl Plain {
    /// Makes the memory, with all its pages, and starts the guest.
    ///
    /// # Errors
    /// If there is no KVM, or not enough memory.
    pub fn start(memory_bytes: u64, pages: Pages) -> Result<Self> {
        let pages = match pages {
            Pages::Huge => PageSize::Huge,
            Pages::Small => PageSize::Small,
            Pages::Giant => anyhow::bail!("plain memory of 1 GiB pages is not made here"),
        };
        let memory = PlainMemory::new(memory_bytes, pages)?;
        let slots: Vec<Slot> = pulse::slots(memory_bytes)
            .into_iter()
            .map(|slot| Slot {
                guest_address: slot.guest_address,
                offset_bytes: slot.offset_bytes,
                len_bytes: slot.len_bytes,
            })
            .collect();
        let layout = Layout::new(memory_bytes)?;
        let into = Arc::clone(&memory);
        let guest = Guest::start(&memory, &slots, |vcpu, cpuid| {
            let vectors = Vectors::widest(cpuid.as_slice());
            let cycles_per_ms = vcpu.get_tsc_khz().unwrap_or_default().into();
            let options = Options { vectors, ..Options::new(cycles_per_ms) };
            // Only a size that is no layout's is refused, and this one is.
            let Ok(image) = Image::new(memory_bytes, &options) else { return Ok(()) };
            for (offset, bytes) in image.pieces() {
                into.write(offset, bytes);
            }
            let Some(start) = image.starts().next() else { return Ok(()) };
            vcpu.set_sregs(&start.sregs(vcpu.get_sregs()?))?;
            if vectors == Vectors::Avx2 {
                vcpu.set_xcrs(&start.xcrs(vcpu.get_xcrs()?))?;
            }
            vcpu.set_regs(&start.regs())
        })?;
        let plain = Self { guest, words: PlainWords(memory), layout };
        plain.wait("count", |mailbox| mailbox.ticks() > 0)?;
        Ok(plain)
    }

    fn mailbox(&self) -> Mailbox<'_, PlainWords> {
        Mailbox::new(&self.words, MAILBOX_OFFSET)
    }

    fn wait(&self, what: &str, done: impl Fn(Mailbox<'_, PlainWords>) -> bool) -> Result<()> {
        let begun = Instant::now();
        while !done(self.mailbox()) {
            if begun.elapsed() > PATIENCE {
                bail!("the plain guest does not {what}");
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    /// What it has counted.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        self.mailbox().ticks()
    }

    /// Full passes over its memory.
    #[must_use]
    pub fn passes(&self) -> u64 {
        self.mailbox().progress(&self.layout).pass
    }

    /// Bytes of its memory that are mapped in huge pages.
    #[must_use]
    pub fn huge_bytes(&self) -> u64 {
        self.words.0.huge_bytes()
    }

    /// Takes it to another VM: the floor.
    ///
    /// # Errors
    /// If it was lost on the way.
    pub fn hop(&mut self) -> Result<Took> {
        let request = self.mailbox().reset_gap();
        self.wait("forget its longest gap", |mailbox| mailbox.gap_is_reset(request))?;
        let hop = self.guest.hop()?;
        // Two ticks: after the first one it has compared the gap, after the second one it is written.
        let ticks = self.ticks() + 1;
        self.wait("count on", |mailbox| mailbox.ticks() > ticks)?;
        let mailbox = self.mailbox();
        let gap = mailbox.nanoseconds(mailbox.longest_gap().cycles);
        let gap = Duration::from_nanos(gap.context("the rate of the guest's clock is not known")?);
        let micros = |span: Duration| span.as_secs_f64() * 1e6;
        Ok(Took {
            pause_us: micros(hop.pause),
            save_us: micros(hop.save),
            load_us: micros(hop.load),
            guest_pause_us: micros(gap),
        })
    }

    /// Takes it off the processor.
    ///
    /// # Errors
    /// If it is gone.
    pub fn stop(&mut self) -> Result<()> {
        Ok(self.guest.stop()?)
    }

    /// Lets it run.
    ///
    /// # Errors
    /// If it is gone.
    pub fn go(&mut self) -> Result<()> {
        Ok(self.guest.go()?)
    }

    /// Ends it, if it has found nothing wrong.
    ///
    /// # Errors
    /// If it has.
    pub fn finish(self) -> Result<()> {
        match (self.mailbox().errors(), self.mailbox().fault()) {
            (0, None) => Ok(()),
            (errors, fault) => bail!("the plain guest found {errors} errors, and has the fault {fault:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_guest_counts_on_after_each_hop_and_stands_still_when_stopped() {
        harness::need!(kvm);
        let mut plain = Plain::start(8 << 20, Pages::Small).unwrap();
        for _ in 0..3 {
            let took = plain.hop().unwrap();
            // The three are rounded, each by itself.
            assert!(took.pause_us + 1.0 >= took.save_us + took.load_us, "{took:?}");
            // What the guest sees is the host's pause and the way out and in.
            assert!(took.guest_pause_us > took.pause_us, "{took:?}");
        }
        plain.stop().unwrap();
        let stopped = plain.ticks();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(plain.ticks(), stopped);
        plain.go().unwrap();
        plain.wait("count on", |mailbox| mailbox.ticks() > stopped).unwrap();
        let passes = plain.passes();
        plain.wait("walk on", |_| plain.passes() > passes + 1).unwrap();
        plain.finish().unwrap();
    }
}
