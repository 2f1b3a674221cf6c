//! What one state has that another has not.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io;
use std::io::Write;

use serde::Serialize;
use serde_json::Value;
use survey::File;
use survey::Survey;

use super::branch::Branch;
use super::show::bytes;
use super::source::Told;

/// Fields of a file that say where it is in the survey, not what it is.
const PLACES: [&str; 2] = ["owner", "token_hex"];
/// Things of a kind that are shown to people: who wants all of them wants the JSON.
const MOST: usize = 64;

/// What is written as JSON; its schema is docs/inspect-diff.schema.json.
#[derive(Debug, Serialize)]
pub(super) struct Diff<'a> {
    from: &'a Told,
    to: &'a Told,
    same: bool,
    /// Things that the second has alone.
    came: Vec<Thing>,
    /// Things that the first has alone.
    went: Vec<Thing>,
    changed: Vec<Change>,
    /// All ranges of both were compared; else the first 4,096 of each.
    ranges_complete: bool,
}

/// Something that is there in one of the two.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Thing {
    /// `session`, `file`, `subtree`, `region` or `range`.
    kind: &'static str,
    /// Which, escaped.
    name: String,
}

/// Something that is there in both and is not the same.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Change {
    kind: &'static str,
    name: String,
    field: String,
    /// As JSON.
    before: String,
    after: String,
}

/// What is compared: things by name, each with its fields.
type Things = BTreeMap<Thing, BTreeMap<String, Value>>;

/// Compares two states.
pub(super) fn diff<'a>(from: (&'a Told, &Survey), to: (&'a Told, &Survey)) -> Diff<'a> {
    let (first, second) = (things(from.1), things(to.1));
    let alone = |these: &Things, others: &Things| -> Vec<Thing> {
        these.keys().filter(|thing| !others.contains_key(thing)).cloned().collect()
    };
    let (came, went) = (alone(&second, &first), alone(&first, &second));
    let mut changed = Vec::new();
    for (thing, before) in &first {
        let Some(after) = second.get(thing) else { continue };
        let fields: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
        for field in fields.into_iter().filter(|field| before.get(*field) != after.get(*field)) {
            let text =
                |fields: &BTreeMap<String, Value>| fields.get(field).unwrap_or(&Value::Null).to_string();
            changed.push(Change {
                kind: thing.kind,
                name: thing.name.clone(),
                field: field.clone(),
                before: text(before),
                after: text(after),
            });
        }
    }
    let same = came.is_empty() && went.is_empty() && changed.is_empty();
    let ranges_complete = from.1.ranges_left_out == 0 && to.1.ranges_left_out == 0;
    Diff { from: from.0, to: to.0, same, came, went, changed, ranges_complete }
}

fn things(survey: &Survey) -> Things {
    let mut things = Things::new();
    let mut put = |kind, name: String, fields: BTreeMap<String, Value>| {
        // Two of one name are a broken state; each is a thing.
        let mut thing = Thing { kind, name };
        while things.contains_key(&thing) {
            thing.name.push_str(" (again)");
        }
        things.insert(thing, fields);
    };
    put("state", "KHO and LUO".to_owned(), state(survey));
    for blob in survey.kho.iter().flat_map(|kho| &kho.blobs) {
        let fields = [("address", Value::from(blob.address)), ("bytes", Value::from(blob.bytes))];
        put("subtree", blob.name.to_string(), named(fields));
    }
    for region in survey.arena.iter().flat_map(|arena| &arena.regions) {
        put("region", format!("{:#x}", region.address), flat(region));
    }
    for session in survey.luo.iter().flat_map(|luo| &luo.sessions) {
        put("session", session.name.to_string(), named([("count", Value::from(session.count))]));
        for file in &session.files {
            put("file", format!("{} {}", session.name, file.token_hex), fields(file));
        }
    }
    for range in &survey.ranges {
        let owner = range.owner.and_then(|owner| survey.owners.get(owner));
        let owner = owner.map_or("nothing", |owner| &owner.label);
        let (from, to) = (range.address, range.address.saturating_add(range.bytes.saturating_sub(1)));
        put("range", format!("{from:#014x} to {to:#014x}, order {}, {owner}", range.order), BTreeMap::new());
    }
    things
}

fn named<const N: usize>(fields: [(&str, Value); N]) -> BTreeMap<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn state(survey: &Survey) -> BTreeMap<String, Value> {
    let (kho, luo, arena) = (survey.kho.as_ref(), survey.luo.as_ref(), survey.arena.as_ref());
    let owner = arena.and_then(|arena| arena.ownership.as_ref());
    let slot = arena.and_then(|arena| arena.slots.iter().find(|slot| slot.counts));
    let orders = kho.map(|kho| serde_json::to_value(&kho.preserved_by_order).unwrap_or_default());
    named([
        ("machine", Value::from(arena.and_then(|arena| arena.identity.clone()))),
        ("owner", Value::from(owner.map(|owner| owner.state.clone()))),
        ("epoch", Value::from(owner.map(|owner| owner.epoch))),
        ("generation", Value::from(slot.map(|slot| slot.generation))),
        ("kho version", Value::from(kho.map(|kho| kho.version.clone()))),
        ("luo version", Value::from(luo.map(|luo| luo.version.clone()))),
        ("liveupdate number", Value::from(luo.and_then(|luo| luo.liveupdate_number))),
        ("preserved bytes", Value::from(kho.and_then(|kho| kho.preserved_bytes))),
        ("preserved by order", orders.unwrap_or_default()),
        ("nodes of the tree", Value::from(kho.map(|kho| kho.tree.nodes))),
        ("unreferenced bytes", Value::from(survey.unreferenced.bytes)),
        ("findings", Value::from(survey.findings.len())),
    ])
}

fn fields(file: &File) -> BTreeMap<String, Value> {
    let mut fields = flat(file);
    PLACES.iter().for_each(|place| drop(fields.remove(*place)));
    fields
}

/// The fields of a structure; those of one in it behind its name.
fn flat(value: &impl Serialize) -> BTreeMap<String, Value> {
    let mut fields = BTreeMap::new();
    let Ok(Value::Object(map)) = serde_json::to_value(value) else { return fields };
    for (name, value) in map {
        match value {
            Value::Object(inner) => {
                fields.extend(inner.into_iter().map(|(field, value)| (format!("{name}.{field}"), value)));
            }
            value => drop(fields.insert(name, value)),
        }
    }
    fields
}

impl Diff<'_> {
    /// For people.
    pub(super) fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        let name = |told: &Told| told.name.escape_debug().to_string();
        let mut branch = Branch::new(format!("from {} to {}", name(self.from), name(self.to)));
        if self.same {
            branch.push("no difference");
        }
        for (heading, things) in [("came", &self.came), ("went", &self.went)] {
            if things.is_empty() {
                continue;
            }
            let mut list = Branch::new(heading);
            things.iter().take(MOST).for_each(|thing| list.push(format!("{} {}", thing.kind, thing.name)));
            if things.len() > MOST {
                list.push(format!("and {} more: --json lists them", things.len() - MOST));
            }
            branch.push(list);
        }
        if !self.changed.is_empty() {
            branch.push(self.changes());
        }
        if !self.ranges_complete {
            branch.push("of the ranges the first 4,096 of each were compared");
        }
        branch.write(to)
    }

    fn changes(&self) -> Branch<'_> {
        let mut changes = Branch::new("changed");
        let mut last: Option<(&str, &str, Branch<'_>)> = None;
        for change in self.changed.iter().take(MOST) {
            let line = format!(
                "{}: {} -> {}",
                change.field,
                said(change, &change.before),
                said(change, &change.after)
            );
            match &mut last {
                Some((kind, name, of)) if (*kind, *name) == (change.kind, &*change.name) => of.push(line),
                _ => {
                    let next = Branch::new(format!("{} {}", change.kind, change.name)).with(line);
                    let before = last.replace((change.kind, &change.name, next));
                    before.into_iter().for_each(|(_, _, branch)| changes.push(branch));
                }
            }
        }
        last.into_iter().for_each(|(_, _, branch)| changes.push(branch));
        if self.changed.len() > MOST {
            changes.push(format!("and {} more: --json lists them", self.changed.len() - MOST));
        }
        changes
    }
}

/// A value for people.
fn said(change: &Change, value: &str) -> String {
    let is_length = change.field.ends_with("bytes") || matches!(&*change.field, "size" | "data");
    match value.parse::<u64>() {
        Ok(number) if change.field == "data" => format!("{number:#x}"),
        Ok(number) if is_length => bytes(number),
        _ => value.escape_debug().to_string().replace("\\\"", "\""),
    }
}
