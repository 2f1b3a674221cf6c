//! What an update or a kexec took.

use std::process::ExitCode;

use ::vmm::control::Answer;
use ::vmm::control::KexecReport;
use ::vmm::control::Request;
use ::vmm::control::UpdateReport;
use anyhow::bail;
use serde::Serialize;

use crate::cli;
use crate::machines;
use crate::page;
use crate::page::Page;
use crate::table;
use crate::table::millis;
use crate::verbs;
use crate::waterfall;
use crate::waterfall::Waterfall;

/// What was done to a machine, and what it took.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Done {
    /// The host's kernel was replaced.
    Kexec(Box<KexecReport>),
    /// The VMM was replaced, or that was tried.
    Update {
        /// The machine.
        name: String,
        #[serde(flatten)]
        report: Box<UpdateReport>,
    },
}

pub(crate) fn report(arguments: &cli::Report) -> anyhow::Result<ExitCode> {
    let names = match &arguments.name {
        Some(name) => vec![name.clone()],
        None => machines::names()?,
    };
    let mut done = Vec::new();
    for name in names {
        match of_machine(&name) {
            Ok(of) if of.is_empty() && arguments.name.is_some() => {
                complain!("tideover: {name} has not been updated, and has not come through a kexec");
            }
            Ok(of) => done.extend(of),
            Err(error) if arguments.name.is_some() => return Err(error),
            // It is dead: there is nobody to ask.
            Err(error) if error.is::<machines::NoMachine>() => {}
            Err(error) => complain!("tideover: left out: {error:#}"),
        }
    }
    match &arguments.html {
        Some(path) if done.is_empty() => {
            complain!("tideover: there is nothing to report: {} is not written", path.display());
        }
        Some(path) => page(&body(&done)).write(path)?,
        None => say(&done, arguments.json)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The last kexec of a machine, and the last update after it.
fn of_machine(name: &str) -> anyhow::Result<Vec<Done>> {
    let client = verbs::connect_to_look(name)?;
    let answer = verbs::ask(&client, &Request::Report);
    let kexec = match answer.map_err(|error| verbs::explain_silence(name, error))? {
        Answer::Report(report) => report.map(Done::Kexec),
        Answer::Held(_) => return Ok(Vec::new()),
        other => bail!("unexpected answer to report: {other:?}"),
    };
    // A VMM of an older release knows of no such question, and the connection may be gone after it.
    let update = match verbs::ask(&client, &Request::LastUpdate) {
        Ok(Answer::LastUpdate(report)) => report,
        _ => None,
    };
    let update = update.map(|report| Done::Update { name: name.to_owned(), report });
    Ok(kexec.into_iter().chain(update).collect())
}

/// Says what came of these machines.
pub(crate) fn say(done: &[Done], as_json: bool) -> anyhow::Result<()> {
    let columns = waterfall::columns();
    match as_json {
        true => verbs::say_json(&done),
        false => done.iter().try_for_each(|done| verbs::say(&text(done, columns))),
    }
}

fn text(done: &Done, columns: usize) -> String {
    let [head, before, after] = sentences(done)
        .map(|lines| lines.iter().map(|line| format!("  {}\n", page::line(line))).collect::<String>());
    format!("{}{before}{}{after}", head.trim_start(), waterfall(done).text(columns))
}

/// The parts of the pause.
fn waterfall(done: &Done) -> Waterfall {
    match done {
        Done::Kexec(report) => Waterfall::of(report.phases_us.iter().cloned()),
        Done::Update { report, .. } => Waterfall::of(table::PHASES.iter().filter_map(|phase| {
            let took = report.phases_us.get(*phase)?;
            Some(((*phase).to_owned(), *took))
        })),
    }
}

/// What there is to say: first, before the parts of the pause, and after them.
fn sentences(done: &Done) -> [Vec<String>; 3] {
    match done {
        Done::Kexec(report) => sentences_of_kexec(report),
        Done::Update { name, report } => {
            [vec![verbs::told(name, report).trim_end().to_owned()], vec![], vec![]]
        }
    }
}

/// All of it, for a browser.
fn body(done: &[Done]) -> String {
    let section = |done: &Done| {
        let [head, before, after] = sentences(done).map(|lines| {
            lines.iter().map(|line| format!("<p>{}</p>\n", page::escape(line))).collect::<String>()
        });
        let (name, what) = match done {
            Done::Kexec(report) => (&report.name, "kexec"),
            Done::Update { name, .. } => (name, "update"),
        };
        let rows = waterfall(done).html();
        format!(
            "<h2>{}: {what}</h2>\n{head}{before}<table><thead><tr><th>part of the pause<th class=n>took<th>when\n<tbody>\n\
             {rows}</table>\n{after}",
            page::escape(name)
        )
    };
    format!("<h1>Tideover: what it took</h1>\n{}", done.iter().map(section).collect::<String>())
}

const fn page(body: &str) -> Page<'_> {
    const STYLE: &str = "th[scope] { width: 12rem; } td.n { width: 9rem; } .bar svg { display: block; width: 100%; height: 1rem; } \
                         .bar rect { fill: var(--mark); }\n";

    Page { title: "Tideover: what it took", style: STYLE, script: None, data: None, body }
}

fn sentences_of_kexec(report: &KexecReport) -> [Vec<String>; 3] {
    let pause = report.pause_us.map_or("an unknown time".to_owned(), millis);
    let sure = match (report.clock.as_deref(), report.uncertain_us) {
        (Some("realtime"), _) => ", by the time of day, which is right to a second".to_owned(),
        (_, Some(us)) => format!(", give or take {}", millis(us)),
        _ => String::new(),
    };
    let seen = report.guest_pause_us.map(|us| format!("; {} as it saw it", millis(us))).unwrap_or_default();
    let head = format!(
        "{}: runs in process {}; the guest stood still for {pause}{sure}{seen}",
        report.name, report.pid
    );
    let shutdown = report
        .shutdown_us
        .map(|us| format!("before that, the host was shut down for {}, while the guest ran", millis(us)));
    let clock = report.clock_error_us.map(|us| {
        format!("the guest's clock is {} {}", millis(us.abs()), if us < 0.0 { "behind" } else { "ahead" })
    });
    [vec![head], shutdown.into_iter().collect(), clock.into_iter().collect()]
}

#[cfg(test)]
mod tests {
    use ::vmm::control::UpdateOutcome;

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
        let told = |report: &KexecReport| text(&Done::Kexec(Box::new(report.clone())), 80);
        let text = told(&report);
        assert!(text.starts_with(
            "web1: runs in process 7; the guest stood still for 2000.00 ms, give or take 0.05 ms\n"
        ));
        assert!(text.contains("was shut down for 9000.00 ms, while the guest ran\n"), "{text}");
        assert!(text.contains("  first instruction         0.09 ms  "), "{text}");
        assert!(text.ends_with("  the guest's clock is 1.50 ms behind\n"), "{text}");
        let unsure = KexecReport { clock: Some("realtime".to_owned()), ..report };
        assert!(told(&unsure).contains("right to a second"));
    }

    fn update() -> Done {
        let phases = [("paused", 100.0), ("saved", 200.0), ("running", 100.0), ("warm", 9e6)];
        let report = UpdateReport {
            predecessor_pid: 7,
            successor_pid: Some(8),
            outcome: UpdateOutcome::Updated,
            reason: None,
            pause_us: Some(400.0),
            aside_us: None,
            guest_pause_us: None,
            phases_us: phases.into_iter().map(|(name, us)| (name.to_owned(), us)).collect(),
            ticks_before: 1,
            ticks_after: Some(2),
            probe: None,
        };
        Done::Update { name: "<b>".to_owned(), report: Box::new(report) }
    }

    #[test]
    fn an_update_is_told_by_the_parts_of_its_pause_in_their_order() {
        let text = text(&update(), 57);
        let wanted = "<b>: updated from process 7 to 8; the guest stood still for 0.40 ms
  paused                    0.10 ms  █████
  saved                     0.20 ms       ██████████
  running                   0.10 ms                 █████
";
        assert_eq!(text, wanted);
        let json = serde_json::to_value(update()).unwrap();
        assert_eq!((&json["kind"], &json["name"]), (&"update".into(), &"<b>".into()));
        assert_eq!(json["phases_us"]["saved"], 200.0);
    }

    #[test]
    fn a_page_has_a_bar_for_each_part_and_shows_a_name_as_it_is() {
        let page = page(&body(&[update()])).html();
        assert_eq!(page.matches("<rect ").count(), 3);
        assert!(page.contains("&lt;b&gt;: update") && !page.contains("<b>"), "{page}");
        assert!(page.contains("<rect x=\"250.0\" width=\"500.0\""), "{page}");
        assert!(!page.contains("<script") && !page.contains("script-src"));
    }
}
