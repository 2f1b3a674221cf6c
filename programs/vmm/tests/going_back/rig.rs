//! A machine with a guest, and who asks its VMMs for things.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fdpass::Channel;
use fdpass::Deadline;
use rustix::process::Signal;
use rustix::process::kill_process;
use tideover_vmm::control;
use tideover_vmm::control::Answer;
use tideover_vmm::control::Carrier;
use tideover_vmm::control::CheckReport;
use tideover_vmm::control::GuestKind;
use tideover_vmm::control::MachineSpec;
use tideover_vmm::control::Request;
use tideover_vmm::control::Source;
use tideover_vmm::control::Status;
use tideover_vmm::control::UpdateOutcome;
use tideover_vmm::control::UpdateReport;
use tideover_vmm::control::UpdateRequest;

use crate::processes::Process;
use crate::processes::await_listener;
use crate::roles;
use crate::roles::Executed;
use crate::roles::First;
use crate::roles::Plan;
use crate::roles::Role;
use crate::witness::NAME;
use crate::witness::Witness;

/// How long an answer may take, a check of the guest's memory included.
const ANSWER: Duration = Duration::from_secs(60);
/// For an update that is to succeed, or to fail by itself.
const AMPLE: Duration = Duration::from_secs(20);
/// Memory of a guest whose size does not matter.
const MEMORY_BYTES: u64 = 8 << 20;

/// This program.
pub(crate) fn program() -> PathBuf {
    std::env::current_exe().expect("the kernel knows this program")
}

/// A folder of this test's own, which nobody else can enter. Removed when dropped.
#[derive(Debug)]
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn make() -> Self {
        let path = std::env::temp_dir().join(format!("tideover-back-{}", fresh()));
        DirBuilder::new().mode(0o700).create(&path).expect("a folder can be made");
        Self(path)
    }

    /// A path for a socket whose last part no other has: the kernel lists them by that.
    fn socket(&self) -> PathBuf {
        self.0.join(format!("socket-{}", fresh()))
    }
}

/// A word that is used once.
fn fresh() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A machine, its first VMM, and the other end of the control channel.
pub(crate) struct Rig {
    pub(crate) witness: Witness,
    pub(crate) first: Process,
    control: Channel,
    /// VMMs that ran the guest, which are not this process's children.
    seen: RefCell<BTreeSet<u32>>,
    lone_socket: PathBuf,
    folder: Folder,
}

impl Rig {
    /// A machine of a VMM that serves.
    pub(crate) fn start(guest: GuestKind) -> Self {
        Self::with(guest, MEMORY_BYTES, vec![program()])
    }

    /// One with as much memory, which may be updated to these programs.
    pub(crate) fn with(guest: GuestKind, memory_bytes: u64, programs: Vec<PathBuf>) -> Self {
        Self::of(Role::First, spec(guest, memory_bytes), programs, Plan::well())
    }

    /// One with so many vCPUs.
    pub(crate) fn with_vcpus(guest: GuestKind, vcpus: u32) -> Self {
        let spec = MachineSpec { vcpus, ..spec(guest, MEMORY_BYTES) };
        Self::of(Role::First, spec, vec![program()], Plan::well())
    }

    /// One whose memory comes as the guest touches it.
    pub(crate) fn with_holes(guest: GuestKind, memory_bytes: u64) -> Self {
        let spec = MachineSpec { prefault: false, ..spec(guest, memory_bytes) };
        Self::of(Role::First, spec, vec![program()], Plan::well())
    }

    /// A machine of a VMM that hands it over and comes to grief.
    pub(crate) fn alone(guest: GuestKind, plan: Plan) -> Self {
        Self::of(Role::Alone, spec(guest, MEMORY_BYTES), vec![program()], plan)
    }

    fn of(role: Role, spec: MachineSpec, programs: Vec<PathBuf>, plan: Plan) -> Self {
        let folder = Folder::make();
        let socket = folder.socket();
        roles::write(&folder.0, "first.json", &First { spec, programs, plan, socket: socket.clone() });
        roles::write(&folder.0, "plan.json", &Plan::well());
        roles::write(&folder.0, "executed.json", &Executed::Well);
        let (control, theirs) = Channel::pair().expect("a socket can be made");
        let mut command = command(&folder.0, role, Path::new(""));
        command.stdin(Stdio::from(theirs.into_stdio()));
        let first = Process::start(command, folder.0.join("stderr"));
        let witness = Witness::of(first.pid());
        let seen = RefCell::new(BTreeSet::new());
        Self { witness, first, control, seen, lone_socket: socket, folder }
    }

    /// What the next successor will do.
    pub(crate) fn plan(&self, plan: &Plan) {
        roles::write(&self.folder.0, "plan.json", plan);
    }

    /// How the program fares that the VMM executes next.
    pub(crate) fn execution(&self, executed: Executed) {
        roles::write(&self.folder.0, "executed.json", &executed);
    }

    /// Where a VMM of [`Rig::alone`] listens.
    pub(crate) fn lone_socket(&self) -> &Path {
        await_listener(&self.lone_socket);
        &self.lone_socket
    }

    /// What the first VMM and the successors that VMMs started have said on standard error.
    pub(crate) fn said(&self) -> String {
        self.first.said()
    }

    /// Starts a successor that connects to `socket`.
    pub(crate) fn successor(&self, socket: &Path) -> Process {
        let mut command = command(&self.folder.0, Role::Successor, socket);
        command.stdin(Stdio::null());
        Process::start(command, self.folder.0.join(format!("stderr-{}", fresh())))
    }

    pub(crate) fn send(&self, request: &Request) {
        control::send(&self.control, request).expect("a VMM hears it");
    }

    /// The next answer; `None` if no VMM is left.
    #[track_caller]
    pub(crate) fn answer(&self) -> Option<Answer> {
        loop {
            let answer = control::receive(&self.control, Deadline::after(ANSWER));
            match answer.unwrap_or_else(|error| panic!("no answer: {error}\n{}", self.said())) {
                Some(Answer::Progress { .. }) => {}
                answer => return answer,
            }
        }
    }

    #[track_caller]
    pub(crate) fn status(&self) -> Status {
        self.send(&Request::Status);
        match self.answer() {
            Some(Answer::Status(status)) => {
                self.seen.borrow_mut().insert(status.pid);
                *status
            }
            other => panic!("no status: {other:?}\n{}", self.said()),
        }
    }

    /// Has the guest and its memory checked, and nothing is wrong.
    #[track_caller]
    pub(crate) fn assert_whole(&self) {
        self.send(&Request::Check);
        let check = match self.answer() {
            Some(Answer::Check(check)) => check,
            other => panic!("no check: {other:?}\n{}", self.said()),
        };
        let CheckReport { pages_checked, pages_lost, guest_errors, registers_lost, guest_passes, .. } = check;
        assert!(pages_checked > 0 && guest_passes >= 2, "{check:?}");
        assert_eq!((pages_lost, guest_errors, registers_lost), (0, 0, 0), "{check:?}");
        assert_eq!(check.ticks_miscounted, 0, "{check:?}");
    }

    /// The guest runs in that process and nowhere else, and is whole.
    #[track_caller]
    pub(crate) fn assert_runs_in(&self, pid: u32) {
        let status = self.status();
        assert_eq!((status.pid, status.failure), (pid, None));
        self.witness.assert_counts_on();
        self.assert_whole();
    }

    /// An update by a program that the VMM starts.
    #[track_caller]
    pub(crate) fn update(&self, program: PathBuf) -> UpdateReport {
        self.send(&request(Source::Program(program), AMPLE, AMPLE));
        self.update_report()
    }

    #[track_caller]
    pub(crate) fn update_report(&self) -> UpdateReport {
        match self.answer() {
            Some(Answer::Update(report)) => {
                self.seen.borrow_mut().extend(report.successor_pid);
                *report
            }
            other => panic!("no report: {other:?}\n{}", self.said()),
        }
    }

    /// Asks for an update by who comes to a new socket, and gives its path when the VMM listens. The answer is still
    /// to come.
    pub(crate) fn listen(&self, prepare: Duration, hand_over: Duration) -> PathBuf {
        let socket = self.folder.socket();
        self.send(&request(Source::Listen(socket.clone()), prepare, hand_over));
        await_listener(&socket);
        socket
    }

    /// As [`Rig::listen`], for an update that is to succeed, or to fail by itself.
    pub(crate) fn listen_long(&self) -> PathBuf {
        self.listen(AMPLE, AMPLE)
    }

    /// An update that succeeds. Gives the process that runs the guest now.
    #[track_caller]
    pub(crate) fn update_well(&self) -> u32 {
        let before = self.status().pid;
        self.plan(&Plan::well());
        let report = self.update(program());
        let said = || format!("{report:?}\n{}", self.said());
        assert_eq!((report.outcome, report.predecessor_pid), (UpdateOutcome::Updated, before), "{}", said());
        assert_eq!(report.reason, None, "{}", said());
        assert!(report.ticks_after > Some(report.ticks_before), "{}", said());
        let now = report.successor_pid.expect("an update has a successor");
        assert_ne!(now, before);
        assert_eq!(self.status().pid, now, "{}", said());
        now
    }

    /// The update was called off, for a reason that says all of `words`; the guest runs on in `pid`, and stood still
    /// not much longer than `limit`.
    #[track_caller]
    pub(crate) fn assert_rolled_back(
        &self,
        report: &UpdateReport,
        pid: u32,
        limit: Duration,
        words: &[&str],
    ) {
        let said = || format!("{report:?}\n{}", self.said());
        assert_eq!(report.outcome, UpdateOutcome::RolledBack, "{}", said());
        assert_eq!((report.predecessor_pid, report.successor_pid), (pid, None), "{}", said());
        let reason = report.reason.as_deref().expect("a reason");
        for word in words {
            assert!(reason.contains(word), "{reason:?} does not say {word:?}\n{}", said());
        }
        // A machine with much else to do may be late, not seconds late.
        let slack = Duration::from_secs(5);
        let most_us = (limit + slack).as_secs_f64() * 1e6;
        assert!(report.pause_us.is_none_or(|pause| pause < most_us), "{}", said());
        self.witness.assert_counts_on();
    }

    /// No VMM is left, and the guest runs nowhere.
    #[track_caller]
    pub(crate) fn assert_lost(&self) {
        assert_eq!(self.answer(), None);
        self.witness.assert_stands_still();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Whoever runs the guest ends as this side of the control channel closes, unless it is stopped or stuck.
        let folder = format!("{}={}\0", roles::FOLDER, self.folder.0.display());
        for pid in self.seen.take() {
            // A number may be another process's by now; this folder is not.
            let environment = fs::read_to_string(format!("/proc/{pid}/environ"));
            if environment.is_ok_and(|environment| environment.contains(&folder)) {
                let _ = kill_process(roles::pid_of(pid), Signal::KILL);
            }
        }
    }
}

/// A machine whose memory is all there from the start.
fn spec(guest: GuestKind, memory_bytes: u64) -> MachineSpec {
    MachineSpec::new(NAME, memory_bytes, guest)
}

fn command(folder: &Path, role: Role, socket: &Path) -> Command {
    let mut command = Command::new(program());
    command.args(role.arguments(socket)).env(roles::FOLDER, folder);
    command
}

/// An update without a probe.
pub(crate) fn request(successor: Source, prepare: Duration, hand_over: Duration) -> Request {
    let millis = |span: Duration| u64::try_from(span.as_millis()).expect("a short span");
    Request::Update(UpdateRequest {
        successor,
        carrier: Carrier::Socket,
        populate: true,
        probe: false,
        timeout_ms: millis(hand_over),
        prepare_timeout_ms: millis(prepare),
    })
}
