//! pulse in a VM with some of a PC's devices.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use devices::{Bus, Device as _, LevelLine, Power, PowerEvent, Serial};
use kvm::{Cpuid, Irqchip, Kicker, MemorySlots, SlotFlags, Stopped, Vcpu, Vm, VmBuilder};
use kvm_ioctls::{Kvm, VcpuExit};
use pulse::{Image, Mailboxes, Options, REPORT_PORT, Report, Vectors, Words};
use region::{Mapping, OutOfRange, Region};

const BYTES: u64 = 8 << 20;

/// How a vCPU left for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    Shutdown,
    Fault(Report),
}

/// What is outside of the guest while it runs.
pub(crate) struct Outside {
    bus: Bus,
    sent: Arc<Mutex<Vec<u8>>>,
    left: AtomicUsize,
    pub(crate) serial: Arc<Serial>,
    pub(crate) power: mpsc::Receiver<PowerEvent>,
}

struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Outside {
    fn new(with_devices: bool) -> Self {
        let (events, power) = mpsc::channel();
        let sent = Arc::new(Mutex::new(Vec::new()));
        let interrupt = LevelLine::new(|_| Ok(()));
        let serial = Serial::new("console", Arc::new(interrupt), Box::new(Sink(Arc::clone(&sent))));
        serial.resume().unwrap();
        let mut bus = Bus::new();
        if with_devices {
            let power = Power::new("power", move |event| events.send(event).unwrap());
            power.attach(&mut bus).unwrap();
            bus.at_ports(Serial::COM1, Serial::PORTS, Arc::clone(&serial) as _).unwrap();
        }
        Self { bus, sent, left: AtomicUsize::new(0), serial, power }
    }

    /// All that came out of the console.
    pub(crate) fn sent(&self) -> String {
        String::from_utf8(self.sent.lock().unwrap().clone()).unwrap()
    }

    /// How many vCPUs have left for good.
    pub(crate) fn left(&self) -> usize {
        self.left.load(Ordering::SeqCst)
    }
}

#[derive(Debug)]
pub(crate) struct Memory(Arc<Mapping>);

impl Words for Memory {
    fn load(&self, offset_bytes: u64) -> u64 {
        self.0.load(offset_bytes).unwrap()
    }

    fn store(&self, offset_bytes: u64, value: u64) {
        self.0.store(offset_bytes, value).unwrap();
    }
}

/// Dropped in the order of the fields: the vCPUs, then the slots, then the VM.
pub(crate) struct Rig {
    pub(crate) vcpus: Vec<Vcpu>,
    _slots: MemorySlots<Arc<Mapping>>,
    _vm: Vm,
    memory: Memory,
    with_devices: bool,
    pub(crate) image: Image,
}

/// The widest vectors that this host's vCPUs have.
pub(crate) fn widest() -> Vectors {
    Vectors::widest(Cpuid::supported(&Kvm::new().unwrap()).unwrap().entries())
}

impl Rig {
    pub(crate) fn new(irqchip: Irqchip, options: Options) -> Self {
        Self::make(irqchip, options, true)
    }

    pub(crate) fn without_devices(irqchip: Irqchip, options: Options) -> Self {
        Self::make(irqchip, options, false)
    }

    fn make(irqchip: Irqchip, options: Options, with_devices: bool) -> Self {
        let kvm = Kvm::new().unwrap();
        let image = Image::new(BYTES, &options).unwrap();
        let mapping = Arc::new(Region::create("ram", BYTES).unwrap().map().unwrap());
        for (offset, bytes) in image.pieces() {
            mapping.write(offset, bytes).unwrap();
        }
        let builder = VmBuilder::create(&kvm).unwrap();
        let mut slots = builder.memory_slots();
        slots.add(0, 0, &mapping, 0, BYTES, SlotFlags::default()).unwrap();
        let vm = builder.finish(irqchip).unwrap();
        let cpuid = Cpuid::supported(&kvm).unwrap();
        let vcpus = image.starts().zip(0..).map(|(start, id)| {
            let vcpu = vm.create_vcpu(id).unwrap();
            cpuid.load(&vcpu).unwrap();
            let fd = vcpu.fd();
            fd.set_sregs(&start.sregs(fd.get_sregs().unwrap())).unwrap();
            fd.set_xcrs(&start.xcrs(fd.get_xcrs().unwrap())).unwrap();
            fd.set_regs(&start.regs()).unwrap();
            fd.set_mp_state(start.mp_state()).unwrap();
            vcpu
        });
        let vcpus = vcpus.collect();
        Self { vcpus, _slots: slots, _vm: vm, memory: Memory(mapping), with_devices, image }
    }

    pub(crate) fn mailboxes(&self) -> Mailboxes<'_, Memory> {
        Mailboxes::find(&self.memory, BYTES).unwrap()
    }

    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), OutOfRange> {
        self.memory.0.read(offset, bytes)
    }

    /// Runs all vCPUs as long as `act` does something, and stops them. Says how each ended.
    pub(crate) fn run(&mut self, act: impl FnOnce(&Mailboxes<'_, Memory>, &Outside)) -> Vec<Stopped<Left>> {
        let outside = Outside::new(self.with_devices);
        let shared = SharedOutside { bus: &outside.bus, left: &outside.left };
        let kick = KickAll(self.vcpus.iter().map(Vcpu::kicker).collect());
        let mailboxes = Mailboxes::find(&self.memory, BYTES).unwrap();
        thread::scope(|scope| {
            let threads: Vec<_> =
                self.vcpus.iter_mut().map(|vcpu| scope.spawn(|| run_vcpu(vcpu, &shared))).collect();
            // Also if it panics: else the scope would wait for ever.
            let kick = kick;
            act(&mailboxes, &outside);
            drop(kick);
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }
}

/// What the vCPUs' threads use of the outside.
struct SharedOutside<'a> {
    bus: &'a Bus,
    left: &'a AtomicUsize,
}

struct KickAll(Vec<Kicker>);

impl Drop for KickAll {
    fn drop(&mut self) {
        for kicker in &self.0 {
            kicker.kick().unwrap();
        }
    }
}

fn run_vcpu(vcpu: &mut Vcpu, outside: &SharedOutside<'_>) -> Stopped<Left> {
    let stopped = vcpu.run(|exit| {
        let left = match exit {
            VcpuExit::IoOut(REPORT_PORT, data) => {
                let code = u32::from_le_bytes(data.try_into().unwrap());
                match Report::from_code(code) {
                    Some(fault @ Report::Fault { .. }) => Left::Fault(fault),
                    Some(_) => return ControlFlow::Continue(()),
                    None => panic!("an unknown report: {code:#x}"),
                }
            }
            VcpuExit::IoOut(port, data) => {
                outside.bus.port_out(port, data);
                return ControlFlow::Continue(());
            }
            VcpuExit::IoIn(port, data) => {
                outside.bus.port_in(port, data);
                return ControlFlow::Continue(());
            }
            VcpuExit::Shutdown => Left::Shutdown,
            other => panic!("the guest left KVM: {other:?}"),
        };
        outside.left.fetch_add(1, Ordering::SeqCst);
        ControlFlow::Break(left)
    });
    stopped.unwrap()
}

/// Waits until it is so.
#[track_caller]
pub(crate) fn soon(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "in a minute it did not come about that {what}");
        thread::sleep(Duration::from_millis(1));
    }
}
