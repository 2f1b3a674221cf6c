//! Guest memory from one life to the next, and records that are of no such memory.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::os::fd::AsFd;
use std::sync::Arc;

use abi::gmem::Extent;
use abi::gmem::GmemRecord;
use abi::gmem::MemoryName;
use abi::gmem::flags;
use abi::luo::SessionName;
use abi::vm::Identity;
use kho::Kho;
use luo::Context;
use luo::Errno;
use luo::File;
use luo::Handler;
use luo::Handlers;
use luo::Luo;
use luo::Token;
use pages::PageRange;
use region::Arena;
use region::Mapping;
use region::Region;
use tideover_gmem::ChangeError;
use tideover_gmem::GmemHandler;
use tideover_gmem::Inode;
use tideover_gmem::Sharing;

const MIB: u64 = 1 << 20;
const OURS: Identity = Identity::new([1; 16]);
const THEIRS: Identity = Identity::new([2; 16]);
const SESSION: SessionName = SessionName::literal("machine");
const RAM: Token = Token(7);

fn mapping(bytes: u64) -> Arc<Mapping> {
    Arc::new(Region::create("preserved", bytes).unwrap().map().unwrap())
}

fn frames(size_bytes: u64) -> PageRange {
    PageRange::of_bytes(1 << 30, size_bytes).unwrap()
}

/// An arena of 256 frames of metadata and 4 MiB of guest memory, preserved nowhere yet.
struct Life {
    arena: Arena,
    kho: Kho,
    inode: Arc<Inode>,
}

fn first_life() -> Life {
    let mut arena = Arena::new(mapping(MIB));
    let ram = mapping(4 * MIB);
    arena.place(frames(4 * MIB), Arc::clone(&ram)).unwrap();
    let kho = Kho::format(Box::new(arena.clone()), OURS, 256).unwrap();
    let inode = Inode::new(MemoryName::literal("ram"), OURS, ram, frames(4 * MIB), flags::MMAP);
    Life { arena, kho, inode }
}

fn luo(arena: &Arena, known: Vec<Arc<Inode>>) -> Luo {
    Luo::new(handlers(arena, known))
}

fn handlers(arena: &Arena, known: Vec<Arc<Inode>>) -> Handlers {
    let mut handlers = Handlers::default();
    handlers.register(GmemHandler::new(arena.clone(), known)).unwrap();
    handlers
}

fn inode_of(file: File) -> Arc<Inode> {
    file.downcast::<Inode>().unwrap()
}

/// R1.5, R1.11, R1.14, O1.8.
#[test]
fn memory_is_retrieved_as_it_was_preserved() {
    let Life { arena, mut kho, inode } = first_life();
    inode.mapping().write(3 * MIB, b"kept").unwrap();
    let mut first = luo(&arena, vec![Arc::clone(&inode)]);
    first.create_session(SESSION).unwrap();
    first.preserve(&mut kho, SESSION, RAM, Arc::clone(&inode) as File).unwrap();
    assert!(kho.is_preserved(inode.frames()));
    first.publish(&mut kho).unwrap();

    let mut kho = Kho::attach(Box::new(arena.clone())).unwrap();
    let mut second = Luo::attach(&mut kho, handlers(&arena, vec![])).unwrap();
    let retrieved = inode_of(second.retrieve(&mut kho, SESSION, RAM).unwrap());
    assert_eq!(retrieved.name(), inode.name());
    assert_eq!(retrieved.identity(), inode.identity());
    assert_eq!(retrieved.flags(), inode.flags());
    assert_eq!(retrieved.frames(), inode.frames());
    assert_eq!(retrieved.size_bytes(), inode.size_bytes());
    let mut read = [0; 4];
    retrieved.mapping().read(3 * MIB, &mut read).unwrap();
    assert_eq!(&read, b"kept");
}

/// R4.2, R4.3, O1.11.
#[test]
fn one_memory_has_one_inode_however_often_it_is_retrieved() {
    let Life { arena, mut kho, inode } = first_life();
    let mut first = luo(&arena, vec![]);
    first.create_session(SESSION).unwrap();
    first.preserve(&mut kho, SESSION, RAM, Arc::clone(&inode) as File).unwrap();
    first.publish(&mut kho).unwrap();
    let mut kho = Kho::attach(Box::new(arena.clone())).unwrap();
    let mut second = Luo::attach(&mut kho, handlers(&arena, vec![Arc::clone(&inode)])).unwrap();
    let retrieved = inode_of(second.retrieve(&mut kho, SESSION, RAM).unwrap());
    assert!(Arc::ptr_eq(&retrieved, &inode), "the one in use, so that its freeze is a freeze of both");
}

/// O1.11, H3.1.3.
#[test]
fn memory_is_preserved_once() {
    let Life { arena, mut kho, inode } = first_life();
    let mut luo = luo(&arena, vec![]);
    luo.create_session(SESSION).unwrap();
    luo.preserve(&mut kho, SESSION, RAM, Arc::clone(&inode) as File).unwrap();
    let twice = luo.preserve(&mut kho, SESSION, Token(8), Arc::clone(&inode) as File).unwrap_err();
    assert_eq!(twice.errno(), Errno::EBUSY);
    let alias = Inode::new(inode.name(), OURS, Arc::clone(inode.mapping()), inode.frames(), flags::MMAP);
    let aliased = luo.preserve(&mut kho, SESSION, Token(9), alias as File).unwrap_err();
    assert_eq!(aliased.errno(), Errno::EBUSY, "another inode of the same frames");
}

/// R1.7, R3.7, O0.2, O1.12.
#[test]
fn memory_of_another_machine_is_not_preserved() {
    let Life { arena, mut kho, inode } = first_life();
    let used = kho.used_bytes();
    let theirs = Inode::new(inode.name(), THEIRS, Arc::clone(inode.mapping()), inode.frames(), flags::MMAP);
    let mut luo = luo(&arena, vec![]);
    luo.create_session(SESSION).unwrap();
    let refused = luo.preserve(&mut kho, SESSION, RAM, theirs as File).unwrap_err();
    assert_eq!(refused.errno(), Errno::EINVAL);
    assert!(!kho.is_preserved(inode.frames()));
    assert_eq!(kho.used_bytes(), used);
}

/// R1.2, O1.1, H3.1.4.
#[test]
fn what_is_no_guest_memory_has_no_handler() {
    let Life { arena, mut kho, inode } = first_life();
    let mut luo = luo(&arena, vec![]);
    luo.create_session(SESSION).unwrap();
    let strangers: [File; 3] = [Arc::new(7_u64), Arc::new("ram"), Arc::clone(inode.mapping()) as File];
    for stranger in strangers {
        assert_eq!(luo.preserve(&mut kho, SESSION, RAM, stranger).unwrap_err().errno(), Errno::ENOENT);
    }
    luo.preserve(&mut kho, SESSION, RAM, inode as File).unwrap();
}

/// R1.2, O1.6.
#[test]
fn memory_of_which_some_is_private_has_no_handler_and_is_not_handed_over() {
    let Life { arena, mut kho, inode } = first_life();
    let mut luo = luo(&arena, vec![]);
    luo.create_session(SESSION).unwrap();
    inode.converted(MIB, 4096, Sharing::Private).unwrap();
    let refused = luo.preserve(&mut kho, SESSION, RAM, Arc::clone(&inode) as File).unwrap_err();
    assert_eq!(refused.errno(), Errno::ENOENT);
    inode.converted(MIB, 4096, Sharing::Shared).unwrap();
    luo.preserve(&mut kho, SESSION, RAM, Arc::clone(&inode) as File).unwrap();

    inode.converted(MIB, 4096, Sharing::Private).unwrap();
    let freeze = inode.freeze().unwrap();
    assert_eq!(luo.freeze(&mut kho).unwrap_err().errno(), Errno::EOPNOTSUPP);
    drop(freeze);
    assert!(!inode.is_frozen(), "it is as it was");
    inode.converted(MIB, 4096, Sharing::Shared).unwrap();
    let _frozen = inode.freeze().unwrap();
    luo.freeze(&mut kho).unwrap();
}

/// R1.7.
#[test]
fn without_room_for_its_record_memory_is_not_preserved_and_can_be_later() {
    let Life { arena, mut kho, inode } = first_life();
    let mut luo = luo(&arena, vec![]);
    luo.create_session(SESSION).unwrap();
    let mut ballast = Vec::new();
    while let Ok(page) = kho.allocate(1) {
        ballast.push(page);
    }
    let used = kho.used_bytes();
    let refused = luo.preserve(&mut kho, SESSION, RAM, Arc::clone(&inode) as File).unwrap_err();
    assert_eq!(refused.errno(), Errno::ENOMEM);
    assert!(!kho.is_preserved(inode.frames()));
    assert_eq!(kho.used_bytes(), used);
    inode.allocate(0, MIB).unwrap();
    inode.punch(0, MIB).unwrap();

    ballast.into_iter().for_each(|page| kho.free(page));
    kho.commit().unwrap();
    luo.preserve(&mut kho, SESSION, RAM, Arc::clone(&inode) as File).unwrap();
    assert!(kho.is_preserved(inode.frames()));
}

/// R1.3.
#[test]
fn only_frozen_memory_is_handed_over() {
    let Life { arena, mut kho, inode } = first_life();
    let mut luo = luo(&arena, vec![]);
    luo.create_session(SESSION).unwrap();
    luo.preserve(&mut kho, SESSION, RAM, Arc::clone(&inode) as File).unwrap();
    assert_eq!(luo.freeze(&mut kho).unwrap_err().errno(), Errno::EBUSY);
    let freeze = inode.freeze().unwrap();
    luo.freeze(&mut kho).unwrap();
    luo.unfreeze(&mut kho);
    drop(freeze);
    assert_eq!(luo.freeze(&mut kho).unwrap_err().errno(), Errno::EBUSY);
}

/// R1.3, O1.11.
#[test]
fn what_is_handed_over_stays_frozen_whoever_ends_the_freeze() {
    let Life { arena, mut kho, inode } = first_life();
    let mut luo = luo(&arena, vec![]);
    luo.create_session(SESSION).unwrap();
    luo.preserve(&mut kho, SESSION, RAM, Arc::clone(&inode) as File).unwrap();
    drop({
        let freeze = inode.freeze().unwrap();
        luo.freeze(&mut kho).unwrap();
        freeze
    });
    assert!(matches!(inode.punch(0, 4096), Err(ChangeError::Frozen { .. })));
    luo.unfreeze(&mut kho);
    inode.punch(0, 4096).unwrap();

    let freeze = inode.freeze().unwrap();
    luo.freeze(&mut kho).unwrap();
    drop(freeze);
    luo.drop_session(&mut kho, SESSION).unwrap();
    inode.punch(0, 4096).unwrap();
}

/// R1.10.
#[test]
fn a_dropped_session_leaves_no_marks_and_no_record() {
    let Life { arena, mut kho, inode } = first_life();
    let mut luo = luo(&arena, vec![]);
    luo.publish(&mut kho).unwrap();
    let used = kho.used_bytes();
    inode.mapping().store(MIB, 7).unwrap();
    luo.create_session(SESSION).unwrap();
    luo.preserve(&mut kho, SESSION, RAM, Arc::clone(&inode) as File).unwrap();
    luo.publish(&mut kho).unwrap();
    luo.drop_session(&mut kho, SESSION).unwrap();
    assert!(!kho.is_preserved(inode.frames()));
    assert_eq!(inode.mapping().load(MIB).unwrap(), 7);
    inode.punch(MIB, 4096).unwrap();
    assert_eq!(inode.mapping().load(MIB).unwrap(), 0, "it is memory like any other");
    luo.publish(&mut kho).unwrap();
    assert_eq!(kho.used_bytes(), used);
    luo.create_session(SESSION).unwrap();
    luo.preserve(&mut kho, SESSION, RAM, Arc::clone(&inode) as File).unwrap();
}

/// Finishes a received session, with or without a retrieve before. Gives the bytes that are left of 8 KiB.
fn finish(retrieve: bool) -> Option<u64> {
    let Life { arena, mut kho, inode } = first_life();
    let mut first = luo(&arena, vec![]);
    first.publish(&mut kho).unwrap();
    let used = kho.used_bytes();
    first.create_session(SESSION).unwrap();
    first.preserve(&mut kho, SESSION, RAM, Arc::clone(&inode) as File).unwrap();
    first.publish(&mut kho).unwrap();
    inode.allocate(MIB, 8192).unwrap();
    let outside = inode.mapping().region().as_fd().try_clone_to_owned().unwrap();
    let outside = Region::accept("outside", outside, 4 * MIB).unwrap();

    let mut kho = Kho::attach(Box::new(arena.clone())).unwrap();
    let mut second = Luo::attach(&mut kho, handlers(&arena, vec![])).unwrap();
    let file = retrieve.then(|| second.retrieve(&mut kho, SESSION, RAM).unwrap());
    let finished = second.finish(&mut kho, SESSION).unwrap();
    assert_eq!(finished.unclaimed, if retrieve { vec![] } else { vec![RAM] });
    assert!(!kho.is_preserved(inode.frames()));
    second.publish(&mut kho).unwrap();
    assert_eq!(Kho::attach(Box::new(arena)).unwrap().used_bytes(), used, "the record's frame is free");
    if let Some(file) = file {
        second.create_session(SESSION).unwrap();
        second.preserve(&mut kho, SESSION, RAM, file).unwrap();
    }
    outside.allocated_bytes().unwrap()
}

/// R1.13, H3.6.2.
#[test]
fn what_was_retrieved_lives_on_after_finish_and_can_be_preserved_again() {
    assert_eq!(finish(true), Some(8192));
}

/// R1.13, R3.2, R3.9.
#[test]
fn what_nobody_retrieved_is_freed_at_finish() {
    assert_eq!(finish(false), Some(0));
}

fn record(inode: &Inode) -> GmemRecord {
    GmemRecord {
        identity: OURS,
        name: inode.name(),
        size_bytes: inode.size_bytes(),
        flags: flags::MMAP,
        extents: vec![Extent { index: 0, frames: inode.frames() }],
    }
}

/// What retrieving `record` says, in an arena where all guest memory is preserved.
fn retrieve(change: impl FnOnce(&mut GmemRecord)) -> Result<File, Errno> {
    let Life { arena, mut kho, inode } = first_life();
    kho.preserve(inode.frames()).unwrap();
    let mut record = record(&inode);
    change(&mut record);
    let data = kho.store(&record.encode()).unwrap().start().address();
    let handler = GmemHandler::new(arena, vec![]);
    handler.retrieve(&mut Context::new(&mut kho, SESSION), data).map_err(|error| error.errno())
}

#[test]
fn a_record_of_whole_memory_is_retrieved() {
    assert_eq!(inode_of(retrieve(|_| {}).unwrap()).frames(), frames(4 * MIB));
}

/// R1.11, O0.2, H3.9.2.
#[test]
fn a_record_of_another_machine_is_refused() {
    assert_eq!(retrieve(|record| record.identity = THEIRS).unwrap_err(), Errno::EINVAL);
}

/// R1.8, O1.14.
#[test]
fn a_record_that_is_not_one_whole_region_is_refused() {
    let part = |offset: u64, bytes: u64| PageRange::of_bytes((1 << 30) + offset, bytes).unwrap();
    let extent = |page: u64, frames| Extent { index: page, frames };
    let cases = [
        ("two extents", vec![extent(0, part(0, 2 * MIB)), extent(512, part(2 * MIB, 2 * MIB))]),
        ("no extent", vec![]),
        ("not from its start", vec![extent(1, part(0, 4 * MIB - 4096))]),
        ("half of the region", vec![extent(0, part(0, 2 * MIB))]),
        ("the region's other half", vec![extent(0, part(2 * MIB, 2 * MIB))]),
        ("no region", vec![extent(0, PageRange::of_bytes(2 << 30, 4 * MIB).unwrap())]),
        ("the metadata", vec![extent(0, PageRange::of_bytes(4096, MIB - 4096).unwrap())]),
    ];
    for (what, extents) in cases {
        assert_eq!(retrieve(|record| record.extents = extents).unwrap_err(), Errno::EINVAL, "{what}");
    }
    let larger = retrieve(|record| record.size_bytes += 4096).unwrap_err();
    assert_eq!(larger, Errno::EINVAL, "a size that is not the region's");
}

/// R1.11.
#[test]
fn a_record_of_memory_that_is_not_preserved_is_refused() {
    let Life { arena, mut kho, inode } = first_life();
    let data = kho.store(&record(&inode).encode()).unwrap().start().address();
    let handler = GmemHandler::new(arena, vec![]);
    let refused = handler.retrieve(&mut Context::new(&mut kho, SESSION), data);
    assert_eq!(refused.unwrap_err().errno(), Errno::EINVAL);
}

/// O1.9.
#[test]
fn the_region_of_the_metadata_is_no_guest_memory() {
    let Life { arena, mut kho, .. } = first_life();
    let whole = PageRange::of_bytes(0, MIB).unwrap();
    let inode = Inode::new(MemoryName::literal("ram"), OURS, mapping(MIB), whole, flags::MMAP);
    let mut luo = luo(&arena, vec![]);
    luo.create_session(SESSION).unwrap();
    assert!(luo.preserve(&mut kho, SESSION, RAM, inode as File).is_err());
}

#[test]
fn what_is_no_record_frees_nothing_when_it_is_finished() {
    let Life { arena, mut kho, .. } = first_life();
    let stranger = kho.store(b"somebody else's").unwrap();
    kho.commit().unwrap();
    let used = kho.used_bytes();
    let handler = GmemHandler::new(arena, vec![]);
    let mut context = Context::new(&mut kho, SESSION);
    handler.finish(&mut context, None, stranger.start().address());
    kho.commit().unwrap();
    assert_eq!(kho.used_bytes(), used);
}
