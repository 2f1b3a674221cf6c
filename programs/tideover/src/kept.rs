//! Whether tideoverd keeps a machine.

use std::path::Path;
use std::time::Duration;

use fdpass::Deadline;
use serde_json::Value;
use serde_json::json;

use crate::progress::Bar;

/// How long tideoverd may take to have a machine. It has it in a moment, unless it is stopped.
const PATIENCE: Duration = Duration::from_secs(5);

/// Waits until tideoverd keeps the machine, if there is one. Says whether it does.
pub(crate) fn await_kept(directory: &Path, name: &str, bar: &Bar) -> bool {
    let until = Deadline::after(PATIENCE);
    let Ok(mut lines) = fdpass::connect_lines(&tideoverd::socket(directory), until) else { return false };
    bar.say("waiting for tideoverd");
    let kept = ask(&mut lines, name, until);
    if !matches!(kept, Ok(true)) {
        complain!("tideover: tideoverd does not keep {name} (yet): should its VMM die now, it is lost");
    }
    kept.unwrap_or_default()
}

fn ask(lines: &mut fdpass::Lines, name: &str, until: Deadline) -> anyhow::Result<bool> {
    lines.require_same_user()?;
    lines.send(&serde_json::to_vec(&json!({ "cmd": "KEEP", "id": name }))?, Vec::new())?;
    let answer = lines.receive_some(until)?;
    let answer: Option<Value> = answer.first().and_then(|line| serde_json::from_slice(&line.bytes).ok());
    Ok(answer.is_some_and(|answer| answer["event"] == "KEPT"))
}
