//! Figures for Prometheus, by HTTP.

use std::fmt::Write as _;
use std::io::Read as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use tracing::debug;

use crate::agent::Agents;
use crate::daemon::Daemon;
use crate::entry::Keeping;

/// How long one who asks may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of a request's first line.
const LINE: usize = 1024;

/// Where they are asked for.
#[derive(Debug)]
pub(crate) struct Metrics(TcpListener);

impl AsFd for Metrics {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Metrics {
    pub(crate) fn bind(address: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
        listener.set_nonblocking(true).context("cannot listen")?;
        Ok(Self(listener))
    }

    /// Answers one who has come, on a thread of its own: it may be slow.
    pub(crate) fn serve(&self, daemon: &Daemon, agents: &Agents) {
        let Ok((stream, _)) = self.0.accept() else { return };
        let text = text(daemon, agents);
        let answer = move || {
            if let Err(error) = answer(stream, &text) {
                debug!(%error, "metrics were not read");
            }
        };
        if let Err(error) = thread::Builder::new().name("metrics".to_owned()).spawn(answer) {
            debug!(%error, "metrics were not served");
        }
    }
}

fn answer(mut stream: TcpStream, text: &str) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    let mut some = [0; 256];
    while !request.contains(&b'\n') && request.len() < LINE {
        match stream.read(&mut some)? {
            0 => break,
            len => request.extend(&some[..len]),
        }
    }
    let (status, body) = match request.starts_with(b"GET /metrics ") {
        true => ("200 OK", text),
        false => ("404 Not Found", "metrics are at /metrics\n"),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

fn text(daemon: &Daemon, agents: &Agents) -> String {
    let bytes = |keeping| {
        let these = daemon.entries.values().filter(move |entry| entry.keeping() == keeping);
        these.filter_map(|entry| Some(entry.remains()?.about.bytes)).sum::<u64>()
    };
    let count = |keeping| daemon.tally(keeping) as u64;
    let counts = daemon.counts;
    let gauges: [(&str, &str, u64); 7] = [
        ("tideover_machines_kept", "Machines that a process has and that are kept.", count(Keeping::Kept)),
        ("tideover_machines_alone", "Machines that are here and that no process has.", count(Keeping::Alone)),
        ("tideover_machines_not_kept", "Machines that are not here yet.", count(Keeping::Not)),
        ("tideover_bytes_kept", "Bytes of memory of the machines that are kept.", bytes(Keeping::Kept)),
        (
            "tideover_bytes_alone",
            "Bytes of memory of the machines that no process has.",
            bytes(Keeping::Alone),
        ),
        ("tideover_peers", "Connections at the agents' socket.", agents.count() as u64),
        ("tideover_files_limit", "Files that may be open.", daemon.files),
    ];
    let counters: [(&str, &str, u64); 3] = [
        ("tideover_deaths_total", "VMMs that died while their machine was kept.", counts.deaths),
        ("tideover_holders_total", "Holders that were started.", counts.holders),
        ("tideover_dropped_total", "Machines given up because memory ran out.", counts.dropped),
    ];
    let mut text = String::new();
    let kinds = [("gauge", &gauges[..]), ("counter", &counters[..])];
    for (kind, (name, help, value)) in
        kinds.iter().flat_map(|(kind, all)| all.iter().map(move |one| (kind, one)))
    {
        // A string takes all that is written to it.
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n");
    }
    text
}
