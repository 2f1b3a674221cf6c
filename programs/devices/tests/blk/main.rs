//! A disk that is paused, saved and loaded at every point: what the guest asked for is done once, and answered once.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
#![forbid(unsafe_code)]

mod driver;
mod every_point;
#[path = "../../src/rig/line.rs"]
mod line;
mod model;
mod refused;
mod states;
mod store;

use devices::InterruptLine;
