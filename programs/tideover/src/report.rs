//! What a kexec took.

use std::process::ExitCode;

use ::vmm::control::Answer;
use ::vmm::control::KexecReport;
use ::vmm::control::Request;
use anyhow::bail;

use crate::cli;
use crate::machines;
use crate::table::millis;
use crate::verbs;

pub(crate) fn report(arguments: &cli::Report) -> anyhow::Result<ExitCode> {
    let names = match &arguments.name {
        Some(name) => vec![name.clone()],
        None => machines::names()?,
    };
    let mut reports = Vec::new();
    for name in names {
        let answer = machines::connect(&name).and_then(|client| verbs::ask(&client, &Request::Report));
        match answer {
            Ok(Answer::Report(Some(report))) => reports.push(*report),
            Ok(Answer::Report(None)) if arguments.name.is_some() => {
                complain!("tideover: {name} has not come through a kexec");
            }
            Ok(Answer::Report(None) | Answer::Held(_)) => {}
            Ok(other) => bail!("unexpected answer to report: {other:?}"),
            Err(error) if arguments.name.is_some() => return Err(error),
            // It is dead: there is nobody to ask.
            Err(_) => {}
        }
    }
    say(&reports, arguments.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Says what these machines tell.
pub(crate) fn say(reports: &[KexecReport], as_json: bool) -> anyhow::Result<()> {
    match as_json {
        true => verbs::say_json(&reports),
        false => reports.iter().try_for_each(|report| verbs::say(&told(report))),
    }
}

fn told(report: &KexecReport) -> String {
    let pause = report.pause_us.map_or("an unknown time".to_owned(), millis);
    let sure = match (report.clock.as_deref(), report.uncertain_us) {
        (Some("realtime"), _) => ", by the time of day, which is right to a second".to_owned(),
        (_, Some(us)) => format!(", give or take {}", millis(us)),
        _ => String::new(),
    };
    let seen = report.guest_pause_us.map(|us| format!("; {} as it saw it", millis(us))).unwrap_or_default();
    let mut text = format!(
        "{}: runs in process {}; the guest stood still for {pause}{sure}{seen}\n",
        report.name, report.pid
    );
    if let Some(us) = report.shutdown_us {
        text += &format!("  before that, the host was shut down for {}, while the guest ran\n", millis(us));
    }
    for (phase, us) in &report.phases_us {
        text += &format!("  {:<18} {:>14}\n", phase.replace('_', " "), millis(*us));
    }
    if let Some(us) = report.clock_error_us {
        text += &format!(
            "  the guest's clock is {} {}\n",
            millis(us.abs()),
            if us < 0.0 { "behind" } else { "ahead" }
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_each_part_and_how_sure_it_is() {
        let report = KexecReport {
            name: "web1".to_owned(),
            pid: 7,
            shutdown_us: Some(9_000_000.0),
            pause_us: Some(2_000_000.0),
            clock: Some("tsc".to_owned()),
            uncertain_us: Some(50.0),
            phases_us: vec![("save".to_owned(), 500.0), ("first_instruction".to_owned(), 90.0)],
            guest_pause_us: None,
            clock_error_us: Some(-1500.0),
            ticks_before: 1,
            ticks_after: Some(2),
        };
        let text = told(&report);
        assert!(text.starts_with(
            "web1: runs in process 7; the guest stood still for 2000.00 ms, give or take 0.05 ms\n"
        ));
        assert!(text.contains("was shut down for 9000.00 ms, while the guest ran\n"), "{text}");
        assert!(text.contains("  first instruction         0.09 ms\n"), "{text}");
        assert!(text.ends_with("the guest's clock is 1.50 ms behind\n"), "{text}");
        let unsure = KexecReport { clock: Some("realtime".to_owned()), ..report };
        assert!(told(&unsure).contains("right to a second"));
    }
}
