//! What KVM answers to who makes a guest_memfd or binds it, and what we answer: case by case, on the real KVM.
//!
//! KVM is asked by its own ioctls, with arguments that our calls cannot express, too.

use std::fs;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process::Command;

use kvm::guest_memfd::{self, GuestMemfdError, GuestMemfdFlags};
use kvm::kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_create_guest_memfd,
    kvm_userspace_memory_region2,
};
use kvm::kvm_ioctls::{Kvm, VmFd};
use kvm::{Binding, HostMemory, MemorySlots, SlotError, SlotFlags, VmBuilder};
use region::Errno;
use tideover_kvm as kvm;

use crate::guest::TestMemory;

const PAGE: u64 = 4096;
const SIZE: u64 = 0x1_0000;
const HOST: GuestMemfdFlags = GuestMemfdFlags::MMAP;

const KVM_CREATE_GUEST_MEMFD: libc::Ioctl = 0xC040_AED4;
const KVM_SET_USER_MEMORY_REGION2: libc::Ioctl = 0x40A0_AE49;
const _: () = assert!(
    size_of::<kvm_create_guest_memfd>() == 64 && size_of::<kvm_userspace_memory_region2>() == 160,
    "the sizes that stand in the numbers"
);

/// A kernel's answer, or ours.
type Answer = Result<(), Errno>;

const OK: Answer = Ok(());
const INVAL: Answer = Err(Errno::INVAL);

fn builder() -> VmBuilder {
    VmBuilder::create(&Kvm::new().unwrap()).unwrap()
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()
}

/// What KVM says to a request for a guest_memfd at this address.
fn kvm_creates(vm: &VmFd, request: *const kvm_create_guest_memfd) -> Result<OwnedFd, Errno> {
    // SAFETY: KVM reads 64 bytes from the address, if it can, and writes nothing.
    let fd = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CREATE_GUEST_MEMFD, request) };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: KVM has just opened it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn kvm_creates_of(vm: &VmFd, size: u64, flags: u64, reserved: [u64; 6]) -> Answer {
    kvm_creates(vm, &kvm_create_guest_memfd { size, flags, reserved }).map(drop)
}

fn we_create(vm: &VmFd, size: u64, flags: GuestMemfdFlags) -> Answer {
    guest_memfd::create(vm, size, flags).map(drop).map_err(|error| error.errno())
}

/// G5.2.1, G5.2.3, G5.2.5, G5.2.6.
#[test]
fn a_guest_memfd_is_made_or_refused_as_kvm_does() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    let vm = builder.fd();
    let shared = GuestMemfdFlags::INIT_SHARED;
    let cases = [
        ("a page", PAGE, GuestMemfdFlags::NONE, OK),
        ("mappable", PAGE, HOST, OK),
        ("shared and not mappable", PAGE, shared, OK),
        ("mappable and shared", SIZE, HOST | shared, OK),
        ("no bytes", 0, HOST, INVAL),
        ("a byte", 1, HOST, INVAL),
        ("all but a byte of a page", PAGE - 1, HOST, INVAL),
        ("a page and a byte", PAGE + 1, HOST, INVAL),
        ("a negative size", u64::MAX - PAGE + 1, HOST, INVAL),
    ];
    for (what, size, flags, answer) in cases {
        assert_eq!(kvm_creates_of(vm, size, flags.bits(), [0; 6]), answer, "{what}: KVM");
        assert_eq!(we_create(vm, size, flags), answer, "{what}: ours");
    }
    // Ours takes no pointer, and no fields that are kept for later: they cannot be wrong.
    let nowhere = std::ptr::without_provenance(8);
    assert_eq!(kvm_creates(vm, nowhere).unwrap_err(), Errno::FAULT);
    let kept_for_later = kvm_creates_of(vm, PAGE, 0, [1; 6]);
    assert!(matches!(kept_for_later, OK | INVAL), "as Linux 6.18 does, or as it should: {kept_for_later:?}");
}

/// G5.2.2.
#[test]
fn each_flag_alone_is_taken_or_refused_as_kvm_says_it_does() {
    harness::need!(kvm, guest_memfd);
    let builder = builder();
    let accepted = builder.capabilities().guest_memfd.unwrap();
    let known = [HOST, GuestMemfdFlags::INIT_SHARED];
    for bit in (0..64).map(|bit| 1_u64 << bit) {
        let answer = if accepted.bits() & bit != 0 { OK } else { INVAL };
        assert_eq!(kvm_creates_of(builder.fd(), PAGE, bit, [0; 6]), answer, "{bit:#x}");
        // Ours has no name for the others.
        for flags in known.into_iter().filter(|flags| flags.bits() == bit) {
            assert_eq!(we_create(builder.fd(), PAGE, flags), answer, "{bit:#x}");
        }
    }
}

/// Set where a test is run again in a process of its own.
const ALONE: &str = "TIDEOVER_KVM_ALONE";

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Lowers or raises the limit on descriptors.
fn allow_descriptors(count: u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the argument is ours and of the type that the call writes.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }, 0);
    limit.rlim_cur = count.min(limit.rlim_max);
    // SAFETY: the argument is ours, and a limit is no memory.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
}

/// G5.2.4.
#[test]
fn without_a_descriptor_left_it_is_the_kernels_error_and_nothing_stays() {
    harness::need!(kvm, guest_memfd);
    if std::env::var_os(ALONE).is_none() {
        // The limit is a process's, and so are the other tests of this program.
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["without_a_descriptor_left_it_is_the_kernels_error_and_nothing_stays", "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "it did not run");
        return;
    }
    let builder = builder();
    let before = descriptors();
    // Down to what is open: no number is left below the limit.
    let highest = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let number: i32 = name.parse().unwrap();
        // SAFETY: asks whether the number is open, and changes nothing.
        (unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0).then_some(number)
    });
    let highest: u64 = highest.max().unwrap().try_into().unwrap();
    let mut fillers = Vec::new();
    allow_descriptors(highest + 1);
    while let Ok(file) = fs::File::open("/dev/null") {
        fillers.push(file);
    }
    let refused = guest_memfd::create(builder.fd(), PAGE, GuestMemfdFlags::NONE).unwrap_err();
    allow_descriptors(1024);
    assert!(matches!(refused, GuestMemfdError::Create { .. }), "{refused:?}");
    assert_eq!(refused.errno(), Errno::MFILE);
    drop(fillers);
    assert_eq!(descriptors(), before);
    guest_memfd::create(builder.fd(), PAGE, GuestMemfdFlags::NONE).unwrap();
    assert_eq!(descriptors(), before);
}

/// A VM with a guest_memfd and a mapping of it.
struct Rig {
    builder: VmBuilder,
    file: OwnedFd,
    memory: TestMemory,
    slots: MemorySlots<TestMemory>,
}

fn rig() -> Rig {
    let builder = builder();
    let flags = HOST | GuestMemfdFlags::INIT_SHARED;
    let file = guest_memfd::create(builder.fd(), SIZE, flags).unwrap();
    let memory = TestMemory::of_file(&file, usize::try_from(SIZE).unwrap());
    let slots = builder.memory_slots();
    Rig { builder, file, memory, slots }
}

/// A binding that nothing is wrong with.
fn good(rig: &Rig) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        slot: 0,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: 0x10_0000,
        memory_size: SIZE,
        userspace_addr: u64::try_from(rig.memory.host_address()).unwrap(),
        guest_memfd: rig.file.as_raw_fd().try_into().unwrap(),
        ..Default::default()
    }
}

fn kvm_sets(vm: &VmFd, region: &kvm_userspace_memory_region2) -> Answer {
    // SAFETY: no vCPU is ever made in these VMs, so nothing reaches what the slot leads to.
    let result = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_SET_USER_MEMORY_REGION2, region) };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

/// What KVM says to a binding that is wrong in one way, in a VM of its own.
fn kvm_binds(change: impl FnOnce(&mut kvm_userspace_memory_region2)) -> Answer {
    let rig = rig();
    let mut region = good(&rig);
    change(&mut region);
    kvm_sets(rig.builder.fd(), &region)
}

fn errno(result: Result<(), SlotError>) -> Answer {
    result.map_err(|error| error.errno())
}

/// Numbers of a binding.
#[derive(Clone, Copy)]
struct Numbers {
    slot: u32,
    guest_address: u64,
    len: u64,
    offset: u64,
    file_offset: u64,
}

const GOOD: Numbers = Numbers { slot: 0, guest_address: 0x10_0000, len: SIZE, offset: 0, file_offset: 0 };

fn we_bind(rig: &mut Rig, numbers: Numbers, file: BorrowedFd<'_>) -> Answer {
    let Numbers { slot, guest_address, len, offset, file_offset } = numbers;
    let binding = Binding { guest_memfd: file, offset_bytes: file_offset };
    errno(rig.slots.add_bound(slot, guest_address, &rig.memory, offset, len, binding))
}

/// What we say to such a binding, in a VM of its own, in which nothing stays if we refuse.
fn bound(numbers: Numbers) -> Answer {
    let mut rig = rig();
    let file = rig.file.try_clone().unwrap();
    let answer = we_bind(&mut rig, numbers, file.as_fd());
    assert_eq!(rig.slots.iter().count(), usize::from(answer.is_ok()));
    answer
}

/// G5.5.2, G5.5.10.
#[test]
fn numbers_of_a_binding_are_refused_as_kvm_does() {
    harness::need!(kvm, guest_memfd);
    let beyond = SIZE + PAGE;
    let cases: [(&str, Numbers, Answer); 9] = [
        ("nothing wrong", GOOD, OK),
        ("some of it", Numbers { len: PAGE, offset: PAGE, file_offset: PAGE, ..GOOD }, OK),
        ("a length of no whole pages", Numbers { len: PAGE + 1, ..GOOD }, INVAL),
        ("a guest address of no whole pages", Numbers { guest_address: 1, ..GOOD }, INVAL),
        ("an offset in the file of no whole pages", Numbers { len: PAGE, file_offset: 1, ..GOOD }, INVAL),
        ("guest addresses that wrap around", Numbers { guest_address: u64::MAX - PAGE + 1, ..GOOD }, INVAL),
        ("a number that no slot has", Numbers { slot: 0xFFFF, ..GOOD }, INVAL),
        ("more than the file", Numbers { file_offset: PAGE, ..GOOD }, INVAL),
        ("behind the file", Numbers { len: PAGE, file_offset: beyond, ..GOOD }, INVAL),
    ];
    for (what, numbers, answer) in cases {
        let kvms = kvm_binds(|region| {
            region.slot = numbers.slot;
            region.guest_phys_addr = numbers.guest_address;
            region.memory_size = numbers.len;
            region.userspace_addr += numbers.offset;
            region.guest_memfd_offset = numbers.file_offset;
        });
        assert_eq!((kvms, bound(numbers)), (answer, answer), "{what}");
    }
    // Ours is given memory, which is at whole pages.
    assert_eq!(kvm_binds(|region| region.userspace_addr += 1), INVAL);
    // Linux 6.18 takes an end that is no signed number, and 7.3 does not.
    let last = i64::MAX.cast_unsigned() & !(PAGE - 1);
    let kvms = kvm_binds(|region| region.guest_memfd_offset = last);
    assert!(matches!(kvms, OK | INVAL), "{kvms:?}");
    assert_eq!(bound(Numbers { file_offset: last, ..GOOD }), INVAL);
    assert_eq!(bound(Numbers { file_offset: u64::MAX - PAGE + 1, ..GOOD }), INVAL);
}

/// G5.5.1, G5.5.6, G5.5.11.
#[test]
fn what_a_binding_of_ours_cannot_say_kvm_refuses() {
    harness::need!(kvm, guest_memfd);
    let with = |flags| kvm_binds(|region| region.flags |= flags);
    for flags in [KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, 1 << 31] {
        assert_eq!(with(flags), INVAL, "{flags:#x}");
    }
    let closed = kvm_binds(|region| region.guest_memfd = i32::MAX.cast_unsigned());
    assert_eq!(closed, Err(Errno::BADF));
    // An address of nothing is none that we give, and KVM takes it.
    assert_eq!(kvm_binds(|region| region.userspace_addr = 0x10_0000), OK);
}

/// G5.5.7.
#[test]
fn a_file_of_another_kind_or_vm_is_refused_as_kvm_does() {
    harness::need!(kvm, guest_memfd);
    let null: OwnedFd = fs::File::open("/dev/null").unwrap().into();
    let other_vm = self::rig();
    let mut rig = rig();
    for (what, file) in [("no guest_memfd", &null), ("another VM's", &other_vm.file)] {
        let number = u32::try_from(file.as_raw_fd()).unwrap();
        let kvms = kvm_binds(|region| region.guest_memfd = number);
        assert_eq!((kvms, we_bind(&mut rig, GOOD, file.as_fd())), (INVAL, INVAL), "{what}");
        assert_eq!(rig.slots.iter().count(), 0);
    }
}

/// G5.5.3, G5.5.4, G5.5.5, G5.5.8.
#[test]
fn slots_that_are_in_each_others_way_are_refused_as_kvm_does() {
    harness::need!(kvm, guest_memfd);
    let mut rig = rig();
    let file = rig.file.try_clone().unwrap();
    let half = Numbers { len: SIZE / 2, ..GOOD };
    we_bind(&mut rig, half, file.as_fd()).unwrap();
    let other_half = Numbers { slot: 1, offset: SIZE / 2, file_offset: SIZE / 2, ..half };
    let change = Numbers { guest_address: 0x20_0000, ..half };
    let kvms = |numbers: Numbers| {
        let mut region = good(&rig);
        region.slot = numbers.slot;
        region.guest_phys_addr = numbers.guest_address;
        region.memory_size = numbers.len;
        region.guest_memfd_offset = numbers.file_offset;
        kvm_sets(rig.builder.fd(), &region)
    };
    let exist = Err(Errno::EXIST);
    assert_eq!(kvms(change), INVAL, "a slot is not changed");
    assert_eq!(kvms(other_half), exist, "its addresses are another slot's");
    assert_eq!(kvms(Numbers { slot: 7, len: 0, ..GOOD }), INVAL, "there is none to delete");
    let bound_already = Numbers { slot: 1, guest_address: 0x20_0000, ..half };
    let kvms_answer = kvms(bound_already);
    // Linux 7.3 has EEXIST for it, 6.18 EINVAL. `GmemFile`, which knows all bindings, has the newer one.
    assert!(kvms_answer == exist || kvms_answer == INVAL, "{kvms_answer:?}");

    let mut ours = |numbers| we_bind(&mut rig, numbers, file.as_fd());
    assert_eq!((ours(change), ours(other_half), ours(bound_already)), (INVAL, exist, kvms_answer));
    assert_eq!(errno(rig.slots.remove(7)), INVAL);
    we_bind(&mut rig, Numbers { guest_address: 0x20_0000, ..other_half }, file.as_fd()).unwrap();
    let plain = rig.slots.add(2, 0x30_0000, &rig.memory, 0, SIZE, SlotFlags::default());
    plain.unwrap();
}
