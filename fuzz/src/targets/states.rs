//! States: typed groups, and what KVM's are made of.

use abi::groups;
use abi::groups::Group;
use kvm::Contents;
use kvm::Cpuid;
use kvm::VcpuState;
use kvm::VmState;

/// A list of groups, and the same as a vCPU's state, a VM's, a CPUID and what a state will hold.
pub(crate) fn groups(input: &[u8]) -> bool {
    let list = groups::decode(input);
    if let Ok(list) = &list {
        assert_eq!(groups::encode(list), input, "one list has one encoding");
    }
    if let Ok(state) = VcpuState::decode(input) {
        assert_eq!(VcpuState::decode(&state.encode()).ok(), Some(state.clone()));
        let _ =
            (state.groups().count(), state.absent().count(), state.registers(), state.special_registers());
    }
    if let Ok(state) = VmState::decode(input) {
        assert_eq!(VmState::decode(&state.encode()).ok(), Some(state));
    }
    if let Ok(cpuid) = Cpuid::decode(input) {
        assert_eq!(cpuid.encode(), input);
    }
    if let Ok(contents) = Contents::decode(input) {
        assert_eq!(contents.encode(), input);
    }
    list.is_ok()
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let group = |id, len: usize| Group { id, data: vec![1; len] };
    // What a state lacks stands in a group of its own, of number 0.
    let absent = Group { id: 0, data: vec![] };
    // Ids of groups, numbers of MSRs, and the length of the XSAVE area.
    let contents = [(1, vec![3, 0, 0, 0]), (2, vec![0x74, 1, 0, 0]), (3, vec![0, 43, 0, 0, 0, 0, 0, 0])];
    let contents = contents.map(|(id, data)| Group { id, data });
    let state = |with: Group| groups::encode(&[absent.clone(), with]);
    vec![
        groups::encode(&[]),
        groups::encode(&[group(1, 3), group(7, 0)]),
        state(group(1, 4)),
        state(group(3, 144)),
        groups::encode(&[group(1, 40)]),
        groups::encode(&contents),
    ]
}
