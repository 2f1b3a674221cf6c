//! Lives of one arena, each in a process of its own.
//!
//! A test that needs a later life starts its own program again, for itself alone, with a channel as standard input, by
//! which it sends the regions. That a life has run shows in the number of the update that it published.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use abi::kho::SubtreeName;
use abi::vm::Identity;
use fdpass::Channel;
use fdpass::Deadline;
use kho::Kho;
use pages::PageRange;
use region::Arena;
use region::Region;
use tideover_luo::Errno;
use tideover_luo::File;
use tideover_luo::Handlers;
use tideover_luo::Luo;
use tideover_luo::RetrieveError;
use tideover_luo::SessionName;
use tideover_luo::Token;

use crate::in_kernel;
use crate::memfd::KIND;
use crate::memfd::Memfd;
use crate::memfd::MemfdHandler;

/// Says which life a process is; not set in the first.
const LIFE: &str = "TIDEOVER_TEST_LIFE";
/// Frames of region 0.
const FRAMES: u64 = 8192;
/// Guest memory, which begins at this address.
pub(crate) const GUEST: u64 = 1 << 30;
const GUEST_BYTES: u64 = 64 << 20;

pub(crate) fn name(text: &str) -> SessionName {
    SessionName::new(text.as_bytes()).unwrap()
}

/// Memfds, and the three objects that every file of the kernel's test shares.
fn handlers() -> Handlers {
    let mut handlers = Handlers::default();
    handlers.register(MemfdHandler).unwrap();
    for object in in_kernel::objects() {
        handlers.register_shared(&KIND, &object).unwrap();
    }
    handlers
}

/// The memory that goes from life to life.
pub(crate) struct Memory {
    arena: Arena,
}

impl Memory {
    fn of(regions: [Region; 2]) -> Self {
        let [metadata, guest] = regions.map(|region| Arc::new(region.map().unwrap()));
        let mut arena = Arena::new(metadata);
        let range = PageRange::of_bytes(GUEST, GUEST_BYTES).unwrap();
        arena.place(range, guest).map_err(drop).unwrap();
        Self { arena }
    }

    fn make() -> Self {
        let sizes = [FRAMES * 4096, GUEST_BYTES];
        Self::of(sizes.map(|len_bytes| Region::create("selftest", len_bytes).unwrap()))
    }

    fn receive() -> Self {
        let channel = Channel::from_stdin().unwrap();
        let message = channel.receive(16, 2, soon()).unwrap();
        let fds: [OwnedFd; 2] = message.fds.try_into().unwrap();
        let sizes = [FRAMES * 4096, GUEST_BYTES];
        let mut regions =
            fds.into_iter().zip(sizes).map(|(fd, len_bytes)| Region::accept("selftest", fd, len_bytes));
        Self::of([(); 2].map(|()| regions.next().unwrap().unwrap()))
    }

    fn send(&self, channel: &Channel) {
        let regions = self.arena.regions();
        let fds: Vec<BorrowedFd<'_>> = regions.iter().map(|placed| placed.mapping.region().as_fd()).collect();
        channel.send(b"regions", &fds, soon()).unwrap();
    }

    /// What a process finds that looks now.
    pub(crate) fn attach(&self) -> Kho {
        Kho::attach(Box::new(self.arena.clone())).unwrap()
    }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// One process's part.
pub(crate) struct Life {
    pub(crate) arena: Arena,
    pub(crate) kho: Kho,
    pub(crate) luo: Luo,
}

impl Life {
    /// The first life of new memory.
    pub(crate) fn first() -> Self {
        Self::first_of(&Memory::make())
    }

    fn first_of(memory: &Memory) -> Self {
        let arena = memory.arena.clone();
        let kho = Kho::format(Box::new(arena.clone()), Identity::new([7; 16]), FRAMES).unwrap();
        Self { arena, kho, luo: Luo::new(handlers()) }
    }

    fn later(memory: &Memory) -> Self {
        let mut kho = memory.attach();
        let luo = Luo::attach(&mut kho, handlers()).unwrap();
        Self { arena: memory.arena.clone(), kho, luo }
    }

    pub(crate) fn create(&mut self, session: &str) {
        self.luo.create_session(name(session)).unwrap();
    }

    pub(crate) fn try_preserve(&mut self, session: &str, token: u64, file: &File) -> Result<(), Errno> {
        let preserved = self.luo.preserve(&mut self.kho, name(session), Token(token), Arc::clone(file));
        preserved.map_err(|error| error.errno())
    }

    /// Preserves a memfd with a text; who calls has let it go.
    pub(crate) fn preserve(&mut self, session: &str, token: u64, text: &str) {
        self.try_preserve(session, token, &Memfd::with(text)).unwrap();
    }

    pub(crate) fn close(&mut self, session: &str) {
        self.luo.drop_session(&mut self.kho, name(session)).unwrap();
    }

    pub(crate) fn retrieve(&mut self, session: &str, token: u64) -> Result<File, RetrieveError> {
        self.luo.retrieve(&mut self.kho, name(session), Token(token))
    }

    /// The text of a memfd that was received.
    pub(crate) fn text(&mut self, session: &str, token: u64) -> String {
        Memfd::of(&self.retrieve(session, token).unwrap()).text()
    }

    pub(crate) fn finish(&mut self, session: &str) {
        self.luo.finish(&mut self.kho, name(session)).unwrap();
    }

    pub(crate) fn publish(&mut self) {
        self.luo.publish(&mut self.kho).unwrap();
    }

    /// The update: the last callbacks, and the state is what the next life finds.
    fn end(mut self) {
        self.luo.freeze(&mut self.kho).unwrap();
        self.publish();
    }
}

/// Number of the update that was published last.
fn number(memory: &Memory) -> u64 {
    let kho = memory.attach();
    let subtree = kho.subtree(&SubtreeName::literal(abi::luo::SUBTREE)).unwrap();
    abi::luo::Luo::read(&kho.memory(), subtree.data, subtree.size).unwrap().liveupdate_num
}

fn run_in_another_process(test: &str, life: usize, memory: &Memory) {
    let (channel, theirs) = Channel::pair().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(LIFE, life.to_string());
    let mut child = command.stdin(Stdio::from(theirs.into_stdio())).stdout(Stdio::null()).spawn().unwrap();
    drop(command);
    memory.send(&channel);
    assert!(child.wait().unwrap().success(), "life {life} of {test}");
    assert_eq!(number(memory), life as u64 + 1, "life {life} of {test} has published");
}

/// Runs the lives of one arena after each other, the first one here and each other in a process of its own, with an update
/// between; gives the memory as the last one left it. `test` is the path of the test that calls.
///
/// It does not return in those processes, which run the same test.
pub(crate) fn lives(test: &str, lives: &[fn(&mut Life)]) -> Memory {
    if let Ok(which) = std::env::var(LIFE) {
        let mut life = Life::later(&Memory::receive());
        lives[which.parse::<usize>().unwrap()](&mut life);
        life.end();
        std::process::exit(0);
    }
    let memory = Memory::make();
    let mut first = Life::first_of(&memory);
    lives[0](&mut first);
    first.end();
    for life in 1..lives.len() {
        run_in_another_process(test, life, &memory);
    }
    memory
}

/// Bytes of metadata of an arena that has no session.
pub(crate) fn empty_bytes() -> u64 {
    let mut life = Life::first();
    life.publish();
    life.kho.used_bytes()
}
