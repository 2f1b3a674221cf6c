//! Compressed memory, unpacked to where it can be read by address.

use std::fs::File;
use std::io::BufReader;
use std::io::Seek as _;
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
pub(super) const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
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
        let mut decoder =
            StreamingDecoder::<_, FrameDecoder>::new(&mut input).context("it is no zstd file")?;
        let mut chunk = vec![0; CHUNK];
        loop {
            let len = fill(&mut decoder, &mut chunk)?;
            put(&to, at, &chunk[..len])?;
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
