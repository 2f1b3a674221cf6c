//! Images, and memories, that no kernel starts from.

use devices::linux::LoadError;
use proptest::prelude::*;

use crate::image::MIB;
use crate::image::image;
use crate::image::load;
use crate::image::memory;
use crate::image::put;

fn error(change: impl FnOnce(&mut Vec<u8>)) -> LoadError {
    let mut image = image(b"code");
    change(&mut image);
    load(&memory(&[(0, 16 * MIB)]), &image, None, "").unwrap_err()
}

fn field(place: usize, bytes: &[u8]) -> &'static str {
    match error(|image| put(image, place, bytes)) {
        LoadError::Image { field, .. } => field,
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_field_of_a_broken_image_is_named() {
    assert_eq!(field(0x1fe, &[0]), "boot_flag");
    assert_eq!(field(0x202, b"h"), "header");
    assert_eq!(field(0x206, &[0x0b]), "version");
    assert_eq!(field(0x211, &[0]), "loadflags");
    assert_eq!(field(0x236, &[0]), "xloadflags");
    // One that has no room where it wants to be has to be moved.
    let nowhere = |image: &mut Vec<u8>| put(image, 0x258, &(1_u64 << 40).to_le_bytes());
    for align in [0_u32, 3] {
        let error = error(|image| {
            nowhere(image);
            put(image, 0x230, &align.to_le_bytes());
        });
        assert!(matches!(error, LoadError::Image { field: "kernel_alignment", .. }), "{error:?}");
    }
}

#[test]
fn an_image_that_ends_early_is_refused() {
    let whole = image(&[1; 100]);
    for len in 0..whole.len() {
        let error = load(&memory(&[(0, 16 * MIB)]), &whole[..len], None, "").unwrap_err();
        assert!(matches!(error, LoadError::Truncated { have, need } if have < need), "{len}: {error:?}");
    }
    // Its header speaks of more sectors than there are.
    let error = error(|image| put(image, 0x1f1, &[0xff]));
    assert!(matches!(error, LoadError::Truncated { .. }), "{error:?}");
    assert!(error.to_string().contains("should have"), "{error}");
}

#[test]
fn what_has_no_room_is_named() {
    let what = |error| match error {
        LoadError::NoRoom { what, len_bytes } => (what, len_bytes),
        other => panic!("{other:?}"),
    };
    let huge = error(|image| put(image, 0x260, &0x1000_0000_u32.to_le_bytes()));
    assert_eq!(what(huge), ("kernel", 0x1000_0000));
    let fixed = error(|image| {
        put(image, 0x258, &(15 * MIB + 1).to_le_bytes());
        put(image, 0x234, &[0]);
    });
    assert_eq!(what(fixed), ("kernel", MIB));
    let low = error(|image| {
        put(image, 0x258, &0x8000_u64.to_le_bytes());
        put(image, 0x234, &[0]);
    });
    assert_eq!(what(low), ("kernel", MIB));
    let small = memory(&[(0, 4 * MIB)]);
    let initrd = |len: usize| load(&small, &image(b""), Some(&vec![1; len]), "").unwrap_err();
    assert_eq!(what(initrd(0)), ("initial RAM disk", 0));
    assert_eq!(what(initrd((1 << 20) + 1)), ("initial RAM disk", MIB + 1));
    let none = load(&memory(&[(MIB, 16 * MIB)]), &image(b""), None, "").unwrap_err();
    assert!(matches!(none, LoadError::Low(_)), "{none:?}");
}

#[test]
fn a_command_line_that_the_kernel_does_not_take_is_refused() {
    let memory = memory(&[(0, 16 * MIB)]);
    let load = |text: &str| load(&memory, &image(b""), None, text);
    load(&"x".repeat(2047)).unwrap();
    let long = load(&"x".repeat(2048)).unwrap_err();
    assert!(matches!(long, LoadError::CommandLine { len_bytes: 2048, most: 2047 }), "{long:?}");
    assert!(matches!(load("a\0b").unwrap_err(), LoadError::CommandLine { .. }));
}

#[test]
fn memory_in_more_pieces_than_can_be_told_is_refused() {
    let mut slots = vec![(0, 16 * MIB)];
    slots.extend((0..127).map(|slot| (32 * MIB + slot * 8192, 4096)));
    let error = load(&memory(&slots), &image(b""), None, "").unwrap_err();
    assert!(matches!(error, LoadError::Pieces { pieces: 129, most: 128 }), "{error:?}");
    slots.pop();
    load(&memory(&slots), &image(b""), None, "").unwrap();
}

proptest! {
    #[test]
    fn no_header_panics_or_takes_long(
        changes in proptest::collection::vec((0x1f1_usize..0x270, any::<u8>()), 0..8),
        initrd in proptest::option::of(1_usize..100_000),
    ) {
        let mut image = image(&[1; 100]);
        changes.iter().for_each(|(place, value)| put(&mut image, *place, &[*value]));
        let initrd = initrd.map(|len| vec![2; len]);
        let memory = memory(&[(0, 8 * MIB), (16 * MIB, MIB)]);
        if let Ok(loaded) = load(&memory, &image, initrd.as_deref(), "quiet") {
            prop_assert!(loaded.kernel_address >= MIB);
            prop_assert!(loaded.kernel_address < 17 * MIB);
        }
    }
}
