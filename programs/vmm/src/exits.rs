//! What the guest leaves KVM for.

use std::ops::ControlFlow;

use kvm_ioctls::VcpuExit;
use pulse::REPORT_PORT;
use pulse::Report;

use crate::guest::End;

/// What pulse leaves the guest for. What it finds wrong is in its mailbox.
pub(crate) fn handle(exit: VcpuExit<'_>) -> ControlFlow<End> {
    match exit {
        VcpuExit::IoOut(REPORT_PORT, data) => report(data),
        VcpuExit::Shutdown => crashed("a triple fault"),
        other => crashed(&format!("an exit that it should not make: {other:?}")),
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
