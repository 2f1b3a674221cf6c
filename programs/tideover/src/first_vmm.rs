//! Starting a machine: what it needs of the host, and its first VMM.

use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use ::vmm::control::Answer;
use ::vmm::control::Client;
use ::vmm::control::Confine;
use ::vmm::control::GuestKind;
use ::vmm::control::MachineSpec;
use ::vmm::control::Pages;
use ::vmm::control::Request;
use ::vmm::control::Status;
use ::vmm::control::Store;
use anyhow::Context as _;
use anyhow::bail;
use fdpass::Channel;

use crate::cli;
use crate::progress::Bar;
use crate::size;

/// The machine that was asked for; what this host cannot have is refused here, if the machine is new, and if it takes memory that the host
/// gives to all.
pub(crate) fn spec(
    name: &str,
    hardware: &cli::Hardware,
    is_new: bool,
    takes_memory: bool,
) -> anyhow::Result<MachineSpec> {
    let guest = choose_guest(hardware.guest)?;
    if is_new {
        check_vcpus(hardware.vcpus)?;
    }
    if takes_memory {
        check_memory(hardware.memory)?;
    }
    let (store, pages) = memory(hardware.store, hardware.page_size)?;
    let (prefault, vcpus) = (!hardware.on_demand, hardware.vcpus);
    Ok(MachineSpec { store, pages, prefault, vcpus, ..MachineSpec::new(name, hardware.memory, guest) })
}

fn choose_guest(asked: Option<cli::Guest>) -> anyhow::Result<GuestKind> {
    let kvm = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    match (asked, kvm) {
        (Some(cli::Guest::Thread), _) => Ok(GuestKind::Thread),
        (_, Ok(_)) => Ok(GuestKind::Kvm),
        (Some(cli::Guest::Kvm), Err(error)) => {
            bail!("--guest kvm: cannot open /dev/kvm: {error}. Load KVM, or get the right to use it")
        }
        (None, Err(error)) => {
            complain!("##################################################################");
            complain!("# WARNING: NO KVM. Cannot open /dev/kvm: {error}");
            complain!("# A thread plays the guest: memory and hand-over are real, the VM is not.");
            complain!("##################################################################");
            Ok(GuestKind::Thread)
        }
    }
}

/// Refuses vCPUs that would wait for each other: in an update all have to get a processor at once.
fn check_vcpus(wanted: u32) -> anyhow::Result<()> {
    let processors = std::thread::available_parallelism().context("cannot count this host's processors")?;
    if usize::try_from(wanted).is_ok_and(|wanted| wanted <= processors.get()) {
        return Ok(());
    }
    bail!("--vcpus {wanted}: this host gives this program {processors} processors; ask for no more")
}

/// Refuses what the host could only answer by killing the VMM.
fn check_memory(wanted: u64) -> anyhow::Result<()> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib =
        line.and_then(|line| line.trim().strip_suffix("kB")).and_then(|kib| kib.trim().parse::<u64>().ok());
    match kib.map(|kib| kib << 10) {
        Some(available) if available < wanted => bail!(
            "--memory {}: this host has {} of memory available; ask for less",
            size::show(wanted),
            size::show(available & !((1 << 20) - 1))
        ),
        _ => Ok(()),
    }
}

/// What a machine's memory is to be; what no host has is refused here.
fn memory(store: cli::Store, page_size: cli::PageSize) -> anyhow::Result<(Store, Pages)> {
    use cli::PageSize;
    Ok(match (store, page_size) {
        (cli::Store::Memfd, PageSize::Auto | PageSize::Huge) => (Store::Memfd, Pages::Huge),
        (cli::Store::Memfd, PageSize::Small) => (Store::Memfd, Pages::Small),
        (cli::Store::Hugetlb, PageSize::Auto | PageSize::Huge) => (Store::Hugetlb, Pages::Huge),
        (cli::Store::Hugetlb, PageSize::Giant) => (Store::Hugetlb, Pages::Giant),
        (cli::Store::GuestMemfd, PageSize::Auto | PageSize::Small) => (Store::GuestMemfd, Pages::Small),
        (cli::Store::Memfd, PageSize::Giant) => bail!("a memfd has no pages of 1 GiB: use --store hugetlb"),
        (cli::Store::Hugetlb, PageSize::Small) => bail!("hugetlb has no pages of 4 KiB: use --store memfd"),
        (cli::Store::GuestMemfd, _) => {
            bail!("a guest_memfd has pages of 4 KiB alone: use --store memfd or hugetlb for huge ones")
        }
    })
}

/// What a VMM is told beside what to do.
pub(crate) fn flags(detach: bool, confine: Confine) -> impl Iterator<Item = &'static str> {
    let detach = detach.then_some("--detach");
    detach.into_iter().chain((confine != Confine::No).then_some("--confine"))
}

/// What became of a machine that was started.
pub(crate) enum Begun {
    /// Its guest is at work.
    Runs(Box<Status>),
    /// It is over: how, in the VMM's words.
    Over(Answer),
}

/// The VMM that makes the machine. Unless it is [let go](FirstVmm::let_go), it and its successors end when this is
/// dropped.
pub(crate) struct FirstVmm {
    client: Option<Client>,
    process: Option<Child>,
}

impl FirstVmm {
    /// Starts it. With a log it is on its own: in a session of its own, and what it says goes there.
    /// The machine may be updated to `allowed`, too. If we wait for the guest's end we are told of it.
    pub(crate) fn start(
        program: &Path,
        spec: &MachineSpec,
        allowed: &[PathBuf],
        waits: bool,
        log: Option<File>,
    ) -> anyhow::Result<Self> {
        let (ours, theirs) = Channel::pair()?;
        let mut command = Command::new(program);
        command.arg("vmm").args(flags(log.is_some(), spec.confine));
        command.args(["run", "--spec", &serde_json::to_string(spec)?]);
        if waits {
            command.arg("--waits");
        }
        for program in allowed {
            command.arg("--allow-program").arg(program);
        }
        if let Some(log) = log {
            command.stdout(Stdio::null()).stderr(log);
        }
        let process = command.stdin(Stdio::from(theirs.into_stdio())).spawn();
        let process = process.with_context(|| format!("cannot start the VMM {}", program.display()))?;
        Ok(Self { client: Some(Client::new(ours)), process: Some(process) })
    }

    /// Who to ask.
    pub(crate) fn client(&self) -> anyhow::Result<&Client> {
        self.client.as_ref().context("the VMM was let go")
    }

    /// Waits for the machine to be made; the guest has to have begun its work.
    pub(crate) fn await_status(&self, bar: &Bar) -> anyhow::Result<Status> {
        match self.await_begin(bar)? {
            Begun::Runs(status) => Ok(*status),
            Begun::Over(answer) => bail!("unexpected answer to status: {answer:?}"),
        }
    }

    /// The same of a guest whose end we wait for: it may have come already.
    pub(crate) fn await_begin(&self, bar: &Bar) -> anyhow::Result<Begun> {
        loop {
            match self.client()?.ask(&Request::Status, &mut |what, done, of| bar.at(what, done, of))? {
                // A guest that does not count is not waited for.
                Answer::Status(status) if status.ticks != Some(0) || status.failure.is_some() => {
                    return match status.failure {
                        Some(why) => bail!("{why}"),
                        None => Ok(Begun::Runs(status)),
                    };
                }
                Answer::Status(_) => std::thread::sleep(Duration::from_millis(1)),
                over => return Ok(Begun::Over(over)),
            }
        }
    }

    /// Adds how the VMM ended, if the first one did while it was needed.
    pub(crate) fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        std::thread::sleep(Duration::from_millis(50));
        match self.process.as_mut().map(Child::try_wait) {
            Some(Ok(Some(status))) if !status.success() => error.context(format!("the VMM ended: {status}")),
            _ => error,
        }
    }

    /// Ends the machine.
    pub(crate) fn stop(&mut self) -> anyhow::Result<()> {
        match self.client()?.ask(&Request::Stop, &mut |_, _, _| {})? {
            Answer::Stopped => Ok(()),
            other => bail!("unexpected answer to stop: {other:?}"),
        }
    }

    /// It lives on without us.
    pub(crate) fn let_go(mut self) -> anyhow::Result<Client> {
        self.process = None;
        self.client.take().context("the VMM was let go")
    }
}

impl Drop for FirstVmm {
    fn drop(&mut self) {
        // After an update it has ended long ago; else it ends as its control channel closes, or is made to.
        self.client = None;
        let Some(process) = &mut self.process else { return };
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && matches!(process.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = process.kill();
        let _ = process.wait();
    }
}
