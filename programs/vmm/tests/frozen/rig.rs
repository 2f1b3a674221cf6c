//! A guest on KVM whose memory is frozen under it, and what a VMM does about that.

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use abi::gmem::MemoryName;
use abi::gmem::flags;
use abi::vm::Identity;
use gmem::Binding;
use gmem::GmemFile;
use gmem::GuestMemfd;
use gmem::Inode;
use kvm::Cpuid;
use kvm::Irqchip;
use kvm::Kicker;
use kvm::Loader;
use kvm::MemorySlots;
use kvm::RunError;
use kvm::Saver;
use kvm::Stopped;
use kvm::Vcpu;
use kvm::VcpuState;
use kvm::Vm;
use kvm::VmBuilder;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuExit;
use pages::PageRange;
use pulse::Image;
use pulse::Mailboxes;
use pulse::Options;
use pulse::REPORT_PORT;
use pulse::Report;
use pulse::Words;
use region::Mapping;
use region::Region;

/// Of the guest's memory: enough that it is long at touching all of it.
pub(crate) const MEMORY_BYTES: u64 = 64 << 20;
pub(crate) const PAGE: u64 = 4096;
/// Long enough on any machine for what is bound to happen.
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// Enough to see that nothing happens.
pub(crate) const SHORTLY: Duration = Duration::from_millis(30);

const OURS: Identity = Identity::new([1; 16]);

/// How a VM is made: who has the interrupt controllers, and whether the guest could take an interrupt. With a LAPIC inside
/// and interrupts on, KVM hands a fault on a hole to a worker of its own (an asynchronous page fault).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) irqchip: Irqchip,
    pub(crate) interrupts: bool,
}

pub(crate) const SHAPES: [Shape; 5] = [
    Shape { irqchip: Irqchip::None, interrupts: false },
    Shape { irqchip: Irqchip::Split { pins: 24 }, interrupts: false },
    Shape { irqchip: Irqchip::Split { pins: 24 }, interrupts: true },
    Shape { irqchip: Irqchip::Full { pit: false }, interrupts: false },
    Shape { irqchip: Irqchip::Full { pit: false }, interrupts: true },
];

/// Waits until it is so.
#[track_caller]
pub(crate) fn soon(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < SOON, "it did not come about that {what}");
        thread::sleep(Duration::from_micros(200));
    }
}

/// Does something that could hang, in a thread, and waits for its end.
#[track_caller]
pub(crate) fn ends(what: &str, act: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(act);
    soon(what, || thread.is_finished());
    thread.join().unwrap();
}

fn image(interrupts: bool) -> Image {
    Image::new(MEMORY_BYTES, &Options { interrupts, ..Options::new(1_000_000) }).unwrap()
}

/// A guest's memory, all holes but for the guest's program.
pub(crate) fn region(interrupts: bool) -> Region {
    let region = Region::create("frozen", MEMORY_BYTES).unwrap();
    let mapping = region.map().unwrap();
    for (offset, bytes) in image(interrupts).pieces() {
        mapping.write(offset, bytes).unwrap();
    }
    again(&mapping)
}

pub(crate) fn builder() -> VmBuilder {
    VmBuilder::create(&Kvm::new().unwrap()).unwrap()
}

/// Guest memory that is a guest_memfd of this VM.
pub(crate) fn guest_memfd(builder: &VmBuilder) -> Arc<Inode> {
    let file = GuestMemfd::create(builder.fd(), MEMORY_BYTES).unwrap();
    let mapping = Arc::new(file.region("frozen").unwrap().map().unwrap());
    for (offset, bytes) in image(false).pieces() {
        mapping.write(offset, bytes).unwrap();
    }
    let frames = PageRange::of_bytes(1 << 30, MEMORY_BYTES).unwrap();
    Inode::of_guest_memfd(MemoryName::literal("ram"), OURS, mapping, frames, &file)
}

/// The same memory as another process gets it: with a mapping of its own.
pub(crate) fn again(mapping: &Mapping) -> Region {
    let fd = mapping.region().as_fd().try_clone_to_owned().unwrap();
    Region::accept("frozen", fd, MEMORY_BYTES).unwrap()
}

pub(crate) fn inode(region: Region) -> Arc<Inode> {
    let frames = PageRange::of_bytes(1 << 30, MEMORY_BYTES).unwrap();
    Inode::new(MemoryName::literal("ram"), OURS, Arc::new(region.map().unwrap()), frames, flags::MMAP)
}

/// How much of the memory is there.
pub(crate) fn present_bytes(region: &Region) -> u64 {
    region.allocated_bytes().unwrap().unwrap()
}

/// Whether the page at this offset is there.
pub(crate) fn is_present(region: &Region, offset: u64) -> bool {
    rustix::fs::seek(region, rustix::fs::SeekFrom::Data(offset)).is_ok_and(|data| data == offset)
}

struct MemoryWords<'a>(&'a Mapping);

impl Words for MemoryWords<'_> {
    fn load(&self, offset_bytes: u64) -> u64 {
        self.0.load(offset_bytes).unwrap()
    }

    fn store(&self, offset_bytes: u64, value: u64) {
        self.0.store(offset_bytes, value).unwrap();
    }
}

/// How often the guest has ticked, and how many times it has been through its memory.
pub(crate) fn progress(inode: &Inode) -> (u64, u64) {
    let words = MemoryWords(inode.mapping());
    let mailboxes = Mailboxes::find(&words, MEMORY_BYTES).unwrap();
    (mailboxes.ticks(), mailboxes.passes())
}

/// Asserts that the guest, which stands still, has found nothing wrong, and has written all that it counts.
#[track_caller]
pub(crate) fn assert_whole(inode: &Inode) {
    let words = MemoryWords(inode.mapping());
    let mailboxes = Mailboxes::find(&words, MEMORY_BYTES).unwrap();
    assert!(mailboxes.tally().agrees(), "{:?}", mailboxes.tally());
    assert_eq!((mailboxes.errors(), mailboxes.registers_lost()), (0, 0));
    let check = mailboxes.check_work(|offset, bytes| inode.mapping().read(offset, bytes)).unwrap();
    assert!(check.is_whole(), "{check:?}");
}

type Ran = Result<Stopped<()>, RunError>;

/// A guest in a VM of its own.
///
/// Dropped in the order of the fields: the vCPU, then the slots, then the VM.
pub(crate) struct Guest {
    thread: Option<JoinHandle<(Vcpu, Ran)>>,
    vcpu: Option<Vcpu>,
    kicker: Kicker,
    _slots: MemorySlots<Arc<Mapping>>,
    _vm: Vm,
    pub(crate) file: GmemFile,
}

impl Guest {
    /// One that stands at its beginning.
    pub(crate) fn new(inode: &Arc<Inode>, shape: Shape) -> Self {
        Self::in_vm(builder(), inode, shape)
    }

    /// The same in this VM.
    pub(crate) fn in_vm(builder: VmBuilder, inode: &Arc<Inode>, shape: Shape) -> Self {
        Self::with(builder, inode, MEMORY_BYTES, shape, |_| {})
    }

    /// The same with so many bytes of the memory; what comes behind them, `rest` gives it.
    pub(crate) fn with(
        builder: VmBuilder,
        inode: &Arc<Inode>,
        len_bytes: u64,
        shape: Shape,
        rest: impl FnOnce(&mut MemorySlots<Arc<Mapping>>),
    ) -> Self {
        let mut slots = builder.memory_slots();
        let file = GmemFile::open(Arc::clone(inode), OURS, builder.fd()).unwrap();
        file.bind(&mut slots, Binding { slot: 0, guest_address: 0, offset_bytes: 0, len_bytes }).unwrap();
        rest(&mut slots);
        let vm = builder.finish(shape.irqchip).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        Cpuid::supported(&Kvm::new().unwrap()).unwrap().load(&vcpu).unwrap();
        let image = image(shape.interrupts);
        let start = image.starts().next().unwrap();
        let fd = vcpu.fd();
        fd.set_sregs(&start.sregs(fd.get_sregs().unwrap())).unwrap();
        fd.set_regs(&start.regs()).unwrap();
        Self { thread: None, kicker: vcpu.kicker(), vcpu: Some(vcpu), _slots: slots, _vm: vm, file }
    }

    pub(crate) fn start(&mut self) {
        let mut vcpu = self.vcpu.take().unwrap();
        self.thread = Some(thread::spawn(move || {
            let ran = vcpu.run(|exit| match exit {
                VcpuExit::IoOut(REPORT_PORT, data) => {
                    let report = Report::from_code(u32::from_le_bytes(data.try_into().unwrap()));
                    assert!(!matches!(report, None | Some(Report::Fault { .. })), "{report:?}");
                    ControlFlow::Continue(())
                }
                other => panic!("the guest left KVM: {other:?}"),
            });
            (vcpu, ran)
        }));
    }

    /// Kicks the vCPU, and waits until it is out.
    #[track_caller]
    pub(crate) fn stop(&mut self) {
        self.kicker.kick().unwrap();
        let thread = self.thread.take().unwrap();
        soon("the vCPU comes out", || thread.is_finished());
        let (vcpu, ran) = thread.join().unwrap();
        assert_eq!(ran.unwrap(), Stopped::Kicked);
        self.vcpu = Some(vcpu);
    }

    /// Waits until the vCPU comes out by itself.
    #[track_caller]
    pub(crate) fn failed(&mut self) -> RunError {
        let thread = self.thread.take().unwrap();
        soon("the vCPU comes out", || thread.is_finished());
        let (vcpu, ran) = thread.join().unwrap();
        self.vcpu = Some(vcpu);
        ran.unwrap_err()
    }

    pub(crate) fn vcpu(&self) -> &Vcpu {
        self.vcpu.as_ref().unwrap()
    }

    /// The state of the vCPU, which stands still.
    pub(crate) fn save(&self) -> VcpuState {
        Saver::prepare(self.vcpu()).unwrap().save(self.vcpu()).unwrap().clone()
    }

    pub(crate) fn load(&mut self, state: &VcpuState) {
        let vcpu = self.vcpu.as_mut().unwrap();
        let loader = Loader::prepare(vcpu).unwrap();
        loader.load(vcpu, state).unwrap();
        loader.finish(vcpu, state).unwrap();
    }
}

impl Drop for Guest {
    /// KVM takes no slot from a vCPU that waits at a hole: it has to come out first.
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = self.kicker.kick();
            let _ = thread.join();
        }
    }
}
