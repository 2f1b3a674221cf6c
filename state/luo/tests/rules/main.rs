//! LUO's rules, one file for each verb: order of checks and callbacks, rollback, and what a later life finds.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

mod crash;
mod faults;
mod finish;
mod freeze;
mod handlers;
mod preserve;
mod publish;
mod recorder;
mod retrieve;
mod shared;
