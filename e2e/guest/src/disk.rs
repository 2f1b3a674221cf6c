//! The guest's disk, without the kernel's copy of it: what is written goes there, and what is read comes from there.

use std::fs::File;
use std::io::Seek as _;
use std::io::SeekFrom;
use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::Context as _;
use anyhow::ensure;
use rustix::fs::OFlags;
use tideover_e2e_guest::RECORD_BYTES;
use tideover_e2e_guest::record;

const PATH: &str = "/dev/vda";

pub(crate) struct Disk {
    file: File,
    /// How many records it has room for.
    places: u64,
    /// Has a piece that lies as the disk wants it.
    room: Vec<u8>,
}

impl Disk {
    /// Opens it, if there is one.
    pub(crate) fn open() -> anyhow::Result<Option<Self>> {
        let flags = i32::try_from(OFlags::DIRECT.bits())?;
        let file = File::options().read(true).write(true).custom_flags(flags).open(PATH);
        let mut file = match file {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            file => file.context("cannot open the disk")?,
        };
        let places = file.seek(SeekFrom::End(0))? / u64::try_from(RECORD_BYTES)?;
        ensure!(places > 0, "the disk has no room");
        Ok(Some(Self { file, places, room: vec![0; 2 * RECORD_BYTES] }))
    }

    /// Writes the record of this number.
    pub(crate) fn write(&mut self, number: u64) -> anyhow::Result<()> {
        let at = self.at(number);
        let room = aligned(&mut self.room)?;
        room.copy_from_slice(&record(number));
        self.file.write_all_at(room, at).context("cannot write to the disk")?;
        self.file.sync_data().context("cannot flush the disk")
    }

    /// Whether it has the record of this number where that was written.
    pub(crate) fn has(&mut self, number: u64) -> anyhow::Result<bool> {
        let at = self.at(number);
        let room = aligned(&mut self.room)?;
        self.file.read_exact_at(room, at).context("cannot read the disk")?;
        Ok(room == record(number))
    }

    /// A record that is still there when this one was written, another one each time.
    pub(crate) fn older(&self, number: u64) -> u64 {
        number - number.wrapping_mul(7919) % self.places.min(number + 1)
    }

    fn at(&self, number: u64) -> u64 {
        number % self.places * RECORD_BYTES as u64
    }
}

/// The piece of one record.
fn aligned(room: &mut [u8]) -> anyhow::Result<&mut [u8]> {
    let from = room.as_ptr().align_offset(RECORD_BYTES);
    room.get_mut(from..from.saturating_add(RECORD_BYTES)).context("no piece of memory lies right")
}
