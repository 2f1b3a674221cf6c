//! The tests of the tree, as they stand in its source.
//!
//! Read line by line and by indentation, which `cargo fmt` keeps: no macro is expanded, so a test that a macro makes
//! is not found, except in `proptest!`, where it stands as it would outside.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cargo::{Package, Target, Workspace};

/// A test function.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Test {
    /// Its file, relative to the root of the workspace.
    pub(crate) file: PathBuf,
    /// The line of its `fn`.
    pub(crate) line: usize,
    /// The lines of its doc comment.
    pub(crate) docs: Vec<String>,
}

/// All tests, by [`name`]. More than one has a name only if something is amiss.
pub(crate) type Catalogue = BTreeMap<String, Vec<Test>>;

/// What a test is called by everyone: its package, the program for one in a package's `tests/`, its path there.
pub(crate) fn name(package: &Package, program: &str, path: &str) -> String {
    let is_program = |target: &&Target| target.is("test") && stem(&target.name) == program;
    match package.targets.iter().find(is_program) {
        Some(target) => format!("{}::{}::{path}", package.name, target.name),
        None => format!("{}::{path}", package.name),
    }
}

/// A target's name as a crate has it.
fn stem(target: &str) -> String {
    target.replace('-', "_")
}

/// Reads every test of every package.
pub(crate) fn read(workspace: &Workspace) -> Result<Catalogue> {
    let mut catalogue = Catalogue::new();
    for package in &workspace.packages {
        let tested = |target: &&Target| ["lib", "bin", "test"].iter().any(|kind| target.is(kind));
        for target in package.targets.iter().filter(tested) {
            let root = Module { file: target.src_path.clone(), owns_folder: true, path: Vec::new() };
            for (path, test) in tests_below(workspace, root)? {
                let name = name(package, &stem(&target.name), &path);
                catalogue.entry(name).or_default().push(test);
            }
        }
    }
    Ok(catalogue)
}

/// A module that has a file.
struct Module {
    file: PathBuf,
    /// Its submodules' files lie beside it, as those of `lib.rs` do, and not in a folder of its name.
    owns_folder: bool,
    path: Vec<String>,
}

fn tests_below(workspace: &Workspace, root: Module) -> Result<Vec<(String, Test)>> {
    let mut found = Vec::new();
    let mut modules = vec![root];
    while let Some(module) = modules.pop() {
        let file = &module.file;
        let text =
            std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
        let Items { tests, submodules } = items(&text);
        for (path, line, docs) in tests {
            let path: Vec<String> = module.path.iter().cloned().chain(path).collect();
            found.push((path.join("::"), Test { file: workspace.short(file).to_owned(), line, docs }));
        }
        modules.extend(submodules.into_iter().filter_map(|submodule| file_of(&module, submodule)));
    }
    Ok(found)
}

fn file_of(parent: &Module, submodule: Submodule) -> Option<Module> {
    let beside = parent.file.parent().unwrap_or(Path::new(""));
    let name = submodule.path.last()?.clone();
    let path = parent.path.iter().cloned().chain(submodule.path.iter().cloned()).collect();
    if let Some(file) = submodule.file {
        return Some(Module { file: beside.join(file), owns_folder: true, path });
    }
    let mut folder = beside.to_owned();
    if !parent.owns_folder {
        folder.push(parent.file.file_stem()?);
    }
    folder.extend(&submodule.path[..submodule.path.len() - 1]);
    let plain = folder.join(format!("{name}.rs"));
    let own = folder.join(&name).join("mod.rs");
    let owns_folder = !plain.is_file();
    let file = if owns_folder { own } else { plain };
    // One that is not there is another system's; the compiler misses what it needs.
    file.is_file().then_some(Module { file, owns_folder, path })
}

/// `mod name;`, by its path in its file.
#[derive(Debug, PartialEq, Eq)]
struct Submodule {
    path: Vec<String>,
    /// What `#[path]` says.
    file: Option<String>,
}

#[derive(Debug, Default)]
struct Items {
    /// Path in the file, line, doc comment.
    tests: Vec<(Vec<String>, usize, Vec<String>)>,
    submodules: Vec<Submodule>,
}

/// What stands before an item.
#[derive(Default)]
struct Before {
    docs: Vec<String>,
    is_test: bool,
    file: Option<String>,
}

fn items(text: &str) -> Items {
    let mut items = Items::default();
    // Modules that are open, and how far they are indented.
    let mut open: Vec<(usize, String)> = Vec::new();
    let mut before = Before::default();
    let mut in_attribute = false;
    for (number, line) in (1..).zip(text.lines()) {
        let trimmed = line.trim();
        let indent = line.len() - line.trim_start().len();
        let within =
            |name: &str| open.iter().map(|(_, name)| name.clone()).chain([name.to_owned()]).collect();
        if in_attribute || trimmed.starts_with("#[") {
            before.is_test |= trimmed == "#[test]";
            let path = trimmed.strip_prefix("#[path = \"").and_then(|rest| rest.strip_suffix("\"]"));
            before.file = path.map(str::to_owned).or(before.file);
            in_attribute = !trimmed.ends_with(']');
        } else if let Some(doc) = trimmed.strip_prefix("///") {
            before.docs.push(doc.trim().to_owned());
        } else if let Some(name) = named("mod ", trimmed) {
            if trimmed.ends_with('{') {
                open.push((indent, name.to_owned()));
            } else if trimmed.ends_with(';') {
                items.submodules.push(Submodule { path: within(name), file: before.file.take() });
            }
            before = Before::default();
        } else if let Some(name) = named("fn ", trimmed) {
            if before.is_test {
                items.tests.push((within(name), number, std::mem::take(&mut before.docs)));
            }
            before = Before::default();
        } else if !trimmed.starts_with("//") {
            if trimmed == "}" && open.last().is_some_and(|(of, _)| *of == indent) {
                open.pop();
            }
            before = Before::default();
        }
    }
    items
}

/// The name in `mod name` or `fn name`, whatever the visibility.
fn named<'a>(keyword: &str, line: &'a str) -> Option<&'a str> {
    let line = ["pub ", "pub(crate) ", "pub(super) "]
        .iter()
        .find_map(|seen| line.strip_prefix(seen))
        .unwrap_or(line);
    let rest = line.strip_prefix(keyword)?;
    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    (end > 0).then(|| &rest[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(text: &str) -> Vec<String> {
        items(text).tests.into_iter().map(|(path, ..)| path.join("::")).collect()
    }

    #[test]
    fn a_function_is_a_test_if_the_attribute_is_among_its_own() {
        let text = "#[test]\nfn a() {\n    x();\n}\n\nfn b() {}\n\n#[should_panic]\n#[test]\nfn c() {}\n";
        assert_eq!(paths(text), ["a", "c"]);
        assert_eq!(paths("#[test]\nconst X: u8 = 1;\nfn a() {}\n"), [""; 0]);
    }

    #[test]
    fn the_attribute_may_be_followed_by_one_over_many_lines() {
        assert_eq!(paths("#[test]\n#[expect(\n    x,\n    reason = \"y\"\n)]\nfn a() {}\n"), ["a"]);
    }

    #[test]
    fn a_test_has_its_modules_in_its_path_until_they_close() {
        let text = "mod one {\n    mod two {\n        #[test]\n        fn a() {\n            {\n            }\n        }\n    }\n    #[test]\n    fn b() {}\n}\n#[test]\nfn c() {}\n";
        assert_eq!(paths(text), ["one::two::a", "one::b", "c"]);
    }

    #[test]
    fn a_property_is_a_test_of_the_module_that_the_macro_stands_in() {
        let text = "mod tests {\n    proptest! {\n        #![proptest_config(x)]\n\n        #[test]\n        fn a(x: u8) {\n        }\n    }\n}\n";
        assert_eq!(paths(text), ["tests::a"]);
    }

    #[test]
    fn a_doc_comment_is_the_tests_wherever_it_stands_among_the_attributes() {
        let text =
            "/// Of nobody.\n\n/// First.\n#[test]\n// No doc.\n/// R1.1.\nfn a() {}\n#[test]\nfn b() {}\n";
        let docs: Vec<_> = items(text).tests.into_iter().map(|(_, line, docs)| (line, docs)).collect();
        assert_eq!(docs, [(7, vec!["First.".to_owned(), "R1.1.".to_owned()]), (9, vec![])]);
    }

    #[test]
    fn submodules_are_listed_with_the_file_that_is_said() {
        let text = "mod a;\n#[path = \"x/y.rs\"]\npub(crate) mod b;\nmod c {\n    mod d;\n}\n";
        let one = |path: &[&str], file: Option<&str>| Submodule {
            path: path.iter().map(|name| (*name).to_owned()).collect(),
            file: file.map(str::to_owned),
        };
        let expected = [one(&["a"], None), one(&["b"], Some("x/y.rs")), one(&["c", "d"], None)];
        assert_eq!(items(text).submodules, expected);
    }

    #[test]
    fn this_very_test_is_found_in_the_tree() {
        let workspace = Workspace::read().unwrap();
        let catalogue = read(&workspace).unwrap();
        let own = &catalogue["xtask::catalogue::tests::this_very_test_is_found_in_the_tree"];
        assert_eq!(own.len(), 1);
        assert_eq!(own[0].file, Path::new("xtask/src/catalogue.rs"));
        let of_a_program =
            "tideover-machine::lifecycle::death::before_the_seal_leaves_the_memory_and_a_dead_owner";
        assert_eq!(catalogue[of_a_program][0].file, Path::new("state/machine/tests/lifecycle/death.rs"));
        assert!(catalogue.contains_key("tideover-luo::rules::finish::files_are_finished_last_first"));
    }
}
