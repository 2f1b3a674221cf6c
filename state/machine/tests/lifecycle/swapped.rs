//! Two machines whose files are taken for each other's, each of them whole and in order.

use abi::Memory;
use abi::MemoryMut;
use abi::regions::RegionEntry;
use region::Arena;
use tideover_machine::AttachError;
use tideover_machine::Identity;
use tideover_machine::Incoming;
use tideover_machine::Machine;
use tideover_machine::OfferedRegion;

use crate::assert_states;
use crate::claim;
use crate::name;
use crate::rig::machine;
use crate::rig::offered;
use crate::rig::spec;

const TOKENS: [u64; 4] = [1, 0x100, 0x101, 0x1000];

/// Two machines that differ in nothing but who they are.
fn twins() -> (Machine, Machine) {
    let make = || machine(&spec("twin", &[4, 4], &["vcpu0"]));
    (make(), make())
}

/// Where the record of a token lies.
fn record(arena: &Arena, token: u64) -> u64 {
    let subtree = abi::kho::SubtreeName::literal(abi::luo::SUBTREE);
    let tree = kho::Tree::read(arena).unwrap();
    let subtree = tree.fdt.subtree(&subtree).unwrap();
    let luo = abi::luo::Luo::read(arena, subtree.data, subtree.size).unwrap();
    let file = luo.sessions[0].files.iter().find(|file| file.token == token);
    file.unwrap().data
}

fn page(arena: &Arena, address: u64) -> [u8; 4096] {
    let mut page = [0; 4096];
    arena.read(address, &mut page).unwrap();
    page
}

/// Exchanges what two tokens name, one in each machine's session: both stay valid, records of the right kind that their
/// sums and marks fit.
fn swap(one: &Machine, other: &Machine, token: u64) {
    let (mut ours, mut theirs) = (one.arena().clone(), other.arena().clone());
    let (here, there) = (record(&ours, token), record(&theirs, token));
    let (our_page, their_page) = (page(&ours, here), page(&theirs, there));
    assert_ne!(our_page, their_page, "they have different identities");
    ours.write(here, &their_page).unwrap();
    theirs.write(there, &our_page).unwrap();
}

/// Exchanges guest memory, too, in what is handed over and in what the region tables tell of it.
fn swap_regions(one: &Machine, other: &Machine) -> [Vec<OfferedRegion>; 2] {
    let (mut ours, mut theirs) = (offered(one), offered(other));
    ours[1..].swap_with_slice(&mut theirs[1..]);
    let tell = |machine: &Machine, of: &Machine| {
        let table = |machine: &Machine| {
            let tree = kho::Tree::read(machine.arena()).unwrap();
            let at = tree.fdt.subtree(&abi::regions::SUBTREE).unwrap().data;
            (at, abi::regions::read(machine.arena(), at).unwrap().entries)
        };
        let ((at, mut entries), (_, of)) = (table(machine), table(of));
        let files: Vec<u64> = of.iter().map(|entry: &RegionEntry| entry.file).collect();
        entries[1..].iter_mut().zip(&files[1..]).for_each(|(entry, file)| entry.file = *file);
        (at, abi::regions::encode(&entries))
    };
    let (our_table, their_table) = (tell(one, other), tell(other, one));
    one.arena().clone().write(our_table.0, &our_table.1).unwrap();
    other.arena().clone().write(their_table.0, &their_table.1).unwrap();
    [ours, theirs]
}

/// Asserts that the session is refused, and that the error names both machines.
#[track_caller]
fn assert_refused(regions: Vec<OfferedRegion>, whose: Identity, came: Identity) {
    let error = Incoming::attach(regions, Vec::new()).map(drop).unwrap_err();
    assert!(matches!(error, AttachError::Retrieve(luo::RetrieveError::Handler { .. })), "{error:?}");
    let text = format!("{:#}", Chain(&error));
    assert!(text.contains(&whose.to_string()) && text.contains(&came.to_string()), "{text}");
}

struct Chain<'a>(&'a (dyn std::error::Error + 'static));

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut next = Some(self.0);
        while let Some(error) = next {
            write!(f, "{error}: ")?;
            next = error.source();
        }
        Ok(())
    }
}

/// O0.2, P6.5.4.
#[test]
fn a_session_in_which_the_tokens_of_two_machines_are_swapped_is_refused() {
    for token in TOKENS {
        let (one, other) = twins();
        let (us, them) = (one.identity(), other.identity());
        swap(&one, &other, token);
        assert_refused(offered(&one), us, them);
        assert_refused(offered(&other), them, us);
    }
}

/// O0.2, P6.5.4.
#[test]
fn so_is_one_in_which_all_of_them_are_swapped_with_the_memory() {
    let (one, other) = twins();
    let (us, them) = (one.identity(), other.identity());
    TOKENS.into_iter().for_each(|token| swap(&one, &other, token));
    let [ours, theirs] = swap_regions(&one, &other);
    assert_refused(ours, us, them);
    assert_refused(theirs, them, us);
}

#[test]
fn swapped_twice_they_are_what_they_were() {
    let (mut one, other) = twins();
    for _ in 0..2 {
        TOKENS.into_iter().for_each(|token| swap(&one, &other, token));
    }
    for _ in 0..2 {
        swap_regions(&one, &other);
    }
    assert_states(&claim(&mut one, 3), &[name("vcpu0")], 5000, 3);
}
