//! The VM file of a machine: which VM object serves it, for how long that is known, and who is told.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

mod rig;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::thread;

use kvm::GuestMemfdFlags;
use kvm::Irqchip;
use kvm::Vm;
use kvm::VmBuilder;
use kvm::VmError;
use kvm::kvm_ioctls::Cap;
use kvm::kvm_ioctls::Kvm;
use rig::assert_filled;
use rig::freeze;
use rig::inodes;
use rig::machine;
use rig::offered;
use rig::spec;
use rig::states;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::Resource;
use rustix::process::Rlimit;
use rustix::process::getrlimit;
use rustix::process::setrlimit;
use tideover_machine::Claimed;
use tideover_machine::Created;
use tideover_machine::Incoming;
use tideover_machine::Machine;
use tideover_machine::Origin;
use tracing::Event;
use tracing::Metadata;
use tracing::field::Field;
use tracing::field::Visit;
use tracing::span;

/// These tests count the descriptors of the process: one at a time, the look for what it needs included.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn links() -> Vec<String> {
    let fds = fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    let links = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
    links.map(|link| link.to_string_lossy().into_owned()).collect()
}

/// Descriptors of KVM's objects of this kind: `vm`, `vcpu`, `gmem`.
fn descriptors(kind: &str) -> usize {
    links().iter().filter(|link| link.contains(kind)).count()
}

fn vm_objects() -> usize {
    descriptors("kvm-vm")
}

fn vm() -> Vm {
    VmBuilder::create(&Kvm::new().unwrap()).unwrap().finish(Irqchip::None).unwrap()
}

/// Has the machine sealed and claimed by somebody else, as far as to the state.
fn claim(machine: &mut Machine) -> Claimed {
    let incoming = Incoming::attach(offered(machine), Vec::new()).unwrap();
    let _frozen = freeze(&inodes(machine));
    let states = states(machine.state_names(), 100, 1);
    let epoch = machine.seal(states).unwrap();
    incoming.claim(epoch).unwrap()
}

/// R0.1.
#[test]
fn a_vm_file_is_made_and_retrieved_alike_without_a_descriptor() {
    let _alone = alone();
    let regions = || links().iter().filter(|link| link.starts_with("/memfd:alike.")).count();
    let before = links().len();
    let mut first = machine(&spec("alike", &[4], &["vcpu0"]));
    assert_eq!(links().len() - before, regions(), "its regions' alone");
    let second = claim(&mut first).run().unwrap();
    // A hand-over keeps the memory frozen.
    let freezes = links().iter().filter(|link| link.contains("userfaultfd")).count();
    assert_eq!(links().len() - before, regions() + freezes);
    for machine in [&first, &second] {
        assert_eq!((machine.identity(), machine.vcpus()), (first.identity(), 3));
        assert!(machine.vm_object().is_none(), "nobody has made one");
    }
}

/// R0.4.
#[test]
fn a_vm_object_has_one_descriptor_which_an_exec_closes() {
    let _alone = alone();
    harness::need!(kvm);
    let kvm = Kvm::new().unwrap();
    let before = links().len();
    let vm = VmBuilder::create(&kvm).unwrap();
    assert_eq!((links().len() - before, vm_objects()), (1, 1));
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", vm.fd().as_raw_fd())).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
    assert_ne!(u32::from_str_radix(flags.trim(), 8).unwrap() & OFlags::CLOEXEC.bits(), 0, "{info}");
}

/// Set for a test's other process: this program, started anew for the one test.
const IN_CHILD: &str = "TIDEOVER_MACHINE_CHILD";

/// Runs a test's other half in a process of its own, whose limits are its own.
fn in_child(test: &str) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(IN_CHILD, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Leaves this process no room for another descriptor. Gives the limits as they were.
fn refuse_descriptors() -> Rlimit {
    let limits = getrlimit(Resource::Nofile);
    // The number that the next one would have.
    let next = fs::File::open("/dev/null").unwrap().as_raw_fd();
    setrlimit(Resource::Nofile, Rlimit { current: u64::try_from(next).ok(), ..limits }).unwrap();
    limits
}

/// R0.2.
#[test]
fn of_a_vm_object_that_cannot_be_made_the_error_is_all_that_is_left() {
    let _alone = alone();
    harness::need!(kvm);
    if std::env::var_os(IN_CHILD).is_none() {
        return in_child("of_a_vm_object_that_cannot_be_made_the_error_is_all_that_is_left");
    }
    let kvm = Kvm::new().unwrap();
    let before = links();
    // No room for its descriptor; then none for its vCPU's.
    let limits = refuse_descriptors();
    let refused = VmBuilder::create(&kvm);
    setrlimit(Resource::Nofile, limits).unwrap();
    match refused {
        Err(VmError::Create(error)) => assert_eq!(error.errno(), Errno::MFILE.raw_os_error()),
        other => panic!("{other:?}"),
    }
    assert_eq!(links(), before);
    let builder = VmBuilder::create(&kvm).unwrap();
    refuse_descriptors();
    let whole = builder.finish(Irqchip::None).unwrap();
    let refused = whole.create_vcpu(0).map(drop);
    setrlimit(Resource::Nofile, limits).unwrap();
    assert!(refused.is_err());
    drop(whole);
    assert_eq!(links(), before);
    // Interrupt controllers that KVM makes for nobody: the VM object goes with the error.
    let refused = VmBuilder::create(&kvm).unwrap().finish(Irqchip::Split { pins: u32::MAX });
    assert!(matches!(refused, Err(VmError::Irqchip { .. } | VmError::NoIrqchip { .. })), "{refused:?}");
    assert_eq!(links(), before);
}

/// R0.3.
#[test]
fn to_drop_the_vm_object_is_the_one_clean_up() {
    let _alone = alone();
    harness::need!(kvm);
    let machine = machine(&spec("dropped", &[4], &[]));
    for _ in 0..20 {
        let vm = vm();
        let vcpu = vm.create_vcpu(0).unwrap();
        machine.serve(vm.fd()).unwrap();
        assert_eq!((vm_objects(), descriptors("kvm-vcpu")), (1, 1));
        drop(vm);
        assert_eq!(vm_objects(), 1, "the vCPU keeps it");
        drop(vcpu);
        assert_eq!((vm_objects(), descriptors("kvm-vcpu")), (0, 0), "the machine does not");
        assert!(machine.vm_object().is_none());
    }
}

/// R0.6.
#[test]
fn a_machine_does_not_keep_its_vm_object_nor_that_one_the_machine() {
    let _alone = alone();
    harness::need!(kvm);
    let machine = machine(&spec("no-circle", &[4], &[]));
    let vm = vm();
    let references = Arc::strong_count(vm.fd());
    machine.serve(vm.fd()).unwrap();
    assert_eq!(Arc::strong_count(vm.fd()), references);
    drop(machine);
    assert!(links().iter().all(|link| !link.starts_with("/memfd:no-circle.")));
    assert_eq!(vm_objects(), 1);
}

/// R0.7, R0.8.
#[test]
fn who_asks_while_the_vm_object_ends_gets_it_alive_or_nothing() {
    let _alone = alone();
    harness::need!(kvm);
    let machine = machine(&spec("ending", &[4], &[]));
    let kvm = Kvm::new().unwrap();
    let (mut found, mut gone) = (0_u32, 0_u32);
    for _ in 0..300 {
        let vm = VmBuilder::create(&kvm).unwrap();
        assert!(machine.vm_object().is_none(), "that one's end was seen");
        machine.serve(vm.fd()).unwrap();
        thread::scope(|scope| {
            scope.spawn(move || drop(vm));
            while let Some(vm) = machine.vm_object() {
                // Closed, its number would be nobody's or something else's.
                assert!(vm.check_extension(Cap::UserMemory));
                found += 1;
            }
            gone += 1;
        });
    }
    assert!(gone == 300 && found > 0, "{found} found, {gone} gone");
}

/// R0.8.
#[test]
fn another_vm_object_with_the_same_descriptor_number_is_not_found_in_its_place() {
    let _alone = alone();
    harness::need!(kvm);
    let machine = machine(&spec("reused", &[4], &[]));
    let kvm = Kvm::new().unwrap();
    for _ in 0..20 {
        let first = VmBuilder::create(&kvm).unwrap();
        machine.serve(first.fd()).unwrap();
        let number = first.fd().as_raw_fd();
        drop(first);
        let second = VmBuilder::create(&kvm).unwrap();
        assert_eq!(second.fd().as_raw_fd(), number);
        assert!(machine.vm_object().is_none());
        machine.serve(second.fd()).unwrap();
        assert!(Arc::ptr_eq(&machine.vm_object().unwrap(), second.fd()));
    }
}

/// R0.9.
#[test]
fn a_vm_object_that_only_its_vcpu_and_its_memory_keep_is_not_found() {
    let _alone = alone();
    harness::need!(kvm, guest_memfd);
    let machine = machine(&spec("kept", &[4], &[]));
    let vm = vm();
    machine.serve(vm.fd()).unwrap();
    // KVM's own descriptor of a vCPU; ours keeps the VM's open.
    let vcpu = vm.fd().create_vcpu(0).unwrap();
    let memory =
        vm.create_guest_memfd(1 << 20, GuestMemfdFlags::MMAP | GuestMemfdFlags::INIT_SHARED).unwrap();
    assert!(machine.vm_object().is_some());
    drop(vm);
    assert_eq!((vm_objects(), descriptors("kvm-vcpu"), descriptors("gmem")), (0, 1, 1));
    assert!(vcpu.get_regs().is_ok(), "the kernel's object lives");
    assert!(machine.vm_object().is_none());
    drop((vcpu, memory));
}

/// The events of this crate's target that were sent, as name and value of their fields.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<BTreeMap<&'static str, String>>>>);

struct Fields(BTreeMap<&'static str, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

impl tracing::Subscriber for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "tideover::vm"
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(BTreeMap::new());
        event.record(&mut fields);
        self.0.lock().unwrap().push(fields.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

impl Recorder {
    /// Asserts that exactly this was told since the last time.
    #[track_caller]
    fn assert_told(&self, told: &[Created]) {
        let fields = |created: &Created| {
            let Created { name, identity, vcpus, origin } = created;
            let fields = [
                ("message", "created".to_owned()),
                ("machine", name.to_string()),
                ("identity", identity.to_string()),
                ("vcpus", vcpus.to_string()),
                ("origin", origin.to_string()),
            ];
            BTreeMap::from(fields)
        };
        let expected: Vec<_> = told.iter().map(fields).collect();
        assert_eq!(std::mem::take(&mut *self.0.lock().unwrap()), expected);
    }
}

/// R0.4, R0.5, O0.3.
#[test]
fn a_vm_object_is_told_of_once_and_a_restored_one_when_all_has_succeeded() {
    let _alone = alone();
    harness::need!(kvm);
    let recorder = Recorder::default();
    let _recording = tracing::subscriber::set_default(recorder.clone());
    let mut first = machine(&spec("told", &[4], &["vcpu0"]));
    let (name, identity, vcpus) = (first.name(), first.identity(), first.vcpus());
    let created = |origin| Created { name, identity, vcpus, origin };
    let (one, other, third) = (vm(), vm(), vm());
    recorder.assert_told(&[]);
    assert_eq!(first.serve(one.fd()), Some(created(Origin::Made)));
    assert_eq!(first.serve(one.fd()), None, "it does already");
    recorder.assert_told(&[created(Origin::Made)]);

    // An update that fails after the claim: nobody is told of the successor's, nor of the first one again.
    let claimed = claim(&mut first);
    assert_eq!(first.serve(other.fd()), None, "it is not this process's to run");
    first.unseal().unwrap();
    assert!(claimed.run().is_err());
    assert_eq!(first.serve(one.fd()), None);
    assert!(Arc::ptr_eq(&first.vm_object().unwrap(), one.fd()));
    recorder.assert_told(&[]);

    // One that succeeds. Only the machine that runs has something to tell.
    let claimed = claim(&mut first);
    recorder.assert_told(&[]);
    let mut second = claimed.run().unwrap();
    recorder.assert_told(&[]);
    assert_eq!(second.serve(other.fd()), Some(created(Origin::Restored)));
    assert_eq!(second.settle().unwrap().unclaimed, []);
    assert_filled(&inodes(&second));
    assert_eq!(second.serve(other.fd()), None);
    recorder.assert_told(&[created(Origin::Restored)]);
    assert_eq!(first.serve(third.fd()), None);

    // Its guest starts anew, as after a reset.
    assert_eq!(second.serve(third.fd()), Some(created(Origin::Made)));
    recorder.assert_told(&[created(Origin::Made)]);
}
