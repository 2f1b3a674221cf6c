//! `tideover demo`: a guest, its VMM replaced a few times, and the proof that it did not notice.

use std::io::Write as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ::vmm::control::Answer;
use ::vmm::control::CheckReport;
use ::vmm::control::Client;
use ::vmm::control::GuestKind;
use ::vmm::control::Request;
use ::vmm::control::Source;
use ::vmm::control::Status;
use ::vmm::control::Store;
use ::vmm::control::UpdateOutcome;
use ::vmm::control::UpdateReport;
use ::vmm::control::UpdateRequest;
use anyhow::Context as _;
use anyhow::bail;
use serde::Serialize;
use socket::Timeouts;

use crate::cli;
use crate::first_vmm;
use crate::first_vmm::FirstVmm;
use crate::progress::Bar;
use crate::table;

/// Time between two updates, so that the guest is at its ordinary work when the next one comes.
const BETWEEN_UPDATES: Duration = Duration::from_millis(100);

/// What the demo found; its schema is docs/demo.schema.json.
#[derive(Debug, Serialize)]
pub(crate) struct Result {
    pub(crate) guest: GuestKind,
    pub(crate) vcpus: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) page_size: u64,
    pub(crate) huge_bytes: u64,
    pub(crate) store: &'static str,
    pub(crate) carrier: &'static str,
    pub(crate) updates: Vec<UpdateReport>,
    pub(crate) pages_checked: u64,
    pub(crate) pages_lost: u64,
    pub(crate) guest_errors: u64,
    pub(crate) registers_lost: u64,
    pub(crate) ticks_miscounted: u64,
    pub(crate) time_to_full_speed_us: Option<f64>,
    pub(crate) verified: bool,
    /// Why there are not more huge pages, for people.
    #[serde(skip)]
    pub(crate) huge_refused: Option<i32>,
}

pub(crate) fn demo(arguments: &cli::Demo) -> anyhow::Result<ExitCode> {
    let spec = first_vmm::spec("demo", &arguments.hardware, true, true)?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut vmm = FirstVmm::start(&program, &spec, &[], false, None)?;
    let result = run(arguments, &vmm, &program).map_err(|error| vmm.explain(error))?;
    vmm.stop()?;
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&result)? + "\n",
        false => table::show(&result),
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write the result")?;
    Ok(if result.verified { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A store as it is called on the command line and in results.
pub(crate) const fn store_name(store: Store) -> &'static str {
    match store {
        Store::Memfd => "memfd",
        Store::GuestMemfd => "guest_memfd",
        Store::Hugetlb => "hugetlb",
        Store::Path => "path",
    }
}

fn run(arguments: &cli::Demo, vmm: &FirstVmm, program: &Path) -> anyhow::Result<Result> {
    let bar = Bar::new();
    let (status, client) = (vmm.await_status(&bar)?, vmm.client()?);
    let mut updates = Vec::new();
    for number in 1..=arguments.updates {
        std::thread::sleep(BETWEEN_UPDATES);
        bar.say(&format!("update {number} of {}", arguments.updates));
        let last = number == arguments.updates;
        updates.push(update(client, arguments, program.to_owned(), last)?);
    }
    let check = match client.ask(&Request::Check, &mut |what, done, of| bar.at(what, done, of))? {
        Answer::Check(check) => check,
        other => bail!("unexpected answer to check: {other:?}"),
    };
    bar.done();
    Ok(Result { carrier: arguments.carrier.name(), ..result(&status, updates, &check) })
}

fn update(
    client: &Client,
    arguments: &cli::Demo,
    program: PathBuf,
    probe: bool,
) -> anyhow::Result<UpdateReport> {
    let timeouts = Timeouts::default();
    let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    let request = Request::Update(UpdateRequest {
        successor: Source::Program(program),
        carrier: arguments.carrier.of_request(),
        populate: !arguments.no_populate,
        probe,
        timeout_ms: millis(timeouts.hand_over),
        prepare_timeout_ms: millis(timeouts.prepare),
    });
    match client.ask(&request, &mut |_, _, _| {})? {
        Answer::Update(report) => Ok(*report),
        other => bail!("unexpected answer to update: {other:?}"),
    }
}

fn result(status: &Status, updates: Vec<UpdateReport>, check: &CheckReport) -> Result {
    if let Some(bad) = &check.first_bad {
        complain!("tideover: the first thing that is wrong: {bad}");
    }
    let all_updated = updates.iter().all(|update| {
        // An update after which the guest has not counted on is none.
        update.outcome == UpdateOutcome::Updated && update.ticks_after > Some(update.ticks_before)
    });
    let wrong = [check.pages_lost, check.guest_errors, check.registers_lost, check.ticks_miscounted];
    let whole = wrong.iter().all(|count| *count == 0);
    let probe = updates.iter().rev().find_map(|update| update.probe);
    Result {
        guest: status.guest,
        vcpus: status.vcpus,
        memory_bytes: status.memory_bytes,
        page_size: status.page_size,
        huge_bytes: status.huge_bytes,
        store: store_name(status.store),
        carrier: "socket",
        updates,
        pages_checked: check.pages_checked,
        pages_lost: check.pages_lost,
        guest_errors: check.guest_errors,
        registers_lost: check.registers_lost,
        ticks_miscounted: check.ticks_miscounted,
        time_to_full_speed_us: probe.map(|probe| probe.time_to_full_speed_us),
        huge_refused: status.huge_refused,
        verified: all_updated && whole && check.pages_checked > 0,
    }
}
