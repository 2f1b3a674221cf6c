//! What the VMM knows of its guest, whatever it is.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvm_ioctls::VmFd;
use machine::Machine;
use machine::StateName;
use machine::update::Guest;
use pulse::MAILBOX_OFFSET;
use pulse::Mailbox;
use pulse::MailboxError;
use pulse::Mailboxes;
use pulse::SharedWords;
use pulse::Words;
use region::Mapping;
use rustix::event::EventfdFlags;
use rustix::event::eventfd;
use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;

use crate::control::DeviceStatus;
use crate::control::GuestKind;
use crate::control::MachineSpec;

/// How long a guest may take to stop, and to be saved, unless less is asked for.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a guest could not be made, stopped, saved or loaded.
#[derive(Debug, Error)]
pub enum GuestError {
    /// It did not stop in time.
    #[error("the guest did not {0} in time")]
    TimedOut(&'static str),
    /// Its state cannot be loaded any more.
    #[error("the guest runs already")]
    RunsAlready,
    /// Its thread is gone.
    #[error("the guest's thread is gone")]
    ThreadGone,
    /// It has no vCPU.
    #[error("a guest needs a vCPU")]
    NoVcpus,
    /// It is another guest's memory.
    #[error("the machine has {machine} vCPUs, and the guest in its memory {memory}")]
    OtherVcpus {
        /// Of the machine.
        machine: u32,
        /// As the memory tells.
        memory: u32,
    },
    /// It ended by itself.
    #[error("{0}")]
    Failed(String),
    /// Something below failed.
    #[error("cannot {what}")]
    Below {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A state is missing.
    #[error("no state was handed over for {0}")]
    NoState(StateName),
    /// A device's state is missing.
    #[error("no state was handed over for the device {0}")]
    NoDeviceState(String),
    /// A state is that of no device.
    #[error("a state was handed over for {0}, which is no device of this machine")]
    UnknownDevice(String),
    /// A state cannot be read.
    #[error("the state of {what} is none: `{field}`")]
    State {
        /// What it is the state of.
        what: &'static str,
        /// Where it is wrong.
        field: &'static str,
    },
    /// More devices than a machine has places for.
    #[error("no place is left for a device")]
    NoPlace,
}

/// Wraps an error of a lower layer.
pub(crate) fn below<E: std::error::Error + Send + Sync + 'static>(
    what: &'static str,
) -> impl Fn(E) -> GuestError {
    move |source| GuestError::Below { what, source: Box::new(source) }
}

/// Guest memory as the words that pulse and its host talk through.
#[derive(Debug, Clone)]
pub(crate) struct MemoryWords(pub(crate) Arc<Mapping>);

impl Words for MemoryWords {
    fn load(&self, offset_bytes: u64) -> u64 {
        // pulse asks for words of its layout, and that was made for this memory.
        self.0.load(offset_bytes).unwrap_or_default()
    }

    fn store(&self, offset_bytes: u64, value: u64) {
        let _ = self.0.store(offset_bytes, value);
    }
}

impl SharedWords for MemoryWords {
    fn increment(&self, offset_bytes: u64) {
        let _ = self.0.increment(offset_bytes);
    }
}

impl MemoryWords {
    /// Those of a machine whose guest is pulse.
    pub(crate) fn of(spec: &MachineSpec, machine: &Machine) -> Option<Self> {
        spec.linux.is_none().then(|| Self(Arc::clone(machine.memories()[0].inode.mapping())))
    }

    /// The first vCPU's, unchecked.
    pub(crate) fn mailbox(&self) -> Mailbox<'_, Self> {
        Mailbox::new(self, MAILBOX_OFFSET)
    }

    /// All vCPUs'.
    pub(crate) fn mailboxes(&self) -> Result<Mailboxes<'_, Self>, MailboxError> {
        Mailboxes::find(self, self.0.len_bytes())
    }

    /// The ticks of all vCPUs together; none of a memory that tells of no guest.
    pub(crate) fn ticks(&self) -> u64 {
        self.mailboxes().map_or(0, |mailboxes| mailboxes.ticks())
    }
}

/// From how long on the guest records a gap as a pause, in cycles of its clock: 100 µs. That is below any update's,
/// and above what a fault of guest memory costs, of which there are many after one.
pub(crate) const fn pause_threshold(cycles_per_ms: u64) -> u64 {
    if cycles_per_ms == 0 { u64::MAX } else { cycles_per_ms / 10 }
}

/// How a guest ended by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// It switched itself off.
    PowerOff,
    /// It asked to be started again.
    Reset,
    /// It did what no guest may do, as a triple fault, or KVM cannot go on with it.
    Crashed(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest has switched itself off"),
            Self::Reset => f.write_str("the guest has asked for a reset"),
            Self::Crashed(why) => write!(f, "the guest has crashed: {why}"),
        }
    }
}

/// Whether the guest has ended by itself, and a bell that rings when it does.
#[derive(Debug, Clone)]
pub struct Health {
    end: Arc<Mutex<Option<End>>>,
    /// A look at this is cheaper than at the end.
    has_ended: Arc<AtomicBool>,
    bell: Arc<OwnedFd>,
}

impl Health {
    /// A guest that is well.
    ///
    /// # Errors
    /// [`GuestError::Below`] if the kernel has no room for an eventfd.
    pub fn well() -> Result<Self, GuestError> {
        let bell =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(below("make an eventfd"))?;
        Ok(Self { end: Arc::default(), has_ended: Arc::default(), bell: Arc::new(bell) })
    }

    /// It has ended. The first end counts.
    pub(crate) fn end(&self, end: End) {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
        self.has_ended.store(true, Ordering::SeqCst);
        // Of an eventfd that is full somebody has been told already.
        let _ = rustix::io::write(&self.bell, &1u64.to_le_bytes());
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<End> {
        if !self.has_ended.load(Ordering::SeqCst) {
            return None;
        }
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl AsFd for Health {
    /// Can be read once the guest has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// A guest that can be served, and handed over.
pub trait Served: Guest<Error = GuestError> + Send {
    /// Which kind it is.
    fn kind(&self) -> GuestKind;

    /// Loads the states of a stopped guest, which another VMM has saved.
    ///
    /// # Errors
    /// [`GuestError`]; then it does not run.
    fn load(&mut self, states: &BTreeMap<StateName, Vec<u8>>) -> Result<(), GuestError>;

    /// Lets it run: for the first time, or after [`load`](Served::load).
    ///
    /// # Errors
    /// [`GuestError`] if its thread is gone.
    fn start(&mut self) -> Result<(), GuestError>;

    /// How long it may take to stop, and as long to be saved, from now on.
    fn set_patience(&mut self, patience: Duration);

    /// Formats of its states, which a successor has to be able to read.
    fn formats(&self) -> Vec<String>;

    /// An update begins, and the guest's memory is about to be frozen: from then on who touches a page that is not
    /// there waits. A guest that cannot be stopped while it waits makes sure now that it will not have to.
    ///
    /// # Errors
    /// [`GuestError`]; there is no update then.
    fn before_freeze(&self) -> Result<(), GuestError>;

    /// What a successor needs to know of it before the pause.
    fn before_pause(&self) -> serde_json::Value;

    /// When the last of its vCPUs was last about to execute its first instruction, on the host's monotonic clock, in
    /// nanoseconds.
    fn entered_ns(&self) -> Option<u64>;

    /// The VM object of KVM that it runs in, if it does.
    fn vm_object(&self) -> Option<&Arc<VmFd>>;

    /// Descriptors of its vCPUs, for whoever is to read their last registers one day; none of a guest that is a thread.
    fn vcpus(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Its clock (kvmclock), in nanoseconds, if it has one.
    fn clock_ns(&self) -> Option<u64> {
        Some(self.vm_object()?.get_clock().ok()?.clock)
    }

    /// Whether it has ended by itself.
    fn health(&self) -> &Health;

    /// What devices it has, if the machine was made as `spec` says.
    fn devices(&self, spec: &MachineSpec) -> Vec<DeviceStatus>;

    /// Its consoles go on, though it stands still.
    fn attend(&self);
}

/// The guest runs in a VM object of its own from now on: who follows the machine is told, once of each.
pub(crate) fn serves(guest: &dyn Served, machine: &Machine) {
    // It is an event of `tracing`; the value says the same.
    let _told = guest.vm_object().and_then(|vm| machine.serve(vm));
}

/// The guest, whatever it is, as its user wants it.
pub(crate) struct AnyGuest {
    pub(crate) guest: Box<dyn Served>,
    /// It stands still because somebody asked for that: no update lets it run.
    pub(crate) held: bool,
}

impl AnyGuest {
    /// Why it does not run any more, if it has ended by itself.
    pub(crate) fn failure(&self) -> Option<String> {
        self.guest.health().ended().map(|end| end.to_string())
    }
}

impl Guest for AnyGuest {
    type Error = GuestError;

    fn pause(&mut self) -> Result<(), GuestError> {
        self.guest.pause()
    }

    fn save(&mut self) -> Result<Vec<(StateName, Vec<u8>)>, GuestError> {
        self.guest.save()
    }

    fn stopped_ns(&self) -> Option<u64> {
        self.guest.stopped_ns()
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        if self.held {
            self.guest.attend();
            return Ok(());
        }
        self.guest.resume()
    }
}
