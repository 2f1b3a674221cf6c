//! libFuzzer on one target, which the environment variable `TIDEOVER_FUZZ_TARGET` names. `cargo xtask fuzz` runs it.
#![no_main]
#![forbid(unsafe_code)]

use std::sync::OnceLock;

use fuzz::Target;

static TARGET: OnceLock<&Target> = OnceLock::new();

/// The target; who names none is told which there are.
fn target() -> &'static Target {
    TARGET.get_or_init(|| {
        let name = std::env::var("TIDEOVER_FUZZ_TARGET").unwrap_or_default();
        fuzz::target(&name).unwrap_or_else(|| {
            let names: Vec<&str> = fuzz::TARGETS.iter().map(|target| target.name).collect();
            eprintln!("TIDEOVER_FUZZ_TARGET is to be one of {}", names.join(", "));
            std::process::exit(2)
        })
    })
}

libfuzzer_sys::fuzz_target!(
    init: {
        target();
        // The fuzzer itself is C++ and does not count.
        if fuzz::ALLOCATOR.set_limit(fuzz::MOST_BYTES).is_err() {
            eprintln!("more than {} bytes are in use before the first input", fuzz::MOST_BYTES);
            std::process::exit(2);
        }
    },
    |input: &[u8]| {
        (target().run)(input);
    }
);
