//! A host's memory at the instant when what a kernel hands over is whole, and nothing of it has been used by the next one.

use std::io::BufRead as _;
use std::io::BufReader;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use serde_json::Value;
use serde_json::json;

/// How long the emulator may take for one order: it writes all of the host's memory.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for the first line of the kernel after the first.
pub(super) struct Capture<'a> {
    to: &'a Path,
    memory_bytes: u64,
    socket: PathBuf,
    kernels: u32,
}

impl<'a> Capture<'a> {
    pub(super) fn new(to: &'a Path, memory_mib: u32) -> Self {
        let socket = std::env::temp_dir().join(format!("tideover-e2e-{}.qmp", std::process::id()));
        Self { to, memory_bytes: u64::from(memory_mib) << 20, socket, kernels: 0 }
    }

    /// What the emulator is told to have the monitor where this comes to it.
    pub(super) fn arguments(&self) -> [String; 2] {
        ["-qmp".to_owned(), format!("unix:{},server=on,wait=off", self.socket.display())]
    }

    /// Hears a line of the host's console, before any other is read.
    pub(super) fn hear(&mut self, line: &str) -> Result<()> {
        if !line.contains("] Linux version ") {
            return Ok(());
        }
        self.kernels += 1;
        if self.kernels == 2 {
            self.take()
                .with_context(|| format!("cannot write the host's memory to {}", self.to.display()))?;
            println!("e2e: the host's memory is in {}", self.to.display());
        }
        Ok(())
    }

    fn take(&self) -> Result<()> {
        let file = std::path::absolute(self.to)?;
        let file = file.to_str().context("its path is not UTF-8")?;
        let mut monitor = Monitor::connect(&self.socket)?;
        monitor.order("stop", &json!({}))?;
        monitor.order("pmemsave", &json!({ "val": 0, "size": self.memory_bytes, "filename": file }))?;
        monitor.order("cont", &json!({}))
    }

    /// Nothing was written: the case has no second kernel.
    pub(super) fn check(&self) -> Result<()> {
        if self.kernels < 2 {
            bail!("there was no kexec, and so nothing to be captured");
        }
        Ok(())
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        // It may never have been made.
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// The emulator's monitor.
struct Monitor {
    orders: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(socket: &Path) -> Result<Self> {
        let orders = UnixStream::connect(socket).or_else(|_| {
            // The emulator makes it before the host starts, but is given the time to.
            thread::sleep(Duration::from_millis(200));
            UnixStream::connect(socket)
        });
        let orders = orders.context("there is no monitor")?;
        orders.set_read_timeout(Some(PATIENCE))?;
        let answers = BufReader::new(orders.try_clone()?);
        let mut monitor = Self { orders, answers };
        monitor.order("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn order(&mut self, what: &str, arguments: &Value) -> Result<()> {
        writeln!(self.orders, "{}", json!({ "execute": what, "arguments": arguments }))?;
        let mut line = String::new();
        loop {
            line.clear();
            if self.answers.read_line(&mut line).with_context(|| format!("no answer to {what}"))? == 0 {
                bail!("the emulator is gone");
            }
            // Greetings and events come in between.
            let answer: Value = serde_json::from_str(&line).context("an answer that is no JSON")?;
            match (answer.get("return"), answer.get("error")) {
                (Some(_), _) => return Ok(()),
                (_, Some(error)) => bail!("{what}: {error}"),
                _ => {}
            }
        }
    }
}
