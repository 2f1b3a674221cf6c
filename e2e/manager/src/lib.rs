//! Plays the service manager for tests: takes what a service tells it, keeps its descriptors, and starts services with
//! them, as systemd does. What systemd itself does is tested with systemd itself, by `cargo xtask e2e`.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a failed unwrap in what only tests use is the test's failure")]

use std::fs;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::thread;
use std::thread::JoinHandle;

use rustix::cmsg_space;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::recvmsg;

/// Ends the thread that listens.
const END: &[u8] = b"END";
/// It has come as far as this.
const HERE: &[u8] = b"HERE";
/// The highest number that a shell can redirect, of those that are passed.
const LAST_PASSED: usize = 9;

/// What a service manager has.
#[derive(Debug, Default)]
struct State {
    /// `FileDescriptorStoreMax=`
    room: usize,
    stored: Vec<(String, OwnedFd)>,
    /// Copies of what it kept when the last command was made.
    passed: Vec<OwnedFd>,
    /// How often it has come [`HERE`].
    here: usize,
    /// All lines that were not about the store.
    told: Vec<String>,
}

/// A service manager of one service. Its end closes what it keeps.
#[derive(Debug)]
pub struct Manager {
    folder: PathBuf,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

impl Manager {
    /// One that keeps at most `room` descriptors.
    pub fn start(room: usize) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("tideover-manager-{}-{number}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&folder).unwrap();
        let socket = UnixDatagram::bind(folder.join("notify")).unwrap();
        let state = Arc::new(Mutex::new(State { room, ..State::default() }));
        let of_thread = Arc::clone(&state);
        let thread = thread::spawn(move || while take_one(&socket, &of_thread) {});
        Self { folder, state, thread: Some(thread) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it has heard all that it was told so far: as a manager has, when it starts a process after another one's end.
    fn catch_up(&self) {
        let before = self.state().here;
        let told = UnixDatagram::unbound().and_then(|socket| socket.send_to(HERE, self.address()));
        while told.is_ok() && self.state().here == before {
            thread::yield_now();
        }
    }

    /// A folder of its own, which is gone when it ends.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where it listens.
    pub fn address(&self) -> PathBuf {
        self.folder.join("notify")
    }

    /// From now on it keeps at most so many.
    pub fn set_room(&self, room: usize) {
        self.state().room = room;
    }

    /// It closes all that it keeps.
    pub fn drop_all(&self) {
        let mut state = self.state();
        state.stored.clear();
        state.passed.clear();
    }

    /// Names of what it keeps, in the order in which it came.
    pub fn stored(&self) -> Vec<String> {
        self.state().stored.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Copies of what it keeps, with their names.
    pub fn copies(&self) -> Vec<(String, OwnedFd)> {
        self.state().stored.iter().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap())).collect()
    }

    /// Lines that it was told, but for those about descriptors.
    pub fn told(&self) -> Vec<String> {
        self.state().told.clone()
    }

    /// A program that it starts as the service, once the command is run: its address in the environment, and copies of what
    /// it keeps now as descriptors from 3 on.
    ///
    /// They are opened anew, so that they are other descriptions of the same files: this works with files in memory.
    ///
    /// # Panics
    /// If it keeps more than a shell can pass.
    pub fn command(&self, program: &Path) -> Command {
        self.catch_up();
        let mut state = self.state();
        assert!(
            state.stored.len() <= LAST_PASSED - 2,
            "a shell cannot pass {} descriptors",
            state.stored.len()
        );
        // What is taken out of the store before the shell gets to open it is to be there all the same.
        let copies = state.stored.iter().map(|(_, fd)| fd.try_clone());
        state.passed =
            copies.collect::<Result<_, _>>().unwrap_or_else(|error| panic!("no descriptor is left: {error}"));
        let own = std::process::id();
        let redirect =
            |(place, fd): (usize, &OwnedFd)| format!(" {}<>/proc/{own}/fd/{}", place + 3, fd.as_raw_fd());
        let redirected: String = state.passed.iter().enumerate().map(redirect).collect();
        let names: Vec<&str> = state.stored.iter().map(|(name, _)| name.as_str()).collect();
        let mut command = Command::new("/bin/sh");
        command.env("NOTIFY_SOCKET", self.address());
        let pid = if names.is_empty() { "" } else { "LISTEN_PID=$$ " };
        command.args(["-c", &format!("{pid}exec \"$0\" \"$@\"{redirected}")]).arg(program);
        if !names.is_empty() {
            command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
        command
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        // What fails here leaves a thread or a folder behind, until the test ends.
        let ended = UnixDatagram::unbound().and_then(|socket| socket.send_to(END, self.address()));
        if let (Ok(_), Some(thread)) = (ended, self.thread.take()) {
            let _ = thread.join();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Takes one message; `false` if it was the last.
fn take_one(socket: &UnixDatagram, state: &Mutex<State>) -> bool {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(16))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC);
    let Ok(received) = received else { return false };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            fds.extend(came);
        }
    }
    let bytes = &bytes[..received.bytes];
    if bytes == END {
        return false;
    }
    if bytes == HERE {
        state.lock().unwrap_or_else(PoisonError::into_inner).here += 1;
        return true;
    }
    let text = String::from_utf8_lossy(bytes);
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let name = value("FDNAME").unwrap_or("stored").to_owned();
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    match (value("BARRIER"), value("FDSTORE"), value("FDSTOREREMOVE")) {
        // Its descriptor is closed at the end, as any that is not kept.
        (Some("1"), ..) => {}
        (_, Some("1"), _) => {
            let room = state.room.saturating_sub(state.stored.len());
            state.stored.extend(fds.into_iter().take(room).map(|fd| (name.clone(), fd)));
        }
        (.., Some("1")) => state.stored.retain(|(stored, _)| *stored != name),
        _ => state.told.extend(text.lines().map(str::to_owned)),
    }
    true
}
