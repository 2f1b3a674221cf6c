//! A guest's memory from one process to the next, as the kernel's own test of it does it: the guest writes 5 of 16 MiB at
//! 4 GiB, VM and memory are preserved, and after the hand-over a new VM's guest checks every byte.
//!
//! The test runs in two processes: this program starts itself again with a channel as standard input, and is there the
//! successor.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

#[path = "preservation/guest.rs"]
mod guest;

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use fdpass::Channel;
use fdpass::Deadline;
use gmem::ChangeError;
use gmem::GuestMemfd;
use gmem::Held;
use gmem::Inode;
use guest::Object;
use guest::Work;
use guest::pattern;
use kvm::VmBuilder;
use kvm::kvm_ioctls::Kvm;
use region::Errno;
use region::Region;
use tideover_machine::Incoming;
use tideover_machine::Machine;
use tideover_machine::MemoryName;
use tideover_machine::MemorySpec;
use tideover_machine::MemoryStore;
use tideover_machine::OfferedRegion;
use tideover_machine::SessionName;
use tideover_machine::Spec;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
const DATA: u64 = 5 * MIB;

/// Set where a test plays the successor.
const SUCCESSOR: &str = "TIDEOVER_TEST_SUCCESSOR";

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(120))
}

fn builder() -> VmBuilder {
    VmBuilder::create(&Kvm::new().unwrap()).unwrap()
}

fn machine(store: MemoryStore) -> Machine {
    let memory = MemorySpec { prefault: false, store, ..MemorySpec::new(MemoryName::literal("ram"), SIZE) };
    let name = SessionName::literal("gmem_vm_preservation_session");
    let spec = Spec { name, vcpus: 1, memories: vec![memory], states: Vec::new() };
    Machine::create(&spec, &mut |_, _| {}).unwrap()
}

fn memory(machine: &Machine) -> Arc<Inode> {
    Arc::clone(&machine.memories()[0].inode)
}

/// While it is frozen: nothing is added or taken away, and what is there is seen by whoever maps it anew.
fn assert_frozen(inode: &Inode) {
    for refused in [inode.allocate(DATA, 4096), inode.punch(0, 4096)] {
        let refused = refused.unwrap_err();
        assert!(matches!(refused, ChangeError::Frozen { .. }), "{refused:?}");
        assert_eq!(refused.errno(), Errno::PERM);
    }
    let region = inode.mapping().region();
    let fd = region.as_fd().try_clone_to_owned().unwrap();
    let anew = Region::accept_as("anew", fd, SIZE, region.store(), region.page_size());
    let anew = anew.unwrap().map().unwrap();
    let mut page = [0; 4096];
    anew.read(0, &mut page).unwrap();
    assert!(page.iter().zip(0..).all(|(byte, offset)| *byte == pattern(offset)));
}

/// Hands the machine to a process that runs `test` as its successor.
fn hand_over(machine: &mut Machine, test: &str) {
    let (channel, theirs) = Channel::pair().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(SUCCESSOR, "1");
    command.stdin(Stdio::from(theirs.into_stdio())).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    // Else this process would hold the child's end open, too.
    drop(command);
    let epoch = machine.seal(Vec::new()).unwrap();
    let sizes = machine.regions().flat_map(|region| region.len_bytes().to_le_bytes());
    let told: Vec<u8> = u64::from(epoch).to_le_bytes().into_iter().chain(sizes).collect();
    let fds: Vec<BorrowedFd<'_>> = machine.regions().map(AsFd::as_fd).collect();
    channel.send(&told, &fds, soon()).unwrap();
    let answer = channel.receive(16, 0, soon());
    assert!(child.wait().unwrap().success());
    assert_eq!(answer.unwrap().bytes, b"all bytes equal");
}

/// The other side. A VM, its slots and its vCPU are made anew; all bytes are the guest's.
fn successor() {
    let channel = Channel::from_stdin().unwrap();
    let message = channel.receive(64, 8, soon()).unwrap();
    let mut numbers = message.bytes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
    let epoch = u32::try_from(numbers.next().unwrap()).unwrap();
    let regions = message.fds.into_iter().zip(numbers);
    let regions = regions.map(|(fd, len_bytes)| OfferedRegion { fd, len_bytes }).collect();
    let incoming = Incoming::attach(regions, Vec::new()).unwrap();
    let mut machine = incoming.claim(epoch).unwrap().run().unwrap();
    let mut object = Object::new(builder(), &memory(&machine), machine.identity());
    assert!(object.work(Work::CheckPattern, DATA));
    assert_eq!(memory(&machine).mapping().load(DATA).unwrap(), 0, "what nobody wrote");
    assert_eq!(machine.settle().unwrap().unclaimed, []);
    // The check would have seen a byte that is another.
    memory(&machine).mapping().write(4097, &[!pattern(4097)]).unwrap();
    assert!(!object.work(Work::CheckPattern, DATA));
    channel.send(b"all bytes equal", &[], soon()).unwrap();
}

/// R0.1, R1.11, R2.1, R2.7, P6.5.6.
#[test]
fn a_guest_finds_in_the_next_process_every_byte_that_it_wrote_to_a_guest_memfd() {
    harness::need!(kvm, guest_memfd);
    if std::env::var_os(SUCCESSOR).is_some() {
        return successor();
    }
    let builder = builder();
    let file = Arc::new(GuestMemfd::create(builder.fd(), SIZE).unwrap());
    let mut machine = machine(MemoryStore::GuestMemfd(file));
    let inode = memory(&machine);
    let mut object = Object::new(builder, &inode, machine.identity());
    assert!(object.work(Work::WritePattern, DATA));
    let frozen = inode.freeze().unwrap();
    assert_eq!(frozen.held(), Held::Prefaulted);
    assert_frozen(&inode);
    hand_over(&mut machine, "a_guest_finds_in_the_next_process_every_byte_that_it_wrote_to_a_guest_memfd");
}

/// R0.1, R1.11, R2.1, R2.7, P6.5.6.
#[test]
fn a_guest_finds_in_the_next_process_every_byte_that_it_wrote_to_a_memfd() {
    harness::need!(kvm, userfaultfd);
    if std::env::var_os(SUCCESSOR).is_some() {
        return successor();
    }
    let mut machine = machine(MemoryStore::Memfd);
    let inode = memory(&machine);
    let mut object = Object::new(builder(), &inode, machine.identity());
    assert!(object.work(Work::WritePattern, DATA));
    let frozen = inode.freeze().unwrap();
    assert_eq!(frozen.held(), Held::Userfaultfd);
    assert_frozen(&inode);
    assert_eq!(inode.mapping().region().allocated_bytes().unwrap(), Some(DATA), "holes are holes");
    hand_over(&mut machine, "a_guest_finds_in_the_next_process_every_byte_that_it_wrote_to_a_memfd");
}

/// G5.5.12, G5.7.3.
#[test]
fn guest_and_host_see_what_the_other_wrote_through_mappings_made_later() {
    harness::need!(kvm, guest_memfd);
    const BYTES: usize = 64 << 10;
    let builder = builder();
    let file = Arc::new(GuestMemfd::create(builder.fd(), SIZE).unwrap());
    // The host's mapping is gone before the guest runs.
    let filling = file.region("filling").unwrap().map().unwrap();
    filling.write(0, &[0xaa; BYTES]).unwrap();
    drop(filling);
    let machine = machine(MemoryStore::GuestMemfd(Arc::clone(&file)));
    let mut object = Object::new(builder, &memory(&machine), machine.identity());
    assert!(object.work(Work::Replace(0xaa, 0xff), BYTES as u64));
    let later = file.region("later").unwrap().map().unwrap();
    let mut read = [0; BYTES];
    later.read(0, &mut read).unwrap();
    assert!(read.iter().all(|byte| *byte == 0xff));
    assert!(!object.work(Work::Replace(0xaa, 0xff), BYTES as u64), "it does check");
}
