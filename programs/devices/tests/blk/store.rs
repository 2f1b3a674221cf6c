//! A disk in a vector, whose calls are counted, written down, and made to stop, fail or do less on demand.

use std::collections::VecDeque;
use std::io;
use std::sync::Condvar;
use std::sync::Mutex;
use std::time::Duration;

use devices::BlockStore;

/// Far longer than anything takes; a test that waits for it has failed.
const LONG: Duration = Duration::from_secs(60);

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// All.
    Whole,
    /// At most so many bytes.
    Short(usize),
    /// Nothing, and is to be tried again.
    Interrupted,
    /// Nothing.
    Fail,
    /// Nothing, and says that nothing more will be done.
    Zero,
}

/// A call that had effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    Read { offset: u64, len: usize },
    Write { offset: u64, bytes: Vec<u8> },
    Sync,
}

#[derive(Debug, Default)]
struct Inner {
    bytes: Vec<u8>,
    script: VecDeque<Step>,
    done: Vec<Done>,
    /// Calls that have begun.
    begun: usize,
    /// Calls that may end.
    allowed: usize,
}

#[derive(Debug)]
pub(crate) struct Store {
    inner: Mutex<Inner>,
    changed: Condvar,
    pub(crate) read_only: bool,
}

impl Store {
    /// All calls may end.
    pub(crate) fn new(sectors: usize) -> Self {
        let inner = Inner { bytes: vec![0; sectors * 512], allowed: usize::MAX, ..Inner::default() };
        Self { inner: Mutex::new(inner), changed: Condvar::new(), read_only: false }
    }

    /// No call may end.
    pub(crate) fn gated(sectors: usize) -> Self {
        let store = Self::new(sectors);
        store.inner.lock().unwrap().allowed = 0;
        store
    }

    /// What the next calls do; those after them do all.
    pub(crate) fn script(&self, steps: impl IntoIterator<Item = Step>) {
        self.inner.lock().unwrap().script.extend(steps);
    }

    /// All further calls do all.
    pub(crate) fn clear_script(&self) {
        self.inner.lock().unwrap().script.clear();
    }

    /// Lets so many calls in all end.
    pub(crate) fn allow(&self, calls: usize) {
        self.inner.lock().unwrap().allowed = calls;
        self.changed.notify_all();
    }

    /// Waits until so many calls in all have begun.
    pub(crate) fn await_begun(&self, calls: usize) {
        let inner = self.inner.lock().unwrap();
        let (_inner, waited) =
            self.changed.wait_timeout_while(inner, LONG, |inner| inner.begun < calls).unwrap();
        assert!(!waited.timed_out(), "call {calls} did not begin");
    }

    pub(crate) fn begun(&self) -> usize {
        self.inner.lock().unwrap().begun
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.inner.lock().unwrap().bytes.clone()
    }

    /// The calls that had effect so far.
    pub(crate) fn done(&self) -> Vec<Done> {
        self.inner.lock().unwrap().done.clone()
    }

    /// Calls of one kind that had effect: bytes written, each counted by where it went.
    pub(crate) fn writes(&self) -> Vec<(u64, Vec<u8>)> {
        let of_write = |done| match done {
            Done::Write { offset, bytes } => Some((offset, bytes)),
            Done::Read { .. } | Done::Sync => None,
        };
        self.done().into_iter().filter_map(of_write).collect()
    }

    /// Begins a call; when it may end, does what the script says with up to `len` bytes.
    fn call(&self, len: usize, act: impl FnOnce(&mut Inner, usize)) -> io::Result<usize> {
        let mut inner = self.inner.lock().unwrap();
        inner.begun += 1;
        let number = inner.begun;
        self.changed.notify_all();
        let (mut inner, waited) =
            self.changed.wait_timeout_while(inner, LONG, |inner| inner.allowed < number).unwrap();
        assert!(!waited.timed_out(), "call {number} was not let go on");
        let len = match inner.script.pop_front().unwrap_or(Step::Whole) {
            Step::Whole => len,
            Step::Short(most) => len.min(most),
            Step::Interrupted => return Err(io::ErrorKind::Interrupted.into()),
            Step::Fail => return Err(io::Error::other("as the test wants it")),
            Step::Zero => return Ok(0),
        };
        act(&mut inner, len);
        Ok(len)
    }
}

impl BlockStore for Store {
    fn len_bytes(&self) -> u64 {
        u64::try_from(self.inner.lock().unwrap().bytes.len()).unwrap()
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let at = usize::try_from(offset).unwrap();
        self.call(into.len(), |inner, len| {
            into[..len].copy_from_slice(&inner.bytes[at..at + len]);
            inner.done.push(Done::Read { offset, len });
        })
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let at = usize::try_from(offset).unwrap();
        self.call(bytes.len(), |inner, len| {
            inner.bytes[at..at + len].copy_from_slice(&bytes[..len]);
            inner.done.push(Done::Write { offset, bytes: bytes[..len].to_vec() });
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.call(1, |inner, _| inner.done.push(Done::Sync)).map(drop)
    }
}
