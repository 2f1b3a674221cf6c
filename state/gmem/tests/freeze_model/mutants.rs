//! Gates that are wrong in one place each, and the model that finds it.

use std::convert::Infallible;

use loom::sync::Mutex;
use loom::sync::atomic::AtomicBool;
use loom::sync::atomic::AtomicUsize;
use loom::sync::atomic::Ordering;

use crate::Gate;
use crate::Gating;
use crate::Hold;

/// A gate that is right but for what is told.
macro_rules! mutant {
    ($(#[$what:meta])* $name:ident($field:ty) { $($wrong:item)* } keeps { $($kept:ident),* }) => {
        $(#[$what])*
        struct $name(Gate<Hold>, $field);

        impl Gating for $name {
            fn new() -> Self {
                Self(Gating::new(), <$field>::default())
            }

            $($wrong)*
            $(mutant!(@kept $kept);)*

            fn is_frozen(&self) -> bool {
                Gating::is_frozen(&self.0)
            }
        }
    };
    (@kept change) => { fn change(&self, act: impl FnOnce()) { Gating::change(&self.0, act); } };
    (@kept freeze) => { fn freeze(&self, hold: impl FnOnce() -> Hold) { Gating::freeze(&self.0, hold); } };
    (@kept join) => { fn join(&self) -> bool { Gating::join(&self.0) } };
    (@kept thaw) => { fn thaw(&self) { Gating::thaw(&self.0); } };
    (@kept end) => { fn end(&self) { Gating::end(&self.0); } };
}

mutant! {
    /// Looks whether a freeze stands, and changes pages then.
    ChecksBefore(()) {
        fn change(&self, act: impl FnOnce()) {
            if !self.0.is_frozen() && !self.0.has_ended() {
                act();
            }
        }
    } keeps { freeze, join, thaw, end }
}

mutant! {
    /// Looks for holes, and holds faults, before it stops changes.
    HoldsBefore(()) {
        fn freeze(&self, hold: impl FnOnce() -> Hold) {
            let held = hold();
            let _refused = self.0.freeze(|| Ok::<_, Infallible>(held), |_| ());
        }
    } keeps { change, join, thaw, end }
}

mutant! {
    /// Stops changes, and never holds faults.
    HoldsNothing(()) {
        fn freeze(&self, _: impl FnOnce() -> Hold) {
            Gating::freeze(&self.0, || None);
        }
    } keeps { change, join, thaw, end }
}

mutant! {
    /// A bit, not a count.
    IsABit(AtomicBool) {
        fn freeze(&self, hold: impl FnOnce() -> Hold) {
            if !self.1.swap(true, Ordering::SeqCst) {
                Gating::freeze(&self.0, hold);
            }
        }

        fn thaw(&self) {
            if self.1.swap(false, Ordering::SeqCst) {
                Gating::thaw(&self.0);
            }
        }
    } keeps { change, join, end }
}

/// Counts in one step, and holds faults in the next: the second freeze is told that it stands before it does.
struct CountsFirst {
    gate: Gate<Hold>,
    count: AtomicUsize,
    hold: Mutex<Hold>,
}

impl Gating for CountsFirst {
    fn new() -> Self {
        Self { gate: Gating::new(), count: AtomicUsize::new(0), hold: Mutex::new(None) }
    }

    fn change(&self, act: impl FnOnce()) {
        Gating::change(&self.gate, act);
    }

    fn freeze(&self, hold: impl FnOnce() -> Hold) {
        Gating::freeze(&self.gate, || None);
        if self.count.fetch_add(1, Ordering::SeqCst) == 0 {
            *self.hold.lock().unwrap_or_else(|error| error.into_inner()) = hold();
        }
    }

    fn join(&self) -> bool {
        Gating::join(&self.gate)
    }

    fn thaw(&self) {
        if self.count.fetch_sub(1, Ordering::SeqCst) == 1 {
            *self.hold.lock().unwrap_or_else(|error| error.into_inner()) = None;
        }
        Gating::thaw(&self.gate);
    }

    fn end(&self) {
        Gating::end(&self.gate);
    }

    fn is_frozen(&self) -> bool {
        Gating::is_frozen(&self.gate)
    }
}

mutant! {
    /// A hand-over looks whether a freeze stands, and adds none of its own.
    AsksOnly(AtomicBool) {
        fn join(&self) -> bool {
            let frozen = Gating::is_frozen(&self.0);
            self.1.store(frozen, Ordering::SeqCst);
            frozen
        }

        fn thaw(&self) {
            if !self.1.swap(false, Ordering::SeqCst) {
                Gating::thaw(&self.0);
            }
        }
    } keeps { change, freeze, end }
}

mutant! {
    /// A hand-over that is called off leaves its freeze behind.
    NeverJoins(AtomicBool) {
        fn join(&self) -> bool {
            let joined = Gating::join(&self.0);
            self.1.store(joined, Ordering::SeqCst);
            joined
        }

        fn thaw(&self) {
            if !self.1.swap(false, Ordering::SeqCst) {
                Gating::thaw(&self.0);
            }
        }
    } keeps { change, freeze, end }
}

/// What the model finds wrong.
#[track_caller]
fn found_by(model: fn()) -> String {
    let found = std::panic::catch_unwind(model).expect_err("nothing was found");
    let text = found.downcast_ref::<String>().cloned();
    text.or_else(|| found.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

const CHANGED: &str = "a page came or went while a freeze stood";

#[test]
fn a_change_that_looks_before_it_goes_through_the_gate_is_found() {
    assert!(found_by(super::allocate_model::<ChecksBefore>).contains(CHANGED));
    assert!(found_by(super::punch_model::<ChecksBefore>).contains(CHANGED));
    assert!(found_by(super::end_model::<ChecksBefore>).contains(CHANGED));
}

#[test]
fn a_freeze_that_looks_for_holes_before_it_stops_changes_is_found() {
    assert!(found_by(super::punch_model::<HoldsBefore>).contains(CHANGED));
}

#[test]
fn a_freeze_that_holds_no_faults_is_found() {
    assert!(found_by(super::fault_model::<HoldsNothing>).contains(CHANGED));
}

#[test]
fn a_freeze_that_is_no_count_is_found() {
    assert!(found_by(super::nested_model::<IsABit>).contains(CHANGED));
}

#[test]
fn a_freeze_that_is_told_before_faults_are_held_is_found() {
    assert!(found_by(super::nested_model::<CountsFirst>).contains(CHANGED));
}

#[test]
fn a_hand_over_that_only_asks_for_a_freeze_is_found() {
    assert!(found_by(super::preserve_model::<AsksOnly>).contains(CHANGED));
}

#[test]
fn a_hand_over_that_leaves_its_freeze_behind_is_found() {
    assert!(found_by(super::preserve_model::<NeverJoins>).contains("a freeze was left"));
}
