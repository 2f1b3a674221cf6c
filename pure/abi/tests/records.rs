//! What is asked of a call's structure, asked of our records: in which order they are checked, and what may be longer.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use tideover_abi::Malformed;
use tideover_abi::Problem;
use tideover_abi::foreign;
use tideover_abi::foreign::FdKind;
use tideover_abi::foreign::FdName;
use tideover_abi::foreign::FdRecord;
use tideover_abi::record::Format;
use tideover_abi::record::HEADER_BYTES;
use tideover_abi::state;
use tideover_abi::state::StateName;
use tideover_abi::state::StateRecord;
use tideover_abi::vm;
use tideover_abi::vm::Identity;
use tideover_abi::vm::VmRecord;
use tideover_abi::vmalloc::Descriptor;

const IDENTITY: Identity = Identity::new([3; 16]);
const PLACE: u64 = 4096;

/// Format, bytes of a record, and what reads one and writes it again.
type Case = (Format, Vec<u8>, fn(&Vec<u8>, u64) -> Result<Vec<u8>, Malformed>);

fn cases() -> [Case; 3] {
    let vm = VmRecord { identity: IDENTITY, vm_type: 5, vcpus: 2 };
    let state = StateRecord {
        identity: IDENTITY,
        name: StateName::literal("vcpu0"),
        epoch: 4,
        checksum: 6,
        len_bytes: 0,
        list: Descriptor::default(),
    };
    let fd = FdRecord { identity: IDENTITY, name: FdName::literal("tap"), kind: FdKind::Tap, index: 1 };
    [
        (vm::FORMAT, vm.encode(), |memory, at| VmRecord::read(memory, at).map(|vm| vm.encode())),
        (state::FORMAT, state.encode(), |memory, at| {
            StateRecord::read(memory, at).map(|state| state.encode())
        }),
        (foreign::FORMAT, fd.encode(), |memory, at| FdRecord::read(memory, at).map(|fd| fd.encode())),
    ]
}

fn memory(record: &[u8]) -> Vec<u8> {
    let mut memory = vec![0; 4096];
    memory.extend_from_slice(record);
    memory
}

fn payload(record: &[u8]) -> Vec<u8> {
    record[usize::try_from(HEADER_BYTES).unwrap()..].to_vec()
}

/// L2.4.5.
#[test]
fn a_record_that_is_shorter_than_todays_is_refused() {
    for (format, record, read) in cases() {
        let payload = payload(&record);
        for len in 0..payload.len() {
            let error = read(&memory(&format.encode(&payload[..len])), PLACE).unwrap_err();
            assert_eq!((error.field, error.problem), ("payload", Problem::Truncated), "{len}: {format:?}");
        }
    }
}

/// L2.4.6.
#[test]
fn a_record_that_is_longer_has_zeroes_behind_its_end_or_is_refused() {
    for (format, record, read) in cases() {
        let mut longer = payload(&record);
        longer.resize(longer.len() + 40, 0);
        assert_eq!(read(&memory(&format.encode(&longer)), PLACE).unwrap(), record, "read as today's");
        for at in [longer.len() - 40, longer.len() - 1] {
            let mut says_more = longer.clone();
            says_more[at] = 9;
            let error = read(&memory(&format.encode(&says_more)), PLACE).unwrap_err();
            let expected = ("payload, behind its end", Problem::Unknown { found: 9 });
            assert_eq!((error.field, error.problem), expected, "{format:?}");
        }
    }
}

/// L2.4.2, L2.4.7, H3.9.5.
#[test]
fn a_record_at_an_address_where_not_all_of_it_can_be_is_refused() {
    for (_, record, read) in cases() {
        let field = |memory: &Vec<u8>, at: u64| read(memory, at).unwrap_err().field;
        let whole = memory(&record);
        assert_eq!(read(&whole, PLACE).unwrap(), record);
        assert_eq!([0, 8, PLACE + 8].map(|at| field(&whole, at)), ["address"; 3], "no page's");
        for outside in [2 * PLACE, 1 << 40, u64::MAX - 4095] {
            let error = read(&whole, outside).unwrap_err();
            assert!(matches!(error.problem, Problem::Unreadable(_)), "{error}");
        }
        let cut = |len: usize| memory(&record[..len]);
        assert_eq!(field(&cut(7), PLACE), "address", "not even the head is there");
        assert_eq!(field(&cut(record.len() - 1), PLACE), "payload");
    }
}

/// L2.4.3, L2.4.9.
#[test]
fn a_records_form_comes_before_its_version_before_its_length_before_its_sum_before_its_content() {
    const MAGIC: usize = 0;
    const KIND: usize = 8;
    const VERSION: usize = 12;
    const LENGTH: usize = 23;
    const SUM: usize = 24;
    let order = [
        (MAGIC, "magic"),
        (KIND, "kind"),
        (VERSION, "version"),
        (LENGTH, "payload_bytes"),
        (SUM, "checksum"),
    ];
    for (_, record, read) in cases() {
        // Everything is wrong; one after the other is put right.
        let mut broken = record.clone();
        order.iter().for_each(|(at, _)| broken[*at] ^= 0x55);
        *broken.last_mut().unwrap() ^= 0x55;
        for (at, field) in order {
            assert_eq!(read(&memory(&broken), PLACE).unwrap_err().field, field);
            broken[at] = record[at];
        }
    }
    let no_such_kind =
        FdRecord { identity: IDENTITY, name: FdName::literal("x"), kind: FdKind::Tap, index: 0 };
    let mut bytes = payload(&no_such_kind.encode());
    bytes[16 + 32] = 0xee;
    let error = FdRecord::read(&memory(&foreign::FORMAT.encode(&bytes)), PLACE).unwrap_err();
    assert_eq!(error.field, "kind", "its content, last");
}

/// L2.4.3.
#[test]
fn a_record_is_not_taken_for_one_of_another_kind() {
    for (index, (_, record, _)) in cases().into_iter().enumerate() {
        for (other, (_, _, read)) in cases().into_iter().enumerate() {
            let read = read(&memory(&record), PLACE);
            assert_eq!(read.err().map(|error| error.field), (index != other).then_some("kind"));
        }
    }
}
