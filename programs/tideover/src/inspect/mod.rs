//! `tideover inspect`: what is handed over, read from wherever it is.

mod json;
mod source;

use std::io::BufWriter;
use std::io::Write as _;
use std::process::ExitCode;

use abi::Memory;
use anyhow::Context as _;
use anyhow::bail;
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

pub(crate) fn inspect(arguments: &cli::Inspect) -> anyhow::Result<ExitCode> {
    let [source] = arguments.sources.as_slice() else { bail!("two sources are for --diff") };
    let source = Source::open(source, arguments.fdt_address)?;
    let survey = source.survey();
    let mut out = BufWriter::new(std::io::stdout().lock());
    let folios = arguments.folios.then(|| AllFolios { memory: source.memory(), survey: &survey });
    json::write(&mut out, &Report { source: &source.told, survey: &survey, folios })?;
    out.flush().context("cannot write the result")?;
    let wrong = survey.findings.iter().any(|finding| finding.severity == Severity::Error);
    Ok(if arguments.verify && wrong { ExitCode::FAILURE } else { ExitCode::SUCCESS })
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
