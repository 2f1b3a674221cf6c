//! Keeps what it reads across a kexec.
//!
//! ```text
//! echo hello | keep put greeting &      # lives until the kernel jumps: the session does, too
//! systemctl kexec
//! keep get greeting                     # in the next kernel, once: hello
//! ```

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::process::ExitCode;

use rustix::fs::MemfdFlags;
use tideover_liveupdate::Device;
use tideover_liveupdate::Name;

/// The one file of the session.
const TOKEN: u64 = 1;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["put", name] => put(name),
        ["get", name] => get(name),
        _ => Err("usage: keep put NAME < FILE, or keep get NAME > FILE".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("keep: {error}");
            ExitCode::FAILURE
        }
    }
}

fn put(name: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut memory = File::from(rustix::fs::memfd_create("kept", MemfdFlags::CLOEXEC)?);
    io::copy(&mut io::stdin(), &mut memory)?;
    let mut session = Device::open()?.create(&Name::new(name.as_bytes())?)?;
    session.preserve(TOKEN, memory.as_fd())?;
    loop {
        std::thread::park();
    }
}

fn get(name: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut session = Device::open()?.retrieve(&Name::new(name.as_bytes())?)?;
    let mut memory = File::from(session.retrieve(TOKEN)?);
    io::Seek::rewind(&mut memory)?;
    io::copy(&mut memory, &mut io::stdout())?;
    session.finish()?;
    Ok(())
}
