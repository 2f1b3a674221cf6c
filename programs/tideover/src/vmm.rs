//! `tideover vmm`: this program as the VMM of one machine.

use std::process::ExitCode;

use ::vmm::Start;
use anyhow::Context as _;
use machine::update::Step;
use socket::Timeouts;
use tracing::debug;

use crate::cli::Life;
use crate::cli::Vmm;
use crate::keeper;

pub(crate) fn vmm(arguments: Vmm) -> anyhow::Result<ExitCode> {
    // A successor is executed through a descriptor, and would be called by its number.
    rustix::thread::set_name(c"tideover-vmm").context("cannot take a name")?;
    if arguments.detach {
        rustix::process::setsid().context("cannot leave the session")?;
    }
    if arguments.confine {
        ::vmm::confine::give_up_rights()?;
    }
    match arguments.life {
        Life::Run { spec, waits, allow_program } => {
            // By default a machine is updated to the program at the path that it was started from.
            let programs = [socket::Program::this_path()?].into_iter().chain(allow_program).collect();
            ::vmm::run(&serde_json::from_str(&spec)?, programs, waits)?;
        }
        Life::Hold => ::vmm::hold()?,
        Life::Keep => keeper::keep()?,
        Life::Seal => keeper::seal()?,
        Life::Succeed { connect, handoff } => {
            let start =
                connect.map(Start::Connect).or(handoff.map(Start::Executed)).unwrap_or(Start::Started);
            ::vmm::succeed(&start, Timeouts::default(), &mut |step: Step| debug!(%step, "successor"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
