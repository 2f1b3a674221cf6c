//! The rings: a crate's first folder says what it may depend on, and arrows only point inward.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Component, Path};

use crate::cargo::{Kind, Workspace};
use crate::{Verdict, sources};

/// The rings from the inside out, and after them what stands outside of them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ring {
    Pure,
    Sys,
    State,
    Carriers,
    Programs,
    /// Tests of the whole, examples, chores: may use every crate; no crate of a ring may use them.
    Outside,
}

impl Ring {
    const ALL: [Self; 5] = [Self::Pure, Self::Sys, Self::State, Self::Carriers, Self::Programs];
    const FOLDERS_OUTSIDE: [&str; 4] = ["e2e", "examples", "fuzz", "xtask"];

    /// The ring of what lies at a path relative to the workspace's root.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let Some(Component::Normal(first)) = path.components().next() else {
            return None;
        };
        let first = first.to_str()?;
        if Self::FOLDERS_OUTSIDE.contains(&first) {
            return Some(Self::Outside);
        }
        Self::ALL.into_iter().find(|ring| ring.name() == first)
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Pure => "pure",
            Self::Sys => "sys",
            Self::State => "state",
            Self::Carriers => "carriers",
            Self::Programs => "programs",
            Self::Outside => "outside",
        }
    }
}

impl fmt::Display for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A dependency of one workspace crate on another that the rings do not allow.
#[derive(Debug, PartialEq, Eq)]
struct Outward {
    from: (Ring, String),
    to: (Ring, String),
    kind: Option<Kind>,
}

impl Outward {
    fn remedy(&self) -> String {
        if self.to.0 == Ring::Outside {
            return if self.kind == Some(Kind::Dev) {
                "a test may use e2e/ and what lies inward; move the test to e2e/".to_owned()
            } else {
                "only dev-dependencies may use e2e/, nothing may use the rest".to_owned()
            };
        }
        format!("move what {} needs inward, or hand it in through a trait that it owns", self.from.1)
    }
}

/// What was found of the rings.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rings {
    arrows: usize,
    outward: Vec<Outward>,
    /// Crates in a folder that is no ring.
    homeless: Vec<String>,
}

fn look(workspace: &Workspace) -> Rings {
    let mut found = Rings::default();
    let mut members = BTreeMap::new();
    for package in &workspace.packages {
        let folder = workspace.short(package.folder());
        match Ring::of(folder) {
            Some(ring) => drop(members.insert(package.folder(), (ring, folder, package))),
            None => found.homeless.push(format!("{} ({})", package.name, folder.display())),
        }
    }
    for (from, _, package) in members.values() {
        for dependency in &package.dependencies {
            let target = dependency.path.as_deref().and_then(|path| members.get(path));
            let Some((to, folder, _)) = target else { continue };
            found.arrows += 1;
            let e2e_in_a_test = dependency.kind == Some(Kind::Dev) && folder.starts_with("e2e");
            if to > from && !e2e_in_a_test {
                found.outward.push(Outward {
                    from: (*from, package.name.clone()),
                    to: (*to, dependency.name.clone()),
                    kind: dependency.kind,
                });
            }
        }
    }
    found
}

/// The verb `deps`.
pub(crate) fn run() -> Verdict {
    let workspace = Workspace::read()?;
    let rings = look(&workspace);
    for name in &rings.homeless {
        println!("{name} lies in no ring: its first folder must be pure, sys, state, carriers or programs,");
        println!("    or stand outside: {}", Ring::FOLDERS_OUTSIDE.join(", "));
    }
    if !rings.outward.is_empty() {
        println!("Arrows that point outward (programs -> carriers -> state -> sys -> pure):");
        println!("{:<9} {:<22} {:<9} {:<22} {:<7} what to do", "ring", "crate", "ring", "depends on", "as");
    }
    for arrow in &rings.outward {
        let kind = match arrow.kind {
            None => "normal",
            Some(Kind::Build) => "build",
            Some(Kind::Dev) => "dev",
        };
        println!(
            "{:<9} {:<22} {:<9} {:<22} {kind:<7} {}",
            arrow.from.0,
            arrow.from.1,
            arrow.to.0,
            arrow.to.1,
            arrow.remedy()
        );
    }
    let faults = sources::look(&workspace)?;
    for fault in &faults.found {
        println!("{fault}");
    }
    let faults_found = rings.homeless.len() + rings.outward.len() + faults.found.len();
    let crates = workspace.packages.len();
    if faults_found == 0 {
        println!(
            "deps: {crates} crates, {} arrows between them, none outward; {} source files keep to their ring",
            rings.arrows, faults.files
        );
    } else {
        println!("deps: {faults_found} faults in {crates} crates");
    }
    Ok(faults_found == 0)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A package in the folder `folder` of a workspace at `/ws`, named by the folder's last part.
    fn package(folder: &str, dependencies: &[(&str, &str)]) -> String {
        let name = |folder: &str| folder.rsplit('/').next().unwrap().to_owned();
        let dependencies: Vec<_> = dependencies
            .iter()
            .map(|(path, kind)| format!(r#"{{"name":"{}","kind":{kind},"path":"/ws/{path}"}}"#, name(path)))
            .chain([r#"{"name":"libc","kind":null}"#.to_owned()])
            .collect();
        format!(
            r#"{{"name":"{}","manifest_path":"/ws/{folder}/Cargo.toml","targets":[],"dependencies":[{}]}}"#,
            name(folder),
            dependencies.join(",")
        )
    }

    fn look_at(packages: &[String]) -> Rings {
        let json = format!(
            r#"{{"workspace_root":"/ws","target_directory":"/ws/target","packages":[{}]}}"#,
            packages.join(",")
        );
        look(&Workspace::parse(json.as_bytes()).unwrap())
    }

    #[test]
    fn inward_and_level_arrows_are_counted_and_allowed() {
        let rings = look_at(&[
            package("pure/pages", &[]),
            package("pure/abi", &[("pure/pages", "null")]),
            package("sys/region", &[("pure/pages", "null"), ("e2e/harness", r#""dev""#)]),
            package("programs/tideover", &[("sys/region", r#""build""#), ("pure/abi", "null")]),
            package("e2e/harness", &[]),
            package("xtask", &[("e2e/harness", "null")]),
        ]);
        assert_eq!(rings, Rings { arrows: 6, ..Rings::default() });
    }

    #[test]
    fn an_outward_arrow_is_named_with_both_ends() {
        let rings = look_at(&[
            package("sys/region", &[("state/kho", "null")]),
            package("state/kho", &[("carriers/socket", r#""build""#)]),
            package("carriers/socket", &[]),
        ]);
        let arrow = |from: (Ring, &str), to: (Ring, &str), kind| Outward {
            from: (from.0, from.1.to_owned()),
            to: (to.0, to.1.to_owned()),
            kind,
        };
        assert_eq!(
            rings.outward,
            [
                arrow((Ring::State, "kho"), (Ring::Carriers, "socket"), Some(Kind::Build)),
                arrow((Ring::Sys, "region"), (Ring::State, "kho"), None),
            ]
        );
    }

    #[test]
    fn a_test_may_not_reach_outward_but_for_e2e() {
        let rings = look_at(&[
            package("state/kho", &[("carriers/socket", r#""dev""#), ("xtask", r#""dev""#)]),
            package("carriers/socket", &[]),
            package("xtask", &[]),
        ]);
        assert_eq!(rings.outward.len(), 2);
    }

    #[test]
    fn e2e_is_for_tests_only() {
        let rings = look_at(&[package("state/kho", &[("e2e/harness", "null")]), package("e2e/harness", &[])]);
        assert_eq!(rings.outward.len(), 1);
        assert!(rings.outward[0].remedy().contains("only dev-dependencies"));
    }

    #[test]
    fn a_crate_in_another_folder_lies_in_no_ring() {
        let rings = look_at(&[package("util/strings", &[])]);
        assert_eq!(rings.homeless, ["strings (util/strings)"]);
    }

    /// R0.10.
    #[test]
    fn who_only_makes_vms_links_nothing_that_preserves_them() {
        let workspace = Workspace::read().unwrap();
        let linked = |folder: &str| -> Vec<PathBuf> {
            let package = workspace.packages.iter().find(|package| package.folder().ends_with(folder));
            let dependencies = &package.unwrap().dependencies;
            let linked = dependencies.iter().filter(|dependency| dependency.kind.is_none());
            linked.filter_map(|dependency| dependency.path.clone()).collect()
        };
        let kvm = linked("sys/kvm");
        let preserves =
            |path: &PathBuf| ["state", "carriers"].iter().any(|ring| workspace.short(path).starts_with(ring));
        assert!(!kvm.is_empty() && !kvm.iter().any(preserves), "{kvm:?}");
        // Not so what is linked to have a machine preserved.
        assert!(linked("carriers/socket").iter().any(preserves));
    }
}
