//! Regions that are not the machine's, or not all of them.

use std::os::fd::AsFd;

use tideover_machine::AttachError;
use tideover_machine::Incoming;
use tideover_machine::OfferedRegion;

use crate::rig::machine;
use crate::rig::offered;
use crate::rig::spec;

#[track_caller]
fn refused(regions: Vec<OfferedRegion>) -> AttachError {
    match Incoming::attach(regions, Vec::new()) {
        Err(error) => error,
        Ok(_) => panic!("accepted"),
    }
}

#[test]
fn of_another_number() {
    let machine = machine(&spec("number", &[4, 8], &[]));
    assert!(matches!(refused(vec![]), AttachError::NoRegions));
    let mut few = offered(&machine);
    few.pop();
    assert!(matches!(refused(few), AttachError::Regions { told: 3, came: 2 }));
    let mut many = offered(&machine);
    many.extend(offered(&machine).pop());
    assert!(matches!(refused(many), AttachError::Regions { told: 3, came: 4 }));
}

#[test]
fn in_another_order() {
    let machine = machine(&spec("order", &[4, 8, 16], &[]));
    let mut swapped = offered(&machine);
    swapped.swap(1, 2);
    let (told, came) = (4 << 20, 8 << 20);
    match refused(swapped) {
        AttachError::Size { index: 1, told: t, came: c } => assert_eq!((t, c), (told, came)),
        other => panic!("{other:?}"),
    }
    let mut ram_first = offered(&machine);
    ram_first.swap(0, 3);
    assert!(matches!(refused(ram_first), AttachError::Malformed(_)));
}

#[test]
fn of_another_size_than_is_said() {
    let machine = machine(&spec("size", &[4, 8], &[]));
    for (index, len_bytes) in [(0, 4096), (1, 8 << 20), (2, 0), (2, 4097), (1, u64::MAX)] {
        let mut regions = offered(&machine);
        regions[index].len_bytes = len_bytes;
        assert!(matches!(refused(regions), AttachError::Region(_)), "{index} {len_bytes}");
    }
}

#[test]
fn of_another_machine_with_other_sizes() {
    let (one, other) = (machine(&spec("one", &[4, 8], &[])), machine(&spec("other", &[4, 16], &[])));
    let mut mixed = offered(&one);
    mixed[2] = offered(&other).remove(2);
    assert!(matches!(refused(mixed), AttachError::Size { index: 2, .. }));
}

#[test]
fn of_another_machine_with_the_same_sizes() {
    let (one, other) = (machine(&spec("one", &[4, 8], &[])), machine(&spec("other", &[4, 8], &[])));
    for index in [1, 2] {
        let mut mixed = offered(&one);
        mixed[index] = offered(&other).remove(index);
        assert!(matches!(refused(mixed), AttachError::File { index: at, .. } if at == index));
    }
}

#[test]
fn of_one_size_in_another_order() {
    let machine = machine(&spec("twins", &[4, 4], &[]));
    let mut swapped = offered(&machine);
    swapped.swap(1, 2);
    assert!(matches!(refused(swapped), AttachError::File { index: 1, .. }));
}

#[test]
fn that_are_not_sealed() {
    let machine = machine(&spec("unsealed-region", &[4], &[]));
    let mut regions = offered(&machine);
    let path = std::env::temp_dir().join(format!("tideover-machine-{}", std::process::id()));
    let file = std::fs::File::options().create(true).read(true).write(true).truncate(true).open(&path);
    let file = file.unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(4 << 20).unwrap();
    regions[1] = OfferedRegion { fd: file.into(), len_bytes: 4 << 20 };
    assert!(matches!(refused(regions), AttachError::Region(region::RegionError::NotARegion { .. })));
}

#[test]
fn that_hold_no_metadata() {
    let region = region::Region::create("zeros", 8 << 20).unwrap();
    let zeros = OfferedRegion { fd: region.as_fd().try_clone_to_owned().unwrap(), len_bytes: 8 << 20 };
    assert!(matches!(refused(vec![zeros]), AttachError::Malformed(_)));
}
