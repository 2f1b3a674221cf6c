//! `tideover setup reserve`: which memory is set aside, and how a kernel is told.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;

use super::arguments::Form;
use super::arguments::Reserve;
use super::iomem::Map;
use super::memmap;
use super::modules::Modules;
use super::plan::Plan;
use super::write;
use super::write::Written;
use crate::check;
use crate::check::Host;
use crate::size;

/// What every kernel has to be told.
const REPEAT: &str = "Every kernel that is booted by kexec has to be given the same parameters: one that is not uses the memory as its own.";
/// How the parameters are written down.
const QUOTES: &str =
    "In /etc/default/grub and in /etc/kernel/cmdline they stand as they are; in a shell put them into '…'.";

/// What is written as JSON; its schema is docs/reserve.schema.json.
#[derive(Debug, Serialize)]
struct Report<'a> {
    plans: &'a [Plan],
    memory_bytes: u64,
    told: &'a [String],
    written: Vec<&'a str>,
    then: &'a [String],
}

/// What was found out and done.
#[derive(Debug)]
struct Done {
    plans: Vec<Plan>,
    size_bytes: u64,
    /// The kernel's memory as it is now.
    memory_bytes: u64,
    /// What this kernel sets aside already.
    told: Vec<String>,
    written: Option<Written>,
}

pub(super) fn reserve(arguments: &Reserve) -> anyhow::Result<ExitCode> {
    if arguments.check {
        return check::reserved_memory(&Host::this(), arguments.json);
    }
    let done = run(&Host::this(), arguments)?;
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&done.report())? + "\n",
        false => done.show(),
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write the result")?;
    Ok(ExitCode::SUCCESS)
}

fn run(host: &Host, arguments: &Reserve) -> anyhow::Result<Done> {
    let size_bytes = arguments.size.context("no size is given")?;
    let map = Map::of_host(host)?;
    let modules = Modules::of_host(host);
    let forms = arguments.form.map_or(vec![Form::Devdax, Form::Fsdax], |form| vec![form]);
    let plans = forms.into_iter().map(|form| Plan::make(&map, &modules, form, size_bytes, arguments.at));
    let plans = plans.collect::<Result<Vec<Plan>, _>>()?;
    let told = memmap::told(&host.text("/proc/cmdline").unwrap_or_default());
    let told = told.iter().filter(|item| item.given_as().is_some()).map(memmap::Item::shown).collect();
    let written = match arguments.write {
        true => plans.first().map(|plan| write::write(host, plan)).transpose()?,
        false => None,
    };
    Ok(Done { plans, size_bytes, memory_bytes: map.memory_bytes(), told, written })
}

impl Done {
    fn report(&self) -> Report<'_> {
        let written = self.written.iter().flat_map(|written| &written.files);
        Report {
            plans: &self.plans,
            memory_bytes: self.memory_bytes,
            told: &self.told,
            written: written.map(|(path, _)| path.as_str()).collect(),
            then: self.written.as_ref().map_or(&[], |written| &written.then),
        }
    }

    fn show(&self) -> String {
        let mut text = format!("{} of {}", size::show(self.size_bytes), check::amount(self.memory_bytes));
        text += " that this host has as System RAM; the rest stays the host's\n";
        for plan in &self.plans {
            text += &show_plan(plan);
        }
        text += "\n";
        if !self.told.is_empty() {
            text += &format!(
                "This kernel sets memory aside already, by {}. What --write wrote for that, --write replaces.\n",
                self.told.join(" ")
            );
        }
        text += &format!("{REPEAT}\n{QUOTES}\n");
        match &self.written {
            Some(written) => text + &show_written(written),
            None => text + "Nothing was written: --as FORM --write does that.\n",
        }
    }
}

fn show_plan(plan: &Plan) -> String {
    let modules: Vec<String> =
        plan.modules.iter().map(|module| format!("{} ({})", module.name, module.have.name())).collect();
    let mut rows = vec![("kernel parameters", plan.line()), ("/proc/iomem after it", plan.iomem.clone())];
    rows.push(("modules", modules.join(", ")));
    rows.extend(plan.then.iter().map(|then| ("then", then.clone())));
    rows.extend(plan.notes.iter().map(|note| ("NOTE", note.clone())));
    let rows = rows.into_iter().map(|(name, value)| format!("  {name:<20}  {value}\n"));
    format!("\n{}: {}\n{}", plan.form.name(), plan.form.about(), rows.collect::<String>())
}

fn show_written(written: &Written) -> String {
    let mut text = String::new();
    for (path, inside) in &written.files {
        text += &format!("\nwritten: {path}\n");
        inside.lines().for_each(|line| text += &format!("  {}\n", line.escape_debug()));
    }
    let then = written.then.iter().map(|then| format!("now run  {then}\n"));
    format!("{text}\n{}and boot this host anew.\n", then.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::super::tests::Tree;
    use super::*;

    fn asked(size: u64, form: Option<Form>, write: bool) -> Reserve {
        Reserve { size: Some(size), at: None, form, write, check: false, json: false }
    }

    #[test]
    fn both_forms_are_shown_and_nothing_is_written_unasked() {
        let tree = Tree::new();
        tree.file("/etc/kernel/cmdline", "quiet\n");
        let text = run(&tree.host(), &asked(1 << 30, None, false)).unwrap().show();
        let (dax, pmem) = (text.find("memmap=1024M%").unwrap(), text.find("memmap=1024M!").unwrap());
        assert!(dax < pmem, "{text}");
        for part in [
            "1 GiB of 23.9 GiB",
            "Soft Reserved",
            "(legacy)",
            "nd_e820 (cannot be told)",
            "same parameters",
            "Nothing was written",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(tree.text("/etc/kernel/cmdline").unwrap(), "quiet\n");
    }

    #[test]
    fn what_was_written_is_shown() {
        let tree = Tree::new();
        tree.file("/etc/kernel/cmdline", "quiet\n");
        tree.file("/proc/cmdline", "memmap=1G!20G memmap=1K#1M");
        let done = run(&tree.host(), &asked(1 << 30, Some(Form::Fsdax), true)).unwrap();
        let text = done.show();
        assert!(text.contains("written: /etc/kernel/cmdline\n  quiet memmap=1024M!0x100000000\n"), "{text}");
        assert!(
            text.contains("already, by memmap=1G!20G.") && text.contains("now run  kernel-install"),
            "{text}"
        );
        let report = serde_json::to_value(done.report()).unwrap();
        assert_eq!(
            report["written"],
            serde_json::json!(["/etc/kernel/cmdline", "/etc/modules-load.d/tideover.conf"])
        );
        assert_eq!(report["plans"][0]["form"], "fsdax");
        assert_eq!(report["plans"][0]["address"], 1_u64 << 32);
    }

    #[test]
    fn who_may_not_see_addresses_is_told_so() {
        let tree = Tree::new();
        let hidden = "00000000-00000000 : Reserved\n00000000-00000000 : System RAM\n  00000000-00000000 : Kernel code\n";
        tree.file("/proc/iomem", hidden);
        let error = run(&tree.host(), &asked(1 << 30, None, false)).unwrap_err();
        assert!(error.to_string().contains("run this as root"), "{error}");
        tree.file("/proc/iomem", "00000000-00000fff : Reserved\n");
        let error = run(&tree.host(), &asked(1 << 30, None, false)).unwrap_err();
        assert!(error.to_string().contains("no System RAM"), "{error}");
    }
}
