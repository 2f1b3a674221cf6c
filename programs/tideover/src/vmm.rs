//! `tideover vmm`: this program as the VMM of one machine.

use std::process::ExitCode;

use ::vmm::Start;
use machine::update::Step;
use socket::Timeouts;
use tracing::debug;

use crate::cli::Life;
use crate::cli::Vmm;

pub(crate) fn vmm(arguments: Vmm) -> anyhow::Result<ExitCode> {
    match arguments.life {
        Life::Run { spec } => {
            // By default a machine is updated to the program at the path that it was started from.
            let programs = vec![socket::Program::this_path()?];
            ::vmm::run(&serde_json::from_str(&spec)?, programs)?;
        }
        Life::Succeed { connect } => {
            let start = connect.map_or(Start::Started, Start::Connect);
            ::vmm::succeed(&start, Timeouts::default(), &mut |step: Step| debug!(%step, "successor"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
