//! Kernels that are loaded, and guests that run on the devices, on the real KVM where it takes one.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
#![forbid(unsafe_code)]

mod described;
#[path = "../../src/rig/disk_driver.rs"]
mod disk_driver;
mod entry;
mod image;
mod lives;
mod loading;
mod machine;
#[path = "../../src/rig/output.rs"]
mod output;
mod program;
mod refused;
