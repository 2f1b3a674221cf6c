//! What a guest of the end-to-end cases says on its serial line and writes to its disk, for itself and for
//! whoever holds it to that.

#![forbid(unsafe_code)]

mod record;
mod said;

pub use record::BrokenRecord;
pub use record::RECORD_BYTES;
pub use record::record;
pub use record::whole_records;
pub use said::Said;
