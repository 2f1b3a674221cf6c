//! Who looks at the guest's serial line.
//!
//! The guest's output goes into memory on the thread of its vCPU, and from there to the consoles by a thread of their
//! own, which begins with the first of them. What the guest says is kept: the latest of it for who comes later, and all that
//! one of the consoles has not got yet, up to a limit. A console that is too slow misses some, and is told how much.
//!
//! At an update this stands still from [`save`](Console::save) on. The state says how much each console has got, so that the
//! next VMM goes on from there: nothing is lost or shown twice, and input that has left its connection is in the state.

mod state;
mod stream;

use std::io;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use devices::Serial;
use fdpass::Channel;
use fdpass::Deadline;
use fdpass::MAX_MESSAGE_BYTES;
use fdpass::ReceiveError;
use fdpass::SendError;
use machine::FdName;
use machine::Fds;
use rustix::event::EventfdFlags;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::event::eventfd;
use tracing::debug;
use tracing::warn;

use crate::control;
use crate::control::Answer;
use crate::guest::GuestError;
use state::ConsoleState;
use state::Seen;
use stream::Stream;

pub(crate) use state::FORMAT;

/// Consoles of one machine at a time.
const MAX_CONSOLES: u32 = 64;
/// Output that is kept for who comes later, in bytes.
const RECENT_BYTES: usize = 16 << 10;
/// Output that is kept for a console that is slow, in bytes.
const MOST_BYTES: usize = 256 << 10;
/// Output that goes to a console at a time, in bytes.
const CHUNK_BYTES: usize = 16 << 10;
/// After what time to offer the guest input again that it did not take.
const RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// How long a console may take to get the last output of a guest that has ended.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A machine's consoles.
#[derive(Debug)]
pub(crate) struct Console {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    /// Taken before the serial line's own lock and before that of the output, never after.
    consoles: Mutex<Consoles>,
    /// Taken last: a vCPU has the serial line's lock when it writes.
    output: Mutex<Stream>,
    /// How many consoles there are.
    attached: AtomicUsize,
    /// Rings when there is something to do.
    bell: OwnedFd,
    rung: AtomicBool,
}

#[derive(Debug, Default)]
struct Consoles {
    list: Vec<Attached>,
    /// Input that the guest has not taken.
    input: Vec<u8>,
    serial: Weak<Serial>,
    /// Nothing is sent or received.
    still: bool,
    ending: bool,
}

#[derive(Debug)]
struct Attached {
    channel: Arc<Channel>,
    seen: Seen,
    /// It takes no more output. What it said before it left may wait to be heard.
    left: bool,
}

/// Where the serial line's output goes.
struct Sink(Arc<Shared>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.say(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn consoles(&self) -> MutexGuard<'_, Consoles> {
        self.consoles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn output(&self) -> MutexGuard<'_, Stream> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, bytes: &[u8]) {
        let mut output = self.output();
        // Under the lock: who has just come, and was told where the output begins, is to have all from there.
        let is_heard = self.attached.load(Ordering::SeqCst) > 0;
        output.push(bytes, if is_heard { MOST_BYTES } else { RECENT_BYTES });
        drop(output);
        if is_heard {
            self.ring();
        }
    }

    fn ring(&self) {
        // One that was not answered yet is enough.
        if !self.rung.swap(true, Ordering::SeqCst) {
            let _ = rustix::io::write(&self.bell, &1u64.to_le_bytes());
        }
    }

    fn answer_bell(&self) {
        // In this order: what comes in between rings again.
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        self.rung.store(false, Ordering::SeqCst);
    }
}

impl Console {
    /// One that nobody looks at.
    pub(crate) fn new() -> anyhow::Result<Self> {
        Self::with(Consoles::default())
    }

    fn with(consoles: Consoles) -> anyhow::Result<Self> {
        let bell =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("cannot make an eventfd")?;
        let shared = Shared {
            attached: AtomicUsize::new(consoles.list.len()),
            consoles: Mutex::new(consoles),
            output: Mutex::default(),
            bell,
            rung: AtomicBool::new(false),
        };
        Ok(Self { shared: Arc::new(shared), thread: Mutex::default() })
    }

    /// Those that came with a machine, by their numbers. They stand still until [`go_on`](Self::go_on).
    pub(crate) fn adopt(fds: &mut Fds, numbers: &[u32]) -> anyhow::Result<Self> {
        let mut list = Vec::new();
        for number in numbers {
            let name = name(*number);
            let fd = fds.take(name).with_context(|| format!("{name} did not come with the machine"))?;
            let channel = Arc::new(Channel::from_fd(fd)?);
            list.push(Attached::new(channel, Seen { number: *number, next: 0, missed: 0 }));
        }
        Self::with(Consoles { list, still: true, ..Consoles::default() })
    }

    /// What goes with the machine, each with its number.
    pub(crate) fn fds(&self) -> io::Result<Vec<(u32, FdName, OwnedFd)>> {
        let consoles = self.shared.consoles();
        let all = consoles.list.iter().map(|console| {
            let number = console.seen.number;
            Ok((number, name(number), console.channel.as_fd().try_clone_to_owned()?))
        });
        all.collect()
    }

    /// Where a serial line's output is to go.
    pub(crate) fn sink(&self) -> Box<dyn Write + Send> {
        Box::new(Sink(Arc::clone(&self.shared)))
    }

    /// Which serial line gets the input.
    pub(crate) fn connect(&self, serial: &Arc<Serial>) {
        self.shared.consoles().serial = Arc::downgrade(serial);
    }

    /// How many consoles there are.
    pub(crate) fn attached(&self) -> usize {
        self.shared.attached.load(Ordering::SeqCst)
    }

    /// Makes a connection one of the consoles. It is told so, then what the guest has said of late, and what it says.
    pub(crate) fn attach(&self, channel: Channel) {
        let refuse = |why: String| drop(control::send(&channel, &Answer::Error(why)));
        let mut consoles = self.shared.consoles();
        let is_free = |number: &u32| consoles.list.iter().all(|console| console.seen.number != *number);
        let Some(number) = (0..MAX_CONSOLES).find(is_free) else {
            return refuse(format!("this machine has {MAX_CONSOLES} consoles, and no room for another"));
        };
        if let Err(error) = self.begin() {
            return refuse(format!("cannot attach a console: {error}"));
        }
        if let Err(error) = control::send(&channel, &Answer::Console) {
            debug!(%error, "a console did not stay");
            return;
        }
        let mut console = Attached::new(Arc::new(channel), Seen { number, next: 0, missed: 0 });
        {
            let output = self.shared.output();
            console.seen.next = output.recent(RECENT_BYTES);
            consoles.list.push(console);
            consoles.count(&self.shared);
        }
        drop(consoles);
        self.shared.ring();
    }

    /// Starts the thread, if it is not there yet.
    fn begin(&self) -> io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let shared = Arc::clone(&self.shared);
            *thread = Some(thread::Builder::new().name("console".to_owned()).spawn(move || shared.serve())?);
        }
        Ok(())
    }

    /// Its state, and stands still from then on.
    pub(crate) fn save(&self) -> Vec<u8> {
        let mut consoles = self.shared.consoles();
        consoles.still = true;
        let mut output = self.shared.output();
        let kept = output.end().saturating_sub(u64::try_from(RECENT_BYTES).unwrap_or(u64::MAX));
        let here = consoles.list.iter().filter(|console| !console.left);
        let unseen = here.map(|console| console.seen.next).min();
        output.forget(unseen.map_or(kept, |unseen| unseen.min(kept)));
        consoles.keep_up(&output);
        ConsoleState {
            output: output.clone(),
            input: consoles.input.clone(),
            seen: consoles.list.iter().map(|console| console.seen).collect(),
        }
        .encode()
    }

    /// Takes over the state of one that stood still. Who is not in it has left.
    pub(crate) fn load(&self, bytes: &[u8]) -> Result<(), GuestError> {
        let state = ConsoleState::decode(bytes)?;
        let mut consoles = self.shared.consoles();
        consoles.list.retain_mut(|console| {
            let seen = state.seen.iter().find(|seen| seen.number == console.seen.number);
            seen.inspect(|seen| console.seen = **seen).is_some()
        });
        consoles.input = state.input;
        *self.shared.output() = state.output;
        consoles.count(&self.shared);
        Ok(())
    }

    /// Goes on after [`save`](Self::save), or after [`load`](Self::load).
    pub(crate) fn go_on(&self) {
        let mut consoles = self.shared.consoles();
        consoles.still = false;
        let is_needed = !consoles.list.is_empty() || !consoles.input.is_empty();
        drop(consoles);
        if is_needed && let Err(error) = self.begin() {
            warn!(%error, "the consoles stand still");
        }
        self.shared.ring();
    }

    /// Tells all consoles, after all that the guest has said.
    pub(crate) fn tell(&self, answer: &Answer) {
        let mut consoles = self.shared.consoles();
        let deadline = Deadline::after(LAST_WORDS);
        consoles.deliver(&self.shared, deadline);
        for console in &consoles.list {
            // It is gone, or will hear it.
            let _ = control::send(&console.channel, answer);
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.shared.consoles().ending = true;
        self.shared.ring();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
    }
}

fn name(number: u32) -> FdName {
    // At most 64 of them: it fits.
    FdName::new(format!("console{number}").as_bytes()).unwrap_or(FdName::literal("console"))
}

impl Shared {
    /// The thread: sends output and receives input, until the end.
    fn serve(&self) {
        loop {
            let (wanted, retry) = {
                let mut consoles = self.consoles();
                if consoles.ending {
                    return;
                }
                consoles.work(self);
                (consoles.wanted(self), consoles.retry())
            };
            match wait(self.bell.as_fd(), &wanted, retry.as_ref()) {
                Ok(ready) => self.consoles().hear(&ready, self),
                Err(error) => {
                    warn!(%error, "the consoles stand still");
                    return;
                }
            }
        }
    }
}

/// Waits for the bell, or for what is wanted of the channels. Gives those that have something to say.
fn wait(
    bell: BorrowedFd<'_>,
    wanted: &[(Arc<Channel>, PollFlags)],
    retry: Option<&Timespec>,
) -> io::Result<Vec<Arc<Channel>>> {
    let own = PollFd::from_borrowed_fd(bell, PollFlags::IN);
    let others = wanted.iter().map(|(channel, flags)| PollFd::from_borrowed_fd(channel.as_fd(), *flags));
    let mut polled: Vec<PollFd<'_>> = [own].into_iter().chain(others).collect();
    match rustix::event::poll(&mut polled, retry) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let speaks = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
    let ready = wanted.iter().zip(polled.iter().skip(1)).filter(|(_, fd)| fd.revents().intersects(speaks));
    Ok(ready.map(|((channel, _), _)| Arc::clone(channel)).collect())
}

impl Consoles {
    /// Those to wait for, and what is wanted of each: input if there is none waiting, and room for output that is not out
    /// yet. None while nothing is to be heard, as one that has left would not let the thread wait.
    fn wanted(&self, shared: &Shared) -> Vec<(Arc<Channel>, PollFlags)> {
        let (end, hears) = (shared.output().end(), self.input.is_empty());
        let list = self.list.iter().filter(|console| !self.still && (hears || !console.left));
        let wanted = list.map(|console| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, hears);
            flags.set(PollFlags::OUT, !console.left && console.seen.next < end);
            (Arc::clone(&console.channel), flags)
        });
        wanted.collect()
    }

    fn retry(&self) -> Option<Timespec> {
        (!self.still && !self.input.is_empty()).then_some(RETRY)
    }

    /// Sends what can be sent, and gives the guest what it takes.
    fn work(&mut self, shared: &Shared) {
        if self.still {
            return;
        }
        self.deliver(shared, Deadline::after(Duration::ZERO));
        self.offer_input();
    }

    fn offer_input(&mut self) {
        let Some(serial) = self.serial.upgrade().filter(|_| !self.input.is_empty()) else { return };
        let taken = serial.push_input(&self.input).min(self.input.len());
        self.input.drain(..taken);
    }

    /// Notes what each console has missed.
    fn keep_up(&mut self, output: &Stream) {
        for console in &mut self.list {
            let missed = output.start().saturating_sub(console.seen.next);
            console.seen.next += missed;
            console.seen.missed += missed;
        }
    }

    /// Sends each console what it has not got yet, as far as it takes it before the deadline.
    fn deliver(&mut self, shared: &Shared, deadline: Deadline) {
        for console in self.list.iter_mut().filter(|console| !console.left) {
            match console.deliver(shared, deadline) {
                Ok(()) | Err(SendError::TimedOut) => {}
                Err(error) => {
                    debug!(%error, "a console has left");
                    console.left = true;
                }
            }
        }
        self.count(shared);
        let mut output = shared.output();
        let recent = output.end().saturating_sub(u64::try_from(RECENT_BYTES).unwrap_or(u64::MAX));
        let seen = self.list.iter().filter(|console| !console.left).map(|console| console.seen.next).min();
        output.forget(seen.map_or(recent, |seen| seen.min(recent)));
    }

    fn count(&self, shared: &Shared) {
        let here = self.list.iter().filter(|console| !console.left).count();
        shared.attached.store(here, Ordering::SeqCst);
    }

    /// Takes what these have to say.
    fn hear(&mut self, ready: &[Arc<Channel>], shared: &Shared) {
        shared.answer_bell();
        if self.still {
            // It is the next VMM's to hear, or this one's when it goes on.
            return;
        }
        for channel in ready {
            if self.input.is_empty() && !self.receive(channel) {
                self.list.retain(|console| !Arc::ptr_eq(&console.channel, channel));
            }
        }
        self.count(shared);
        self.offer_input();
    }

    /// False if it has left.
    fn receive(&mut self, channel: &Channel) -> bool {
        match channel.receive(MAX_MESSAGE_BYTES, 0, Deadline::after(Duration::ZERO)) {
            Ok(message) => match control::console_bytes(&message.bytes) {
                Some(input) => self.input.extend(input),
                None => debug!("a console has said what is no input"),
            },
            Err(ReceiveError::TimedOut | ReceiveError::TooLong { .. } | ReceiveError::TooManyFds { .. }) => {}
            Err(error) => {
                debug!(%error, "a console has left");
                return false;
            }
        }
        true
    }
}

impl Attached {
    fn new(channel: Arc<Channel>, seen: Seen) -> Self {
        Self { channel, seen, left: false }
    }

    fn deliver(&mut self, shared: &Shared, deadline: Deadline) -> Result<(), SendError> {
        loop {
            let chunk = {
                let output = shared.output();
                let missed = output.start().saturating_sub(self.seen.next);
                self.seen.next += missed;
                self.seen.missed += missed;
                output.read(self.seen.next, CHUNK_BYTES)
            };
            if self.seen.missed > 0 {
                let missed = Answer::ConsoleMissed { bytes: self.seen.missed };
                let bytes = serde_json::to_vec(&missed).unwrap_or_default();
                self.channel.send(&bytes, &[], deadline)?;
                self.seen.missed = 0;
            }
            if chunk.is_empty() {
                return Ok(());
            }
            self.channel.send(&control::console_message(&chunk), &[], deadline)?;
            self.seen.next += u64::try_from(chunk.len()).unwrap_or(u64::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// A console, and its user's end, which has been told that it is one.
    fn attached() -> (Console, Channel) {
        let console = Console::new().unwrap();
        let user = attach(&console);
        assert_eq!(answer(&user), Answer::Console);
        (console, user)
    }

    fn attach(console: &Console) -> Channel {
        let (ours, theirs) = Channel::pair().unwrap();
        console.attach(theirs);
        ours
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(20))
    }

    fn message(user: &Channel) -> Vec<u8> {
        user.receive(MAX_MESSAGE_BYTES, 0, soon()).unwrap().bytes
    }

    fn answer(user: &Channel) -> Answer {
        serde_json::from_slice(&message(user)).unwrap()
    }

    fn await_attached(console: &Console, count: usize) {
        let begun = Instant::now();
        while console.attached() != count {
            assert!(begun.elapsed() < Duration::from_secs(20), "{} are attached", console.attached());
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn what_a_console_said_before_it_left_is_heard() {
        let (console, user) = attached();
        let mut sink = console.sink();
        console.save();
        user.send(&control::console_message(b"z"), &[], soon()).unwrap();
        drop(user);
        sink.write_all(b"nobody reads this").unwrap();
        console.go_on();
        await_attached(&console, 0);
        let begun = Instant::now();
        while console.shared.consoles().input != b"z" {
            assert!(begun.elapsed() < Duration::from_secs(20), "it is lost");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_console_that_is_too_slow_is_told_what_it_missed_and_gets_the_rest() {
        let (console, user) = attached();
        let mut sink = console.sink();
        // More than is kept, and than the connection holds.
        let all: Vec<u8> = (0..400_000_u32).flat_map(u32::to_le_bytes).collect();
        all.chunks(16).for_each(|bytes| sink.write_all(bytes).unwrap());
        let mut place = 0;
        let mut missed = 0;
        while place < all.len() {
            let message = message(&user);
            match control::console_bytes(&message) {
                Some(bytes) => {
                    assert_eq!(bytes, &all[place..place + bytes.len()], "{place}");
                    place += bytes.len();
                }
                None => match serde_json::from_slice(&message).unwrap() {
                    Answer::ConsoleMissed { bytes } => {
                        missed += bytes;
                        place += usize::try_from(bytes).unwrap();
                    }
                    other => panic!("{other:?}"),
                },
            }
        }
        assert!(missed > 0);
        assert_eq!(place, all.len());
    }

    #[test]
    fn from_the_save_on_nothing_is_sent_or_received_until_it_goes_on() {
        let (console, user) = attached();
        console.shared.say(b"one");
        assert_eq!(message(&user), b"\0one");
        let state = ConsoleState::decode(&console.save()).unwrap();
        assert_eq!((state.seen[0].next, state.input), (3, Vec::new()));
        console.shared.say(b"two");
        user.send(&control::console_message(b"key"), &[], soon()).unwrap();
        let nothing = user.receive(MAX_MESSAGE_BYTES, 0, Deadline::after(Duration::from_millis(50)));
        assert_eq!(nothing.unwrap_err(), ReceiveError::TimedOut);
        assert_eq!(ConsoleState::decode(&console.save()).unwrap().input, b"");
        console.go_on();
        assert_eq!(message(&user), b"\0two");
        let begun = Instant::now();
        // No serial line takes it.
        while ConsoleState::decode(&console.save()).unwrap().input != b"key" {
            console.go_on();
            assert!(begun.elapsed() < Duration::from_secs(20), "the input does not come");
        }
    }

    #[test]
    fn one_that_stood_still_goes_on_where_it_was_saved_and_forgets_who_has_left() {
        let (console, user) = attached();
        console.shared.say(b"one");
        assert_eq!(message(&user), b"\0one");
        let other = attach(&console);
        assert_eq!((answer(&other), message(&other)), (Answer::Console, b"\0one".to_vec()));
        let mut state = ConsoleState::decode(&console.save()).unwrap();
        state.seen.retain(|seen| seen.number == 0);
        state.output.push(b"two", MOST_BYTES);
        console.load(&state.encode()).unwrap();
        console.go_on();
        assert_eq!(message(&user), b"\0two");
        assert_eq!(console.attached(), 1);
        assert_eq!(other.receive(MAX_MESSAGE_BYTES, 0, soon()).unwrap_err(), ReceiveError::Closed);
    }

    #[test]
    fn there_is_room_for_so_many_and_for_another_when_one_has_left() {
        let console = Console::new().unwrap();
        let mut users: Vec<Channel> = (0..MAX_CONSOLES).map(|_| attach(&console)).collect();
        assert!(matches!(answer(&attach(&console)), Answer::Error(_)));
        drop(users.swap_remove(7));
        await_attached(&console, users.len());
        let user = attach(&console);
        assert_eq!(answer(&user), Answer::Console);
        let names = console.fds().unwrap().into_iter().map(|(_, name, _)| name);
        assert_eq!(names.collect::<std::collections::BTreeSet<_>>().len(), users.len() + 1);
    }

    #[test]
    fn the_last_words_come_before_the_end() {
        let (console, user) = attached();
        console.shared.say(b"bye");
        console.tell(&Answer::Stopped);
        assert_eq!((message(&user), answer(&user)), (b"\0bye".to_vec(), Answer::Stopped));
    }
}
