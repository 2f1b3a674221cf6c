//! Virtio devices (virtio 1.2) behind virtio-mmio.

pub(crate) mod blk;
pub(crate) mod core;
pub(crate) mod net;
pub(crate) mod queue;
pub(crate) mod registers;
pub(crate) mod request;
pub(crate) mod wire;
