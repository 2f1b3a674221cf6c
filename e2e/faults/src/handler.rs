//! Handlers and shared objects that refuse when it is their turn.

use std::sync::Arc;

use kho::Kho;
use luo::Compatible;
use luo::Context;
use luo::Errno;
use luo::File;
use luo::FileId;
use luo::Handler;
use luo::HandlerError;
use luo::Object;
use luo::SharedObject;

use crate::Fault;

/// A handler whose callbacks that may refuse are steps: `preserve`, `freeze`, `retrieve`, `can_finish`. One that fails
/// refuses before the real one is asked.
#[derive(Debug)]
pub struct FaultyHandler<H> {
    handler: H,
    fault: Fault,
}

impl<H: Handler> FaultyHandler<H> {
    /// Stands before `handler`.
    pub fn new(handler: H, fault: &Fault) -> Self {
        Self { handler, fault: fault.clone() }
    }
}

fn step(fault: &Fault) -> Result<(), HandlerError> {
    match fault.trips() {
        true => Err(HandlerError::new(Errno::EIO, "this step fails")),
        false => Ok(()),
    }
}

impl<H: Handler> Handler for FaultyHandler<H> {
    fn compatible(&self) -> Compatible {
        self.handler.compatible()
    }

    fn can_preserve(&self, file: &File) -> bool {
        self.handler.can_preserve(file)
    }

    fn id(&self, file: &File) -> FileId {
        self.handler.id(file)
    }

    fn preserve(&self, context: &mut Context<'_>, file: &File) -> Result<u64, HandlerError> {
        step(&self.fault)?;
        self.handler.preserve(context, file)
    }

    fn unpreserve(&self, context: &mut Context<'_>, file: &File, data: u64) {
        self.handler.unpreserve(context, file, data);
    }

    fn freeze(&self, context: &mut Context<'_>, file: &File, data: u64) -> Result<u64, HandlerError> {
        step(&self.fault)?;
        self.handler.freeze(context, file, data)
    }

    fn unfreeze(&self, context: &mut Context<'_>, file: &File, data: u64) -> u64 {
        self.handler.unfreeze(context, file, data)
    }

    fn retrieve(&self, context: &mut Context<'_>, data: u64) -> Result<File, HandlerError> {
        step(&self.fault)?;
        self.handler.retrieve(context, data)
    }

    fn can_finish(&self, file: Option<&File>) -> bool {
        !self.fault.trips() && self.handler.can_finish(file)
    }

    fn finish(&self, context: &mut Context<'_>, file: Option<&File>, data: u64) {
        self.handler.finish(context, file, data);
    }
}

/// A shared object whose callbacks that may refuse are steps: `preserve` and `retrieve`.
pub struct FaultyShared {
    object: Arc<dyn SharedObject>,
    fault: Fault,
}

impl FaultyShared {
    /// Stands before `object`.
    pub fn new(object: Arc<dyn SharedObject>, fault: &Fault) -> Self {
        Self { object, fault: fault.clone() }
    }
}

impl SharedObject for FaultyShared {
    fn compatible(&self) -> Compatible {
        self.object.compatible()
    }

    fn preserve(&self, kho: &mut Kho) -> Result<(Object, u64), HandlerError> {
        step(&self.fault)?;
        self.object.preserve(kho)
    }

    fn unpreserve(&self, kho: &mut Kho, object: &Object, data: u64) {
        self.object.unpreserve(kho, object, data);
    }

    fn retrieve(&self, kho: &mut Kho, data: u64) -> Result<Object, HandlerError> {
        step(&self.fault)?;
        self.object.retrieve(kho, data)
    }

    fn finish(&self, kho: &mut Kho, object: Option<&Object>, data: u64) {
        self.object.finish(kho, object, data);
    }
}
