//! pulse in a VM of KVM, with one vCPU.
//!
//! The vCPU has a thread of its own, which takes orders. A guest that is stopped is saved at once by the same
//! thread, without waiting to be told: nothing else is ever wanted of it, and a message less is a wake-up less in
//! the pause.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;
use std::thread;
use std::thread::JoinHandle;

use fdpass::monotonic_ns;
use gmem::Binding;
use gmem::GmemFile;
use gmem::Inode;
use kvm::Contents;
use kvm::Cpuid;
use kvm::Irqchip;
use kvm::Kicker;
use kvm::Loader;
use kvm::MemorySlots;
use kvm::Saver;
use kvm::Stopped;
use kvm::Vcpu;
use kvm::VcpuState;
use kvm::Vm;
use kvm::VmBuilder;
use kvm::VmState;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuExit;
use machine::Identity;
use machine::StateName;
use machine::update::Guest;
use pulse::Image;
use pulse::Options;
use pulse::REPORT_PORT;
use pulse::Report;
use pulse::Vectors;
use region::Mapping;
use serde::Deserialize;
use serde::Serialize;

use crate::control::GuestKind;
use crate::guest;
use crate::guest::GuestError;
use crate::guest::Health;
use crate::guest::STOP_TIMEOUT;
use crate::guest::Served;
use crate::guest::below;

/// Formats of its states.
pub(crate) const FORMATS: [&str; 2] = ["tideover-kvm-vm-v1", "tideover-kvm-vcpu-v1"];
/// Names of its states.
pub(crate) const STATES: [StateName; 2] = [VM_STATE, VCPU_STATE];
const VM_STATE: StateName = StateName::literal("vm");
const VCPU_STATE: StateName = StateName::literal("vcpu0");
/// Interrupt pins of the split interrupt controller.
const PINS: u32 = 24;

/// What a successor is told before the pause.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct BeforePause {
    cpuid: Vec<u8>,
    contents: Vec<u8>,
}

enum Order {
    /// Take the vCPU, and run.
    Begin(Box<Hand>),
    /// Run on.
    Run,
}

enum Reply {
    Stopped,
    Saved(Result<States, GuestError>),
}

type States = Vec<(StateName, Vec<u8>)>;

/// When the guest stopped last, and was entered last.
#[derive(Debug, Default)]
struct Moments {
    stopped_ns: AtomicU64,
    entered_ns: AtomicU64,
}

/// pulse in a VM.
#[derive(Debug)]
pub struct KvmGuest {
    // Dropped in this order: the thread with the vCPU ends, then vCPU, memory slots and VM go, then the memory.
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
    replies: Receiver<Reply>,
    may_run: Arc<AtomicBool>,
    kicker: Kicker,
    /// The vCPU before it runs for the first time: its state is loaded here, without waking another thread.
    idle: Option<Box<Hand>>,
    _slots: MemorySlots<Arc<Mapping>>,
    _file: GmemFile,
    before_pause: BeforePause,
    moments: Arc<Moments>,
    health: Health,
}

/// A VM with its memory and a vCPU that nothing was loaded into yet.
struct Parts {
    kvm: Kvm,
    vm: Vm,
    vcpu: Vcpu,
    slots: MemorySlots<Arc<Mapping>>,
    file: GmemFile,
}

impl Parts {
    fn make(memory: &Arc<Inode>, identity: Identity) -> Result<Self, GuestError> {
        let kvm = Kvm::new().map_err(below("open /dev/kvm"))?;
        let builder = VmBuilder::create(&kvm).map_err(below("make a VM"))?;
        let mut slots = builder.memory_slots();
        let mut file = GmemFile::open(Arc::clone(memory), identity).map_err(below("open guest memory"))?;
        for (slot, place) in (0..).zip(pulse::slots(memory.size_bytes())) {
            let binding = Binding {
                slot,
                guest_address: place.guest_address,
                offset_bytes: place.offset_bytes,
                len_bytes: place.len_bytes,
            };
            file.bind(&mut slots, binding).map_err(below("give the guest its memory"))?;
        }
        let vm =
            builder.finish(Irqchip::Split { pins: PINS }).map_err(below("make interrupt controllers"))?;
        let vcpu = vm.create_vcpu(0).map_err(below("make a vCPU"))?;
        Ok(Self { kvm, vm, vcpu, slots, file })
    }

    /// Starts the vCPU's thread, which waits for orders.
    fn start(self, cpuid: &Cpuid) -> Result<KvmGuest, GuestError> {
        let saver = Saver::prepare(&self.vcpu).map_err(below("prepare to save the vCPU"))?;
        let loader = Loader::prepare(&self.vcpu).map_err(below("prepare to load the vCPU"))?;
        let contents = saver.contents(&self.vcpu).encode();
        let (orders, received) = mpsc::channel();
        let (answer, replies) = mpsc::channel();
        let kicker = self.vcpu.kicker();
        let may_run = Arc::new(AtomicBool::new(false));
        let moments = Arc::new(Moments::default());
        let health = Health::default();
        let hand = Hand {
            vm: self.vm,
            vcpu: self.vcpu,
            saver,
            loader,
            unfinished: None,
            may_run: Arc::clone(&may_run),
            moments: Arc::clone(&moments),
            health: health.clone(),
            answer,
        };
        let thread = thread::Builder::new().name("vcpu0".to_owned()).spawn(move || obey(&received));
        Ok(KvmGuest {
            orders: Some(orders),
            thread: Some(thread.map_err(below("start the vCPU's thread"))?),
            replies,
            may_run,
            kicker,
            idle: Some(Box::new(hand)),
            _slots: self.slots,
            _file: self.file,
            before_pause: BeforePause { cpuid: cpuid.encode(), contents },
            moments,
            health,
        })
    }
}

impl KvmGuest {
    /// A guest that starts from the beginning, in this memory of this machine.
    ///
    /// # Errors
    /// [`GuestError`]
    pub fn first(memory: &Arc<Inode>, identity: Identity) -> Result<Self, GuestError> {
        let parts = Parts::make(memory, identity)?;
        let cpuid = Cpuid::supported(&parts.kvm).map_err(below("ask for CPUID"))?;
        cpuid.load(&parts.vcpu).map_err(below("set CPUID"))?;
        let fd = parts.vcpu.fd();
        let cycles_per_ms = fd.get_tsc_khz().unwrap_or_default().into();
        let vectors = Vectors::widest(cpuid.entries());
        let pause_threshold_cycles = guest::pause_threshold(cycles_per_ms);
        let options = Options { vectors, pause_threshold_cycles, ..Options::new(cycles_per_ms) };
        let image = Image::new(memory.size_bytes(), &options).map_err(below("lay the guest out"))?;
        for (offset, bytes) in image.pieces() {
            memory.mapping().write(offset, bytes).map_err(below("write the guest into memory"))?;
        }
        let sregs = fd.get_sregs().map_err(below("read registers"))?;
        fd.set_sregs(&image.sregs(sregs)).map_err(below("set registers"))?;
        if vectors == Vectors::Avx2 {
            let xcrs = fd.get_xcrs().map_err(below("read registers"))?;
            fd.set_xcrs(&image.xcrs(xcrs)).map_err(below("set registers"))?;
        }
        fd.set_regs(&image.regs()).map_err(below("set registers"))?;
        parts.start(&cpuid)
    }

    /// A guest that is to be loaded: everything that does not need its state, as the predecessor describes it.
    ///
    /// # Errors
    /// [`GuestError`], also if this host could not load the state that is to come.
    pub fn prepare(
        memory: &Arc<Inode>,
        identity: Identity,
        told: &serde_json::Value,
    ) -> Result<Self, GuestError> {
        let told = BeforePause::deserialize(told).map_err(below("read the predecessor's description"))?;
        let cpuid = Cpuid::decode(&told.cpuid).map_err(below("read the guest's CPUID"))?;
        let contents = Contents::decode(&told.contents).map_err(below("read what the state will hold"))?;
        let parts = Parts::make(memory, identity)?;
        cpuid.load(&parts.vcpu).map_err(below("set CPUID"))?;
        let loader = Loader::prepare(&parts.vcpu).map_err(below("prepare to load the vCPU"))?;
        loader.check(&parts.vcpu, &contents).map_err(below("load what the state will hold"))?;
        parts.start(&cpuid)
    }

    fn order(&self, order: Order) -> Result<(), GuestError> {
        let orders = self.orders.as_ref().ok_or(GuestError::ThreadGone)?;
        orders.send(order).map_err(|_| GuestError::ThreadGone)
    }

    fn reply(&self, awaited: &'static str) -> Result<Reply, GuestError> {
        match self.replies.recv_timeout(STOP_TIMEOUT) {
            Ok(reply) => Ok(reply),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(GuestError::TimedOut(awaited)),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(GuestError::ThreadGone),
        }
    }
}

impl Drop for KvmGuest {
    fn drop(&mut self) {
        // The thread ends at its next look for orders.
        self.orders = None;
        self.may_run.store(false, Ordering::SeqCst);
        let _ = self.kicker.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Guest for KvmGuest {
    type Error = GuestError;

    fn pause(&mut self) -> Result<(), GuestError> {
        if let Some(why) = self.health.failure() {
            return Err(GuestError::Failed(why));
        }
        // Before a look at the replies: whatever comes after it is of a vCPU that does not go on.
        self.may_run.store(false, Ordering::SeqCst);
        // Left from a stop that came too late to be waited for.
        while self.replies.try_recv().is_ok() {}
        self.kicker.kick().map_err(below("stop the vCPU"))?;
        match self.reply("stop")? {
            Reply::Stopped => Ok(()),
            Reply::Saved(_) => Err(GuestError::TimedOut("stop")),
        }
    }

    fn save(&mut self) -> Result<States, GuestError> {
        match self.reply("get saved")? {
            Reply::Saved(states) => states,
            Reply::Stopped => Err(GuestError::TimedOut("get saved")),
        }
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        // One that has failed stands still for good, and is not lost by that.
        if self.health.failure().is_some() { Ok(()) } else { self.start() }
    }
}

impl Served for KvmGuest {
    fn kind(&self) -> GuestKind {
        GuestKind::Kvm
    }

    fn load(&mut self, states: &BTreeMap<StateName, Vec<u8>>) -> Result<(), GuestError> {
        let bytes = |name: StateName| states.get(&name).ok_or(GuestError::NoState(name));
        let vm = VmState::decode(bytes(VM_STATE)?).map_err(below("read the VM's state"))?;
        let vcpu = VcpuState::decode(bytes(VCPU_STATE)?).map_err(below("read the vCPU's state"))?;
        self.idle.as_mut().ok_or(GuestError::RunsAlready)?.load(&vm, vcpu)
    }

    fn start(&mut self) -> Result<(), GuestError> {
        self.may_run.store(true, Ordering::SeqCst);
        let order = self.idle.take().map_or(Order::Run, Order::Begin);
        self.order(order)
    }

    fn formats(&self) -> Vec<String> {
        FORMATS.map(str::to_owned).to_vec()
    }

    fn before_freeze(&self) -> Result<(), GuestError> {
        // A vCPU is kicked out of such a wait, and comes back to it when it runs on, here or there.
        Ok(())
    }

    fn before_pause(&self) -> serde_json::Value {
        serde_json::to_value(&self.before_pause).unwrap_or_default()
    }

    fn stopped_ns(&self) -> Option<u64> {
        Some(self.moments.stopped_ns.load(Ordering::Acquire)).filter(|at| *at != 0)
    }

    fn entered_ns(&self) -> Option<u64> {
        Some(self.moments.entered_ns.load(Ordering::Acquire)).filter(|at| *at != 0)
    }

    fn failure(&self) -> Option<String> {
        self.health.failure()
    }
}

/// The vCPU's thread: takes the vCPU when it is to run, and keeps it.
fn obey(orders: &Receiver<Order>) {
    let Ok(Order::Begin(mut hand)) = orders.recv() else { return };
    while hand.run().is_ok() && matches!(orders.recv(), Ok(Order::Run)) {}
}

/// A vCPU and what it needs, in one hand at a time.
#[derive(Debug)]
struct Hand {
    vm: Vm,
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
    health: Health,
    answer: Sender<Reply>,
}

impl Hand {
    fn load(&mut self, vm: &VmState, vcpu: VcpuState) -> Result<(), GuestError> {
        self.loader.load(&mut self.vcpu, &vcpu).map_err(below("load the vCPU"))?;
        vm.load(&self.vm).map_err(below("load the VM"))?;
        self.unfinished = Some(vcpu);
        Ok(())
    }

    fn run(&mut self) -> Result<(), mpsc::SendError<Reply>> {
        if let Some(vcpu) = self.unfinished.take()
            && let Err(error) = self.loader.finish(&mut self.vcpu, &vcpu)
        {
            self.health.fail(format!("cannot finish loading the vCPU: {error}"));
            return Ok(());
        }
        while self.may_run.load(Ordering::SeqCst) {
            self.moments.entered_ns.store(monotonic_ns(), Ordering::Release);
            let stopped = self.vcpu.run(handle);
            self.moments.stopped_ns.store(monotonic_ns(), Ordering::Release);
            let failure = match stopped {
                Ok(Stopped::Kicked) => continue,
                Ok(Stopped::Broke(why)) => why,
                Err(error) => error.to_string(),
            };
            self.health.fail(failure);
            return Ok(());
        }
        self.answer.send(Reply::Stopped)?;
        let saved = self.save();
        self.answer.send(Reply::Saved(saved))
    }

    fn save(&mut self) -> Result<States, GuestError> {
        let vm = VmState::save(&self.vm).map_err(below("save the VM"))?;
        let vcpu = self.saver.save(&self.vcpu).map_err(below("save the vCPU"))?;
        Ok(vec![(VM_STATE, vm.encode()), (VCPU_STATE, vcpu.encode())])
    }
}

/// What pulse leaves the guest for. What it finds wrong is in its mailbox.
fn handle(exit: VcpuExit<'_>) -> ControlFlow<String> {
    match exit {
        VcpuExit::IoOut(REPORT_PORT, data) => {
            let code = <[u8; 4]>::try_from(data).map(u32::from_le_bytes).ok();
            match code.and_then(Report::from_code) {
                Some(report @ Report::Fault { .. }) => ControlFlow::Break(format!("{report:?}")),
                Some(_) => ControlFlow::Continue(()),
                None => ControlFlow::Break(format!("unknown report {data:x?}")),
            }
        }
        other => ControlFlow::Break(format!("unexpected exit {other:?}")),
    }
}
