//! Starting Linux: kernel, initial RAM disk and command line in guest memory, and a vCPU at the kernel's 64-bit entry.
//!
//! Follows the kernel's `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol". What is placed by us, below 640 KiB:
//!
//! | address | what |
//! | --- | --- |
//! | 0x6000 | descriptor table with the segments that the protocol names, and a task state segment |
//! | 0x7000 | `struct boot_params`, the "zero page" |
//! | 0x8000 | a page of stack |
//! | 0x9000 | six pages of page tables: the first 4 GiB, each address at itself |
//! | 0x20000 | the command line |
//!
//! The kernel goes where it wants to be, or, if it can be moved and there is no memory, to the first place from 1 MiB on
//! that has its alignment. The initial RAM disk goes to the highest place below 4 GiB that the kernel can reach.
//!
//! There are no tables of a firmware (ACPI, MP): the command line is to say what the kernel cannot find out, as
//! [`virtio_parameter`] does.

use std::io;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::ops::Range;

use kvm_bindings::kvm_dtable;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_sregs;
use linux_loader::configurator::BootConfigurator;
use linux_loader::configurator::BootParams;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::loader::BzImage;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::boot_e820_entry;
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::bootparam::setup_header;
use thiserror::Error;
use vm_memory::ByteValued;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::ReadVolatile;
use vm_memory::VolatileSlice;

use crate::memory::GuestMemory;
use crate::memory::NoGuestMemory;

const GDT: u64 = 0x6000;
const ZERO_PAGE: u64 = 0x7000;
const STACK_TOP: u64 = 0x9000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const DIRECTORIES: u64 = 0xb000;
const COMMAND_LINE: u64 = 0x2_0000;
/// Where a PC's low memory ends: what is above is the firmware's.
const LOW_END: u64 = 0x9_fc00;
/// Where memory goes on.
const HIGH: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Up to where the page tables go.
const MAPPED_END: u64 = 4 * GIB;
const PAGE: u64 = 4096;

/// Where the setup header stands in an image and in the zero page.
const HEADER: u64 = 0x1f1;
/// The place from which a byte of the header, in the jump over it, counts to its end.
const HEADER_JUMP: usize = 0x202 - 0x1f1;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const BOOT_FLAG: u16 = 0xaa55;
/// 2.12: the first that says whether there is a 64-bit entry.
const OLDEST: u16 = 0x020c;
/// In `loadflags`: the kernel goes to 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// In `xloadflags`: there is a 64-bit entry.
const KERNEL_64: u16 = 1;
/// In `xloadflags`: it may lie above 4 GiB.
const ABOVE_4_GIB: u16 = 2;
/// From where the header counts to the kernel's version.
const VERSION_BASE: u64 = 0x200;
/// More than Linux writes.
const VERSION_BYTES: u64 = 512;
/// Where that entry is in the kernel.
const ENTRY: u64 = 0x200;
const SECTOR: u64 = 512;
/// A loader without a number of its own.
const OTHER_LOADER: u8 = 0xff;
const E820_RAM: u32 = 1;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
const TASK_LIMIT: u16 = 0x67;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Present, writable, accessed, dirty.
const TABLE_ENTRY: u64 = 0x63;
const HUGE_LEAF: u64 = 0x80;

/// Why a kernel is not in guest memory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file could not be read.
    #[error("cannot read the {file}")]
    Read {
        /// Which.
        file: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image is not one that can be started so.
    #[error("it is no bzImage with a 64-bit entry: its `{field}` is {found:#x}, which {why}")]
    Image {
        /// Field of the setup header.
        field: &'static str,
        /// What it is.
        found: u64,
        /// What is wrong with that.
        why: &'static str,
    },
    /// The image ends too early.
    #[error("it is no whole bzImage: it has {have} bytes, and should have {need}")]
    Truncated {
        /// Bytes that it has.
        have: u64,
        /// Bytes that its header speaks of.
        need: u64,
    },
    /// There is no place for something.
    #[error("no room for the {what} of {len_bytes:#x} bytes in guest memory")]
    NoRoom {
        /// What.
        what: &'static str,
        /// Its length.
        len_bytes: u64,
    },
    /// The command line is longer than the kernel takes, or has a NUL in it.
    #[error("the command line has {len_bytes} bytes, and the kernel takes {most}, without NUL")]
    CommandLine {
        /// Its length.
        len_bytes: usize,
        /// The most that the kernel takes.
        most: usize,
    },
    /// Guest memory is in more pieces than can be told to the kernel.
    #[error("guest memory is in {pieces} pieces, and the kernel can be told of {most}")]
    Pieces {
        /// Pieces.
        pieces: usize,
        /// The most that there may be.
        most: usize,
    },
    /// Guest memory lacks what every PC has.
    #[error("guest memory lacks its low part")]
    Low(#[source] NoGuestMemory),
    /// The loader's own refusal.
    #[error("the kernel cannot be loaded: {0}")]
    Loader(String),
}

/// A kernel in guest memory, and how it is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// Guest-physical address of the kernel's first byte.
    pub kernel_address: u64,
    /// Guest-physical address of `struct boot_params`.
    pub boot_params_address: u64,
    /// Guest-physical address and length of the initial RAM disk.
    pub initrd: Option<(u64, u64)>,
}

/// Puts a kernel (a bzImage with a 64-bit entry), an initial RAM disk and a command line into memory.
///
/// # Errors
/// [`LoadError`]; part of it may have been written.
pub fn load<K, I>(
    memory: &GuestMemory,
    kernel: &mut K,
    initrd: Option<&mut I>,
    command_line: &str,
) -> Result<Loaded, LoadError>
where
    K: Read + ReadVolatile + Seek,
    I: ReadVolatile + Seek,
{
    memory.check(0, LOW_END).map_err(LoadError::Low)?;
    let image = Image::read(kernel)?;
    let most = usize::try_from(u64::from(image.header.cmdline_size).min(LOW_END - COMMAND_LINE - 1));
    check_command_line(command_line, most.unwrap_or(usize::MAX))?;
    let place = image.place(memory)?;
    let result = BzImage::load(memory.backend(), Some(GuestAddress(place)), kernel, None);
    let loaded = result.map_err(|error| LoadError::Loader(error.to_string()))?;
    let mut parameters = boot_params { hdr: image.header, ..boot_params::default() };
    if let Some(header) = loaded.setup_header {
        parameters.hdr.code32_start = header.code32_start;
    }
    let initrd = initrd.map(|initrd| load_initrd(memory, initrd, &image, place)).transpose()?;
    if let Some((address, len)) = initrd {
        parameters.hdr.ramdisk_image = below_4_gib("initial RAM disk", address)?;
        parameters.hdr.ramdisk_size = below_4_gib("initial RAM disk", len)?;
    }
    parameters.hdr.type_of_loader = OTHER_LOADER;
    parameters.hdr.cmd_line_ptr = below_4_gib("command line", COMMAND_LINE)?;
    parameters.hdr.setup_data = 0;
    set_e820(&mut parameters, memory)?;
    let text: Vec<u8> = command_line.bytes().chain([0]).collect();
    memory.write(COMMAND_LINE, &text).map_err(LoadError::Low)?;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&parameters, GuestAddress(ZERO_PAGE)),
        memory.backend(),
    )
    .map_err(|error| LoadError::Loader(error.to_string()))?;
    write_tables(memory).map_err(LoadError::Low)?;
    Ok(Loaded { kernel_address: place, boot_params_address: ZERO_PAGE, initrd })
}

/// That this can be a kernel for [`load`], before there is memory for it.
///
/// # Errors
/// [`LoadError`] if it is no bzImage with a 64-bit entry, or cannot be read.
pub fn check(kernel: &mut (impl ReadVolatile + Seek)) -> Result<(), LoadError> {
    Image::read(kernel).map(drop)
}

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Its release and how it was built, as `7.3.4 (user@host) #1 SMP`; `None` if it does not say.
    pub version: Option<String>,
    /// The boot protocol that it follows: 2 and 15 for 2.15.
    pub protocol: (u8, u8),
    /// It runs wherever it is put.
    pub relocatable: bool,
    /// It may be put above 4 GiB.
    pub above_4_gib: bool,
    /// Bytes of memory that it needs in one piece until it has unpacked itself.
    pub init_bytes: u64,
    /// Bytes that a command line may have, without a NUL.
    pub command_line_bytes: u64,
    /// Where the kernel itself is in the image, packed in one way or another; `None` if there is nothing there.
    pub payload: Option<Range<u64>>,
}

/// Reads what an image says of itself: nothing of it is unpacked or believed but what [`check`] looks at.
///
/// # Errors
/// As [`check`].
pub fn describe(kernel: &mut (impl ReadVolatile + Seek)) -> Result<Description, LoadError> {
    let Image { header, setup_bytes, kernel_bytes } = Image::read(kernel)?;
    let [minor, major] = header.version.to_le_bytes();
    let first = setup_bytes + u64::from(header.payload_offset);
    let end = first + u64::from(header.payload_length);
    let payload = header.payload_length > 0 && end <= setup_bytes + kernel_bytes;
    Ok(Description {
        version: read_version(kernel, u64::from(header.kernel_version), setup_bytes)?,
        protocol: (major, minor),
        relocatable: header.relocatable_kernel != 0,
        above_4_gib: header.xloadflags & ABOVE_4_GIB != 0,
        init_bytes: header.init_size.into(),
        command_line_bytes: header.cmdline_size.into(),
        payload: payload.then_some(first..end),
    })
}

fn read_version(
    kernel: &mut (impl ReadVolatile + Seek),
    offset: u64,
    setup_bytes: u64,
) -> Result<Option<String>, LoadError> {
    let first = VERSION_BASE + offset;
    let len = setup_bytes.saturating_sub(first).min(VERSION_BYTES);
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
    read_at(kernel, first, &mut bytes)?;
    let end = bytes.iter().position(|byte| *byte == 0);
    Ok(end.map(|end| String::from_utf8_lossy(&bytes[..end]).into_owned()).filter(|text| !text.is_empty()))
}

/// What to write into the command line for a virtio device with its window of 4 KiB at this address, and this
/// interrupt.
#[must_use]
pub fn virtio_parameter(window_address: u64, interrupt: u32) -> String {
    format!("virtio_mmio.device=4K@{window_address:#x}:{interrupt}")
}

impl Loaded {
    /// The general registers to start with.
    #[must_use]
    pub fn regs(&self) -> kvm_regs {
        kvm_regs {
            rip: self.kernel_address + ENTRY,
            rsi: self.boot_params_address,
            rsp: STACK_TOP,
            // Bit 1 is always set; interrupts are off.
            rflags: 2,
            ..kvm_regs::default()
        }
    }

    /// The special registers to start with, made from those that the vCPU has: 64-bit mode, privilege level 0.
    #[must_use]
    pub fn sregs(&self, current: kvm_sregs) -> kvm_sregs {
        let mut sregs = current;
        sregs.cs = segment(CODE_SELECTOR, 0xb);
        (sregs.cs.l, sregs.cs.db) = (1, 0);
        let data = segment(DATA_SELECTOR, 3);
        for place in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *place = data;
        }
        sregs.tr = kvm_segment {
            limit: TASK_LIMIT.into(),
            selector: TASK_SELECTOR,
            type_: 0xb,
            present: 1,
            ..kvm_segment::default()
        };
        sregs.ldt = kvm_segment { unusable: 1, ..kvm_segment::default() };
        sregs.gdt = kvm_dtable { base: GDT, limit: 8 * 6 - 1, ..kvm_dtable::default() };
        sregs.idt = kvm_dtable::default();
        sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
        sregs.cr3 = PML4;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
        sregs
    }
}

/// An image whose header was checked.
struct Image {
    header: setup_header,
    /// Bytes of the part for real mode.
    setup_bytes: u64,
    /// Bytes of the kernel without the part for real mode.
    kernel_bytes: u64,
}

impl Image {
    fn read<K: ReadVolatile + Seek>(kernel: &mut K) -> Result<Self, LoadError> {
        let have = len_of("kernel's image", kernel)?;
        let header = read_header(kernel, have)?;
        let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
        let setup_bytes = (sectors + 1) * SECTOR;
        let need = setup_bytes + (u64::from(header.syssize) * 16).max(ENTRY + 1);
        if have < need {
            return Err(LoadError::Truncated { have, need });
        }
        Ok(Self { header, setup_bytes, kernel_bytes: have - setup_bytes })
    }

    /// Where the kernel goes.
    fn place(&self, memory: &GuestMemory) -> Result<u64, LoadError> {
        let header = self.header;
        // It needs so much from there on to unpack itself.
        let len_bytes = u64::from(header.init_size).max(self.kernel_bytes);
        let fits = |place: u64| {
            let end = place.checked_add(len_bytes);
            place >= HIGH
                && end.is_some_and(|end| end <= MAPPED_END)
                && memory.check(place, len_bytes).is_ok()
        };
        let wanted = header.pref_address;
        if fits(wanted) {
            return Ok(wanted);
        }
        let no_room = LoadError::NoRoom { what: "kernel", len_bytes };
        if header.relocatable_kernel == 0 {
            return Err(no_room);
        }
        let align = u64::from(header.kernel_alignment);
        let why = "is no power of two";
        if !align.is_power_of_two() {
            return Err(LoadError::Image { field: "kernel_alignment", found: align, why });
        }
        let first = HIGH.next_multiple_of(align);
        if fits(first) { Ok(first) } else { Err(no_room) }
    }
}

fn read_header<K: ReadVolatile + Seek>(kernel: &mut K, have: u64) -> Result<setup_header, LoadError> {
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    let need = HEADER + u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if have < need {
        return Err(LoadError::Truncated { have, need });
    }
    read_at(kernel, HEADER, bytes)?;
    // Older headers are shorter, and what follows is code.
    let end = HEADER_JUMP + usize::from(bytes.get(HEADER_JUMP - 1).copied().unwrap_or_default());
    bytes.iter_mut().skip(end).for_each(|byte| *byte = 0);
    check_header(&header)?;
    Ok(header)
}

fn read_at(kernel: &mut (impl ReadVolatile + Seek), place: u64, bytes: &mut [u8]) -> Result<(), LoadError> {
    let failed = |source| LoadError::Read { file: "kernel's image", source };
    kernel.seek(SeekFrom::Start(place)).map_err(failed)?;
    kernel
        .read_exact_volatile(&mut VolatileSlice::from(bytes))
        .map_err(|error| failed(io::Error::other(error)))
}

fn check_header(header: &setup_header) -> Result<(), LoadError> {
    let setup_header { boot_flag, header: magic, version, loadflags, xloadflags, .. } = *header;
    let checks = [
        ("boot_flag", boot_flag == BOOT_FLAG, u64::from(boot_flag), "is not 0xaa55"),
        ("header", magic == HEADER_MAGIC, magic.into(), "is not \"HdrS\""),
        ("version", version >= OLDEST, version.into(), "is below 2.12"),
        ("loadflags", loadflags & LOADED_HIGH != 0, loadflags.into(), "is of a kernel for low memory"),
        ("xloadflags", xloadflags & KERNEL_64 != 0, xloadflags.into(), "has no 64-bit entry"),
    ];
    for (field, good, found, why) in checks {
        if !good {
            return Err(LoadError::Image { field, found, why });
        }
    }
    Ok(())
}

fn check_command_line(text: &str, most: usize) -> Result<(), LoadError> {
    let len_bytes = text.len();
    if len_bytes > most || text.contains('\0') {
        return Err(LoadError::CommandLine { len_bytes, most });
    }
    Ok(())
}

fn len_of(file: &'static str, from: &mut impl Seek) -> Result<u64, LoadError> {
    from.seek(SeekFrom::End(0)).map_err(|source| LoadError::Read { file, source })
}

fn below_4_gib(what: &'static str, value: u64) -> Result<u32, LoadError> {
    u32::try_from(value).map_err(|_| LoadError::NoRoom { what, len_bytes: value })
}

/// Puts it to the highest place that there is, and answers address and length.
fn load_initrd<I: ReadVolatile + Seek>(
    memory: &GuestMemory,
    initrd: &mut I,
    image: &Image,
    kernel: u64,
) -> Result<(u64, u64), LoadError> {
    let file = "initial RAM disk";
    let len_bytes = len_of(file, initrd)?;
    let kernel_end = kernel + u64::from(image.header.init_size).max(image.kernel_bytes);
    let most = MAPPED_END.min(u64::from(image.header.initrd_addr_max) + 1);
    let no_room = LoadError::NoRoom { what: file, len_bytes };
    let len = usize::try_from(len_bytes).ok().filter(|len| *len > 0);
    let place = len.and_then(|_| highest(memory, len_bytes, most, kernel..kernel_end));
    let (Some(len), Some(place)) = (len, place) else { return Err(no_room) };
    let failed = |source| LoadError::Read { file, source };
    initrd.seek(SeekFrom::Start(0)).map_err(failed)?;
    memory
        .backend()
        .read_exact_volatile_from(GuestAddress(place), initrd, len)
        .map_err(|error| failed(io::Error::other(error)))?;
    Ok((place, len_bytes))
}

/// The highest page from 1 MiB on with `len` bytes of memory that end below `most` and are not in `taken`.
fn highest(memory: &GuestMemory, len: u64, most: u64, taken: Range<u64>) -> Option<u64> {
    let mut best = None;
    for (first, slot_len) in memory.slots() {
        // Below the end of the slot, or below what is taken.
        for end in [(first + slot_len).min(most), (first + slot_len).min(most).min(taken.start)] {
            let Some(place) = end.checked_sub(len).map(|place| place / PAGE * PAGE) else { continue };
            let free = place >= taken.end || place + len <= taken.start;
            if place >= first.max(HIGH) && free {
                best = best.max(Some(place));
            }
        }
    }
    best
}

/// Tells the kernel where memory is: all slots, less the firmware's part of a PC.
fn set_e820(parameters: &mut boot_params, memory: &GuestMemory) -> Result<(), LoadError> {
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    for (first, len) in memory.slots() {
        let end = first + len;
        for (first, end) in [(first, end.min(LOW_END)), (first.max(HIGH), end)] {
            match pieces.last_mut() {
                _ if first >= end => {}
                Some((_, last_end)) if *last_end == first => *last_end = end,
                _ => pieces.push((first, end)),
            }
        }
    }
    let mut table = parameters.e820_table;
    let (count, most) = (pieces.len(), table.len());
    let entries = u8::try_from(count).ok().filter(|_| count <= most);
    parameters.e820_entries = entries.ok_or(LoadError::Pieces { pieces: count, most })?;
    for (entry, (first, end)) in table.iter_mut().zip(pieces) {
        *entry = boot_e820_entry { addr: first, size: end - first, r#type: E820_RAM };
    }
    parameters.e820_table = table;
    Ok(())
}

fn write_tables(memory: &GuestMemory) -> Result<(), NoGuestMemory> {
    let code = 0x00af_9b00_0000_ffff;
    let data = 0x00cf_9300_0000_ffff;
    // Present, 64-bit task state segment, busy, at 0.
    let task = u64::from(TASK_LIMIT) | 0x8b << 40;
    write_words(memory, GDT, &[0, 0, code, data, task, 0])?;
    write_words(memory, PML4, &[PDPT | TABLE_ENTRY])?;
    let directories: Vec<u64> =
        (0..4).map(|gib: u64| DIRECTORIES + gib * PAGE).map(|address| address | TABLE_ENTRY).collect();
    write_words(memory, PDPT, &directories)?;
    let leaves: Vec<u64> =
        (0..MAPPED_END).step_by(2 << 20).map(|address| address | TABLE_ENTRY | HUGE_LEAF).collect();
    write_words(memory, DIRECTORIES, &leaves)
}

fn write_words(memory: &GuestMemory, address: u64, words: &[u64]) -> Result<(), NoGuestMemory> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write(address, &bytes)
}

/// A flat segment for privilege level 0.
fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { limit: u32::MAX, selector, type_, present: 1, db: 1, s: 1, g: 1, ..kvm_segment::default() }
}
