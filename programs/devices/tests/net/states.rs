//! States that are loaded, and states that are not.

use devices::Device;
use devices::StateError;

use crate::driver::Rig;
use crate::driver::device;
use crate::driver::wire;

/// Head of a record; the payload follows: registers, two queues, the card.
const HEAD: usize = 32;
const QUEUES: usize = 28;
const SECOND_QUEUE: usize = 64;
const CONFIG: usize = 96;

fn refused(place: usize, value: &[u8]) -> String {
    let (frames, _host) = wire();
    let rig = Rig::new(frames);
    rig.net.pause();
    let mut payload = rig.net.save().unwrap()[HEAD..].to_vec();
    assert_eq!(payload.len(), CONFIG + 8);
    payload[place..place + value.len()].copy_from_slice(value);
    let format = abi::record::Format {
        compatible: "tideover-virtio-net-v1",
        kind: *b"DNET",
        version: 1,
        oldest: 1,
        max_payload_bytes: 4096,
    };
    let (net, _line) = device(rig.frames(), rig.memory());
    match net.load(&format.encode(&payload)).unwrap_err() {
        StateError::Field { field, .. } => field.to_owned(),
        StateError::Queue { source, .. } => source.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_field_that_cannot_be_is_named() {
    assert_eq!(refused(QUEUES, &[1]), "queues");
    assert_eq!(refused(CONFIG, &[3]), "mac");
    assert_eq!(refused(CONFIG + 6, &[0]), "link");
    assert!(refused(SECOND_QUEUE + 4, &[1]).contains("descriptor table is outside"));
}

#[test]
fn a_state_of_another_device_is_refused() {
    let (frames, _host) = wire();
    let rig = Rig::new(frames);
    assert!(matches!(rig.net.save(), Err(StateError::NotPaused { .. })));
    rig.net.pause();
    let mut state = rig.net.save().unwrap();
    state[9] = b'B';
    let (net, _line) = device(rig.frames(), rig.memory());
    assert!(matches!(net.load(&state), Err(StateError::Record { source, .. }) if source.field == "kind"));
}
