//! Completion scripts and manual pages, made from the command line's own description.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::CommandFactory as _;

use crate::cli;
use crate::cli::Cli;

pub(crate) fn completions(arguments: &cli::Completions) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "tideover", &mut script);
    std::io::stdout().write_all(&script).context("cannot write the script")?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn man(arguments: &cli::Man) -> anyhow::Result<ExitCode> {
    let directory = &arguments.directory;
    let failed = || format!("cannot write manual pages into {}", directory.display());
    std::fs::create_dir_all(directory).with_context(failed)?;
    clap_mangen::generate_to(Cli::command(), directory).with_context(failed)?;
    clap_mangen::generate_to(tideoverd::command(), directory).with_context(failed)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_page_and_is_completed() {
        let directory = std::env::temp_dir().join(format!("tideover-man-{}", std::process::id()));
        man(&cli::Man { directory: directory.clone() }).unwrap();
        let mut script = Vec::new();
        clap_complete::generate(clap_complete::Shell::Bash, &mut Cli::command(), "tideover", &mut script);
        let script = String::from_utf8(script).unwrap();
        for verb in Cli::command().get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let page = directory.join(format!("tideover-{}.1", verb.get_name()));
            assert!(std::fs::read_to_string(page).unwrap().contains("SYNOPSIS"), "{}", verb.get_name());
            assert!(script.contains(verb.get_name()));
        }
        std::fs::remove_dir_all(directory).unwrap();
    }
}
