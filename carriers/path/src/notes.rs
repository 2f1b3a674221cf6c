//! The notes in front of a machine's regions.

use std::io;

use abi::note;
use custody::Note;
use liveupdate::moment::Moment;
use region::Mapping;
use region::path::NOTES_BYTES;
use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;

/// How many notes there is room for.
const SLOTS: u64 = 2;
/// Bytes of each.
const SLOT_BYTES: u64 = NOTES_BYTES / SLOTS;

/// Why a note was not written.
#[derive(Debug, Error)]
pub enum NotesError {
    /// It is too large.
    #[error("the note has {bytes} bytes, and there is room for {room}")]
    Room {
        /// Its bytes.
        bytes: usize,
        /// Room.
        room: u64,
    },
    /// It cannot be said in JSON.
    #[error("the note cannot be written as JSON")]
    Json(#[source] serde_json::Error),
    /// The kernel does not say which life of the host this is.
    #[error("the kernel does not say which boot this is")]
    Boot(#[source] io::Error),
}

/// A note as it lies there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Written {
    /// The later one of two has the higher number.
    pub(crate) number: u64,
    /// Which life of the host it was written in.
    pub(crate) boot: [u8; 16],
    /// The note.
    pub(crate) note: Note,
}

/// Room for notes.
#[derive(Debug)]
pub(crate) struct Notes(Mapping);

impl Notes {
    pub(crate) fn new(mapping: Mapping) -> Self {
        Self(mapping)
    }

    /// The note that counts, and where it lies, of those that can be read.
    pub(crate) fn last(&self) -> Option<(u64, Written)> {
        let all = (0..SLOTS).filter_map(|slot| Some((slot, self.read(slot)?)));
        all.max_by_key(|(_, written)| written.number)
    }

    fn read(&self, slot: u64) -> Option<Written> {
        let mut bytes = vec![0; usize::try_from(SLOT_BYTES).ok()?];
        self.0.read(slot * SLOT_BYTES, &mut bytes).ok()?;
        serde_json::from_str(&note::read(&bytes).ok()?).ok()
    }

    /// Writes another note, which counts from then on, beside the last one.
    ///
    /// # Errors
    /// [`NotesError`]: the last one counts.
    pub(crate) fn write(&self, note: &Note) -> Result<(), NotesError> {
        let (slot, number) = match self.last() {
            Some((slot, last)) => ((slot + 1) % SLOTS, last.number.saturating_add(1)),
            None => (0, 1),
        };
        let written = Written { number, boot: boot()?, note: note.clone() };
        let bytes = note::encode(&serde_json::to_string(&written).map_err(NotesError::Json)?);
        let room = SLOT_BYTES - note::ADDRESS;
        if bytes.len() as u64 > room {
            return Err(NotesError::Room { bytes: bytes.len(), room });
        }
        // There is room: its checksum says whether all of it was written.
        let _ = self.0.write(slot * SLOT_BYTES + note::ADDRESS, &bytes);
        Ok(())
    }

    /// The note that counts does not any more: the one before it does.
    pub(crate) fn withdraw(&self) {
        if let Some((slot, _)) = self.last() {
            self.erase(slot);
        }
    }

    /// There is no machine here any more.
    pub(crate) fn erase_all(&self) {
        // The one that counts last: a crash in between leaves what counted before.
        let last = self.last().map_or(0, |(slot, _)| slot);
        (1..=SLOTS).for_each(|next| self.erase((last + next) % SLOTS));
    }

    fn erase(&self, slot: u64) {
        // All of it lies in the mapping.
        let _ = self.0.write_zeros(slot * SLOT_BYTES, SLOT_BYTES);
    }
}

/// Which life of the host this is.
pub(crate) fn boot() -> Result<[u8; 16], NotesError> {
    Moment::now().map(|moment| moment.boot).map_err(NotesError::Boot)
}

#[cfg(test)]
mod tests {
    use region::Region;

    use super::*;

    fn notes() -> Notes {
        Notes::new(Region::create("t", NOTES_BYTES).unwrap().map().unwrap())
    }

    fn note(name: &str) -> Note {
        Note {
            machine: name.to_owned(),
            identity: "00".to_owned(),
            formats: Vec::new(),
            regions: vec![4096],
            program: "/p".into(),
            cgroup: None,
            vmm: serde_json::Value::Null,
            sealed: None,
        }
    }

    fn last(notes: &Notes) -> Option<String> {
        notes.last().map(|(_, written)| written.note.machine)
    }

    #[test]
    fn the_note_that_was_written_last_counts_and_the_one_before_it_once_that_is_withdrawn() {
        let notes = notes();
        assert_eq!(last(&notes), None);
        for name in ["a", "b", "c"] {
            notes.write(&note(name)).unwrap();
            assert_eq!(last(&notes).as_deref(), Some(name));
        }
        notes.withdraw();
        assert_eq!(last(&notes).as_deref(), Some("b"));
        notes.write(&note("d")).unwrap();
        assert_eq!(last(&notes).as_deref(), Some("d"));
        notes.erase_all();
        assert_eq!(last(&notes), None);
    }

    /// Whoever writes may die at any byte.
    #[test]
    fn of_a_note_that_was_written_in_part_the_one_before_it_counts() {
        let notes = notes();
        notes.write(&note("whole")).unwrap();
        notes.write(&note("later")).unwrap();
        let (slot, _) = notes.last().unwrap();
        let at = slot * SLOT_BYTES + note::ADDRESS;
        let mut whole = vec![0; 512];
        notes.0.read(at, &mut whole).unwrap();
        let end = whole.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        for torn in 0..end {
            notes.erase(slot);
            notes.0.write(at, &whole[..torn]).unwrap();
            assert_eq!(last(&notes).as_deref(), Some("whole"), "{torn} of {end}");
        }
        notes.0.write(at, &whole[..end]).unwrap();
        assert_eq!(last(&notes).as_deref(), Some("later"));
    }

    #[test]
    fn a_note_that_is_too_large_is_refused_and_the_last_one_counts() {
        let notes = notes();
        notes.write(&note("a")).unwrap();
        let large = Note { vmm: "x".repeat(2 << 20).into(), ..note("b") };
        assert!(matches!(notes.write(&large), Err(NotesError::Room { .. })));
        assert_eq!(last(&notes).as_deref(), Some("a"));
    }
}
