//! For tests, those of `tests/` too, which take the files from here.

mod line;
mod output;

pub(crate) use line::CountedLine;
pub(crate) use output::Output;
