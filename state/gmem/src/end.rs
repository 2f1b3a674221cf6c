//! The end of guest memory: with the machine that owns it, or with the last who knows it.

use std::fmt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use crate::Inode;
use crate::freeze::Holding;

/// A step of the end. Each comes once, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum End {
    /// The pages are dropped: no slot of any VM, no mapping and no descriptor of this process leads there any more.
    Evicted,
    /// What was known of it is dropped: its files and their bindings.
    Destroyed,
    /// The object is gone.
    Freed,
}

type Told = Box<dyn Fn(End) + Send + Sync>;

/// Who wants to hear of it, and what was told last.
#[derive(Default)]
pub(crate) struct Teller(Mutex<(Vec<Told>, Option<End>)>);

impl Teller {
    fn tell(&self, step: End) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.1.is_none_or(|last| last < step) {
            state.1 = Some(step);
            state.0.iter().for_each(|told| told(step));
        }
    }
}

impl fmt::Debug for Teller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Teller")
    }
}

/// Tells of a step when it is dropped, if nobody has before: the last of the fields that the step is about.
#[derive(Debug)]
pub(crate) struct Step(pub(crate) End, pub(crate) Arc<Teller>);

impl Drop for Step {
    fn drop(&mut self) {
        self.1.tell(self.0);
    }
}

/// The one owner of guest memory. When it is dropped the memory ends: here, whoever knows the inode, a file or the
/// mapping; where another process was given the region, its own owner decides.
#[derive(Debug)]
#[must_use = "the memory ends when this is dropped"]
pub struct Owner(Arc<Inode>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Inode {
    /// Makes the caller its owner. `None` if it has, or had, one (requirement R3.3).
    pub fn own(self: &Arc<Self>) -> Option<Owner> {
        let mut owned = self.owned.lock().unwrap_or_else(PoisonError::into_inner);
        let free = !std::mem::replace(&mut *owned, true);
        free.then(|| Owner(Arc::clone(self)))
    }

    /// Has `told` hear of each step of the end.
    pub fn on_end(&self, told: impl Fn(End) + Send + Sync + 'static) {
        self.teller().0.lock().unwrap_or_else(PoisonError::into_inner).0.push(Box::new(told));
    }

    /// Whether the machine that owned it is gone.
    pub fn has_ended(&self) -> bool {
        self.gate.has_ended()
    }

    fn teller(&self) -> &Teller {
        &self.freed.1
    }

    /// Ends memory that nobody wants, for every process: what can be punched takes no pages any more, whoever has it open.
    pub(crate) fn destroy(&self) {
        // Hugetlb memory goes with the last who has it.
        let _ = self.mapping.region().punch(0, self.size_bytes());
        self.end();
    }

    fn end(&self) {
        let mut first = None;
        // Not inside of the gate: who binds pages asks it while it keeps us waiting.
        self.gate.end(|holding| first = Some(holding));
        let Some(holding) = first else { return };
        self.evict(holding);
        self.teller().tell(End::Evicted);
        self.files.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.teller().tell(End::Destroyed);
    }

    /// The order is that of [`uffd::Hold::end`]: who waits at a hole goes on when there is nothing to add a page to.
    fn evict(&self, holding: Option<Holding>) {
        let views = self.files.lock().unwrap_or_else(PoisonError::into_inner).clone();
        views.iter().for_each(|view| view.unbind_all());
        let parked = holding.and_then(Holding::end);
        // Should there be no room for it, the pages stay until the last handle goes, as they would without an owner.
        let _ = self.mapping.revoke();
        if let Some(parked) = parked {
            let _ = parked.wake();
        }
        if let Some(maker) = &self.maker {
            maker.let_go();
        }
    }
}
