//! Typed groups inside a state: a list that says itself what it holds.
//!
//! A *group* is one thing saved as a whole and loaded as a whole, such as the general registers of a
//! vCPU: an *id*, which names both what the bytes are and how they are laid out, and the bytes. A layout
//! that changes gets a new id, so that a reader who does not know it refuses it by number and never
//! misreads it. What the ids mean is for the owner of the state to say; here they are numbers.
//!
//! | offset | size | field | |
//! | --- | --- | --- | --- |
//! | 0 | 4 | count | groups in the list |
//! | 4 | 4 | reserved | zero |
//! | 8 | | the groups, one behind the other | |
//!
//! and each group, from an offset that is a multiple of 8:
//!
//! | offset | size | field | |
//! | --- | --- | --- | --- |
//! | 0 | 4 | id | unlike that of every other group in the list |
//! | 4 | 4 | flags | zero: none is defined |
//! | 8 | 8 | len | bytes of data, padding not counted |
//! | 16 | len | data | |
//! | | 0 to 7 | padding | zeros, to the next multiple of 8 |
//!
//! The list ends where its bytes end. One list has one encoding: whatever [`decode`] takes, [`encode`]
//! gives back byte for byte.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes to whose multiple a group's data is padded.
const ALIGN: usize = 8;

/// What opens the list.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ListHeader {
    count: U32,
    reserved: U32,
}

/// What opens each group.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GroupHeader {
    id: U32,
    flags: U32,
    len: U64,
}

const _: () = assert!(size_of::<ListHeader>() == 8 && size_of::<GroupHeader>() == 16);

/// One thing of a state, saved and loaded as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// What the data is and how it is laid out.
    pub id: u32,
    /// The bytes, without padding.
    pub data: Vec<u8>,
}

/// Why [`decode`] refused a list.
///
/// `offset` counts bytes from the start of the list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GroupsError {
    /// The list ends inside a field.
    #[error("{field} at offset {offset} takes {need} bytes, the list has {have} left")]
    Truncated {
        /// The field that does not fit.
        field: &'static str,
        /// Where it starts.
        offset: usize,
        /// Bytes it says that it takes.
        need: u64,
        /// Bytes from `offset` to the end of the list.
        have: usize,
    },
    /// The list names more groups than its bytes could hold even if all were empty.
    #[error("count at offset 0 names {count} groups, the list has room for at most {most}")]
    TooMany {
        /// Groups named.
        count: u32,
        /// Empty groups for which the list has room.
        most: usize,
    },
    /// A field that is to be zero is not: this reader cannot know what its writer meant.
    #[error("{field} at offset {offset} is not zero")]
    NotZero {
        /// The field.
        field: &'static str,
        /// Where it starts.
        offset: usize,
    },
    /// Two groups have one id.
    #[error("id {id:#x} at offset {offset} is that of an earlier group")]
    Duplicate {
        /// The id.
        id: u32,
        /// Where the later of the two states it.
        offset: usize,
    },
    /// Bytes follow the last group.
    #[error("{len} bytes follow the last group, from offset {offset}")]
    Trailing {
        /// Where the last group ends.
        offset: usize,
        /// Bytes that follow.
        len: usize,
    },
}

/// Bytes that follow `len` bytes of data up to the next group.
const fn padding(len: usize) -> usize {
    len.wrapping_neg() % ALIGN
}

/// Bytes that [`encode`] makes of `groups`.
#[must_use]
pub fn encoded_len(groups: &[Group]) -> usize {
    groups.iter().fold(size_of::<ListHeader>(), |sum, group| {
        sum + size_of::<GroupHeader>() + group.data.len() + padding(group.data.len())
    })
}

/// The list as bytes.
///
/// The ids are to differ from each other: [`decode`] refuses a list in which two are alike, as it does
/// one of more than `u32::MAX` groups.
#[must_use]
pub fn encode(groups: &[Group]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(encoded_len(groups));
    encode_into(groups, &mut bytes);
    bytes
}

/// The list as bytes, behind those that `bytes` already holds: for a caller whose buffer is ready.
///
/// Padding counts from the start of the list, wherever that comes to lie in `bytes`.
pub fn encode_into(groups: &[Group], bytes: &mut Vec<u8>) {
    let count = u32::try_from(groups.len()).unwrap_or(u32::MAX);
    let header = ListHeader { count: U32::new(count), reserved: U32::ZERO };
    bytes.extend_from_slice(header.as_bytes());
    for group in groups {
        let header = GroupHeader {
            id: U32::new(group.id),
            flags: U32::ZERO,
            // A usize is at most 64 bits wide on every target of Rust.
            len: U64::new(group.data.len() as u64),
        };
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&group.data);
        bytes.extend_from_slice(&[0; ALIGN][..padding(group.data.len())]);
    }
}

/// The groups of a list, in its order.
///
/// Every length is held against the bytes that are left before anything is set aside for it, so memory
/// taken is at most a small multiple of `bytes`.
///
/// # Errors
///
/// A [`GroupsError`] that names the field at fault and its offset, if `bytes` is anything but what
/// [`encode`] makes of some list of groups with distinct ids.
pub fn decode(bytes: &[u8]) -> Result<Vec<Group>, GroupsError> {
    let mut input = Input { bytes, offset: 0 };
    let header: ListHeader = input.header("list header")?;
    if header.reserved != U32::ZERO {
        return Err(GroupsError::NotZero { field: "reserved", offset: 4 });
    }
    let most = input.left().len() / size_of::<GroupHeader>();
    let count = match usize::try_from(header.count.get()) {
        Ok(count) if count <= most => count,
        _ => return Err(GroupsError::TooMany { count: header.count.get(), most }),
    };
    let mut groups = Vec::with_capacity(count);
    let mut ids = BTreeSet::new();
    for _ in 0..count {
        let group_offset = input.offset;
        let group = input.group()?;
        if !ids.insert(group.id) {
            return Err(GroupsError::Duplicate { id: group.id, offset: group_offset });
        }
        groups.push(group);
    }
    match input.left() {
        [] => Ok(groups),
        rest => Err(GroupsError::Trailing { offset: input.offset, len: rest.len() }),
    }
}

/// A list being read: `offset` never exceeds the length of `bytes`.
struct Input<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Input<'a> {
    fn left(&self) -> &'a [u8] {
        self.bytes.get(self.offset..).unwrap_or(&[])
    }

    fn take(&mut self, field: &'static str, len: u64) -> Result<&'a [u8], GroupsError> {
        let left = self.left();
        match usize::try_from(len).ok().and_then(|len| left.get(..len)) {
            Some(taken) => {
                self.offset += taken.len();
                Ok(taken)
            }
            None => Err(GroupsError::Truncated { field, offset: self.offset, need: len, have: left.len() }),
        }
    }

    fn header<T: FromBytes + Immutable + KnownLayout + Unaligned>(
        &mut self,
        field: &'static str,
    ) -> Result<T, GroupsError> {
        let left = self.left();
        match T::read_from_prefix(left) {
            Ok((header, _)) => {
                self.offset += size_of::<T>();
                Ok(header)
            }
            Err(_) => Err(GroupsError::Truncated {
                field,
                offset: self.offset,
                need: size_of::<T>() as u64,
                have: left.len(),
            }),
        }
    }

    fn group(&mut self) -> Result<Group, GroupsError> {
        let header_offset = self.offset;
        let header: GroupHeader = self.header("group header")?;
        if header.flags != U32::ZERO {
            return Err(GroupsError::NotZero { field: "flags", offset: header_offset + 4 });
        }
        let data = self.take("data", header.len.get())?;
        let padding_offset = self.offset;
        let padding = self.take("padding", padding(data.len()) as u64)?;
        if padding.iter().any(|&byte| byte != 0) {
            return Err(GroupsError::NotZero { field: "padding", offset: padding_offset });
        }
        Ok(Group { id: header.id.get(), data: data.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use proptest::prelude::*;

    use super::*;

    fn group(id: u32, data: &[u8]) -> Group {
        Group { id, data: data.to_vec() }
    }

    /// Two groups, one of three bytes and one of none, as every release is to read and write them.
    const GOLDEN: [u8; 48] = [
        2, 0, 0, 0, 0, 0, 0, 0, // count, reserved
        0x44, 0x33, 0x22, 0x11, 0, 0, 0, 0, // id, flags
        3, 0, 0, 0, 0, 0, 0, 0, // len
        0xaa, 0xbb, 0xcc, 0, 0, 0, 0, 0, // data, padding
        7, 0, 0, 0, 0, 0, 0, 0, // id, flags
        0, 0, 0, 0, 0, 0, 0, 0, // len
    ];

    #[test]
    fn a_list_has_the_bytes_that_the_page_says() {
        let groups = vec![group(0x1122_3344, &[0xaa, 0xbb, 0xcc]), group(7, &[])];
        assert_eq!(encode(&groups), GOLDEN);
        assert_eq!(encoded_len(&groups), GOLDEN.len());
        assert_eq!(decode(&GOLDEN), Ok(groups));
    }

    #[test]
    fn a_list_behind_other_bytes_is_padded_from_its_own_start() {
        let groups = vec![group(1, &[9])];
        let mut bytes = vec![0xff; 3];
        encode_into(&groups, &mut bytes);
        assert_eq!(decode(&bytes[3..]), Ok(groups));
    }

    #[test]
    fn an_empty_list_is_its_header() {
        assert_eq!(encode(&[]), [0; 8]);
        assert_eq!(decode(&[0; 8]), Ok(vec![]));
    }

    #[test]
    fn a_list_cut_anywhere_is_refused() {
        for len in 0..GOLDEN.len() {
            let refused = decode(&GOLDEN[..len]);
            assert!(
                matches!(refused, Err(GroupsError::Truncated { .. } | GroupsError::TooMany { .. })),
                "cut to {len} bytes: {refused:?}"
            );
        }
    }

    /// The golden list with the bytes from `offset` on replaced.
    fn with(offset: usize, bytes: &[u8]) -> Vec<u8> {
        let mut list = GOLDEN.to_vec();
        list[offset..offset + bytes.len()].copy_from_slice(bytes);
        list
    }

    #[test]
    fn a_bad_field_is_named_with_its_offset() {
        let cases = [
            (with(0, &[3]), GroupsError::TooMany { count: 3, most: 2 }),
            (with(0, &[0xff; 4]), GroupsError::TooMany { count: u32::MAX, most: 2 }),
            (with(0, &[1]), GroupsError::Trailing { offset: 32, len: 16 }),
            (with(7, &[1]), GroupsError::NotZero { field: "reserved", offset: 4 }),
            (with(12, &[1]), GroupsError::NotZero { field: "flags", offset: 12 }),
            (
                with(16, &[0xff; 8]),
                GroupsError::Truncated { field: "data", offset: 24, need: u64::MAX, have: 24 },
            ),
            (
                with(16, &[23]),
                GroupsError::Truncated { field: "group header", offset: 48, need: 16, have: 0 },
            ),
            (with(27, &[1]), GroupsError::NotZero { field: "padding", offset: 27 }),
            (with(32, &[0x44, 0x33, 0x22, 0x11]), GroupsError::Duplicate { id: 0x1122_3344, offset: 32 }),
            (with(40, &[1]), GroupsError::Truncated { field: "data", offset: 48, need: 1, have: 0 }),
        ];
        for (bytes, error) in cases {
            assert_eq!(decode(&bytes), Err(error));
        }
    }

    #[test]
    fn bytes_behind_the_last_group_are_refused() {
        let mut bytes = GOLDEN.to_vec();
        bytes.push(0);
        assert_eq!(decode(&bytes), Err(GroupsError::Trailing { offset: 48, len: 1 }));
    }

    fn lists() -> impl Strategy<Value = Vec<Group>> {
        proptest::collection::btree_map(any::<u32>(), proptest::collection::vec(any::<u8>(), 0..40), 0..8)
            .prop_map(|groups| groups.into_iter().map(|(id, data)| Group { id, data }).collect())
    }

    proptest! {
        #[test]
        fn every_list_survives_encoding(groups in lists()) {
            let bytes = encode(&groups);
            prop_assert_eq!(bytes.len() % ALIGN, 0);
            prop_assert_eq!(decode(&bytes), Ok(groups));
        }

        #[test]
        fn no_list_is_accepted_in_part(groups in lists()) {
            let bytes = encode(&groups);
            for len in 0..bytes.len() {
                prop_assert!(decode(&bytes[..len]).is_err());
            }
        }

        #[test]
        fn whatever_is_decoded_encodes_to_the_same_bytes(
            groups in lists(),
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut bytes = encode(&groups);
            for (place, value) in changes {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            if let Ok(groups) = decode(&bytes) {
                prop_assert_eq!(encode(&groups), bytes);
            }
        }
    }
}
