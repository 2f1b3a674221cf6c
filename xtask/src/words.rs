//! What must not be in the tree: paths of one person's machine, package hosts that a build
//! elsewhere does not use, and untidy white space.

use std::fmt;
use std::path::Path;

use crate::cargo::Workspace;
use crate::{Verdict, tree};

/// First folders of absolute paths that lead to one person's machine. A path that many machines
/// have, as `/dev/kvm` or `/tmp/vm.sock`, is no fault.
const PERSONAL: [&str; 4] = ["farm", "home", "root", "work"];

/// Parts of names that build tools and job runners give to folders in a `/tmp` of their own.
const SCRATCH: [&str; 2] = ["jobs", "target"];

/// Hosts of package registries and of mirrors of them, in two parts, so that this list is no fault.
/// `Cargo.lock` names what is used, and `deny.toml` what may be.
const REGISTRIES: [(&str, &str); 7] = [
    ("index", ".crates.io"),
    ("static", ".crates.io"),
    ("pypi", ".org"),
    ("pythonhosted", ".org"),
    ("registry.npmjs", ".org"),
    ("proxy.golang", ".org"),
    ("arti", "factory"),
];

/// One fault in one line.
#[derive(Debug, PartialEq, Eq)]
enum Fault {
    Path(String),
    Registry(String),
    TrailingBlank,
    LeadingTab,
    Tab,
    NoNewline,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{path} is a path of one machine"),
            Self::Registry(host) => write!(f, "{host} is a host of a package registry"),
            Self::TrailingBlank => f.write_str("white space at the end of the line"),
            Self::LeadingTab => f.write_str("indented with a tab"),
            Self::Tab => f.write_str("a tab; use spaces"),
            Self::NoNewline => f.write_str("the last line has no newline at its end"),
        }
    }
}

/// The absolute paths in a line: from a `/` that no letter, digit or `/` precedes.
fn absolute_paths(line: &str) -> impl Iterator<Item = &str> {
    let starts = line.match_indices('/').filter(|(at, _)| {
        let before = line[..*at].chars().next_back();
        !before.is_some_and(|before| before.is_alphanumeric() || before == '/')
    });
    let ends = |c: char| !(c.is_alphanumeric() || "/._-".contains(c));
    starts.map(move |(at, _)| {
        let rest = &line[at..];
        &rest[..rest.find(ends).unwrap_or(rest.len())]
    })
}

fn is_of_one_machine(path: &str) -> bool {
    let mut parts = path.split('/').skip(1);
    let (Some(first), Some(second)) = (parts.next(), parts.next()) else {
        return false;
    };
    PERSONAL.contains(&first) || first == "tmp" && SCRATCH.iter().any(|part| second.contains(part))
}

fn look(file: &Path, text: &str) -> Vec<(usize, Fault)> {
    let name = file.file_name().unwrap_or_default();
    let extension = file.extension().unwrap_or_default();
    let is_rust = extension == "rs";
    let is_prose = extension == "md";
    let mut found = Vec::new();
    for (line, number) in text.split('\n').zip(1..) {
        let paths = absolute_paths(line).filter(|path| is_of_one_machine(path));
        found.extend(paths.map(|path| (number, Fault::Path(path.to_owned()))));
        if name != "Cargo.lock" {
            let hosts = REGISTRIES.iter().map(|(first, rest)| format!("{first}{rest}"));
            let hosts = hosts.filter(|host| line.contains(host.as_str()));
            found.extend(hosts.map(|host| (number, Fault::Registry(host))));
        }
        if (is_rust || is_prose) && line.ends_with(char::is_whitespace) {
            found.push((number, Fault::TrailingBlank));
        }
        if is_rust && line.starts_with('\t') {
            found.push((number, Fault::LeadingTab));
        }
        if is_prose && line.contains('\t') {
            found.push((number, Fault::Tab));
        }
    }
    if (is_rust || is_prose) && !text.is_empty() && !text.ends_with('\n') {
        found.push((text.lines().count(), Fault::NoNewline));
    }
    found
}

/// The verb `words`.
pub(crate) fn run() -> Verdict {
    let root = Workspace::read()?.root;
    let (mut read, mut faults) = (0_usize, 0_usize);
    for file in tree::files(&root)? {
        let Some(text) = tree::text(&root, &file)? else {
            continue;
        };
        read += 1;
        for (line, fault) in look(&file, &text) {
            faults += 1;
            println!("{}:{line}: {fault}", file.display());
        }
    }
    if faults == 0 {
        println!("words: {read} text files, nothing to object to");
    } else {
        println!("words: {faults} faults in {read} text files");
    }
    Ok(faults == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(file: &str, text: &str) -> Vec<(usize, Fault)> {
        look(Path::new(file), text)
    }

    fn path(line: usize, path: &str) -> (usize, Fault) {
        (line, Fault::Path(path.to_owned()))
    }

    #[test]
    fn a_path_of_one_machine_is_found_wherever_it_stands() {
        for first in PERSONAL {
            let bad = format!("/{first}/x-1");
            assert_eq!(faults("a", &bad), [path(1, &bad)]);
            assert_eq!(faults("a", &format!("\nsee \"{bad}\", then")), [path(2, &bad)]);
            assert_eq!(faults("a", &format!("file={bad}:{bad}")), [path(1, &bad), path(1, &bad)]);
        }
        let bad = format!("/tmp/{}-x/debug", SCRATCH[1]);
        assert_eq!(faults("a", &format!("({bad})")), [path(1, &bad)]);
    }

    #[test]
    fn a_folder_of_that_name_deeper_down_is_no_fault() {
        for first in PERSONAL {
            assert_eq!(faults("a", &format!("net{first}/x a/{first}/x //{first}/x /{first}")), []);
        }
        assert_eq!(faults("a", "/tmp/vm.sock /dev/kvm /homeless/x"), []);
    }

    #[test]
    fn a_registry_is_found_but_in_the_lock_file() {
        let (first, rest) = REGISTRIES[0];
        let text = format!("{first}{rest}");
        assert_eq!(faults("a.toml", &text), [(1, Fault::Registry(text.clone()))]);
        assert_eq!(faults("Cargo.lock", &text), []);
    }

    #[test]
    fn white_space_is_looked_at_in_rust_and_in_prose() {
        assert_eq!(faults("a.rs", "x \n"), [(1, Fault::TrailingBlank)]);
        assert_eq!(faults("a.md", "x\r\n"), [(1, Fault::TrailingBlank)]);
        assert_eq!(faults("a.rs", "\n\tx\n"), [(2, Fault::LeadingTab)]);
        assert_eq!(faults("a.rs", "x = \"\t\";\n"), []);
        assert_eq!(faults("a.md", "x\ty\n"), [(1, Fault::Tab)]);
        assert_eq!(faults("a.md", "x\n\ny"), [(3, Fault::NoNewline)]);
        assert_eq!(faults("Makefile", "\tx \n"), []);
    }
}
