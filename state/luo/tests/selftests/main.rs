//! The kernel's liveupdate selftests as behaviour of ours: what each does and expects, with memfds as values and an
//! arena for the machine. Where theirs boot a second kernel, ours run a second process.
//!
//! | theirs | ours |
//! | --- | --- |
//! | `liveupdate` (one boot) | [`one_life`] |
//! | `luo_kexec_simple`, `luo_multi_session`, `luo_stress_files`, `luo_stress_sessions` | [`two_lives`] |
//! | `LIVEUPDATE_TEST`, the KHO test module | [`in_kernel`] |
//! | what theirs say that they do not cover | [`uncovered`] |
//!
//! One case of `liveupdate` is not here, `exclusive_open`: of two processes that want a machine, one gets it by the
//! ownership word, which is `machine`'s.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

mod in_kernel;
mod lives;
mod memfd;
mod one_life;
mod two_lives;
mod uncovered;
