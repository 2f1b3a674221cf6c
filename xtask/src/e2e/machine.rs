//! One emulated host, from its boot to its end.

use std::io::BufRead as _;
use std::io::BufReader;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::mpsc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;

use super::capture::Capture;
use super::cases::Ground;

/// How many of the last lines are shown of a host that failed.
const LAST_LINES: usize = 30;

/// A small cache of translated code, which is emptied now and then: what is left in it of a kernel that was replaced makes each
/// write to the memory where its code lay a slow one. So a next life takes half the time.
const TCG: &str = "tcg,tb-size=64";
/// The TSC is the real one, which runs on while the emulation does not: who compares it with an emulated clock would find it wrong. It
/// goes at one rate, which the emulated processor does not say; KVM would otherwise go by a rate measured in haste.
const TSC: &str = "tsc=reliable setcpuid=constant_tsc";
/// What a kernel is told that has /dev/liveupdate.
const BUILT: &str = "kho=on kho_scratch=32M,96M,32M liveupdate=on";
/// One that Debian ships knows no `setcpuid=`. KVM is a module there, and goes by the rate that the kernel has measured until it is
/// loaded, in each life anew: to a millionth or so it is the same. Such a kernel would write over all of the initial file system's
/// memory to free it, which can take half a minute where it was the code of a kernel that is gone.
const STOCK: &str = "tsc=reliable retain_initrd";

/// What a host is to be.
pub(crate) struct Host<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) image: &'a Path,
    /// The disk that it starts from in place of the image, if it has systemd.
    pub(crate) systemd: Option<&'a Path>,
    pub(crate) memory_mib: u32,
    /// One that it may write to: the second.
    pub(crate) disk: Option<&'a Path>,
    pub(crate) case: &'a str,
    pub(crate) ground: Ground,
    /// What its kernels are told besides.
    pub(crate) parameters: &'a str,
    /// What the case is told besides.
    pub(crate) with: &'a [(String, String)],
    /// Where its memory is written to at its kexec.
    pub(crate) capture: Option<&'a Path>,
    pub(crate) verbose: bool,
}

impl Host<'_> {
    /// Boots it, and waits for what it says of its case.
    pub(crate) fn run(&self, patience: Duration) -> Result<()> {
        let mut capture = self.capture.map(|to| Capture::new(to, self.memory_mib));
        let mut command = self.command()?;
        command.args(capture.iter().flat_map(Capture::arguments));
        let mut emulator = Emulator(command.spawn().context("qemu-system-x86_64 cannot be run")?);
        let lines = emulator.lines()?;
        let until = Instant::now() + patience;
        let mut said: Vec<String> = Vec::new();
        loop {
            let line = match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => bail!("it says nothing in time{}", last(&said)),
                Err(RecvTimeoutError::Disconnected) => bail!("it ended before its case did{}", last(&said)),
            };
            if self.verbose {
                println!("    {line}");
            }
            if let Some(capture) = &mut capture {
                capture.hear(&line)?;
            }
            match line.strip_prefix("e2e: ") {
                Some("passed") => return capture.map_or(Ok(()), |capture| capture.check()),
                Some(failed) if failed.starts_with("FAILED ") => bail!("{}{}", &failed[7..], last(&said)),
                _ => said.push(line),
            }
        }
    }

    fn command(&self) -> Result<Command> {
        let bytes = if self.systemd.is_some() { 0 } else { std::fs::metadata(self.image)?.len() };
        let with = |(name, value): &(String, String)| format!(" e2e.with.{name}={value}");
        let with: String = self.with.iter().map(with).collect();
        let ground = match self.ground {
            Ground::Built => format!("{TSC} {BUILT}"),
            Ground::Stock => STOCK.to_owned(),
        };
        let mut told = format!(
            "console=ttyS0 panic=-1 {ground} e2e.case={} e2e.life=1 e2e.initrd={bytes}{with} {}",
            self.case, self.parameters
        );
        if self.systemd.is_some() {
            told += " root=/dev/vda rw systemd.show_status=no";
        }
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", TCG, "-cpu", "max", "-smp", "2", "-m"])
            .arg(format!("{}M", self.memory_mib))
            // A kernel that sizes the graphics card's memory while another processor runs has ended QEMU 7.2.
            .args([
                "-vga",
                "none",
                "-display",
                "none",
                "-monitor",
                "none",
                "-serial",
                "stdio",
                "-no-reboot",
                "-net",
                "none",
            ])
            .arg("-kernel")
            .arg(self.kernel)
            .args(["-append", &told])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let drive = match self.systemd {
            // It ends with the host: nothing has to last.
            Some(disk) => format!("file={},format=raw,if=virtio,cache=unsafe", disk.display()),
            None => {
                command.arg("-initrd").arg(self.image);
                format!("file={},format=raw,if=virtio,readonly=on", self.image.display())
            }
        };
        command.args(["-drive", &drive]);
        if let Some(disk) = self.disk {
            // It ends with the host: nothing has to last.
            command.arg("-drive").arg(format!("file={},format=raw,if=virtio,cache=unsafe", disk.display()));
        }
        Ok(command)
    }
}

/// It ends with this.
struct Emulator(Child);

impl Emulator {
    /// What the host says on its console, line by line, without what could harm a terminal.
    fn lines(&mut self) -> Result<mpsc::Receiver<String>> {
        let output = self.0.stdout.take().context("the emulator has no output")?;
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let mut lines = BufReader::new(output).split(b'\n');
            while let Some(Ok(line)) = lines.next() {
                let line = String::from_utf8_lossy(&line);
                let line: String = line.chars().filter(|letter| !letter.is_control()).collect();
                if tell.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(told)
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn last(said: &[String]) -> String {
    let lines = said.iter().skip(said.len().saturating_sub(LAST_LINES));
    lines.fold("; its last lines:".to_owned(), |text, line| text + "\n    " + line)
}
