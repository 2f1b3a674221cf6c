//! A guest on a thread of its own, which hops from VM to VM.

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{mem, ptr};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use crate::calls::Calls;
use crate::vm::{Model, Slot, Vm};
use crate::{FloorError, PlainMemory, call, kvm};

/// How long the guest's thread may take to do as it is told.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long one signal is given before another is sent: the first may have come while the thread was not in
/// `KVM_RUN`.
const SIGNAL_AGAIN: Duration = Duration::from_millis(20);
/// How often is looked whether the thread has done it. To look is not to disturb it.
const LOOK: Duration = Duration::from_micros(200);

/// What one hop took, by the host's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// From the return of the last `KVM_RUN` in the old VM to the call of the first one in the new VM.
    pub pause: Duration,
    /// The part of it that reads the state.
    pub save: Duration,
    /// The part of it that writes the state.
    pub load: Duration,
}

enum Order {
    /// Go on in this VM.
    Hop(Box<Vm>),
    /// Leave the guest, and stay out.
    Stop,
    /// Enter the guest again.
    Go,
}

/// What the guest's thread shows.
#[derive(Debug, Default)]
struct Shown {
    /// Orders that were obeyed.
    obeyed: AtomicU64,
    hop: Mutex<Option<Hop>>,
    failure: Mutex<Option<FloorError>>,
    /// The VM that was left. The other side ends it, as that takes time.
    left: Mutex<Option<Box<Vm>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A guest with one vCPU. It runs, unless it is [stopped](Guest::stop).
#[derive(Debug)]
pub struct Guest {
    orders: Option<Sender<Order>>,
    ordered: u64,
    thread: Option<JoinHandle<()>>,
    shown: Arc<Shown>,
    model: Model,
}

impl Guest {
    /// Starts a guest on this memory, which it sees at `slots`. `set_up` gives a vCPU, with this CPUID, the state to
    /// start with.
    ///
    /// # Errors
    ///
    /// [`FloorError`]
    pub fn start(
        memory: &Arc<PlainMemory>,
        slots: &[Slot],
        set_up: impl FnOnce(&VcpuFd, &CpuId) -> Result<(), kvm_ioctls::Error>,
    ) -> Result<Self, FloorError> {
        let device = Kvm::new().map_err(kvm("open /dev/kvm"))?;
        let cpuid = device.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("ask for CPUID"))?;
        let model = Model { kvm: device, memory: Arc::clone(memory), slots: slots.to_vec(), cpuid };
        let calls = Calls::prepare(&model.kvm, &Vm::make(&model)?)?;
        let vm = Box::new(Vm::make(&model)?);
        set_up(&vm.vcpu, &model.cpuid).map_err(kvm("set the guest up"))?;
        install_handler()?;
        let (orders, received) = mpsc::channel();
        let shown = Arc::new(Shown::default());
        let mut hand = Hand { vm, calls, orders: received, shown: Arc::clone(&shown) };
        let thread = thread::Builder::new().name("floor".to_owned()).spawn(move || hand.live());
        let thread =
            thread.map_err(|source| FloorError::Call { what: "start the guest's thread", source })?;
        Ok(Self { orders: Some(orders), ordered: 0, thread: Some(thread), shown, model })
    }

    /// Makes another VM while the guest runs, and takes the guest there. The guest has to be running.
    ///
    /// # Errors
    ///
    /// [`FloorError`]; the guest may be gone then.
    pub fn hop(&mut self) -> Result<Hop, FloorError> {
        let next = Box::new(Vm::make(&self.model)?);
        self.order(Order::Hop(next), true, "hop")?;
        drop(lock(&self.shown.left).take());
        lock(&self.shown.hop).take().ok_or(FloorError::TimedOut { what: "hop" })
    }

    /// Takes the guest's thread out of the guest, which then uses no processor.
    ///
    /// # Errors
    ///
    /// [`FloorError`] if the guest is gone.
    pub fn stop(&mut self) -> Result<(), FloorError> {
        self.order(Order::Stop, true, "stop")
    }

    /// Lets a stopped guest run.
    ///
    /// # Errors
    ///
    /// [`FloorError`] if the guest is gone.
    pub fn go(&mut self) -> Result<(), FloorError> {
        self.order(Order::Go, false, "go on")
    }

    fn order(&mut self, order: Order, kick: bool, what: &'static str) -> Result<(), FloorError> {
        let orders = self.orders.as_ref().ok_or(FloorError::Ended)?;
        let sent = orders.send(order);
        self.ordered += 1;
        let begun = Instant::now();
        while sent.is_ok() && begun.elapsed() < PATIENCE {
            if kick {
                self.kick()?;
            }
            let signalled = Instant::now();
            while signalled.elapsed() < SIGNAL_AGAIN {
                if self.shown.obeyed.load(Ordering::Acquire) == self.ordered {
                    return Ok(());
                }
                if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                    return Err(lock(&self.shown.failure).take().unwrap_or(FloorError::Ended));
                }
                thread::sleep(LOOK);
            }
        }
        Err(lock(&self.shown.failure).take().unwrap_or(FloorError::TimedOut { what }))
    }

    fn kick(&self) -> Result<(), FloorError> {
        let Some(thread) = &self.thread else { return Ok(()) };
        // SAFETY: the thread was not joined yet, so its number is its own.
        let error = unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
        if error == 0 || error == libc::ESRCH {
            return Ok(());
        }
        let source = std::io::Error::from_raw_os_error(error);
        Err(FloorError::Call { what: "signal the guest's thread", source })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The thread ends when it next looks for orders.
        self.orders = None;
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            let _ = self.kick();
            thread::sleep(LOOK);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the guest's thread has in hand.
struct Hand {
    vm: Box<Vm>,
    calls: Calls,
    orders: Receiver<Order>,
    shown: Arc<Shown>,
}

impl Hand {
    fn live(&mut self) {
        loop {
            let left = run(&mut self.vm.vcpu);
            let stopped = Instant::now();
            let order = self.orders.try_recv();
            let done = left.and_then(|()| match order {
                Ok(Order::Hop(next)) => self.hop(next, stopped),
                Ok(Order::Stop) => self.stay_out(),
                // It runs already.
                Ok(Order::Go) => {
                    self.obeyed();
                    Ok(())
                }
                // Signalled twice for one order.
                Err(TryRecvError::Empty) => Ok(()),
                Err(TryRecvError::Disconnected) => Err(FloorError::Ended),
            });
            if let Err(error) = done {
                *lock(&self.shown.failure) = Some(error);
                return;
            }
        }
    }

    fn hop(&mut self, mut next: Box<Vm>, stopped: Instant) -> Result<(), FloorError> {
        self.calls.save(&self.vm)?;
        let saved = Instant::now();
        self.calls.load(&next)?;
        mem::swap(&mut self.vm, &mut next);
        let entered = Instant::now();
        *lock(&self.shown.left) = Some(next);
        *lock(&self.shown.hop) =
            Some(Hop { pause: entered - stopped, save: saved - stopped, load: entered - saved });
        self.obeyed();
        Ok(())
    }

    fn stay_out(&self) -> Result<(), FloorError> {
        loop {
            self.obeyed();
            match self.orders.recv() {
                Ok(Order::Go) => {
                    self.obeyed();
                    return Ok(());
                }
                Ok(Order::Hop(_) | Order::Stop) => {}
                Err(_) => return Err(FloorError::Ended),
            }
        }
    }

    fn obeyed(&self) {
        self.shown.obeyed.fetch_add(1, Ordering::Release);
    }
}

/// Runs the guest until a signal ends it. What the guest says by port is passed over: it stands in its memory as
/// well.
fn run(vcpu: &mut VcpuFd) -> Result<(), FloorError> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(..) | VcpuExit::Intr) => {}
            Ok(exit) => return Err(FloorError::Exit { exit: format!("{exit:?}") }),
            // Ended by a signal: no instruction of the guest's is left half done.
            Err(error) if error.errno() == libc::EINTR => return Ok(()),
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) => return Err(kvm("run the guest")(error)),
        }
    }
}

/// Not the one by which `tideover-kvm` stops its vCPUs.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 2
}

/// The signal's only work is to interrupt.
extern "C" fn nothing(_signal: libc::c_int) {}

fn install_handler() -> Result<(), FloorError> {
    // SAFETY: all zeros are a valid sigaction: an empty mask, no flags.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(libc::c_int) = nothing;
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: a valid sigaction, whose handler has the type that goes with its flags and does nothing.
    if unsafe { libc::sigaction(signal(), &raw const action, ptr::null_mut()) } != 0 {
        return Err(call("install a signal handler"));
    }
    Ok(())
}
