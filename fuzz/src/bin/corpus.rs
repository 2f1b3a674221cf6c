//! Takes kept inputs out of their files for libFuzzer, and puts what it found into them. `cargo xtask fuzz` runs it.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context as _;
use anyhow::Result;
use clap::Parser;
use fuzz::TARGETS;
use fuzz::corpus;

/// Kept inputs.
#[derive(Parser)]
enum Arguments {
    /// Names the targets
    List,
    /// Writes a target's seeds and kept inputs into a folder, one file each
    Unpack { target: String, folder: PathBuf },
    /// Makes the inputs in a folder the target's corpus
    Pack { target: String, folder: PathBuf },
}

fn main() -> Result<()> {
    match Arguments::parse() {
        Arguments::List => TARGETS.iter().for_each(|target| println!("{}", target.name)),
        Arguments::Unpack { target, folder } => unpack(&target, &folder)?,
        Arguments::Pack { target, folder } => corpus::write(&target, inputs(&folder)?)?,
    }
    Ok(())
}

fn unpack(target: &str, folder: &Path) -> Result<()> {
    let known = fuzz::target(target).with_context(|| format!("there is no target {target}"))?;
    fs::create_dir_all(folder)?;
    for (number, input) in (known.seeds)().into_iter().chain(corpus::kept(target)?).enumerate() {
        fs::write(folder.join(format!("kept-{number:05}")), input)?;
    }
    Ok(())
}

fn inputs(folder: &Path) -> Result<Vec<Vec<u8>>> {
    let files = fs::read_dir(folder).with_context(|| format!("{} cannot be read", folder.display()))?;
    files.map(|file| Ok(fs::read(file?.path())?)).collect()
}
