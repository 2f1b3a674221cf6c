//! The state of a real kernel, made out as an independent decoder made it out.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::io::Read as _;
use std::sync::OnceLock;

use ruzstd::decoding::StreamingDecoder;
use serde_json::Value;
use serde_json::json;
use tideover_survey::Options;
use tideover_survey::Root;
use tideover_survey::Survey;
use tideover_survey::folios;

fn memory() -> &'static Vec<u8> {
    static MEMORY: OnceLock<Vec<u8>> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let packed = include_bytes!("../../abi/testdata/kho-linux-7.3.raw.zst");
        let mut memory = Vec::with_capacity(256 << 20);
        StreamingDecoder::new(packed.as_slice()).unwrap().read_to_end(&mut memory).unwrap();
        memory
    })
}

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/kho-linux-7.3.json")).unwrap()
}

fn survey() -> Survey {
    let root = Root::Fdt(golden()["fdt_pa"].as_u64().unwrap());
    Survey::read(memory(), &root, Options::default())
}

/// What was found, in the words of the other decoder.
fn told(survey: &Survey) -> Value {
    let (kho, luo) = (survey.kho.as_ref().unwrap(), survey.luo.as_ref().unwrap());
    let lines = folios(memory(), survey);
    let sessions: Vec<Value> = luo
        .sessions
        .iter()
        .map(|session| {
            let files: Vec<Value> = session
                .files
                .iter()
                .map(|file| {
                    let mut first = None;
                    assert!(lines.list(file, &mut |folio| {
                        first.get_or_insert(folio.address);
                    }));
                    let at = usize::try_from(first.unwrap()).unwrap();
                    let bytes: String =
                        memory()[at..at + 16].iter().map(|byte| format!("{byte:02x}")).collect();
                    json!({
                        "compatible": file.handler,
                        "token": file.token,
                        "pos": file.position,
                        "size": file.size,
                        "seals": file.seals,
                        "folios": file.folios,
                        "bytes": file.bytes,
                        "first_bytes": bytes,
                    })
                })
                .collect();
            json!({ "name": session.name.text(), "files": files, "count": session.count })
        })
        .collect();
    let mut subtrees = kho.subtrees.clone();
    subtrees.sort_unstable();
    json!({
        "fdt_pa": kho.fdt_address,
        "kho": kho.version,
        "luo": luo.version,
        "liveupdate_number": luo.liveupdate_number,
        "preserved_by_order": kho.preserved_by_order,
        "preserved_bytes": kho.preserved_bytes,
        "sessions": sessions,
        "subtrees": subtrees,
    })
}

#[test]
fn every_value_is_the_one_that_the_other_decoder_found() {
    let mut golden = golden();
    golden["subtrees"].as_array_mut().unwrap().sort_unstable_by_key(|name| name.to_string());
    assert_eq!(told(&survey()), golden);
}

#[test]
fn nothing_is_wrong_with_it_and_everything_that_is_preserved_is_referred_to() {
    let survey = survey();
    assert_eq!(survey.findings, []);
    assert_eq!(survey.unread, Vec::<String>::new());
    assert_eq!((survey.unreferenced.bytes, &survey.unreferenced.first), (0, &Vec::new()));
    let kho = survey.kho.unwrap();
    let owned: u64 = survey.owners.iter().map(|owner| owner.bytes).sum();
    assert_eq!(Some(owned), kho.preserved_bytes);
    let listed: u64 = survey.ranges.iter().map(|range| range.bytes).sum();
    assert_eq!((Some(listed), survey.ranges_left_out), (kho.preserved_bytes, 0));
    let painted: u64 = survey.map.used.iter().map(|cell| cell.bytes).sum();
    assert_eq!(Some(painted), kho.preserved_bytes);
    assert!(survey.map.cells <= 1024 && survey.map.used.len() > 1);
    assert!(!kho.tree.preserved && kho.tree.nodes > 6, "{:?}", kho.tree);
    assert_eq!(survey.kexec.unwrap().kexec_count, 1);
}
