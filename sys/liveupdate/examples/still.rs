//! Has the host's file systems stand still for a while, and says afterwards which did.
//!
//! ```text
//! still 500      # for half a second: whoever writes a file on a disk waits for it
//! ```

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use tideover_liveupdate::filesystems;
use tideover_liveupdate::filesystems::Still;

fn main() -> ExitCode {
    let ms = std::env::args().nth(1).and_then(|ms| ms.parse().ok());
    let done = ms.ok_or("usage: still MILLISECONDS".into()).and_then(|ms| hold(Duration::from_millis(ms)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("still: {error}");
            ExitCode::FAILURE
        }
    }
}

fn hold(time: Duration) -> Result<(), Box<dyn Error>> {
    filesystems::sync();
    let begun = Instant::now();
    let still = Still::hold(Duration::from_secs(10))?;
    let took = begun.elapsed();
    // Nothing may be written before the release: so what there is to say is kept.
    std::thread::sleep(time);
    let held = still.held().map(|held| format!("held {held}"));
    let left = still.left().iter().map(|(left, why)| format!("left {left}: {why}"));
    let said: Vec<_> = held.chain(left).collect();
    still.release()?;
    println!("{}\nwhich took {} ms", said.join("\n"), took.as_millis());
    Ok(())
}
