//! How long a machine that is a unit of systemd's stands still while its unit is restarted, beside the restart of a process that has
//! nothing to keep.
//!
//! A real systemd does it: a user's manager, in a mount namespace with an empty `/run`, where no other systemd is met. So this takes root
//! and systemd, of this host. The unit is the one that is shipped, without the lines by which the manager confines it.

mod bare;

use std::fs;
use std::fs::File;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitCode;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;
use clap::Parser;
use measure::numbers;
use measure::numbers::Spread;
use measure::quiet::Quiet;
use serde_json::Value;

const MANAGER: &str = "/lib/systemd/systemd";
const UNIT: &str = include_str!("../../../../dist/systemd/system/tideover@.service");
/// What a user's manager cannot grant, or takes namespaces for that this one has no right to.
const CONFINES: [&str; 5] = ["Protect", "Restrict", "SystemCall", "LockPersonality", "Limit"];
/// What a restart may take that nothing keeps from coming.
const PATIENCE: Duration = Duration::from_secs(60);
/// The pause may be longer than the bare restart by this.
const TARGET_MS: f64 = 10.0;

/// Measures restarts of a machine's unit against restarts of a process alone. Run by `cargo bench`; arguments go behind `--`.
#[derive(Debug, Parser)]
#[command(after_help = "Example: cargo bench --bench restart -- --memory 1GiB --restarts 40")]
struct Arguments {
    /// Pairs of restarts.
    #[arg(long, value_name = "N", default_value_t = 20)]
    restarts: u32,
    /// Guest memory.
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    memory: String,
    /// How long to wait, all in all, for moments in which the machine does nothing else, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    patience: u64,
    /// Measure this build of `tideover` instead of the one at hand.
    #[arg(long, value_name = "PATH", default_value = env!("CARGO_BIN_EXE_tideover"), hide_default_value = true)]
    program: PathBuf,
    /// Be in the namespace.
    #[arg(long, hide = true)]
    inside: bool,
    /// Be the main process of the bare unit, or what stops it.
    #[arg(long, hide = true)]
    be: Option<bare::Role>,
    /// What cargo says.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.be {
        Some(role) => bare::be(role),
        None if arguments.inside => measure(&arguments),
        None => enter(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs this in a mount namespace of its own.
fn enter() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "this bench mounts an empty /run for itself: run it as root"
    );
    ensure!(
        Path::new(MANAGER).exists(),
        "this bench restarts units, and there is no {MANAGER}: install systemd"
    );
    let mut inside = Command::new("unshare");
    inside.arg("--mount").arg(std::env::current_exe()?).arg("--inside").args(std::env::args_os().skip(1));
    let status = inside.status().context("unshare cannot be run: install util-linux")?;
    ensure!(status.success(), "nothing was measured");
    Ok(())
}

/// The manager, which ends with this.
struct Manager {
    process: Child,
    units: PathBuf,
    runtime: PathBuf,
}

impl Drop for Manager {
    fn drop(&mut self) {
        // All of its units end with it.
        let _ = self.command("exit", &[]);
        let _ = self.process.wait();
    }
}

impl Manager {
    fn start() -> Result<Self> {
        let run = Path::new("/run");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/run"]).status()?;
        ensure!(mounted.success(), "cannot mount an empty /run");
        let (runtime, units) = (run.join("user"), run.join("home/.config/systemd/user"));
        fs::create_dir_all(&units)?;
        fs::create_dir_all(run.join("systemd/system"))?;
        fs::create_dir_all(run.join("etc"))?;
        for private in [&runtime, &run.join("tideover")] {
            fs::DirBuilder::new().mode(0o700).create(private)?;
        }
        let log = File::create(run.join("log"))?;
        let mut process = Command::new(MANAGER);
        process.arg("--user").env("HOME", "/run/home").env("XDG_RUNTIME_DIR", &runtime);
        process
            .env("SYSTEMD_LOG_TARGET", "console")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let manager = Self { process: process.spawn().context(MANAGER)?, units, runtime };
        let begun = Instant::now();
        while manager.command("is-system-running", &[]).is_err() {
            ensure!(begun.elapsed() < PATIENCE, "no manager: {}", fs::read_to_string(run.join("log"))?);
            thread::sleep(Duration::from_millis(50));
        }
        Ok(manager)
    }

    fn add(&self, name: &str, unit: &str) -> Result<()> {
        fs::write(self.units.join(name), unit)?;
        self.command("daemon-reload", &[])
    }

    fn command(&self, verb: &str, units: &[&str]) -> Result<()> {
        let mut systemctl = Command::new("systemctl");
        systemctl.args(["--user", "--no-pager", verb]).args(units).env("XDG_RUNTIME_DIR", &self.runtime);
        let output = systemctl.stdin(Stdio::null()).output().context("systemctl cannot be run")?;
        let log = || fs::read_to_string("/run/log").unwrap_or_default();
        ensure!(
            output.status.success(),
            "systemctl {verb} {units:?}: {}{}",
            String::from_utf8_lossy(&output.stderr),
            log()
        );
        Ok(())
    }
}

/// One restart of each, in milliseconds.
struct Pair {
    pause: f64,
    bare: f64,
    phases: Vec<(String, f64)>,
}

fn measure(arguments: &Arguments) -> Result<()> {
    let manager = Manager::start()?;
    let unit = unit(&arguments.program)?;
    fs::write("/run/etc/m1.conf", format!("OPTIONS=--memory {}\n", arguments.memory))?;
    manager.add("tideover@.service", &unit)?;
    manager.add("tideover-bare@.service", &bare::unit(&std::env::current_exe()?, &unit))?;
    manager.command("start", &["tideover@m1", "tideover-bare@m1"])?;
    let mut quiet = Quiet::new(Duration::from_secs(arguments.patience));
    let mut pairs = Vec::new();
    for _ in 0..arguments.restarts {
        quiet.wait();
        manager.command("restart", &["tideover@m1"])?;
        let (pause, phases) = pause(&arguments.program)?;
        quiet.wait();
        manager.command("restart", &["tideover-bare@m1"])?;
        pairs.push(Pair { pause, bare: bare::last_restart()?, phases });
    }
    manager.command("stop", &["tideover@m1", "tideover-bare@m1"])?;
    print(&pairs, &arguments.memory)
}

/// What is shipped, with this program and these places.
fn unit(program: &Path) -> Result<String> {
    let program = program.to_str().context("the program's path is not UTF-8")?;
    let lines = UNIT.lines().filter(|line| !CONFINES.iter().any(|confines| line.starts_with(confines)));
    let unit: Vec<String> = lines
        .map(|line| line.replace("/usr/bin/tideover", program).replace("/etc/tideover", "/run/etc"))
        .collect();
    Ok(unit.join("\n"))
}

/// How long the machine stood still in its last restart, and in what parts.
fn pause(program: &Path) -> Result<(f64, Vec<(String, f64)>)> {
    let mut report = Command::new(program);
    let output = report.args(["report", "m1", "--json"]).env("TIDEOVER_DIR", "/run/tideover").output()?;
    ensure!(output.status.success(), "no report: {}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let report = report.get(0).context("an empty report")?;
    let millis = |value: &Value| Some(value.as_f64()? / 1000.0);
    let pause = millis(&report["pause_us"]).context("no pause")?;
    let phases = report["phases_us"].as_object().context("no phases")?;
    Ok((pause, phases.iter().filter_map(|(name, took)| Some((name.clone(), millis(took)?))).collect()))
}

fn print(pairs: &[Pair], memory: &str) -> Result<()> {
    let show = |name: &str, values: &[f64]| -> Result<()> {
        let spread = Spread::of(values).context("no restarts")?;
        let Spread { count, median, lower_quartile, upper_quartile, max, .. } = spread;
        println!(
            "{name:>24}  {median:7.2} ms ({lower_quartile:.2} to {upper_quartile:.2}, at most {max:.2}; {count})"
        );
        Ok(())
    };
    println!("{memory}: medians, with the range of the middle half");
    for (place, (name, _)) in pairs.first().context("no restarts")?.phases.iter().enumerate() {
        let took = pairs.iter().filter_map(|pair| Some(pair.phases.get(place)?.1));
        show(name, &took.collect::<Vec<_>>())?;
    }
    let differences: Vec<f64> = pairs.iter().map(|pair| pair.pause - pair.bare).collect();
    show("the machine's pause", &pairs.iter().map(|pair| pair.pause).collect::<Vec<_>>())?;
    show("a bare restart", &pairs.iter().map(|pair| pair.bare).collect::<Vec<_>>())?;
    show("the difference", &differences)?;
    match numbers::median_upper_bound(&differences) {
        Some(bound) => println!(
            "the difference's median lies below {bound:.2} ms with 95 % confidence; it is to be below {TARGET_MS} ms: {}",
            if bound < TARGET_MS { "yes" } else { "no" }
        ),
        None => println!("too few restarts to tell how far that can be trusted"),
    }
    Ok(())
}
