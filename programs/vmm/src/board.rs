//! What a machine has beside memory and vCPUs: its devices, and where they are.
//!
//! | device | where | interrupt |
//! | --- | --- | --- |
//! | serial line | ports 0x3F8 to 0x3FF | 4 |
//! | power off and reset | ports 0x604, 0x64 and 0xCF9 | |
//! | disks, then network cards | 4 KiB each from 0xD0000000 on | 5, 9, 10, 11 |
//!
//! The reference guest alone has a VM without PICs and IOAPIC, which ends sooner; no interrupt of a device gets to it, and it
//! has to look at the line itself. Every other machine has both, and the timer.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use devices::Bus;
use devices::Device;
use devices::EdgeLine;
use devices::GuestMemory;
use devices::InterruptLine;
use devices::Power;
use devices::PowerEvent;
use devices::Serial;
use devices::Slot;
use devices::VirtioBlk;
use devices::VirtioNet;
use devices::linux;
use gmem::Inode;
use kvm::Irqchip;
use kvm::Vm;
use machine::Identity;
use tracing::warn;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use crate::backends;
use crate::backends::Backends;
use crate::backends::MAX_SLOTS;
use crate::control::DeviceKind;
use crate::control::DeviceStatus;
use crate::control::MachineSpec;
use crate::guest::End;
use crate::guest::GuestError;
use crate::guest::Health;
use crate::guest::below;

/// The format of all devices' states in one.
pub(crate) const FORMAT: &str = "tideover-devices-v1";
const MAGIC: [u8; 4] = *b"DEVS";
const VERSION: u32 = 1;
/// What the console's state is called among those of devices.
const CONSOLE: &str = "console";
const SERIAL: &str = "serial";
const POWER: &str = "power";

/// Interrupt pins of the split interrupt controller.
const PINS: u32 = 24;
/// The first window of a virtio device, above the memory below 4 GiB.
const WINDOWS: u64 = 0xd000_0000;
const _: () = assert!(VirtioBlk::WINDOW_BYTES == VirtioNet::WINDOW_BYTES);
/// Interrupts of a PC that are nobody else's.
const INTERRUPTS: [u32; MAX_SLOTS] = [5, 9, 10, 11];

/// The interrupt controllers of a machine that is made as `spec` says.
pub(crate) fn irqchip(spec: &MachineSpec) -> Irqchip {
    let is_bare = spec.linux.is_none() && slots(spec) == 0;
    if is_bare { Irqchip::Split { pins: PINS } } else { Irqchip::Full { pit: true } }
}

fn slots(spec: &MachineSpec) -> usize {
    spec.disks.len() + spec.taps.len()
}

/// Where each virtio device is: window and interrupt.
fn places() -> impl Iterator<Item = (u64, u32)> {
    (WINDOWS..).step_by(usize::try_from(VirtioBlk::WINDOW_BYTES).unwrap_or(usize::MAX)).zip(INTERRUPTS)
}

/// What Linux is told, which cannot find the devices by itself.
pub(crate) fn command_line(text: &str, spec: &MachineSpec) -> String {
    let parameters = places().take(slots(spec)).map(|(window, line)| linux::virtio_parameter(window, line));
    [text.to_owned()]
        .into_iter()
        .chain(parameters)
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The guest's memory as devices see it.
pub(crate) fn guest_memory(memory: &Inode) -> Result<GuestMemory, GuestError> {
    let slots = pulse::slots(memory.size_bytes()).into_iter().map(|place| Slot {
        guest_address: place.guest_address,
        mapping: Arc::clone(memory.mapping()),
        offset_bytes: place.offset_bytes,
        len_bytes: place.len_bytes,
    });
    GuestMemory::new(slots.collect()).map_err(below("give the devices the guest's memory"))
}

/// An interrupt line that leads nowhere.
struct Unconnected;

impl InterruptLine for Unconnected {
    fn raise(&self) -> io::Result<()> {
        Ok(())
    }

    fn lower(&self) -> io::Result<()> {
        Ok(())
    }
}

fn line(vm: &Vm, interrupt: u32) -> Result<Arc<dyn InterruptLine>, GuestError> {
    if !vm.irqchip().has_pics() {
        return Ok(Arc::new(Unconnected));
    }
    let event = EventFd::new(EFD_NONBLOCK).map_err(below("make an eventfd"))?;
    vm.fd().register_irqfd(&event, interrupt).map_err(below("connect an interrupt"))?;
    Ok(Arc::new(EdgeLine::new(event)))
}

/// The devices of one VM.
pub(crate) struct Board {
    serial: Arc<Serial>,
    power: Arc<Power>,
    disks: Vec<Arc<VirtioBlk>>,
    nets: Vec<Arc<VirtioNet>>,
    backends: Arc<Backends>,
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.all().map(Device::name)).finish()
    }
}

impl Board {
    /// Makes the devices, paused, and the bus that they are on.
    pub(crate) fn make(
        vm: &Vm,
        memory: &Inode,
        identity: Identity,
        backends: &Arc<Backends>,
        health: &Health,
    ) -> Result<(Self, Bus), GuestError> {
        let mut bus = Bus::new();
        let on_bus = || below("give a device its place");
        let console = &backends.console;
        let serial = Serial::new(SERIAL, line(vm, Serial::COM1_INTERRUPT)?, console.sink());
        bus.at_ports(Serial::COM1, Serial::PORTS, serial.clone()).map_err(on_bus())?;
        console.connect(&serial);
        let health = health.clone();
        let power = Power::new(POWER, move |event| {
            health.end(match event {
                PowerEvent::PowerOff => End::PowerOff,
                PowerEvent::Reset => End::Reset,
            });
        });
        power.attach(&mut bus).map_err(on_bus())?;
        let (mut disks, mut nets) = (Vec::new(), Vec::new());
        let mut places = places();
        let mut next = || places.next().ok_or(GuestError::NoPlace);
        for (file, number) in backends.disks.iter().zip(0..) {
            let (window, interrupt) = next()?;
            let (name, id) = (backends::disk_name(number), format!("{identity}{number}"));
            // The guest sees the first 20 bytes alone.
            let id = id.get(id.len() - 20..).unwrap_or(&id);
            let (file, lines) = (Arc::clone(file), line(vm, interrupt)?);
            let disk = VirtioBlk::new(&name, id, file, guest_memory(memory)?, lines);
            let disk = disk.map_err(below("start a disk"))?;
            bus.at_addresses(window, VirtioBlk::WINDOW_BYTES, disk.clone()).map_err(on_bus())?;
            disks.push(disk);
        }
        for (tap, number) in backends.taps.iter().zip(0..) {
            let (window, interrupt) = next()?;
            let (name, frames) = (backends::net_name(number), tap.as_fd().try_clone_to_owned());
            let frames = frames.map_err(below("share a network interface"))?;
            let (mac, lines) = (mac(identity, number), line(vm, interrupt)?);
            let net = VirtioNet::new(&name, mac, frames, guest_memory(memory)?, lines);
            let net = net.map_err(below("start a network card"))?;
            bus.at_addresses(window, VirtioNet::WINDOW_BYTES, net.clone()).map_err(on_bus())?;
            nets.push(net);
        }
        Ok((Self { serial, power, disks, nets, backends: Arc::clone(backends) }, bus))
    }

    fn all(&self) -> impl Iterator<Item = &dyn Device> {
        let own: [&dyn Device; 2] = [&*self.serial, &*self.power];
        let disks = self.disks.iter().map(|disk| -> &dyn Device { &**disk });
        own.into_iter().chain(disks).chain(self.nets.iter().map(|net| -> &dyn Device { &**net }))
    }

    /// A device works by itself on guest memory, and cannot be got out of a fault there.
    pub(crate) fn has_workers(&self) -> bool {
        !self.disks.is_empty() || !self.nets.is_empty()
    }

    /// Formats of the devices' states.
    pub(crate) fn formats(&self) -> Vec<&'static str> {
        let mut formats: Vec<_> = self.all().map(Device::format).collect();
        formats.sort_unstable();
        formats.dedup();
        formats
    }

    /// All devices stand still. The vCPUs do already.
    pub(crate) fn pause(&self) {
        self.all().for_each(Device::pause);
    }

    /// All devices work, and the guest gets the interrupts that it has not acknowledged.
    pub(crate) fn resume(&self) {
        for device in self.all() {
            if let Err(error) = device.resume() {
                warn!(error = &error as &dyn std::error::Error, "a device works without its interrupt");
            }
        }
    }

    /// The consoles go on.
    pub(crate) fn go_on(&self) {
        self.backends.console.go_on();
    }

    /// The states of all devices that stand still, and of the console, which stands still from then on.
    pub(crate) fn save(&self) -> Result<Vec<u8>, GuestError> {
        let mut states = Vec::new();
        for device in self.all() {
            states.push((device.name(), device.save().map_err(below("save a device"))?));
        }
        states.push((CONSOLE, self.backends.console.save()));
        Ok(encode(&states))
    }

    /// Loads the states of all devices, and the console's.
    pub(crate) fn load(&self, bytes: &[u8]) -> Result<(), GuestError> {
        let mut states = decode(bytes)?;
        let mut take = |name: &str| {
            let at = states.iter().position(|(of, _)| *of == name.as_bytes());
            at.map(|at| states.swap_remove(at).1).ok_or_else(|| GuestError::NoDeviceState(name.to_owned()))
        };
        for device in self.all() {
            device.load(take(device.name())?).map_err(below("load a device"))?;
        }
        self.backends.console.load(take(CONSOLE)?)?;
        match states.first() {
            None => Ok(()),
            Some((of, _)) => Err(GuestError::UnknownDevice(of.escape_ascii().to_string())),
        }
    }

    /// What the devices are, for people.
    pub(crate) fn status(&self, spec: &MachineSpec) -> Vec<DeviceStatus> {
        let of = |name: &str, kind, backend: Option<String>| DeviceStatus {
            name: name.to_owned(),
            kind,
            backend,
            read_only: None,
            size_bytes: None,
            dropped: None,
            fault: None,
        };
        let serial = DeviceStatus {
            fault: self.backends.fault(SERIAL, self.serial.take_fault()),
            ..of(SERIAL, DeviceKind::Serial, None)
        };
        let mut all = vec![serial, of(POWER, DeviceKind::Power, None)];
        for ((disk, file), spec) in self.disks.iter().zip(&self.backends.disks).zip(&spec.disks) {
            all.push(DeviceStatus {
                read_only: Some(spec.read_only),
                size_bytes: Some(file.len_bytes()),
                fault: self.backends.fault(disk.name(), disk.take_fault()),
                ..of(disk.name(), DeviceKind::Disk, Some(spec.path.display().to_string()))
            });
        }
        for (net, tap) in self.nets.iter().zip(&self.backends.taps) {
            all.push(DeviceStatus {
                dropped: Some(net.dropped()),
                fault: self.backends.fault(net.name(), net.take_fault()),
                ..of(net.name(), DeviceKind::Net, Some(tap.name().to_owned()))
            });
        }
        all
    }
}

/// An address of the machine's own: locally administered, for one card.
fn mac(identity: Identity, number: usize) -> [u8; 6] {
    let [a, b, c, d, e, ..] = identity.bytes();
    [0x02, a, b, c, d, e.wrapping_add(u8::try_from(number).unwrap_or(u8::MAX))]
}

/// All states in one: each with its name before it.
fn encode(states: &[(&str, Vec<u8>)]) -> Vec<u8> {
    // Names are few bytes and states far below 4 GiB.
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes();
    let mut all = [&MAGIC[..], &VERSION.to_le_bytes()].concat();
    for (name, state) in states {
        all.extend([&len(name.as_bytes()), name.as_bytes(), &len(state), state].concat());
    }
    all
}

/// A name and a state.
type Entry<'a> = (&'a [u8], &'a [u8]);

fn decode(bytes: &[u8]) -> Result<Vec<Entry<'_>>, GuestError> {
    let broken = |field| GuestError::State { what: "the devices", field };
    let rest = bytes.strip_prefix(&MAGIC).ok_or(broken("magic"))?;
    let mut rest = rest.strip_prefix(&VERSION.to_le_bytes()).ok_or(broken("version"))?;
    let mut take = |field| {
        let (len, after) = rest.split_first_chunk().ok_or(broken(field))?;
        let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|_| broken(field))?;
        let (bytes, after) = after.split_at_checked(len).ok_or(broken(field))?;
        rest = after;
        Ok((bytes, !rest.is_empty()))
    };
    let mut states = Vec::new();
    loop {
        let (name, _) = take("name")?;
        let (state, goes_on) = take("state")?;
        states.push((name, state));
        if !goes_on {
            return Ok(states);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::control::DiskSpec;
    use crate::control::GuestKind;

    use super::*;

    #[test]
    fn states_are_read_as_they_were_written() {
        let bytes = encode(&[("serial", vec![1, 2]), ("power", Vec::new())]);
        assert_eq!(bytes, b"DEVS\x01\0\0\0\x06\0\0\0serial\x02\0\0\0\x01\x02\x05\0\0\0power\0\0\0\0");
        let states: [(&[u8], &[u8]); 2] = [(b"serial", &[1, 2]), (b"power", b"")];
        assert_eq!(decode(&bytes).unwrap(), states);
        for len in (0..8).chain(9..24).chain(25..bytes.len()) {
            assert!(decode(&bytes[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn linux_is_told_of_the_devices_that_there_are() {
        let mut spec = MachineSpec::new("m", 4 << 20, GuestKind::Kvm);
        assert_eq!(command_line("quiet", &spec), "quiet");
        spec.disks = vec![DiskSpec { path: "d".into(), read_only: false }];
        spec.taps = vec!["tap0".to_owned()];
        let told = "quiet virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:9";
        assert_eq!(command_line("quiet", &spec), told);
        assert_eq!(irqchip(&spec), Irqchip::Full { pit: true });
    }

    #[test]
    fn cards_of_one_machine_have_addresses_of_their_own() {
        let identity = Identity::new([0xff; 16]);
        assert_eq!(mac(identity, 0), [2, 0xff, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(mac(identity, 1), [2, 0xff, 0xff, 0xff, 0xff, 0]);
    }
}
