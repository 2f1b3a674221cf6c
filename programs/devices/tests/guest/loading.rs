//! What stands where after a kernel was loaded.

use devices::GuestMemory;
use devices::linux::Loaded;

use crate::image::MIB;
use crate::image::PREFERRED;
use crate::image::SETUP;
use crate::image::bytes;
use crate::image::dword;
use crate::image::image;
use crate::image::load;
use crate::image::memory;
use crate::image::put;
use crate::image::qword;

const GIB: u64 = 1 << 30;

fn initrd_of(memory: &GuestMemory, image: &[u8], len: usize) -> (u64, u64) {
    load(memory, image, Some(&vec![0x5a; len]), "").unwrap().initrd.unwrap()
}

#[test]
fn the_zero_page_says_what_was_loaded() {
    let memory = memory(&[(0, 16 * MIB)]);
    let image = image(b"code");
    let loaded = load(&memory, &image, Some(&[7; 5000]), "console=ttyS0 quiet").unwrap();
    let initrd = 16 * MIB - 2 * 4096;
    let expected =
        Loaded { kernel_address: PREFERRED, boot_params_address: 0x7000, initrd: Some((initrd, 5000)) };
    assert_eq!(loaded, expected);
    let zero_page = loaded.boot_params_address;
    assert_eq!(bytes(&memory, zero_page + 0x202), *b"HdrS\x0f\x02");
    assert_eq!(bytes(&memory, zero_page + 0x1fe), [0x55, 0xaa]);
    assert_eq!(bytes(&memory, zero_page + 0x210), [0xff], "type_of_loader");
    assert_eq!(dword(&memory, zero_page + 0x214), u32::try_from(PREFERRED).unwrap(), "code32_start");
    assert_eq!(u64::from(dword(&memory, zero_page + 0x218)), initrd);
    assert_eq!(dword(&memory, zero_page + 0x21c), 5000);
    let command_line = u64::from(dword(&memory, zero_page + 0x228));
    assert_eq!(bytes(&memory, command_line), *b"console=ttyS0 quiet\0");
    assert_eq!(qword(&memory, zero_page + 0x250), 0, "setup_data");
    assert_eq!(bytes(&memory, zero_page + 0x1ef), [0], "sentinel");
    assert_eq!(bytes(&memory, PREFERRED + 0x200), *b"code");
    assert_eq!(bytes(&memory, initrd), [7; 5000]);
    assert_eq!(bytes(&memory, initrd + 5000), [0]);
}

#[test]
fn only_the_header_of_an_older_kernel_is_copied_and_not_the_code_behind_it() {
    let memory = memory(&[(0, 16 * MIB)]);
    let mut image = image(b"code");
    put(&mut image, 0x206, &0x020d_u16.to_le_bytes());
    // It ends before `kernel_info_offset`.
    put(&mut image, 0x201, &[0x66]);
    put(&mut image, 0x268, &[0xcc; 4]);
    let loaded = load(&memory, &image, None, "").unwrap();
    assert_eq!(dword(&memory, loaded.boot_params_address + 0x268), 0);
    assert_eq!(u64::from(dword(&memory, loaded.boot_params_address + 0x260)), MIB);
}

/// The e820 table: address, size, type.
fn e820(memory: &GuestMemory) -> Vec<(u64, u64, u32)> {
    let [count] = bytes(memory, 0x7000 + 0x1e8);
    (0..u64::from(count))
        .map(|entry| 0x7000 + 0x2d0 + 20 * entry)
        .map(|at| (qword(memory, at), qword(memory, at + 8), dword(memory, at + 16)))
        .collect()
}

#[test]
fn memory_is_told_of_but_for_the_part_of_a_pcs_firmware() {
    let one = memory(&[(0, 16 * MIB)]);
    load(&one, &image(b""), None, "").unwrap();
    assert_eq!(e820(&one), [(0, 0x9_fc00, 1), (MIB, 15 * MIB, 1)]);
    let holed = memory(&[(4 * GIB, GIB), (0, 8 * MIB), (8 * MIB, 3 * GIB - 8 * MIB), (5 * GIB + 4096, 4096)]);
    load(&holed, &image(b""), None, "").unwrap();
    assert_eq!(
        e820(&holed),
        [(0, 0x9_fc00, 1), (MIB, 3 * GIB - MIB, 1), (4 * GIB, GIB, 1), (5 * GIB + 4096, 4096, 1)]
    );
}

#[test]
fn the_initial_ram_disk_is_as_high_as_the_kernel_reaches_and_below_4_gib() {
    let large = memory(&[(0, 3 * GIB), (4 * GIB, GIB)]);
    assert_eq!(initrd_of(&large, &image(b""), 4097), (2 * GIB - 2 * 4096, 4097), "initrd_addr_max is 2 GiB");
    let mut reaching = image(b"");
    put(&mut reaching, 0x22c, &u32::MAX.to_le_bytes());
    assert_eq!(initrd_of(&large, &reaching, 4096), (3 * GIB - 4096, 4096));
    let small = memory(&[(0, 16 * MIB)]);
    assert_eq!(initrd_of(&small, &image(b""), 1), (16 * MIB - 4096, 1));
}

#[test]
fn the_initial_ram_disk_does_not_overlap_the_kernel() {
    // The kernel has 2 to 3 MiB; there is room above it, or only below it.
    let above = memory(&[(0, 4 * MIB)]);
    assert_eq!(initrd_of(&above, &image(b""), 1 << 20), (3 * MIB, MIB));
    let below = memory(&[(0, 3 * MIB + 4096)]);
    assert_eq!(initrd_of(&below, &image(b""), 1 << 20), (MIB, MIB));
}

#[test]
fn a_kernel_goes_where_it_wants_or_to_the_first_place_that_has_its_alignment() {
    let mut image = image(b"code");
    put(&mut image, 0x258, &(64 * MIB).to_le_bytes());
    put(&mut image, 0x230, &0x40_0000_u32.to_le_bytes());
    let large = memory(&[(0, 128 * MIB)]);
    assert_eq!(load(&large, &image, None, "").unwrap().kernel_address, 64 * MIB);
    let small = memory(&[(0, 16 * MIB)]);
    assert_eq!(load(&small, &image, None, "").unwrap().kernel_address, 4 * MIB);
    assert_eq!(bytes(&small, 4 * MIB + 0x200), *b"code");
}

#[test]
fn the_tables_map_the_first_4_gib_to_themselves() {
    let memory = memory(&[(0, 16 * MIB)]);
    let loaded = load(&memory, &image(b""), None, "").unwrap();
    let sregs = loaded.sregs(kvm_bindings::kvm_sregs::default());
    for address in [0, 0x20_0000, GIB - 1, GIB, 3 * GIB + 0x1234_5678, 4 * GIB - 1] {
        let pdpt = qword(&memory, sregs.cr3) & !0xfff;
        let directory = qword(&memory, pdpt + 8 * (address >> 30)) & !0xfff;
        let leaf = qword(&memory, directory + 8 * (address >> 21 & 511));
        assert_eq!((leaf & !0xfff) + (address & 0x1f_ffff), address, "{address:#x}");
        assert_eq!(leaf & 0x83, 0x83, "present, writable, huge");
    }
    let code = qword(&memory, sregs.gdt.base + u64::from(sregs.cs.selector));
    assert_eq!(code >> 40 & 0xff, 0x9b, "a code segment that is executable and present");
    assert_eq!((code >> 53 & 1, sregs.cs.l), (1, 1), "of 64 bits");
    assert_eq!(loaded.regs().rip, PREFERRED + 0x200);
    assert_eq!(loaded.regs().rsi, 0x7000);
    assert_eq!(SETUP, 1024);
}

#[test]
fn the_command_line_names_a_virtio_device_as_linux_wants_it() {
    assert_eq!(devices::linux::virtio_parameter(0xd000_0000, 5), "virtio_mmio.device=4K@0xd0000000:5");
}
