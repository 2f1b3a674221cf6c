//! What a vCPU's state is going to hold: told before the pause, so that a successor that could not load it
//! says so while the guest still runs.

use abi::groups::{self, Group};

use crate::state::{StateError, VcpuGroup, kind_of};

/// Ids of the groups that the state is going to have, each a little-endian u32.
const GROUPS: u32 = 1;
/// Indices of the MSRs that it is going to have, each a little-endian u32.
const MSRS: u32 = 2;
/// Length of its XSAVE area in bytes, a little-endian u64.
const XSAVE_LEN: u32 = 3;

const WHOSE: &str = "announced vCPU";

/// What a vCPU's state is going to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    groups: Vec<VcpuGroup>,
    msr_indices: Vec<u32>,
    xsave_len_bytes: usize,
}

impl Contents {
    pub(crate) fn new(
        groups: impl Iterator<Item = VcpuGroup>,
        msr_indices: impl Iterator<Item = u32>,
        xsave_len_bytes: usize,
    ) -> Self {
        Self { groups: groups.collect(), msr_indices: msr_indices.collect(), xsave_len_bytes }
    }

    /// Whether the state is going to have the group.
    #[must_use]
    pub fn has_group(&self, group: VcpuGroup) -> bool {
        self.groups.contains(&group)
    }

    /// The MSRs that it is going to have.
    pub fn msr_indices(&self) -> impl Iterator<Item = u32> + '_ {
        self.msr_indices.iter().copied()
    }

    /// Length of its XSAVE area in bytes.
    #[must_use]
    pub const fn xsave_len_bytes(&self) -> usize {
        self.xsave_len_bytes
    }

    /// The contents as bytes: an [`abi::groups`] list of three groups.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let ids = self.groups.iter().flat_map(|group| group.id().to_le_bytes()).collect();
        let msrs = self.msr_indices.iter().flat_map(|index| index.to_le_bytes()).collect();
        // A usize is at most 64 bits wide on every target of Rust.
        let xsave_len = (self.xsave_len_bytes as u64).to_le_bytes().to_vec();
        groups::encode(&[
            Group { id: GROUPS, data: ids },
            Group { id: MSRS, data: msrs },
            Group { id: XSAVE_LEN, data: xsave_len },
        ])
    }

    /// The contents whose bytes these are.
    ///
    /// # Errors
    ///
    /// [`StateError`]; among others, if they name a group that this release does not know.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let whose = WHOSE;
        let list = groups::decode(bytes).map_err(|source| StateError::Groups { whose, source })?;
        let [ids, msrs, xsave_len] = list.as_slice() else {
            return Err(StateError::Absent { whose });
        };
        for (group, id) in [(ids, GROUPS), (msrs, MSRS), (xsave_len, XSAVE_LEN)] {
            if group.id != id {
                return Err(StateError::UnknownGroup { whose, id: group.id });
            }
        }
        let groups = numbers(ids, "the group ids")?
            .map(|id| kind_of(id).ok_or(StateError::UnknownGroup { whose, id }))
            .collect::<Result<_, _>>()?;
        let length = |len| StateError::GroupLength { whose, group: "the XSAVE length", len };
        let xsave_len =
            <[u8; 8]>::try_from(xsave_len.data.as_slice()).map_err(|_| length(xsave_len.data.len()))?;
        Ok(Self {
            groups,
            msr_indices: numbers(msrs, "the MSR indices")?.collect(),
            // Longer than the address space is longer than what any KVM takes, too.
            xsave_len_bytes: usize::try_from(u64::from_le_bytes(xsave_len)).unwrap_or(usize::MAX),
        })
    }
}

fn numbers<'a>(
    group: &'a Group,
    name: &'static str,
) -> Result<impl Iterator<Item = u32> + use<'a>, StateError> {
    let (numbers, rest) = group.data.as_chunks();
    if !rest.is_empty() {
        return Err(StateError::GroupLength { whose: WHOSE, group: name, len: group.data.len() });
    }
    Ok(numbers.iter().map(|&number| u32::from_le_bytes(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_survive_encoding() {
        let contents = Contents::new(
            [VcpuGroup::Registers, VcpuGroup::Lapic].into_iter(),
            [0x174, 0xc000_0080].into_iter(),
            11_008,
        );
        assert_eq!(Contents::decode(&contents.encode()).unwrap(), contents);
    }

    #[test]
    fn contents_with_a_group_of_a_later_release_are_refused() {
        let bytes = groups::encode(&[
            Group { id: GROUPS, data: 999_u32.to_le_bytes().to_vec() },
            Group { id: MSRS, data: vec![] },
            Group { id: XSAVE_LEN, data: vec![0; 8] },
        ]);
        let refused = Contents::decode(&bytes);
        assert!(matches!(refused, Err(StateError::UnknownGroup { id: 999, .. })), "{refused:?}");
    }
}
