//! The VM file: what the machine is as a preserved file, and which VM object of KVM serves it now.
//!
//! A machine has one VM file in each process, made by [`VmFile::make`] whether the machine is new or retrieved. The VM
//! object is its maker's, by the one reference that it hands out; the file follows it by a weak one. So there is no
//! circle, to drop the VM object is all that its end takes, and who asks the file gets the VM object that lives or
//! nothing. It is never another one: what a weak reference points to keeps its place in memory, whatever becomes of the
//! number of its descriptor.

use std::fmt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::Weak;

use abi::luo::SessionName;
use abi::vm;
use abi::vm::Identity;
use abi::vm::VmRecord;
use kvm::kvm_ioctls::VmFd;
use luo::Compatible;
use luo::Context;
use luo::Errno;
use luo::File;
use luo::FileId;
use luo::Handler;
use luo::HandlerError;
use tracing::info;

use crate::handlers::Mismatch;
use crate::handlers::check_identity;
use crate::handlers::invalid;

/// How a VM object came to serve a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Its guest starts from the beginning.
    Made,
    /// Its guest goes on from where another VM object stopped.
    Restored,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Made => "made",
            Self::Restored => "restored",
        })
    }
}

/// A VM object has begun to serve a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Created {
    /// The machine's name.
    pub name: SessionName,
    /// The machine's identity, which stays the same from one VM object to the next.
    pub identity: Identity,
    /// How many vCPUs it has.
    pub vcpus: u64,
    /// Whether its guest begins or goes on.
    pub origin: Origin,
}

/// Which VM object serves the machine.
#[derive(Debug)]
struct Serving {
    vm: Weak<VmFd>,
    /// Of the next one.
    origin: Origin,
}

/// The machine as a preserved file: its identity, what a VM object for it needs to be, and which one serves it here.
#[derive(Debug)]
pub struct VmFile {
    id: FileId,
    record: VmRecord,
    serving: Mutex<Serving>,
}

impl VmFile {
    /// The one way to a VM file, of a machine that is made and of one that is retrieved. It opens no descriptor, and
    /// nothing serves the machine yet.
    pub(crate) fn make(record: VmRecord, origin: Origin) -> Arc<Self> {
        let serving = Mutex::new(Serving { vm: Weak::new(), origin });
        Arc::new(Self { id: FileId::fresh(), record, serving })
    }

    /// Its record.
    pub fn record(&self) -> &VmRecord {
        &self.record
    }

    /// The VM object that serves the machine in this process, kept alive by what is returned. `None` if none was told of
    /// or that one has ended, though descriptors of its vCPUs or its memory may be open still.
    pub fn vm_object(&self) -> Option<Arc<VmFd>> {
        self.serving().vm.upgrade()
    }

    fn serving(&self) -> MutexGuard<'_, Serving> {
        // Nothing that can panic runs under the lock.
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes and tells that this VM object serves the machine, unless it does already.
    pub(crate) fn serve(&self, name: SessionName, vm: &Arc<VmFd>) -> Option<Created> {
        let origin = {
            let mut serving = self.serving();
            if serving.vm.as_ptr() == Arc::as_ptr(vm) {
                return None;
            }
            serving.vm = Arc::downgrade(vm);
            // Whatever serves the machine after this one starts its guest anew, as for a reset.
            std::mem::replace(&mut serving.origin, Origin::Made)
        };
        let VmRecord { identity, vcpus, .. } = self.record;
        info!(target: "tideover::vm", machine = %name, %identity, vcpus, %origin, "created");
        Some(Created { name, identity, vcpus, origin })
    }
}

fn vm_of(file: &File) -> Option<Arc<VmFile>> {
    Arc::clone(file).downcast().ok()
}

/// Preserves a [`VmFile`]: `tideover-vm-v1`.
pub(crate) struct VmHandler;

impl Handler for VmHandler {
    fn compatible(&self) -> Compatible {
        Compatible::literal(vm::FORMAT.compatible)
    }

    fn can_preserve(&self, file: &File) -> bool {
        vm_of(file).is_some()
    }

    fn id(&self, file: &File) -> FileId {
        vm_of(file).map_or_else(FileId::fresh, |file| file.id)
    }

    fn preserve(&self, context: &mut Context<'_>, file: &File) -> Result<u64, HandlerError> {
        let file = vm_of(file).ok_or(Mismatch::Type).map_err(invalid)?;
        check_identity(context, file.record.identity)?;
        let stored = context.kho.store(&file.record.encode());
        Ok(stored.map_err(|error| HandlerError::new(Errno::ENOMEM, error))?.start().address())
    }

    fn unpreserve(&self, context: &mut Context<'_>, _: &File, data: u64) {
        context.kho.free_record(&vm::FORMAT, data);
    }

    fn freeze(&self, _: &mut Context<'_>, _: &File, data: u64) -> Result<u64, HandlerError> {
        Ok(data)
    }

    fn unfreeze(&self, _: &mut Context<'_>, _: &File, data: u64) -> u64 {
        data
    }

    fn retrieve(&self, context: &mut Context<'_>, data: u64) -> Result<File, HandlerError> {
        let record = VmRecord::read(&context.kho.memory(), data);
        let record = record.map_err(|error| HandlerError::new(Errno::EINVAL, error))?;
        let adopted = context.kho.adopt_record(&vm::FORMAT, data);
        adopted.map_err(|error| HandlerError::new(Errno::EINVAL, error))?;
        check_identity(context, record.identity)?;
        Ok(VmFile::make(record, Origin::Restored))
    }

    fn can_finish(&self, _: Option<&File>) -> bool {
        true
    }

    fn finish(&self, context: &mut Context<'_>, _: Option<&File>, data: u64) {
        context.kho.free_record(&vm::FORMAT, data);
    }
}
