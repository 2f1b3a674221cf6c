//! `tideover inspect`: what is handed over, read from wherever it is.

mod branch;
mod diff;
mod html;
mod json;
mod show;
mod source;

use std::io;
use std::io::BufWriter;
use std::io::ErrorKind;
use std::io::Write;
use std::process::ExitCode;

use abi::Memory;
use anyhow::Context as _;
use clap::CommandFactory as _;
use serde::Serialize;
use serde::Serializer;
use serde::ser::SerializeSeq as _;
use serde::ser::SerializeStruct as _;
use survey::File;
use survey::FolioLine;
use survey::Folios;
use survey::Severity;
use survey::Survey;

use crate::cli;
use source::Hints;
pub(crate) use source::Named;
use source::Source;
use source::Told;

/// What is written as JSON; its schema is docs/inspect.schema.json.
#[derive(Serialize)]
struct Report<'a> {
    source: &'a Told,
    #[serde(flatten)]
    survey: &'a Survey,
    folios: Option<AllFolios<'a>>,
}

/// An address as people write it: hexadecimal behind `0x`, else decimal.
pub(crate) fn address(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| "an address is a number, as 0x4f3000".to_owned())
}

pub(crate) fn inspect(arguments: &cli::Inspect) -> anyhow::Result<ExitCode> {
    check(arguments);
    let mut out = BufWriter::new(std::io::stdout().lock());
    let code = match (arguments.sources.as_slice(), arguments.diff) {
        ([source], false) => show(&mut out, arguments, source)?,
        ([from, to], true) => compare(&mut out, arguments, [from, to])?,
        (_, true) => wrong("--diff compares two sources"),
        _ => wrong("two sources are for --diff"),
    };
    done(out.flush())?;
    Ok(code)
}

/// Ends this as a wrong command line does.
fn wrong(text: impl std::fmt::Display) -> ! {
    let mut command = cli::Cli::command();
    command.build();
    let verb = command.find_subcommand_mut("inspect");
    let error = clap::error::ErrorKind::ValueValidation;
    match verb {
        Some(verb) => verb.error(error, text).exit(),
        None => command.error(error, text).exit(),
    }
}

/// Ends this if something is told of a source of which it is known.
fn check(arguments: &cli::Inspect) {
    if arguments.sources.iter().all(Named::is_memory) {
        return;
    }
    if arguments.fdt_address.is_some() {
        wrong("--fdt-address is for memory:FILE: of every other source it is known where it begins");
    }
    if arguments.booted {
        wrong("--booted is for memory:FILE: of every other source it is known what may be stale");
    }
}

fn show(out: &mut impl Write, arguments: &cli::Inspect, named: &Named) -> anyhow::Result<ExitCode> {
    let source = Source::open(named, hints(arguments))?;
    let survey = source.survey();
    if let Some(path) = &arguments.html {
        html::write(path, &Report { source: &source.told, survey: &survey, folios: None }, named.text())?;
        return Ok(verdict(arguments, &survey));
    }
    let written = match arguments.json {
        true => {
            let folios = arguments.folios.then(|| AllFolios { memory: source.memory(), survey: &survey });
            json::write(out, &Report { source: &source.told, survey: &survey, folios })
        }
        false => show::write(out, &source, &survey, arguments.folios, arguments.verify),
    };
    done(written)?;
    Ok(verdict(arguments, &survey))
}

fn hints(arguments: &cli::Inspect) -> Hints {
    Hints { fdt: arguments.fdt_address, booted: arguments.booted }
}

fn verdict(arguments: &cli::Inspect, survey: &Survey) -> ExitCode {
    let nothing = survey.kho.as_ref().is_none_or(|kho| kho.version.is_empty());
    let wrong = nothing || survey.findings.iter().any(|finding| finding.severity == Severity::Error);
    if arguments.verify && wrong { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn compare(out: &mut impl Write, arguments: &cli::Inspect, sources: [&Named; 2]) -> anyhow::Result<ExitCode> {
    let [from, to] = sources;
    let (from, to) = (Source::open(from, hints(arguments))?, Source::open(to, hints(arguments))?);
    let (before, after) = (from.survey(), to.survey());
    let diff = diff::diff((&from.told, &before), (&to.told, &after));
    done(if arguments.json { json::write(out, &diff) } else { diff.write(out) })?;
    Ok(ExitCode::SUCCESS)
}

/// Who reads no further, as `head`, has what he wants.
fn done(written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("cannot write the result"),
        _ => Ok(()),
    }
}

/// The folios of all files, each list written as it is read.
struct AllFolios<'a> {
    memory: &'a dyn Memory,
    survey: &'a Survey,
}

impl Serialize for AllFolios<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let folios = survey::folios(&self.memory, self.survey);
        let mut list = serializer.serialize_seq(None)?;
        let sessions = self.survey.luo.iter().flat_map(|luo| &luo.sessions);
        for (session, place) in sessions.zip(0u64..) {
            for file in session.files.iter().filter(|file| file.folio_table.is_some()) {
                list.serialize_element(&FileFolios { folios: &folios, session: place, file })?;
            }
        }
        list.end()
    }
}

/// The folios of one file.
struct FileFolios<'a, 'm> {
    folios: &'a Folios<'m, &'m dyn Memory>,
    session: u64,
    file: &'a File,
}

impl Serialize for FileFolios<'_, '_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("FileFolios", 3)?;
        fields.serialize_field("session", &self.session)?;
        fields.serialize_field("token", &self.file.token)?;
        fields.serialize_field("list", &Lines(self))?;
        fields.end()
    }
}

struct Lines<'a, 'b, 'm>(&'a FileFolios<'b, 'm>);

impl Serialize for Lines<'_, '_, '_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(FileFolios { folios, file, .. }) = self;
        let mut list = serializer.serialize_seq(None)?;
        let mut result = Ok(());
        folios.list(file, &mut |line: &FolioLine| {
            if result.is_ok() {
                result = list.serialize_element(line);
            }
        });
        result?;
        list.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_hexadecimal_or_not() {
        assert_eq!([address("0x4f3000"), address("12")], [Ok(0x4f_3000), Ok(12)]);
        assert!(["4f3000", "0x", "-1", "0x10000000000000000"].into_iter().all(|text| address(text).is_err()));
    }
}
