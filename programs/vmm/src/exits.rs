//! What the guest leaves KVM for.

use std::ops::ControlFlow;

use devices::Bus;
use kvm_ioctls::VcpuExit;
use pulse::REPORT_PORT;
use pulse::Report;

use crate::guest::End;
use crate::guest::Health;

/// Who answers the guest. Shared by all vCPUs.
#[derive(Debug)]
pub(crate) struct Exits {
    pub(crate) bus: Bus,
    pub(crate) health: Health,
    /// The guest is pulse: it reports at a port of its own, and never touches what nobody answers. Others look for devices
    /// that there may be.
    pub(crate) is_pulse: bool,
}

impl Exits {
    /// Answers one exit. What pulse finds wrong is in its mailbox.
    pub(crate) fn handle(&self, exit: VcpuExit<'_>) -> ControlFlow<End> {
        let (answered, place) = match exit {
            VcpuExit::IoOut(REPORT_PORT, data) if self.is_pulse => return report(data),
            VcpuExit::IoIn(port, data) => (self.bus.port_in(port, data), u64::from(port)),
            VcpuExit::IoOut(port, data) => (self.bus.port_out(port, data), u64::from(port)),
            VcpuExit::MmioRead(address, data) => (self.bus.mmio_read(address, data), address),
            VcpuExit::MmioWrite(address, data) => (self.bus.mmio_write(address, data), address),
            VcpuExit::Shutdown => return crashed("a triple fault"),
            other => return crashed(&format!("an exit that it should not make: {other:?}")),
        };
        if !answered && self.is_pulse {
            return crashed(&format!("an access to {place:#x}, where nothing is"));
        }
        // It may have switched itself off.
        self.health.ended().map_or(ControlFlow::Continue(()), ControlFlow::Break)
    }
}

fn report(data: &[u8]) -> ControlFlow<End> {
    let code = <[u8; 4]>::try_from(data).map(u32::from_le_bytes).ok();
    match code.and_then(Report::from_code) {
        Some(report @ Report::Fault { .. }) => crashed(&format!("{report:?}")),
        Some(_) => ControlFlow::Continue(()),
        None => crashed(&format!("an unknown report: {data:x?}")),
    }
}

fn crashed(why: &str) -> ControlFlow<End> {
    ControlFlow::Break(End::Crashed(why.to_owned()))
}
