//! What an image says of itself.

use std::io::Cursor;

use devices::linux;
use devices::linux::Description;
use proptest::prelude::*;

use crate::image::INIT_BYTES;
use crate::image::SETUP;
use crate::image::image;
use crate::image::put;

fn describe(image: &[u8]) -> Description {
    linux::describe(&mut Cursor::new(image)).unwrap()
}

#[test]
fn an_image_is_described_by_its_header() {
    let mut image = image(b"code");
    let plain = Description {
        version: None,
        protocol: (2, 15),
        relocatable: true,
        above_4_gib: false,
        init_bytes: INIT_BYTES,
        command_line_bytes: 2047,
        payload: None,
    };
    assert_eq!(describe(&image), plain);
    put(&mut image, 0x236, &3_u16.to_le_bytes());
    put(&mut image, 0x234, &[0]);
    put(&mut image, 0x20e, &0x100_u16.to_le_bytes());
    put(&mut image, 0x300, b"7.3.4 (somebody) #1\0");
    put(&mut image, 0x248, &16_u32.to_le_bytes());
    put(&mut image, 0x24c, &32_u32.to_le_bytes());
    let first = u64::try_from(SETUP).unwrap() + 16;
    let described = Description {
        version: Some("7.3.4 (somebody) #1".to_owned()),
        relocatable: false,
        above_4_gib: true,
        payload: Some(first..first + 32),
        ..plain
    };
    assert_eq!(describe(&image), described);
}

#[test]
fn what_lies_outside_of_an_image_is_not_there() {
    let mut image = image(b"code");
    put(&mut image, 0x248, &16_u32.to_le_bytes());
    put(&mut image, 0x24c, &u32::MAX.to_le_bytes());
    for version in [0x1ff_u16, 0x200, u16::MAX] {
        put(&mut image, 0x20e, &version.to_le_bytes());
        put(&mut image, SETUP - 1, b"x");
        let described = describe(&image);
        assert_eq!((described.version, described.payload), (None, None), "{version:#x}");
    }
}

proptest! {
    #[test]
    fn no_image_panics(
        changes in proptest::collection::vec((0x1f1_usize..0x270, any::<u8>()), 0..8),
        len in 0_usize..2000,
    ) {
        let mut image = image(&[1; 100]);
        changes.iter().for_each(|(place, value)| put(&mut image, *place, &[*value]));
        image.truncate(len);
        let _ = linux::describe(&mut Cursor::new(image));
    }
}
