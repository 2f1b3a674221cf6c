//! A network card that is replaced while frames go both ways: each arrives once, in order.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
#![forbid(unsafe_code)]

mod driver;
mod frames;
#[path = "../../src/rig/line.rs"]
#[expect(dead_code, reason = "no test of a network card asks how often its line was lowered")]
mod line;
mod on_tap;
mod states;

use devices::InterruptLine;
