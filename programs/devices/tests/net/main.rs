//! A network card that is replaced while frames go both ways: each arrives once, in order.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
#![forbid(unsafe_code)]

mod driver;
mod frames;
mod on_tap;
mod states;
