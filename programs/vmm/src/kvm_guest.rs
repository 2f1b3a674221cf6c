//! A guest in a VM of KVM: pulse, or Linux.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use gmem::Binding;
use gmem::GmemFile;
use gmem::GuestMemfd;
use gmem::Inode;
use kvm::Contents;
use kvm::Cpuid;
use kvm::MemorySlots;
use kvm::Vcpu;
use kvm::VcpuState;
use kvm::Vm;
use kvm::VmBuilder;
use kvm::VmState;
use kvm_ioctls::Kvm;
use kvm_ioctls::VmFd;
use machine::Identity;
use machine::StateName;
use machine::update::Guest;
use pulse::Image;
use pulse::Options;
use pulse::Start;
use pulse::Vectors;
use region::Mapping;
use region::PageSize;
use sched::Scheduling;
use serde::Deserialize;
use serde::Serialize;

use crate::backends::Backends;
use crate::backends::LinuxFiles;
use crate::board;
use crate::board::Board;
use crate::console;
use crate::control::DeviceStatus;
use crate::control::GuestKind;
use crate::control::LinuxSpec;
use crate::control::MachineSpec;
use crate::exits::Exits;
use crate::guest;
use crate::guest::GuestError;
use crate::guest::Health;
use crate::guest::MemoryWords;
use crate::guest::STOP_TIMEOUT;
use crate::guest::Served;
use crate::guest::below;
use crate::vcpu_thread::VcpuThread;

/// Formats of its states.
pub(crate) const FORMATS: [&str; 4] =
    ["tideover-kvm-vm-v1", "tideover-kvm-vcpu-v1", board::FORMAT, console::FORMAT];
const VM_STATE: StateName = StateName::literal("vm");
/// Of all devices in one: each state that is handed over costs time in the pause.
const DEVICES_STATE: StateName = StateName::literal("devices");

/// Names of the states of a guest with so many vCPUs.
pub(crate) fn states(vcpus: u32) -> Vec<StateName> {
    [VM_STATE, DEVICES_STATE].into_iter().chain((0..vcpus).map(vcpu_state)).collect()
}

fn vcpu_state(index: u32) -> StateName {
    StateName::new(vcpu_name(index).as_bytes()).unwrap_or(VM_STATE)
}

fn vcpu_name(index: u32) -> String {
    format!("vcpu{index}")
}

/// What a successor is told before the pause.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct BeforePause {
    cpuid: Vec<u8>,
    contents: Vec<u8>,
    /// How each vCPU's thread is scheduled, if it is known.
    threads: Vec<Option<ThreadSer>>,
}

/// [`Scheduling`] as a successor is told it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(remote = "Scheduling")]
struct SchedulingSer {
    cpus: Vec<u32>,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct ThreadSer(#[serde(with = "SchedulingSer")] Scheduling);

type States = Vec<(StateName, Vec<u8>)>;

/// What a guest is made of and for.
#[derive(Debug)]
pub struct Setup<'a> {
    /// What machine it is.
    pub spec: &'a MachineSpec,
    /// Its memory.
    pub memory: &'a Arc<Inode>,
    /// The machine's identity.
    pub identity: Identity,
    /// What its devices have of the host.
    pub backends: &'a Arc<Backends>,
    /// Where it tells of its end.
    pub health: Health,
}

/// A guest in a VM.
#[derive(Debug)]
pub struct KvmGuest {
    // Dropped in this order: the threads with the vCPUs end, then vCPUs, devices, memory slots and VM go, then the memory.
    vcpus: Vec<VcpuThread>,
    board: Board,
    _slots: MemorySlots<Arc<Mapping>>,
    vm: Vm,
    _file: GmemFile,
    memory: Arc<Inode>,
    before_pause: BeforePause,
    health: Health,
    /// All vCPUs run, or were told to.
    runs: bool,
    /// How long they may take to stop, and to be saved.
    patience: Duration,
}

/// A VM that has nothing yet, as what memory is made with that is to be its own.
#[derive(Debug)]
pub struct NewVm {
    kvm: Kvm,
    builder: VmBuilder,
}

impl NewVm {
    /// Makes it.
    ///
    /// # Errors
    /// [`GuestError::Below`] without the right to use KVM.
    pub fn make() -> Result<Self, GuestError> {
        let kvm = Kvm::new().map_err(below("open /dev/kvm"))?;
        let builder = VmBuilder::create(&kvm).map_err(below("make a VM"))?;
        Ok(Self { kvm, builder })
    }

    /// Guest memory of its own.
    pub(crate) fn guest_memfd(&self, size_bytes: u64) -> Result<GuestMemfd, GuestError> {
        GuestMemfd::create(self.builder.fd(), size_bytes).map_err(below("make a guest_memfd"))
    }
}

/// A VM with its memory and vCPUs that nothing was loaded into yet.
struct Parts {
    kvm: Kvm,
    vm: Vm,
    vcpus: Vec<Vcpu>,
    board: Board,
    exits: Arc<Exits>,
    slots: MemorySlots<Arc<Mapping>>,
    file: GmemFile,
}

impl Parts {
    fn make(new: NewVm, setup: &Setup<'_>, vcpus: u32) -> Result<Self, GuestError> {
        let NewVm { kvm, builder } = new;
        let Setup { spec, memory, identity, backends, health } = setup;
        let mut slots = builder.memory_slots();
        let file = GmemFile::open(Arc::clone(memory), *identity, builder.fd());
        let file = file.map_err(below("open guest memory"))?;
        for (slot, place) in (0..).zip(pulse::slots(memory.size_bytes())) {
            let binding = Binding {
                slot,
                guest_address: place.guest_address,
                offset_bytes: place.offset_bytes,
                len_bytes: place.len_bytes,
            };
            file.bind(&mut slots, binding).map_err(below("give the guest its memory"))?;
        }
        let vm = builder.finish(board::irqchip(spec)).map_err(below("make interrupt controllers"))?;
        let vcpus = (0..vcpus).map(|index| vm.create_vcpu(index).map_err(below("make a vCPU")));
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        let (board, bus) = Board::make(&vm, memory, *identity, backends, health)?;
        let exits = Exits { bus, health: health.clone(), is_pulse: spec.linux.is_none() };
        Ok(Self { kvm, vm, vcpus, board, exits: Arc::new(exits), slots, file })
    }

    /// Starts the vCPUs' threads, which wait for orders.
    fn start(
        self,
        cpuid: &Cpuid,
        setup: &Setup<'_>,
        threads: Vec<Option<ThreadSer>>,
    ) -> Result<KvmGuest, GuestError> {
        let threads = threads.into_iter().chain(std::iter::repeat(None));
        let start = |((vcpu, index), thread): ((Vcpu, u32), Option<ThreadSer>)| {
            VcpuThread::start(vcpu_name(index), vcpu, Arc::clone(&self.exits), thread.map(|thread| thread.0))
        };
        let vcpus = self.vcpus.into_iter().zip(0..).zip(threads);
        let mut vcpus = vcpus.map(start).collect::<Result<Vec<_>, _>>()?;
        let contents = match vcpus.first_mut() {
            Some(first) => first.idle()?.contents().encode(),
            None => return Err(GuestError::NoVcpus),
        };
        Ok(KvmGuest {
            vcpus,
            board: self.board,
            _slots: self.slots,
            vm: self.vm,
            _file: self.file,
            memory: Arc::clone(setup.memory),
            before_pause: BeforePause { cpuid: cpuid.encode(), contents, threads: Vec::new() },
            health: setup.health.clone(),
            runs: false,
            patience: STOP_TIMEOUT,
        })
    }
}

impl KvmGuest {
    /// A guest with all of its vCPUs that starts from the beginning, in this VM and in memory that is zero.
    ///
    /// # Errors
    /// [`GuestError`]
    pub fn first(new: NewVm, setup: &Setup<'_>) -> Result<Self, GuestError> {
        let parts = Parts::make(new, setup, setup.spec.vcpus)?;
        let cpuid = Cpuid::supported(&parts.kvm).map_err(below("ask for CPUID"))?;
        for vcpu in &parts.vcpus {
            cpuid.load(vcpu).map_err(below("set CPUID"))?;
        }
        match setup.backends.linux.as_ref().zip(setup.spec.linux.as_ref()) {
            Some((files, linux)) => boot_linux(&parts.vcpus, files, linux, setup)?,
            None => boot_pulse(&parts.vcpus, Vectors::widest(cpuid.entries()), setup)?,
        }
        parts.start(&cpuid, setup, Vec::new())
    }

    /// A guest that is to be loaded into this VM: everything that does not need its state, as the predecessor describes it.
    ///
    /// # Errors
    /// [`GuestError`], also if this host could not load the state that is to come.
    pub fn prepare(
        new: NewVm,
        setup: &Setup<'_>,
        vcpus: u32,
        told: &serde_json::Value,
    ) -> Result<Self, GuestError> {
        let told = BeforePause::deserialize(told).map_err(below("read the predecessor's description"))?;
        let cpuid = Cpuid::decode(&told.cpuid).map_err(below("read the guest's CPUID"))?;
        let contents = Contents::decode(&told.contents).map_err(below("read what the state will hold"))?;
        let parts = Parts::make(new, setup, vcpus)?;
        for vcpu in &parts.vcpus {
            cpuid.load(vcpu).map_err(below("set CPUID"))?;
        }
        let mut guest = parts.start(&cpuid, setup, told.threads)?;
        guest.vcpus.iter_mut().try_for_each(|vcpu| vcpu.idle()?.check(&contents))?;
        Ok(guest)
    }
}

/// Gives a vCPU what it starts with.
fn set_start(vcpu: &Vcpu, start: &Start, vectors: Vectors) -> Result<(), kvm_ioctls::Error> {
    let fd = vcpu.fd();
    fd.set_sregs(&start.sregs(fd.get_sregs()?))?;
    if vectors == Vectors::Avx2 {
        fd.set_xcrs(&start.xcrs(fd.get_xcrs()?))?;
    }
    fd.set_regs(&start.regs())?;
    fd.set_mp_state(start.mp_state())
}

/// How often pulse says how far it is, and looks for input, in milliseconds.
const LINES_MS: u64 = 1000;
const POLL_MS: u64 = 20;

/// Puts pulse into memory, and the vCPUs where they start.
fn boot_pulse(vcpus: &[Vcpu], vectors: Vectors, setup: &Setup<'_>) -> Result<(), GuestError> {
    let memory = setup.memory;
    let Some(first) = vcpus.first() else { return Err(GuestError::NoVcpus) };
    let cycles_per_ms: u64 = first.fd().get_tsc_khz().unwrap_or_default().into();
    let pause_threshold_cycles = guest::pause_threshold(cycles_per_ms);
    let count = u32::try_from(vcpus.len()).map_err(below("count vCPUs"))?;
    let options = Options { vcpus: count, vectors, pause_threshold_cycles, ..Options::new(cycles_per_ms) };
    let image = Image::new(memory.size_bytes(), &options).map_err(below("lay the guest out"))?;
    for (offset, bytes) in image.pieces() {
        memory.mapping().write(offset, bytes).map_err(below("write the guest into memory"))?;
    }
    if setup.spec.socket.is_some() {
        // Of a machine that has a name somebody may look at the console.
        let words = MemoryWords(Arc::clone(memory.mapping()));
        let mailboxes = words.mailboxes().map_err(below("read the guest's layout"))?;
        mailboxes.first().set_console(LINES_MS * cycles_per_ms, POLL_MS * cycles_per_ms);
    }
    for (vcpu, start) in vcpus.iter().zip(image.starts()) {
        set_start(vcpu, &start, vectors).map_err(below("set registers"))?;
    }
    Ok(())
}

/// Puts Linux into memory, and the first vCPU at its entry. It has no tables that would tell it of others.
fn boot_linux(
    vcpus: &[Vcpu],
    files: &LinuxFiles,
    spec: &LinuxSpec,
    setup: &Setup<'_>,
) -> Result<(), GuestError> {
    // A descriptor of its own would have the same place in the file: nobody else reads it.
    let mut kernel = files.kernel.try_clone().map_err(below("read the kernel"))?;
    let initrd = files.initrd.as_ref().map(File::try_clone).transpose();
    let mut initrd = initrd.map_err(below("read the initial RAM disk"))?;
    let command_line = board::command_line(&spec.command_line, setup.spec);
    let memory = board::guest_memory(setup.memory)?;
    let loaded = devices::linux::load(&memory, &mut kernel, initrd.as_mut(), &command_line);
    let loaded = loaded.map_err(below("load the kernel"))?;
    let Some(first) = vcpus.first() else { return Err(GuestError::NoVcpus) };
    let fd = first.fd();
    let sregs = fd.get_sregs().map_err(below("read registers"))?;
    fd.set_sregs(&loaded.sregs(sregs)).map_err(below("set registers"))?;
    fd.set_regs(&loaded.regs()).map_err(below("set registers"))
}

impl Guest for KvmGuest {
    type Error = GuestError;

    fn pause(&mut self) -> Result<(), GuestError> {
        if !self.runs {
            return Ok(());
        }
        self.vcpus.iter().try_for_each(VcpuThread::kick)?;
        let end = Instant::now() + self.patience;
        self.vcpus.iter().try_for_each(|vcpu| vcpu.await_stop(end))?;
        // After the vCPUs: what they do to a device still has effect.
        self.board.pause();
        self.runs = false;
        Ok(())
    }

    fn save(&mut self) -> Result<States, GuestError> {
        if let Some(why) = self.health.ended() {
            return Err(GuestError::Failed(why.to_string()));
        }
        // No vCPU is saved before all stand still: one that runs could still interrupt another.
        self.vcpus.iter().try_for_each(VcpuThread::begin_save)?;
        let vm = VmState::save(&self.vm).map_err(below("save the VM"))?;
        let mut states = vec![(VM_STATE, vm.encode()), (DEVICES_STATE, self.board.save()?)];
        let end = Instant::now() + self.patience;
        for (vcpu, index) in self.vcpus.iter_mut().zip(0..) {
            states.push((vcpu_state(index), vcpu.await_saved(end)?));
        }
        Ok(states)
    }

    fn stopped_ns(&self) -> Option<u64> {
        self.vcpus.iter().filter_map(VcpuThread::stopped_ns).min()
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        // One that has ended stands still for good, and is not lost by that.
        if self.health.ended().is_some() {
            self.attend();
            return Ok(());
        }
        self.start()
    }
}

impl Served for KvmGuest {
    fn kind(&self) -> GuestKind {
        GuestKind::Kvm
    }

    fn load(&mut self, states: &BTreeMap<StateName, Vec<u8>>) -> Result<(), GuestError> {
        let bytes = |name: StateName| states.get(&name).ok_or(GuestError::NoState(name));
        self.vcpus.iter().try_for_each(VcpuThread::stand_by)?;
        let vm = VmState::decode(bytes(VM_STATE)?).map_err(below("read the VM's state"))?;
        for (vcpu, index) in self.vcpus.iter_mut().zip(0..) {
            let state = VcpuState::decode(bytes(vcpu_state(index))?);
            vcpu.idle()?.load(state.map_err(below("read the vCPU's state"))?)?;
        }
        vm.load(&self.vm).map_err(below("load the VM"))?;
        self.board.load(bytes(DEVICES_STATE)?)
    }

    fn start(&mut self) -> Result<(), GuestError> {
        self.board.resume();
        self.vcpus.iter_mut().try_for_each(VcpuThread::run)?;
        self.runs = true;
        // Should a vCPU's thread wait for this processor, it gets it now.
        thread::yield_now();
        self.attend();
        Ok(())
    }

    fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    fn formats(&self) -> Vec<String> {
        let devices = self.board.formats();
        FORMATS.into_iter().chain(devices).map(str::to_owned).collect()
    }

    fn before_freeze(&self) -> Result<(), GuestError> {
        // A vCPU is kicked out of such a wait, and comes back to it when it runs on, here or there. A device cannot be.
        if !self.board.has_workers() {
            return Ok(());
        }
        let filled = self.memory.mapping().warm(PageSize::Small, &mut |_, _| {});
        filled.map(drop).map_err(below("give all of the guest's pages memory"))
    }

    fn before_pause(&self) -> serde_json::Value {
        let threads = self.vcpus.iter().map(|vcpu| vcpu.scheduling().map(ThreadSer)).collect();
        let told = BeforePause { threads, ..self.before_pause.clone() };
        serde_json::to_value(told).unwrap_or_default()
    }

    fn entered_ns(&self) -> Option<u64> {
        // Not known as long as one of them was not entered.
        self.vcpus.iter().map(VcpuThread::entered_ns).collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    fn vm_object(&self) -> Option<&Arc<VmFd>> {
        Some(self.vm.fd())
    }

    fn vcpus(&self) -> Vec<BorrowedFd<'_>> {
        self.vcpus.iter().map(VcpuThread::as_fd).collect()
    }

    fn health(&self) -> &Health {
        &self.health
    }

    fn devices(&self, spec: &MachineSpec) -> Vec<DeviceStatus> {
        self.board.status(spec)
    }

    fn attend(&self) {
        self.board.go_on();
    }
}

#[cfg(test)]
mod tests {
    use machine::Machine;
    use machine::MemoryName;
    use machine::MemorySpec;
    use machine::SessionName;
    use machine::Spec;
    use pulse::Command;

    use crate::guest::End;

    use super::*;

    fn guest(vcpus: u32) -> (Machine, KvmGuest) {
        let spec = Spec {
            name: SessionName::literal("orders"),
            vcpus: vcpus.into(),
            memories: vec![MemorySpec::new(MemoryName::literal("ram"), 8 << 20)],
            states: states(vcpus),
        };
        let machine = Machine::create(&spec, &mut |_, _| {}).unwrap();
        let guest =
            with_setup(&machine, vcpus, |setup| KvmGuest::first(NewVm::make().unwrap(), setup).unwrap());
        (machine, guest)
    }

    fn with_setup<T>(machine: &Machine, vcpus: u32, act: impl FnOnce(&Setup<'_>) -> T) -> T {
        let memory = &machine.memories()[0].inode;
        let spec = MachineSpec { vcpus, ..MachineSpec::new("orders", memory.size_bytes(), GuestKind::Kvm) };
        let backends = Arc::new(Backends::open(&spec).unwrap());
        let (identity, health) = (machine.identity(), Health::well().unwrap());
        act(&Setup { spec: &spec, memory, identity, backends: &backends, health })
    }

    #[test]
    fn orders_that_a_late_stop_left_behind_disturb_no_later_one() {
        harness::need!(kvm);
        let (_machine, mut guest) = guest(2);
        guest.start().unwrap();
        // As after a stop that was called off because it took too long: told to run while it runs.
        guest.start().unwrap();
        for round in 0..300 {
            guest.pause().unwrap_or_else(|error| panic!("{round}: {error}"));
            let stopped = guest.stopped_ns();
            for _ in 0..2 {
                assert_eq!(guest.save().unwrap().len(), 4);
            }
            assert_eq!(guest.stopped_ns(), stopped, "{round}: it ran after it was stopped");
            guest.resume().unwrap();
            guest.resume().unwrap();
        }
    }

    #[test]
    fn a_pause_is_from_the_first_stop_to_the_last_entry() {
        harness::need!(kvm);
        let (_machine, mut guest) = guest(3);
        assert_eq!((guest.stopped_ns(), guest.entered_ns()), (None, None));
        guest.start().unwrap();
        while guest.entered_ns().is_none() {
            thread::yield_now();
        }
        guest.pause().unwrap();
        let (stopped, entered) = (guest.stopped_ns(), guest.entered_ns());
        assert!(guest.vcpus.iter().all(|vcpu| vcpu.stopped_ns() >= stopped));
        assert!(guest.vcpus.iter().all(|vcpu| vcpu.entered_ns() <= entered));
    }

    #[test]
    fn a_state_that_cannot_be_read_leaves_the_guest_to_be_loaded_again() {
        harness::need!(kvm);
        let (machine, mut first) = guest(2);
        first.start().unwrap();
        first.pause().unwrap();
        let good: BTreeMap<StateName, Vec<u8>> = first.save().unwrap().into_iter().collect();
        let told = first.before_pause();
        let mut second = with_setup(&machine, 2, |setup| {
            KvmGuest::prepare(NewVm::make().unwrap(), setup, 2, &told).unwrap()
        });
        let bad = good.keys().map(|name| (*name, vec![1; 64])).collect();
        assert!(second.load(&bad).is_err());
        drop(first);
        second.load(&good).unwrap();
        second.start().unwrap();
        second.pause().unwrap();
        assert_eq!(second.health().ended(), None);
    }

    #[test]
    fn each_command_ends_the_guest_as_it_says_whichever_vcpu_gets_it() {
        harness::need!(kvm);
        for command in [Command::PowerOff, Command::Reset, Command::ResetByChipset, Command::Crash] {
            for vcpu in 0..2 {
                let (machine, mut guest) = guest(2);
                let words = MemoryWords(Arc::clone(machine.memories()[0].inode.mapping()));
                guest.start().unwrap();
                words.mailboxes().unwrap().get(vcpu).unwrap().command(command);
                let begun = Instant::now();
                let end = loop {
                    match guest.health().ended() {
                        Some(end) => break end,
                        None => assert!(begun.elapsed() < Duration::from_secs(60), "{command:?}"),
                    }
                    thread::sleep(Duration::from_millis(1));
                };
                let as_asked = match command {
                    Command::PowerOff => end == End::PowerOff,
                    Command::Reset | Command::ResetByChipset => end == End::Reset,
                    Command::Crash => matches!(end, End::Crashed(_)),
                };
                assert!(as_asked, "{command:?} of {vcpu}: {end}");
                guest.pause().unwrap();
                assert!(guest.save().is_err(), "one that has ended goes nowhere");
            }
        }
    }

    #[test]
    fn devices_are_loaded_with_the_guest_and_a_device_too_few_or_too_many_is_refused() {
        harness::need!(kvm);
        let (machine, mut first) = guest(1);
        first.start().unwrap();
        first.pause().unwrap();
        let good: BTreeMap<StateName, Vec<u8>> = first.save().unwrap().into_iter().collect();
        let told = first.before_pause();
        drop(first);
        let mut second = with_setup(&machine, 1, |setup| {
            KvmGuest::prepare(NewVm::make().unwrap(), setup, 1, &told).unwrap()
        });
        let devices = &good[&DEVICES_STATE];
        let name = devices.windows(6).position(|name| name == b"serial").unwrap();
        let mut other = devices.clone();
        other[name] = b'x';
        let with = |state| good.clone().into_iter().chain([(DEVICES_STATE, state)]).collect();
        assert!(
            matches!(second.load(&with(other)), Err(GuestError::NoDeviceState(name)) if name == "serial")
        );
        let more = [&devices[..], b"\x01\0\0\0x\0\0\0\0"].concat();
        assert!(matches!(second.load(&with(more)), Err(GuestError::UnknownDevice(name)) if name == "x"));
        second.load(&good).unwrap();
        second.start().unwrap();
        second.pause().unwrap();
        assert_eq!(second.health().ended(), None);
    }
}
