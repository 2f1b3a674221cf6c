//! Tests on the real KVM.
#![expect(unsafe_code, reason = "the guests' memory is mapped here, and signals are sent")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

mod guest;
mod guest_memfd;
mod memory;
mod run;
mod state;
