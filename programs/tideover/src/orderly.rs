//! The orderly way to the next kernel: the service manager shuts the host down first, and the guests run meanwhile.
//!
//! ```text
//! tideover kexec        keeper (a scope of its own, which shutdown spares)      systemd
//!   check, load image
//!   start the keeper ──▶ have all machines preserved
//!                        take their VMMs into its scope
//!                        systemctl kexec ─────────────────────────────────────▶ stop services, unmount
//!                        have all stand still, save, seal ◀── the hook ──────── last of all
//!                        stay, since sessions end with their holder             boot the next kernel
//! ```

use std::fs;
use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;

use ::vmm::control;
use anyhow::Context as _;
use anyhow::bail;
use anyhow::ensure;
use fdpass::Channel;
use fdpass::Deadline;
use socket::Program;

use crate::cli;
use crate::keeper::Plan;
use crate::keeper::Said;
use crate::kexec;
use crate::leavers::Goer;
use crate::machines;
use crate::progress::Bar;
use crate::verbs;

/// There while systemd is process 1. As what follows, below the root.
const SYSTEMD: &str = "run/systemd/system";
/// What systemd runs last, before it boots the next kernel.
const HOOK: &str = "usr/lib/systemd/system-shutdown/tideover";
/// Where a shutdown goes on that was prepared by an initial RAM disk.
const EXITRD: &str = "run/initramfs/shutdown";
/// What lets the machines run on in the next kernel.
const RESUME: &str = "tideover-resume.service";
/// What the keeper has to say, in the directory of this user's machines.
const LOG: &str = "kexec";

/// What the keeper's scope is like: nobody stops it, and what is in it lives until the kernel goes.
const SCOPE: [&str; 4] = [
    "--property=DefaultDependencies=no",
    "--property=IgnoreOnIsolate=yes",
    "--property=RefuseManualStop=yes",
    "--property=SurviveFinalKillSignal=yes",
];

/// Refuses a host whose shutdown the machines would not outlive.
pub(crate) fn check() -> anyhow::Result<()> {
    check_below(Path::new("/"))?;
    let mut enabled = Command::new("systemctl");
    enabled.args(["--quiet", "is-enabled", RESUME]).stdin(Stdio::null()).stderr(Stdio::null());
    if !enabled.status().is_ok_and(|status| status.success()) {
        complain!(
            "tideover: {RESUME} is not enabled: the machines stand still after the kexec until `tideover resume --all`"
        );
    }
    Ok(())
}

/// The same, of the host whose files are below `root`.
fn check_below(root: &Path) -> anyhow::Result<()> {
    let is_program = |path: &str| {
        fs::metadata(root.join(path)).is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0)
    };
    ensure!(
        root.join(SYSTEMD).is_dir(),
        "this host's service manager is not systemd: nobody can be asked to shut it down; say --now"
    );
    ensure!(
        is_program(HOOK),
        "there is no program /{HOOK}, which would have the guests stand still: put the one of dist/systemd there, or say --now"
    );
    ensure!(
        !is_program(EXITRD),
        "there is /{EXITRD}: this host's shutdown would go on there and end all programs, the machines' VMMs among them; say \
         --now"
    );
    Ok(())
}

/// Has the machines made ready, and the host shut down.
///
/// # Errors
/// Whatever keeps them here: then their guests run on.
pub(crate) fn leave(machines: Vec<Goer>, arguments: &cli::Kexec, bar: &Bar) -> anyhow::Result<()> {
    let at_paths = machines.iter().filter(|goer| goer.at_path).map(|goer| goer.name.clone()).collect();
    let machines = machines.into_iter().map(|goer| goer.name).collect();
    let (timeout, leave_others) = (arguments.timeout, arguments.leave_others);
    let plan = Plan { machines, at_paths, timeout, leave_others };
    let directory = machines::make_directory()?;
    let channel = start(machines::log(&directory, LOG)?)?;
    control::send(&channel, &plan).context("cannot reach the keeper")?;
    loop {
        match control::receive(&channel, Deadline::never()).context("cannot read the keeper's answer")? {
            Some(Said::Progress { what, done, of }) => bar.at(&what, done, of),
            Some(Said::Preserved(preserved)) => kexec::said(&preserved, arguments)?,
            Some(Said::ShutsDown) => break,
            Some(Said::Failed(why)) => bail!("{why}"),
            None => bail!("the keeper is gone: see {}", directory.join(format!("{LOG}.log")).display()),
        }
    }
    bar.done();
    if !arguments.json {
        verbs::say("this host is being shut down; the guests run until the end of that\n")?;
    }
    Ok(())
}

/// Starts the keeper.
fn start(log: File) -> anyhow::Result<Channel> {
    let (ours, theirs) = Channel::pair()?;
    let program = Program::this_path().context("cannot find this program")?;
    let mut command = Command::new("systemd-run");
    command.args(["--scope", "--quiet", "--collect", "--no-ask-password"]).args(SCOPE);
    command.arg(format!("--unit=tideover-kexec-{}", std::process::id()));
    command.arg("--description=Machines that go through a kexec").arg("--").arg(program);
    command.args(["vmm", "--detach", "keep"]).stdin(theirs.into_stdio());
    command.stdout(Stdio::null()).stderr(log);
    // It becomes the keeper, which is not to end with this program.
    drop(command.spawn().context("cannot run systemd-run")?);
    Ok(ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_whose_shutdown_machines_would_not_outlive_is_refused() {
        let root = std::env::temp_dir().join(format!("tideover-orderly-{}", std::process::id()));
        let refused = || check_below(&root).map_err(|error| error.to_string()).err().unwrap_or_default();
        let program = |path: &str, mode| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap_or(&root))?;
            fs::write(&path, "")?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))
        };
        assert!(refused().contains("not systemd"), "{}", refused());
        assert!(fs::create_dir_all(root.join(SYSTEMD)).is_ok());
        assert!(
            refused().contains("there is no program /usr/lib/systemd/system-shutdown/tideover"),
            "{}",
            refused()
        );
        assert!(program(HOOK, 0o644).is_ok());
        assert!(refused().contains("there is no program"), "{}", refused());
        assert!(program(HOOK, 0o755).is_ok());
        assert_eq!(refused(), "");
        assert!(program(EXITRD, 0o755).is_ok());
        assert!(refused().contains("say --now"), "{}", refused());
        assert!(fs::remove_dir_all(&root).is_ok());
    }
}
