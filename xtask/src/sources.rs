//! What the ring of a crate, and the size that a reader can hold, ask of its source files.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cargo::Workspace;
use crate::deps::Ring;
use crate::tree;

/// A file longer than this is two files.
const MOST_LINES: usize = 900;

/// What was found of the source files.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    pub(crate) files: usize,
    pub(crate) found: Vec<Fault>,
}

/// One file that breaks one rule.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    file: PathBuf,
    rule: Rule,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    Forbid,
    Lowered { line: usize },
    NoStd,
    Length { lines: usize },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        match self.rule {
            Rule::Forbid => write!(
                f,
                "{file}: `unsafe` is for sys/ alone; open this file, after its //! docs, with #![forbid(unsafe_code)]"
            ),
            Rule::Lowered { line } => write!(
                f,
                "{file}:{line}: lowers the lint unsafe_code, which only sys/ may; move the unsafe part there"
            ),
            Rule::NoStd => {
                write!(f, "{file}: a crate of pure/ opens with #![no_std] or #![cfg_attr(not(test), no_std)]")
            }
            Rule::Length { lines } => {
                write!(f, "{file}: {lines} lines, of {MOST_LINES} at most; split it by its nouns")
            }
        }
    }
}

/// The attributes of a file, each with the number of its first line, in one piece and without
/// blanks.
fn attributes(text: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let mut open = false;
    for (line, number) in text.lines().map(str::trim).zip(1..) {
        if !open && (line.starts_with("#[") || line.starts_with("#![")) {
            found.push((number, String::new()));
            open = true;
        }
        if let Some((_, attribute)) = found.last_mut().filter(|_| open) {
            attribute.extend(line.split_whitespace());
            open = !line.contains(']');
        }
    }
    found
}

fn root_faults(ring: Ring, is_lib: bool, text: &str) -> Vec<Rule> {
    let attributes = attributes(text);
    let any = |is: fn(&str) -> bool| attributes.iter().any(|(_, attribute)| is(attribute));
    let mut found = Vec::new();
    let forbids = |line: &str| line.starts_with("#![forbid(") && line.contains("unsafe_code");
    if ring != Ring::Sys && !any(forbids) {
        found.push(Rule::Forbid);
    }
    let no_std = |line: &str| matches!(line, "#![no_std]" | "#![cfg_attr(not(test),no_std)]");
    if ring == Ring::Pure && is_lib && !any(no_std) {
        found.push(Rule::NoStd);
    }
    found
}

fn file_faults(ring: Option<Ring>, text: &str) -> Vec<Rule> {
    let mut found = Vec::new();
    let lines = text.lines().count();
    if lines > MOST_LINES {
        found.push(Rule::Length { lines });
    }
    if ring != Some(Ring::Sys) {
        for (line, attribute) in attributes(text) {
            if attribute.contains("unsafe_code") && !attribute.contains("forbid(") {
                found.push(Rule::Lowered { line });
            }
        }
    }
    found
}

/// Reads every Rust file of the tree, and the root of every library and program once more.
pub(crate) fn look(workspace: &Workspace) -> Result<Faults> {
    let mut faults = Faults::default();
    let is_rust = |file: &PathBuf| file.extension().is_some_and(|extension| extension == "rs");
    for file in tree::files(&workspace.root)?.into_iter().filter(is_rust) {
        faults.files += 1;
        let text = tree::text(&workspace.root, &file)?.unwrap_or_default();
        for rule in file_faults(Ring::of(&file), &text) {
            faults.found.push(Fault { file: file.clone(), rule });
        }
    }
    for target in workspace.packages.iter().flat_map(|package| &package.targets) {
        let file = workspace.short(&target.src_path);
        let Some(ring) = Ring::of(file).filter(|_| target.is("lib") || target.is("bin")) else {
            continue;
        };
        let text = tree::text(&workspace.root, file)?.unwrap_or_default();
        for rule in root_faults(ring, target.is("lib"), &text) {
            faults.found.push(Fault { file: Path::to_owned(file), rule });
        }
    }
    Ok(faults)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_outside_sys_must_forbid_unsafe() {
        let bare = "//! Docs.\nfn main() {}\n";
        assert_eq!(root_faults(Ring::State, true, bare), [Rule::Forbid]);
        assert_eq!(root_faults(Ring::Outside, false, bare), [Rule::Forbid]);
        assert_eq!(root_faults(Ring::Sys, true, bare), []);
        let forbids = "//! Docs.\n\n#![forbid(unsafe_code)]\n";
        assert_eq!(root_faults(Ring::State, true, forbids), []);
    }

    #[test]
    fn a_comment_that_forbids_does_not_count() {
        let text = "//! #![forbid(unsafe_code)]\n// #![forbid(unsafe_code)]\n";
        assert_eq!(root_faults(Ring::State, true, text), [Rule::Forbid]);
    }

    #[test]
    fn a_pure_library_must_be_no_std() {
        let forbids = "#![forbid(unsafe_code)]\n";
        assert_eq!(root_faults(Ring::Pure, true, forbids), [Rule::NoStd]);
        for line in ["#![no_std]", "#![cfg_attr(not(test), no_std)]"] {
            assert_eq!(root_faults(Ring::Pure, true, &format!("{line}\n{forbids}")), []);
        }
    }

    #[test]
    fn the_lint_may_be_lowered_in_sys_alone() {
        let text = "\n#![expect(unsafe_code, reason = \"system calls\")]\n";
        assert_eq!(file_faults(Some(Ring::Sys), text), []);
        assert_eq!(file_faults(Some(Ring::Programs), text), [Rule::Lowered { line: 2 }]);
        assert_eq!(file_faults(None, text), [Rule::Lowered { line: 2 }]);
    }

    #[test]
    fn an_attribute_over_many_lines_is_seen_whole() {
        let text = "#![expect(\n    unsafe_code,\n    reason = \"x\"\n)]\nunsafe_code\n";
        assert_eq!(file_faults(Some(Ring::State), text), [Rule::Lowered { line: 1 }]);
    }

    #[test]
    fn the_nine_hundred_and_first_line_is_too_many() {
        assert_eq!(file_faults(None, &"x\n".repeat(900)), []);
        assert_eq!(file_faults(None, &"x\n".repeat(901)), [Rule::Length { lines: 901 }]);
    }
}
