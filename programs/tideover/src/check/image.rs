//! A kernel's image: what it says of itself, and what the kernel in it does, as far as that can be unpacked.
//!
//! Everything in it is an allegation: it is unpacked piece by piece, and no further than any kernel goes.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::io::BufReader;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::ops::Range;
use std::path::Path;

use devices::linux;
use devices::linux::Description;

use super::kernel::Config;

/// More than any kernel has, unpacked.
const MOST_BYTES: u64 = 1 << 30;
/// What a packer may ask for to unpack: twice what Linux's own build takes.
const WINDOW_BYTES: u64 = 256 << 20;
const PIECE_BYTES: u64 = 1 << 20;
/// Twice as long as what is looked for.
const OVERLAP: usize = 64;
/// Before and behind the configuration that a kernel has built into it.
const CONFIG_BEGIN: &[u8] = b"IKCFG_ST";
const CONFIG_END: &[u8] = b"IKCFG_ED";
const CONFIG_BYTES: usize = 4 << 20;

/// How the kernel in an image is packed, by its first bytes.
const PACKERS: [(&[u8], Packer); 8] = [
    (&[0x1f, 0x8b], Packer::Gzip),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], Packer::Xz),
    (&[0x28, 0xb5, 0x2f, 0xfd], Packer::Zstd),
    (b"\x7fELF", Packer::None),
    (&[0x5d, 0, 0], Packer::Other("lzma")),
    (&[0x02, 0x21, 0x4c, 0x18], Packer::Other("lz4")),
    (&[0x89, b'L', b'Z', b'O'], Packer::Other("lzo")),
    (b"BZh", Packer::Other("bzip2")),
];

/// The longest of them.
const MAGIC_BYTES: u64 = 6;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packer {
    Gzip,
    Xz,
    Zstd,
    None,
    /// One that is not unpacked here.
    Other(&'static str),
}

/// The formats that a kernel reads and writes, by their compatible strings: for each the versions that occur in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Formats {
    pub(super) kho: BTreeSet<String>,
    pub(super) luo: BTreeSet<String>,
    pub(super) memfd: BTreeSet<String>,
}

/// What was found in a kernel.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) formats: Formats,
    /// How it was built, as gzip packed it.
    config: Option<Vec<u8>>,
}

/// An image.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) description: Description,
    /// What is in it, or why that cannot be told.
    pub(super) contents: Result<Contents, String>,
}

impl Image {
    /// Reads an image, or says why it is none that can be booted.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let mut file = File::open(path).map_err(|error| format!("{shown}: {error}"))?;
        let description = linux::describe(&mut file).map_err(|error| format!("{shown}: {error}"))?;
        let contents = contents(file, &description);
        Ok(Self { description, contents })
    }

    /// The kernel's release, as `uname -r` will give it.
    pub(super) fn release(&self) -> Option<&str> {
        self.description.version.as_deref()?.split_whitespace().next()
    }

    /// How it was built, if it has that in it.
    pub(super) fn config(&self) -> Option<Config> {
        let packed = self.contents.as_ref().ok()?.config.as_ref()?;
        Config::unpack(packed, "in the image".to_owned())
    }
}

fn contents(mut file: impl Read + Seek, description: &Description) -> Result<Contents, String> {
    let place = description.payload.clone().ok_or("its header does not say where the kernel is in it")?;
    let failed = |error: io::Error| format!("the kernel in it cannot be read: {error}");
    let mut magic = Vec::new();
    file.seek(SeekFrom::Start(place.start)).map_err(failed)?;
    let first = file.by_ref().take((place.end - place.start).min(MAGIC_BYTES)).read_to_end(&mut magic);
    first.map_err(failed)?;
    file.seek(SeekFrom::Start(place.start)).map_err(failed)?;
    let packed = BufReader::new(file.take(place.end - place.start));
    let packer = PACKERS.into_iter().find(|(begins, _)| magic.starts_with(begins)).map(|(_, packer)| packer);
    let unpacked: Box<dyn Read + '_> = match packer {
        Some(Packer::None) => Box::new(packed),
        Some(Packer::Gzip) => Box::new(flate2::read::GzDecoder::new(packed)),
        Some(Packer::Xz) => {
            let kib = u32::try_from(WINDOW_BYTES >> 10).unwrap_or(u32::MAX);
            Box::new(lzma_rust2::XzReader::new_mem_limit(packed, false, kib))
        }
        Some(Packer::Zstd) => {
            let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(packed, WINDOW_BYTES);
            Box::new(decoder.map_err(|error| format!("it cannot be unpacked: {error}"))?)
        }
        Some(Packer::Other(name)) => {
            return Err(format!("the kernel in it is packed by {name}, which cannot be unpacked here"));
        }
        None => {
            let hex = magic.iter().fold(String::new(), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            });
            return Err(format!("the kernel in it is packed in an unknown way (it begins with {hex})"));
        }
    };
    search(unpacked.take(MOST_BYTES)).map_err(|error| format!("it cannot be unpacked: {error}"))
}

/// Looks through a kernel.
fn search(mut kernel: impl Read) -> io::Result<Contents> {
    let mut found = Contents::default();
    let mut config = Collector::default();
    // The end of the piece before, and then the piece.
    let mut window: Vec<u8> = Vec::new();
    loop {
        let kept = window.len();
        let read = kernel.by_ref().take(PIECE_BYTES).read_to_end(&mut window)?;
        // What begins nearer to the end may be cut off there, and is whole in the next window.
        let end = if read == 0 { window.len() } else { window.len().saturating_sub(OVERLAP / 2) };
        find_formats(&window, kept.saturating_sub(OVERLAP / 2)..end, &mut found.formats);
        config.add(&window, kept);
        if read == 0 {
            break;
        }
        window.drain(..window.len().saturating_sub(OVERLAP));
    }
    found.config = config.whole;
    Ok(found)
}

/// Adds the formats whose names have their `-v` in this part of the bytes.
fn find_formats(bytes: &[u8], part: Range<usize>, formats: &mut Formats) {
    for at in part.filter(|at| bytes[*at..].starts_with(b"-v")) {
        let versions = match &bytes[..at] {
            before if before.ends_with(b"kho") => &mut formats.kho,
            before if before.ends_with(b"luo") => &mut formats.luo,
            before if before.ends_with(b"memfd") => &mut formats.memfd,
            _ => continue,
        };
        // No further than tells whether it is one of these.
        let letters = bytes[..at].iter().rev().take(6).take_while(|byte| is_of_a_name(**byte)).count();
        let digits = bytes[at + 2..].iter().take(5).take_while(|byte| byte.is_ascii_digit()).count();
        let name = &bytes[at - letters..at + 2 + digits];
        // A longer name that ends or begins so is another.
        let whole = (1..=4).contains(&digits) && bytes.get(at + 2 + digits) == Some(&0);
        if whole && [&b"kho-"[..], b"luo-", b"memfd-"].iter().any(|begins| name.starts_with(begins)) {
            versions.insert(String::from_utf8_lossy(name).into_owned());
        }
    }
}

const fn is_of_a_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

/// Collects what stands between the two marks.
#[derive(Default)]
struct Collector {
    begun: Option<Vec<u8>>,
    whole: Option<Vec<u8>>,
}

impl Collector {
    /// Takes up a window whose first `seen` bytes were in the one before.
    fn add(&mut self, window: &[u8], seen: usize) {
        if self.whole.is_some() {
            return;
        }
        match &mut self.begun {
            Some(begun) => begun.extend_from_slice(&window[seen..]),
            None => match find(window, CONFIG_BEGIN) {
                Some(at) => self.begun = Some(window[at + CONFIG_BEGIN.len()..].to_vec()),
                None => return,
            },
        }
        let Some(begun) = &mut self.begun else { return };
        if let Some(end) = find(begun, CONFIG_END) {
            begun.truncate(end);
            self.whole = self.begun.take();
        } else if begun.len() > CONFIG_BYTES {
            self.begun = None;
        }
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;
    use ruzstd::encoding::CompressionLevel;
    use ruzstd::encoding::compress_to_vec;

    use super::super::tree::Tree;
    use super::super::tree::good_kernel;
    use super::super::tree::gzip;
    use super::super::tree::image;
    use super::super::tree::kernel;
    use super::*;

    /// `\x7fELF`, the three formats, and 20 calls, as Linux's build packs a kernel: by xz, after its filter for x86.
    const XZ: [u8; 136] = [
        0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x01, 0x04, 0x00, 0x21,
        0x01, 0x1a, 0x00, 0x01, 0xc9, 0x80, 0xb3, 0xe0, 0x00, 0x7f, 0x00, 0x4a, 0x5d, 0x00, 0x3f, 0x91, 0x45,
        0x84, 0x68, 0x2d, 0x79, 0x27, 0xd5, 0x50, 0x72, 0xff, 0xec, 0xd2, 0xf7, 0x2e, 0x59, 0x30, 0x69, 0x08,
        0x8a, 0x14, 0xbf, 0x94, 0x9a, 0x8c, 0xe4, 0x63, 0xb9, 0x4d, 0x24, 0x4a, 0x55, 0xc0, 0x5b, 0xbb, 0xce,
        0x46, 0x90, 0xd2, 0x08, 0x85, 0x22, 0xa3, 0x6b, 0x7c, 0xd1, 0xc1, 0x88, 0xeb, 0xac, 0xa2, 0x3c, 0xa7,
        0x7d, 0x75, 0x32, 0xd7, 0x27, 0xdd, 0xa8, 0x26, 0x5b, 0x72, 0x84, 0xbc, 0xfe, 0xe5, 0x2e, 0x84, 0x9d,
        0x67, 0xbe, 0x00, 0x00, 0x00, 0x00, 0x47, 0x3e, 0x55, 0x91, 0x00, 0x01, 0x62, 0x80, 0x01, 0x00, 0x00,
        0x00, 0x7b, 0xad, 0x33, 0x8f, 0x3e, 0x30, 0x0d, 0x8b, 0x02, 0x00, 0x00, 0x00, 0x00, 0x01, 0x59, 0x5a,
    ];

    fn open(packed: &[u8]) -> Image {
        let tree = Tree::new();
        tree.file("/image", image("7.3.4 (someone) #1", packed));
        Image::open(&tree.path("/image")).unwrap()
    }

    fn formats(packed: &[u8]) -> [Vec<String>; 3] {
        let Formats { kho, luo, memfd } = open(packed).contents.unwrap().formats;
        [kho, luo, memfd].map(|versions| versions.into_iter().collect())
    }

    fn good() -> [Vec<String>; 3] {
        ["kho-v4", "luo-v5", "memfd-v2"].map(|format| vec![format.to_owned()])
    }

    #[test]
    fn a_kernel_is_looked_through_however_it_is_packed() {
        // The kernel's build puts the size behind what xz and zstd packed.
        let sized = |packed: &[u8]| [packed, &[1, 2, 3, 4]].concat();
        assert_eq!(formats(&good_kernel()), good());
        assert_eq!(formats(&gzip(&good_kernel())), good());
        assert_eq!(formats(&sized(&compress_to_vec(&good_kernel()[..], CompressionLevel::Fastest))), good());
        assert_eq!(formats(&sized(&XZ)), good());
    }

    #[test]
    fn what_cannot_be_unpacked_says_why() {
        let why = |packed: &[u8]| open(packed).contents.unwrap_err();
        assert!(why(&[0x02, 0x21, 0x4c, 0x18, 0, 0]).contains("lz4"));
        assert!(why(&[0x5d, 0, 0, 0, 0, 0]).contains("lzma"));
        assert!(why(&[0xab; 6]).contains("abababababab"));
        assert!(why(&[]).contains("does not say where"));
        assert!(why(&[0x1f]).contains("begins with 1f)"));
        let broken = [&gzip(&good_kernel())[..20], &[0xff; 20]].concat();
        assert!(why(&broken).contains("cannot be unpacked"));
        assert!(why(&[0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff]).contains("cannot be unpacked"));
        // xz's dictionary, of 4 GiB, is not made.
        let mut greedy = XZ;
        greedy[18] = 40;
        assert!(why(&greedy).contains("cannot be unpacked"));
    }

    #[test]
    fn a_format_is_found_across_the_pieces_that_a_kernel_is_read_in() {
        let piece = usize::try_from(PIECE_BYTES).unwrap();
        for before in (piece - 80..piece + 10).chain([0, 1, 2 * piece - 70, 2 * piece - 10]) {
            let kernel = [&vec![0; before][..], b"kho-v12\0", &[0; 200]].concat();
            let found = search(&kernel[..]).unwrap().formats;
            assert_eq!(found.kho, BTreeSet::from(["kho-v12".to_owned()]), "{before}");
            let longer = [&vec![b'x'; before.max(1)][..], b"kho-v12\0", &[0; 200]].concat();
            assert_eq!(search(&longer[..]).unwrap().formats, Formats::default(), "{before}");
        }
        let last = search(&b"\0luo-v5\0"[..]).unwrap().formats;
        assert_eq!(last.luo, BTreeSet::from(["luo-v5".to_owned()]));
    }

    #[test]
    fn what_only_looks_like_a_format_is_none() {
        let none = ["kho-v", "kho-vx", "kho-v4x", "kho-v12345", "guest_memfd-v1", "-luo-v5"];
        assert_eq!(search(&kernel(&none, None)[..]).unwrap().formats, Formats::default());
    }

    #[test]
    fn the_configuration_is_found_wherever_it_lies() {
        let piece = usize::try_from(PIECE_BYTES).unwrap();
        let config = kernel(&[], Some("CONFIG_KVM=y\n"));
        for before in [0, piece - 60, piece - 9, piece - 1, piece, 3 * piece - 120] {
            let kernel = [&vec![0; before][..], &config].concat();
            let packed = search(&kernel[..]).unwrap().config.unwrap();
            assert!(Config::unpack(&packed, String::new()).unwrap().has_kvm(), "{before}");
        }
        let endless = [&b"IKCFG_ST"[..], &vec![0; 2 * CONFIG_BYTES]].concat();
        assert!(search(&endless[..]).unwrap().config.is_none());
    }

    #[test]
    fn what_is_no_image_says_why() {
        let tree = Tree::new();
        tree.file("/image", b"MZ");
        assert!(Image::open(&tree.path("/image")).unwrap_err().contains("no whole bzImage"));
        assert!(Image::open(&tree.path("/none")).unwrap_err().contains("/none: "));
    }

    proptest! {
        #[test]
        fn no_image_panics(
            packer in 0_usize..4,
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let kernel = good_kernel();
            let mut packed = match packer {
                0 => kernel,
                1 => gzip(&kernel),
                2 => compress_to_vec(&kernel[..], CompressionLevel::Fastest),
                _ => XZ.to_vec(),
            };
            for (place, value) in changes {
                *place.get_mut(&mut packed) = value;
            }
            let mut image = Cursor::new(image("7.3.4", &packed));
            let description = linux::describe(&mut image).unwrap();
            let _ = contents(image, &description);
        }
    }
}
