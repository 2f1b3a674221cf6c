//! pulse as threads of the VMM, one for each vCPU, where there is no KVM.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use fdpass::monotonic_ns;
use gmem::Inode;
use kvm_ioctls::VmFd;
use machine::StateName;
use machine::update::Guest;
use pulse::Image;
use pulse::Layout;
use pulse::Options;
use pulse::Outside;
use pulse::Walk;
use pulse::ports::KEYBOARD_PORT;
use pulse::ports::POWER_PORT;
use pulse::ports::RESET_PORT;
use region::PageSize;

use crate::control::DeviceStatus;
use crate::control::GuestKind;
use crate::control::MachineSpec;
use crate::guest;
use crate::guest::End;
use crate::guest::GuestError;
use crate::guest::Health;
use crate::guest::MemoryWords;
use crate::guest::STOP_TIMEOUT;
use crate::guest::Served;
use crate::guest::below;

/// Formats of its states.
pub(crate) const FORMATS: [&str; 1] = ["tideover-pulse-walk-v1"];
const FIRST_WALK: StateName = StateName::literal("walk0");
/// Its clock counts nanoseconds.
const CYCLES_PER_MS: u64 = 1_000_000;
/// Steps between two looks whether it is to stop.
const STEPS: u32 = 16;
/// Written to the reset port: reset the processor.
const RESET_CPU: u8 = 1 << 2;

/// Names of the states of a guest with so many vCPUs.
pub(crate) fn states(vcpus: u32) -> Vec<StateName> {
    (0..vcpus).map(walk_state).collect()
}

fn walk_state(vcpu: u32) -> StateName {
    StateName::new(format!("walk{vcpu}").as_bytes()).unwrap_or(FIRST_WALK)
}

/// What a vCPU is doing.
#[derive(Debug)]
struct Shared {
    turn: Mutex<Turn>,
    changed: Condvar,
    /// A look at this is cheaper than at the turn.
    stop: AtomicBool,
}

#[derive(Debug)]
struct Turn {
    wanted: Wanted,
    /// The walk while it stands still.
    still: Option<Walk>,
    stopped_ns: u64,
    entered_ns: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Still,
    Run,
    End,
}

impl Shared {
    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, wanted: Wanted) {
        let mut turn = self.turn();
        turn.wanted = wanted;
        self.stop.store(wanted != Wanted::Run, Ordering::Release);
        self.changed.notify_all();
    }
}

/// A vCPU that is a thread.
#[derive(Debug)]
struct WalkThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    layout: Layout,
}

impl WalkThread {
    fn spawn(
        memory: &Arc<Inode>,
        layout: Layout,
        still: Option<Walk>,
        health: &Health,
    ) -> Result<Self, GuestError> {
        let words = MemoryWords(Arc::clone(memory.mapping()));
        let turn = Turn { wanted: Wanted::Still, still, stopped_ns: 0, entered_ns: 0 };
        let shared =
            Arc::new(Shared { turn: Mutex::new(turn), changed: Condvar::new(), stop: AtomicBool::new(true) });
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new().name(format!("vcpu{}", layout.vcpu())).spawn({
            let health = health.clone();
            move || {
                let _fallen = Fallen(health.clone());
                live(&theirs, &words, &health);
            }
        });
        let thread = Some(thread.map_err(below("start the vCPU's thread"))?);
        Ok(Self { shared, thread, layout })
    }

    /// Waits until it stands still, as it was told to.
    fn await_stop(&self, end: Instant) -> Result<(), GuestError> {
        let turn = self.shared.turn();
        let left = end.saturating_duration_since(Instant::now());
        let waited = self.shared.changed.wait_timeout_while(turn, left, |turn| turn.still.is_none());
        let (turn, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if turn.still.is_some() { Ok(()) } else { Err(GuestError::TimedOut("stop")) }
    }

    fn save(&self) -> Result<Vec<u8>, GuestError> {
        let turn = self.shared.turn();
        let walk = turn.still.as_ref().ok_or(GuestError::TimedOut("stop"))?;
        Ok(walk.encode().to_vec())
    }

    fn load(&self, bytes: &[u8]) -> Result<(), GuestError> {
        let walk = Walk::decode(bytes, &self.layout).map_err(below("read the vCPU's state"))?;
        self.shared.turn().still = Some(walk);
        Ok(())
    }

    fn stopped_ns(&self) -> Option<u64> {
        Some(self.shared.turn().stopped_ns).filter(|at| *at != 0)
    }

    fn entered_ns(&self) -> Option<u64> {
        Some(self.shared.turn().entered_ns).filter(|at| *at != 0)
    }
}

impl Drop for WalkThread {
    fn drop(&mut self) {
        self.shared.want(Wanted::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Tells if a vCPU's thread falls over.
struct Fallen(Health);

impl Drop for Fallen {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end(End::Crashed("its thread has panicked".to_owned()));
        }
    }
}

/// What a vCPU has outside of its memory: a clock, and the ports by which the guest ends.
struct World<'a> {
    health: &'a Health,
    has_ended: bool,
}

impl World<'_> {
    fn end(&mut self, end: End) {
        self.health.end(end);
        self.has_ended = true;
    }
}

impl Outside for World<'_> {
    fn now(&mut self) -> u64 {
        monotonic_ns()
    }

    fn output(&mut self, port: u16, data: &[u8]) {
        match (port, data) {
            (POWER_PORT, _) => self.end(End::PowerOff),
            (KEYBOARD_PORT, _) => self.end(End::Reset),
            (RESET_PORT, [value]) if value & RESET_CPU != 0 => self.end(End::Reset),
            _ => {}
        }
    }

    fn crash(&mut self) {
        self.end(End::Crashed("a triple fault".to_owned()));
    }
}

/// A vCPU's life: stands still, runs, stands still.
fn live(shared: &Shared, words: &MemoryWords, health: &Health) {
    loop {
        let mut turn = shared.turn();
        while turn.wanted == Wanted::Still || (turn.wanted == Wanted::Run && turn.still.is_none()) {
            turn = shared.changed.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
        let Some(mut walk) = turn.still.take().filter(|_| turn.wanted == Wanted::Run) else { return };
        turn.entered_ns = monotonic_ns();
        drop(turn);
        let mut world = World { health, has_ended: false };
        while !shared.stop.load(Ordering::Acquire) && !world.has_ended {
            for _ in 0..STEPS {
                walk.step(words, &mut world);
                if world.has_ended {
                    break;
                }
            }
        }
        let mut turn = shared.turn();
        if world.has_ended && turn.wanted == Wanted::Run {
            turn.wanted = Wanted::Still;
        }
        turn.stopped_ns = monotonic_ns();
        turn.still = Some(walk);
        shared.changed.notify_all();
    }
}

/// pulse as threads.
#[derive(Debug)]
pub struct ThreadGuest {
    vcpus: Vec<WalkThread>,
    memory: Arc<Inode>,
    health: Health,
    /// How long they may take to stop.
    patience: Duration,
}

impl ThreadGuest {
    /// A guest with so many vCPUs that starts from the beginning, in this memory.
    ///
    /// # Errors
    /// [`GuestError`]
    pub fn first(memory: &Arc<Inode>, vcpus: u32, health: Health) -> Result<Self, GuestError> {
        let pause_threshold_cycles = guest::pause_threshold(CYCLES_PER_MS);
        let options = Options { vcpus, pause_threshold_cycles, ..Options::new(CYCLES_PER_MS) };
        let image = Image::new(memory.size_bytes(), &options);
        let image = image.map_err(below("lay the guest out"))?;
        for (offset, bytes) in image.pieces() {
            memory.mapping().write(offset, bytes).map_err(below("write the guest into memory"))?;
        }
        let now = monotonic_ns();
        Self::spawn(memory, image.layouts(), |layout| Some(Walk::new(layout, now)), health)
    }

    /// A guest that is to be loaded, with so many vCPUs.
    ///
    /// # Errors
    /// [`GuestError`]
    pub fn prepare(memory: &Arc<Inode>, vcpus: u32, health: Health) -> Result<Self, GuestError> {
        let words = MemoryWords(Arc::clone(memory.mapping()));
        let mailboxes = words.mailboxes().map_err(below("read the guest's layout"))?;
        if mailboxes.vcpus() != vcpus {
            return Err(GuestError::OtherVcpus { machine: vcpus, memory: mailboxes.vcpus() });
        }
        Self::spawn(memory, mailboxes.layouts(), |_| None, health)
    }

    fn spawn(
        memory: &Arc<Inode>,
        layouts: &[Layout],
        still: impl Fn(&Layout) -> Option<Walk>,
        health: Health,
    ) -> Result<Self, GuestError> {
        let vcpus = layouts.iter().map(|layout| WalkThread::spawn(memory, *layout, still(layout), &health));
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        Ok(Self { vcpus, memory: Arc::clone(memory), health, patience: STOP_TIMEOUT })
    }

    fn want(&self, wanted: Wanted) {
        self.vcpus.iter().for_each(|vcpu| vcpu.shared.want(wanted));
    }
}

impl Guest for ThreadGuest {
    type Error = GuestError;

    fn pause(&mut self) -> Result<(), GuestError> {
        self.want(Wanted::Still);
        let end = Instant::now() + self.patience;
        self.vcpus.iter().try_for_each(|vcpu| vcpu.await_stop(end))
    }

    fn save(&mut self) -> Result<Vec<(StateName, Vec<u8>)>, GuestError> {
        if let Some(why) = self.health.ended() {
            return Err(GuestError::Failed(why.to_string()));
        }
        let states = self.vcpus.iter().zip(0..).map(|(vcpu, index)| Ok((walk_state(index), vcpu.save()?)));
        states.collect()
    }

    fn stopped_ns(&self) -> Option<u64> {
        self.vcpus.iter().filter_map(WalkThread::stopped_ns).min()
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        // One that has ended stands still for good, and is not lost by that.
        if self.health.ended().is_some() { Ok(()) } else { self.start() }
    }
}

impl Served for ThreadGuest {
    fn kind(&self) -> GuestKind {
        GuestKind::Thread
    }

    fn load(&mut self, states: &BTreeMap<StateName, Vec<u8>>) -> Result<(), GuestError> {
        self.vcpus.iter().zip(0..).try_for_each(|(vcpu, index)| {
            let name = walk_state(index);
            vcpu.load(states.get(&name).ok_or(GuestError::NoState(name))?)
        })
    }

    fn start(&mut self) -> Result<(), GuestError> {
        self.want(Wanted::Run);
        Ok(())
    }

    fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    fn formats(&self) -> Vec<String> {
        FORMATS.map(str::to_owned).to_vec()
    }

    fn before_freeze(&self) -> Result<(), GuestError> {
        // A thread cannot be got out of a page fault.
        let filled = self.memory.mapping().warm(PageSize::Small, &mut |_, _| {});
        filled.map(drop).map_err(below("give all of the guest's pages memory"))
    }

    fn before_pause(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    fn entered_ns(&self) -> Option<u64> {
        // Not known as long as one of them was not entered.
        self.vcpus.iter().map(WalkThread::entered_ns).collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    fn vm_object(&self) -> Option<&Arc<VmFd>> {
        None
    }

    fn health(&self) -> &Health {
        &self.health
    }

    fn devices(&self, _: &MachineSpec) -> Vec<DeviceStatus> {
        Vec::new()
    }

    fn attend(&self) {}
}

#[cfg(test)]
mod tests {
    use machine::Machine;
    use machine::MemoryName;
    use machine::MemorySpec;
    use machine::SessionName;
    use machine::Spec;
    use pulse::Command;

    use super::*;

    fn machine(vcpus: u32) -> Machine {
        let spec = Spec {
            name: SessionName::literal("threads"),
            vcpus: vcpus.into(),
            memories: vec![MemorySpec::new(MemoryName::literal("ram"), 8 << 20)],
            states: states(vcpus),
        };
        Machine::create(&spec, &mut |_, _| {}).unwrap()
    }

    fn guest(machine: &Machine, vcpus: u32) -> ThreadGuest {
        ThreadGuest::first(&machine.memories()[0].inode, vcpus, Health::well().unwrap()).unwrap()
    }

    fn words(machine: &Machine) -> MemoryWords {
        MemoryWords(Arc::clone(machine.memories()[0].inode.mapping()))
    }

    #[test]
    fn each_command_ends_the_guest_as_it_says_whichever_vcpu_gets_it() {
        let ends = [
            (Command::PowerOff, End::PowerOff),
            (Command::Reset, End::Reset),
            (Command::ResetByChipset, End::Reset),
            (Command::Crash, End::Crashed("a triple fault".to_owned())),
        ];
        for (command, end) in ends {
            for vcpu in 0..2 {
                let machine = machine(2);
                let (mut guest, words) = (guest(&machine, 2), words(&machine));
                guest.start().unwrap();
                words.mailboxes().unwrap().get(vcpu).unwrap().command(command);
                let begun = Instant::now();
                while guest.health().ended().is_none() {
                    assert!(begun.elapsed() < Duration::from_secs(60), "{command:?}");
                    thread::sleep(Duration::from_millis(1));
                }
                assert_eq!(guest.health().ended().as_ref(), Some(&end));
                guest.pause().unwrap();
                assert!(guest.save().is_err(), "one that has ended goes nowhere");
                let ticks = words.ticks();
                guest.resume().unwrap();
                thread::sleep(Duration::from_millis(10));
                assert_eq!(words.ticks(), ticks, "it stands still for good");
            }
        }
    }

    #[test]
    fn a_guest_that_does_not_stop_is_waited_for_no_longer_than_asked() {
        harness::need!(userfaultfd);
        let memory = MemorySpec { prefault: false, ..MemorySpec::new(MemoryName::literal("ram"), 64 << 20) };
        let spec = Spec {
            name: SessionName::literal("patience"),
            vcpus: 1,
            memories: vec![memory],
            states: states(1),
        };
        let machine = Machine::create(&spec, &mut |_, _| {}).unwrap();
        let mut guest = guest(&machine, 1);
        guest.start().unwrap();
        // A thread that waits at a hole cannot be stopped.
        let freeze = machine.memories()[0].inode.freeze().unwrap();
        assert!(freeze.wait_fault(Duration::from_secs(60)).unwrap().is_some());
        guest.set_patience(Duration::from_millis(10));
        let waited = |guest: &mut ThreadGuest| {
            let begun = Instant::now();
            assert!(matches!(guest.pause(), Err(GuestError::TimedOut("stop"))));
            begun.elapsed()
        };
        // This test, too, has to be given a processor in time.
        let in_time = (0..20).any(|_| waited(&mut guest) < STOP_TIMEOUT);
        assert!(in_time, "it is waited for {STOP_TIMEOUT:?}");
        drop(freeze);
        guest.set_patience(Duration::from_secs(60));
        guest.pause().unwrap();
    }

    #[test]
    fn a_vcpu_is_not_loaded_with_the_state_of_another() {
        let machine = machine(2);
        let mut first = guest(&machine, 2);
        first.start().unwrap();
        first.pause().unwrap();
        let good: BTreeMap<_, _> = first.save().unwrap().into_iter().collect();
        let swapped = good.keys().copied().zip(good.values().rev().cloned()).collect();
        let memory = &machine.memories()[0].inode;
        let mut second = ThreadGuest::prepare(memory, 2, Health::well().unwrap()).unwrap();
        assert!(second.load(&swapped).is_err());
        second.load(&good).unwrap();
    }

    #[test]
    fn a_memory_of_another_number_of_vcpus_is_refused_by_both_numbers() {
        let machine = machine(2);
        drop(guest(&machine, 2));
        let memory = &machine.memories()[0].inode;
        let refused = ThreadGuest::prepare(memory, 3, Health::well().unwrap()).unwrap_err();
        assert!(matches!(refused, GuestError::OtherVcpus { machine: 3, memory: 2 }), "{refused}");
    }

    #[test]
    fn a_pause_is_from_the_first_stop_to_the_last_entry() {
        let machine = machine(3);
        let mut guest = guest(&machine, 3);
        assert_eq!((guest.stopped_ns(), guest.entered_ns()), (None, None));
        guest.start().unwrap();
        while guest.entered_ns().is_none() {
            thread::yield_now();
        }
        guest.pause().unwrap();
        let (stopped, entered) = (guest.stopped_ns(), guest.entered_ns());
        assert!(guest.vcpus.iter().all(|vcpu| vcpu.stopped_ns() >= stopped));
        assert!(guest.vcpus.iter().all(|vcpu| vcpu.entered_ns() <= entered));
        assert!(entered < stopped);
    }
}
