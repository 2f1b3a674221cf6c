//! Every way in which threads can meet at an inode's gate, walked by loom: freeze against fault, allocate, punch,
//! preserve and unpreserve, another freeze, and the machine's end.
//!
//! The gate is the one of the crate: the same file, with loom's locks for those of the standard library. The kernel's part,
//! what a file and a userfaultfd do, is a model: each of their operations is one step under the file's own lock. Each
//! model is shown to find a gate that is wrong in one place ([`mutants`]).

#[path = "../src/gate.rs"]
mod gate;
#[path = "freeze_model/mutants.rs"]
mod mutants;
mod sync {
    pub(crate) use loom::sync::RwLock;
    pub(crate) use std::sync::PoisonError;
}

use std::convert::Infallible;

use gate::Gate;
use loom::sync::Arc;
use loom::sync::Mutex;
use loom::thread;

/// What the kernel keeps of a file of two pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pages {
    present: [bool; 2],
    /// The mapping is registered for missing faults.
    registered: bool,
}

/// The file, under its own lock.
struct File(Mutex<Pages>);

#[derive(Debug, PartialEq, Eq)]
enum Fault {
    Served,
    Parked,
}

impl File {
    fn new(present: [bool; 2]) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Pages { present, registered: false })))
    }

    fn step<T>(&self, step: impl FnOnce(&mut Pages) -> T) -> T {
        step(&mut self.0.lock().unwrap_or_else(|error| error.into_inner()))
    }

    fn fault(&self, page: usize) -> Fault {
        self.step(|pages| {
            if !pages.present[page] && pages.registered {
                return Fault::Parked;
            }
            pages.present[page] = true;
            Fault::Served
        })
    }

    fn allocate(&self, page: usize) {
        self.step(|pages| pages.present[page] = true);
    }

    fn punch(&self, page: usize) {
        self.step(|pages| pages.present[page] = false);
    }

    fn present(&self) -> [bool; 2] {
        self.step(|pages| pages.present)
    }
}

/// A registration, ended when it is dropped.
struct Registration(Arc<File>);

impl Drop for Registration {
    fn drop(&mut self) {
        self.0.step(|pages| pages.registered = false);
    }
}

/// Nothing, if there is no hole.
type Hold = Option<Registration>;

/// As the crate does it: whether there are holes is looked up, and only then are faults taken.
fn hold(file: &Arc<File>) -> Hold {
    if file.present() == [true; 2] {
        return None;
    }
    file.step(|pages| pages.registered = true);
    Some(Registration(Arc::clone(file)))
}

/// A gate, right or wrong.
trait Gating: Send + Sync + 'static {
    fn new() -> Self;
    fn change(&self, act: impl FnOnce());
    fn freeze(&self, hold: impl FnOnce() -> Hold);
    /// What the callback of a hand-over does: adds a freeze if one stands.
    fn join(&self) -> bool;
    fn thaw(&self);
    fn end(&self);
    fn is_frozen(&self) -> bool;
}

impl Gating for Gate<Hold> {
    fn new() -> Self {
        Self::new()
    }

    fn change(&self, act: impl FnOnce()) {
        let _refused = self.change(act);
    }

    fn freeze(&self, hold: impl FnOnce() -> Hold) {
        let _refused = self.freeze(|| Ok::<_, Infallible>(hold()), |_| ());
    }

    fn join(&self) -> bool {
        self.join(|_| ()).is_some()
    }

    fn thaw(&self) {
        self.thaw();
    }

    fn end(&self) {
        self.end(drop);
    }

    fn is_frozen(&self) -> bool {
        self.is_frozen()
    }
}

struct Inode<G> {
    gate: G,
    file: Arc<File>,
}

impl<G: Gating> Inode<G> {
    fn new(present: [bool; 2]) -> Arc<Self> {
        Arc::new(Self { gate: G::new(), file: File::new(present) })
    }

    fn allocate(&self, page: usize) {
        self.gate.change(|| self.file.allocate(page));
    }

    fn punch(&self, page: usize) {
        self.gate.change(|| self.file.punch(page));
    }

    fn freeze(&self) {
        self.gate.freeze(|| hold(&self.file));
    }

    /// Called while a freeze of the caller's own stands.
    fn assert_nothing_changes(&self) {
        let before = self.file.present();
        thread::yield_now();
        assert_eq!(self.file.present(), before, "a page came or went while a freeze stood");
    }

    fn freeze_and_thaw(&self) {
        self.freeze();
        self.assert_nothing_changes();
        self.gate.thaw();
    }

    /// Called when no freeze stands any more.
    fn assert_open(&self) {
        assert!(!self.gate.is_frozen(), "a freeze was left");
        assert_eq!(
            [self.file.fault(0), self.file.fault(1)],
            [Fault::Served, Fault::Served],
            "a hold was left"
        );
        self.punch(0);
        assert_eq!(self.file.present(), [false, true], "a change was refused that nothing forbade");
    }
}

/// Runs `other` beside a freeze.
fn beside_a_freeze<G: Gating>(present: [bool; 2], other: impl FnOnce(&Inode<G>) + Send + 'static) {
    let inode = Inode::<G>::new(present);
    let beside = Arc::clone(&inode);
    let beside = thread::spawn(move || other(&beside));
    inode.freeze_and_thaw();
    beside.join().unwrap_or_else(|_| panic!("the other thread failed"));
    inode.assert_open();
}

fn fault_model<G: Gating>() {
    let touch = |inode: &Inode<G>| {
        inode.file.fault(1);
    };
    loom::model(move || beside_a_freeze::<G>([true, false], touch));
}

fn allocate_model<G: Gating>() {
    loom::model(|| beside_a_freeze::<G>([true, false], |inode| inode.allocate(1)));
}

/// The memory has no hole at first: what a freeze then finds must not change before it stands.
fn punch_model<G: Gating>() {
    let punch_and_touch = |inode: &Inode<G>| {
        inode.punch(0);
        inode.file.fault(0);
    };
    loom::model(move || beside_a_freeze::<G>([true; 2], punch_and_touch));
}

/// Two freezes that overlap, and a fault meanwhile.
fn nested_model<G: Gating>() {
    loom::model(|| {
        let inode = Inode::<G>::new([true, false]);
        let [second, faulting] = [Arc::clone(&inode), Arc::clone(&inode)];
        let threads = [
            thread::spawn(move || second.freeze_and_thaw()),
            thread::spawn(move || {
                faulting.file.fault(1);
            }),
        ];
        inode.freeze_and_thaw();
        threads.into_iter().for_each(|thread| thread.join().unwrap_or_else(|_| panic!("a thread failed")));
        inode.assert_open();
    });
}

/// One thread preserves the memory, has it handed over if it is frozen, calls that off and unpreserves it; the other's
/// freeze ends meanwhile, and it changes the memory.
fn preserve_model<G: Gating>() {
    loom::model(|| {
        let inode = Inode::<G>::new([true, false]);
        inode.freeze();
        let session = Arc::clone(&inode);
        let session = thread::spawn(move || {
            if session.gate.join() {
                session.assert_nothing_changes();
                session.gate.thaw();
            }
        });
        inode.gate.thaw();
        inode.allocate(1);
        session.join().unwrap_or_else(|_| panic!("the session's thread failed"));
        inode.assert_open();
    });
}

/// The machine ends while a change is made.
fn end_model<G: Gating>() {
    loom::model(|| {
        let inode = Inode::<G>::new([true, false]);
        let changing = Arc::clone(&inode);
        let changing = thread::spawn(move || changing.allocate(1));
        inode.gate.end();
        inode.assert_nothing_changes();
        changing.join().unwrap_or_else(|_| panic!("the changing thread failed"));
    });
}

/// R2.2, R2.4.
#[test]
fn a_fault_adds_no_page_while_a_freeze_stands() {
    fault_model::<Gate<Hold>>();
}

/// R2.1, R2.4, O1.4.
#[test]
fn an_allocation_is_done_before_a_freeze_or_refused() {
    allocate_model::<Gate<Hold>>();
}

/// R2.1, R2.4, O1.4.
#[test]
fn a_punch_makes_no_hole_that_a_freeze_does_not_know_of() {
    punch_model::<Gate<Hold>>();
}

/// O1.11, O2.6, O2.7.
#[test]
fn freezes_that_overlap_are_one_until_the_last_one_ends() {
    nested_model::<Gate<Hold>>();
}

/// R1.3, R2.4.
#[test]
fn what_is_handed_over_stays_frozen_until_that_is_called_off() {
    preserve_model::<Gate<Hold>>();
}

/// R3.2.
#[test]
fn the_machines_end_waits_for_a_change_and_lets_none_begin() {
    end_model::<Gate<Hold>>();
}
