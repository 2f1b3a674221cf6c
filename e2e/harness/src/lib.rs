//! Tests that need more than every machine has: skipped loudly, and counted.
//!
//! A *need* is something of the machine that a test cannot make for itself: `/dev/kvm`, the right
//! to open a userfaultfd, page frame numbers in pagemap, free huge pages, network interfaces. A test states its needs
//! in its first line, and has what was set aside for them, as huge pages are, until it ends:
//!
//! ```
//! // #[test]
//! fn a_fault_on_a_hole_is_held() {
//!     harness::need!(kvm, userfaultfd);
//!     // ... the test proper
//! }
//! ```
//!
//! Where a need is not met the test returns there. The test runner counts it as passed, so a *skip*
//! is also told to people, by a line on stderr that the runner does not capture, and to `cargo
//! xtask test`, by a line in a file; `cargo xtask test` takes the skipped tests out of those that
//! passed and lists them.
//!
//! # Environment
//!
//! | variable | means |
//! |----------|-------|
//! | `TIDEOVER_SKIPS` | the file to which each skip appends its line; see [`SkipLine`] |
//! | `TIDEOVER_REQUIRE` | needs, by name with commas between, that this machine must meet: the test panics instead of skipping. `all` stands for every need |
//! | `TIDEOVER_WITHOUT` | needs, likewise, to take as not met: shows on a machine that has everything what one that has not will do |

#![forbid(unsafe_code)]

mod hugetlb;
mod machine;
mod skip;

pub use machine::{Met, Need};
pub use skip::{SkipLine, Unnamed};

#[doc(hidden)]
pub use skip::go_on;

/// Returns from the test unless the machine meets every need named: `kvm`, `userfaultfd`,
/// `pagemap`, `hugetlb`, `hugetlb_1g`, `guest_memfd`, `tap`. What was set aside for one is given back at the end of
/// the block that this stands in.
///
/// To be the first statement of a `#[test]` function that returns `()`, in the function itself and
/// not in one that it calls: it is that function which it names and from which it returns.
///
/// # Panics
///
/// If a need is not met and `TIDEOVER_REQUIRE` names it; if the skip cannot be recorded, as the
/// test would then be counted among those that passed; and if one of the variables names something
/// that is not a need.
#[macro_export]
macro_rules! need {
    ($($need:ident),+ $(,)?) => {
        $(
            let Some(_met) = $crate::go_on($crate::need!(@of $need), env!("CARGO_PKG_NAME"), {
                fn here() {}
                ::std::any::type_name_of_val(&here)
            }) else {
                return;
            };
        )+
    };
    (@of kvm) => { $crate::Need::Kvm };
    (@of userfaultfd) => { $crate::Need::Userfaultfd };
    (@of pagemap) => { $crate::Need::Pagemap };
    (@of hugetlb) => { $crate::Need::Hugetlb };
    (@of hugetlb_1g) => { $crate::Need::Hugetlb1g };
    (@of guest_memfd) => { $crate::Need::GuestMemfd };
    (@of tap) => { $crate::Need::Tap };
}
