//! The Live Update Orchestrator's state, compatible `luo-v5`.
//!
//! The KHO subtree `LUO` holds [`LuoSer`]; it names a chain of session entries ([`crate::block`]) and a
//! page of objects that files share ([`crate::flb`]). A session names a chain of file entries; a file entry names its
//! handler's compatible string, its token, and the physical address of the handler's own structure.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use pages::PAGE_BYTES;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U64;

use crate::block::Chain;
use crate::flb;
use crate::flb::Flb;
use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::OnFault;
use crate::memory::Place;
use crate::memory::Problem;
use crate::memory::stop;
use crate::text::Text;

/// The compatible string that is written and accepted.
pub const COMPATIBLE: &str = "luo-v5";
/// Name of the KHO subtree.
pub const SUBTREE: &str = "LUO";

/// A session's name: 1 to 63 bytes.
pub type SessionName = Text<64>;
/// A handler's compatible string: 1 to 47 bytes.
pub type Compatible = Text<48>;

/// The subtree's blob.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct LuoSer {
    /// `luo-v5`, zero filled.
    pub compatible: [u8; 8],
    /// Number of this update: the first kernel (or arena) writes 1, each next one what it received and 1.
    pub liveupdate_num: U64,
    /// Physical address of the first block of sessions; 0 if there is none.
    pub sessions: U64,
    /// Physical address of the page of FLBs; always set.
    pub flbs: U64,
}

/// A session as it is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SessionSer {
    /// Its name, NUL-terminated and zero filled.
    pub name: [u8; 64],
    /// Physical address of its first block of files; 0 if it has none.
    pub files: U64,
    /// Its files, in all blocks.
    pub count: U64,
}

/// A file as it is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FileSer {
    /// Its handler's compatible string, NUL-terminated and zero filled.
    pub compatible: [u8; 48],
    /// Physical address of the handler's structure.
    pub data: U64,
    /// The token.
    pub token: U64,
}

const _: () = assert!(size_of::<LuoSer>() == 32 && size_of::<SessionSer>() == 80);
const _: () = assert!(size_of::<FileSer>() == 64);

impl LuoSer {
    /// The blob of an update.
    pub fn new(liveupdate_num: u64, sessions: u64, flbs: u64) -> Self {
        let mut compatible = [0; 8];
        compatible.iter_mut().zip(COMPATIBLE.bytes()).for_each(|(to, from)| *to = from);
        Self {
            compatible,
            liveupdate_num: liveupdate_num.into(),
            sessions: sessions.into(),
            flbs: flbs.into(),
        }
    }
}

/// A file of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct File {
    /// Which handler knows what it is.
    pub compatible: Compatible,
    /// Physical address of the handler's structure; 0 if it has none.
    pub data: u64,
    /// Names it within its session.
    pub token: u64,
}

/// A session and its files, in the order in which they were preserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Its name.
    pub name: SessionName,
    /// Its files.
    pub files: Vec<File>,
}

/// All that LUO hands over, and where its own pages lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Luo {
    /// Number of the update.
    pub liveupdate_num: u64,
    /// The sessions, the first created first.
    pub sessions: Vec<Session>,
    /// Objects that files share, in the order of their registration.
    pub flbs: Vec<Flb>,
    /// Pages of this structure: the blob's, the blocks', the FLBs'.
    pub pages: Vec<u64>,
}

impl Luo {
    /// Reads the blob of `size` bytes at `address`, and everything that it names.
    ///
    /// # Errors
    /// [`Malformed`] at the first thing that the kernel's reader would refuse, and at what it overlooks: a
    /// file count that is not the files', a name or a token twice, a page that two chains share.
    pub fn read(memory: &(impl Memory + ?Sized), address: u64, size: u64) -> Result<Self, Malformed> {
        let draft = Draft::read(memory, address, size, &mut stop)?;
        let mut pages = alloc::vec![page_of(address), draft.flbs_address];
        pages.extend(&draft.blocks);
        pages.extend(draft.sessions.iter().flat_map(|session| &session.blocks));
        // With faults ending it, every name is one.
        let sessions = draft.sessions.iter().filter_map(DraftSession::whole).collect();
        Ok(Self { liveupdate_num: draft.liveupdate_num, sessions, flbs: draft.flbs, pages })
    }
}

/// What a blob says as far as it can be made out, of whatever version.
#[derive(Debug, Clone, Default)]
pub struct Draft {
    /// The compatible string's field.
    pub compatible: [u8; 8],
    /// Number of the update.
    pub liveupdate_num: u64,
    /// Physical address of the page of FLBs; 0 if it is none of a page.
    pub flbs_address: u64,
    /// Pages of the blocks of sessions.
    pub blocks: Vec<u64>,
    /// Each of them that another one follows is full.
    pub filled: bool,
    /// The sessions, the first created first.
    pub sessions: Vec<DraftSession>,
    /// Objects that files share.
    pub flbs: Vec<Flb>,
}

/// A session as far as it can be made out.
#[derive(Debug, Clone)]
pub struct DraftSession {
    /// As it is listed.
    pub entry: SessionSer,
    /// Pages of the blocks of its files.
    pub blocks: Vec<u64>,
    /// Each of them that another one follows is full.
    pub filled: bool,
    /// Its files, as they are listed.
    pub files: Vec<FileSer>,
}

impl DraftSession {
    fn whole(&self) -> Option<Session> {
        let file = |file: &FileSer| {
            let compatible = Compatible::read(&file.compatible)?;
            Some(File { compatible, data: file.data.get(), token: file.token.get() })
        };
        Some(Session {
            name: SessionName::read(&self.entry.name)?,
            files: self.files.iter().map(file).collect::<Option<_>>()?,
        })
    }
}

impl Draft {
    /// Reads the blob of `size` bytes at `address`, and what it names.
    ///
    /// # Errors
    /// What `on_fault` makes of what is wrong. If it goes on, what was broken is missing; of a blob of another version
    /// nothing is read but its name.
    pub fn read(
        memory: &(impl Memory + ?Sized),
        address: u64,
        size: u64,
        on_fault: &mut OnFault<'_>,
    ) -> Result<Self, Malformed> {
        let place = Place::new(COMPATIBLE, address);
        let mut draft = Self::default();
        let ser = match read_ser(memory, place, size) {
            Ok(ser) => ser,
            Err(fault) => return on_fault(fault).map(|()| draft),
        };
        draft.compatible = ser.compatible;
        let expected = LuoSer::new(0, 0, 0).compatible;
        let same =
            place.expect("compatible", u64::from_le_bytes(ser.compatible), u64::from_le_bytes(expected));
        if let Err(fault) = same {
            return on_fault(fault).map(|()| draft);
        }
        draft.liveupdate_num = ser.liveupdate_num.get();
        // One for everything that is read here: each page is one thing.
        let mut seen = BTreeSet::from([page_of(address)]);
        let flbs = place.page_address("flbs_pa", ser.flbs.get()).and_then(|flbs| match seen.insert(flbs) {
            true => Ok(flbs),
            false => Err(place.bad("flbs_pa", Problem::Repeated { found: flbs })),
        });
        match flbs {
            Ok(flbs) => draft.flbs_address = flbs,
            Err(fault) => on_fault(fault)?,
        }
        let chain = Chain::<SessionSer>::read_on(memory, ser.sessions.get(), &mut seen, on_fault)?;
        (draft.blocks, draft.filled) = (chain.blocks, chain.filled);
        if draft.flbs_address != 0 {
            draft.flbs = flb::read_on(memory, draft.flbs_address, on_fault)?;
        }
        let mut names = BTreeSet::new();
        for entry in chain.entries {
            let session = read_session(memory, place, entry, &mut seen, on_fault)?;
            let name = SessionName::read(&entry.name);
            if name.is_some_and(|name| !names.insert(name)) {
                let found = draft.sessions.len() as u64;
                on_fault(place.bad("session name", Problem::Repeated { found }))?;
            }
            draft.sessions.push(session);
        }
        Ok(draft)
    }
}

fn read_ser(memory: &(impl Memory + ?Sized), place: Place, size: u64) -> Result<LuoSer, Malformed> {
    if size < size_of::<LuoSer>() as u64 {
        return Err(place.bad("blob-size", Problem::Truncated));
    }
    place.get(memory)
}

fn page_of(address: u64) -> u64 {
    address & !(PAGE_BYTES as u64 - 1)
}

fn read_session(
    memory: &(impl Memory + ?Sized),
    place: Place,
    entry: SessionSer,
    seen: &mut BTreeSet<u64>,
    on_fault: &mut OnFault<'_>,
) -> Result<DraftSession, Malformed> {
    if SessionName::read(&entry.name).is_none() {
        on_fault(place.bad("session name", Problem::NotTerminated))?;
    }
    let chain = Chain::<FileSer>::read_on(memory, entry.files.get(), seen, on_fault)?;
    place.expect("file count", entry.count.get(), chain.entries.len() as u64).or_else(&mut *on_fault)?;
    let mut tokens = BTreeSet::new();
    for file in &chain.entries {
        let token = file.token.get();
        if !tokens.insert(token) {
            on_fault(place.bad("token", Problem::Repeated { found: token }))?;
        }
        if Compatible::read(&file.compatible).is_none() {
            on_fault(place.bad("handler", Problem::NotTerminated))?;
        }
    }
    Ok(DraftSession { entry, blocks: chain.blocks, filled: chain.filled, files: chain.entries })
}

impl Session {
    /// The entry that lists this session, its files being in the chain at `files`.
    pub fn entry(&self, files: u64) -> SessionSer {
        SessionSer { name: *self.name.field(), files: files.into(), count: U64::new(self.files.len() as u64) }
    }
}

impl File {
    /// The entry that lists this file.
    pub fn entry(&self) -> FileSer {
        FileSer { compatible: *self.compatible.field(), data: self.data.into(), token: self.token.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block;

    fn hex(bytes: &[u8]) -> String {
        bytes
            .chunks(8)
            .map(|word| word.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + " ")
            .collect()
    }

    fn file(token: u64) -> File {
        File { compatible: Compatible::literal("memfd-v2"), data: 0x1_0600_0000, token }
    }

    /// Blob at page 1, FLBs at 2, sessions at 3, files at 4.
    fn memory(session: &Session) -> Vec<u8> {
        let mut memory = vec![0; 5 * PAGE_BYTES];
        let files: Vec<FileSer> = session.files.iter().map(File::entry).collect();
        let put = |memory: &mut Vec<u8>, page: usize, bytes: &[u8]| {
            memory[page * PAGE_BYTES..][..bytes.len()].copy_from_slice(bytes);
        };
        put(&mut memory, 1, LuoSer::new(1, 3 * 4096, 2 * 4096).as_bytes());
        put(&mut memory, 2, &flb::encode(&[]));
        put(&mut memory, 3, &block::encode(&[session.entry(4 * 4096)], &[3 * 4096])[0]);
        put(&mut memory, 4, &block::encode(&files, &[4 * 4096])[0]);
        memory
    }

    /// H3.5.5.
    #[test]
    fn two_sessions_of_one_name_are_refused() {
        let names = |names: [&'static str; 2]| {
            let entry = |name| Session { name: SessionName::literal(name), files: vec![] }.entry(0);
            let mut memory = memory(&Session { name: SessionName::literal("vm-a"), files: vec![file(1)] });
            memory[3 * PAGE_BYTES..4 * PAGE_BYTES]
                .copy_from_slice(&block::encode(&names.map(entry), &[3 * 4096])[0]);
            Luo::read(&memory, 4096, 32).map(|luo| luo.sessions.len()).map_err(|malformed| malformed.field)
        };
        assert_eq!(names(["vm-a", "vm-b"]), Ok(2));
        assert_eq!(names(["vm-a", "vm-a"]), Err("session name"));
    }

    #[test]
    fn the_worked_example_has_the_kernels_bytes() {
        let ser = LuoSer::new(1, 0x1_0400_0000, 0x1_0300_0000);
        assert_eq!(
            hex(ser.as_bytes()),
            "6c756f2d76350000 0100000000000000 0000000401000000 0000000301000000 "
        );
        let session = Session { name: SessionName::literal("vm-a"), files: vec![file(0x1A), file(0x1B)] };
        let entry = session.entry(0x1_0500_0000);
        assert_eq!(hex(&entry.as_bytes()[64..]), "0000000501000000 0200000000000000 ");
        assert_eq!(&entry.as_bytes()[..5], b"vm-a\0");
        assert_eq!(hex(&file(0x1A).entry().as_bytes()[48..]), "0000000601000000 1a00000000000000 ");
        let block = &block::encode(&[entry], &[4096])[0];
        assert_eq!(hex(&block[..16]), "0000000000000000 0100000000000000 ");
    }

    #[test]
    fn what_is_written_is_read() {
        let session = Session { name: SessionName::literal("vm-a"), files: vec![file(0x1A), file(0)] };
        let luo = Luo::read(&memory(&session), 4096, 32).unwrap();
        assert_eq!((luo.liveupdate_num, luo.sessions), (1, vec![session]));
        assert_eq!(luo.pages, [4096, 2 * 4096, 3 * 4096, 4 * 4096]);
    }

    /// H3.9.4.
    #[test]
    fn sessions_that_share_a_chain_of_files_are_refused() {
        let session = Session { name: SessionName::literal("vm-a"), files: vec![file(1), file(2)] };
        let mut memory = memory(&session);
        let other = Session { name: SessionName::literal("vm-b"), ..session.clone() };
        let entries = [session.entry(4 * 4096), other.entry(4 * 4096)];
        memory[3 * 4096..][..4096].copy_from_slice(&block::encode(&entries, &[3 * 4096])[0]);
        let error = Luo::read(&memory, 4096, 32).unwrap_err();
        assert_eq!((error.field, error.problem), ("next", Problem::Repeated { found: 4 * 4096 }));
    }

    #[test]
    fn a_page_is_one_thing() {
        let session = Session { name: SessionName::literal("vm-a"), files: vec![file(1)] };
        // The page of FLBs is a session block that says 1 entry, too.
        let shared = flb::encode(&[Flb { name: Compatible::literal("x"), data: 0, count: 1 }]);
        for (at, page) in [(4096 + 16, 2u64), (4096 + 16, 1), (4096 + 24, 1), (3 * 4096 + 16 + 64, 3)] {
            let mut memory = memory(&session);
            memory[2 * 4096..3 * 4096].copy_from_slice(&shared);
            memory[at..at + 8].copy_from_slice(&(page * 4096).to_le_bytes());
            let error = Luo::read(&memory, 4096, 32).unwrap_err();
            assert_eq!(error.problem, Problem::Repeated { found: page * 4096 });
        }
    }

    /// H3.5.2, H3.5.5, P6.5.4.
    #[test]
    fn broken_states_are_refused_by_field() {
        let session = Session { name: SessionName::literal("vm-a"), files: vec![file(1), file(2)] };
        let broken = |at: usize, bytes: &[u8]| {
            let mut memory = memory(&session);
            memory[at..at + bytes.len()].copy_from_slice(bytes);
            Luo::read(&memory, 4096, 32).unwrap_err().field
        };
        assert_eq!(broken(4096, b"luo-v4"), "compatible");
        assert_eq!(broken(4096 + 24, &[0; 8]), "flbs_pa");
        assert_eq!(broken(3 * 4096 + 16, &[b'x'; 64]), "session name");
        assert_eq!(broken(3 * 4096 + 16 + 72, &[3]), "file count");
        assert_eq!(broken(4 * 4096 + 16 + 64 + 56, &[1]), "token");
        assert_eq!(broken(4 * 4096 + 16, &[b'x'; 48]), "handler");
        assert_eq!(Luo::read(&memory(&session), 4096, 31).unwrap_err().field, "blob-size");
    }
}
