//! A predecessor that is killed: what a process finds that kept the descriptors.
//!
//! Each test runs twice. In this process it starts itself again with a channel as standard input; there it
//! plays the predecessor, which makes a machine, sends its regions, goes on to some point, says so, and waits
//! for SIGKILL.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

mod rig;

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use abi::arena::OwnershipState;
use abi::regions::Store;
use fdpass::Channel;
use fdpass::Deadline;
use gmem::Freeze;
use gmem::Held;
use region::PageSize;
use rig::assert_filled;
use rig::freeze;
use rig::inodes;
use rig::machine;
use rig::offered;
use rig::spec;
use rig::states;
use tideover_machine::ClaimError;
use tideover_machine::Identity;
use tideover_machine::Incoming;
use tideover_machine::MemoryStore;
use tideover_machine::OfferedRegion;
use tideover_machine::Spec;

/// Set where a test plays the predecessor.
const PREDECESSOR: &str = "TIDEOVER_TEST_PREDECESSOR";
const SIZES_MIB: [u64; 2] = [8, 16];
const STATES: [&str; 2] = ["vcpu0", "serial"];
const STATE_BYTES: usize = 20_000;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Until {
    Created,
    Frozen,
    Sealed,
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

/// Does not come back.
fn predecessor(until: Until) -> ! {
    predecessor_of(&spec("killed", &SIZES_MIB, &STATES), until)
}

/// Does not come back.
fn predecessor_of(spec: &Spec, until: Until) -> ! {
    let channel = Channel::from_stdin().unwrap();
    let mut machine = machine(spec);
    let regions = offered(&machine);
    let fds: Vec<BorrowedFd<'_>> = regions.iter().map(|region| region.fd.as_fd()).collect();
    channel.send(&machine.identity().bytes(), &fds, soon()).unwrap();
    let mut frozen = Vec::new();
    if until >= Until::Frozen {
        frozen = freeze(&inodes(&machine));
    }
    if until >= Until::Sealed {
        machine.seal(states(machine.state_names(), STATE_BYTES, 7)).unwrap();
    }
    channel.send(b"there", &[], soon()).unwrap();
    // Until the parent closes its end, should it fail before it kills.
    let _ = channel.receive(1, 0, Deadline::never());
    drop((frozen, machine, regions));
    std::process::exit(1);
}

/// A predecessor in a process of its own, at the point where it is to die.
struct Doomed {
    child: Child,
    identity: Identity,
    regions: Vec<OfferedRegion>,
    _channel: Channel,
}

impl Doomed {
    fn start(test: &str) -> Self {
        Self::start_with(test, &SIZES_MIB)
    }

    /// One whose machine has guest memory of these sizes.
    fn start_with(test: &str, sizes_mib: &[u64]) -> Self {
        let (channel, theirs) = Channel::pair().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(PREDECESSOR, "1");
        let child = command.stdin(Stdio::from(theirs.into_stdio())).stdout(Stdio::null()).spawn().unwrap();
        // Else this process would hold the child's end open, too.
        drop(command);
        let message = channel.receive(16, 1 + sizes_mib.len(), soon()).unwrap();
        let identity = Identity::new(message.bytes.as_slice().try_into().unwrap());
        let sizes = [8].iter().chain(sizes_mib).map(|mib| mib << 20);
        let regions =
            message.fds.into_iter().zip(sizes).map(|(fd, len_bytes)| OfferedRegion { fd, len_bytes });
        let regions: Vec<OfferedRegion> = regions.collect();
        assert_eq!(regions.len(), 1 + sizes_mib.len());
        assert_eq!(channel.receive(16, 0, soon()).unwrap().bytes, b"there");
        Self { child, identity, regions, _channel: channel }
    }

    /// The regions again, as a process would have that keeps them for later.
    fn copies(&self) -> Vec<OfferedRegion> {
        let copy = |region: &OfferedRegion| OfferedRegion {
            fd: region.fd.try_clone().unwrap(),
            len_bytes: region.len_bytes,
        };
        self.regions.iter().map(copy).collect()
    }

    /// Kills it, and gives what is found then: by who attaches anew, and by who had attached before.
    fn kill(mut self) -> [Incoming; 2] {
        let early = Incoming::attach(self.copies(), Vec::new()).unwrap();
        let word = early.ownership().unwrap();
        assert!(early.owner_lives(word).unwrap());
        self.child.kill().unwrap();
        assert_eq!(self.child.wait().unwrap().signal(), Some(9));
        let late = Incoming::attach(self.copies(), Vec::new()).unwrap();
        let found = [late, early];
        for incoming in &found {
            assert_eq!(incoming.identity(), self.identity);
            assert_eq!(incoming.ownership().unwrap(), word);
            assert!(!incoming.owner_lives(word).unwrap());
            assert_filled(incoming.memories());
        }
        found
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_predecessor() -> bool {
    std::env::var_os(PREDECESSOR).is_some()
}

/// The memory is whole and free to be changed, and there is no state to go on from.
fn assert_left_running(found: [Incoming; 2]) {
    let word = found[0].ownership().unwrap();
    assert_eq!((word.epoch(), word.state()), (1, OwnershipState::Running));
    let memories: Vec<_> = found[0].memories().iter().map(Arc::clone).collect();
    for inode in &memories {
        // Nothing waits for the freeze of the dead, not even at a hole.
        inode.allocate(0, inode.size_bytes()).unwrap();
        inode.mapping().write(0x1000, b"the dead are gone").unwrap();
    }
    for (incoming, epoch) in found.into_iter().zip([word.epoch(), word.epoch() + 1]) {
        assert!(matches!(incoming.claim(epoch), Err(ClaimError::Ownership(_))));
    }
}

/// L2.7.2.
#[test]
fn killed_once_the_machine_is_made_it_leaves_the_memory() {
    if is_predecessor() {
        predecessor(Until::Created);
    }
    assert_left_running(Doomed::start("killed_once_the_machine_is_made_it_leaves_the_memory").kill());
}

#[test]
fn killed_once_the_memory_is_frozen_it_leaves_the_memory() {
    if is_predecessor() {
        predecessor(Until::Frozen);
    }
    assert_left_running(Doomed::start("killed_once_the_memory_is_frozen_it_leaves_the_memory").kill());
}

/// L2.6.1, L2.7.2.
#[test]
fn killed_once_the_machine_is_sealed_it_leaves_all_of_it() {
    if is_predecessor() {
        predecessor(Until::Sealed);
    }
    let [late, early] = Doomed::start("killed_once_the_machine_is_sealed_it_leaves_all_of_it").kill();
    let word = late.ownership().unwrap();
    assert_eq!((word.epoch(), word.state()), (2, OwnershipState::Sealed));
    let expected = states(late.state_names(), STATE_BYTES, 7);
    let claimed = late.claim(word.epoch()).unwrap();
    assert_eq!(*claimed.states(), expected.into_iter().collect());
    assert!(matches!(early.claim(word.epoch()), Err(ClaimError::Ownership(_))), "one claims it");
    let mut machine = claimed.run().unwrap();
    machine.settle().unwrap();
    assert_filled(&inodes(&machine));
}

/// As [`spec`], its memory from every store there is; with the VM object that made some of it.
fn spec_of_every_store() -> (Spec, kvm::VmBuilder) {
    let mut spec = spec("stores", &[4, 4, 4], &STATES);
    let vm = kvm::VmBuilder::create(&kvm::kvm_ioctls::Kvm::new().unwrap()).unwrap();
    let file = gmem::GuestMemfd::create(vm.fd(), 4 << 20).unwrap();
    spec.memories[1].store = MemoryStore::Hugetlb;
    spec.memories[1].page_size = PageSize::Huge;
    spec.memories[2].store = MemoryStore::GuestMemfd(Arc::new(file));
    (spec, vm)
}

#[test]
fn killed_with_memory_of_every_store_it_leaves_all_of_it() {
    // It has this process's huge pages: what it set aside itself would not be given back by who is killed.
    if is_predecessor() {
        let (spec, _vm) = spec_of_every_store();
        predecessor_of(&spec, Until::Sealed);
    }
    harness::need!(kvm, guest_memfd, hugetlb);
    let test = "killed_with_memory_of_every_store_it_leaves_all_of_it";
    let [late, _early] = Doomed::start_with(test, &[4, 4, 4]).kill();
    let sealed = late.ownership().unwrap().epoch();
    let mut machine = late.claim(sealed).unwrap().run().unwrap();
    machine.settle().unwrap();
    let memories = inodes(&machine);
    let stores: Vec<Store> = memories.iter().map(|inode| inode.mapping().region().store()).collect();
    assert_eq!(stores, [Store::Memfd, Store::Hugetlb, Store::GuestMemfd]);
    assert_filled(&memories);
    let held: Vec<Held> = freeze(&memories).iter().map(Freeze::held).collect();
    assert_eq!(held[1..], [Held::Whole, Held::Prefaulted], "it is handed on like the first time");
    assert_filled(&memories);
}
