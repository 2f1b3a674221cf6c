//! `tideover console`: a machine's serial line, here.

use std::io;
use std::io::IsTerminal as _;
use std::io::PipeReader;
use std::io::Read as _;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::mpsc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

use ::vmm::control;
use ::vmm::control::Answer;
use anyhow::Context as _;
use anyhow::bail;
use fdpass::Channel;
use fdpass::Deadline;
use fdpass::MAX_MESSAGE_BYTES;
use fdpass::ReceiveError;
use fdpass::SendError;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::io::Errno;
use terminal::Raw;
use terminal::Signals;

use crate::cli;
use crate::machines;
use crate::verbs;

/// The key that leaves: Ctrl-].
const LEAVE: u8 = 0x1d;
/// Input that is read at a time, in bytes.
const INPUT_BYTES: usize = 4096;
/// What is added to the number of a signal that ends this.
const BY_SIGNAL: u8 = 128;
/// How long a user who leaves waits for what was typed last to go out.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub(crate) fn console(arguments: &cli::Console) -> anyhow::Result<ExitCode> {
    // Before anything is changed that they would leave so.
    let signals = Signals::hold().context("cannot hold signals back")?;
    let name = &arguments.name;
    let channel = machines::connect(name)?.into_console()?;
    let stdin = io::stdin();
    let is_terminal = stdin.is_terminal();
    complain!("tideover: console of {name}{}", if is_terminal { "; Ctrl-] leaves it" } else { "" });
    let raw = is_terminal.then(|| Raw::enter(stdin.as_fd())).transpose();
    let raw = raw.context("cannot put the terminal into raw mode")?;
    let output = Output::start().context("cannot start to write")?;
    let mut line = Line { channel, output, input: Vec::new(), is_terminal, stdin_open: true };
    let end = line.join(stdin.as_fd(), &signals);
    drop(raw);
    match end? {
        // Whoever does not read the output would keep us from going by not reading this.
        End::Left if line.output.under_way > 0 => Ok(ExitCode::SUCCESS),
        end => end.code(name),
    }
}

/// How it ends.
enum End {
    /// The user leaves.
    Left,
    /// Nobody reads the output any more.
    Unread,
    /// A signal came.
    Signal(i32),
    /// The machine has ended, or says why it cannot go on.
    Told(Answer),
    /// The VMM is gone without a word.
    Gone,
}

impl End {
    fn code(self, name: &str) -> anyhow::Result<ExitCode> {
        match self {
            Self::Left => {
                complain!("tideover: left {name}, which goes on");
                Ok(ExitCode::SUCCESS)
            }
            Self::Unread => Ok(ExitCode::SUCCESS),
            Self::Signal(number) => {
                Ok(ExitCode::from(BY_SIGNAL.saturating_add(u8::try_from(number).unwrap_or_default())))
            }
            Self::Told(answer) => {
                complain!("tideover: {name} has ended");
                verbs::ended(answer)
            }
            Self::Gone => bail!("the VMM of {name} is gone"),
        }
    }
}

/// Standard output, on a thread of its own: whoever reads it may stop to do so, and keeps nobody from leaving.
struct Output {
    chunks: Sender<Vec<u8>>,
    /// Has a byte for each chunk that was written, and ends if one could not be.
    written: PipeReader,
    /// Chunks that were not.
    under_way: usize,
    failure: Arc<OnceLock<Errno>>,
}

impl Output {
    fn start() -> io::Result<Self> {
        let (chunks, received) = mpsc::channel::<Vec<u8>>();
        let (written, mut tell) = io::pipe()?;
        let failure = Arc::new(OnceLock::new());
        thread::Builder::new().name("output".to_owned()).spawn({
            let failure = Arc::clone(&failure);
            move || {
                for chunk in received {
                    if let Err(errno) = write_all(&chunk) {
                        let _ = failure.set(errno);
                        return;
                    }
                    if tell.write_all(&[0]).is_err() {
                        return;
                    }
                }
            }
        })?;
        Ok(Self { chunks, written, under_way: 0, failure })
    }

    fn write(&mut self, bytes: &[u8]) {
        // If the thread is gone, its end of the pipe is closed.
        let _ = self.chunks.send(bytes.to_vec());
        self.under_way += 1;
    }

    /// Some were written, or the output is at its end.
    fn look(&mut self) -> anyhow::Result<Option<End>> {
        let mut told = [0; 64];
        let told = self.written.read(&mut told).context("cannot hear of the output")?;
        self.under_way = self.under_way.saturating_sub(told);
        match self.failure.get().filter(|_| told == 0) {
            None if told == 0 => bail!("the output has ended"),
            None => Ok(None),
            Some(&Errno::PIPE) => Ok(Some(End::Unread)),
            Some(errno) => Err(*errno).context("cannot write the output"),
        }
    }
}

/// Writes to standard output, past the buffer that nobody would empty here.
fn write_all(mut bytes: &[u8]) -> Result<(), Errno> {
    let stdout = io::stdout();
    while !bytes.is_empty() {
        match rustix::io::write(stdout.as_fd(), bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut polled = [PollFd::new(&stdout, PollFlags::OUT)];
                let _ = rustix::event::poll(&mut polled, None);
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// What there is to do something with.
struct Ready {
    output: bool,
    channel: bool,
    stdin: bool,
}

struct Line {
    channel: Channel,
    output: Output,
    /// Input that the VMM has not taken.
    input: Vec<u8>,
    is_terminal: bool,
    stdin_open: bool,
}

impl Line {
    /// Passes on what comes from either side, until an end.
    fn join(&mut self, stdin: BorrowedFd<'_>, signals: &Signals) -> anyhow::Result<End> {
        loop {
            let ready = self.wait(stdin, signals)?;
            if let Some(number) = signals.take() {
                return Ok(End::Signal(number));
            }
            if ready.output
                && let Some(end) = self.output.look()?
            {
                return Ok(end);
            }
            if ready.channel
                && let Some(end) = self.hear()?
            {
                return Ok(end);
            }
            let leaves = ready.stdin && self.read(stdin)?;
            // What was typed before the user leaves comes first, if the VMM takes it soon.
            self.send(if leaves { LAST_WORDS } else { Duration::ZERO })?;
            if leaves {
                return Ok(End::Left);
            }
        }
    }

    /// Waits for something to do.
    fn wait(&self, stdin: BorrowedFd<'_>, signals: &Signals) -> anyhow::Result<Ready> {
        let hears = self.output.under_way == 0;
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, hears);
        flags.set(PollFlags::OUT, !self.input.is_empty());
        // One that is at its end is always ready: it is left out unless something is wanted of it.
        let reads = self.stdin_open && self.input.is_empty();
        let wanted = [
            Some(PollFd::new(signals, PollFlags::IN)),
            Some(PollFd::new(&self.output.written, PollFlags::IN)),
            (!flags.is_empty()).then(|| PollFd::new(&self.channel, flags)),
            reads.then(|| PollFd::from_borrowed_fd(stdin, PollFlags::IN)),
        ];
        let places = wanted.each_ref().map(Option::is_some);
        let mut polled: Vec<PollFd<'_>> = wanted.into_iter().flatten().collect();
        match rustix::event::poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno).context("cannot wait"),
        }
        let mut shown = polled.iter().map(PollFd::revents);
        let [_, output, channel, stdin] =
            places.map(|place| place.then(|| shown.next()).flatten().unwrap_or(PollFlags::empty()));
        Ok(Ready {
            output: !output.is_empty(),
            channel: hears && channel.intersects(!PollFlags::OUT),
            stdin: !stdin.is_empty(),
        })
    }

    fn hear(&mut self) -> anyhow::Result<Option<End>> {
        let message = match self.channel.receive(MAX_MESSAGE_BYTES, 0, Deadline::after(Duration::ZERO)) {
            Ok(message) => message.bytes,
            Err(ReceiveError::TimedOut) => return Ok(None),
            Err(ReceiveError::Closed) => return Ok(Some(End::Gone)),
            Err(error) => return Err(error).context("cannot read the console"),
        };
        let Some(bytes) = control::console_bytes(&message) else {
            return match serde_json::from_slice(&message).context("cannot read what the VMM says")? {
                Answer::ConsoleMissed { bytes } => {
                    complain!("tideover: {bytes} bytes of output came too fast, and are missing here");
                    Ok(None)
                }
                answer => Ok(Some(End::Told(answer))),
            };
        };
        self.output.write(bytes);
        Ok(None)
    }

    /// Reads what there is. True if the user wants to leave after that.
    fn read(&mut self, stdin: BorrowedFd<'_>) -> anyhow::Result<bool> {
        let mut bytes = vec![0; INPUT_BYTES];
        let read = match rustix::io::read(stdin, &mut bytes) {
            Ok(read) => read,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(false),
            // What a terminal says that has been hung up.
            Err(Errno::IO) if self.is_terminal => return Ok(true),
            Err(errno) => return Err(errno).context("cannot read standard input"),
        };
        bytes.truncate(read);
        if read == 0 {
            self.stdin_open = false;
            return Ok(self.is_terminal);
        }
        let leave = bytes.iter().position(|byte| *byte == LEAVE).filter(|_| self.is_terminal);
        bytes.truncate(leave.unwrap_or(read));
        self.input.extend(bytes);
        Ok(leave.is_some())
    }

    fn send(&mut self, patience: Duration) -> anyhow::Result<()> {
        if self.input.is_empty() {
            return Ok(());
        }
        let message = control::console_message(&self.input);
        match self.channel.send(&message, &[], Deadline::after(patience)) {
            Ok(()) => self.input.clear(),
            Err(SendError::TimedOut) => {}
            // What it had to say comes first.
            Err(SendError::Closed) => {
                self.input.clear();
                self.stdin_open = false;
            }
            Err(error) => return Err(error).context("cannot write to the console"),
        }
        Ok(())
    }
}
