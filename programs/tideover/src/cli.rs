//! What the command line says.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::Parser;
use clap::Subcommand;
use clap::ValueEnum;

use crate::size;
use crate::time;

/// Replaces the VMM under a running guest, its memory kept in place.
#[derive(Debug, Parser)]
#[command(version, after_help = "TIDEOVER_LOG=debug shows what happens, on standard error.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Demo(Demo),
    Run(Run),
    Ls(Ls),
    Status(Status),
    Update(Update),
    Pause(Pause),
    Resume(Resume),
    Recover(Recover),
    Dump(Dump),
    Kexec(Kexec),
    Rehearse(Rehearse),
    Report(Report),
    Top(Top),
    Stop(Stop),
    Service(Service),
    Console(Console),
    Setup(crate::setup::arguments::Setup),
    Check(Check),
    Inspect(Inspect),
    Completions(Completions),
    Man(Man),
}

/// How every verb on a machine ends.
const EXIT_CODES: &str = "\
Exit code: 0 if it was done, 1 if not, 2 for a wrong command line, 3 if there is no such machine, 4 if an update or
a kexec was called off and the guests run on as before, 5 if the guest crashed, 6 if a machine is held,
after a kexec or the death of its VMM, as it could not run.";

/// How a verb ends that looks at machines, and changes none.
fn after_look(codes: &str, example: &str) -> String {
    format!("Exit code: 0 if it was done, 1 if not, 2 for a wrong command line{codes}.\n\nExample: {example}")
}

fn after(example: &str) -> String {
    format!("{EXIT_CODES}\n\nExample: {example}")
}

/// Starts a machine, which lives on when this command ends.
///
/// Its control socket and its log lie in a directory of the user's own: $TIDEOVER_DIR, else $XDG_RUNTIME_DIR/tideover, else
/// /run/tideover (root) or /tmp/tideover-UID.
#[derive(Debug, Args)]
#[command(after_help = after("tideover run web1 --memory 2GiB && tideover update web1 && tideover stop web1
    tideover run vm1 --kernel bzImage --initrd initrd.img --disk vm1.img --tap tap0 && tideover console vm1"))]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) new: NewMachine,
    /// Where the machine lies, to be found by that path when its VMM, or the kernel, is gone: a file that is made, on a file system on
    /// reserved memory (mounted with dax=always), hugetlbfs or tmpfs; or a devdax device, all of which it gets.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["store", "page_size", "on_demand", "numa"])]
    pub(crate) path: Option<PathBuf>,
    /// The machine goes with the host through `tideover kexec`: by /dev/liveupdate; one on reserved memory (--path) does anyway.
    #[arg(long)]
    pub(crate) through_kexec: bool,
    /// Stay until the guest ends, and end as it does. The machine does not end with this command.
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Give the machine's status as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A machine that is to be made.
#[derive(Debug, Args)]
pub(crate) struct NewMachine {
    /// The machine's name: letters, digits, `.`, `_` and `-`.
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) hardware: Hardware,
    /// Which NUMA nodes the memory comes from: bind:, interleave: or preferred: and a list, as bind:0,2-3.
    #[arg(long, value_name = "POLICY")]
    pub(crate) numa: Option<String>,
    /// A disk: a file or a block device, which no other machine may have at that time; with `,ro` the guest may only read it.
    #[arg(long, value_name = "PATH[,ro]")]
    pub(crate) disk: Vec<String>,
    /// A network card, at the other end of this tap interface.
    #[arg(long, value_name = "NAME")]
    pub(crate) tap: Vec<String>,
    /// Start this Linux kernel, a bzImage, in place of the reference guest. Needs --guest kvm.
    #[arg(long, value_name = "BZIMAGE")]
    pub(crate) kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,
    /// The kernel's command line. Where the disks and network cards are is added.
    #[arg(long, value_name = "TEXT", requires = "kernel", default_value = "console=ttyS0")]
    pub(crate) cmdline: String,
    /// When the guest switches itself off.
    #[arg(long, value_enum, default_value_t = Then::Stop)]
    pub(crate) on_power_off: Then,
    /// When the guest asks for a reset.
    #[arg(long, value_enum, default_value_t = Then::Restart)]
    pub(crate) on_reset: Then,
    /// When the guest does what no guest may do, as a triple fault.
    #[arg(long, value_enum, default_value_t = Then::Stop)]
    pub(crate) on_crash: Then,
    /// Have the VMM, once the guest runs, give up its capabilities and all system calls but those it needs. It then
    /// executes nothing: `update` starts the next VMM itself, by the carrier socket.
    #[arg(long, value_enum, value_name = "AT_OTHER_CALLS", default_value_t = Confine::No, default_missing_value = "deny",
          num_args = 0..=1, require_equals = true)]
    pub(crate) confine: Confine,
    /// When the VMM is ended because memory ran out, and tideoverd keeps the machine.
    #[arg(long, value_enum, default_value_t = OnOom::Keep)]
    pub(crate) on_oom: OnOom,
    /// Another program that the machine may be updated to, beside the file that this one was started from.
    #[arg(long, value_name = "PATH")]
    pub(crate) allow_program: Vec<PathBuf>,
}

/// Runs a machine as a unit of systemd's, whose restart the guest outlives. Called by the unit (dist/systemd), not by hand.
///
/// The machine's memory is in the unit's file descriptor store as long as it runs. `systemctl restart` has the guest stand still,
/// and the unit's next process runs it on; `systemctl stop` ends it. If the VMM dies, the memory stays.
#[derive(Debug, Args)]
pub(crate) struct Service {
    #[command(subcommand)]
    pub(crate) verb: ServiceVerb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServiceVerb {
    Run(ServiceRun),
    Stop(ServiceStop),
}

/// For ExecStart=, with Type=notify: this process becomes the machine's VMM.
///
/// It runs the machine that is in the unit's store; if there is none, it makes one. What a machine is made of it keeps: other
/// options for one that is in the store change nothing.
#[derive(Debug, Args)]
#[command(after_help = "Exit code: 0 if the machine is over, 1 if not, 2 for a wrong command line.

Example: ExecStart=/usr/bin/tideover service run web1 --memory 2GiB")]
pub(crate) struct ServiceRun {
    #[command(flatten)]
    pub(crate) new: NewMachine,
}

/// For ExecStop=: leaves the machine in the unit's store if the unit is being restarted, and ends it if it is being stopped.
///
/// Which of these it is, is the manager's job for the unit. Without one the main process has ended by itself, and there is nothing
/// to do. If the machine cannot be left in the store, its guest runs on, and this fails.
#[derive(Debug, Args)]
#[command(after_help = "Exit code: 0 if it was done, 1 if not, 2 for a wrong command line.

Example: ExecStop=/usr/bin/tideover service stop web1")]
pub(crate) struct ServiceStop {
    /// The machine.
    pub(crate) name: String,
}

/// What a machine is made of.
#[derive(Debug, Args)]
pub(crate) struct Hardware {
    /// Guest memory: 4MiB to 64GiB, in whole 2 MiB.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size::guest_memory)]
    pub(crate) memory: u64,
    /// Which guest; kvm if there is /dev/kvm.
    #[arg(long, value_enum)]
    pub(crate) guest: Option<Guest>,
    /// How many vCPUs the guest has: 1 to 8, and no more than this host has processors.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = vcpus())]
    pub(crate) vcpus: u32,
    /// What the guest's memory comes from.
    #[arg(long, value_enum, default_value_t = Store::Memfd)]
    pub(crate) store: Store,
    /// Page size of the guest's memory.
    #[arg(long, value_enum, default_value_t = PageSize::Auto)]
    pub(crate) page_size: PageSize,
    /// Leave the guest's pages to its first touch.
    #[arg(long)]
    pub(crate) on_demand: bool,
}

/// Lists the machines of this user.
#[derive(Debug, Args)]
#[command(after_help = after_look("", "tideover ls --json | jq -r '.[].name'"))]
pub(crate) struct Ls {
    /// Give the list as JSON: the fields of `status`, and `name` and `state` alone of a machine that does not answer.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Says how a machine is.
#[derive(Debug, Args)]
#[command(after_help = after_look(", 3 if there is no such machine", "tideover status web1"))]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) machine: Machine,
}

/// Replaces a machine's VMM, its memory kept in place.
#[derive(Debug, Args)]
#[command(after_help = after("tideover update web1 --program /usr/bin/tideover --timeout 500ms"))]
pub(crate) struct Update {
    /// The machine.
    pub(crate) name: String,
    /// The program to update to [default: the file that the machine's VMM was started from, as it is now; of a confined
    /// machine, this program].
    #[arg(long, value_name = "PATH")]
    pub(crate) program: Option<PathBuf>,
    /// How the machine gets to the new program.
    #[arg(long, value_enum, default_value_t = Carrier::Socket)]
    pub(crate) carrier: Carrier,
    /// How long the guest may stand still before the update is called off: a number and ms, s or min, or seconds
    /// alone.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = time::parse)]
    pub(crate) timeout: Duration,
    /// Do not enter the guest's pages into the successor's page tables before the pause.
    #[arg(long)]
    pub(crate) no_populate: bool,
    /// Give the report as JSON: an element of `updates` in docs/demo.schema.json.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A machine, and how to tell of it.
#[derive(Debug, Args)]
pub(crate) struct Machine {
    /// The machine.
    pub(crate) name: String,
    /// Give the machine's status as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Has a machine's guest stand still until it is resumed. An update leaves it so.
#[derive(Debug, Args)]
#[command(after_help = after("tideover pause web1"))]
pub(crate) struct Pause {
    #[command(flatten)]
    pub(crate) machine: Machine,
}

/// Lets a machine's guest run on: one that was paused, or one that came through a kexec.
///
/// After a kexec nothing runs until this is called, as the first of all that uses /dev/liveupdate: --all from a unit, or from
/// the init itself. A machine that cannot run is held, its memory kept, until `resume` with another --program, or `stop`. Its
/// memory is charged to its cgroup, if that is there, else to the one of this command.
///
/// A machine that lies at a path is found by that alone (--path), on any kernel, after a kexec or the death of its VMM.
#[derive(Debug, Args)]
#[command(after_help = after("tideover resume web1
    tideover resume --all
    tideover resume --path /mnt/pmem"))]
pub(crate) struct Resume {
    /// The machine.
    #[arg(required_unless_present_any = ["all", "path"], conflicts_with = "all")]
    pub(crate) name: Option<String>,
    /// All machines that came through the kexec that this kernel was booted by; with --path, all that lie there.
    #[arg(long)]
    pub(crate) all: bool,
    /// Where the machines lie: a file, a devdax device, or a directory of files. Of several only NAME, if that is given.
    #[arg(long, value_name = "PATH")]
    pub(crate) path: Vec<PathBuf>,
    /// After a kexec: the program that is to run it, if not the one that did before.
    #[arg(long, value_name = "PATH")]
    pub(crate) program: Option<PathBuf>,
    /// Give the machine's status as JSON; after a kexec, a list of reports.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Has a machine run again whose VMM has died.
///
/// Its memory is there if tideoverd kept it, or another process that holds it. If its state is complete to the last instant, its guest
/// runs on from where it stood: that is so if it was paused, or in the midst of an update. Else its vCPUs' state is lost, and nothing
/// that was saved before belongs to its memory any more: then it stays held, or starts from the beginning, as --else says.
#[derive(Debug, Args)]
#[command(after_help = after("tideover recover web1 || tideover dump web1 web1.core && tideover recover web1 --else boot"))]
pub(crate) struct Recover {
    /// The machine.
    pub(crate) name: String,
    /// What to do if its state is not complete.
    #[arg(long = "else", value_enum, value_name = "WHAT", default_value_t = Otherwise::Keep)]
    pub(crate) otherwise: Otherwise,
    /// The program that is to run it, if not the one that did before.
    #[arg(long, value_name = "PATH")]
    pub(crate) program: Option<PathBuf>,
    /// Say what was done as JSON: name, pid, how (runs_on or booted) and why.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What to do with a machine that cannot run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Otherwise {
    /// It stays held, its memory as it is.
    Keep,
    /// Its guest starts from the beginning, in the same memory, which is made zero.
    Boot,
}

/// What becomes of the memory of a machine whose VMM is ended for want of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnOom {
    /// It is kept, as after any other death.
    Keep,
    /// It is given back.
    Drop,
}

/// Writes a machine's memory to a file, for a debugger: an ELF core with its vCPUs' registers.
///
/// The machine has to stand still: paused, or held after a kexec or the death of its VMM. The registers are those of each vCPU's last
/// exit, in notes for gdb (NT_PRSTATUS) and for crash (QEMU).
#[derive(Debug, Args)]
#[command(after_help = after("tideover dump web1 web1.core && crash vmlinux web1.core"))]
pub(crate) struct Dump {
    /// The machine.
    pub(crate) name: String,
    /// The file, which must not be there yet.
    pub(crate) file: PathBuf,
    /// Say what was written as JSON: name, file, memory_bytes, written_bytes and vcpus.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Boots another kernel, and takes the machines along that were started with --through-kexec.
///
/// Their memory stays where it is, by Linux's /dev/liveupdate. Nothing else of this host does: programs end, connections close;
/// disks and interfaces are opened again by their names. In the next kernel `tideover resume --all` lets them run on.
///
/// This command has systemd shut the host down in its order, and returns. The guests run until services have ended and file
/// systems are unmounted or read-only: the last thing before the jump has them stand still. That takes systemd 255, cgroups of
/// version 2, and what dist/systemd has, in its place. What fails before systemd has begun leaves every guest running as before.
///
/// With --now nobody is asked, and what fails before the jump leaves every guest running as before.
#[derive(Debug, Args)]
#[command(after_help = after("tideover kexec --kernel /boot/vmlinuz-7.3 --initrd /boot/initrd.img-7.3 --reuse-cmdline"))]
pub(crate) struct Kexec {
    /// The kernel to boot, a bzImage.
    #[arg(long, value_name = "IMAGE")]
    pub(crate) kernel: PathBuf,
    /// Its initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Its command line.
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "reuse_cmdline",
        conflicts_with = "reuse_cmdline"
    )]
    pub(crate) cmdline: Option<String>,
    /// Give it this kernel's command line.
    #[arg(long)]
    pub(crate) reuse_cmdline: bool,
    /// Add this to the command line.
    #[arg(long, value_name = "TEXT")]
    pub(crate) append: Option<String>,
    /// Boot it at once: file systems are synchronized and made still, no service is stopped, no program is asked.
    #[arg(long)]
    pub(crate) now: bool,
    /// Go on though `tideover check` fails.
    #[arg(long)]
    pub(crate) unchecked: bool,
    /// Leave behind the machines that were not started with --through-kexec: they end with this kernel.
    #[arg(long)]
    pub(crate) leave_others: bool,
    /// How long each machine may take to get ready, while its guest runs: a number and ms, s or min.
    #[arg(long, value_name = "TIME", default_value = "5min", value_parser = time::parse)]
    pub(crate) timeout: Duration,
    /// Say as JSON what was preserved. If all goes well, nobody hears it but who reads along.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Does all that a kexec would ask of a machine, but the kexec: preserves, pauses, saves, seals; and lets it run on.
///
/// Says what each took. Without /dev/liveupdate the kernel's part is left out, and that is said.
#[derive(Debug, Args)]
#[command(after_help = after("tideover rehearse web1"))]
pub(crate) struct Rehearse {
    /// The machine.
    pub(crate) name: String,
    /// How long it may take to get ready, while its guest runs: a number and ms, s or min.
    #[arg(long, value_name = "TIME", default_value = "5min", value_parser = time::parse)]
    pub(crate) timeout: Duration,
    /// Give the result as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Says what the last kexec and the last update after it took of each machine: its pause, part by part, with a bar for each that
/// begins where the one before it ends; and what a kexec did to the guest's clock.
#[derive(Debug, Args)]
#[command(after_help = after_look(", 0 too if there is nothing to report, 3 if there is no such machine", "tideover report
    tideover report web1 --html web1.html
    tideover report web1 --json"))]
pub(crate) struct Report {
    /// The machine; all of them if there is none.
    pub(crate) name: Option<String>,
    /// Write a page for a browser, which needs nothing else. Where there is nothing to report, none is written.
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub(crate) html: Option<PathBuf>,
    /// Give the reports as a list in JSON (schema: docs/report.schema.json).
    #[arg(long)]
    pub(crate) json: bool,
}

/// Shows the machines of this user, each second anew: what they do, how long they stood still last, and whether their memory is
/// frozen. `q` ends it.
#[derive(Debug, Args)]
#[command(after_help = after_look(", 128 and the number of a signal that ended it", "tideover top
    tideover top --once --json | jq -r '.[] | select(.state != \"running\").name'"))]
pub(crate) struct Top {
    /// Show them once. So it is where standard input and output are no terminal, too.
    #[arg(long)]
    pub(crate) once: bool,
    /// Give the list as JSON: that of `ls`.
    #[arg(long, requires = "once")]
    pub(crate) json: bool,
    /// How long until they are shown anew: a number and ms, s or min, or seconds alone.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = time::parse)]
    pub(crate) interval: Duration,
}

/// Ends a machine: its guest, its VMM and its memory.
#[derive(Debug, Args)]
#[command(after_help = after("tideover stop web1"))]
pub(crate) struct Stop {
    #[command(flatten)]
    pub(crate) machine: Machine,
}

/// Attaches to a machine's serial line, beside whoever else is.
///
/// What the guest has said of late is shown first; what it says and gets from then on is not interrupted by updates. On a
/// terminal every key goes to the guest, but Ctrl-], which leaves. Otherwise all of standard input goes to it, and after the end of
/// that the output goes on until the machine ends. There is no --json: the output is the guest's.
#[derive(Debug, Args)]
#[command(after_help = after("tideover console web1
    echo reboot | tideover console web1 > web1.txt

Exit code besides: 128 and the number of a signal that ended it."))]
pub(crate) struct Console {
    /// The machine.
    pub(crate) name: String,
}

/// Says whether this host can carry its machines through a kexec, into the next kernel.
///
/// Linux 6.19 and later hand open files over to the next kernel (/dev/liveupdate), and with them machines' memory. This looks at all that
/// it takes, says what is missing and what to do about it; it changes nothing, but opens /dev/liveupdate for a moment.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code: 0 if they can be carried, perhaps with warnings, 1 if not, 2 for a wrong command line.

Example: tideover check --kernel /boot/vmlinuz-7.3 --initrd /boot/initrd.img-7.3
    tideover check --json web1 | jq -r '.findings[] | select(.level != \"ok\") | .found'")]
pub(crate) struct Check {
    /// The machines [default: all of this user's].
    #[arg(value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
    /// The kernel that is to be booted, a bzImage.
    #[arg(long, value_name = "IMAGE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Its initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,
    /// Its command line [default: that of the kernel that runs].
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    pub(crate) cmdline: Option<String>,
    /// Give what was found as JSON (schema: docs/check.schema.json).
    #[arg(long)]
    pub(crate) json: bool,
}

/// Shows what is handed over: the state of Kexec Handover and of the Live Update Orchestrator, of a machine or of a kernel.
///
/// SOURCE is one of
///   NAME           a machine that runs
///   arena:PATH     region 0 of a machine: a file, or /proc/PID/fd/N
///   debugfs:DIR    /sys/kernel/debug/kho/in or out of a kernel, or a copy of it
///   memory:FILE    a whole machine's memory: a raw image (as QEMU's pmemsave writes it), plain or zstd, an ELF core
///                  (vmcore), or /proc/kcore
///
/// Of a broken state it says what is wrong, and shows the rest. What a running kernel has read is stale in part: it is said.
#[derive(Debug, Args)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Exit code: 0 if it was shown, 1 if not, or if with --verify something is wrong, 2 for a wrong command line, 3 if there is no such
machine.

Example: tideover inspect web1
    tideover inspect --verify memory:/var/crash/vmcore
    tideover inspect --json debugfs:/sys/kernel/debug/kho/in | jq .kho.preserved_by_order
    tideover inspect --html web1.html web1
    tideover inspect --diff arena:before arena:after"
)]
pub(crate) struct Inspect {
    /// Where the state is read from; with --diff two of them.
    #[arg(value_name = "SOURCE", required = true, num_args = 1..=2)]
    pub(crate) sources: Vec<crate::inspect::Named>,
    /// Where the root FDT is in memory:FILE [default: it is searched for].
    #[arg(long, value_name = "ADDRESS", value_parser = crate::inspect::address)]
    pub(crate) fdt_address: Option<u64>,
    /// The kernel whose memory:FILE it is had booted further than the kexec, and uses what it has read for other things: what
    /// is broken may just be stale.
    #[arg(long)]
    pub(crate) booted: bool,
    /// List each folio of each file, too.
    #[arg(long, conflicts_with = "diff")]
    pub(crate) folios: bool,
    /// Say of every rule that is broken which it is, and where; exit with 1 if that makes the state unusable.
    #[arg(long, conflicts_with = "diff")]
    pub(crate) verify: bool,
    /// Say what the second source has that the first has not, what it has not any more, and what is another.
    #[arg(long)]
    pub(crate) diff: bool,
    /// Write a page for a browser, with a map of the memory: it needs nothing else.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "diff", "folios"])]
    pub(crate) html: Option<PathBuf>,
    /// Give what was found as JSON (schema: docs/inspect.schema.json).
    #[arg(long)]
    pub(crate) json: bool,
}

/// Writes a completion script for a shell to standard output.
#[derive(Debug, Args)]
#[command(after_help = "Example: tideover completions bash > /etc/bash_completion.d/tideover")]
pub(crate) struct Completions {
    /// The shell.
    pub(crate) shell: clap_complete::Shell,
}

/// Writes the manual pages, one for each verb, into a directory.
#[derive(Debug, Args)]
#[command(after_help = "Example: tideover man /usr/local/share/man/man1")]
pub(crate) struct Man {
    /// The directory. It is made if it is not there.
    pub(crate) directory: PathBuf,
}

/// How a machine gets to its next VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Carrier {
    /// To another process, both alive at once: the shortest pause.
    Socket,
    /// By execve: the process and its number stay.
    Exec,
}

impl Carrier {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Socket => "socket",
            Self::Exec => "exec",
        }
    }

    pub(crate) fn of_request(self) -> ::vmm::control::Carrier {
        match self {
            Self::Socket => ::vmm::control::Carrier::Socket,
            Self::Exec => ::vmm::control::Carrier::Exec,
        }
    }
}

/// What to do when the guest ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Then {
    /// The machine ends.
    Stop,
    /// The guest starts again from the beginning, in memory that is zero.
    Restart,
    /// The machine stays as it is, with its guest standing still.
    Keep,
}

/// What becomes of a VMM at a system call that it has no need of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Confine {
    /// Nothing: the VMM is not confined.
    No,
    /// The call fails.
    Deny,
    /// The VMM is killed, and the guest with it.
    Kill,
}

impl Confine {
    pub(crate) fn of_spec(self) -> ::vmm::confine::Confine {
        match self {
            Self::No => ::vmm::confine::Confine::No,
            Self::Deny => ::vmm::confine::Confine::Deny,
            Self::Kill => ::vmm::confine::Confine::Kill,
        }
    }
}

/// Starts a guest, replaces its VMM a few times, and proves that no byte was lost.
///
/// The guest counts, writes patterns over all of its memory, checks them again and again, and measures its own
/// longest pause. At the end the guest has to have checked every page, and so has the host. Needs
/// /dev/kvm; without it, a thread plays the guest.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code: 0 if every update succeeded and no byte was lost, 1 otherwise, 2 for a wrong command line.

Example: tideover demo --memory 4GiB --updates 10 --json")]
pub(crate) struct Demo {
    #[command(flatten)]
    pub(crate) hardware: Hardware,
    /// How many times to replace the VMM: 1 to 100000.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) updates: u32,
    /// How the machine gets to its next VMM.
    #[arg(long, value_enum, default_value_t = Carrier::Socket)]
    pub(crate) carrier: Carrier,
    /// Do not enter the guest's pages into the successor's page tables before the pause.
    #[arg(long)]
    pub(crate) no_populate: bool,
    /// Give the result as JSON (schema: docs/demo.schema.json).
    #[arg(long)]
    pub(crate) json: bool,
}

/// As many vCPUs as the guest takes.
fn vcpus() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(::vmm::MAX_VCPUS))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Guest {
    /// A VM of KVM.
    Kvm,
    /// A thread of the VMM for each vCPU, which needs no right and no hardware.
    Thread,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PageSize {
    /// What suits the store: 2 MiB as far as they can be had; 4 KiB of a guest_memfd.
    Auto,
    /// 4 KiB.
    #[value(name = "4KiB")]
    Small,
    /// 2 MiB: of a memfd as far as they can be had, of hugetlb all of them.
    #[value(name = "2MiB")]
    Huge,
    /// 1 GiB, of hugetlb alone.
    #[value(name = "1GiB")]
    Giant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Store {
    /// A memory file, its pages huge where that can be had.
    Memfd,
    /// A file of KVM's, made by the machine's first VM (Linux 6.18).
    #[value(name = "guest_memfd")]
    GuestMemfd,
    /// Huge pages that the host has set aside (vm.nr_hugepages).
    Hugetlb,
}

/// Runs as the VMM of one machine. Started by other verbs, not by hand.
///
/// It is read by itself, without the other verbs: a guest may stand still meanwhile.
#[derive(Debug, Parser)]
#[command(name = "tideover vmm", version)]
pub(crate) struct Vmm {
    /// Leave the terminal and the session that this was started in.
    #[arg(long)]
    pub(crate) detach: bool,
    /// Give up all capabilities.
    #[arg(long)]
    pub(crate) confine: bool,
    #[command(subcommand)]
    pub(crate) life: Life,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Life {
    /// Make a machine; the control channel is standard input.
    Run {
        /// The machine, as JSON.
        #[arg(long)]
        spec: String,
        /// Tell whoever starts this of the guest's end.
        #[arg(long)]
        waits: bool,
        /// Another program that the machine may be updated to.
        #[arg(long)]
        allow_program: Vec<PathBuf>,
    },
    /// Hold a machine that came through a kexec, until a VMM runs it; whoever has its session is at the other end of
    /// standard input.
    Hold,
    /// Keep all machines ready for a kexec while the service manager shuts this host down; whoever asked is at the other end
    /// of standard input.
    Keep,
    /// The host is shut down, all but for the kexec: have the keeper seal its machines.
    Seal,
    /// Take a machine over from the VMM at the other end of standard input.
    Succeed {
        /// Connect to the VMM that listens here instead.
        #[arg(long, value_name = "PATH")]
        connect: Option<PathBuf>,
        /// Take the machine over from the program that this process executed before, which has left these descriptors.
        #[arg(long, value_name = "FDS", conflicts_with = "connect")]
        handoff: Option<exec::Handoff>,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_demo_defaults_to_a_gib_and_five_updates() {
        let Command::Demo(demo) = Cli::parse_from(["tideover", "demo"]).command else { panic!("demo") };
        assert_eq!((demo.hardware.memory, demo.updates, demo.json), (1 << 30, 5, false));
        let parse = |arguments: &[&str]| Cli::try_parse_from([&["tideover", "demo"], arguments].concat());
        assert!(parse(&["--updates", "0"]).is_err());
        assert!(parse(&["--memory", "much"]).is_err());
        assert!(parse(&["--page-size", "4KiB", "--guest", "thread"]).is_ok());
    }
}
