//! Guest memory of every store, with NUMA policies: made, handed over, and refused.

use std::sync::Arc;

use abi::kho::Subtree;
use abi::numa::Nodes;
use abi::numa::Policy;
use abi::regions;
use abi::regions::RegionEntry;
use abi::regions::Store;
use gmem::GuestMemfd;
use gmem::Held;
use kvm::VmBuilder;
use kvm::kvm_ioctls::Kvm;
use region::PageSize;
use region::RegionError;
use region::Shortage;
use region::host_nodes;
use tideover_machine::AttachError;
use tideover_machine::CreateError;
use tideover_machine::Incoming;
use tideover_machine::Machine;
use tideover_machine::MemoryName;
use tideover_machine::MemorySpec;
use tideover_machine::MemoryStore;
use tideover_machine::Spec;
use tideover_machine::readable_formats;

use crate::attach;
use crate::claim;
use crate::rig;
use crate::rig::assert_filled;
use crate::rig::inodes;
use crate::rig::offered;
use crate::seal;

const MIB: u64 = 1 << 20;
const V1: &str = "tideover-regions-v1";
const V2: &str = "tideover-regions-v2";

fn memory(name: &str, bytes: u64, store: MemoryStore) -> MemorySpec {
    let page_size = if matches!(store, MemoryStore::Hugetlb) { PageSize::Huge } else { PageSize::Small };
    MemorySpec { store, page_size, ..MemorySpec::new(MemoryName::new(name.as_bytes()).unwrap(), bytes) }
}

fn spec(name: &str, memories: Vec<MemorySpec>) -> Spec {
    Spec { memories, ..rig::spec(name, &[], &["vcpu0"]) }
}

fn first_node() -> Nodes {
    Nodes::one(host_nodes().iter().next().unwrap()).unwrap()
}

fn vm() -> VmBuilder {
    VmBuilder::create(&Kvm::new().unwrap()).unwrap()
}

fn guest_memfd(vm: &VmBuilder, bytes: u64) -> MemoryStore {
    MemoryStore::GuestMemfd(Arc::new(GuestMemfd::create(vm.fd(), bytes).unwrap()))
}

fn stores(memories: &[Arc<gmem::Inode>]) -> Vec<Store> {
    memories.iter().map(|inode| inode.mapping().region().store()).collect()
}

#[track_caller]
fn refused(spec: &Spec) -> CreateError {
    Machine::create(spec, &mut |_, _| panic!("something is being made")).unwrap_err()
}

/// P6.5.7.
#[test]
fn memory_of_every_store_crosses_and_crosses_again() {
    harness::need!(kvm, guest_memfd, hugetlb);
    let vm = vm();
    let memories = vec![
        memory("small", 4 * MIB, MemoryStore::Memfd),
        memory("huge", 4 * MIB, MemoryStore::Hugetlb),
        memory("kvms", 4 * MIB, guest_memfd(&vm, 4 * MIB)),
    ];
    let kinds = [Store::Memfd, Store::Hugetlb, Store::GuestMemfd];
    let mut machine = rig::machine(&spec("stores", memories));
    assert!(machine.formats().contains(&V2.to_owned()) && !machine.formats().contains(&V1.to_owned()));
    assert!(machine.formats().iter().all(|format| readable_formats().contains(format)));
    assert_eq!(stores(&inodes(&machine)), kinds);
    assert!(inodes(&machine)[2].is_made_by(vm.fd()));
    let accounts: Vec<_> = machine.memories().iter().map(|memory| memory.account.unwrap()).collect();
    assert_eq!(accounts[1].huge_bytes, 4 * MIB);

    for seed in 1..3 {
        let successor = claim(&mut machine, seed).run().unwrap();
        let (places, formats) = (machine.places().to_vec(), machine.formats());
        machine = successor;
        machine.settle().unwrap();
        assert_eq!((machine.places(), machine.formats()), (&places[..], formats));
        assert_eq!(stores(&inodes(&machine)), kinds);
        assert!(!inodes(&machine)[2].is_made_by(vm.fd()), "that is known in its first life only");
        assert_eq!(machine.memories()[1].page_bytes, 2 << 20);
        assert_filled(&inodes(&machine));
    }
}

#[test]
fn memory_that_is_all_there_needs_no_faults_held() {
    harness::need!(kvm, guest_memfd, hugetlb);
    let vm = vm();
    let memories = vec![
        MemorySpec { prefault: false, ..memory("huge", 4 * MIB, MemoryStore::Hugetlb) },
        memory("kvms", 4 * MIB, guest_memfd(&vm, 4 * MIB)),
    ];
    let machine = rig::machine(&spec("whole", memories));
    for inode in inodes(&machine) {
        assert_eq!(inode.freeze().unwrap().held(), Held::Whole, "{}", inode.name());
    }
}

#[test]
fn progress_of_every_store_is_told_once() {
    harness::need!(kvm, guest_memfd, hugetlb);
    let vm = vm();
    let memories = vec![
        memory("huge", 4 * MIB, MemoryStore::Hugetlb),
        memory("small", 2 * MIB, MemoryStore::Memfd),
        memory("kvms", MIB, guest_memfd(&vm, MIB)),
    ];
    let mut seen = Vec::new();
    Machine::create(&spec("progress", memories), &mut |done, of| seen.push((done, of))).unwrap();
    assert_eq!(seen.last(), Some(&(7 * MIB, 7 * MIB)));
    assert!(seen.is_sorted(), "{seen:?}");
    assert_eq!(seen.iter().filter(|(done, _)| *done == 4 * MIB).count(), 2, "end of one, start of the next");
}

#[test]
fn a_machine_of_plain_memfds_can_be_given_to_who_knows_version_1_only() {
    let machine = rig::machine(&rig::spec("plain", &[4, 8], &[]));
    assert!(machine.formats().contains(&V1.to_owned()) && !machine.formats().contains(&V2.to_owned()));
}

/// R1.14.
#[test]
fn policies_are_kept_from_life_to_life() {
    harness::need!(hugetlb);
    let node = first_node();
    let policies = [Policy::Bind(node), Policy::Interleave(node), Policy::Preferred(node), Policy::Default];
    // The policy of hugetlb memory is the mapping's alone: if it is there, the successor has set it.
    let with = |(index, policy): (usize, &Policy)| {
        let store = if index % 2 == 0 { MemoryStore::Hugetlb } else { MemoryStore::Memfd };
        MemorySpec { policy: *policy, ..memory(&format!("ram{index}"), 4 * MIB, store) }
    };
    let spec = spec("policies", policies.iter().enumerate().map(with).collect());
    let mut machine = rig::machine(&spec);
    for seed in 1..3 {
        let kept = |inode: &Arc<gmem::Inode>| inode.mapping().policy().unwrap().unwrap();
        assert_eq!(inodes(&machine).iter().map(kept).collect::<Vec<_>>(), policies);
        let told: Vec<_> = machine.memories().iter().map(|memory| memory.policy).collect();
        assert_eq!(told, policies);
        let incoming = attach(&machine);
        assert_eq!(incoming.memories().iter().map(kept).collect::<Vec<_>>(), policies);
        let (epoch, _frozen) = seal(&mut machine, 100, seed);
        machine = incoming.claim(epoch).unwrap().run().unwrap();
        machine.settle().unwrap();
    }
    assert_filled(&inodes(&machine));
}

/// What attaching says when the published region table is changed.
fn with_table(change: impl Fn(&mut RegionEntry)) -> AttachError {
    let machine = rig::machine(&rig::spec("table", &[4, 4], &[]));
    let mut kho = kho::Kho::attach(Box::new(machine.arena().clone())).unwrap();
    let address = kho.subtree(&regions::SUBTREE).unwrap().data;
    let mut entries = regions::read(machine.arena(), address).unwrap().entries;
    change(&mut entries[2]);
    let bytes = regions::encode(&entries);
    let data = kho.store(&bytes).unwrap().start().address();
    kho.set_subtree(Subtree { name: regions::SUBTREE, data, size: bytes.len() as u64 });
    kho.commit().unwrap();
    Incoming::attach(offered(&machine), vec![]).unwrap_err()
}

#[test]
fn a_node_that_the_successors_host_does_not_have_is_named() {
    let beyond = Nodes::one(1023).unwrap();
    match with_table(|entry| entry.policy = Policy::Bind(beyond.with(first_node()))) {
        AttachError::Region(RegionError::Nodes { missing, .. }) => assert_eq!(*missing, beyond),
        other => panic!("{other:?}"),
    }
}

#[test]
fn memory_of_another_store_than_the_table_says_is_refused() {
    let not = |error| match error {
        AttachError::Region(RegionError::NotARegion { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    let huge = |entry: &mut RegionEntry| (entry.store, entry.page_bytes) = (Store::Hugetlb, 2 << 20);
    assert!(not(with_table(huge)).contains("not of huge pages"));
    assert!(not(with_table(|entry| entry.store = Store::GuestMemfd)).contains("no guest_memfd"));
    let odd = with_table(|entry| entry.page_bytes = 1 << 14);
    assert!(matches!(odd, AttachError::PageSize { index: 2, told: 0x4000 }), "{odd:?}");
    let giant = with_table(|entry| entry.page_bytes = 1 << 30);
    assert!(matches!(giant, AttachError::Region(RegionError::PageSize { .. })), "{giant:?}");
}

#[test]
fn memory_of_one_size_and_two_stores_cannot_be_swapped() {
    harness::need!(hugetlb);
    let memories =
        vec![memory("small", 4 * MIB, MemoryStore::Memfd), memory("huge", 4 * MIB, MemoryStore::Hugetlb)];
    let machine = rig::machine(&spec("swapped", memories));
    let mut swapped = offered(&machine);
    swapped.swap(1, 2);
    let error = Incoming::attach(swapped, vec![]).unwrap_err();
    assert!(matches!(error, AttachError::Region(RegionError::NotARegion { .. })), "{error:?}");
}

#[test]
fn specifications_that_no_host_can_meet_are_refused() {
    let why = |memories| match refused(&spec("refused", memories)) {
        CreateError::Spec { why, .. } => why,
        other => panic!("{other:?}"),
    };
    let page = |store, page_size| MemorySpec { page_size, ..memory("ram", 1 << 30, store) };
    assert!(why(vec![page(MemoryStore::Memfd, PageSize::Giant)]).contains("no pages of the size"));
    assert!(why(vec![page(MemoryStore::Hugetlb, PageSize::Small)]).contains("no pages of the size"));
    assert!(why(vec![memory("ram", 3 * MIB, MemoryStore::Hugetlb)]).contains("no multiple"));
}

#[test]
fn a_guest_memfd_is_one_piece_of_memory_and_all_of_it() {
    harness::need!(kvm, guest_memfd);
    let vm = vm();
    let file = guest_memfd(&vm, 4 * MIB);
    let why = |memories| match refused(&spec("refused", memories)) {
        CreateError::Spec { why, .. } => why,
        other => panic!("{other:?}"),
    };
    assert!(why(vec![memory("ram", 2 * MIB, file.clone())]).contains("not that of its guest_memfd"));
    let twice = vec![memory("one", 4 * MIB, file.clone()), memory("other", 4 * MIB, file.clone())];
    assert!(why(twice).contains("have one guest_memfd"));
    let huge = MemorySpec { page_size: PageSize::Huge, ..memory("ram", 4 * MIB, file) };
    assert!(why(vec![huge]).contains("no pages of the size"));
}

#[test]
fn what_this_host_does_not_have_is_refused_before_anything_is_made() {
    let cause = |memories| match refused(&spec("refused", memories)) {
        CreateError::Region(error) => error,
        other => panic!("{other:?}"),
    };
    let nodes = MemorySpec {
        policy: Policy::Interleave(Nodes::one(1023).unwrap()),
        ..memory("ram", 4 * MIB, MemoryStore::Memfd)
    };
    assert!(matches!(cause(vec![nodes]), RegionError::Nodes { name, .. } if name == "refused.ram"));
    let many = memory("ram", 1 << 42, MemoryStore::Hugetlb);
    match cause(vec![memory("first", 4 * MIB, MemoryStore::Memfd), many]) {
        RegionError::HugePages { name, shortage } => {
            assert_eq!(name, "refused.ram");
            assert!(
                matches!(*shortage, Shortage::TooFew { wanted: 0x20_0000, .. } | Shortage::NoSuchSize { .. }),
                "{shortage:?}"
            );
        }
        other => panic!("{other:?}"),
    }
}
