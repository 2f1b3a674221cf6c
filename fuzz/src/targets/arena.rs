//! An arena: its first page, and the whole of it as a successor finds it.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use abi::Memory;
use abi::MemoryMut;
use abi::NoMemory;
use abi::arena::Header;
use abi::arena::OWNERSHIP_ADDRESS;
use abi::arena::OwnershipWord;
use abi::arena::RootSlot;
use abi::vm::Identity;
use kho::Kho;
use kho::Tree;
use luo::Compatible;
use luo::Context;
use luo::File;
use luo::FileId;
use luo::Handler;
use luo::HandlerError;
use luo::Handlers;
use luo::Luo;
use luo::SessionName;
use luo::Token;
use pages::PAGE_SIZE;
use pages::PageRange;
use survey::Options;
use survey::Root;
use survey::Survey;

use crate::memory::Pages;

/// The first page: header, root slots, ownership word.
pub(crate) fn header(input: &[u8]) -> bool {
    let (_, memory) = Pages::of(input);
    let header = Header::read(&memory);
    if let Ok(header) = &header {
        assert_eq!(*header, Header::new(header.identity(), header.frames()), "one header, one encoding");
    }
    let slot = RootSlot::read(&memory);
    let mut word = [0; 8];
    if memory.read(OWNERSHIP_ADDRESS, &mut word).is_ok() {
        let bits = u64::from_le_bytes(word);
        if let Ok(word) = OwnershipWord::from_bits(bits) {
            assert_eq!(OwnershipWord::new(word.epoch(), word.state(), word.nonce()).bits(), bits);
        }
    }
    header.is_ok() && slot.is_ok()
}

/// All that a process reads that takes an arena over; and what was taken can be written to and read again.
pub(crate) fn attach(input: &[u8]) -> bool {
    let (_, pages) = Pages::of(input);
    let arena = Shared(Arc::new(Mutex::new(pages)));
    let Ok(mut kho) = Kho::attach(Box::new(arena.clone())) else { return false };
    let Ok(mut luo) = Luo::attach(&mut kho, handlers()) else { return true };
    for session in luo.incoming_sessions().collect::<Vec<_>>() {
        for token in luo.tokens(session).collect::<Vec<_>>() {
            let _ = luo.retrieve(&mut kho, session, token);
        }
        let _ = luo.finish(&mut kho, session);
    }
    // There need not be room for it.
    if luo.publish(&mut kho).is_ok() && kho.commit().is_ok() {
        let tree = Tree::read(&arena).map(|tree| tree.slot.generation());
        assert_eq!(tree, Ok(kho.generation()), "what was committed can be read");
    }
    true
}

/// Memory that outlives who writes it.
#[derive(Debug, Clone)]
struct Shared(Arc<Mutex<Pages>>);

impl Memory for Shared {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(address, into)
    }

    fn runs(&self) -> Vec<PageRange> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).runs()
    }
}

impl MemoryMut for Shared {
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), NoMemory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(address, bytes)
    }

    fn order_writes(&mut self) {}
}

/// A file of a page of its own, which it adopts as every handler of ours does.
struct Paged;

const PAGED: Compatible = Compatible::literal("paged");

impl Paged {
    fn page(data: u64) -> Result<PageRange, HandlerError> {
        PageRange::of_bytes(data, PAGE_SIZE).map_err(|error| HandlerError::new(luo::Errno::EIO, error))
    }
}

impl Handler for Paged {
    fn compatible(&self) -> Compatible {
        PAGED
    }

    fn can_preserve(&self, file: &File) -> bool {
        file.is::<u64>()
    }

    fn id(&self, _: &File) -> FileId {
        FileId::fresh()
    }

    fn preserve(&self, context: &mut Context<'_>, _: &File) -> Result<u64, HandlerError> {
        let stored = context.kho.store(b"a page");
        stored
            .map(|range| range.start().address())
            .map_err(|error| HandlerError::new(luo::Errno::ENOMEM, error))
    }

    fn unpreserve(&self, context: &mut Context<'_>, _: &File, data: u64) {
        Self::page(data).into_iter().for_each(|range| context.kho.free(range));
    }

    fn freeze(&self, _: &mut Context<'_>, _: &File, data: u64) -> Result<u64, HandlerError> {
        Ok(data)
    }

    fn unfreeze(&self, _: &mut Context<'_>, _: &File, data: u64) -> u64 {
        data
    }

    fn retrieve(&self, context: &mut Context<'_>, data: u64) -> Result<File, HandlerError> {
        let adopted = context.kho.adopt("paged", Self::page(data)?);
        adopted.map_err(|error| HandlerError::new(luo::Errno::EIO, error))?;
        Ok(Arc::new(data))
    }

    fn can_finish(&self, _: Option<&File>) -> bool {
        true
    }

    fn finish(&self, context: &mut Context<'_>, file: Option<&File>, data: u64) {
        // What was not retrieved was not adopted, and is left where it is.
        if file.is_some() {
            self.unpreserve(context, &(Arc::new(data) as File), data);
        }
    }
}

fn handlers() -> Handlers {
    let mut handlers = Handlers::default();
    // There is no other.
    let _ = handlers.register(Paged);
    handlers
}

/// A state made out whole, past what is wrong with it, as `tideover inspect` does: from the arena, or from the root FDT alone as
/// of a kernel. Of a running one, in parts, if the input says so.
pub(crate) fn survey(input: &[u8]) -> bool {
    let (flags, memory) = Pages::of(input);
    let flag = |bit: u8| flags.rest() & bit != 0;
    let root = match RootSlot::read(&memory) {
        Ok(slot) if flag(1) => Root::Fdt(slot.fdt()),
        _ if flag(2) => Root::Fdt(PAGE_SIZE),
        _ => Root::Arena,
    };
    let survey = Survey::read(&memory, &root, Options { running: flag(4), partial: flag(8) });
    let folios = survey::folios(&memory, &survey);
    for session in survey.luo.iter().flat_map(|luo| &luo.sessions) {
        for file in &session.files {
            let mut count = 0u64;
            folios.list(file, &mut |_| count += 1);
            assert!(count <= 1 << 20, "no more folios than the lists in these pages can hold");
        }
    }
    // What it gives is shown, whatever it is.
    assert!(serde_json::to_string(&survey).is_ok_and(|json| json.len() < 16 << 20));
    survey.kho.is_some_and(|kho| kho.preserved_bytes.is_some())
}

/// Arenas, and the same as states of a kernel.
pub(crate) fn survey_seeds() -> Vec<Vec<u8>> {
    let as_kernel = |mut seed: Vec<u8>| {
        seed.iter_mut().take(1).for_each(|flags| *flags |= 1 << 1);
        seed
    };
    seeds().into_iter().chain(seeds().into_iter().map(as_kernel)).collect()
}

/// Arenas as they are committed: without anything, with guest memory, with sessions.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let arena = |frames: u64, fill: &dyn Fn(&mut Kho)| {
        let guest = Pages::default().blank(1 << 18..(1 << 18) + 2);
        let memory = Shared(Arc::new(Mutex::new(guest.blank(0..frames))));
        let Ok(mut kho) = Kho::format(Box::new(memory.clone()), Identity::new([9; 16]), frames) else {
            return Vec::new();
        };
        fill(&mut kho);
        // It is read as it is: a seed that does not attach is what a test of this crate notices.
        let _ = kho.commit();
        memory.0.lock().unwrap_or_else(PoisonError::into_inner).input(1)
    };
    let guest = |kho: &mut Kho| {
        let _ = PageRange::of_bytes(1 << 30, 2 * PAGE_SIZE).map(|range| kho.preserve(range));
    };
    let sessions = |names: &'static [&'static str], files: u64| {
        move |kho: &mut Kho| {
            let mut luo = Luo::new(handlers());
            for name in names {
                let name = SessionName::literal(name);
                let _ = luo.create_session(name);
                for token in 0..files {
                    let _ = luo.preserve(kho, name, Token(token), Arc::new(token));
                }
            }
            let _ = luo.publish(kho);
        }
    };
    vec![
        arena(12, &|_| ()),
        arena(16, &guest),
        arena(24, &sessions(&["a"], 1)),
        arena(40, &sessions(&["vm-a", "vm-b"], 3)),
    ]
}
