//! Devices whose state outlives the program that serves them.
//!
//! A guest's memory stays in place while the VMM under it is replaced; what its devices are in the middle of has to
//! get across by itself. Every device here can be stopped at any moment, saved, and loaded into a fresh one of another
//! process, such that the guest cannot tell: no request is lost, none is done twice, no interrupt is missed.
//!
//! | want | see |
//! | --- | --- |
//! | what vCPUs call at an exit | [`Bus`] |
//! | what an update calls | [`Device`] |
//! | interrupts | [`InterruptLine`] |
//! | guest memory | [`GuestMemory`] |
//! | a serial line | [`Serial`] |
//! | a disk | [`VirtioBlk`] |
//! | a network card | [`VirtioNet`] |
//! | power off and reset | [`Power`] |
//! | starting Linux | [`linux`] |
//!
//! # The steps of an update
//!
//! | guest | predecessor | successor |
//! | --- | --- | --- |
//! | runs | | makes the same devices, which are *paused*, and a [`Bus`] of them |
//! | stops | stops the vCPUs, then [`Device::pause`] each | |
//! | stopped | [`Device::save`] each | |
//! | stopped | | [`Device::load`] each |
//! | runs | ends | [`Device::resume`] each, then the vCPUs |
//!
//! A device is made paused also for a machine that starts: `resume` is what begins its work. If the update goes back, the
//! predecessor calls `resume` on the devices that it paused, and nothing has happened.
//!
//! A VMM with a disk and a serial line, and what its vCPUs' threads do at an exit:
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use std::sync::Arc;
//!
//! use devices::{Bus, Device, EdgeLine, GuestMemory, Serial, VirtioBlk};
//! use devices::disk::{Access, DiskFile};
//! use kvm_ioctls::VcpuExit;
//! use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
//!
//! # fn example(memory: GuestMemory, vm: &kvm::Vm, vcpu: &mut kvm::Vcpu) -> Result<(), Box<dyn std::error::Error>> {
//! let line = |interrupt| -> Result<_, Box<dyn std::error::Error>> {
//!     let event = EventFd::new(EFD_NONBLOCK)?;
//!     vm.fd().register_irqfd(&event, interrupt)?;
//!     Ok(Arc::new(EdgeLine::new(event)))
//! };
//! let file = DiskFile::open("disk.img".as_ref(), Access::ReadWrite)?;
//! let disk = VirtioBlk::new("disk0", "serial number", Arc::new(file), memory, line(5)?)?;
//! let serial = Serial::new("com1", line(Serial::COM1_INTERRUPT)?, Box::new(std::io::stdout()));
//! let mut bus = Bus::new();
//! bus.at_addresses(0xd000_0000, VirtioBlk::WINDOW_BYTES, disk.clone())?;
//! bus.at_ports(Serial::COM1, Serial::PORTS, serial.clone())?;
//! disk.resume()?;
//! serial.resume()?;
//! vcpu.run(|exit| {
//!     match exit {
//!         VcpuExit::IoIn(port, data) => { bus.port_in(port, data); }
//!         VcpuExit::IoOut(port, data) => { bus.port_out(port, data); }
//!         VcpuExit::MmioRead(address, data) => { bus.mmio_read(address, data); }
//!         VcpuExit::MmioWrite(address, data) => { bus.mmio_write(address, data); }
//!         other => return ControlFlow::Break(format!("{other:?}")),
//!     }
//!     ControlFlow::Continue(())
//! })?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is in flight
//!
//! A device works on one request (of a network card: frame) at a time in each direction, and takes a request from the guest's ring by answering it: the place in the
//! ring moves on when the answer is published, not before. `pause` waits for the request under way to be answered, and
//! starts no other. So at that instant each request of the guest is either answered in guest memory, with its
//! interrupt raised or recorded, or untouched in the ring, where the successor finds it. After a crash, when nobody had
//! the time to pause, the same rule makes the one request under way be done again, never be lost.
//!
//! An interrupt that the guest has not acknowledged is part of the state and raised again by `resume`: that a line was
//! raised is no proof that the interrupt got further than the VM that is gone. A guest may so see an interrupt for
//! which it finds no reason, as it may with any shared line.
//!
//! # What is trusted
//!
//! Nothing that the guest writes, and nothing that a saved state says. A ring that is broken stops its device until
//! the driver resets it; a state that cannot be is refused with an error that names the field.
#![forbid(unsafe_code)]

mod bus;
mod device;
mod interrupt;
pub mod linux;
mod memory;
mod power;
#[cfg(test)]
mod rig;
mod serial;
mod state;
mod virtio;

pub use bus::Bus;
pub use bus::BusError;
pub use bus::MmioDevice;
pub use bus::PortDevice;
pub use device::Device;
pub use device::ResumeError;
pub use disk;
pub use interrupt::EdgeLine;
pub use interrupt::InterruptLine;
pub use interrupt::LevelLine;
pub use memory::GuestMemory;
pub use memory::MemoryError;
pub use memory::NoGuestMemory;
pub use memory::Slot;
pub use power::Power;
pub use power::PowerEvent;
pub use serial::Serial;
pub use serial::SerialError;
pub use state::StateError;
pub use tap;
pub use virtio::blk::VirtioBlk;
pub use virtio::core::DeviceFault;
pub use virtio::net::VirtioNet;
pub use virtio::queue::RingFault;
pub use virtio::request::BlockStore;

/// Formats of all devices' states, which this release can read.
pub const FORMATS: [&str; 4] = [
    serial::FORMAT.compatible,
    power::FORMAT.compatible,
    virtio::blk::FORMAT.compatible,
    virtio::net::FORMAT.compatible,
];
