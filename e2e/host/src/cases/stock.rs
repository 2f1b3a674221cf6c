//! What kernels that Debian ships do with memory that they are told to leave alone: it is the same memory in the next life.

use std::fs;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::Context as _;
use anyhow::ensure;
use rustix::fs::AtFlags;
use rustix::fs::FallocateFlags;
use rustix::fs::StatxAttributes;
use rustix::fs::StatxFlags;
use vm_memory::Bytes as _;
use vm_memory::FileOffset;
use vm_memory::MmapRegion;
use vm_memory::VolatileMemory as _;

use crate::boot::Life;
use crate::dax;

use super::Then;

const LIVES: u32 = 3;
/// How much of the file system the file takes.
const FILE_BYTES: u64 = 384 << 20;
const PAGE: usize = 4096;

/// A file on ext4 with DAX.
pub(crate) fn ext4(life: &Life) -> anyhow::Result<Then> {
    is_stock()?;
    dax::mount(life)?;
    let path = Path::new(dax::AT).join("memory");
    let file = File::options().read(true).write(true).create(life.number == 1).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    if life.number == 1 {
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, FILE_BYTES)?;
        file.sync_all()?;
    }
    let attributes = rustix::fs::statx(file.as_fd(), "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
    ensure!(attributes.stx_attributes.contains(StatxAttributes::DAX), "the file is none of DAX");
    go_through(life, file, FILE_BYTES)
}

/// A device.
pub(crate) fn devdax(life: &Life) -> anyhow::Result<Then> {
    is_stock()?;
    dax::show_device()?;
    let device = File::options().read(true).write(true).open(dax::DEVICE);
    go_through(life, device.with_context(|| format!("cannot open {}", dax::DEVICE))?, dax::device_bytes()?)
}

fn is_stock() -> anyhow::Result<()> {
    ensure!(!Path::new("/dev/liveupdate").exists(), "this kernel has /dev/liveupdate");
    print!("{}", fs::read_to_string("/proc/version")?);
    Ok(())
}

/// What the life before wrote is all there; this one writes something else, and has none of it written back.
fn go_through(life: &Life, file: File, len_bytes: u64) -> anyhow::Result<Then> {
    let len = usize::try_from(len_bytes)?;
    let flags = libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC;
    let memory = MmapRegion::<()>::build(
        Some(FileOffset::new(file, 0)),
        len,
        libc::PROT_READ | libc::PROT_WRITE,
        flags,
    );
    let memory = memory.context("it cannot be mapped as memory that needs no write-back")?;
    let memory = memory.as_volatile_slice();
    let mut page = [0; PAGE];
    if life.number > 1 {
        for at in (0..len).step_by(PAGE) {
            memory.read_slice(&mut page, at)?;
            ensure!(page == pattern(life.number - 1, at), "the page at {at:#x} has other bytes");
        }
        println!("{} pages are those of life {}", len / PAGE, life.number - 1);
    }
    if life.number == LIVES {
        return Ok(Then::End);
    }
    for at in (0..len).step_by(PAGE) {
        memory.write_slice(&pattern(life.number, at), at)?;
    }
    Ok(Then::NextLife)
}

/// A page that tells of which life and which place it is.
fn pattern(life: u32, at: usize) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    for (word, bytes) in page.chunks_exact_mut(8).enumerate() {
        // The place is below 2^40, so each word of all lives is another one.
        let number = (u64::from(life) << 40) + at as u64 + word as u64;
        bytes.copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    page
}
