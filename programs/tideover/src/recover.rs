//! A machine whose VMM has died runs again.

use std::process::ExitCode;

use ::vmm::control::Answer;
use ::vmm::control::Otherwise;
use ::vmm::control::RecoverReport;
use ::vmm::control::Recovered;
use ::vmm::control::Request;
use anyhow::bail;

use crate::cli;
use crate::machines;
use crate::progress::Bar;
use crate::resume::HELD;
use crate::verbs;

pub(crate) fn recover(arguments: &cli::Recover) -> anyhow::Result<ExitCode> {
    let client = machines::connect(&arguments.name)?;
    let bar = Bar::new();
    bar.say("starting the guest");
    let otherwise = match arguments.otherwise {
        cli::Otherwise::Keep => Otherwise::Keep,
        cli::Otherwise::Boot => Otherwise::Boot,
    };
    // Its holder looks for it where it lies from there.
    let program = arguments.program.as_deref().map(std::path::absolute).transpose()?;
    let answer = verbs::ask(&client, &Request::Recover { otherwise, program })?;
    bar.done();
    match answer {
        Answer::Recovered(report) if arguments.json => verbs::say_json(&report)?,
        Answer::Recovered(report) => verbs::say(&sentence(&report))?,
        Answer::Held(held) => {
            complain!("tideover: {}", verbs::held(&held));
            return Ok(ExitCode::from(HELD));
        }
        other => bail!("unexpected answer to recover: {other:?}"),
    }
    Ok(ExitCode::SUCCESS)
}

fn sentence(report: &RecoverReport) -> String {
    let how = match report.how {
        Recovered::RunsOn => "runs on from where it stood",
        Recovered::Booted => "started from the beginning, in its memory made zero",
    };
    format!("{}: {how}, in process {}: {}\n", report.name, report.pid, report.why)
}
