//! A machine's memory in a file.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::ExitCode;

use ::vmm::Picture;
use ::vmm::control::GuestState;
use anyhow::Context as _;
use anyhow::bail;
use serde_json::json;

use crate::cli;
use crate::machines;
use crate::progress::Bar;
use crate::size;
use crate::verbs;
use crate::verbs::Look;

pub(crate) fn dump(arguments: &cli::Dump) -> anyhow::Result<ExitCode> {
    let name = &arguments.name;
    let client = verbs::connect_to_look(name)?;
    match verbs::look(&client).map_err(|error| verbs::explain_silence(name, error))? {
        Look::Held(_) => {}
        Look::Status(status) if status.state != GuestState::Running => {}
        Look::Status(_) => {
            bail!("{name} runs, and its memory changes: `tideover pause {name}` has it stand still first")
        }
    }
    // The connection stands as long as the memory is read: the machine goes nowhere without a word.
    let (custody, fds, _connection) = machines::connect(name)?.ask_custody()?;
    let picture = Picture::of(&custody, fds)?;
    let path = &arguments.file;
    let cannot = || format!("cannot write {}", path.display());
    // It is all that the guest knows: nobody else is to read it.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).with_context(cannot)?;
    let bar = Bar::new();
    let written =
        picture.write(&file, &mut |done, of| bar.at("writing memory", done, of)).with_context(cannot)?;
    bar.done();
    let (memory, vcpus) = (picture.memory_bytes(), picture.vcpus());
    match arguments.json {
        true => verbs::say_json(&json!({
            "name": name, "file": path, "memory_bytes": memory, "written_bytes": written, "vcpus": vcpus,
        }))?,
        false => {
            let registers = match vcpus {
                0 => "no registers are known".to_owned(),
                count => format!("registers of {count} vCPUs"),
            };
            let written = size::show(written);
            verbs::say(&format!(
                "{name}: {} of memory, {registers}; {written} written\n",
                size::show(memory)
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
