//! Every input that is kept, through its target.
#![forbid(unsafe_code)]

use std::panic;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use fuzz::ALLOCATOR;
use fuzz::MOST_BYTES;
use fuzz::TARGETS;
use fuzz::Target;
use fuzz::corpus;

/// What a decoder takes is counted for the whole process: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Far more than any input takes, and far less than one that hangs.
const LONG: Duration = Duration::from_secs(60);

fn replay(target: &Target, input: &[u8]) -> bool {
    let begun = Instant::now();
    let decoded = panic::catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let decoded = decoded.unwrap_or_else(|_| panic!("{}: {}", target.name, corpus::line(input)));
    assert!(begun.elapsed() < LONG, "{}: {}", target.name, corpus::line(input));
    decoded
}

#[test]
fn every_kept_input_is_decoded_or_refused() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = ALLOCATOR.allocated();
    for target in &TARGETS {
        let kept = corpus::kept(target.name).unwrap();
        assert!(!kept.is_empty(), "{} has no corpus", target.name);
        let decoded = kept.iter().filter(|input| replay(target, input)).count();
        println!("{}: {} inputs, {decoded} of them decoded", target.name, kept.len());
        // The mark is the process's highest ever: what is kept itself is little.
        assert!(ALLOCATOR.max_allocated() < before + MOST_BYTES, "{}: takes too much memory", target.name);
        assert!(decoded > 0, "{}: its corpus holds nothing that decodes", target.name);
    }
}

#[test]
fn what_the_encoders_write_is_decoded() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for target in &TARGETS {
        let seeds = (target.seeds)();
        let decoded = seeds.iter().filter(|input| replay(target, input)).count();
        println!("{}: {} seeds, {decoded} of them decoded", target.name, seeds.len());
        assert!(decoded * 2 > seeds.len(), "{}: {decoded} of {} seeds", target.name, seeds.len());
    }
}

#[test]
fn every_file_of_inputs_is_a_targets() {
    for folder in corpus::FOLDERS {
        let Ok(files) = corpus::file(folder, "any").parent().unwrap().read_dir() else { continue };
        for file in files {
            let path = file.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap();
            assert!(fuzz::target(name).is_some(), "{} is no target's", path.display());
        }
    }
}
