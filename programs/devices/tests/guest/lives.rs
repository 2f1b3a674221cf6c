//! A guest on a disk and a serial line, whose VM and devices are replaced many times while it runs.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use devices::BlockStore;
use devices::Bus;
use devices::Device;
use devices::EdgeLine;
use devices::Power;
use devices::Serial;
use devices::VirtioBlk;
use devices::disk::Access;
use devices::disk::DiskFile;
use kvm::Stopped;
use kvm_ioctls::Kvm;
use std::os::fd::AsFd;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use crate::image::MIB;
use crate::image::image;
use crate::image::load;
use crate::image::qword;
use crate::machine::Machine;
use crate::machine::Ram;
use crate::output::Output;
use crate::program;
use crate::program::SECTORS;

/// How many updates the guest lives through.
const UPDATES: u32 = 200;
/// Far longer than it takes.
const LONG: Duration = Duration::from_secs(60);

/// A file of a few sectors, removed when dropped.
struct Image(PathBuf);

impl Image {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tideover-guest-{}-{test}", std::process::id()));
        std::fs::write(&path, vec![0; usize::try_from(SECTORS * 512).unwrap()]).unwrap();
        Self(path)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A disk that takes its time, so that most updates come in the middle of a request.
struct Slow(Arc<DiskFile>);

impl BlockStore for Slow {
    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, into: &mut [u8], offset_bytes: u64) -> io::Result<usize> {
        thread::sleep(Duration::from_micros(500));
        self.0.read_at(into, offset_bytes)
    }

    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<usize> {
        thread::sleep(Duration::from_micros(500));
        self.0.write_at(bytes, offset_bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

/// The devices of one VMM.
struct Devices {
    all: Vec<Arc<dyn Device>>,
    bus: Bus,
    file: Arc<DiskFile>,
}

impl Devices {
    fn new(machine: &Machine, ram: &Ram, file: DiskFile, output: &Output) -> Self {
        let file = Arc::new(file);
        let line = |interrupt| {
            let event = EventFd::new(EFD_NONBLOCK).unwrap();
            machine.vm.fd().register_irqfd(&event, interrupt).unwrap();
            Arc::new(EdgeLine::new(event))
        };
        let disk_line = line(program::INTERRUPT);
        let store = Arc::new(Slow(Arc::clone(&file)));
        let disk = VirtioBlk::new("disk0", "d", store, ram.memory.clone(), disk_line).unwrap();
        let serial = Serial::new("com1", line(Serial::COM1_INTERRUPT), Box::new(output.clone()));
        let power = Power::new("power", |_| ());
        let mut bus = Bus::new();
        bus.at_addresses(program::WINDOW, VirtioBlk::WINDOW_BYTES, disk.clone()).unwrap();
        bus.at_ports(Serial::COM1, Serial::PORTS, serial.clone()).unwrap();
        power.attach(&mut bus).unwrap();
        Self { all: vec![disk, serial, power], bus, file }
    }

    fn resume(&self) {
        self.all.iter().for_each(|device| device.resume().unwrap());
    }

    /// What the predecessor gives: a state for each name, and the open file.
    fn leave(self) -> (Vec<(String, Vec<u8>)>, DiskFile) {
        self.all.iter().for_each(|device| device.pause());
        let states =
            self.all.iter().map(|device| (device.name().to_owned(), device.save().unwrap())).collect();
        let passed = File::from(self.file.as_fd().try_clone_to_owned().unwrap());
        (states, DiskFile::adopt("disk0", passed, Access::ReadWrite).unwrap())
    }

    fn load(&self, states: &[(String, Vec<u8>)]) {
        for device in &self.all {
            let (_, state) = states.iter().find(|(name, _)| name == device.name()).unwrap();
            device.load(state).unwrap();
        }
    }
}

/// Numbers that look random and are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn a_guest_on_a_disk_notices_none_of_many_updates_and_the_disk_holds_what_it_believes() {
    harness::need!(kvm);
    let kvm = Kvm::new().unwrap();
    let (ram, file, output) = (Ram::new(16 * MIB), Image::new("lives"), Output::default());
    let loaded = load(&ram.memory, &image(&program::assemble().unwrap()), None, "").unwrap();
    let mut machine = Machine::at_entry(&kvm, &ram, &loaded);
    let disk = DiskFile::open(&file.0, Access::ReadWrite).unwrap();
    let mut devices = Devices::new(&machine, &ram, disk, &output);
    devices.resume();
    let (mut numbers, mut updates, mut rounds) = (Numbers(4711), 0_u32, 0);
    let begun = Instant::now();
    loop {
        let kicked = kick_after(Duration::from_micros(numbers.below(6000)), &machine);
        let stopped = machine.run(&devices.bus, |exit| {
            assert_ne!(exit.port, program::FAILURES, "check {:?} in round {rounds}", exit.value);
            if exit.port == program::ROUNDS {
                assert_eq!(exit.value, Some(rounds), "each round is reported once");
                rounds += 1;
            }
            exit.port == 0x604
        });
        kicked.join().unwrap();
        if stopped == Stopped::Broke(()) {
            break;
        }
        assert!(begun.elapsed() < LONG, "stuck in round {rounds} after {updates} updates");
        // Either order is good: an interrupt of a request that ends meanwhile is raised again.
        let early = updates.is_multiple_of(2).then(|| machine.save());
        let (states, disk) = devices.leave();
        let state = early.unwrap_or_else(|| machine.save());
        drop(machine);
        machine = Machine::with(&kvm, &ram, &state);
        devices = Devices::new(&machine, &ram, disk, &output);
        devices.load(&states);
        devices.resume();
        updates += 1;
        if updates == UPDATES {
            ram.memory.write(program::STOP, &[1]).unwrap();
        }
    }
    let rounds = rounds.into();
    devices.all.iter().for_each(|device| device.pause());
    check_disk(&ram, &std::fs::read(&file.0).unwrap(), rounds);
    let printed: Vec<u8> = (0..rounds).map(program::letter).collect();
    assert_eq!(output.bytes(), printed);
    // It sleeps for an answer only if it is not there yet; it cannot always have been.
    assert_ne!(qword(&ram.memory, program::INTERRUPTS), 0);
    println!("{rounds} rounds, {} interrupts", qword(&ram.memory, program::INTERRUPTS));
}

fn kick_after(time: Duration, machine: &Machine) -> thread::JoinHandle<()> {
    let kicker = machine.vcpu.kicker();
    let (ready, started) = mpsc::channel();
    let thread = thread::spawn(move || {
        ready.send(()).unwrap();
        thread::sleep(time);
        kicker.kick().unwrap();
    });
    started.recv().unwrap();
    thread
}

/// Every sector has what the guest's table says of it, and the table what the guest did.
fn check_disk(ram: &Ram, disk: &[u8], rounds: u64) {
    for (sector, bytes) in (0..SECTORS).zip(disk.chunks_exact(512)) {
        let round = qword(&ram.memory, program::TABLE + 8 * sector).checked_sub(1);
        let last = (0..rounds).rfind(|round| program::sector(*round) == sector);
        assert_eq!(round, last, "sector {sector}");
        let words = (0..64).map(|place| round.map_or(0, |round| program::word(round, place)));
        let expected: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        assert_eq!(bytes, expected, "sector {sector}");
    }
}
