//! Compressed memory, unpacked to where it can be read by address.

use std::fs::File;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Seek;
use std::io::SeekFrom;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::bail;
use pages::PAGE_BYTES;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use ruzstd::decoding::FrameDecoder;
use ruzstd::decoding::StreamingDecoder;

use crate::progress::Bar;

/// First bytes of what zstd writes.
const ZSTD: u32 = 0xfd2f_b528;
/// First bytes of a frame that holds something else, but for the lowest four bits.
const SKIPPED: u32 = 0x184d_2a50;
/// What is left to others of the folder for temporary files.
const LEAVE_BYTES: u64 = 64 << 20;
/// How much is unpacked at a time.
const CHUNK: usize = 1 << 20;
/// More than any machine has: so that a small file cannot keep this going for ever.
const MOST_BYTES: u64 = 64 << 40;
/// Whoever waits longer than this wants to know for what.
const PATIENCE: Duration = Duration::from_secs(1);

/// Says how far something is that takes long.
pub(super) struct Patience {
    since: Instant,
    bar: Option<Bar>,
}

impl Patience {
    pub(super) fn new() -> Self {
        Self { since: Instant::now(), bar: None }
    }

    pub(super) fn at(&mut self, what: &str, done: u64, of: u64) {
        if self.since.elapsed() >= PATIENCE {
            self.bar.get_or_insert_with(Bar::new).at(what, done, of.max(1));
        }
    }
}

impl Drop for Patience {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.done();
        }
    }
}

/// True of the first bytes of what zstd writes.
pub(super) fn is_packed(first: &[u8]) -> bool {
    let magic = first.first_chunk().map(|magic| u32::from_le_bytes(*magic));
    magic.is_some_and(|magic| magic == ZSTD || magic & !0xf == SKIPPED)
}

/// Unpacks a file to one that has no name, without its zeros; gives that, and how long it is.
pub(super) fn unpack(mut packed: File) -> anyhow::Result<(File, u64)> {
    let of = packed.metadata().context("cannot look at it")?.len();
    let to = nameless()?;
    let mut patience = Patience::new();
    let mut at = 0;
    packed.rewind().context("cannot read it")?;
    let mut input = BufReader::with_capacity(CHUNK, packed);
    // A file may be several frames, one behind the other.
    loop {
        if skip(&mut input)? {
            if input.stream_position().context("cannot read it")? >= of {
                break;
            }
            continue;
        }
        let Ok(mut decoder) = StreamingDecoder::<_, FrameDecoder>::new(&mut input) else {
            bail!("what begins at byte {} of it is no zstd frame", input.stream_position().unwrap_or(of));
        };
        let mut chunk = vec![0; CHUNK];
        loop {
            let len = fill(&mut decoder, &mut chunk)?;
            put(&to, at, &chunk[..len])?;
            room(&to)?;
            at += len as u64;
            if at > MOST_BYTES {
                bail!("it is more than {MOST_BYTES} bytes unpacked");
            }
            let done = decoder.get_mut().stream_position().unwrap_or(of);
            patience.at("unpacking", done, of);
            if len < CHUNK {
                break;
            }
        }
        if input.stream_position().context("cannot read it")? >= of {
            break;
        }
    }
    to.set_len(at).context("cannot make the unpacked file as long as it is")?;
    Ok((to, at))
}

/// Passes over a frame that holds something else than memory, if one begins here.
fn skip(input: &mut (impl BufRead + Seek)) -> anyhow::Result<bool> {
    let mut head = [0; 8];
    let begins = input.stream_position().context("cannot read it")?;
    let whole = input.read_exact(&mut head).is_ok();
    let (magic, len) = (u32::from_le_bytes(*chunk(&head, 0)), u32::from_le_bytes(*chunk(&head, 4)));
    let skipped = whole && magic & !0xf == SKIPPED;
    let to = if skipped { begins + 8 + u64::from(len) } else { begins };
    input.seek(SeekFrom::Start(to)).context("cannot read it")?;
    Ok(skipped)
}

fn chunk(head: &[u8; 8], at: usize) -> &[u8; 4] {
    head.get(at..).and_then(|rest| rest.first_chunk()).unwrap_or(&[0; 4])
}

/// A file of a few bytes may hold more than there is room for: others need the folder, too.
fn room(to: &File) -> anyhow::Result<()> {
    let room = rustix::fs::fstatvfs(to).context("cannot tell how much room there is")?;
    if room.f_bavail.saturating_mul(room.f_frsize) < LEAVE_BYTES {
        bail!(
            "there is no room for it, unpacked, in the folder for temporary files {}: set TMPDIR",
            std::env::temp_dir().display()
        );
    }
    Ok(())
}

fn fill(from: &mut impl std::io::Read, chunk: &mut [u8]) -> anyhow::Result<usize> {
    let mut len = 0;
    while len < chunk.len() {
        match from.read(&mut chunk[len..]).context("cannot unpack it")? {
            0 => break,
            more => len += more,
        }
    }
    Ok(len)
}

/// Writes what is not zero.
fn put(to: &File, at: u64, bytes: &[u8]) -> anyhow::Result<()> {
    for (page, address) in bytes.chunks(PAGE_BYTES).zip((at..).step_by(PAGE_BYTES)) {
        if page.iter().any(|byte| *byte != 0) {
            to.write_all_at(page, address)
                .context("cannot write the unpacked memory to the folder for temporary files")?;
        }
    }
    Ok(())
}

/// A file that nobody else can open, and that is gone when it is closed.
fn nameless() -> anyhow::Result<File> {
    let folder = std::env::temp_dir();
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(&folder, flags, Mode::RUSR | Mode::WUSR);
    Ok(file.with_context(|| format!("cannot make a file in {}", folder.display()))?.into())
}
