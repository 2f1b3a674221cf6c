//! The verb: what was found, for people and as JSON.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;

use super::Finding;
use super::Host;
use super::Level;
use super::Subject;
use super::finding::Id;
use super::finding::Topic;
use super::kernel::CommandLine;
use super::reserved;
use super::reserved::Reserved;
use crate::cli;

/// What is written as JSON; its schema is docs/check.schema.json.
#[derive(Debug, Serialize)]
struct Report<'a> {
    verdict: Level,
    findings: &'a [Finding],
}

pub(crate) fn check(arguments: &cli::Check) -> anyhow::Result<ExitCode> {
    let subject = Subject {
        machines: arguments.machines.clone(),
        kernel: arguments.kernel.clone(),
        initrd: arguments.initrd.clone(),
        command_line: arguments.cmdline.clone(),
    };
    let findings = super::run(&Host::this(), &subject);
    let verdict = super::worst(&findings);
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&Report { verdict, findings: &findings })? + "\n",
        false => show(&findings, subject.kernel.is_some()),
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write the result")?;
    Ok(if verdict == Level::Failure { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Looks at reserved memory alone.
pub(crate) fn reserved_memory(host: &Host, json: bool) -> anyhow::Result<ExitCode> {
    let reserved = Reserved::of_host(host, &CommandLine::of_host(host));
    let findings = reserved::look(&reserved, &host.open_files());
    let verdict = super::worst(&findings);
    let text = match json {
        true => serde_json::to_string_pretty(&Report { verdict, findings: &findings })? + "\n",
        false => table(&findings) + &format!("{}\n", ready(verdict)),
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write the result")?;
    Ok(if verdict == Level::Failure { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn ready(verdict: Level) -> &'static str {
    match verdict {
        Level::Ok => "ready for machines",
        Level::Warning => "ready for machines when that is done",
        Level::Failure => "NOT ready for machines",
    }
}

/// For people: by topic, the machines one by one.
fn show(findings: &[Finding], next: bool) -> String {
    let mut text = table(findings);
    if !next {
        text += &format!("{}\n  not looked at: --kernel IMAGE has it looked at\n", Topic::NextKernel.name());
    }
    text + &verdict(findings) + other_way(findings)
}

/// What a host can do that has no way.
fn other_way(findings: &[Finding]) -> &'static str {
    let none = |finding: &Finding| finding.id == Id::ReservedMemory && finding.level == Level::Warning;
    let refused = |finding: &Finding| finding.id == Id::DeviceOpen && finding.level == Level::Failure;
    match findings.iter().any(none) && findings.iter().any(refused) {
        true => {
            "another way, by any kernel: memory that kernels leave alone, `tideover setup reserve` (docs/reserved.md)\n"
        }
        false => "",
    }
}

fn table(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.title.len()).max().unwrap_or_default();
    let (mut text, mut heading) = (String::new(), None);
    for finding in findings {
        let of = (finding.topic, finding.machine.as_deref());
        if heading != Some(of) {
            text += &match of {
                (topic, Some(machine)) => format!("{} {machine}\n", topic.name()),
                (topic, None) => format!("{}\n", topic.name()),
            };
            heading = Some(of);
        }
        text += &format!("  {:<7}  {:<width$}  {}\n", finding.level.name(), finding.title, finding.found);
        if let Some(advice) = &finding.advice {
            text += &format!("  {:<7}  {:<width$}  -> {advice}\n", "", "");
        }
    }
    text
}

fn verdict(findings: &[Finding]) -> String {
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let number = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let (failures, warnings) = (count(Level::Failure), count(Level::Warning));
    let warnings = (warnings > 0).then(|| number(warnings, "warning"));
    match (failures, warnings) {
        (0, None) => "can be carried through a kexec\n".to_owned(),
        (0, Some(warnings)) => format!("can be carried through a kexec, with {warnings}\n"),
        (failures, None) => format!("CANNOT be carried through a kexec: {}\n", number(failures, "failure")),
        (failures, Some(warnings)) => {
            format!("CANNOT be carried through a kexec: {}, {warnings}\n", number(failures, "failure"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_shown_under_their_headings_in_columns() {
        let findings = [
            Id::KernelVersion.ok("Linux 7.3"),
            Id::Clock.warning("hpet", "boot with tsc"),
            Id::MachineStore.failure("hugetlb", "run it anew").of_machine("a"),
            Id::MachineName.ok("short").of_machine("b"),
        ];
        let wanted = "\
kernel
  ok       version  Linux 7.3
  warning  clock    hpet
                    -> boot with tsc
machine a
  failure  store    hugetlb
                    -> run it anew
machine b
  ok       name     short
CANNOT be carried through a kexec: 1 failure, 1 warning
";
        assert_eq!(show(&findings, true), wanted);
        assert!(show(&findings, false).contains("next kernel\n  not looked at"));
    }

    #[test]
    fn a_host_that_has_no_way_is_told_of_the_other_one() {
        let none = || Id::ReservedMemory.warning("none", "");
        let shown = show(&[Id::DeviceOpen.failure("", ""), none()], true);
        assert!(
            shown.contains("CANNOT") && shown.ends_with("`tideover setup reserve` (docs/reserved.md)\n"),
            "{shown}"
        );
        assert!(!show(&[Id::DeviceOpen.failure("", "")], true).contains("setup reserve"));
        assert!(!show(&[none()], true).contains("setup reserve"));
    }

    #[test]
    fn the_verdict_counts_what_is_not_well() {
        let warning = || Id::Clock.warning("", "");
        assert_eq!(verdict(&[]), "can be carried through a kexec\n");
        assert_eq!(verdict(&[warning(), warning()]), "can be carried through a kexec, with 2 warnings\n");
        assert_eq!(verdict(&[Id::Clock.failure("", "")]), "CANNOT be carried through a kexec: 1 failure\n");
    }
}
