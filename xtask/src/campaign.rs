//! `cargo xtask campaign`: builds the crate `tideover-campaign` and runs it: `docs/reliability.md`.

use std::ffi::OsString;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::Verdict;
use crate::cargo::{self, Workspace};
use crate::tally::Tally;

/// What `--smoke` stands for: a minute, the same choices every time.
const SMOKE: [&str; 4] = ["--seed", "1", "--minutes", "1"];

#[derive(clap::Args, Debug)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    /// What to hand to the campaign, as `--seed N`, `--kills N`, `--minutes M`, `--results FILE`, `--carrier socket|exec|both`,
    /// `--json`; `--help` says all of it. Or `--smoke`: a minute of it, which CI runs, and which counts as one test
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    arguments: Vec<OsString>,
}

/// The verb `campaign`.
pub(crate) fn run(options: &Options) -> Verdict {
    let is_smoke = options.arguments == ["--smoke"];
    let arguments = match is_smoke {
        true => SMOKE.map(OsString::from).to_vec(),
        false => options.arguments.clone(),
    };
    let good = campaign(&arguments);
    if !is_smoke {
        return good;
    }
    let good = good.unwrap_or_else(|error| {
        println!("error: {error:#}");
        false
    });
    let (passed, failed) = (usize::from(good), usize::from(!good));
    println!("{}", Tally { passed, failed, ..Tally::default() });
    Ok(good)
}

fn campaign(arguments: &[OsString]) -> Result<bool> {
    let workspace = Workspace::read()?;
    let mut build = cargo::command();
    build.args(["build", "--quiet", "--locked", "--package", "tideover-campaign"]).stdin(Stdio::null());
    let built = build.status().context("cargo cannot be run")?;
    ensure!(built.success(), "the campaign cannot be built: {built}");
    let program = workspace.target_directory.join("debug/tideover-campaign");
    let status = Command::new(&program).args(arguments).stdin(Stdio::null()).status();
    Ok(status.with_context(|| format!("{} cannot be run", program.display()))?.success())
}
