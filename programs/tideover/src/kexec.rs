//! Booting another kernel, with the machines taken along, and rehearsing that.

use std::convert::Infallible;
use std::fs;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::Duration;

use ::kexec::Index;
use ::vmm::control::Answer;
use ::vmm::control::PreservedReport;
use ::vmm::control::Request;
use ::vmm::control::SealedReport;
use ::vmm::control::Status;
use anyhow::Context as _;
use anyhow::bail;
use anyhow::ensure;
use liveupdate::Device;
use liveupdate::Name;
use liveupdate::OpenError;
use liveupdate::Outgoing;
use liveupdate::filesystems;
use liveupdate::filesystems::Still;
use serde_json::json;

use crate::check;
use crate::check::Finding;
use crate::check::Host;
use crate::check::Level;
use crate::check::Subject;
use crate::cli;
use crate::leavers;
use crate::leavers::Goer;
use crate::leavers::Leaver;
use crate::machines;
use crate::orderly;
use crate::progress::Bar;
use crate::resume::Pending;
use crate::size;
use crate::table;
use crate::verbs;

/// The kexec was called off, and the guests run on as before.
const CALLED_OFF: u8 = 4;
/// How long a file system may take to come to rest.
const STILL: Duration = Duration::from_secs(30);
/// How long a VMM may take to say how it is.
const LOOK: Duration = Duration::from_secs(5);
/// What the next kernel has to be told, to find what this one leaves.
const LIVEUPDATE: &str = "liveupdate=on";

pub(crate) fn kexec(arguments: &cli::Kexec) -> anyhow::Result<ExitCode> {
    let machines = chosen(arguments)?;
    let command_line = command_line(arguments, &machines)?;
    // It opens the device itself, which has one user at a time.
    refuse_unfit(arguments, &machines, &command_line)?;
    if !arguments.now {
        orderly::check()?;
    }
    if needs_device(&machines) {
        check_pending(&open_device()?, arguments)?;
    }
    if machines.is_empty() && !arguments.leave_others {
        bail!(
            "no machine was started with --through-kexec: use the service manager's own kexec, or say --leave-others"
        );
    }
    let loaded = Loaded::load(arguments, &command_line)?;
    let bar = Bar::new();
    let left = match arguments.now {
        true => leave(machines, arguments, &bar).map(|never| match never {}),
        false => orderly::leave(machines, arguments, &bar),
    };
    bar.done();
    // If it did not: whoever could not go is told of in the error, and all run on.
    let Err(error) = left else {
        loaded.stay();
        return Ok(ExitCode::SUCCESS);
    };
    drop(loaded);
    complain!("tideover: there was no kexec: {error:#}");
    Ok(ExitCode::from(CALLED_OFF))
}

/// Whether the kernel has to preserve something: not if all machines lie at paths.
fn needs_device(machines: &[Goer]) -> bool {
    machines.is_empty() || machines.iter().any(|goer| !goer.at_path)
}

/// Opens the device and lists the machines there for the next kernel, as far as there are any that it has to preserve.
pub(crate) fn list(machines: &[Goer]) -> anyhow::Result<(Option<Device>, Option<Index>)> {
    if !needs_device(machines) {
        return Ok((None, None));
    }
    let device = open_device()?;
    let names = machines.iter().filter(|goer| !goer.at_path).map(|goer| goer.name.clone()).collect();
    let index = Index::preserve(&device, names)?;
    Ok((Some(device), Some(index)))
}

/// The machines that go.
fn chosen(arguments: &cli::Kexec) -> anyhow::Result<Vec<Goer>> {
    let (mut go, mut others, mut held) = (Vec::new(), Vec::new(), Vec::new());
    for name in machines::names()? {
        let client = match machines::connect(&name) {
            Ok(client) => client.with_patience(LOOK),
            // It died before this.
            Err(error) if error.is::<machines::NoMachine>() => continue,
            Err(error) => return Err(error),
        };
        match client.ask(&Request::Status, &mut |_, _, _| {}).with_context(|| format!("how is {name}?"))? {
            Answer::Status(status) if status.through_kexec => {
                go.push(Goer { name, client, at_path: status.path.is_some() });
            }
            Answer::Held(_) => held.push(name),
            _ => others.push(name),
        }
    }
    if !held.is_empty() && !arguments.leave_others {
        bail!(
            "held, and would end with this kernel: {}: resume or stop them first, or say \
             --leave-others",
            held.join(", ")
        );
    }
    if !others.is_empty() && !arguments.leave_others {
        bail!(
            "{} would end with this kernel: start such machines with --through-kexec, stop them first, or say --leave-others",
            others.join(", ")
        );
    }
    Ok(go)
}

/// Refuses to end machines that this kernel has from the one before it, and that nobody has asked for: they are passed on
/// to no other.
fn check_pending(device: &Device, arguments: &cli::Kexec) -> anyhow::Result<()> {
    let pending = Pending::read(device)?.into_names();
    let pending: Vec<String> = pending.into_iter().filter(|name| machines::connect(name).is_err()).collect();
    if !pending.is_empty() && !arguments.leave_others {
        bail!(
            "{} came through the last kexec, and would end with this kernel: `tideover resume --all` first, or say \
             --leave-others",
            pending.join(", ")
        );
    }
    Ok(())
}

fn command_line(arguments: &cli::Kexec, machines: &[Goer]) -> anyhow::Result<String> {
    let own = fs::read_to_string("/proc/cmdline").context("cannot read this kernel's command line")?;
    let begin = arguments.cmdline.clone().unwrap_or_else(|| own.clone());
    // Who loaded this kernel put these before what was asked for.
    let words = begin
        .split_whitespace()
        .filter(|word| !word.starts_with("BOOT_IMAGE=") && !word.starts_with("initrd="));
    let words: Vec<&str> =
        words.chain(arguments.append.iter().flat_map(|text| text.split_whitespace())).collect();
    if machines.iter().any(|goer| goer.at_path) {
        check_reserved(&own, &words)?;
    }
    if needs_device(machines) && !words.iter().any(|word| is_on(word)) {
        bail!(
            "the next kernel's command line has no {LIVEUPDATE}: it would keep the machines' memory and give it to nobody; \
             --append {LIVEUPDATE}"
        );
    }
    Ok(words.join(" "))
}

/// Refuses a next kernel that would use the memory that machines lie in: the firmware, which it asks, does not know that it is reserved.
fn check_reserved(own: &str, next: &[&str]) -> anyhow::Result<()> {
    let finding = check::next_line(own, &next.join(" "));
    ensure!(
        finding.level != Level::Failure,
        "machines lie in memory that kernels leave alone, and the next kernel's command line {}: {}",
        finding.found,
        finding.advice.unwrap_or_default()
    );
    Ok(())
}

/// As the kernel reads a switch.
fn is_on(word: &str) -> bool {
    let value = word.strip_prefix("liveupdate=");
    value.is_some_and(|value| value == "on" || value.starts_with(['1', 'y', 'Y', 't', 'T']))
}

/// Refuses what `tideover check` fails, and says what it warns of.
fn refuse_unfit(arguments: &cli::Kexec, machines: &[Goer], command_line: &str) -> anyhow::Result<()> {
    // What that looks for is a kernel that preserves them.
    if !needs_device(machines) {
        return Ok(());
    }
    let subject = Subject {
        machines: machines.iter().map(|goer| goer.name.clone()).collect(),
        kernel: Some(arguments.kernel.clone()),
        initrd: arguments.initrd.clone(),
        command_line: Some(command_line.to_owned()),
    };
    let findings = check::run(&Host::this(), &subject);
    let bad = findings.iter().filter(|finding| finding.level != Level::Ok);
    for Finding { level, title, machine, found, advice, .. } in bad {
        let whose = machine.as_ref().map_or_else(String::new, |name| format!("{name}: "));
        let advice = advice.as_ref().map_or_else(String::new, |advice| format!(": {advice}"));
        complain!("tideover: {}: {whose}{title}: {found}{advice}", level.name());
    }
    match check::worst(&findings) {
        Level::Failure if !arguments.unchecked => {
            bail!("this host cannot do it now: mend that first, or say --unchecked")
        }
        _ => Ok(()),
    }
}

/// The next kernel, which is let go unless it is booted.
struct Loaded;

impl Loaded {
    fn load(arguments: &cli::Kexec, command_line: &str) -> anyhow::Result<Self> {
        let open = |path: &std::path::Path| {
            File::open(path).with_context(|| format!("cannot open {}", path.display()))
        };
        let kernel = open(&arguments.kernel)?;
        let initrd = arguments.initrd.as_deref().map(open).transpose()?;
        let loaded = liveupdate::kexec::load(kernel.as_fd(), initrd.as_ref().map(File::as_fd), command_line);
        loaded.with_context(|| format!("cannot load {}", arguments.kernel.display()))?;
        Ok(Self)
    }

    /// It is going to be booted.
    fn stay(self) {
        std::mem::forget(self);
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Err(error) = liveupdate::kexec::unload() {
            complain!("tideover: the kernel that was to be booted stays loaded: {error}");
        }
    }
}

/// Opens /dev/liveupdate. KVM first: whatever it can preserve is to be known before the kernel looks at what the kernel
/// before left, which it does once.
pub(crate) fn open_device() -> Result<Device, OpenError> {
    // It has one user at a time, and where there is a tideoverd that one is it.
    if let Ok(Some(client)) = tideoverd::Client::connect(&machines::directory())
        && let Ok(device) = client.device().and_then(|device| Ok(Device::from_fd(device)?))
    {
        return Ok(device);
    }
    let _kvm = File::open("/dev/kvm");
    Device::open()
}

/// Has the agents of tideoverd preserve what they have, if there are any.
///
/// # Errors
/// If one is not ready in time, unless others may be left.
pub(crate) fn preserve_agents(
    timeout: Duration,
    leave_others: bool,
) -> anyhow::Result<Option<tideoverd::Preserved>> {
    let Some(client) = tideoverd::Client::connect(&machines::directory())? else { return Ok(None) };
    let preserved = client.preserve(timeout)?;
    if !preserved.missing.is_empty() {
        let missing = preserved.missing.join(", ");
        ensure!(
            leave_others,
            "agents of tideoverd that have not preserved what they have in time: {missing}; or say --leave-others"
        );
        complain!("tideover: these agents lose what they have: {missing}");
    }
    Ok(Some(preserved))
}

/// Takes the machines to the next kernel.
///
/// # Errors
/// Whatever keeps them here: then their guests run on.
fn leave(machines: Vec<Goer>, arguments: &cli::Kexec, bar: &Bar) -> anyhow::Result<Infallible> {
    let (device, mut index) = list(&machines)?;
    let progress = |done, of| bar.at("preserving", done, of);
    let _agents = preserve_agents(arguments.timeout, arguments.leave_others)?;
    let (mut leavers, failed) =
        leavers::preserve_all(device.as_ref(), machines, arguments.timeout, &progress)?;
    let left = match failed {
        None => said(&leavers.iter().map(Leaver::preserved).collect::<Vec<_>>(), arguments)
            .and_then(|()| jump(&mut leavers, index.as_mut(), bar)),
        Some(error) => Err(error),
    };
    let error = match left {
        Ok(never) => match never {},
        Err(error) => error,
    };
    Err(leavers::called_off(error, leavers))
}

/// Says what was preserved of these machines.
pub(crate) fn said(preserved: &[(String, PreservedReport)], arguments: &cli::Kexec) -> anyhow::Result<()> {
    if arguments.json {
        let all = preserved.iter().map(|(name, preserved)| json!({ "name": name, "preserved": preserved }));
        return verbs::say_json(&all.collect::<Vec<_>>());
    }
    for (name, preserved) in preserved {
        let (bytes, kernel) = (size::show(preserved.bytes), table::millis(preserved.kernel_us));
        verbs::say(&format!("{name}: {bytes} preserved, which took the kernel {kernel}\n"))?;
    }
    Ok(())
}

/// Everything from the first guest that stands still to the jump.
fn jump(leavers: &mut [Leaver], index: Option<&mut Index>, bar: &Bar) -> anyhow::Result<Infallible> {
    bar.say("synchronizing file systems");
    filesystems::sync();
    bar.done();
    if let Some((_, error)) = leavers::seal_each(leavers).into_iter().next() {
        return Err(error);
    }
    filesystems::sync();
    // From here on nothing is written, but to memory: who does waits.
    let still = Still::hold(STILL).context("cannot make the file systems still")?;
    index.map_or(Ok(()), |index| index.note("jump"))?;
    let error = match liveupdate::kexec::execute() {
        Ok(never) => match never {},
        Err(error) => error,
    };
    still.release().context("a file system stays still")?;
    Err(anyhow::Error::new(error).context("the kernel does not jump"))
}

pub(crate) fn rehearse(arguments: &cli::Rehearse) -> anyhow::Result<ExitCode> {
    let client = machines::connect(&arguments.name)?;
    let status = verbs::ask_status(&client)?;
    let (session, without) = match open_device() {
        Ok(device) => (Some(rehearsal(&device)?), None),
        Err(error) => (None, Some(error)),
    };
    if let Some(error) = &without {
        complain!("tideover: the kernel's own part is left out: {error}");
    }
    let bar = Bar::new();
    bar.say("rehearsing");
    let begun = Leaver::begin(arguments.name.clone(), client, session, arguments.timeout);
    let mut leaver = begun.inspect_err(|_| bar.done())?;
    let sealed = leaver.seal();
    let preserved = leaver.preserved;
    let pause_us = match leaver.go_on() {
        Ok(pause_us) => pause_us,
        // It has said why before it went on.
        Err(_) if sealed.is_err() => None,
        Err(error) => return Err(error),
    };
    bar.done();
    let rehearsed =
        Rehearsed { status, with_kernel: without.is_none(), preserved, sealed: sealed?, pause_us };
    rehearsed.say(arguments.json)?;
    Ok(ExitCode::SUCCESS)
}

/// A session that no other has the name of: in Linux 7.3 one that is tried twice can cost the next kernel its boot.
fn rehearsal(device: &Device) -> anyhow::Result<Outgoing> {
    let name = format!("rehearsal-{}-{}", std::process::id(), fdpass::monotonic_ns());
    Ok(device.create(&Name::new(name.as_bytes())?)?)
}

struct Rehearsed {
    status: Status,
    with_kernel: bool,
    preserved: PreservedReport,
    sealed: SealedReport,
    pause_us: Option<f64>,
}

impl Rehearsed {
    fn say(&self, as_json: bool) -> anyhow::Result<()> {
        let Self { status, with_kernel, preserved, sealed, pause_us } = self;
        if as_json {
            return verbs::say_json(&json!({
                "name": status.name,
                "with_kernel": with_kernel,
                "preserved": preserved,
                "sealed": sealed,
                "pause_us": pause_us,
            }));
        }
        let kernel = match with_kernel {
            true => format!("preserved by the kernel in {}", table::millis(preserved.kernel_us)),
            false => "the kernel was not asked".to_owned(),
        };
        let pause = pause_us.map_or("-".to_owned(), table::millis);
        let seal = ["paused", "saved", "sealed"].into_iter().filter_map(|step| {
            let us = sealed.phases_us.get(step)?;
            Some(format!("{step} {}", table::millis(*us)))
        });
        verbs::say(&format!(
            "{}: {} of memory; filled and frozen in {}, {kernel}, while the guest ran\n{}: it stood still for {pause} ({}), and \
             runs on\n",
            status.name,
            size::show(preserved.bytes),
            table::millis(preserved.fill_us),
            status.name,
            seal.collect::<Vec<_>>().join(", ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_next_kernel_that_would_use_the_machines_memory_is_refused() {
        let own = "quiet memmap=1G!4G";
        assert!(check_reserved(own, &["memmap=1024M!0x100000000"]).is_ok());
        let error = check_reserved(own, &["quiet"]).unwrap_err().to_string();
        assert!(error.contains("lacks memmap=1G!4G") && error.ends_with("add memmap=1G!4G"), "{error}");
        assert!(check_reserved(own, &["memmap=1G!4G", "memmap=1G@4G"]).is_err());
        assert!(check_reserved("quiet", &[]).is_ok());
    }

    #[test]
    fn the_switch_is_read_as_the_kernel_reads_it() {
        for on in ["liveupdate=on", "liveupdate=1", "liveupdate=y"] {
            assert!(is_on(on), "{on}");
        }
        for off in ["liveupdate=off", "liveupdate=0", "liveupdate", "xliveupdate=on", "liveupdate="] {
            assert!(!is_on(off), "{off}");
        }
    }
}
