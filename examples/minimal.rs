//! A VMM of one's own: a guest counts in memory and in a register while its VMM is replaced twice.
#![forbid(unsafe_code)]
use std::{env, io, ops::ControlFlow, process, sync::Arc, thread, thread::JoinHandle, time::Duration};

use gmem::{Binding, GmemFile, Inode};
use kvm::{Cpuid, Irqchip, Kicker, Loader, Saver, Vcpu, VcpuState, VmBuilder, kvm_bindings, kvm_ioctls::Kvm};
use machine::update::Guest as _;
use machine::{Identity, Machine, MemoryName, MemorySpec, SessionName, Spec, StateName, update};
use socket::{Offer, Outcome, Program, Successor, Timeouts};

/// In real mode, at 0x1000: inc eax; inc dword [0x2000]; mov [0x2004], eax; jmp to the start.
const CODE: [u8; 13] = [0x66, 0x40, 0x66, 0xFF, 0x06, 0x00, 0x20, 0x66, 0xA3, 0x04, 0x20, 0xEB, 0xF3];
const VCPU: StateName = StateName::literal("vcpu0");
const FORMAT: &str = "minimal-vcpu-v1";

/// A vCPU that stands still in our hands, or runs in a thread that gives it back when it is kicked.
struct Guest {
    vcpu: Option<Vcpu>,
    thread: Option<JoinHandle<Vcpu>>,
    kicker: Kicker,
    saver: Saver,
    _slots: kvm::MemorySlots<Arc<region::Mapping>>,
}

impl Guest {
    fn new(memory: &Arc<Inode>, identity: Identity) -> anyhow::Result<Self> {
        let kvm = Kvm::new()?;
        let builder = VmBuilder::create(&kvm)?;
        let mut slots = builder.memory_slots();
        let whole = Binding { slot: 0, guest_address: 0, offset_bytes: 0, len_bytes: memory.size_bytes() };
        GmemFile::open(Arc::clone(memory), identity, builder.fd())?.bind(&mut slots, whole)?;
        let vcpu = builder.finish(Irqchip::Split { pins: 24 })?.create_vcpu(0)?;
        Cpuid::supported(&kvm)?.load(&vcpu)?;
        let (kicker, saver) = (vcpu.kicker(), Saver::prepare(&vcpu)?);
        Ok(Self { vcpu: Some(vcpu), thread: None, kicker, saver, _slots: slots })
    }
}

impl update::Guest for Guest {
    type Error = io::Error;
    fn pause(&mut self) -> io::Result<()> {
        self.kicker.kick().map_err(io::Error::other)?;
        self.vcpu = self.thread.take().and_then(|thread| thread.join().ok());
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<(StateName, Vec<u8>)>> {
        let vcpu = self.vcpu.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        Ok(vec![(VCPU, self.saver.save(vcpu).map_err(io::Error::other)?.encode())])
    }
    fn resume(&mut self) -> io::Result<()> {
        let mut vcpu = self.vcpu.take().ok_or(io::ErrorKind::NotConnected)?;
        let run = move || vcpu.run(|_| ControlFlow::Break(())).map(|_| vcpu);
        self.thread = Some(thread::spawn(|| run().expect("the guest runs")));
        Ok(())
    }
}

/// Runs the guest a little, says what it has counted, and hands it over if that is left to do.
fn serve(mut machine: Machine, mut guest: Guest, updates_left: u64) -> anyhow::Result<()> {
    thread::sleep(Duration::from_millis(200));
    let counted = machine.memories()[0].inode.mapping().load(0x2000)?;
    println!("process {}: memory {}, register {}", process::id(), counted & 0xFFFF_FFFF, counted >> 32);
    let Some(left) = updates_left.checked_sub(1) else { return Ok(guest.pause()?) };
    let (channel, started) = Program::this()?.start(["succeed"])?;
    let offer = Offer { formats: vec![FORMAT.to_owned()], vmm: left.into(), ..Offer::default() };
    match socket::hand_over(&mut machine, &mut guest, &channel, &offer, &mut |_| {})? {
        Outcome::RolledBack { reason, .. } => return Err(reason.into()),
        Outcome::Updated(_) => started.let_go(),
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    if env::args().nth(1).as_deref() == Some("succeed") {
        let attached = Successor::from_stdin(&[FORMAT], Timeouts::default())?.attach(&mut |_| {})?;
        let (incoming, left) = (attached.incoming(), attached.vmm().as_u64().unwrap_or(0));
        let mut guest = Guest::new(&incoming.memories()[0], incoming.identity())?;
        let vcpu = guest.vcpu.as_mut().expect("it stands still");
        let loader = Loader::prepare(vcpu)?;
        let handed = attached.claim(&mut |_| {})?;
        let state = VcpuState::decode(&handed.states()[&VCPU])?;
        loader.load(vcpu, &state).and_then(|()| loader.finish(vcpu, &state))?;
        let running = handed.run(&mut |_| {})?;
        guest.resume()?;
        return serve(running.settle(&mut |_| {}, || ().into())?, guest, left);
    }
    let (name, memories) =
        (SessionName::literal("minimal"), vec![MemorySpec::new(MemoryName::literal("ram"), 2 << 20)]);
    let machine = Machine::create(&Spec { name, vcpus: 1, memories, states: vec![VCPU] }, &mut |_, _| {})?;
    machine.memories()[0].inode.mapping().write(0x1000, &CODE)?;
    let mut guest = Guest::new(&machine.memories()[0].inode, machine.identity())?;
    let vcpu = guest.vcpu.as_ref().expect("it stands still").fd();
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_bindings::kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() })?;
    guest.resume()?;
    serve(machine, guest, 2)
}
