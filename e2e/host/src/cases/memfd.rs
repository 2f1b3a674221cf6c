//! A file in memory that lives through two kernels.

use std::fs::File;
use std::io::Seek as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;

use anyhow::Context as _;
use anyhow::ensure;
use liveupdate::Device;
use liveupdate::FindError;
use liveupdate::Name;
use liveupdate::PreserveError;
use liveupdate::RetrieveError;
use rustix::fs::MemfdFlags;

use crate::boot::Life;

use super::Then;

const TOKEN: u64 = 7;
/// With a hole in the middle, and an end within a page.
const PIECES: [(u64, &[u8]); 3] = [(0, b"begins"), (5 << 20, b"goes on"), ((8 << 20) + 100, b"ends")];

pub(crate) fn run(life: &Life) -> anyhow::Result<Then> {
    let name = Name::new(b"memory")?;
    let device = Device::open()?;
    if life.number == 1 {
        let memory = rustix::fs::memfd_create("memory", MemfdFlags::CLOEXEC | MemfdFlags::EXEC)?;
        let mut memory = File::from(memory);
        for (at, bytes) in PIECES {
            memory.write_all_at(bytes, at)?;
        }
        memory.seek(std::io::SeekFrom::Start(3))?;
        return keep(&device, &name, &memory);
    }
    let none = device.retrieve(&Name::new(b"memor")?);
    ensure!(matches!(none, Err(FindError::Absent { .. })), "{none:?}");
    let mut session = device.retrieve(&name)?;
    let again = device.retrieve(&name);
    ensure!(matches!(again, Err(FindError::Taken { .. })), "{again:?}");
    let absent = session.retrieve(TOKEN + 1);
    ensure!(matches!(absent, Err(RetrieveError::Absent { .. })), "{absent:?}");
    let memory = File::from(session.retrieve(TOKEN)?);
    check(&memory)?;
    // Another descriptor of the same open file.
    let mut other = File::from(session.retrieve(TOKEN)?);
    (&memory).seek(std::io::SeekFrom::Start(u64::from(life.number)))?;
    ensure!(other.stream_position()? == u64::from(life.number), "two open files");
    (&memory).seek(std::io::SeekFrom::Start(3))?;
    let mut next = device.create(&name)?;
    let busy = next.preserve(TOKEN, memory.as_fd());
    ensure!(matches!(busy, Err(PreserveError::Busy)), "{busy:?}");
    drop(next);
    session.finish()?;
    let finished = device.retrieve(&name);
    ensure!(matches!(finished, Err(FindError::Absent { .. })), "{finished:?}");
    if life.number == 3 {
        return Ok(Then::End);
    }
    memory.write_all_at(b"B", 0)?;
    memory.write_all_at(b"b", 0)?;
    keep(&device, &name, &memory)
}

fn keep(device: &Device, name: &Name, memory: &File) -> anyhow::Result<Then> {
    let mut session = device.create(name)?;
    session.preserve(TOKEN, memory.as_fd())?;
    // It lives as long as a descriptor of it is open: until the kernel jumps.
    std::mem::forget(session);
    Ok(Then::NextLife)
}

fn check(mut memory: &File) -> anyhow::Result<()> {
    let size = memory.metadata()?.len();
    ensure!(size == (8 << 20) + 104, "it has {size} bytes");
    ensure!(memory.stream_position()? == 3, "its position is {}", memory.stream_position()?);
    let mut bytes = vec![0; usize::try_from(size)?];
    memory.read_exact_at(&mut bytes, 0)?;
    let mut wanted = vec![0; bytes.len()];
    for (at, piece) in PIECES {
        let at = usize::try_from(at)?;
        wanted.get_mut(at..at + piece.len()).context("a piece beyond the end")?.copy_from_slice(piece);
    }
    ensure!(bytes == wanted, "its bytes are others");
    Ok(())
}
