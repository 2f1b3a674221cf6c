//! A kernel of ours gets control on the real KVM, as Linux would.

use std::sync::mpsc;

use devices::Bus;
use devices::Power;
use devices::PowerEvent;
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use iced_x86::code_asm::dword_ptr;
use iced_x86::code_asm::registers::*;
use kvm::Stopped;
use kvm_ioctls::Kvm;

use crate::image::MIB;
use crate::image::image;
use crate::image::load;
use crate::machine::Machine;
use crate::machine::Ram;

const REPORT: u32 = 0x10;

/// Reports what boot_params say, what is at the ends of their pointers, and where it runs, and powers off.
fn kernel() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut here = a.create_label();
    a.mov(edx, REPORT)?;
    for field in [0x202, 0x228, 0x218] {
        a.mov(eax, dword_ptr(rsi + field))?;
        a.out(dx, eax)?;
    }
    for pointer in [0x228, 0x218] {
        a.mov(eax, dword_ptr(rsi + pointer))?;
        a.mov(eax, dword_ptr(rax))?;
        a.out(dx, eax)?;
    }
    a.set_label(&mut here)?;
    a.lea(rax, iced_x86::code_asm::ptr(here))?;
    a.out(dx, eax)?;
    // The stack is there.
    a.push(rsi)?;
    a.pop(rax)?;
    a.out(dx, eax)?;
    a.mov(edx, 0x604)?;
    a.mov(eax, 0x2034)?;
    a.out(dx, ax)?;
    a.hlt()?;
    a.assemble(0)
}

#[test]
fn a_kernel_gets_control_with_its_boot_parameters_and_powers_the_machine_off() {
    harness::need!(kvm);
    let kvm = Kvm::new().unwrap();
    let ram = Ram::new(16 * MIB);
    let loaded = load(&ram.memory, &image(&kernel().unwrap()), Some(b"ramdisk"), "command line").unwrap();
    let (sender, events) = mpsc::channel();
    let mut bus = Bus::new();
    Power::new("power", move |event| sender.send(event).unwrap()).attach(&mut bus).unwrap();
    let mut machine = Machine::at_entry(&kvm, &ram, &loaded);
    let mut reports = Vec::new();
    let stopped = machine.run(&bus, |exit| {
        reports.extend(exit.value.filter(|_| u32::from(exit.port) == REPORT));
        exit.taken
    });
    assert_eq!(stopped, Stopped::Broke(()));
    assert_eq!(events.try_recv(), Ok(PowerEvent::PowerOff));
    let initrd = u32::try_from(16 * MIB - 4096).unwrap();
    assert_eq!(reports[..3], [u32::from_le_bytes(*b"HdrS"), 0x2_0000, initrd]);
    assert_eq!(reports[3..5], [u32::from_le_bytes(*b"comm"), u32::from_le_bytes(*b"ramd")]);
    let [.., place, stacked] = reports[..] else { panic!("{reports:x?}") };
    assert_eq!(u64::from(place) >> 8, loaded.regs().rip >> 8);
    assert_eq!((reports.len(), stacked), (7, 0x7000));
}
