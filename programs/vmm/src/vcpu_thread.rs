//! A vCPU and its thread, which takes orders.
//!
//! Every order to run has a number, its *turn*, and the answer to the stop that ends it bears the same one. So an answer
//! that comes too late to be waited for is known as such, and a vCPU that ended by itself has answered already.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::mpsc::SendError;
use std::sync::mpsc::Sender;
use std::sync::mpsc::TryRecvError;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use fdpass::monotonic_ns;
use kvm::Contents;
use kvm::Kicker;
use kvm::Loader;
use kvm::Saver;
use kvm::Stopped;
use kvm::Vcpu;
use kvm::VcpuState;
use kvm_ioctls::VcpuExit;
use sched::Scheduling;
use tracing::warn;

use crate::exits::Exits;
use crate::guest::End;
use crate::guest::GuestError;
use crate::guest::below;

/// How long to stay awake for a message within the pause: it takes far longer to wake a thread than to send to one
/// that is awake.
const AWAKE: Duration = Duration::from_millis(1);

enum Order {
    /// The next order comes within the pause: stay awake.
    StandBy,
    /// Take the vCPU, and run.
    Begin(Box<Hand>, u64),
    /// Run on.
    Run(u64),
    /// Save the vCPU, which stands still.
    Save,
}

enum Reply {
    Stopped(u64),
    Saved(Result<Vec<u8>, GuestError>),
}

/// The vCPU's thread; when the vCPU stopped last, and was entered first in its last turn.
#[derive(Debug, Default)]
struct Moments {
    /// Number of the thread; 0 as long as it is not known.
    thread: AtomicI32,
    stopped_ns: AtomicU64,
    entered_ns: AtomicU64,
}

/// A vCPU's thread, as seen from outside.
#[derive(Debug)]
pub(crate) struct VcpuThread {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
    replies: Receiver<Reply>,
    may_run: Arc<AtomicBool>,
    kicker: Kicker,
    turn: u64,
    /// The vCPU before it runs for the first time: its state is loaded here, without waking another thread.
    idle: Option<Box<Hand>>,
    moments: Arc<Moments>,
    /// A second descriptor of the vCPU, to be given away.
    descriptor: OwnedFd,
}

impl AsFd for VcpuThread {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl VcpuThread {
    /// Starts the thread, which is scheduled so, if that can be, and waits for orders.
    pub(crate) fn start(
        name: String,
        vcpu: Vcpu,
        exits: Arc<Exits>,
        scheduling: Option<Scheduling>,
    ) -> Result<Self, GuestError> {
        let saver = Saver::prepare(&vcpu).map_err(below("prepare to save the vCPU"))?;
        let loader = Loader::prepare(&vcpu).map_err(below("prepare to load the vCPU"))?;
        let (orders, received) = mpsc::channel();
        let (answer, replies) = mpsc::channel();
        let kicker = vcpu.kicker();
        let descriptor = vcpu.descriptor().map_err(below("copy the vCPU's descriptor"))?;
        let may_run = Arc::new(AtomicBool::new(false));
        let moments = Arc::new(Moments::default());
        let hand = Hand {
            vcpu,
            saver,
            loader,
            unfinished: None,
            may_run: Arc::clone(&may_run),
            moments: Arc::clone(&moments),
            exits,
            answer,
        };
        let thread = thread::Builder::new().name(name.clone()).spawn({
            let moments = Arc::clone(&moments);
            move || {
                moments.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
                if let Some(Err(error)) = scheduling.as_ref().map(|wanted| sched::set(None, wanted)) {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        name, "the vCPU is scheduled like any thread"
                    );
                }
                obey(&received);
            }
        });
        Ok(Self {
            orders: Some(orders),
            thread: Some(thread.map_err(below("start the vCPU's thread"))?),
            replies,
            may_run,
            kicker,
            turn: 0,
            idle: Some(Box::new(hand)),
            moments,
            descriptor,
        })
    }

    /// How the thread is scheduled now, which its user may have changed from outside.
    pub(crate) fn scheduling(&self) -> Option<Scheduling> {
        match self.moments.thread.load(Ordering::Acquire) {
            0 => None,
            thread => sched::get(Some(thread)).ok(),
        }
    }

    /// The vCPU, as long as it has not run.
    pub(crate) fn idle(&mut self) -> Result<&mut Hand, GuestError> {
        self.idle.as_deref_mut().ok_or(GuestError::RunsAlready)
    }

    fn order(&self, order: Order) -> Result<(), GuestError> {
        let orders = self.orders.as_ref().ok_or(GuestError::ThreadGone)?;
        orders.send(order).map_err(|_| GuestError::ThreadGone)
    }

    /// Has the thread stay awake for its next order.
    pub(crate) fn stand_by(&self) -> Result<(), GuestError> {
        self.order(Order::StandBy)
    }

    /// Lets the vCPU run.
    pub(crate) fn run(&mut self) -> Result<(), GuestError> {
        self.may_run.store(true, Ordering::SeqCst);
        self.turn += 1;
        let turn = self.turn;
        let order = self.idle.take().map_or(Order::Run(turn), |hand| Order::Begin(hand, turn));
        self.order(order)
    }

    /// Tells the vCPU to stop.
    pub(crate) fn kick(&self) -> Result<(), GuestError> {
        self.may_run.store(false, Ordering::SeqCst);
        self.kicker.kick().map_err(below("stop the vCPU"))
    }

    /// Waits until the vCPU stands still after a [kick](Self::kick).
    pub(crate) fn await_stop(&self, end: Instant) -> Result<(), GuestError> {
        if self.idle.is_some() {
            return Ok(());
        }
        loop {
            match self.reply("stop", end)? {
                Reply::Stopped(turn) if turn == self.turn => return Ok(()),
                // Left from what was not waited for.
                Reply::Stopped(_) | Reply::Saved(_) => {}
            }
        }
    }

    /// Begins to save a vCPU that stands still.
    pub(crate) fn begin_save(&self) -> Result<(), GuestError> {
        // As long as it has not run, its thread does not have it.
        if self.idle.is_some() { Ok(()) } else { self.order(Order::Save) }
    }

    /// What was saved: an encoded [`VcpuState`].
    pub(crate) fn await_saved(&mut self, end: Instant) -> Result<Vec<u8>, GuestError> {
        if let Some(hand) = &mut self.idle {
            return hand.saved();
        }
        loop {
            if let Reply::Saved(state) = self.reply("get saved", end)? {
                return state;
            }
        }
    }

    fn reply(&self, awaited: &'static str, end: Instant) -> Result<Reply, GuestError> {
        let left = || end.saturating_duration_since(Instant::now());
        let reply = awake(&self.replies).or_else(|_| self.replies.recv_timeout(left()));
        reply.map_err(|error| match error {
            RecvTimeoutError::Timeout => GuestError::TimedOut(awaited),
            RecvTimeoutError::Disconnected => GuestError::ThreadGone,
        })
    }

    pub(crate) fn stopped_ns(&self) -> Option<u64> {
        Some(self.moments.stopped_ns.load(Ordering::Acquire)).filter(|at| *at != 0)
    }

    pub(crate) fn entered_ns(&self) -> Option<u64> {
        Some(self.moments.entered_ns.load(Ordering::Acquire)).filter(|at| *at != 0)
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        // The thread ends at its next look for orders.
        self.orders = None;
        let _ = self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Looks for a message for a while without going to sleep.
fn awake<T>(messages: &Receiver<T>) -> Result<T, TryRecvError> {
    let begun = Instant::now();
    loop {
        match messages.try_recv() {
            // Whoever is to send it may need this processor.
            Err(TryRecvError::Empty) if begun.elapsed() < AWAKE => thread::yield_now(),
            found => return found,
        }
    }
}

/// The thread: takes the vCPU when it is to run, and keeps it.
fn obey(orders: &Receiver<Order>) {
    let Some(Order::Begin(mut hand, mut turn)) = next(orders) else { return };
    loop {
        if hand.run(turn).is_err() {
            return;
        }
        turn = loop {
            match next(orders) {
                Some(Order::Run(turn)) => break turn,
                Some(Order::Save) if hand.tell_saved().is_ok() => {}
                _ => return,
            }
        };
    }
}

fn next(orders: &Receiver<Order>) -> Option<Order> {
    loop {
        match awake(orders).ok().or_else(|| orders.recv().ok())? {
            Order::StandBy => {}
            order => return Some(order),
        }
    }
}

/// A vCPU and what it needs, in one hand at a time.
#[derive(Debug)]
pub(crate) struct Hand {
    vcpu: Vcpu,
    saver: Saver,
    loader: Loader,
    /// Loaded but for what makes KVM write guest memory. That waits until the guest is to run, which is when the
    /// machine is ours: a successor that stalls while it loads must not write under a guest that was taken back.
    unfinished: Option<VcpuState>,
    /// What was ordered last. An order to run may wait in the queue while a later stop was ordered already, and a
    /// kick may arrive when its stop was called off.
    may_run: Arc<AtomicBool>,
    moments: Arc<Moments>,
    exits: Arc<Exits>,
    answer: Sender<Reply>,
}

impl Hand {
    /// What its saved state will hold.
    pub(crate) fn contents(&self) -> Contents {
        self.saver.contents(&self.vcpu)
    }

    /// Could this vCPU load a state with these contents?
    pub(crate) fn check(&self, contents: &Contents) -> Result<(), GuestError> {
        self.loader.check(&self.vcpu, contents).map_err(below("load what the state will hold"))
    }

    pub(crate) fn load(&mut self, state: VcpuState) -> Result<(), GuestError> {
        self.loader.load(&mut self.vcpu, &state).map_err(below("load the vCPU"))?;
        self.unfinished = Some(state);
        Ok(())
    }

    fn run(&mut self, turn: u64) -> Result<(), SendError<Reply>> {
        if let Some(state) = self.unfinished.take()
            && let Err(error) = self.loader.finish(&mut self.vcpu, &state)
        {
            self.exits.health.end(End::Crashed(format!("cannot finish loading the vCPU: {error}")));
        } else {
            self.run_until_stopped();
        }
        self.answer.send(Reply::Stopped(turn))
    }

    fn run_until_stopped(&mut self) {
        self.moments.entered_ns.store(monotonic_ns(), Ordering::Release);
        while self.may_run.load(Ordering::SeqCst) {
            let stopped = self.vcpu.run(|exit: VcpuExit<'_>| self.exits.handle(exit));
            self.moments.stopped_ns.store(monotonic_ns(), Ordering::Release);
            let end = match stopped {
                Ok(Stopped::Kicked) => continue,
                Ok(Stopped::Broke(end)) => end,
                Err(error) => End::Crashed(error.to_string()),
            };
            self.exits.health.end(end);
            return;
        }
    }

    fn tell_saved(&mut self) -> Result<(), SendError<Reply>> {
        let saved = self.saved();
        self.answer.send(Reply::Saved(saved))
    }

    /// Its state. Of one that was loaded and has not run since, what was loaded: the vCPU itself does not have all of it.
    fn saved(&mut self) -> Result<Vec<u8>, GuestError> {
        match &self.unfinished {
            Some(loaded) => Ok(loaded.encode()),
            None => self.saver.save(&self.vcpu).map(VcpuState::encode).map_err(below("save the vCPU")),
        }
    }
}
