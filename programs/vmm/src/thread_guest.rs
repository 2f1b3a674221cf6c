//! pulse as a thread of the VMM, where there is no KVM.

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

use fdpass::monotonic_ns;
use gmem::Inode;
use machine::StateName;
use machine::update::Guest;
use pulse::Image;
use pulse::Layout;
use pulse::Options;
use pulse::Walk;
use region::PageSize;

use crate::control::GuestKind;
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
/// Names of its states.
pub(crate) const STATES: [StateName; 1] = [WALK_STATE];
const WALK_STATE: StateName = StateName::literal("walk");
/// Its clock counts nanoseconds.
const CYCLES_PER_MS: u64 = 1_000_000;
/// Steps between two looks whether it is to stop.
const STEPS: u32 = 16;

/// What the guest is doing.
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

/// pulse as a thread.
#[derive(Debug)]
pub struct ThreadGuest {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    memory: Arc<Inode>,
    layout: Layout,
    health: Health,
}

impl ThreadGuest {
    /// A guest that starts from the beginning, in this memory.
    ///
    /// # Errors
    /// [`GuestError`]
    pub fn first(memory: &Arc<Inode>, health: Health) -> Result<Self, GuestError> {
        let pause_threshold_cycles = guest::pause_threshold(CYCLES_PER_MS);
        let options = Options { pause_threshold_cycles, ..Options::new(CYCLES_PER_MS) };
        let image = Image::new(memory.size_bytes(), &options);
        let image = image.map_err(below("lay the guest out"))?;
        for (offset, bytes) in image.pieces() {
            memory.mapping().write(offset, bytes).map_err(below("write the guest into memory"))?;
        }
        let [layout] = image.layouts() else { return Err(GuestError::NoVcpus) };
        Self::spawn(memory, *layout, Some(Walk::new(layout, monotonic_ns())), health)
    }

    /// A guest that is to be loaded.
    ///
    /// # Errors
    /// [`GuestError`]
    pub fn prepare(memory: &Arc<Inode>, health: Health) -> Result<Self, GuestError> {
        let layout = MemoryWords(Arc::clone(memory.mapping())).mailbox().layout();
        Self::spawn(memory, layout.map_err(below("read the guest's layout"))?, None, health)
    }

    fn spawn(
        memory: &Arc<Inode>,
        layout: Layout,
        still: Option<Walk>,
        health: Health,
    ) -> Result<Self, GuestError> {
        let words = MemoryWords(Arc::clone(memory.mapping()));
        let turn = Turn { wanted: Wanted::Still, still, stopped_ns: 0, entered_ns: 0 };
        let shared =
            Arc::new(Shared { turn: Mutex::new(turn), changed: Condvar::new(), stop: AtomicBool::new(true) });
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new().name("guest".to_owned()).spawn({
            let health = health.clone();
            move || {
                let _fallen = Fallen(health);
                live(&theirs, &words);
            }
        });
        let thread = Some(thread.map_err(below("start the guest's thread"))?);
        Ok(Self { shared, thread, memory: Arc::clone(memory), layout, health })
    }
}

/// Tells if the guest's thread falls over.
struct Fallen(Health);

impl Drop for Fallen {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end(End::Crashed("its thread has panicked".to_owned()));
        }
    }
}

/// The guest's life: stands still, runs, stands still.
fn live(shared: &Shared, words: &MemoryWords) {
    loop {
        let mut turn = shared.turn();
        while turn.wanted == Wanted::Still || (turn.wanted == Wanted::Run && turn.still.is_none()) {
            turn = shared.changed.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
        let Some(mut walk) = turn.still.take().filter(|_| turn.wanted == Wanted::Run) else { return };
        turn.entered_ns = monotonic_ns();
        drop(turn);
        while !shared.stop.load(Ordering::Acquire) {
            for _ in 0..STEPS {
                walk.step(words, &mut monotonic_ns);
            }
        }
        let mut turn = shared.turn();
        turn.stopped_ns = monotonic_ns();
        turn.still = Some(walk);
        shared.changed.notify_all();
    }
}

impl Drop for ThreadGuest {
    fn drop(&mut self) {
        self.shared.want(Wanted::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Guest for ThreadGuest {
    type Error = GuestError;

    fn pause(&mut self) -> Result<(), GuestError> {
        self.shared.want(Wanted::Still);
        let turn = self.shared.turn();
        let waited = self.shared.changed.wait_timeout_while(turn, STOP_TIMEOUT, |turn| turn.still.is_none());
        let (turn, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if turn.still.is_some() { Ok(()) } else { Err(GuestError::TimedOut("stop")) }
    }

    fn save(&mut self) -> Result<Vec<(StateName, Vec<u8>)>, GuestError> {
        let turn = self.shared.turn();
        let walk = turn.still.as_ref().ok_or(GuestError::TimedOut("stop"))?;
        Ok(vec![(WALK_STATE, walk.encode().to_vec())])
    }

    fn stopped_ns(&self) -> Option<u64> {
        Some(self.shared.turn().stopped_ns).filter(|at| *at != 0)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.start()
    }
}

impl Served for ThreadGuest {
    fn kind(&self) -> GuestKind {
        GuestKind::Thread
    }

    fn load(&mut self, states: &BTreeMap<StateName, Vec<u8>>) -> Result<(), GuestError> {
        let bytes = states.get(&WALK_STATE).ok_or(GuestError::NoState(WALK_STATE))?;
        let walk = Walk::decode(bytes, &self.layout).map_err(below("read the guest's state"))?;
        self.shared.turn().still = Some(walk);
        Ok(())
    }

    fn start(&mut self) -> Result<(), GuestError> {
        self.shared.want(Wanted::Run);
        Ok(())
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
        Some(self.shared.turn().entered_ns).filter(|at| *at != 0)
    }

    fn health(&self) -> &Health {
        &self.health
    }
}
